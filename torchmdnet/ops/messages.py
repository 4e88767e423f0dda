"""Passing tensor features along edges."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.ops.irreps import PARTS
from torchmdnet.typing import AtomTensors, EdgeIndex

__all__ = ["embed_edges", "gather_weight_sum"]


def gather_weight_sum(X: AtomTensors, weight: Tensor, edge_index: EdgeIndex) -> AtomTensors:
    r"""Sum the weighted features of neighbours, :math:`M_i = \sum_j w_{ij} \odot X_j`.

    Args:
        X: Features, (N, 9, F).
        weight: One weight per part and channel, (E, 3, F).
        edge_index: (2, E); row 0 receives, row 1 sends.

    Returns:
        (N, 9, F).
    """
    i, j = edge_index
    sums = []
    for k, part in enumerate(X.split(PARTS, dim=1)):
        message = weight[:, k, None] * part.index_select(0, j)  # (E, 1 | 3 | 5, F)
        sums.append(torch.zeros_like(part).index_add(0, i, message))
    return torch.cat(sums, dim=1)


def embed_edges(Y: Tensor, weight: Tensor, receivers: Tensor, num_atoms: int) -> AtomTensors:
    r"""Sum edge directions with radial weights, :math:`X_i = \sum_j w_{ij} \odot Y_{ij}`.

    Args:
        Y: Components of the edge directions, (E, 9).
        weight: One weight per part and channel, (E, 3, F).
        receivers: Receiving atom of each edge, (E,).
        num_atoms: Number of atoms N.

    Returns:
        (N, 9, F).
    """
    sums = []
    for k, part in enumerate(Y.split(PARTS, dim=1)):
        message = part[:, :, None] * weight[:, k, None]  # (E, 1 | 3 | 5, F)
        sums.append(message.new_zeros(num_atoms, *message.shape[1:]).index_add(0, receivers, message))
    return torch.cat(sums, dim=1)
