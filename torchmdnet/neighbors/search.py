"""The entry that picks a neighbour search for a batch of systems."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.neighbors.brute import all_pairs, count_candidates
from torchmdnet.neighbors.cells import vesin_pairs
from torchmdnet.neighbors.lattice import lattice_of
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["pairs_within"]

#: Candidate pairs per system up to which looking at every one of them beats building cells.
BRUTE_LIMIT = {"cpu": 2_000, "cuda": 2_000_000}


@torch.no_grad()
def pairs_within(
    pos: Positions, batch: SystemIndex, box: Boxes | None, num_systems: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every pair of atoms closer than a cutoff, once, counting each periodic image.

    Works for any lattice in any orientation, any mix of open and periodic directions, and cutoffs beyond half
    the box. Positions need not lie inside the box.

    Args:
        pos: Positions in Å, (N, 3).
        batch: System of each atom, (N,); need not be sorted.
        box: Lattice vectors as rows, (1, 3, 3) shared or (S, 3, 3); a zero row is an open direction. None is open.
        num_systems: Number of systems S.
        cutoff: Pairs with distance < cutoff are kept, in Å.

    Returns:
        ``i`` and ``j``, (P,) int64, and the lattice vectors to add, ``shifts`` (P, 3) counts, so that the vector from
        ``j`` to ``i`` is ``pos[i] - pos[j] + shifts @ box``; None without a box. Each pair is listed in one of its two
        directions. An atom is never its own neighbour, but its periodic images are.
    """
    if box is not None and not bool(box.any()):
        box = None
    if pos.shape[0] == 0:
        empty = batch.new_zeros(0)
        return empty, empty, None if box is None else pos.new_zeros(0, 3)
    lattice = None if box is None else lattice_of(box, num_systems, cutoff)
    limit = BRUTE_LIMIT.get(pos.device.type, 2_000_000) * num_systems
    few = count_candidates(batch, lattice, num_systems) <= limit
    return (all_pairs if few else vesin_pairs)(pos, batch, lattice, num_systems, cutoff)
