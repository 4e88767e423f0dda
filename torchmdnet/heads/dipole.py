"""The dipole moment of a molecule."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from torchmdnet.elements import atomic_masses
from torchmdnet.graph import Graph, sum_to_systems
from torchmdnet.heads.base import OutputModel
from torchmdnet.heads.charges import PartialCharges
from torchmdnet.heads.equivariant import EquivariantOutput, EquivariantVectorOutput
from torchmdnet.heads.scalar import Scalar
from torchmdnet.models.base import Features
from torchmdnet.nn.modules import reset_all
from torchmdnet.ops.norms import length

__all__ = ["Dipole", "DipoleMoment", "EquivariantDipoleMoment", "from_centre_of_mass", "masses"]

log = logging.getLogger(__name__)
_warned: set[str] = set()


def masses(dtype: torch.dtype) -> Tensor:
    """Standard atomic masses in u by atomic number, (119,)."""
    return torch.tensor(atomic_masses, dtype=dtype)


def from_centre_of_mass(graph: Graph, atomic_mass: Tensor, head: str) -> Tensor:
    """Positions relative to the centre of mass of each system, (N, 3) Å.

    Positions are used as given. In a periodic system the centre of mass, and all that is made from it, depends on
    which image of each atom was given; ``head`` is named in a warning about that.
    """
    if graph.box is not None and head not in _warned:
        _warned.add(head)
        log.warning(
            "%s measures positions from the centre of mass; with a periodic box its value depends on which image of "
            "each atom is given. Give whole molecules.",
            head,
        )
    mass = atomic_mass.index_select(0, graph.z)[:, None]  # (N, 1)
    centre = sum_to_systems(mass * graph.pos, graph) / sum_to_systems(mass, graph)  # (S, 3)
    return graph.pos - centre.index_select(0, graph.batch)


class DipoleMoment(Scalar):
    r"""Length of the dipole moment from partial charges, :math:`|\sum_i q_i (r_i - r_\mathrm{com})|` (SchNetPack).

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
        num_layers: Hidden layers of the MLP beyond the first.
    """

    can_standardize = False
    depends_on_images = True
    atomic_mass: Tensor

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
        num_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_channels,
            activation,
            allow_prior_model=False,
            reduce_op=reduce_op,
            dtype=dtype,
            static_shapes=static_shapes,
            num_layers=num_layers,
        )
        self.register_buffer("atomic_mass", masses(dtype))

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Dipole of each atom, (N, 3)."""
        return self.output_network(features.x) * from_centre_of_mass(graph, self.atomic_mass, type(self).__name__)

    def post_reduce(self, x: Tensor) -> Tensor:
        """Length of the dipole moment: (S, 3) -> (S, 1)."""
        return length(x, dim=-1, keepdim=True)


class EquivariantDipoleMoment(EquivariantOutput):
    r"""Length of the dipole moment from partial charges and atomic dipoles (PaiNN, Schütt et al., ICML 2021).

    .. math:: y = |\sum_i q_i (r_i - r_\mathrm{com}) + \mu_i|

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
    """

    can_standardize = False
    depends_on_images = True
    atomic_mass: Tensor

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_channels,
            activation,
            allow_prior_model=False,
            reduce_op=reduce_op,
            dtype=dtype,
            static_shapes=static_shapes,
        )
        self.register_buffer("atomic_mass", masses(dtype))

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Dipole of each atom, (N, 3)."""
        charge, dipole = self.scalar_and_vector(features)
        return charge * from_centre_of_mass(graph, self.atomic_mass, type(self).__name__) + dipole

    def post_reduce(self, x: Tensor) -> Tensor:
        """Length of the dipole moment: (S, 3) -> (S, 1)."""
        return length(x, dim=-1, keepdim=True)


class Dipole(OutputModel):
    r"""Dipole of each system, (S, 3) e·Å, from partial charges and, where there are vector features, atomic dipoles.

    .. math:: \mu = \sum_i q_i (r_i - r_\mathrm{com}) + \mu_i

    The charges add up to the total charge of the system, see :class:`torchmdnet.heads.charges.PartialCharges`, so the
    dipole of a neutral system does not depend on the origin; that of an ion is measured from its centre of mass. For
    architectures without vector features, charges are all there is.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        dtype: Precision of the weights.
        num_layers: Hidden layers of the MLP of the charges beyond the first.
        has_vectors: Whether the architecture has vector features.
    """

    can_standardize = False
    depends_on_images = True
    output_shape = (3,)
    atomic_mass: Tensor

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        dtype: torch.dtype = torch.float32,
        num_layers: int = 0,
        has_vectors: bool = False,
    ) -> None:
        super().__init__(allow_prior_model=False)
        self.charges = PartialCharges(hidden_channels, activation, dtype=dtype, num_layers=num_layers)
        self.atomic_dipoles = EquivariantVectorOutput(hidden_channels, activation, dtype=dtype) if has_vectors else None
        self.register_buffer("atomic_mass", masses(dtype), persistent=False)

    def reset_parameters(self) -> None:
        reset_all(self.charges, *([] if self.atomic_dipoles is None else [self.atomic_dipoles]))

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Dipole of each atom, (N, 3) e·Å."""
        place = from_centre_of_mass(graph, self.atomic_mass, type(self).__name__)
        dipole = self.charges.per_atom(features, graph) * place
        return dipole if self.atomic_dipoles is None else dipole + self.atomic_dipoles.per_atom(features, graph)
