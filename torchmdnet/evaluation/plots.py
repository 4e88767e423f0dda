"""Plots of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.evaluation.data import References
from torchmdnet.evaluation.errors import Calibration, Comparison, within_compositions
from torchmdnet.page import BLUE, COLOURS, GREY, STYLE, cloud, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_calibration", "draw_errors", "draw_parity"]


def pairs_of(
    found: Comparison, labels: dict[str, np.ndarray], counts: np.ndarray, property_labels: dict[str, str]
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Title, unit, references and predictions of each panel."""
    predictions = found.predictions
    panels = []
    if "energy" in labels:
        reference = labels["energy"] / counts
        if found.model.has_totals:
            panels.append(("Energy", "eV/atom", reference, predictions.energy / counts))
        if np.isfinite(found.relative_error).any():
            relative = within_compositions(1000 * reference, found.formulas)
            panels.append(("Energy within compositions", "meV/atom", relative, relative + found.relative_error))
    if "forces" in labels:
        panels.append(("Force components", "eV/Å", labels["forces"].ravel(), predictions.forces.ravel()))
    if "stress" in labels and predictions.stress is not None:
        panels.append(("Stress components", "eV/Å³", labels["stress"].ravel(), predictions.stress.ravel()))
    units = {each.name: each.unit for each in found.quantities}
    for name, label in property_labels.items():
        reference = labels[label].reshape(predictions.properties[name].shape)
        panels.append((name, units.get(name, ""), reference.ravel(), predictions.properties[name].ravel()))
    return panels


def draw_parity(
    found: Comparison, labels: dict[str, np.ndarray], counts: np.ndarray, property_labels: dict[str, str]
) -> bytes:
    """Predictions of one model against references, a panel for each quantity, as PNG."""
    import matplotlib as mpl

    panels = pairs_of(found, labels, counts, property_labels)
    stats = {each.name: each for each in found.quantities}
    first = {"Energy": "energy per atom", "Energy within compositions": "energy per atom within a composition",
             "Force components": "force component", "Stress components": "stress component"}  # fmt: skip
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(panels), width=4.8, height=4.6)
        for axis, (title, unit, reference, predicted) in zip(axes, panels, strict=False):
            cloud(axis, reference, predicted)
            axis.set_title(title)
            axis.set_xlabel(f"reference [{unit}]" if unit else "reference")
            axis.set_ylabel(f"predicted [{unit}]" if unit else "predicted")
            each = stats.get(first.get(title, title))
            if each is not None:
                words = f"MAE   {each.stat.mae:.3g} {each.unit}\nRMSE {each.stat.rmse:.3g} {each.unit}"
                axis.text(0.04, 0.96, words, transform=axis.transAxes, va="top", linespacing=1.4)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return png(figure)


def draw_errors(
    comparisons: Sequence[Comparison], names: Sequence[str], labels: dict[str, np.ndarray], references: References
) -> bytes | None:
    """How errors are distributed, and on which elements they lie, for all models, as PNG; None without any."""
    import matplotlib as mpl

    panels: list[Any] = []
    if "energy" in labels:
        panels.append(lambda axis: _distribution(axis, [each.energy_error for each in comparisons], names, "Energy",
                                                 "meV/atom"))  # fmt: skip
    if "forces" in labels:
        errors = [1000 * (each.predictions.forces - labels["forces"]) for each in comparisons]
        panels.append(lambda axis: _distribution(axis, [e.ravel() for e in errors], names, "Force component", "meV/Å"))
        panels.append(lambda axis: _by_element(axis, comparisons, names))
        panels.append(lambda axis: _by_size(axis, errors, names, labels["forces"]))
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(panels), width=4.8, height=3.5, columns=2)
        for axis, panel in zip(axes, panels, strict=False):
            panel(axis)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return png(figure)


def _distribution(axis: Axes, errors: Sequence[np.ndarray], names: Sequence[str], title: str, unit: str) -> None:
    """Which part of the errors is larger than a value."""
    for values, name, colour in zip(errors, names, COLOURS, strict=False):
        sizes = np.sort(np.abs(values[np.isfinite(values)]))
        if not len(sizes):
            continue
        share = 100 * (1 - np.arange(len(sizes)) / len(sizes))
        shown = np.unique(np.concatenate([np.arange(max(0, len(sizes) - 500), len(sizes)),
                                          np.linspace(0, len(sizes) - 1, 1500).astype(int)]))  # fmt: skip
        sizes, share = sizes[shown], share[shown]
        axis.plot(sizes, share, color=colour, linewidth=1.5, label=name)
    axis.set_xscale("log")
    axis.set_ylim(0, 100)
    largest = max((float(np.nanmax(np.abs(values))) for values in errors if np.isfinite(values).any()), default=1.0)
    axis.set_xlim(max(largest, 1e-12) * 1e-4, max(largest, 1e-12) * 1.2)
    axis.set_title(f"{title}: errors larger than this")
    axis.set_xlabel(f"absolute error [{unit}]")
    axis.set_ylabel("% of all")
    axis.legend(loc="upper right", fontsize=8)


def _by_element(axis: Axes, comparisons: Sequence[Comparison], names: Sequence[str]) -> None:
    width = 0.8 / min(len(comparisons), len(COLOURS))
    rows = comparisons[0].groups.get("element", [])
    for number, (each, name, colour) in enumerate(zip(comparisons, names, COLOURS, strict=False)):
        values = [row["force_mae_meV_A"] for row in each.groups.get("element", [])]
        places = np.arange(len(values)) - 0.4 + width * (number + 0.5)
        axis.bar(places, values, width, color=colour, label=name)
    axis.set_xticks(range(len(rows)), [row["element"] for row in rows])
    axis.set_title("Force component: MAE by element")
    axis.set_ylabel("meV/Å")
    axis.grid(axis="x", visible=False)
    if len(comparisons) > 1:
        axis.legend(fontsize=8)


def _by_size(axis: Axes, errors: Sequence[np.ndarray], names: Sequence[str], forces: np.ndarray) -> None:
    """Mean error of the force on an atom over the size of the force."""
    sizes = np.linalg.norm(forces, axis=1)
    fine = np.isfinite(sizes)
    order = np.argsort(sizes[fine])
    parts = np.array_split(order, max(1, min(15, len(order) // 5)))
    for error, name, colour in zip(errors, names, COLOURS, strict=False):
        length = np.linalg.norm(error[fine], axis=1)
        centre = [float(sizes[fine][part].mean()) for part in parts]
        axis.plot(centre, [float(length[part].mean()) for part in parts], color=colour, marker="o", markersize=3,
                  linewidth=1.4, label=name)  # fmt: skip
    axis.set_title("Error of the force on an atom")
    axis.set_xlabel("size of the reference force [eV/Å]")
    axis.set_ylabel("mean length of the error [meV/Å]")
    axis.set_ylim(bottom=0)
    axis.legend(loc="best", fontsize=8)


def draw_calibration(calibrations: Sequence[Calibration]) -> bytes:
    """Errors against standard deviations of an ensemble, as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(calibrations), width=4.8, height=4.4)
        for axis, each in zip(axes, calibrations, strict=True):
            low = 0.7 * min(each.predicted.min(), each.found.min())
            high = 1.4 * max(each.predicted.max(), each.found.max())
            axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", label="calibrated")
            axis.plot(each.predicted, each.found, color=BLUE, marker="o", markersize=4, linewidth=1.4)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(each.name[:1].upper() + each.name[1:])
            axis.set_xlabel(f"standard deviation [{each.unit}]")
            axis.set_ylabel(f"root mean square error [{each.unit}]")
            words = f"{each.inside:.0%} within one\nSpearman {each.correlation:.2f}\nfactor {each.factor:.2g}"
            axis.text(0.04, 0.96, words, transform=axis.transAxes, va="top", linespacing=1.4)
            axis.legend(loc="lower right", fontsize=8)
        return png(figure)
