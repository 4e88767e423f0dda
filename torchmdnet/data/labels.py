"""What is learnt beside energies and forces: stress, and the properties that a configuration names."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.data.loader import collect
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.labels import LARGEST_LABEL, LabelShape, find_label, too_large
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.heads import HEADS
from torchmdnet.properties import property_specs

__all__ = [
    "Target",
    "check_targets",
    "complete_targets",
    "field_of",
    "rows_present",
    "targets_of",
]

#: Bytes of a mapped label that are looked through before training.
MAPPED_LIMIT = 2**30


class Target(NamedTuple):
    """A quantity of the loss beside energies and forces."""

    name: str  # in columns and messages: "stress", or the name of the property
    label: str  # name in the data
    shape: LabelShape
    weight: float
    loss: str | None = None  # None is train_loss
    head: str | None = None  # None for the stress

    @property
    def level(self) -> str:
        """``atom`` or ``system``: what a row describes."""
        return self.shape.level

    def unit(self, energy: str | None, length: str | None) -> str:
        """The unit of the label, as far as it follows from those of the data set; else empty."""
        of_length = length or ("Å" if energy else "")
        if self.head is None:
            return f"{energy}/{of_length}³" if energy else ""
        return {"Dipole": f"e·{of_length}" if of_length else "", "PartialCharges": "e"}.get(self.head, "")


def targets_of(options: Mapping[str, Any]) -> dict[str, Target]:
    """The quantities that a configuration trains beside energies and forces, by name.

    Args:
        options: Configuration keys; ``stress_weight`` and ``properties`` are read.

    Raises:
        ConfigError: If ``properties`` cannot be understood.
    """
    targets: dict[str, Target] = {}
    weight = float(options.get("stress_weight") or 0.0)
    if weight > 0:
        targets["stress"] = Target("stress", "stress", LabelShape("system", (3, 3)), weight)
    for name, spec in property_specs(options).items():
        if name == "total":
            raise ConfigError("properties: 'total' is the name of the whole loss. Choose another name.")
        head: Any = HEADS[spec.head]
        shape = LabelShape("atom" if head.per_atom_output else "system", tuple(head.output_shape))
        targets[name] = Target(name, spec.label, shape, spec.weight, spec.loss, spec.head)
    return targets


def field_of(target: Target, fields: Collection[str]) -> str | None:
    """The name of a target's labels among the fields of a sample or batch, None where there are none."""
    return find_label(target.label, fields)


def check_targets(dataset: Any, targets: Mapping[str, Target]) -> None:
    """Refuse a data set without the labels, or with labels of another shape.

    Raises:
        DataError: Naming the label, what there is, and what to change.
    """
    if not targets:
        return
    batch: Any = collect(dataset, np.array([_telling_sample(dataset)]))
    atoms = int(batch.z.shape[0])
    fields = [name for name in batch.to_dict() if name not in ("batch", "ptr")]
    for target in targets.values():
        field = field_of(target, fields)
        if field is None:
            raise DataError(_absent(dataset, target, fields))
        level = _level(dataset, field)
        if level not in (None, target.level):
            raise DataError(
                f"{_key(target)}: {field!r} has a row for each {level} in the data, but {_predicted(target)} "
                f"{target.shape.words}. Name another label or head."
            )
        rows = atoms if target.level == "atom" else 1
        label = batch[field]
        size = label.numel() if isinstance(label, Tensor) else -1
        if size != rows * math.prod(target.shape.shape):
            found = tuple(label.shape) if isinstance(label, Tensor) else type(label).__name__
            expected = (rows, *target.shape.shape)
            raise DataError(
                f"{_key(target)}: {field!r} of a sample with {atoms} atoms has shape {found}, but "
                f"{_predicted(target)} {target.shape.words}, {expected}. Name another label or head."
            )


def _telling_sample(dataset: Any) -> int:
    """A sample, of the first hundred, in which a number for each atom does not have the shape of one for the system."""
    if hasattr(dataset, "frames"):
        return 0  # they say which is which
    return next((row for row in range(min(len(dataset), 100)) if len(dataset[row]["z"]) > 1), 0)


def _level(dataset: Any, field: str) -> str | None:
    """Whether a field has a row for each atom or system; None where the data set does not say."""
    names = getattr(getattr(dataset, "frames", None), "atom_fields", None)
    if names is None or getattr(dataset, "transform", None):
        return None
    return "atom" if field in names else "system"


def complete_targets(dataset: Any, targets: Mapping[str, Target]) -> frozenset[str]:
    """Targets whose labels are known to be there for every sample.

    Data in memory, or mapped and not too large, are looked through; of others nothing is known, and every batch is
    looked at.

    Raises:
        DataError: If no sample has a label, or one is infinite or larger than any label can be.
    """
    frames = getattr(dataset, "frames", None)
    if frames is None or not (frames.in_memory or isinstance(frames, Frames)) or getattr(dataset, "transform", None):
        return frozenset()
    complete = set()
    for name, target in targets.items():
        field = field_of(target, frames.fields)
        if field is None:
            continue
        values = np.asarray(frames[field])
        if not frames.in_memory and values.nbytes > MAPPED_LIMIT:
            continue
        if np.isinf(values).any():
            row = int(np.argwhere(np.isinf(values))[0][0])
            raise DataError(f"{_key(target)}: {field!r} of {target.level} {row} is infinite. Repair or leave it out.")
        if (np.abs(values) > LARGEST_LABEL).any():
            row = np.argwhere(np.abs(values) > LARGEST_LABEL)[0]
            told = too_large(float(values[tuple(row)]))
            raise DataError(f"{_key(target)}: {field!r} of {target.level} {row[0]}: {told}")
        missing = np.isnan(values)
        if missing.all():
            raise DataError(f"{_key(target)}: {field!r} is NaN, that is missing, in every sample.")
        if not missing.any():
            complete.add(name)
    return frozenset(complete)


def rows_present(label: Tensor) -> Tensor:
    """Which rows of a label hold no NaN, (R,)."""
    return ~torch.isnan(label.reshape(label.shape[0], -1)).any(dim=1)


def _key(target: Target) -> str:
    return "stress_weight" if target.head is None else f"properties: {target.name}"


def _predicted(target: Target) -> str:
    return "a stress has" if target.head is None else f"{target.head} predicts"


def _absent(dataset: Any, target: Target, fields: Sequence[str]) -> str:
    words = f"{_key(target)}: the data hold no {target.label!r}, only {', '.join(fields)}."
    words += did_you_mean(target.label, fields)
    if target.head is None:
        absence = dataset.absent_label("stress") if isinstance(dataset, FramesDataset) else None
        if absence is not None and absence.is_mistake:
            return f"{_key(target)}: {absence.reason} Set stress_weight: 0 to train without."
        return f"{words} Set stress_weight to 0, or use periodic data with stress labels."
    return f"{words} Say which of them it is, properties: {{{target.name}: {{label: ...}}}}, or leave it out."
