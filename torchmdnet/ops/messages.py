r"""Passing features along edges: two multilinear forms and their partial derivatives.

Both operations of message passing are partial derivatives of a form that is linear in each of its tensors,

.. math::
    M(O, w, X) &= \sum_{(i, j)} \sum_{c f} O_{icf}\, w_{ij,l(c),f}\, X_{jcf} \\
    D(O, Y, w, Z) &= \sum_{(i, j)} \sum_{c f} O_{icf}\, Y_{ijc}\, w_{ij,l(c),f}\, (Z_{i0f} + Z_{j1f})

over directed edges from j to i, components c of the part l(c), and channels f. The radial weights of an edge are in
turn a linear combination of rows of a table, :math:`w_p = \sum_k c_{pk} T_{g(p) + k}`: see :class:`RadialFilter`. The
derivative of a form in one of its tensors is an operation on the others; the gradient of that operation is again a
derivative of the same form, with one tensor replaced. So a handful of kernels serve every order of differentiation.

The plain functions here are the definition. On the CPU compiled twins of them run, see :mod:`torchmdnet.ops.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.ops import kernels
from torchmdnet.tracing import device_kind, is_recording
from torchmdnet.typing import AtomComponents, EdgeIndex

if TYPE_CHECKING:  # which stands on operations of its own
    from torchmdnet.graph import Graph, Pairs

__all__ = [
    "EdgeRows",
    "RadialFilter",
    "RadialPoints",
    "edge_layout",
    "embed_edges",
    "embed_edges_plain",
    "gather_weight_sum",
    "gather_weight_sum_plain",
    "rows_of_edges",
    "rows_of_pairs",
]

#: Components of each part, by the number of parts: tensors fall into 1 + 3 + 5, anything else is of one part.
ENDS_OF_TENSORS = (1, 4, 9)


class RadialPoints(NamedTuple):
    """Where P distances lie between the rows of a table: weights are read as Σ_k coef_k table[cell + k]."""

    coef: Tensor  # (P, K) differentiable in the distances
    cell: Tensor  # (P,)


class RadialFilter(NamedTuple):
    """Radial weights of P pairs or edges, L parts and F channels: ``Σ_k coef[p, k] table[cell[p] + k]``.

    A table with one row for each pair, and the envelope as its coefficient, is the plain case; a grid over distances,
    whose rows are shared by all pairs, the other.
    """

    table: Tensor  # (R, L, F)
    points: RadialPoints

    def rows(self) -> Tensor:
        """The weights themselves, (P, L, F)."""
        coef, cell = self.points
        weight = coef[:, 0, None, None] * self.table.index_select(0, cell)
        for k in range(1, coef.shape[1]):
            weight = weight + coef[:, k, None, None] * self.table.index_select(0, cell + k)
        return weight


class EdgeRows(NamedTuple):
    """Which row of a filter each edge uses, in the order of the edges, and how the loops see it."""

    edge_index: EdgeIndex  # (2, E)
    row: Tensor  # (E,)
    back: Tensor  # (E,) row of the edge of opposite direction
    reverse: Tensor  # (E,) that edge; a self loop is its own; empty where edges stand alone
    row_start: Tensor  # (N + 1,)

    @property
    def come_in_pairs(self) -> bool:
        """Whether every edge has one of opposite direction, which the compiled loops make use of."""
        return self.reverse.shape[0] == self.row.shape[0]

    def layout(self, points: RadialPoints, num_components: int) -> kernels.EdgeLayout:
        """The same as arrays, or where a twin runs, as tensors."""
        indices = (self.edge_index[1], self.row, self.back, self.reverse, self.row_start, points.cell)
        if is_recording():
            return kernels.EdgeLayout._make([*indices, _STARTS[num_components]])
        return edge_layout(indices, num_components, points.coef.device)


def edge_layout(indices: Sequence[Tensor], num_components: int, device: torch.device) -> kernels.EdgeLayout:
    """Indices as the twins of a device take them: senders, rows, rows back, reverse edges, row starts and cells."""
    arrays = [index.contiguous() for index in indices]
    if device_kind(device) not in kernels.TWINS:
        arrays = [array.numpy() for array in arrays]
    return kernels.EdgeLayout._make([*arrays, _STARTS[num_components]])


class _Starts(dict[int, np.ndarray]):
    def __missing__(self, num_components: int) -> np.ndarray:
        self[num_components] = np.array([0, *ends_of(num_components)])
        return self[num_components]


_STARTS = _Starts()


def ends_of(num_components: int) -> tuple[int, ...]:
    """Where the parts of features with these numbers of components end."""
    return ENDS_OF_TENSORS if num_components == ENDS_OF_TENSORS[-1] else (num_components,)


def rows_of_pairs(graph: Graph) -> EdgeRows:
    """A filter with one row for each pair: both directions share it."""
    pairs = _pairs(graph)
    return EdgeRows(graph.edge_index, pairs.of_edge, pairs.of_edge, pairs.reverse, pairs.row_start)


def rows_of_edges(graph: Graph) -> EdgeRows:
    """A filter with one row for each edge."""
    pairs = _pairs(graph)
    every = torch.arange(graph.edge_index.shape[1], device=graph.edge_index.device)
    return EdgeRows(graph.edge_index, every, pairs.reverse, pairs.reverse, pairs.row_start)


def _pairs(graph: Graph) -> Pairs:
    assert graph.pairs is not None
    return graph.pairs


def gather_weight_sum(X: AtomComponents, filter: RadialFilter, edges: EdgeRows) -> AtomComponents:
    r"""Sum the weighted features of neighbours, :math:`\partial M / \partial O`, i.e. :math:`\sum_j w_{ij} \odot X_j`.

    Args:
        X: Features, (N, C, F): C = 9 components in three parts, or any other number in one.
        filter: Weights of each part and channel, L = 3 parts for tensors and 1 for anything else.
        edges: The row of the filter that each edge uses.

    Returns:
        (N, C, F).
    """
    if kernels.has_edge_kernel(X) and edges.come_in_pairs:
        return kernels.message_sum(X, filter.points.coef, filter.table, edges.layout(filter.points, X.shape[1]))
    return gather_weight_sum_plain(X, filter, edges)


def gather_weight_sum_plain(X: AtomComponents, filter: RadialFilter, edges: EdgeRows) -> AtomComponents:
    """The definition of :func:`gather_weight_sum`."""
    i, j = edges.edge_index
    weight = _by_component(filter.rows().index_select(0, edges.row), X.shape[1])  # (E, C, F)
    return torch.zeros_like(X).index_add(0, i, weight * X.index_select(0, j))


def embed_edges(Y: Tensor, filter: RadialFilter, Z: Tensor, edges: EdgeRows) -> AtomComponents:
    r"""Sum edge directions with radial weights and pair factors, :math:`\partial D / \partial O`.

    Args:
        Y: Components of the edge directions, (E, C).
        filter: Weights of each part and channel.
        Z: What each atom contributes to the factor of a pair, as receiver and as sender, (N, 2, F).
        edges: The row of the filter that each edge uses.

    Returns:
        (N, C, F).
    """
    if kernels.has_edge_kernel(Z) and edges.come_in_pairs:
        return kernels.embed(Y, filter.points.coef, filter.table, Z, edges.layout(filter.points, Y.shape[1]))
    return embed_edges_plain(Y, filter, Z, edges)


def embed_edges_plain(Y: Tensor, filter: RadialFilter, Z: Tensor, edges: EdgeRows) -> AtomComponents:
    """The definition of :func:`embed_edges`."""
    i, j = edges.edge_index
    factor = Z[:, 0].index_select(0, i) + Z[:, 1].index_select(0, j)  # (E, F)
    weight = filter.rows().index_select(0, edges.row) * factor[:, None]  # (E, L, F)
    message = Y[:, :, None] * _by_component(weight, Y.shape[1])  # (E, C, F)
    return message.new_zeros(Z.shape[0], Y.shape[1], Z.shape[2]).index_add(0, i, message)


def _by_component(weight: Tensor, num_components: int) -> Tensor:
    """Repeat the weight of each part for its components: (E, L, F) -> (E, C, F)."""
    starts = [0, *ends_of(num_components)]
    parts = [weight[:, k, None].expand(-1, starts[k + 1] - starts[k], -1) for k in range(len(starts) - 1)]
    return torch.cat(parts, dim=1)
