"""Pairs of atoms for priors that look further than the network, each pair once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.neighbors import FixedSearch, can_check, pairs_within
from torchmdnet.ops.norms import length
from torchmdnet.ops.scatter import widened
from torchmdnet.ops.sums import sum_by_index
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["ImagePairs", "find_pairs", "near_pairs", "sum_pairs"]


class ImagePairs(NamedTuple):
    """P pairs of atoms, or of an atom and a periodic image, each listed in one direction."""

    i: Tensor  # (P,)
    j: Tensor  # (P,)
    shifts: Tensor | None  # (P, 3) lattice vectors to add to pos[i] - pos[j]; None without a box

    def rows(self, first: int, count: int) -> ImagePairs:
        """Some of the pairs."""
        i, j, shifts = (None if value is None else value[first : first + count] for value in self)
        assert i is not None
        assert j is not None
        return ImagePairs(i, j, shifts)

    def vectors(self, pos: Positions, batch: SystemIndex, box: Boxes | None) -> Tensor:
        """From j to i, (P, 3), differentiable in ``pos`` and ``box``."""
        vec = pos.index_select(0, self.i) - pos.index_select(0, self.j)
        if self.shifts is None:
            return vec
        assert box is not None
        if box.shape[0] == 1:
            return vec + self.shifts @ box[0]
        return vec + torch.einsum("pk,pkl->pl", self.shifts, box.index_select(0, batch.index_select(0, self.i)))

    def distances(self, pos: Positions, batch: SystemIndex, box: Boxes | None) -> Tensor:
        """Lengths of :meth:`vectors`, (P,)."""
        return length(self.vectors(pos, batch, box))


def find_pairs(graph: Graph, box: Boxes | None, cutoff: float) -> ImagePairs:
    """Every pair of a graph's atoms closer than ``cutoff`` in a box, all images, whatever the edges of the graph."""
    search = graph.search or pairs_within
    return ImagePairs(*search(graph.pos.detach(), graph.batch, box, graph.num_systems, cutoff))


def near_pairs(graph: Graph, box: Boxes | None, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both atoms and the distance of every pair closer than ``cutoff`` in a box, each (P,).

    Where the edges of the graph reach that far, the pairs and their distances are theirs, and nothing is searched.
    """
    own, search = graph.pairs, graph.search
    is_same = (box is None) == (graph.box is None) and not isinstance(search, FixedSearch)  # whose shapes have to stay
    if own is not None and cutoff <= graph.cutoff and is_same and can_check(graph.pos):
        dist = own.dist[: own.atoms.shape[1]]  # without that of self loops
        near = (dist.detach() < cutoff).nonzero()[:, 0]
        i, j = own.atoms.index_select(1, near)
        return i, j, dist.index_select(0, near)
    pairs = find_pairs(graph, box, cutoff)
    return pairs.i, pairs.j, pairs.distances(graph.pos, graph.batch, box)


def sum_pairs(pair: Tensor, first: Tensor, batch: SystemIndex, num_systems: int) -> Tensor:
    """Add the energy of each pair (P,) to the system of its first atom (P,), in float64: (S, 1)."""
    pair = widened(pair)
    return sum_by_index(pair, batch.index_select(0, first), num_systems)[:, None]
