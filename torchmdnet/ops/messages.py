r"""Passing tensor features along edges: two multilinear forms and their partial derivatives.

Both operations of message passing are partial derivatives of a form that is linear in each of its tensors,

.. math::
    M(O, w, X) &= \sum_{(i, j)} \sum_{c f} O_{icf}\, w_{ij,l(c),f}\, X_{jcf} \\
    D(O, Y, w, Z) &= \sum_{(i, j)} \sum_{c f} O_{icf}\, Y_{ijc}\, w_{ij,l(c),f}\, (Z_{i0f} + Z_{j1f})

over directed edges from j to i, components c of the part l(c), and channels f. The derivative of a form in one of its
tensors is an operation on the others; the gradient of that operation is again a derivative of the same form, with one
tensor replaced. So a handful of kernels serve every order of differentiation. The weights belong to *pairs* and are
shared by both directions of an edge, which makes :math:`M` symmetric: :math:`M(O, w, X) = M(X, w, O)`.

The plain functions here are the definition. On the CPU compiled twins of them run, see :mod:`torchmdnet.ops.kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.graph import Pairs
from torchmdnet.ops import kernels
from torchmdnet.typing import AtomTensors, EdgeIndex

__all__ = ["embed_edges", "embed_edges_plain", "gather_weight_sum", "gather_weight_sum_plain"]

#: The part each component belongs to.
PART_OF_COMPONENT = (0, 1, 1, 1, 2, 2, 2, 2, 2)


def gather_weight_sum(X: AtomTensors, weight: Tensor, edge_index: EdgeIndex, pairs: Pairs) -> AtomTensors:
    r"""Sum the weighted features of neighbours, :math:`\partial M / \partial O`, i.e. :math:`\sum_j w_{ij} \odot X_j`.

    Args:
        X: Features, (N, 9, F).
        weight: One weight per part and channel of each pair, (P, 3, F).
        edge_index: (2, E); row 0 receives, row 1 sends.
        pairs: How edges form pairs.

    Returns:
        (N, 9, F).
    """
    if kernels.can_run(X):
        return kernels.message(X, weight, edge_index, pairs)
    return gather_weight_sum_plain(X, weight, edge_index, pairs)


def gather_weight_sum_plain(X: AtomTensors, weight: Tensor, edge_index: EdgeIndex, pairs: Pairs) -> AtomTensors:
    """The definition of :func:`gather_weight_sum`."""
    i, j = edge_index
    of_component = torch.tensor(PART_OF_COMPONENT, device=X.device)
    weight = weight.index_select(0, pairs.of_edge).index_select(1, of_component)  # (E, 9, F)
    return torch.zeros_like(X).index_add(0, i, weight * X.index_select(0, j))


def embed_edges(Y: Tensor, weight: Tensor, Z: Tensor, edge_index: EdgeIndex, pairs: Pairs) -> AtomTensors:
    r"""Sum edge directions with radial weights and pair factors, :math:`\partial D / \partial O`.

    Args:
        Y: Components of the edge directions, (E, 9).
        weight: One weight per part and channel of each pair, (P, 3, F).
        Z: What each atom contributes to the factor of a pair, as receiver and as sender, (N, 2, F).
        edge_index: (2, E); row 0 receives, row 1 sends.
        pairs: How edges form pairs.

    Returns:
        (N, 9, F).
    """
    if kernels.can_run(Z):
        return kernels.embed(Y, weight, Z, edge_index, pairs)
    return embed_edges_plain(Y, weight, Z, edge_index, pairs)


def embed_edges_plain(Y: Tensor, weight: Tensor, Z: Tensor, edge_index: EdgeIndex, pairs: Pairs) -> AtomTensors:
    """The definition of :func:`embed_edges`."""
    i, j = edge_index
    of_component = torch.tensor(PART_OF_COMPONENT, device=Y.device)
    factor = Z[:, 0].index_select(0, i) + Z[:, 1].index_select(0, j)  # (E, F)
    weight = weight.index_select(0, pairs.of_edge) * factor[:, None]  # (E, 3, F)
    message = Y[:, :, None] * weight.index_select(1, of_component)  # (E, 9, F)
    return message.new_zeros(Z.shape[0], 9, Z.shape[2]).index_add(0, i, message)
