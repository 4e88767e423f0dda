"""Predictions of a batch beside its labels."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from torchmdnet.data.labels import Target, field_of, rows_present
from torchmdnet.errors import DataError
from torchmdnet.training.metrics import ErrorSums

__all__ = ["NAMED_FIELDS", "Comparison", "Labels", "compare", "flags_of", "labels_of", "weights_of"]

#: Fields of a batch that multiply losses.
WEIGHT_FIELDS = frozenset({"config_weight", "y_weight", "neg_dy_weight", "stress_weight"})
#: Fields of a batch that are labels or named arguments of the model; every other field travels in ``extra_args``.
NAMED_FIELDS = frozenset({"y", "neg_dy", "z", "pos", "batch", "box", "q", "s"}) | WEIGHT_FIELDS

#: Labels of the stress and the properties, (rows, ...), each with the rows that have one; None is all.
Labels: TypeAlias = "dict[str, tuple[Tensor, Tensor | None]]"


class Comparison(NamedTuple):
    """Predictions of one batch beside its labels; a label is None where the batch has none to compare with.

    ``others`` holds the stress and the properties, of those systems or atoms (R) that have the label.
    """

    y: Tensor  # (S, 1)
    y_label: Tensor | None  # (S, 1)
    neg_dy: Tensor  # (N, 3), empty without forces
    neg_dy_label: Tensor | None  # (N, 3)
    batch: Tensor | None  # (N,) molecule of each atom; None is one molecule
    num_atoms: int
    others: Mapping[str, tuple[Tensor, Tensor]] = {}  # (R, ...) predictions and labels
    weights: Mapping[str, Tensor] = {}  # (rows of the term,) factors of the loss, where the data have them

    @property
    def atoms_per_molecule(self) -> Tensor:
        """(S, 1), so that energies divide by it."""
        if self.batch is None:
            return self.y.new_full((1, 1), self.num_atoms)
        ones = self.y.new_ones(self.num_atoms)
        return self.y.new_zeros(self.y.shape[0]).index_add_(0, self.batch, ones).clamp_(min=1).unsqueeze(1)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Term -> prediction, label, and the number of molecules or atoms they describe."""
        pairs = {}
        if self.y_label is not None:
            pairs["y"] = (self.y, self.y_label, self.y.shape[0])
        if self.neg_dy_label is not None:
            pairs["neg_dy"] = (self.neg_dy, self.neg_dy_label, self.num_atoms)
        for term, (prediction, label) in self.others.items():
            pairs[term] = (prediction, label, label.shape[0])
        return pairs

    def detach(self) -> Comparison:
        """The same without history."""
        others = {term: (prediction.detach(), label) for term, (prediction, label) in self.others.items()}
        return self._replace(y=self.y.detach(), neg_dy=self.neg_dy.detach(), others=others)

    def add_to(self, sums: ErrorSums) -> None:
        """Add the errors of this batch."""
        errors = {term: prediction - label for term, (prediction, label, _) in self.pairs().items()}
        y, neg_dy = errors.pop("y", None), errors.pop("neg_dy", None)
        sums.update(y, self.atoms_per_molecule if y is not None else None, neg_dy, errors)


def compare(
    batch: Any, prediction: Any, labels: Labels, targets: Mapping[str, Target], *, forces: bool, learns: bool
) -> Comparison:
    """Lay the labels of a batch beside its predictions.

    Args:
        batch: A ``torch_geometric`` batch, as the model has read it.
        prediction: What the model predicts of it.
        labels: See :func:`labels_of`.
        targets: The stress and the properties that are learned, by name.
        forces: Whether forces are compared.
        learns: Whether predictions keep their history.

    Raises:
        DataError: If there is nothing to compare with, or a label has another shape than its prediction.
    """
    y, neg_dy = prediction[:2]
    others = _beside(prediction, labels)
    if not learns:
        y, neg_dy = y.detach(), neg_dy.detach()
        others = {term: (value.detach(), label) for term, (value, label) in others.items()}
    y_label = batch.y if "y" in batch else None
    neg_dy_label = batch.neg_dy if forces and "neg_dy" in batch else None
    if y_label is None:
        if neg_dy_label is None and not others:
            raise DataError(
                "the batch has no label to learn from: y is missing, and neg_dy is "
                + ("missing too." if forces else "used only with derivative: true.")
            )
        if not others:
            neg_dy = neg_dy + 0 * y.sum()  # every parameter takes part in the gradient reduction
    elif y_label.dim() == 1:
        y_label = y_label.unsqueeze(1)
    for name, prediction, label in (("y", y, y_label), ("neg_dy", neg_dy, neg_dy_label)):
        if label is not None and label.shape != prediction.shape:
            raise DataError(
                f"{name} has shape {tuple(label.shape)} in the data, but the model predicts "
                f"{tuple(prediction.shape)}. One label per molecule (y) or three per atom (neg_dy) are expected."
            )
    index = batch.batch if "batch" in batch else None
    weights = weights_of(batch, index, labels, targets) if WEIGHT_FIELDS & set(batch.keys()) else {}
    return Comparison(y, y_label, neg_dy, neg_dy_label, index, batch.z.shape[0], others, weights)


def labels_of(batch: Any, targets: Mapping[str, Target], complete: Container[str]) -> Labels:
    """Labels of the stress and the properties, (rows, ...), each with the rows that have one; None is all."""
    labels: Labels = {}
    fields = batch.keys() if targets else ()
    for term, target in targets.items():
        field = field_of(target, fields)
        if field is None:
            raise DataError(
                f"{term}: the batch has no {target.label!r}, only {', '.join(map(str, fields))}. Check the label."
            )
        rows = batch.z.shape[0] if target.level == "atom" else batch.num_graphs if "ptr" in batch else 1
        shape = (rows, *target.shape.shape)
        label = batch[field]
        if label.numel() != math.prod(shape):
            raise DataError(
                f"{term} has shape {tuple(label.shape)} in the data, but the model predicts {shape}: "
                f"{target.shape.words}."
            )
        label = label.reshape(shape)
        labels[term] = (label, None if term in complete else rows_present(label))
    return labels


def flags_of(labels: Labels, targets: Mapping[str, Target]) -> dict[str, bool]:
    """What the model is asked for beside energies and forces; a stress only where a system has its label."""
    if not labels:
        return {}
    flags = {"properties": any(target.head is not None for target in targets.values())}
    if "stress" in labels:
        present = labels["stress"][1]
        flags["stress"] = present is None or bool(present.any())
    return flags


def _beside(prediction: Any, labels: Labels) -> dict[str, tuple[Tensor, Tensor]]:
    """Predicted stress and properties beside their labels, without the rows whose label is missing."""
    others: dict[str, tuple[Tensor, Tensor]] = {}
    for term, (label, present) in labels.items():
        value: Any = prediction.properties[term] if term != "stress" else getattr(prediction, "stress", None)
        if value is None:  # no system has the label, so the model was not asked
            value = prediction[0].sum() * 0 + label.new_zeros(label.shape)
        if value.shape != label.shape:
            raise DataError(
                f"{term} has shape {tuple(label.shape)} in the data, but the model predicts {tuple(value.shape)}."
            )
        others[term] = (value, label) if present is None else (value[present], label[present])
    return others


def weights_of(batch: Any, index: Tensor | None, labels: Labels, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Factors of the losses, (rows,): the weight of the configuration times that of its label."""
    weights: dict[str, Tensor] = {}
    for term in ("y", "neg_dy", *labels):
        found = [batch[name].reshape(-1) for name in ("config_weight", f"{term}_weight") if name in batch]
        if not found:
            continue
        weight = found[0] * found[1] if len(found) > 1 else found[0]  # (S,)
        if term == "neg_dy" or (term in labels and targets[term].level == "atom"):
            weight = weight.expand(batch.z.shape[0]) if index is None else weight[index]  # (N,)
        present = labels[term][1] if term in labels else None
        weights[term] = weight if present is None else weight[present]
    return weights
