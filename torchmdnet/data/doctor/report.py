"""The page of a diagnosis: findings, facts, plots, in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torchmdnet import __version__
from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.findings import SEVERITIES, Finding
from torchmdnet.data.doctor.samples import HISTOGRAM
from torchmdnet.elements import SYMBOLS
from torchmdnet.page import BLUE, GREY, ORANGE, STYLE, document, escape, image, new_figure, png, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

__all__ = ["draw", "html_report", "places"]

_MARKS = {
    "error": '<b style="color:#c8372d">error</b>',
    "warning": '<b style="color:#b8741a">warning</b>',
    "note": '<span class="sub">note</span>',
}


def places(diagnosis: Diagnosis, finding: Finding, most: int = 5) -> str:
    """Where the samples of a finding are, the first of them by name."""
    samples, number = finding.samples, len(finding.samples)
    if not number:
        return ""
    words = [diagnosis.samples.where(i) for i in samples[:most]]
    files = {word.rpartition(", frame ")[0] for word in words}
    if len(files) == 1 and "" not in files:
        frames = ", ".join(word.rpartition(", frame ")[2] for word in words)
        text = f"{files.pop()}, frame{'s' if number > 1 else ''} {frames}"
    elif files == {""}:
        text = f"sample{'s' if number > 1 else ''} {', '.join(word.removeprefix('sample ') for word in words)}"
    else:
        text = "; ".join(words)
    return text + (f" and {number - most:,} more" if number > most else "")


def html_report(diagnosis: Diagnosis) -> str:
    """The page."""
    d = diagnosis
    counts = {severity: d.count(severity) for severity in SEVERITIES}
    cards = [
        (f"{len(d.samples):,}", "samples"),
        (f"{int(d.measured.counts.sum()):,}", "atoms"),
        (f"{counts['error']}", "errors"),
        (f"{counts['warning']}", "warnings"),
        (f"{d.cost.suggested:g} Å", f"suggested cutoff, {d.cost.edges[d.cost.suggested]:.0f} edges per atom"),
    ]
    parts = [
        f"<h1>{escape(d.samples.name)}</h1>",
        f'<p class="sub">dataset: {escape(d.samples.kind)} · torchmd-net {escape(__version__)}</p>',
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
        + "</div>",
        "<h2>Findings</h2>" + _findings(d),
        "<h2>What is in it</h2>" + table(d.facts().items()),
        "<h2>Quantities of the source</h2>" + _grid(("name", "taken as", "shape", "frames"), d.names())
        if d.names()
        else "",
        "<h2>Units</h2>" + _grid(("quantity", "unit", "how sure", "evidence"), _unit_rows(d)),
        "<h2>Plots</h2>" + image(draw(d), "Plots"),
        "<h2>Cutoff and cost</h2>" + _cost(d),
    ]
    return document(f"Data: {d.samples.name}", parts)


def _findings(d: Diagnosis) -> str:
    rows = []
    for finding in d.findings:
        where = places(d, finding, 10)
        text = escape(finding.text)
        text += f'<br><span class="sub">{escape(where)}</span>' if where else ""
        text += f"<br><i>{escape(finding.advice)}</i>" if finding.advice else ""
        text += "<br><span class='sub'>--fix mends this</span>" if finding.repair is not None else ""
        rows.append(f"<tr><td>{_MARKS[finding.severity]}</td><td>{escape(finding.check)}</td><td>{text}</td></tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>' if rows else "<p>Nothing was found.</p>"


def _grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _unit_rows(d: Diagnosis) -> list[tuple[str, ...]]:
    return [(g.quantity, g.unit or "–", g.certainty if g.unit else "cannot be told", g.evidence) for g in d.guesses()]


def _cost(d: Diagnosis) -> str:
    cost = d.cost
    rows = [
        (f"{cutoff:g} Å", f"{edges:.1f}", f"{edges * cost.num_atoms:,.0f}", f"{cost.apart[cutoff]:.1%}")
        for cutoff, edges in cost.edges.items()
    ]
    return _grid(("cutoff", "edges per atom", "edges per epoch", "samples in separate parts"), rows)


# --------------------------------------------------------------------------------------------------------- plots


def draw(diagnosis: Diagnosis) -> bytes:
    """Six panels at most, as PNG: distances, energies, forces, energy against work, sizes, edges."""
    import matplotlib as mpl

    panels: list[Callable[[Axes, Diagnosis], None]] = [_distances]
    measured = diagnosis.measured
    if measured.binding is not None:
        panels.append(_energies)
    if measured.has_forces and np.isfinite(measured.force_max).any():
        panels.append(_forces)
    if diagnosis.work is not None and len(diagnosis.work) >= 8:
        panels.append(_work)
    panels += [_sizes] * int(measured.counts.min() < measured.counts.max()) + [_edges]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(panels), width=4.8, height=3.5)
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis, diagnosis)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return png(figure)


def _distances(axis: Axes, d: Diagnosis) -> None:
    middle = (HISTOGRAM[:-1] + HISTOGRAM[1:]) / 2
    common = sorted(d.measured.histogram, key=lambda pair: -int(d.measured.histogram[pair][: len(middle) // 2].sum()))
    for pair in common[:6]:
        counts = d.measured.histogram[pair] / middle**2  # of a uniform liquid this is flat
        if counts.max() > 0:
            names = [SYMBOLS[z] if 0 < z < len(SYMBOLS) else str(z) for z in reversed(pair)]
            axis.plot(middle, counts / counts.max(), linewidth=1.1, label="–".join(names))
    axis.axvline(d.cost.suggested, color=GREY, linewidth=1, linestyle=":")
    axis.set_title("Number of distances over $r^2$, largest 1")
    axis.set_xlabel("distance [Å]")
    axis.set_yticks([])
    if common:
        axis.legend(fontsize=8)


def _energies(axis: Axes, d: Diagnosis) -> None:
    binding = d.measured.binding
    assert binding is not None
    values = binding / np.maximum(d.measured.counts, 1)
    _bars(axis, values[np.isfinite(values)], _marked(d, ("odd energies", "levels of theory", "contradictions")), values)
    axis.set_title("Energy per atom without that of the elements")
    axis.set_xlabel(f"energy{_bracket(f'{d.energy_words}/atom' if d.energy_words else '')}")
    axis.set_ylabel("samples")


def _forces(axis: Axes, d: Diagnosis) -> None:
    values = np.log10(np.maximum(d.measured.force_max, 1e-6 * max(d.measured.force_rms, 1e-12)))
    _bars(axis, values[np.isfinite(values)], _marked(d, ("large forces",)), values)
    axis.set_title("Norm of the largest force of a sample")
    axis.set_xlabel(f"force{_bracket(_force_unit(d))}")
    axis.set_ylabel("samples")
    axis.xaxis.set_major_formatter(lambda x, _: f"{10**x:.3g}")


def _work(axis: Axes, d: Diagnosis) -> None:
    work = d.work
    assert work is not None
    x, y = work.work + work.strain, work.rise
    axis.scatter(x, y, s=7, alpha=0.4, color=BLUE, edgecolors="none")
    limit = float(np.percentile(np.abs(np.concatenate([x, y])), 99.5)) * 1.1 or 1.0
    axis.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.8, linestyle="--", zorder=3)
    axis.set_xlim(-limit, limit)
    axis.set_ylim(-limit, limit)
    slope = d.slope
    note = "" if slope is None or not slope.is_certain or slope.step is None else f", slope {slope.value:.3g}"
    axis.set_title(f"Pairs of samples{note}")
    axis.set_xlabel(f"work of the forces{_bracket(d.energy_words)}")
    axis.set_ylabel(f"energy difference{_bracket(d.energy_words)}")


def _sizes(axis: Axes, d: Diagnosis) -> None:
    counts = d.measured.counts
    low, high = int(counts.min()), int(counts.max())
    axis.hist(counts, bins=np.linspace(low - 0.5, high + 0.5, min(60, high - low + 1) + 1).tolist(), color=BLUE)
    axis.set_title("Size of samples")
    axis.set_xlabel("atoms")
    axis.set_ylabel("samples")
    axis.locator_params(axis="x", integer=True)


def _edges(axis: Axes, d: Diagnosis) -> None:
    axis.plot(list(d.cost.edges), list(d.cost.edges.values()), marker="o", markersize=4, color=BLUE)
    axis.axvline(d.cost.suggested, color=ORANGE, linewidth=1, linestyle=":", label="suggested")
    axis.set_ylim(bottom=0)
    axis.set_title("Edges per atom")
    axis.set_xlabel("cutoff [Å]")
    axis.legend()


def _bars(axis: Axes, values: np.ndarray, marked: np.ndarray, all_values: np.ndarray) -> None:
    """A histogram, in which samples of findings stand out."""
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    bins = np.linspace(low, high if high > low else low + 1e-6, 61).tolist()
    axis.hist(values, bins=bins, color=BLUE)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    odd = all_values[marked]
    odd = odd[np.isfinite(odd)]
    if len(odd):
        axis.hist(odd, bins=bins, color=ORANGE, label="found odd")
        axis.legend()


def _marked(d: Diagnosis, checks: tuple[str, ...]) -> np.ndarray:
    found = [np.array(f.samples, dtype=np.int64) for f in d.findings if f.check in checks and f.severity != "note"]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _force_unit(d: Diagnosis) -> str:
    if d.samples.energy_unit and d.samples.length_unit:
        return f"{d.samples.energy_unit}/{d.samples.length_unit}"
    return d.forces.unit or ""


def _bracket(unit: str) -> str:
    return f" [{unit}]" if unit else ""
