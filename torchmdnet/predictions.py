"""What potentials return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["EdgePrediction", "Evaluation", "Outputs", "Prediction", "Values"]


class Prediction(NamedTuple):
    """What a potential says of a batch; unpacks as ``energy, forces``."""

    energy: Tensor  # (S, 1) in the unit of the training data
    forces: Tensor  # (N, 3) per Å, or empty, (0,), without derivative


class Outputs(NamedTuple):
    """All that a potential was asked for."""

    energy: Tensor  # (S, 1) in the unit of the training data
    forces: Tensor  # (N, 3) per Å, or empty, (0,), without derivative
    stress: Tensor | None  # (S, 3, 3) per Å³; NaN for systems that are not periodic; None unless asked for
    properties: dict[str, Tensor]  # by name, (S, ...) or for values of atoms (N, ...); empty unless asked for


class Values(NamedTuple):
    """What follows from the features of atoms without derivatives."""

    energy: Tensor  # (S, 1)
    properties: dict[str, Tensor]
    atomic: Tensor | None  # (N,) contributions that add up to the energy, in float64; None unless asked for

    def detached(self) -> Values:
        """The same without history."""
        properties = {name: value.detach() for name, value in self.properties.items()}
        return Values(self.energy.detach(), properties, None if self.atomic is None else self.atomic.detach())


class Evaluation(NamedTuple):
    """What :meth:`torchmdnet.potential.TorchMD_Net.evaluate` finds."""

    energy: Tensor  # (S, 1)
    forces: Tensor | None  # (N, 3)
    virial: Tensor | None  # (S, 3, 3) derivative of the energy in the strain
    properties: dict[str, Tensor]
    atomic: Tensor | None  # (N,) contributions that add up to the energy, in float64


class EdgePrediction(NamedTuple):
    """What a potential says of a list of edges; see :meth:`torchmdnet.potential.TorchMD_Net.from_edges`."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3), or empty, (0,), without derivative, like the next two
    edge_gradient: Tensor  # (E, 3) derivative of the energy in each edge vector, in the order given
    virial: Tensor  # (S, 3, 3) derivative of the energy in a strain, symmetrised
    stress: Tensor | None  # (S, 3, 3) the virial divided by the volume; None without box
    atomic: Tensor | None  # (N, 1) contributions that add up to the energy; None where it is no sum over atoms
    properties: dict[str, Tensor]  # by name; empty unless asked for
