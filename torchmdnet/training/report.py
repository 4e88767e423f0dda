"""``summary.json`` for programs and ``report.html`` for people: what was trained, on what, and how good it is."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchmdnet import __version__
from torchmdnet.data.labels import targets_of
from torchmdnet.elements import SYMBOLS
from torchmdnet.losses import loss_name
from torchmdnet.options import value_of
from torchmdnet.page import document, escape, image, table
from torchmdnet.training.evaluate import Evaluation, SplitFacts
from torchmdnet.training.files import write_json, write_text
from torchmdnet.training.terminal import Units, counted, duration, significant
from torchmdnet.units import GPA_PER_EV_A3

__all__ = [
    "RunFacts",
    "data_summary",
    "error_table",
    "loss_words",
    "summary_of",
    "trivial_words",
    "versions",
    "worse_than_trivial",
    "write_report",
    "write_summary",
]


@dataclass
class RunFacts:
    """Everything the summary and the report tell of a run."""

    folder: Path
    options: Mapping[str, Any]
    units: Units
    splits: Mapping[str, int]
    train_facts: SplitFacts | None
    evaluation: Evaluation | None
    provenance: Mapping[str, Any]
    monitor: str
    best_score: float
    tested: str  # name of the checkpoint whose errors these are, or "current weights"
    tested_epoch: int | None
    num_epochs: int
    num_parameters: int
    device: str
    seconds: float
    samples_per_second: float
    stopped: str = ""
    notes: Sequence[str] = field(default_factory=list)
    epochs_before: int = 0  # of the run that this one continues

    @property
    def epochs_in_words(self) -> str:
        """The epochs of this run, and of all where it continues another: ``2 epochs (5 in all)``."""
        words = counted(self.num_epochs - self.epochs_before, "epoch")
        return f"{words} ({self.num_epochs} in all)" if self.epochs_before else words


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"torchmd-net": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "torch_geometric", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def data_summary(facts: RunFacts) -> dict[str, Any]:
    """Numbers of systems, elements, sizes and ranges of labels."""
    summary: dict[str, Any] = {f"{split} systems": count for split, count in facts.splits.items()}
    train = facts.train_facts
    if train is not None and len(train.counts):
        atoms = train.atoms
        summary["elements"] = " ".join(SYMBOLS[z] for z in train.elements)
        summary["atoms per system"] = (
            f"{atoms.min()} to {atoms.max()}, {atoms.mean():.1f} on average"
            if atoms.min() != atoms.max()
            else f"{atoms.min()}"
        )
        summary["quantities"] = ", ".join(train.fields)
        if train.y is not None:
            unit = facts.units.energy or "energy unit"
            summary["energy"] = f"{train.y.min():.6g} to {train.y.max():.6g} {unit}"
        if train.num_force_components:
            unit = f"{facts.units.energy}/{facts.units.length or 'Å'}" if facts.units.energy else facts.units.of_force
            summary["force, rms"] = f"{significant(train.force_rms)} {unit}"
            summary["force, largest component"] = f"{significant(train.force_max)} {unit}"
        for term, labels in train.labels.items():
            if len(labels.values):
                words = f"{labels.values.min():.4g} to {labels.values.max():.4g} {facts.units.others[term]}".rstrip()
                summary[term] = f"{words}, {len(labels.values):,} labels"
    for key in ("level_of_theory", "citation"):
        if facts.provenance.get(key):
            summary[key.replace("_", " ")] = facts.provenance[key]
    return summary


def error_table(facts: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """Rows of quantity, MAE, RMSE, error of the trivial prediction, unit."""
    evaluation, units = facts.evaluation, facts.units
    if evaluation is None:
        return []
    errors, baseline = evaluation.errors, evaluation.baseline
    rows = []
    if "y" in errors.terms:
        trivial = (baseline.y_mae_per_atom, baseline.y_mae) if baseline else (math.nan, math.nan)
        rows += [
            ("energy per atom", errors.y_mae_per_atom, errors.y_rmse_per_atom, trivial[0], units.of_energy_per_atom),
            ("energy", errors.y_mae, errors.y_rmse, trivial[1], units.of_energy),
        ]
    if "neg_dy" in errors.terms:
        trivial_force = baseline.neg_dy_mae if baseline else math.nan
        rows.append(("force component", errors.neg_dy_mae, errors.neg_dy_rmse, trivial_force, units.of_force))
    table = [(name, units.show(mae), units.show(rmse), units.show(base), unit) for name, mae, rmse, base, unit in rows]
    for term, (mae, rmse) in errors.others.items():
        if term not in errors.terms:
            continue
        numbers = (mae, rmse, baseline.others.get(term, math.nan) if baseline else math.nan)
        name = f"{term} component" if term in ("stress", "dipole", "polarizability") else term
        shown = [units.show_term(term, number) for number in numbers]
        table.append((name, shown[0], shown[1], shown[2], units.of(term)))
        if term == "stress" and units.energy == "eV" and units.length in (None, "Å"):
            shown = ["-" if math.isnan(number) else significant(number * GPA_PER_EV_A3) for number in numbers]
            table.append(("the same in GPa", shown[0], shown[1], shown[2], "GPa"))
    return table


def worse_than_trivial(facts: RunFacts) -> list[str]:
    """Quantities in which the model errs more than the trivial prediction."""
    evaluation = facts.evaluation
    if evaluation is None or evaluation.baseline is None:
        return []
    errors, baseline = evaluation.errors, evaluation.baseline
    pairs = {
        "y": ("energies", errors.y_mae_per_atom, baseline.y_mae_per_atom),
        "neg_dy": ("forces", errors.neg_dy_mae, baseline.neg_dy_mae),
        **{term: (term, mae, baseline.others.get(term, math.nan)) for term, (mae, _) in errors.others.items()},
    }
    return [name for term, (name, mae, trivial) in pairs.items() if term in errors.terms and mae > trivial]


def trivial_words(facts: RunFacts) -> str:
    """What the trivial prediction is, for the quantities that were evaluated."""
    evaluation = facts.evaluation
    words = []
    if evaluation is not None and "y" in evaluation.errors.terms:
        words.append("mean energy of the composition")
    if evaluation is not None and "neg_dy" in evaluation.errors.terms:
        words.append("zero force")
    if evaluation is not None and evaluation.errors.others:
        words.append(f"mean {', '.join(evaluation.errors.others)} of the training set")
    return ", ".join(words)


def _monitor_words(facts: RunFacts) -> str:
    """What ``best.ckpt`` has the lowest value of: ``lowest validation loss, 1 × mse_loss(energies), in eV and Å``."""
    split, _, loss = facts.monitor.partition("_total_")
    words = loss_words(facts)
    trained = loss_name(value_of(facts.options, "train_loss"))
    words = words.replace(f"{trained}(", f"{loss}(") if loss != trained else words
    units = " and ".join(filter(None, (facts.units.energy, facts.units.length)))
    kind = {"val": "validation", "train": "training"}.get(split, split)
    return f"lowest {kind} loss, {words}, in {units or 'the units of the data'}"


def loss_words(facts: RunFacts) -> str:
    """The loss as a sum: ``10 × mse_loss(energies per atom) + 1 × mse_loss(force components)``."""
    options = facts.options
    default = loss_name(value_of(options, "train_loss"))
    energy = "energies per atom" if value_of(options, "y_loss_per_atom") else "energies"
    terms = [(energy, value_of(options, "y_weight"), default)]
    if options.get("derivative"):
        terms.append(("force components", value_of(options, "neg_dy_weight"), default))
    terms += [(t.name, t.weight, loss_name(t.loss or default)) for t in targets_of(options).values()]
    return " + ".join(f"{weight:g} × {function}({name})" for name, weight, function in terms if weight > 0)


def summary_of(facts: RunFacts) -> dict[str, Any]:
    """The content of ``summary.json``; errors are in the units of the data."""
    evaluation = facts.evaluation
    summary: dict[str, Any] = {
        "log_dir": str(facts.folder),
        "epochs": facts.num_epochs,
        "stopped": facts.stopped or "all epochs done",
        "best": {
            "checkpoint": "best.ckpt" if (facts.folder / "best.ckpt").exists() else None,
            "monitor": facts.monitor,
            "value": facts.best_score,
        },
        "tested": {"checkpoint": facts.tested, "epoch": facts.tested_epoch},
        "loss": loss_words(facts),
        "units": {"energy": facts.units.energy, "length": facts.units.length, **facts.units.others},
        "errors": {},
        "baseline": {},
        "data": {**facts.splits, "elements": facts.train_facts.elements if facts.train_facts else []},
        "parameters": facts.num_parameters,
        "device": facts.device,
        "seconds": round(facts.seconds, 2),
        "samples_per_second": round(facts.samples_per_second, 2),
        "versions": versions(),
    }
    if evaluation is not None:
        summary["errors"] = {"split": evaluation.split, **evaluation.errors.table()}
        if evaluation.baseline is not None:
            summary["baseline"] = {
                "what": "mean energy of the same composition in the training set; zero force"
                + ("; mean of the training labels" if evaluation.baseline.others else ""),
                **evaluation.baseline.table(),
            }
    return summary


def write_summary(facts: RunFacts) -> Path:
    """Write ``summary.json``."""
    path = facts.folder / "summary.json"
    write_json(path, summary_of(facts))
    return path


# ------------------------------------------------------------------------------------------------ report.html

_FILES = {
    "potential.safetensors": "the potential to use: the tested weights with units, elements and ranges of the data",
    "best.ckpt": "the epoch with the lowest monitored loss",
    "last.ckpt": "the latest state; --load-model continues from it",
    "epoch=*.ckpt": "the best of the checkpoints written every save_interval epochs",
    "metrics.csv": "losses, one row per epoch",
    "errors.csv": "errors of each split in the units of the data, one row per epoch",
    "splits.npz": "which system is in which split",
    "input.yaml": "the settings as they were given",
    "hparams.yaml": "the settings as the model keeps them",
    "summary.json": "the numbers of this page, for programs",
    "learning_curves.png": "losses and errors over epochs",
    "parity.png": "predictions against labels",
    "log": "what appeared on the terminal",
}


def write_report(facts: RunFacts, defaults: Mapping[str, Any]) -> Path:
    """Write ``report.html``: one file with everything in it, plots included.

    Args:
        facts: What to tell.
        defaults: Default of each option; settings that differ are set off.
    """
    folder = facts.folder
    parts = [
        f"<h1>{escape(_title(facts))}</h1>",
        f'<p class="sub">{escape(_subtitle(facts))}</p>',
        _cards(facts),
        _errors_section(facts),
        _image(folder / "learning_curves.png", "Learning curves"),
        _image(folder / "parity.png", "Predictions against labels"),
        "<h2>Data</h2>" + table(data_summary(facts).items()),
        "<h2>Use it</h2>" + _usage(facts),
        "<h2>Settings</h2>" + f"<p>Loss: {escape(loss_words(facts))}.</p>" + _settings(facts.options, defaults),
        "<h2>Files</h2>" + _files(folder),
        "<h2>Versions</h2>" + table({**versions(), "device": facts.device}.items()),
    ]
    path = folder / "report.html"
    write_text(path, document(_title(facts), parts))
    return path


def _title(facts: RunFacts) -> str:
    return f"{facts.options.get('model')} trained on {facts.options.get('dataset')}"


def _subtitle(facts: RunFacts) -> str:
    words = [
        facts.epochs_in_words,
        duration(facts.seconds),
        facts.device,
        f"{facts.num_parameters:,} parameters",
        facts.stopped,
    ]
    return " · ".join(word for word in words if word)


def _cards(facts: RunFacts) -> str:
    cards = []
    split = {"test": "test", "val": "validation"}.get(facts.evaluation.split, "") if facts.evaluation else ""
    for name, mae, _, base, unit in error_table(facts):
        if name in ("energy", "the same in GPa"):
            continue
        compare = f"trivial prediction: {base}" if base != "-" else ""
        cards.append((f"{mae} {unit}", f"{split} MAE, {name}" + (f"; {compare}" if compare else "")))
    best = f"{significant(facts.best_score)}" if math.isfinite(facts.best_score) else "-"
    where = f", epoch {facts.tested_epoch}" if facts.tested_epoch is not None else ""
    cards.append((best, f"{_monitor_words(facts)}{where}"))
    cards.append((f"{significant(facts.samples_per_second)}/s", "systems trained per second"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cards)
        + "</div>"
    )


def _errors_section(facts: RunFacts) -> str:
    rows = error_table(facts)
    if not rows or facts.evaluation is None:
        return ""
    split = facts.evaluation.split
    systems = facts.evaluation.errors.num_molecules or facts.splits.get(split, 0)
    told = counted(systems, "system")
    means = ", ".join(facts.evaluation.errors.others)
    header = "".join(f'<th class="n">{name}</th>' for name in ("MAE", "RMSE", "trivial MAE"))
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>"
        + "".join(f'<td class="n">{number}</td>' for number in row[1:4])
        + f"<td>{escape(row[4])}</td></tr>"
        for row in rows
    )
    return (
        f"<h2>Errors on the {'test' if split == 'test' else 'validation'} set</h2>"
        f'<p class="sub">Of {escape(facts.tested)}, on {told}. The trivial prediction is the mean energy '
        f"of the same composition in the training set, and zero force{f'; of {means} it is the mean' if means else ''}."
        "</p>"
        f"<table><tr><th>quantity</th>{header}<th>unit</th></tr>{body}</table>"
    )


def _image(path: Path, title: str) -> str:
    if not path.is_file():
        return ""
    return f"<h2>{title}</h2>{image(path.read_bytes(), title)}"


def _usage(facts: RunFacts) -> str:
    potential = facts.folder / "potential.safetensors"
    code = (
        "import torchmdnet\n"
        "from torchmdnet.calculators import TMDNETCalculator\n\n"
        f'model = torchmdnet.load_model("{potential}", derivative=True)\n'
        f'atoms.calc = TMDNETCalculator("{potential}")    # ASE'
    )
    command = f"torchmd-train --load-model {facts.folder / 'last.ckpt'} --num-epochs ..."
    return f"<pre>{escape(code)}</pre><p>Train on:</p><pre>{escape(command)}</pre>"


def _settings(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    rows = {True: "", False: ""}
    for key in sorted(options):
        is_set = key not in defaults or options[key] != defaults[key]
        mark = ' class="set"' if is_set else ""
        rows[is_set] += f"<tr{mark}><td>{escape(key)}</td><td><code>{escape(options[key])}</code></td></tr>"
    return (
        f'<div class="scroll"><table>{rows[True]}</table></div>'
        f"<details><summary>at their defaults</summary><table>{rows[False]}</table></details>"
    )


def _files(folder: Path) -> str:
    rows = []
    for pattern, meaning in _FILES.items():
        found = sorted(folder.glob(pattern))
        if found:
            size = sum(path.stat().st_size for path in found)
            name = pattern if len(found) == 1 else f"{pattern} ({len(found)})"
            rows.append((name, f"{meaning} ({_size(size)})"))
    return table(rows)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
