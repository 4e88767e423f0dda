"""Partial charges of the atoms."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.graph import Graph, sum_to_systems
from torchmdnet.heads.atom_scalar import AtomScalar
from torchmdnet.models.base import Features

__all__ = ["PartialCharges", "add_up_to_total"]


def add_up_to_total(charges: Tensor, graph: Graph) -> Tensor:
    """Shift the charges of each system evenly, so that they add up to its total charge, 0 where none is given.

    Args:
        charges: (N, 1) e.
        graph: Atoms, with the total charges ``q`` (S,) e or None.
    """
    missing = -sum_to_systems(charges, graph)  # (S, 1)
    if graph.q is not None:
        missing = missing + graph.q[:, None]
    count = sum_to_systems(torch.ones_like(charges), graph)
    return charges + (missing / count.clamp(min=1)).index_select(0, graph.batch)


class PartialCharges(AtomScalar):
    r"""Charge of each atom, (N, 1) e, adding up to the total charge Q of its system.

    .. math:: q_i = c_i + \frac{1}{N} \Big(Q - \sum_j c_j\Big), \qquad c_i = \mathrm{MLP}(x_i)

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        dtype: Precision of the weights.
        num_layers: Hidden layers of the MLP beyond the first.
    """

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Charge of each atom, (N, 1) e."""
        return add_up_to_total(super().per_atom(features, graph), graph)
