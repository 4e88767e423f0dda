"""Means over an epoch, collected on the device the model runs on: nothing here waits for the accelerator per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ErrorSums", "Errors", "RunningMean", "accumulator_dtype"]


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The precision that sums are collected in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class RunningMean:
    """The mean of batch means, each weighted by the molecules or atoms it stands for.

    A last batch of one molecule then counts as one molecule, and the result does not depend on the batch size.
    """

    __slots__ = ("count", "total", "weight")

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0
        self.count = 0

    def update(self, mean: Tensor, weight: float) -> None:
        """Add the mean over ``weight`` molecules or atoms."""
        mean = mean.detach()
        total = self.total
        if total is None:
            total = self.total = torch.zeros((), dtype=accumulator_dtype(mean.device), device=mean.device)
        total.add_(mean, alpha=weight)
        self.weight += weight
        self.count += 1

    def mean(self) -> float:
        """The mean so far; waits for the device."""
        return math.nan if self.total is None or not self.weight else float(self.total) / self.weight

    def __len__(self) -> int:
        return self.count

    def state_dict(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any]:
        """Plain values from which :meth:`from_state` rebuilds this mean.

        Args:
            reduce: Sums a tensor over all processes.
        """
        if self.total is None:
            return {"total": None, "weight": 0.0, "count": 0}
        total, weight = reduce(torch.stack([self.total, self.total.new_tensor(self.weight)])).cpu()
        return {"total": total.clone(), "weight": float(weight), "count": self.count}

    @classmethod
    def from_state(cls, state: dict, device: torch.device) -> RunningMean:
        """Continue a mean that was interrupted inside an epoch."""
        mean = cls()
        mean.total = None if state["total"] is None else state["total"].to(device)
        mean.weight, mean.count = float(state["weight"]), int(state["count"])
        return mean


class Errors(NamedTuple):
    """Errors over a split, in the units of the data. Terms without labels are NaN."""

    num_molecules: int
    y_mae: float
    y_rmse: float
    y_mae_per_atom: float
    y_rmse_per_atom: float
    num_atoms: int
    neg_dy_mae: float
    neg_dy_rmse: float
    others: Mapping[str, tuple[float, float]] = {}  # MAE and RMSE of the components of stress and properties
    counts: Mapping[str, int] = {}  # labels of these

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that have labels; an error of theirs that is NaN is one of predictions that are not numbers."""
        known = {"y": self.num_molecules, "neg_dy": self.num_atoms, **self.counts}
        return tuple(term for term, count in known.items() if count)

    @property
    def are_finite(self) -> bool:
        """Whether no error of a term with labels is NaN or infinite."""
        return all(map(math.isfinite, self.labelled().values()))

    def labelled(self) -> dict[str, float]:
        """:meth:`table` without the terms that have no labels."""
        absent = {"y", "neg_dy", *self.others} - set(self.terms)
        return {name: value for name, value in self.table().items() if not name.startswith(_columns_of(absent))}

    def table(self) -> dict[str, float]:
        """All of it by name: ``num_molecules``, ``y_mae``, ..., ``dipole_mae``, ``dipole_rmse``."""
        table: dict[str, float] = self._asdict()
        del table["others"], table["counts"]
        for term, (mae, rmse) in self.others.items():
            table |= {f"{term}_mae": mae, f"{term}_rmse": rmse}
        return table

    @classmethod
    def from_sums(cls, sums: list[float], terms: Iterable[str] = ()) -> Errors:
        """From the sums of :class:`ErrorSums`: eight, and three for each of ``terms``."""
        molecules, y_abs, y_square, y_abs_atom, y_square_atom, atoms, f_abs, f_square = sums[:8]
        further = {term: sums[8 + 3 * i : 11 + 3 * i] for i, term in enumerate(terms)}

        def mean(total: float, count: float) -> float:
            return total / count if count else math.nan

        return cls(
            int(molecules),
            mean(y_abs, molecules),
            math.sqrt(mean(y_square, molecules)),
            mean(y_abs_atom, molecules),
            math.sqrt(mean(y_square_atom, molecules)),
            int(atoms),
            mean(f_abs, 3 * atoms),
            math.sqrt(mean(f_square, 3 * atoms)),
            {term: (mean(a, number), math.sqrt(mean(b, number))) for term, (number, a, b) in further.items()},
            {term: int(number) for term, (number, _, _) in further.items()},
        )


def _columns_of(terms: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{term}_{error}" for term in terms for error in ("mae", "rmse"))


class ErrorSums:
    """Sums of absolute and squared errors of energies, energies per atom, force components, and of further terms.

    Args:
        terms: Names of the further terms, in the order of their sums.
    """

    def __init__(self, terms: Iterable[str] = ()) -> None:
        self.terms = tuple(terms)
        self.sums: Tensor | None = None  # (8 + 3 T,)

    def update(
        self,
        y_error: Tensor | None,
        atoms_per_molecule: Tensor | None,
        neg_dy_error: Tensor | None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            y_error: Prediction minus label, (S, 1), or None without labels.
            atoms_per_molecule: (S, 1), needed with ``y_error``.
            neg_dy_error: Prediction minus label, (N, 3), or None without labels.
            others: Prediction minus label of the further terms, any shape.
        """
        others = others or {}
        error = next((e for e in (y_error, neg_dy_error, *others.values()) if e is not None), None)
        if error is None:
            return
        dtype = accumulator_dtype(error.device)
        batch = [torch.zeros((), dtype=dtype, device=error.device)] * (8 + 3 * len(self.terms))
        if y_error is not None:
            d = y_error.detach().to(dtype)  # (S, 1)
            assert atoms_per_molecule is not None
            d_atom = d / atoms_per_molecule
            batch[0] = torch.full_like(batch[0], len(d))
            batch[1:5] = [d.abs().sum(), d.square().sum(), d_atom.abs().sum(), d_atom.square().sum()]
        if neg_dy_error is not None:
            d = neg_dy_error.detach().to(dtype)  # (N, 3)
            batch[5] = torch.full_like(batch[5], len(d))
            batch[6:8] = [d.abs().sum(), d.square().sum()]
        for number, term in enumerate(self.terms):
            if term in others:
                d = others[term].detach().to(dtype)
                place = 8 + 3 * number
                batch[place : place + 3] = [torch.full_like(batch[0], d.numel()), d.abs().sum(), d.square().sum()]
        sums = torch.stack(batch)
        self.sums = sums if self.sums is None else self.sums + sums
