"""The electronic spatial extent of a molecule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.heads.dipole import from_centre_of_mass, masses
from torchmdnet.heads.scalar import Scalar
from torchmdnet.models.base import Features

__all__ = ["ElectronicSpatialExtent", "EquivariantElectronicSpatialExtent"]


class ElectronicSpatialExtent(Scalar):
    r"""Electronic spatial extent, :math:`\sum_i q_i |r_i - r_\mathrm{com}|^2` (SchNetPack).

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
        num_layers: Hidden layers of the MLP beyond the first.
    """

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
        """Contribution of each atom, (N, 1)."""
        r = from_centre_of_mass(graph, self.atomic_mass, type(self).__name__)
        return r.square().sum(dim=1, keepdim=True) * self.output_network(features.x)


class EquivariantElectronicSpatialExtent(ElectronicSpatialExtent):
    """:class:`ElectronicSpatialExtent` for architectures with vector features; it reads the scalars alone.

    It takes the arguments of :class:`ElectronicSpatialExtent`.
    """
