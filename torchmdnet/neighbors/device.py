"""Neighbours where the atoms are: on a GPU, in nine launches, with no copy to the host.

:mod:`torchmdnet.neighbors.device_kernels` has the arithmetic. Sizes of arrays are chosen before values are known, from
what earlier searches found; the device notes what was needed. :func:`edges_on_device` reads the notes, the one wait of
a call, and searches again where there was too little room. :class:`DeviceList` leaves reading them to its caller.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.neighbors.lattice import MOST_ALONG, MOST_IMAGES, lattice_of
from torchmdnet.ops import kernels
from torchmdnet.tracing import device_kind
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["DeviceEdges", "DeviceList", "Room", "edges_on_device", "searches_on_device"]

#: Room for more than was found, as a factor and a number.
MORE = (1.25, 16)
#: Atoms up to which each open system is one cell, so that every pair is looked at.
ONE_CELL = 64
#: Places in a row at first.
FIRST_ROOM = 64
#: What rounding may take from a list's range, in Å.
MARGIN = 1e-4
#: Atoms that a program works on, and how many of their candidates at once; edges, and places in another atom's row.
#: Few, so that the atoms of a molecule fill a device; Triton's interpreter takes its time by programs.
TILES = {"atoms": 4, "candidates": 32, "edges": 64, "others": 16, "block": 128}


class Room(NamedTuple):
    """Sizes of arrays: places in a row of the list, and pairs."""

    row: int
    pairs: int


class DeviceEdges(NamedTuple):
    """Edges of A atoms by receiver, each pair in both directions; see :class:`torchmdnet.graph.Pairs`."""

    edge_index: Tensor  # (2, E)
    vec: Tensor  # (E, 3)
    edge_dist: Tensor  # (E,)
    of_edge: Tensor  # (E,)
    reverse: Tensor  # (E,)
    row_start: Tensor  # (A + 1,)
    atoms: Tensor  # (2, P)
    dist: Tensor  # (P,), or with self loops (P + 1,)
    sign: Tensor  # (E,) of the pair's vector along the edge; empty if it was not asked for
    shifts: Tensor  # (P, 3); likewise


def searches_on_device(pos: Tensor) -> bool:
    """Whether neighbours of these atoms are searched by Triton's kernels."""
    return device_kind(pos) != "cpu" and kernels.has_kernel(pos)


class DeviceList:
    """The arrays of a search that stay from call to call, and with a skin the list of neighbours itself.

    With a skin the list holds pairs closer than cutoff + skin and is made again, as the device decides, when an atom
    has moved by half of the skin, or the box has changed at all. Nothing waits for that.

    Args:
        num_atoms: Atoms N.
        num_ghosts: Atoms behind them, two or none; two share what is left of E edges and P pairs.
        like: Of the precision and on the device of the positions.
        room: Sizes of arrays.
        skin: In Å.
    """

    def __init__(self, num_atoms: int, num_ghosts: int, like: Tensor, room: Room, skin: float = 0.0) -> None:
        self.num_atoms, self.num_ghosts, self.room, self.skin = num_atoms, num_ghosts, room, skin
        self.dtype, device = like.dtype, like.device
        N, A, M = num_atoms, num_atoms + num_ghosts, room.row

        def array(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.home, self.moved = array(A, 3, dtype=torch.float64), array(A, 3, dtype=torch.float64)
        self.key, self.bucket = array(N, dtype=torch.int64), array(N)
        self.near, self.image, self.count = array(N, M), array(N, M), array(N)
        self.here, self.where, self.rank = array(N, M), array(N, M), array(N, M)
        self.counts = array(2, A + 1)
        #: Edges, pairs, the longest row of the list, and 1 if a box spans no volume.
        self.notes = array(4, dtype=torch.int64)
        self.then = self.box_then = self.flag = self.moved
        #: Held, since a recorded call reads them wherever they are.
        self._constants: dict[int, Tensor] = {}
        if skin:
            self.then = torch.full((N, 3), math.nan, dtype=torch.float64, device=device)
            self.flag = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        """What the arrays take."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    def forget(self) -> None:
        """Make the list again at the next call."""
        if self.skin:
            self.flag.fill_(1)

    @torch.no_grad()
    def __call__(
        self,
        pos: Positions,
        batch: SystemIndex,
        box: Boxes | None,
        num_systems: int,
        cutoff: float,
        lower: float = 0.0,
        *,
        loop: bool = False,
        closest: float = 0.0,
        lists: bool = False,
    ) -> DeviceEdges:
        """Fill arrays of E edges and P pairs; which are real is in the notes.

        Args:
            pos: Positions in Å, of ghosts too, (A, 3).
            batch: System of each atom, (A,).
            box: Lattice vectors, (1, 3, 3) or (S, 3, 3) Å, or None.
            num_systems: Number of systems S, without that of the ghosts.
            cutoff: Edges are shorter, Å.
            lower: And at least this long.
            loop: Whether to list the edge (a, a) of every atom.
            closest: Distances below it that are not zero are NaN, Å.
            lists: Whether to return signs and shifts.
        """
        N, A, (M, P), device = self.num_atoms, self.num_atoms + self.num_ghosts, self.room, pos.device
        E, is_fixed, has_box = 2 * P + A * loop, self.num_ghosts > 0, box is not None
        pos, batch, T = pos.detach().contiguous(), batch.long().contiguous(), _table_size(N)
        limits = _limits(cutoff, lower, closest, self.skin, N <= ONE_CELL, device)
        bounds = _numbers(T + 1, device)
        self._constants = {id(x): x for x in (*self._constants.values(), limits, bounds)}
        float64, S = {"dtype": torch.float64, "device": device}, max(num_systems, 1)
        flags = {"HAS_BOX": has_box, "SKIN": bool(self.skin)}
        cells = sizes = boxes = self.notes
        num_box, tile = 0, TILES
        if box is not None:
            boxes = box.detach().contiguous()
            shared = boxes.shape[0] == 1 and S > 1
            num_box = boxes.numel()
            if self.skin and self.box_then.shape != boxes.shape:
                self.box_then = torch.full(boxes.shape, math.nan, **float64)
            cells, sizes = torch.empty(S, 18, **float64), torch.empty(S, 8, dtype=torch.int32, device=device)
            grid = (_blocks(S, 32),)
            arguments = (boxes, cells, sizes, limits, S, 0 if shared else 9, MOST_IMAGES, MOST_ALONG)
            _launch("lattices", grid, *arguments, INFINITE=math.isinf(cutoff), BLOCK=32)
        if self.skin:
            grid = (_blocks(max(N, num_box), tile["block"]),)
            arguments = (pos, self.then, boxes, self.box_then, limits, self.flag, N, num_box)
            _launch("moves", grid, *arguments, BLOCK=tile["block"])
        arguments = (pos, batch, cells, sizes, limits, self.home, self.moved, self.key, self.bucket, self.then, boxes)
        arguments = (*arguments, self.box_then, self.flag, self.notes, N, A, num_box, T - 1)
        grid = (_blocks(max(A, num_box if self.skin else 1, 1), tile["block"]),)
        _launch("places", grid, *arguments, **flags, BLOCK=tile["block"])
        values, order = torch.sort(self.bucket, stable=True)
        bounds = torch.searchsorted(values, bounds)
        arguments = (batch, cells, sizes, limits, self.moved, self.key, order, bounds, self.flag)
        arguments = (*arguments, self.near, self.image, self.count, N, M, T - 1)
        options = {"ATOMS": tile["atoms"], "TILE": tile["candidates"]}
        _launch("rows", (_blocks(N, tile["atoms"]),), *arguments, **flags, **options)
        arguments = (batch, cells, sizes, limits, self.moved, self.near, self.image, self.count)
        arguments = (*arguments, self.here, self.where, self.rank, self.counts, self.notes, N, A, M)
        _launch("measured", (_blocks(A, tile["atoms"]),), *arguments, HAS_BOX=has_box, LOOP=loop, **options)
        starts = torch.cumsum(self.counts, dim=1)
        whole, real = {"dtype": torch.int64, "device": device}, {"dtype": pos.dtype, "device": device}
        found = DeviceEdges(
            torch.empty(2, E, **whole),
            torch.empty(E, 3, **real),
            torch.empty(E, **real),
            torch.empty(E, **whole),
            torch.empty(E, **whole),
            torch.empty(A + 1, **whole),
            torch.empty(2, P, **whole),
            torch.empty(P + loop, **real),
            torch.empty(E if lists else 0, **whole),
            torch.empty(P if lists and has_box else 0, 3, **real),
        )
        num_programs = _blocks(A * M, tile["edges"])
        arguments = (pos, batch, cells, limits, self.home, self.moved, self.here, self.where, self.rank, starts)
        arrays = (*found[:5], found.row_start, *found[6:], self.flag, self.notes, N, A, M, E, P, num_programs)
        options = {"LOOP": loop, "FIXED": is_fixed, "LISTS": lists, "SIZE": tile["edges"], "TILE": tile["others"]}
        grid = (num_programs + (_blocks(E, tile["edges"]) if is_fixed else 0),)
        _launch("edges", grid, *arguments, *arrays, **flags, **options)
        return found


#: Room that searches of a kind took last, by their cutoff and device: only how often arrays are too small depends on
#: it.
_rooms: dict[tuple[float, str], int] = {}


def edges_on_device(
    pos: Positions,
    batch: SystemIndex,
    box: Boxes | None,
    num_systems: int,
    cutoff: float,
    lower: float = 0.0,
    *,
    loop: bool = False,
    closest: float = 0.0,
    lists: bool = False,
) -> DeviceEdges:
    """All edges of a call, in arrays of their number; the host waits once, or twice where there are unusually many.

    See :class:`DeviceList` for the arguments.

    Raises:
        ValueError: If the vectors of a box are not finite or linearly dependent, or it is too flat.
    """
    N, key = pos.shape[0], (cutoff, str(pos.device))
    M = min(_rooms.get(key, FIRST_ROOM), max(N, 1)) if box is None else _rooms.get(key, FIRST_ROOM)
    while True:
        search = DeviceList(N, 0, pos, Room(M, N * M // 2))
        options: Any = {"loop": loop, "closest": closest, "lists": lists}
        found = search(pos, batch, box, num_systems, cutoff, lower, **options)
        num_edges, num_pairs, longest, is_flat = search.notes.tolist() if N else (0, 0, 0, 0)
        if is_flat:
            assert box is not None
            lattice_of(box, num_systems, cutoff)  # says which
        if longest <= M:
            break
        M = rounded(longest)
    _rooms[key] = max(rounded(longest), FIRST_ROOM) if longest > M // 2 else max(M // 2, FIRST_ROOM)
    return cut(found, num_edges, num_pairs, loop)


def cut(found: DeviceEdges, num_edges: int, num_pairs: int, loop: bool) -> DeviceEdges:
    """The first edges and pairs."""
    index, vec, edge_dist, of_edge, reverse, row_start, atoms, dist, sign, shifts = found
    vec, edge_dist, of_edge, reverse = (x[:num_edges] for x in (vec, edge_dist, of_edge, reverse))
    atoms, dist, sign, shifts = atoms[:, :num_pairs], dist[: num_pairs + loop], sign[:num_edges], shifts[:num_pairs]
    return DeviceEdges(index[:, :num_edges], vec, edge_dist, of_edge, reverse, row_start, atoms, dist, sign, shifts)


def rounded(count: int) -> int:
    """Room for more than ``count``, a multiple of eight."""
    return 8 * math.ceil((MORE[0] * count + MORE[1]) / 8)


def _launch(name: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its tensors, if there is anything to do."""
    from torchmdnet.neighbors import device_kernels

    if all(grid):
        with torch.cuda.device_of(args[0]):
            getattr(device_kernels, name)[grid](*args, **options)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _table_size(num_atoms: int) -> int:
    """Entries of the table of buckets, a power of two, twice as many as there are atoms or more."""
    return 1 << max(4, (2 * num_atoms - 1).bit_length())


@functools.lru_cache(maxsize=16)
def _numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _limits(
    cutoff: float, lower: float, closest: float, skin: float, is_one_cell: bool, device: torch.device
) -> Tensor:
    """See ``limits`` in :mod:`torchmdnet.neighbors.device_kernels`."""
    reach = cutoff + skin
    per = 0.0 if is_one_cell or math.isinf(reach) else 1 / (reach * (1 + 1e-9))
    move = max(skin / 2 - MARGIN, 0.0) ** 2
    values = (min(reach, 1e150), reach**2, cutoff**2, lower**2, closest, move, per, 0.0)
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float64, device=device)
