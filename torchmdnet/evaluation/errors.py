"""Errors in numbers: of each quantity, and by element, composition, file and kind of structure."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from torchmdnet.elements import SYMBOLS
from torchmdnet.evaluation.data import References
from torchmdnet.evaluation.predict import Model, Predictions

__all__ = ["Calibration", "Comparison", "Quantity", "Stat", "compare", "formula_of", "stat"]


class Stat(NamedTuple):
    """Sizes of errors."""

    number: int
    mae: float
    rmse: float
    p95: float  # 95th percentile of the absolute error
    largest: float
    spread: float  # standard deviation of the reference: the error of always answering with the mean

    def as_dict(self) -> dict[str, float]:
        return self._asdict()


class Quantity(NamedTuple):
    """A quantity that is compared, in the unit in which it is shown."""

    name: str
    unit: str
    stat: Stat


class Calibration(NamedTuple):
    """Whether the spread of an ensemble says how large errors are."""

    name: str
    unit: str
    predicted: np.ndarray  # (B,) root mean square of the standard deviations in each bin
    found: np.ndarray  # (B,) root mean square error in each bin
    inside: float  # part of the errors within one standard deviation; 0.68 if calibrated
    factor: float  # by which standard deviations would have to be multiplied
    correlation: float  # Spearman's, of standard deviation and absolute error


@dataclass
class Comparison:
    """A model beside the references.

    Args:
        model: The model.
        predictions: What it says.
        quantities: Errors of everything together.
        energy_error: Of each structure, in meV/atom (S,); empty without energies.
        relative_error: Of the differences to the mean of the composition, in meV/atom (S,); NaN where there is no other
            structure of the same composition.
        force_error: Mean absolute error of the components of each structure, in meV/Å (S,); empty without forces.
        formulas: Composition of each structure, (S,).
        groups: Tables by ``element``, ``composition``, ``file`` and ``kind``.
        calibrations: Of an ensemble.
    """

    model: Model
    predictions: Predictions
    quantities: list[Quantity]
    energy_error: np.ndarray
    relative_error: np.ndarray
    force_error: np.ndarray
    formulas: np.ndarray
    groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    calibrations: list[Calibration] = field(default_factory=list)


def stat(errors: np.ndarray, reference: np.ndarray) -> Stat:
    """Sizes of errors; those that are no numbers, of missing labels, are left out."""
    fine = np.isfinite(errors)
    kept, labels = np.abs(errors[fine]), reference[fine]
    if not len(kept):
        return Stat(0, *[math.nan] * 5)
    return Stat(
        len(kept),
        float(kept.mean()),
        float(np.sqrt((kept**2).mean())),
        float(np.percentile(kept, 95)),
        float(kept.max()),
        float(labels.std()),
    )


def formula_of(z: np.ndarray) -> str:
    """``C2H6O``: carbon and hydrogen first where there is carbon, then by the alphabet."""
    numbers, counts = np.unique(z, return_counts=True)
    found = {SYMBOLS[number]: int(count) for number, count in zip(numbers, counts, strict=True)}
    first = [symbol for symbol in ("C", "H") if symbol in found and "C" in found]
    names = [*first, *sorted(set(found) - set(first))]
    return "".join(f"{name}{found[name] if found[name] > 1 else ''}" for name in names)


def within_compositions(values: np.ndarray, formulas: np.ndarray) -> np.ndarray:
    """Differences to the mean of the same composition; NaN where there is only one of it, or no value."""
    found = np.full(len(values), np.nan)
    for formula in np.unique(formulas):
        rows = np.flatnonzero((formulas == formula) & np.isfinite(values))
        if len(rows) > 1:
            found[rows] = values[rows] - values[rows].mean()
    return found


def compare(
    model: Model,
    predictions: Predictions,
    references: References,
    labels: dict[str, np.ndarray],
    property_labels: dict[str, str],
) -> Comparison:
    """Errors of a model, in meV, meV/Å, meV/Å³ and the units of properties.

    Args:
        model: The model.
        predictions: What it says of all structures.
        references: The structures.
        labels: What :meth:`References.labels` returned.
        property_labels: For each property that is compared, the name of its label.
    """
    counts, ptr = references.counts, references.ptr
    formulas = np.array([formula_of(labels["z"][a:b]) for a, b in itertools.pairwise(ptr)])
    quantities: list[Quantity] = []
    energy_error = relative = force_error = np.zeros(0)
    if "energy" in labels:
        reference = 1000 * labels["energy"] / counts
        predicted = 1000 * predictions.energy / counts
        energy_error = predicted - reference
        relative = within_compositions(energy_error, formulas)
        if model.has_totals:
            quantities.append(Quantity("energy per atom", "meV/atom", stat(energy_error, reference)))
        if np.isfinite(relative).any():
            spread = within_compositions(reference, formulas)
            quantities.append(Quantity("energy per atom within a composition", "meV/atom", stat(relative, spread)))
        if not model.has_totals:
            energy_error = relative
    errors = None
    if "forces" in labels:
        errors = 1000 * (predictions.forces - labels["forces"])
        quantities.append(Quantity("force component", "meV/Å", stat(errors.ravel(), 1000 * labels["forces"].ravel())))
        force_error = np.add.reduceat(np.abs(errors).mean(axis=1), ptr[:-1]) / counts
    if "stress" in labels and predictions.stress is not None:
        difference = 1000 * (predictions.stress - labels["stress"].reshape(-1, 3, 3))
        quantities.append(
            Quantity("stress component", "meV/Å³", stat(difference.ravel(), 1000 * labels["stress"].ravel()))
        )
    for name, label in property_labels.items():
        reference = labels[label].reshape(predictions.properties[name].shape)
        error = predictions.properties[name] - reference
        quantities.append(Quantity(name, _unit(name, model), stat(error.ravel(), reference.ravel())))
    found = Comparison(model, predictions, quantities, energy_error, relative, force_error, formulas)
    found.groups = _groups(found, references, labels, formulas, errors)
    if model.is_ensemble:
        found.calibrations = _calibrations(found, labels, counts, errors)
    return found


def _unit(name: str, model: Model) -> str:
    return {"dipole": "e·Å", "charges": "e"}.get(name, "")


def _groups(
    found: Comparison,
    references: References,
    labels: dict[str, np.ndarray],
    formulas: np.ndarray,
    errors: np.ndarray | None,
) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    atoms_of = np.repeat(np.arange(len(references)), references.counts)
    if errors is not None:
        z = labels["z"]
        groups["element"] = [
            {"element": SYMBOLS[number], "atoms": int((z == number).sum())}
            | _short("force", stat(errors[z == number].ravel(), 1000 * labels["forces"][z == number].ravel()), "meV_A")
            for number in np.unique(z)
        ]
    for kind, names in (("composition", formulas), ("file", references.files), ("kind", references.groups)):
        if not len(names) or (kind != "composition" and len(set(names.tolist())) < 2):
            continue
        rows = []
        for name in dict.fromkeys(names.tolist()):
            chosen = names == name
            row: dict[str, Any] = {kind: name, "structures": int(chosen.sum())}
            if len(found.energy_error):
                reference = 1000 * labels["energy"][chosen] / references.counts[chosen]
                row |= _short("energy", stat(found.energy_error[chosen], reference), "meV_atom")
            if errors is not None:
                inside = chosen[atoms_of]
                reference = 1000 * labels["forces"][inside].ravel()
                row |= _short("force", stat(errors[inside].ravel(), reference), "meV_A")
            rows.append(row)
        sign = "force_mae_meV_A" if errors is not None else "energy_mae_meV_atom"
        groups[kind] = sorted(rows, key=lambda row: -np.nan_to_num(row.get(sign, 0.0)))
    return groups


def _short(name: str, numbers: Stat, unit: str) -> dict[str, float]:
    return {f"{name}_{kind}_{unit}": getattr(numbers, kind) for kind in ("mae", "rmse", "p95")}


def _calibrations(
    found: Comparison, labels: dict[str, np.ndarray], counts: np.ndarray, errors: np.ndarray | None
) -> list[Calibration]:
    predictions, made = found.predictions, []
    if len(found.energy_error) and predictions.energy_std is not None:
        spread = 1000 * predictions.energy_std / counts
        made.append(calibration("energy per atom", "meV/atom", spread, found.energy_error))
    if errors is not None and predictions.forces_std is not None:
        spread = 1000 * predictions.forces_std.ravel()
        made.append(calibration("force component", "meV/Å", spread, errors.ravel()))
    return [each for each in made if each is not None]


def calibration(name: str, unit: str, spread: np.ndarray, errors: np.ndarray, bins: int = 12) -> Calibration | None:
    """Compare standard deviations with errors, in bins of as many values each; None for fewer than 20 values."""
    from scipy.stats import spearmanr

    fine = np.isfinite(errors) & np.isfinite(spread) & (spread > 0)
    spread, errors = spread[fine], errors[fine]
    if len(spread) < 20:
        return None
    order = np.argsort(spread)
    parts = np.array_split(order, min(bins, len(order) // 10))
    predicted = np.array([np.sqrt((spread[part] ** 2).mean()) for part in parts])
    seen = np.array([np.sqrt((errors[part] ** 2).mean()) for part in parts])
    return Calibration(
        name,
        unit,
        predicted,
        seen,
        float((np.abs(errors) <= spread).mean()),
        float(np.sqrt(((errors / spread) ** 2).mean())),
        float(spearmanr(spread, np.abs(errors))[0]),  # pyright: ignore[reportArgumentType],
    )
