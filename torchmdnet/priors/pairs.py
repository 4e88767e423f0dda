"""Pairs of atoms for priors that look further than the network, each pair once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.neighbors import pairs_within
from torchmdnet.ops.norms import length
from torchmdnet.ops.scatter import widened
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["ImagePairs", "find_pairs", "sum_pairs"]


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


def sum_pairs(pair: Tensor, pairs: ImagePairs, batch: SystemIndex, num_systems: int) -> Tensor:
    """Add the energy of each pair (P,) to its system, in float64: (S, 1)."""
    pair = widened(pair)
    return pair.new_zeros(num_systems).index_add(0, batch.index_select(0, pairs.i), pair)[:, None]
