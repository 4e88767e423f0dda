"""The nearest periodic image, for interactions without a cutoff."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from torchmdnet.neighbors.brute import all_pairs
from torchmdnet.neighbors.lattice import lattice_of
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["nearest_pairs"]


@torch.no_grad()
def nearest_pairs(
    pos: Positions, batch: SystemIndex, box: Boxes | None, num_systems: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every pair of atoms of a system, once, with the image in which the two are nearest.

    Works for any lattice in any orientation, and any mix of open and periodic directions. Memory grows with the
    square of each system.

    Args:
        pos: Positions in Å, (N, 3).
        batch: System of each atom, (N,).
        box: Lattice vectors as rows, (1, 3, 3) shared or (S, 3, 3); a zero row is an open direction. None is open.
        num_systems: Number of systems S.

    Returns:
        ``i`` and ``j``, (P,) int64, and the number of lattice vectors to add, ``shifts`` (P, 3), so that the vector
        from ``j`` to ``i`` is ``pos[i] - pos[j] + shifts @ box``; None without a box.
    """
    i, j, _ = all_pairs(pos, batch, None, num_systems, math.inf)
    if box is None or not bool(box.any()):
        return i, j, None
    lattice = lattice_of(box, num_systems, 0.0)
    inverse = torch.linalg.inv(lattice.cell)
    system = batch[i]
    cell = lattice.cell[system]  # (P, 3, 3)
    vec = pos[i].double() - pos[j].double()
    home = torch.einsum("pk,pkl->pl", vec, inverse[system]).round().masked_fill(lattice.is_open[system], 0.0)
    vec = vec - torch.einsum("pk,pkl->pl", home, cell)  # inside the parallelepiped around the origin

    # no point inside is farther from the origin than half the longest diagonal, so neither is its nearest image
    periodic = lattice.cell.masked_fill(lattice.is_open[:, :, None], 0.0)
    signs = torch.tensor([(1, a, b) for a in (-1, 1) for b in (-1, 1)], dtype=periodic.dtype, device=pos.device)
    longest = torch.einsum("dk,skl->sdl", signs, periodic).norm(dim=-1).amax(dim=1) / 2  # (S,)
    reach = (longest[:, None] * inverse.norm(dim=-2) + 0.5).floor().masked_fill(lattice.is_open, 0.0).amax(dim=0)

    best, shift = vec.square().sum(dim=1), torch.zeros_like(vec)
    for count in itertools.product(*(range(-int(r), int(r) + 1) for r in reach.tolist())):
        steps = torch.tensor(count, dtype=vec.dtype, device=vec.device).expand_as(vec)
        steps = steps.masked_fill(lattice.is_open[system], 0.0)
        square = (vec + torch.einsum("pk,pkl->pl", steps, cell)).square().sum(dim=1)
        nearer = square < best
        best = torch.where(nearer, square, best)
        shift = torch.where(nearer[:, None], steps, shift)
    return i, j, (shift - home).to(pos.dtype)
