"""Neighbours in arrays whose shapes never change, on any device, without the host having to look at a value.

On a GPU the kernels of :mod:`torchmdnet.neighbors.device` fill them. Where there are none, cells of atoms do it in
tensor operations: linear in the number of atoms, and for a small system one cell, so that every pair is looked at. What
a size depends on is decided beforehand, from a first structure, with room to spare; at every call the device notes what
was needed, and the caller looks at the notes when it is convenient.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.neighbors.device import FIRST_ROOM, DeviceEdges, DeviceList, Room, rounded, searches_on_device
from torchmdnet.neighbors.lattice import check_images, completed, lattice_of
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["FixedSearch"]

#: Pairs and images of all systems up to which looking at every one of them beats building cells.
FEW_CANDIDATES = 2_000_000
#: Room for more pairs and for more atoms in a cell than were found, as a factor and a number.
ROOM = (1.25, 16)
#: How far lattice vectors may shrink, relative to their length, before cells are laid out again.
SHRINKAGE = 0.05


class Plan(NamedTuple):
    """What is decided beforehand for S systems of N atoms."""

    capacity: int  # P, of pairs
    occupancy: int  # M, of atoms in a cell
    num_cells: int
    offsets: list[tuple[int, int, int]]  # of the cells an atom looks into: half of those around, and first its own
    reach: tuple[int, int, int]  # how far they go
    grid: Tensor  # (S, 3) cells along each lattice vector
    first_cell: Tensor  # (S,)
    is_open: Tensor  # (S, 3)
    start: Tensor  # (S, 3) where the cells of open directions begin, Å
    extent: Tensor  # (S, 3) and how far they go
    ghosts: Tensor  # (2, P) what a spare pair joins


class FixedSearch:
    """Finds pairs as :func:`torchmdnet.neighbors.pairs_within` does; spare ones join ghosts.

    The last atoms of every call are ghosts, an even number of them in a system of their own: a pair that was not needed
    joins two of those, which have to lie apart. Of edges that kernels find, :meth:`edges`, the spare ones stand behind
    the rows of all atoms, so that kernels which follow these never come to them; two ghosts are enough then. Call it
    once where the host may wait, so that sizes are chosen; from then on shapes stay, and nothing waits. After a call,
    and whatever was computed from it, :meth:`outgrown` tells whether the room was enough. If not, the result is
    worthless: call again.

    Args:
        num_ghosts: How many of the atoms are ghosts.
        skin: Where kernels search, lists of pairs reach this much beyond the cutoff, in Å, and are made again when an
            atom has moved by half of it, as the device decides; 0 makes them at every call.
    """

    def __init__(self, num_ghosts: int, skin: float = 0.0) -> None:
        assert num_ghosts % 2 == 0
        assert num_ghosts > 0
        self.num_ghosts, self.skin = num_ghosts, float(skin)
        #: Lists on the device, by what was searched for.
        self.lists: dict[tuple[float, float, bool], DeviceList] = {}
        #: What was needed when a search had outgrown its room: there is never less again.
        self._least: dict[tuple[float, float, bool], tuple[int, int]] = {}
        self.plans: dict[tuple[float, float, bool], Plan] = {}
        #: What the last calls needed: pairs, atoms in a cell, and whether a lattice left the room it was given.
        self.needed: dict[tuple[float, float, bool], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        pos: Positions,
        batch: SystemIndex,
        box: Boxes | None,
        num_systems: int,
        cutoff: float,
        lower: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :func:`torchmdnet.neighbors.pairs_within`; P is the capacity, and spare pairs come last."""
        if searches_on_device(pos):
            found = self.edges(pos, batch, box, num_systems, cutoff, lower, lists=True)
            return found.atoms[0], found.atoms[1], None if box is None else found.shifts
        key = (cutoff, lower, box is None)
        real, systems = pos.detach()[: -self.num_ghosts].double(), batch[: -self.num_ghosts]
        cells = None if box is None else box.detach().double().expand(num_systems, 3, 3)[:-1]
        if key not in self.plans:
            plan = _draw(real, systems, cells, num_systems - 1, cutoff, self.num_ghosts)
            _, occupancy, _ = _search(plan, real, systems, cells, cutoff, lower)[1].tolist()
            plan = plan._replace(occupancy=_with_room(occupancy))
            pairs, _, _ = _search(plan, real, systems, cells, cutoff, lower)[1].tolist()
            capacity = max(_with_room(pairs), self._least.get(key, (0, 0))[1])
            self.plans[key] = plan._replace(capacity=capacity, ghosts=_ghosts(capacity, real, self.num_ghosts))
        (i, j, shifts), self.needed[key] = _search(self.plans[key], real, systems, cells, cutoff, lower)
        return i, j, None if box is None else shifts.to(pos.dtype)

    @torch.no_grad()
    def edges(
        self,
        pos: Positions,
        batch: SystemIndex,
        box: Boxes | None,
        num_systems: int,
        cutoff: float,
        lower: float = 0.0,
        **options: Any,
    ) -> DeviceEdges:
        """See :func:`torchmdnet.neighbors.device.edges_on_device`; as many edges and pairs as there is room for.

        Raises:
            ValueError: Where sizes are chosen, if a box has no volume or is too flat.
        """
        key = (cutoff, lower, box is None)
        search = self.lists.get(key)
        if search is None:
            search = self.lists[key] = self._sized(pos, batch, box, num_systems, cutoff, lower)
        return search(pos, batch, box, num_systems - 1, cutoff, lower, **options)

    def _sized(
        self, pos: Tensor, batch: Tensor, box: Tensor | None, num_systems: int, cutoff: float, lower: float
    ) -> DeviceList:
        """Arrays with room for what is found now, and more; reads values."""
        count, room = pos.shape[0] - self.num_ghosts, Room(FIRST_ROOM, 1)
        row, pairs = self._least.get((cutoff, lower, box is None), (0, 0))
        while True:
            search = DeviceList(count, self.num_ghosts, pos, room, self.skin)
            search(pos, batch, box, num_systems - 1, cutoff, lower)
            _, num_pairs, longest, is_flat = search.notes.tolist()
            if is_flat:
                assert box is not None
                lattice_of(box[:-1] if box.shape[0] > 1 else box, num_systems - 1, cutoff)  # says which
            if longest <= room.row and room.pairs > 1:
                return search
            more = max(rounded(num_pairs), pairs) if longest <= room.row else 1
            room = Room(max(rounded(longest), row), more)

    def outgrown(self) -> bool:
        """Whether the last calls found less room than they needed; the plan of such a search is given up.

        This is the one look at values, after results are there.
        """
        known = list(self.lists.items())
        if known:
            notes = torch.stack([search.notes for _, search in known]).tolist()
            for (key, search), (_, num_pairs, longest, is_flat) in zip(known, notes, strict=True):
                if num_pairs > search.room.pairs or longest > search.room.row or is_flat:
                    del self.lists[key]
                    needed = Room(rounded(longest), rounded(num_pairs))
                    self._least[key] = (max(needed.row, search.room.row), max(needed.pairs, search.room.pairs))
        has_lost_a_list = len(self.lists) < len(known)
        if not self.needed:
            return has_lost_a_list
        notes = torch.stack(list(self.needed.values())).tolist()
        for key, (pairs, occupancy, has_left) in zip(list(self.needed), notes, strict=True):
            plan = self.plans[key]
            if pairs > plan.capacity or occupancy > plan.occupancy or has_left:
                del self.plans[key], self.needed[key]
                self._least[key] = (0, max(_with_room(pairs), plan.capacity))
        return has_lost_a_list or len(self.needed) < len(notes)


def _with_room(count: int) -> int:
    return math.ceil(ROOM[0] * count) + ROOM[1]


def _ghosts(capacity: int, real: Tensor, num_ghosts: int) -> Tensor:
    """Two ghosts for each pair, by turns."""
    first = real.shape[0] + 2 * (torch.arange(capacity, device=real.device) % (num_ghosts // 2))
    return torch.stack([first, first + 1])


def _draw(pos: Tensor, batch: Tensor, cells: Tensor | None, num_systems: int, cutoff: float, num_ghosts: int) -> Plan:
    """Cells for a structure; reads values."""
    device = pos.device
    if cells is None:
        is_open = torch.ones(num_systems, 3, dtype=torch.bool, device=device)
        lattice = torch.eye(3, dtype=pos.dtype, device=device).expand(num_systems, 3, 3)
    else:
        is_open = (cells == 0).all(dim=-1)
        lattice = completed(cells, is_open)
    heights = _heights(lattice)  # (S, 3)
    if cells is not None:
        check_images(cells, torch.where(is_open, math.inf, heights), cutoff)
    fractional = torch.einsum("nk,nkl->nl", pos, _inverse(lattice)[batch])
    rows = batch[:, None].expand(-1, 3)
    lowest = torch.full_like(heights, math.inf).scatter_reduce(0, rows, fractional, "amin")
    highest = torch.full_like(heights, -math.inf).scatter_reduce(0, rows, fractional, "amax")
    start = torch.where(is_open & lowest.isfinite(), lowest, 0.0)
    extent = torch.where(is_open & highest.isfinite(), (highest - lowest), 0.0).clamp(min=1.0)

    smallest = (1 + SHRINKAGE) * cutoff
    grid = torch.where(is_open, extent / max(cutoff, 1e-9), heights / smallest).floor().clamp(min=1).long()
    one_cell = torch.ones_like(grid)
    most = int(torch.bincount(batch, minlength=num_systems).max()) if len(batch) else 0
    images = (2 * _reach(one_cell, heights, is_open, smallest) + 1).prod(dim=1)  # (S,)
    if math.isinf(cutoff) or len(batch) * most * int(images.max()) <= FEW_CANDIDATES:
        grid = one_cell
    a, b, c = _reach(grid, heights, is_open, smallest).amax(dim=0).tolist()
    reach = (a, b, c)
    around = itertools.product(*(range(-r, r + 1) for r in reach))
    sizes = grid.prod(dim=1)
    return Plan(
        capacity=1,
        occupancy=1,
        num_cells=int(sizes.sum()),
        offsets=[(x, y, z) for x, y, z in around if (x, y, z) >= (0, 0, 0)],
        reach=reach,
        grid=grid,
        first_cell=torch.cumsum(sizes, 0) - sizes,
        is_open=is_open,
        start=start,
        extent=extent,
        ghosts=_ghosts(1, pos, num_ghosts),
    )


def _reach(grid: Tensor, heights: Tensor, is_open: Tensor, cutoff: float) -> Tensor:
    """How many cells away along each lattice vector an atom within the cutoff may be, (S, 3)."""
    periodic = torch.zeros_like(grid) if math.isinf(cutoff) else (grid * (cutoff / heights)).ceil().long()
    return torch.where(is_open, (grid > 1).long(), periodic)


def _search(
    plan: Plan, pos: Tensor, batch: Tensor, cells: Tensor | None, cutoff: float, lower: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Pairs, (P,) twice and (P, 3), and what they needed, (3,)."""
    N, M, device = pos.shape[0], plan.occupancy, pos.device
    has_left = torch.zeros((), dtype=torch.bool, device=device)
    if cells is None:
        home, lattice = torch.zeros_like(pos), torch.zeros(plan.grid.shape[0], 3, 3, dtype=pos.dtype, device=device)
        fractional = wrapped = pos
    else:
        lattice = completed(cells, plan.is_open)
        needed = torch.where(plan.is_open, 0.0, plan.grid * (cutoff / _heights(lattice)))
        has_left = ((cells == 0).all(dim=-1) != plan.is_open).any() | (needed > _filled(plan.reach, needed)).any()
        fractional = torch.einsum("nk,nkl->nl", pos, _inverse(lattice).index_select(0, batch))
        home = torch.where(plan.is_open.index_select(0, batch), 0.0, fractional.floor())
        wrapped = pos - torch.einsum("nk,nkl->nl", home, lattice.index_select(0, batch))
    grid, is_open = plan.grid.index_select(0, batch), plan.is_open.index_select(0, batch)  # (N, 3)
    along = (fractional - plan.start.index_select(0, batch)) / plan.extent.index_select(0, batch)
    place = torch.where(is_open, along, fractional - home) * grid
    place = torch.minimum(place.nan_to_num().floor().clamp(min=0), grid - 1.0).long()  # (N, 3)
    first = plan.first_cell.index_select(0, batch)

    cell, order = torch.sort(first + _flat(place, grid), stable=True)
    bounds = torch.searchsorted(cell, torch.arange(plan.num_cells + 1, device=device))
    rank = torch.arange(N, device=device) - bounds.index_select(0, cell)
    members = torch.full((plan.num_cells * M + 1,), N, dtype=torch.long, device=device)
    members = members.scatter(0, torch.where(rank < M, cell * M + rank, plan.num_cells * M), order)
    members = members[:-1].view(plan.num_cells, M)  # N where a cell is not full
    occupancy = (bounds[1:] - bounds[:-1]).max()

    places = torch.cat([wrapped, wrapped.new_full((1, 3), torch.nan)])  # nothing is near to what is not there
    itself = torch.arange(N, device=device)[:, None]
    near, looked, images = [], [], []
    for offset in plan.offsets:
        there = torch.stack([place[:, k] + offset[k] for k in range(3)], dim=1)
        image = torch.where(is_open, 0, torch.div(there, grid, rounding_mode="floor"))
        there = there - image * grid
        inside = ((there >= 0) & (there < grid)).all(dim=1)  # of open directions
        other = first + _flat(torch.minimum(there.clamp(min=0), grid - 1), grid)
        j = members.index_select(0, other)  # (N, M)
        step = torch.einsum("nk,nkl->nl", image.to(pos.dtype), lattice.index_select(0, batch))
        vec = (wrapped - step)[:, None] - places.index_select(0, j.flatten()).view(N, M, 3)
        square = vec.square().sum(dim=-1)
        is_near = (square < cutoff * cutoff) & (square >= lower * lower) & inside[:, None]
        near.append(is_near & (itself < j) if offset == (0, 0, 0) else is_near)
        looked.append(other)
        images.append(image)

    flat = torch.stack(near).flatten()  # (K N M,)
    count = torch.cumsum(flat, 0)
    slot = torch.where(flat & (count <= plan.capacity), count - 1, plan.capacity)
    every = torch.arange(flat.shape[0], device=device)
    found = every.new_full((plan.capacity + 1,), -1).scatter(0, slot, every)[:-1]  # (P,)
    is_real = torch.arange(plan.capacity, device=device) < count[-1]
    row = torch.div(found.clamp(min=0), M, rounding_mode="floor")  # (P,) of K and N
    i = row % N
    member = torch.cat(looked).index_select(0, row) * M + found.clamp(min=0) % max(M, 1)
    j = members.flatten().index_select(0, member)
    shifts = home.index_select(0, j.clamp(max=N - 1)) - home.index_select(0, i)
    shifts = shifts - torch.cat(images).index_select(0, row)
    pairs = (
        torch.where(is_real, i, plan.ghosts[0]),
        torch.where(is_real, j, plan.ghosts[1]),
        torch.where(is_real[:, None], shifts, 0.0),
    )
    return pairs, torch.stack([count[-1], occupancy, has_left.long()])


def _flat(place: Tensor, grid: Tensor) -> Tensor:
    """Number of a cell within its system, (N, 3) twice -> (N,)."""
    return (place[:, 0] * grid[:, 1] + place[:, 1]) * grid[:, 2] + place[:, 2]


def _filled(values: tuple[int, int, int], like: Tensor) -> Tensor:
    """Three numbers that the device is told as constants, not sent."""
    return torch.stack([like.new_full((), value) for value in values])


def _inverse(cell: Tensor) -> Tensor:
    """Inverses of 3 by 3 matrices; the library's look at the result, which the host would have to wait for."""
    a, b, c = cell.unbind(dim=-2)
    columns = torch.stack([torch.linalg.cross(*rows) for rows in ((b, c), (c, a), (a, b))], dim=-1)
    return columns / (a * torch.linalg.cross(b, c)).sum(dim=-1)[..., None, None]


def _heights(cell: Tensor) -> Tensor:
    """Distances between opposite faces, (S, 3, 3) -> (S, 3)."""
    return 1.0 / _inverse(cell).norm(dim=-2)
