"""What an evaluation leaves: tables, the worst structures, and a page on which a click shows a structure."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet._version import __version__
from torchmdnet.elements import SYMBOLS
from torchmdnet.evaluation.data import References
from torchmdnet.evaluation.errors import Comparison, formula_of
from torchmdnet.evaluation.plots import draw_calibration, draw_errors, draw_parity
from torchmdnet.files import draft_of, write_json
from torchmdnet.page import cards, document, escape, grid, image
from torchmdnet.viewer import SCRIPT, data_block, looks_of, structure_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Result", "summary_of", "write_all"]

#: Structures in ``worst.extxyz`` for each model, and atoms that are on the page.
WORST, MOST_ATOMS = 20, 60_000


class Result:
    """Models beside the references.

    Args:
        references: The structures.
        labels: Their labels, in eV and Å.
        comparisons: One for each model.
        names: Names of the models, short and different.
        property_labels: For each property that is compared, the name of its label.
    """

    def __init__(
        self,
        references: References,
        labels: dict[str, np.ndarray],
        comparisons: Sequence[Comparison],
        names: Sequence[str],
        property_labels: dict[str, str],
    ) -> None:
        self.references, self.labels = references, labels
        self.comparisons, self.names = list(comparisons), list(names)
        self.property_labels = property_labels
        ptr, z = references.ptr, labels["z"]
        self.formulas = [formula_of(z[a:b]) for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)]

    def name_of(self, number: int) -> str:
        """Where a structure is: its file, or its number in the data."""
        references = self.references
        row = int(references.rows[number])
        if not len(references.files):
            return f"{references.name}, structure {row}"
        file = references.files[number]
        return f"{file}, structure {row - int(np.flatnonzero(_all_files(references) == file)[0])}"

    def worst(self, which: int, most: int = WORST) -> list[int]:
        """Structures with the largest errors of forces, or where there are none of energies, the worst first."""
        each = self.comparisons[which]
        errors = each.force_error if len(each.force_error) else np.abs(each.energy_error)
        order = np.argsort(-np.nan_to_num(errors, nan=-1.0), kind="stable")
        return order[:most].tolist()

    def annotated(self, which: int, number: int) -> Atoms:
        """A structure with labels and predictions of a model, and the errors between them."""
        each, references = self.comparisons[which], self.references
        atoms = references.structure(number)
        inside = slice(int(references.ptr[number]), int(references.ptr[number + 1]))
        atoms.info |= {"source": self.name_of(number), "model": self.names[which]}
        if "energy" in self.labels:
            atoms.info["reference_energy"] = float(self.labels["energy"][number])
            atoms.info["predicted_energy"] = float(each.predictions.energy[number])
            atoms.info["energy_error_meV_per_atom"] = float(each.energy_error[number])
        if "forces" in self.labels:
            atoms.arrays["reference_forces"] = self.labels["forces"][inside]
            atoms.arrays["predicted_forces"] = each.predictions.forces[inside]
            atoms.info["force_mae_meV_per_A"] = float(each.force_error[number])
        return atoms


def _all_files(references: References) -> np.ndarray:
    found = np.full(len(references.frames), "", dtype=object)
    found[references.rows] = references.files
    return found


def summary_of(result: Result) -> dict[str, Any]:
    """All numbers, for ``summary.json`` and ``--json``."""
    references = result.references
    return {
        "version": __version__,
        "data": references.name,
        "structures": len(references),
        "atoms": int(references.ptr[-1]),
        "elements": [SYMBOLS[z] for z in np.unique(result.labels["z"])],
        "level_of_theory": references.level_of_theory,
        "models": [
            {
                "name": name,
                "file": each.model.name,
                "level_of_theory": _level_of(each),
                "has_total_energies": each.model.has_totals,
                "errors": {q.name: {"unit": q.unit, **q.stat.as_dict()} for q in each.quantities},
                "groups": each.groups,
                "calibration": [c._asdict() for c in each.calibrations],
                "worst": [result.name_of(number) for number in result.worst(which)],
            }
            for which, (name, each) in enumerate(zip(result.names, result.comparisons, strict=True))
        ],
    }


def _level_of(each: Comparison) -> str | None:
    from torchmdnet.calculators.loading import members_of

    found = getattr(members_of(each.model.network)[0], "provenance", {}).get("level_of_theory")
    return str(found) if found else None


def write_all(folder: Path, result: Result, notes: Sequence[str]) -> dict[str, Any]:
    """Write everything into a folder, and return the summary.

    Args:
        folder: It exists.
        result: What was found.
        notes: Sentences for the top of the page.
    """
    from ase.io import write

    summary = summary_of(result)
    write_json(folder / "summary.json", summary)
    _write_table(folder / "errors.csv", result)
    pictures: dict[str, bytes] = {}
    for which, (name, each) in enumerate(zip(result.names, result.comparisons, strict=True)):
        end = f"_{name}" if len(result.names) > 1 else ""
        pictures[f"parity{end}.png"] = draw_parity(
            each, result.labels, result.references.counts, result.property_labels
        )
        if each.calibrations:
            pictures[f"calibration{end}.png"] = draw_calibration(each.calibrations)
        with draft_of(folder / f"worst{end}.extxyz") as draft:
            write(draft, [result.annotated(which, number) for number in result.worst(which)], format="extxyz")
    errors = draw_errors(result.comparisons, result.names, result.labels, result.references)
    if errors is not None:
        pictures["errors.png"] = errors
    for name, png in pictures.items():
        with draft_of(folder / name) as draft:
            draft.write_bytes(png)
    with draft_of(folder / "report.html") as draft:
        draft.write_text(_page(result, summary, pictures, notes), encoding="utf-8")
    return summary


def _write_table(path: Path, result: Result) -> None:
    """A row for each structure."""
    columns = ["structure", "formula", "atoms"]
    several = len(result.names) > 1
    values: list[Any] = []
    for name, each in zip(result.names, result.comparisons, strict=True):
        for kind, errors in (
            ("energy_error_meV_per_atom", each.energy_error),
            ("force_mae_meV_per_A", each.force_error),
        ):
            if len(errors):
                columns.append(f"{kind}_{name}" if several else kind)
                values.append(errors)
    with draft_of(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number, (formula, count) in enumerate(zip(result.formulas, result.references.counts, strict=True)):
            errors = ["" if math.isnan(each[number]) else f"{each[number]:.6g}" for each in values]
            writer.writerow([result.name_of(number), formula, count, *errors])


# ------------------------------------------------------------------------------------------------------ the page

_INTERACTIVE = """
const data = JSON.parse(document.getElementById('data').textContent);
const view = new Viewer(document.getElementById('view'), data.looks);
let model = 0, chosen = null;
class Scatter {
  constructor(canvas, get, xname, yname, diagonal) {
    Object.assign(this, {canvas, get, xname, yname, diagonal});
    canvas.addEventListener('click', e => { const i = this.nearest(e); if (i !== null) choose(i) });
    canvas.addEventListener('mousemove', e => { const i = this.nearest(e); canvas.style.cursor = i === null ? '' :
      'pointer'; canvas.title = i === null ? '' : data.names[i] });
  }
  nearest(e) { let best = null, d = 144; const b = this.canvas.getBoundingClientRect();
    this.at.forEach((p, i) => { if (!p) return; const r = (p[0]-e.clientX+b.left)**2 + (p[1]-e.clientY+b.top)**2;
      if (r < d) { d = r; best = i } }); return best }
  draw() {
    const k = devicePixelRatio || 1, w = this.canvas.clientWidth, h = this.canvas.clientHeight;
    this.canvas.width = w*k; this.canvas.height = h*k;
    const g = this.canvas.getContext('2d'); g.setTransform(k,0,0,k,0,0);
    const ink = getComputedStyle(document.body).color; g.clearRect(0,0,w,h); g.font = '12px system-ui, sans-serif';
    const pts = data.names.map((_, i) => this.get(data.models[model], i));
    const xs = pts.filter(p => p[0] !== null && p[1] !== null), L = 58, B = 42, R = 12, T = 10;
    let lo = [Math.min(...xs.map(p => p[0])), Math.min(...xs.map(p => p[1]))];
    let hi = [Math.max(...xs.map(p => p[0])), Math.max(...xs.map(p => p[1]))];
    if (this.diagonal) { lo = [Math.min(...lo), Math.min(...lo)]; hi = [Math.max(...hi), Math.max(...hi)] }
    [0, 1].forEach(j => { const m = 0.04 * (hi[j] - lo[j]) || 1; lo[j] -= m; hi[j] += m });
    const X = v => L + (v - lo[0]) / (hi[0] - lo[0]) * (w - L - R);
    const Y = v => h - B - (v - lo[1]) / (hi[1] - lo[1]) * (h - B - T);
    const step = r => { const s = 10 ** Math.floor(Math.log10(r / 4));
      return [1,2,5,10].map(f => f*s).find(f => r / f <= 6) };
    g.fillStyle = ink; g.strokeStyle = '#8884'; g.lineWidth = 1; g.textAlign = 'center';
    for (let j = 0; j < 2; j++) { const s = step(hi[j] - lo[j]);
      for (let v = Math.ceil(lo[j] / s) * s; v <= hi[j]; v += s) { const t = String(+v.toPrecision(6)); g.beginPath();
        if (j) { g.moveTo(L, Y(v)); g.lineTo(w-R, Y(v)); g.textAlign = 'right'; g.fillText(t, L-6, Y(v)+4) }
        else { g.moveTo(X(v), T); g.lineTo(X(v), h-B); g.textAlign = 'center'; g.fillText(t, X(v), h-B+16) }
        g.stroke() } }
    g.textAlign = 'center'; g.fillText(this.xname, L + (w-L-R)/2, h - 8);
    g.save(); g.translate(13, T + (h-B-T)/2); g.rotate(-Math.PI/2); g.fillText(this.yname, 0, 0); g.restore();
    if (this.diagonal) { g.strokeStyle = ink; g.setLineDash([5,4]); g.beginPath(); g.moveTo(X(lo[0]), Y(lo[0]));
      g.lineTo(X(hi[0]), Y(hi[0])); g.stroke(); g.setLineDash([]) }
    this.at = pts.map(p => p[0] === null || p[1] === null ? null : [X(p[0]), Y(p[1])]);
    g.fillStyle = '#2f6fb0a0'; this.at.forEach(p => { if (!p) return; g.beginPath(); g.arc(p[0], p[1], 3.2, 0, 6.2832);
      g.fill() });
    if (chosen !== null && this.at[chosen]) { g.strokeStyle = '#d9822b'; g.lineWidth = 2.5; g.beginPath();
      g.arc(this.at[chosen][0], this.at[chosen][1], 7, 0, 6.2832); g.stroke() }
  }
}
const plots = [];
const make = (id, ...rest) => { const c = document.getElementById(id); if (c) plots.push(new Scatter(c, ...rest)) };
make('parity', (m, i) => [data.reference[i], m.predicted[i]], 'reference energy [meV/atom]',
  'predicted energy [meV/atom]', true);
make('both', (m, i) => [m.energy ? m.energy[i] : i, m.force[i]],
  data.models[0].energy ? 'error of the energy [meV/atom]' : 'number of the structure', 'force MAE [meV/Å]', false);
function choose(i) { chosen = i; const m = data.models[model];
  const s = {...data.structures[i], hot: m.hot ? [m.hot[i]] : []};
  view.zoom = 1; view.show(s);
  document.getElementById('told').textContent = data.names[i] + ' · ' + data.formulas[i] +
    (m.energy && m.energy[i] !== null ? ' · energy error ' + m.energy[i].toFixed(2) + ' meV/atom' : '') +
    (m.force ? ' · force MAE ' + m.force[i].toFixed(1) + ' meV/Å' : '') +
    (m.hot ? ' · ringed: the atom with the largest error of its force' : '');
  plots.forEach(p => p.draw()) }
const menu = document.getElementById('model');
if (menu) menu.onchange = () => { model = +menu.value; choose(chosen) };
addEventListener('resize', () => { plots.forEach(p => p.draw()); view.draw() });
choose(data.first);
"""


def _page(result: Result, summary: dict[str, Any], pictures: dict[str, bytes], notes: Sequence[str]) -> str:
    references = result.references
    first = summary["models"][0]
    shown = [
        (f"{quantity['mae']:.3g} {quantity['unit']}", f"MAE, {name}") for name, quantity in first["errors"].items()
    ]
    if len(result.names) > 1:
        shown = []
    shown.append((f"{len(references):,}", f"structures with {int(references.ptr[-1]):,} atoms"))
    parts = [
        f"<h1>{escape(', '.join(result.names))}</h1>",
        f'<p class="sub">compared with {escape(references.name)} · torchmd-net {escape(__version__)}</p>',
        *(f"<p><b>{escape(note)}</b></p>" for note in notes),
        cards(shown),
        "<h2>Errors</h2>" + _error_table(result),
        _interactive(result),
        *(f"<h2>{escape(_title(name))}</h2>{image(png, name)}" for name, png in pictures.items()),
        *_group_tables(result),
    ]
    return document(f"Evaluation: {', '.join(result.names)}", parts)


def _title(name: str) -> str:
    stem = name.removesuffix(".png")
    kind, _, model = stem.partition("_")
    words = {"parity": "Predictions against references", "errors": "Where the errors are",
             "calibration": "Is the spread of the ensemble as large as the errors?"}  # fmt: skip
    return words[kind] + (f": {model}" if model else "")


def _error_table(result: Result) -> str:
    several = len(result.names) > 1
    header = ["quantity", "unit", *(["model"] if several else []), "values", "MAE", "RMSE", "95 %", "largest",
              "spread of the reference"]  # fmt: skip
    rows = []
    for place, quantity in enumerate(result.comparisons[0].quantities):
        for name, each in zip(result.names, result.comparisons, strict=True):
            other = each.quantities[place] if place < len(each.quantities) else quantity
            numbers = other.stat
            rows.append(
                [
                    other.name,
                    other.unit,
                    *([name] if several else []),
                    f"{numbers.number:,}",
                    *(f"{value:.3g}" for value in numbers[1:]),
                ]
            )
    return (
        grid(header, rows, 3 if several else 2)
        + '<p class="sub">95 %: so large are 95 of 100 errors at most. The spread of the reference is its standard '
        "deviation, the error (RMSE) of always answering with the mean.</p>"
    )


def _group_tables(result: Result) -> list[str]:
    made = []
    words = {"element": "By element", "composition": "By composition", "file": "By file", "kind": "By config_type"}
    for kind, title in words.items():
        for name, each in zip(result.names, result.comparisons, strict=True):
            rows = each.groups.get(kind)
            if not rows:
                continue
            header = [_in_words(key) for key in rows[0]]
            body = [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows[:200]]
            heading = f"{title}: {name}" if len(result.names) > 1 else title
            more = f'<p class="sub">and {len(rows) - 200} more in summary.json</p>' if len(rows) > 200 else ""
            made.append(f"<h2>{escape(heading)}</h2>{grid(header, body, 1)}{more}")
    return made


def _in_words(key: str) -> str:
    """``force_mae_meV_A`` as it stands above a column: ``force MAE [meV/Å]``."""
    words = key.split("_")
    if len(words) < 3:
        return key
    kind = {"mae": "MAE", "rmse": "RMSE", "p95": "95 %"}[words[1]]
    return f"{words[0]} {kind} [{'meV/Å' if words[-1] == 'A' else 'meV/atom'}]"


def _interactive(result: Result) -> str:
    """Plots of structures that answer a click."""
    references = result.references
    chosen = _chosen(result)
    labels, counts = result.labels, references.counts

    def numbers(values: np.ndarray, digits: int = 4) -> list[float | None]:
        return [None if not math.isfinite(v) else float(f"{v:.{digits + 2}g}") for v in values[chosen].tolist()]

    data: dict[str, Any] = {
        "names": [result.name_of(number) for number in chosen],
        "formulas": [result.formulas[number] for number in chosen],
        "structures": [structure_of(references.structure(number)) for number in chosen],
        "looks": looks_of(labels["z"]),
        "first": chosen.tolist().index(result.worst(0, 1)[0]),
        "models": [],
    }
    reference = None
    if "energy" in labels:
        reference = _relative(1000 * labels["energy"] / counts, result.formulas)
        data["reference"] = numbers(reference)
    for each in result.comparisons:
        one: dict[str, Any] = {}
        if reference is not None:
            one["energy"] = numbers(each.energy_error)
            one["predicted"] = numbers(reference + each.energy_error)
        if len(each.force_error):
            one["force"] = numbers(each.force_error)
            lengths = np.linalg.norm(np.nan_to_num(each.predictions.forces - labels["forces"]), axis=1)
            one["hot"] = [int(lengths[references.ptr[n] : references.ptr[n + 1]].argmax()) for n in chosen]
        data["models"].append(one)
    menu = ""
    if len(result.names) > 1:
        options = "".join(f'<option value="{n}">{escape(name)}</option>' for n, name in enumerate(result.names))
        menu = f'<p>Model: <select id="model">{options}</select></p>'
    style = "width:100%;height:340px;border:1px solid var(--line);border-radius:8px"
    plots = [name for name, there in (("parity", reference is not None), ("both", "forces" in labels)) if there]
    canvases = "".join(f'<canvas id="{name}" style="{style}"></canvas>' for name in plots)
    left_out = len(references) - len(chosen)
    more = f" {left_out:,} of {len(references):,} structures are left out, those with small errors." if left_out else ""
    return (
        "<h2>Structures</h2>"
        '<p class="sub">Click on a point to see its structure; drag to turn it, scroll to zoom. Energies are relative '
        f"to the mean of the composition where there are several structures of it.{more}</p>{menu}"
        f'<div style="display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:.8rem">{canvases}'
        f'<canvas id="view" style="{style}"></canvas></div><p id="told"></p>'
        + data_block("data", data)
        + f"<script>{SCRIPT}{_INTERACTIVE}</script>"
    )


def _relative(values: np.ndarray, formulas: Sequence[str]) -> np.ndarray:
    names = np.array(formulas)
    found = values.copy()
    for name in np.unique(names):
        rows = names == name
        found[rows] -= np.nanmean(values[rows]) if np.isfinite(values[rows]).any() and rows.sum() > 1 else 0.0
    return found


def _chosen(result: Result) -> np.ndarray:
    """Structures that are on the page: all, or those with the largest errors and some of the others."""
    counts = result.references.counts
    total = len(counts)
    if counts.sum() <= MOST_ATOMS:
        return np.arange(total)
    wanted: dict[int, None] = {}
    for which in range(len(result.comparisons)):
        wanted |= dict.fromkeys(result.worst(which, 300))
        energies = np.nan_to_num(np.abs(result.comparisons[which].energy_error))
        wanted |= dict.fromkeys(np.argsort(-energies)[:300].tolist())
    wanted |= dict.fromkeys(np.linspace(0, total - 1, min(total, 2000)).astype(int).tolist())
    order = np.array(list(wanted))
    kept = order[np.cumsum(counts[order]) <= MOST_ATOMS]
    return np.sort(kept) if len(kept) else order[:1]
