"""How good a potential is on a split, and how good one gets without a network at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.data.labels import Target, field_of, rows_present
from torchmdnet.data.loader import collect
from torchmdnet.datasets.reference_energies import fit_energies
from torchmdnet.training.metrics import Errors, ErrorSums

if TYPE_CHECKING:
    from torchmdnet.training.lightning import LNNP

__all__ = ["Baseline", "Evaluation", "SplitFacts", "composition_baseline", "evaluate", "facts_of", "read_batches"]

#: Numbers kept of each quantity for the parity plot.
MAX_POINTS = 2_000_000

#: One more than the largest atomic number.
MAX_Z = 128


class Baseline(NamedTuple):
    """Errors of a prediction that needs no network, in the units of the data; NaN where there is nothing to say."""

    y_mae: float
    y_mae_per_atom: float
    neg_dy_mae: float
    neg_dy_rms: float
    others: Mapping[str, float] = {}  # MAE of stress and properties

    def table(self) -> dict[str, float]:
        """All of it by name: ``y_mae``, ..., ``dipole_mae``."""
        table: dict[str, float] = self._asdict()
        del table["others"]
        return table | {f"{term}_mae": mae for term, mae in self.others.items()}


@dataclass
class Evaluation:
    """Errors on a split, with predictions beside labels (P,) for plotting."""

    split: str
    errors: Errors
    points: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # term -> labels, predictions
    baseline: Baseline | None = None


def evaluate(
    module: LNNP,
    batches: Iterable[Any],
    split: str,
    *,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Compare the predictions of the current weights with the labels of a split.

    Args:
        module: Holds the model and knows the form of the labels.
        batches: The batches of the split, or this process's share.
        split: Its name.
        device: Where to compute.
        reduce: Sums a tensor over all processes.

    Returns:
        Errors over all processes; ``points`` holds this process's share, energies per atom, at most two million.
    """
    was_training = module.training
    module.to(device).eval()
    sums = ErrorSums(module.targets)
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"y": [], "neg_dy": [], **{term: [] for term in module.targets}}
    counts = dict.fromkeys(kept, 0)
    with torch.no_grad():
        for batch in batches:
            comparison = module.compare(batch.to(device), "test")
            comparison.add_to(sums)
            for term, (prediction, label, _) in comparison.pairs().items():
                if counts[term] < MAX_POINTS:
                    if term == "y":
                        sizes = comparison.atoms_per_molecule
                        prediction, label = prediction / sizes, label / sizes
                    kept[term].append((label.flatten().cpu(), prediction.flatten().cpu()))
                    counts[term] += label.numel()
    module.train(was_training)
    local = sums.sums
    if local is None:
        local = torch.zeros(8 + 3 * len(module.targets), dtype=torch.float64)
    points = {
        term: (torch.cat([a for a, _ in pairs]).double().numpy(), torch.cat([b for _, b in pairs]).double().numpy())
        for term, pairs in kept.items()
        if pairs
    }
    errors = Errors.from_sums(reduce(local.to(device)).tolist(), module.targets)
    return Evaluation(split, errors, points)


class LabelFacts(NamedTuple):
    """Labels of a stress or property, without missing ones."""

    values: np.ndarray  # (R, K) components
    z: np.ndarray | None  # (R,) of a label of atoms


class SplitFacts(NamedTuple):
    """What the data say of themselves, from up to some thousand systems of a split."""

    counts: np.ndarray  # (S, Z) atoms of each element
    y: np.ndarray | None  # (S,)
    num_force_components: int
    force_abs: float  # mean
    force_rms: float
    force_max: float
    fields: tuple[str, ...]
    labels: Mapping[str, LabelFacts] = {}  # of stress and properties
    charged: bool = False  # whether a total charge is not 0

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that occur."""
        return np.flatnonzero(self.counts.any(axis=0)).tolist()

    @property
    def atoms(self) -> np.ndarray:
        """Atoms of each system, (S,)."""
        return self.counts.sum(axis=1)


def read_batches(dataset: Any, indices: Any, max_systems: int = 20_000, size: int = 500) -> Iterator[Any]:
    """Systems of a data set as batches, evenly chosen where there are more than ``max_systems``."""
    chosen = np.asarray(indices)
    if len(chosen) > max_systems:
        chosen = chosen[np.linspace(0, len(chosen) - 1, max_systems).astype(np.int64)]
    for first in range(0, len(chosen), size):
        yield collect(dataset, chosen[first : first + size])


def facts_of(batches: Iterable[Any], targets: Mapping[str, Target] | None = None) -> SplitFacts | None:
    """Collect compositions, energies, the size of forces and the labels of ``targets``; None of an empty split."""
    labels: dict[str, list[tuple[np.ndarray, np.ndarray | None]]] = {term: [] for term in targets or {}}
    charged = False
    counts: list[np.ndarray] = []
    energies: list[np.ndarray] = []
    fields: tuple[str, ...] = ()
    number, total, square, largest = 0, 0.0, 0.0, 0.0
    for batch in batches:
        sizes = (batch.ptr[1:] - batch.ptr[:-1]).cpu().numpy()
        system = np.repeat(np.arange(len(sizes)), sizes)
        z = batch.z.cpu().numpy()
        table = np.bincount(system * MAX_Z + z, minlength=len(sizes) * MAX_Z)
        counts.append(table.reshape(len(sizes), MAX_Z))
        fields = tuple(name for name in batch.to_dict() if name not in ("batch", "ptr"))
        if "y" in fields:
            energies.append(batch.y.double().reshape(len(sizes), -1)[:, 0].cpu().numpy())
        if "neg_dy" in fields:
            forces = batch.neg_dy.double().abs()
            number += forces.numel()
            total += float(forces.sum())
            square += float(forces.square().sum())
            largest = max(largest, float(forces.max())) if forces.numel() else largest
        if "q" in fields:
            charged |= bool((batch.q != 0).any())
        for term, target in (targets or {}).items():
            field = field_of(target, fields)
            if field is not None:
                rows = len(z) if target.level == "atom" else len(sizes)
                label = batch[field].double().reshape(rows, -1)
                present = rows_present(label)
                which = z[present.cpu().numpy()] if target.level == "atom" else None
                labels[term].append((label[present].cpu().numpy(), which))
    if not counts:
        return None
    return SplitFacts(
        np.concatenate(counts),
        np.concatenate(energies) if energies else None,
        number,
        total / number if number else math.nan,
        math.sqrt(square / number) if number else math.nan,
        largest if number else math.nan,
        fields,
        {term: _joined(pieces) for term, pieces in labels.items() if pieces},
        charged,
    )


def _joined(pieces: list[tuple[np.ndarray, np.ndarray | None]]) -> LabelFacts:
    values = np.concatenate([values for values, _ in pieces])
    return LabelFacts(values, None if pieces[0][1] is None else np.concatenate([z for _, z in pieces if z is not None]))


def composition_baseline(train: SplitFacts | None, test: SplitFacts) -> Baseline:
    """Errors of answering with the mean energy of the same composition, and with zero force.

    A composition that the training set does not have gets the sum of least-squares energies of its elements. A stress
    or property gets the mean of its training labels, component by component; one of atoms, that of the same element.

    Args:
        train: What is known of the training set; None if it is not.
        test: What is known of the set that is predicted.

    Returns:
        Mean absolute errors in the units of the data.
    """
    y_mae = y_mae_per_atom = math.nan
    if train is not None and train.y is not None and test.y is not None:
        error = np.abs(_predict_by_composition(train.counts, train.y, test.counts) - test.y)
        y_mae, y_mae_per_atom = float(error.mean()), float((error / np.maximum(test.atoms, 1)).mean())
    others = {
        term: _mean_label_error(train.labels[term], facts)
        for term, facts in test.labels.items()
        if train is not None and term in train.labels
    }
    return Baseline(y_mae, y_mae_per_atom, test.force_abs, test.force_rms, others)


def _mean_label_error(train: LabelFacts, test: LabelFacts) -> float:
    if not len(train.values) or not len(test.values):
        return math.nan
    guess = np.broadcast_to(train.values.mean(axis=0), test.values.shape).copy()
    if train.z is not None:
        for z in np.unique(train.z):
            guess[test.z == z] = train.values[train.z == z].mean(axis=0)
    return float(np.abs(guess - test.values).mean())


def _predict_by_composition(train: np.ndarray, energies: np.ndarray, test: np.ndarray) -> np.ndarray:
    elements = np.flatnonzero(train.any(axis=0))
    table = fit_energies(train[:, elements], elements, energies)
    predicted = test @ np.array([table.get(z, 0.0) for z in range(train.shape[1])])  # (S,)
    kinds, which = np.unique(train, axis=0, return_inverse=True)
    mean = np.bincount(which.reshape(-1), weights=energies) / np.bincount(which.reshape(-1))
    known = {kind.tobytes(): value for kind, value in zip(np.ascontiguousarray(kinds), mean, strict=True)}
    return np.array([known.get(kind.tobytes(), guess) for kind, guess in zip(test, predicted, strict=True)])
