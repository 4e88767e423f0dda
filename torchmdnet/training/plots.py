"""Learning curves and parity plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.page import BLUE, GREY, ORANGE, STYLE, cloud, new_figure
from torchmdnet.training.evaluate import Evaluation
from torchmdnet.training.files import draft_of
from torchmdnet.training.terminal import Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_learning_curves", "draw_parity"]


def _save(figure: Figure, path: Path) -> None:
    with draft_of(path) as draft:
        figure.savefig(draft, format="png")


def draw_learning_curves(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
    loss: str,
    units: Units,
    best_epoch: int | None = None,
) -> None:
    """Losses, errors and the learning rate over epochs.

    Args:
        path: The PNG file.
        metrics: Rows of ``metrics.csv``.
        errors: Rows of ``errors.csv``.
        loss: Name of the training loss.
        units: Units of the data.
        best_epoch: Marked with a line.
    """
    import matplotlib as mpl

    terms = [
        (column, title, unit, scale)
        for column, title, unit, scale in (
            ("y_mae_per_atom", "Energy MAE", units.of_energy_per_atom, units.scale),
            ("neg_dy_mae", "Force MAE", units.of_force, units.scale),
            *((f"{t}_mae", f"{_title(t)} MAE", units.of(t), _scale(t, units)) for t in units.others),
        )
        if _series(errors, column, "val")[0].size or _series(errors, column, "test")[0].size
    ]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(2 + len(terms), width=4.8, height=3.4)
        for split, colour in (("train", GREY), ("val", BLUE)):
            _line(axes[0], *_series(metrics, f"{split}_total_{loss}"), colour, split)
        axes[0].set_title(f"Loss ({loss.removesuffix('_loss')}), weighted, in units of the data")
        for axis, (column, title, unit, scale) in zip(axes[1:], terms, strict=False):
            for split, colour in (("val", BLUE), ("test", ORANGE)):
                epochs, values = _series(errors, column, split)
                _line(axis, epochs, values * scale, colour, split)
            axis.set_title(_with_unit(title, unit))
        for axis in axes[2 + len(terms) :]:  # unused in the last row
            axis.set_visible(False)
        axes = axes[: 2 + len(terms)]
        _line(axes[-1], *_series(metrics, "lr"), GREY, "")
        axes[-1].set_title("Learning rate")
        for axis in axes:
            axis.set_xlabel("epoch")
            _set_scale(axis, most=1e4 if axis is axes[-1] else math.inf)  # a planned rate falls to nothing
            if best_epoch is not None:
                axis.axvline(best_epoch, color=ORANGE, linewidth=1, linestyle=":", label="best epoch")
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend()
        for axis in axes[1:-1]:
            if len(axis.lines) > 1 + (best_epoch is not None):
                axis.legend()
        _save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], column: str, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    chosen = [row for row in rows if row.get(column) not in (None, "") and (split is None or row.get("split") == split)]
    epochs = np.array([float(row["epoch"]) for row in chosen])
    values = np.array([float(row[column]) for row in chosen])
    fine = np.isfinite(values)
    return epochs[fine], values[fine]


def _line(axis: Axes, epochs: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    if len(epochs):
        marker = "o" if len(epochs) < 30 else None
        axis.plot(epochs, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label or None)


def _set_scale(axis: Axes, most: float) -> None:
    """Show values by their logarithm whose largest is more than 3, and less than ``most``, times the smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.zeros(0)])
    if len(values) and values.min() > 0 and 3 < values.max() / values.min() < most:
        axis.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_ylim(values.min() / 1.15, values.max() * 1.15)
    elif len(values) and values.min() >= 0:
        axis.set_ylim(0, 1.08 * values.max() or None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def draw_parity(path: Path, evaluation: Evaluation, units: Units, *, relative: bool = False) -> bool:
    """Predictions against labels, a panel for energies, force components, stress and each property.

    Args:
        path: The file to write.
        evaluation: Predictions and labels.
        units: Units of the data.
        relative: Whether energies are relative to the reference energies of the elements.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib as mpl

    panels = [
        (term, title, unit, error)
        for term, title, unit, error in (
            (
                "y",
                "Energy relative to elements" if relative else "Energy",
                f"{units.energy or 'energy unit'}/atom",
                _words(evaluation, "y", units),
            ),
            ("neg_dy", "Force components", _plain_force(units), _words(evaluation, "neg_dy", units)),
            *((t, _title(t), units.others[t], _words(evaluation, t, units)) for t in units.others),
        )
        if term in evaluation.points and len(evaluation.points[term][0])
    ]
    if not panels:
        return False
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(panels), width=4.8, height=4.6)
        for axis, (term, title, unit, words) in zip(axes, panels, strict=False):
            cloud(axis, *evaluation.points[term])
            axis.set_title(title)
            axis.set_xlabel(_with_unit("reference", unit))
            axis.set_ylabel(_with_unit("predicted", unit))
            axis.text(0.04, 0.96, words, transform=axis.transAxes, va="top", linespacing=1.4)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle({"test": "Test set", "val": "Validation set"}.get(evaluation.split, evaluation.split))
        _save(figure, path)
    return True


def _words(evaluation: Evaluation, term: str, units: Units) -> str:
    errors = evaluation.errors
    if term in units.others:
        mae, rmse = errors.others.get(term, (math.nan, math.nan))
        show, unit = units.show_term, units.of(term)
        return f"MAE   {show(term, mae)} {unit}\nRMSE {show(term, rmse)} {unit}"
    if term == "y":
        mae, rmse, unit = errors.y_mae_per_atom, errors.y_rmse_per_atom, units.of_energy_per_atom
    else:
        mae, rmse, unit = errors.neg_dy_mae, errors.neg_dy_rmse, units.of_force
    return f"MAE   {units.show(mae)} {unit}\nRMSE {units.show(rmse)} {unit}"


def _title(term: str) -> str:
    return term[:1].upper() + term[1:].replace("_", " ")


def _scale(term: str, units: Units) -> float:
    return units.scale if term == "stress" else 1.0


def _with_unit(words: str, unit: str) -> str:
    return f"{words} [{unit}]" if unit else words


def _plain_force(units: Units) -> str:
    return f"{units.energy}/{units.length or 'Å'}" if units.energy else units.of_force
