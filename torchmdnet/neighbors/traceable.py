"""Neighbours by cells in tensor operations alone, for calls that are recorded, compiled or exported.

One sequence of operations serves any number of atoms and systems and any lattice: no step is chosen by a value or a
size, so a recording of it holds for all of them. Small systems are one cell, where every pair and every image in reach
is looked at; in large ones each atom looks into the cells around it, and memory grows linearly with their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.neighbors.brute import is_upper, unravel
from torchmdnet.neighbors.lattice import completed, is_too_flat
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["traceable_pairs"]

#: Cells along a direction, at most: their numbers have to fit 64 bits.
MOST_CELLS = 2**14
#: Cells are wider than the cutoff by this factor, more than rounding can take away.
WIDER = 1 + 1e-9


@torch.no_grad()
def traceable_pairs(
    pos: Positions, batch: SystemIndex, box: Boxes, num_systems: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`torchmdnet.neighbors.pairs_within`; a box is needed, zeros where every direction is open."""
    wide = pos.double()
    cell = box.double().expand(num_systems, 3, 3)
    cell = torch.where(is_too_flat(cell, cutoff)[:, None, None], 0.0, cell)  # such a system is NaN
    is_open = (cell == 0).all(dim=-1)  # (S, 3)
    lattice = completed(cell, is_open)
    inverse = torch.linalg.inv(lattice)
    heights = 1.0 / inverse.norm(dim=-2)  # (S, 3) distance between opposite faces
    fractional = torch.einsum("nk,nkl->nl", wide, inverse.index_select(0, batch))  # (N, 3) along open directions in Å
    home = torch.where(is_open.index_select(0, batch), 0.0, fractional.floor())  # (N, 3) the cell of the lattice
    wrapped = wide - torch.einsum("nk,nkl->nl", home, lattice.index_select(0, batch))

    rows = batch[:, None].expand(-1, 3)
    lowest = torch.full_like(heights, torch.inf).scatter_reduce(0, rows, fractional, "amin")
    highest = torch.full_like(heights, -torch.inf).scatter_reduce(0, rows, fractional, "amax")
    span = torch.where(is_open, (highest - lowest).nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-3), heights)
    grid = (span / (WIDER * cutoff)).floor().clamp(1, MOST_CELLS)  # (S, 3) cells along each direction
    reach = torch.where(is_open, (grid > 1).double(), (grid * (cutoff / heights)).ceil())  # (S, 3) cells to look into
    per_length = torch.where(is_open, grid / span, grid).index_select(0, batch)
    start = torch.where(is_open, lowest, 0.0).index_select(0, batch)
    grid, around = grid.long(), 2 * reach.long() + 1
    most = grid.index_select(0, batch) - 1
    place = ((fractional - home - start) * per_length).nan_to_num(0.0).floor().long()
    place = torch.minimum(place.clamp(min=0), most)  # (N, 3)
    sizes = grid.prod(dim=1)
    first = torch.cumsum(sizes, 0) - sizes  # (S,) number of the first cell of each system
    number, order = torch.sort(first.index_select(0, batch) + _flat(place, most + 1), stable=True)

    # every atom looks into the cells around its own
    atom, within = _spread(around.prod(dim=1).index_select(0, batch))  # (Q,)
    system = batch.index_select(0, atom)
    grid, span = grid.index_select(0, system), around.index_select(0, system)  # (Q, 3)
    target = place.index_select(0, atom) + unravel(within, span) - torch.div(span, 2, rounding_mode="floor")
    wraps = torch.div(target, grid, rounding_mode="floor")  # lattice vectors to that cell
    is_there = ((wraps == 0) | ~is_open.index_select(0, system)).all(dim=1)
    looked_at = first.index_select(0, system) + _flat(target - wraps * grid, grid)
    looked_at = torch.where(is_there, looked_at, -1)
    begin = torch.searchsorted(number, looked_at)
    query, within = _spread(torch.searchsorted(number, looked_at, right=True) - begin)  # (C,)

    i = atom.index_select(0, query)
    j = order.index_select(0, begin.index_select(0, query) + within)
    to_image = torch.einsum("qk,qkl->ql", wraps.double(), lattice.index_select(0, system))
    moved = wrapped.index_select(0, atom) - to_image  # (Q, 3)
    shift = -wraps.index_select(0, query)  # (C, 3)
    vec = moved.index_select(0, query) - wrapped.index_select(0, j)
    near = vec.square().sum(dim=1) < cutoff * cutoff
    near = near & ((i < j) | ((i == j) & is_upper(shift)))
    kept = near.nonzero()[:, 0]  # (P,)
    i, j = i.index_select(0, kept), j.index_select(0, kept)
    home = home.nan_to_num(0.0).long()  # whole numbers end what a recording would differentiate
    shift = shift.index_select(0, kept) - home.index_select(0, i) + home.index_select(0, j)
    return i, j, shift.to(pos.dtype)


def _flat(place: Tensor, grid: Tensor) -> Tensor:
    """Number of a cell of a grid: (N, 3) × 2 -> (N,)."""
    return (place[:, 0] * grid[:, 1] + place[:, 1]) * grid[:, 2] + place[:, 2]


def _spread(count: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each of the given numbers of entries, and its place among those of the row: (R,) -> (sum,), (sum,)."""
    row = torch.repeat_interleave(count)
    before = torch.cumsum(count, 0) - count
    return row, torch.arange(row.shape[0], device=count.device) - before.index_select(0, row)
