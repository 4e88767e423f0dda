"""The edges of one graph as compiled loops read them, and what a network's energy does with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.graph import Graph, in_pairs
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.spline import BASIS, Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.calls import recorded, repeatable, resumed
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.workspace import Buffer, Places, Workspace

__all__ = ["Coefficients", "Geometry", "TensorGeometry"]

_BASIS = np.asarray(BASIS, dtype=np.float64) / 120


class _made_once(cached_property):
    """A property that is kept; what it calls is recorded wherever it is first read."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        with resumed():
            return super().__get__(instance, owner)


class Scheduled:
    """The order in which loops come to edges, see :func:`torchmdnet.ops.kernels.loops.blocks.schedule`.

    Args:
        cell: First row of each pair in a table, (P,).
        row: The pair of each edge, (E,).
        start: The first edge of each atom, (N + 1,).
        num_rows: Of tables; 0 if each pair has rows of its own.
        kind: Integers of ``place`` and ``slot``.
    """

    #: Whether what a repetition made has the sizes of the recorded one.
    fits = True

    def __init__(self, cell: np.ndarray, row: np.ndarray, start: np.ndarray, num_rows: int, kind: type) -> None:
        self._of = cell, row, start, num_rows
        self.schedule = loops.blocks.schedule(*self._of)
        self.place = cell[self.schedule.rows].astype(kind, copy=False)  # first rows in the order of the schedule
        self.slot = self.schedule.slot.astype(kind, copy=False)
        calls = recorded()
        if calls is not None:
            calls.add(self._repeat)

    def _repeat(self) -> None:
        made = loops.blocks.schedule(*self._of)
        *ours, most = self.schedule
        *others, count = made
        self.fits = count == most and all(x.shape == y.shape for x, y in zip(ours, others, strict=True))
        if self.fits:
            for x, y in zip(ours, others, strict=True):
                np.copyto(x, y)
            np.copyto(self.place, self._of[0][made.rows], casting="same_kind")
            if self.slot is not self.schedule.slot:
                np.copyto(self.slot, made.slot, casting="same_kind")


def _narrowed(index: np.ndarray) -> np.ndarray:
    """The same as 32-bit integers."""
    out = np.empty(index.shape, np.int32)
    repeatable(np.copyto, out, index, casting="same_kind")
    return out


def _stacked(arrays: list[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Arrays (S, ...) of any S one behind the other; what each row has is of a shape."""
    if len(arrays) == 1:
        return arrays[0]
    out = np.empty((sum(map(len, arrays)), *shape), dtype)
    if arrays:
        repeatable(np.concatenate, arrays, out=out)
    return out


class Coefficients(NamedTuple):
    """How pairs read a table, in the order in which loops come to them, n pairs of all chunks."""

    coef: np.ndarray  # (n, 6)
    slope: np.ndarray  # (n, 6) derivatives in the distance


class Readings(NamedTuple):
    """How pairs read a function that does not fade, and the envelope, in the order of the pairs."""

    coef: np.ndarray  # (P, K)
    slope: np.ndarray  # (P, K) derivatives in the distance
    fade: np.ndarray  # (P,)
    steep: np.ndarray  # (P,)
    cell: np.ndarray  # (P,) the first row of each pair in a table


class Geometry:
    """Edges as the loops see them, their gradients, and a direction in which they change.

    A table has a row for each node of a spline; without a spline two for each pair, value and slope at its distance.

    Args:
        spline: The grid of the radial functions; None for pair by pair.
        envelope: The cosine that fades at the cutoff.
        graph: The atoms.
        vec: Vectors of the edges, (E, 3).
        dist: Distances of the pairs, (P,).
        workspace: Where memory comes from.
    """

    def __init__(
        self,
        spline: Spline | None,
        envelope: CosineCutoff,
        graph: Graph,
        vec: Tensor,
        dist: Tensor,
        workspace: Workspace,
    ) -> None:
        assert graph.pairs is not None
        pairs = graph.pairs
        self.num_atoms, self.dtype, self.places = graph.num_atoms, dist.dtype, workspace.begin(dist.dtype)
        self._held: list[Buffer] = []
        self.row, self.row_start = pairs.of_edge.numpy(), pairs.row_start.numpy()
        self.sender, self.reverse = (_narrowed(index.numpy()) for index in (graph.edge_index[1], pairs.reverse))
        self.dist = dist.detach().contiguous().numpy()
        E, P = self.row.shape[0], self.dist.shape[0]
        self.u, coef, slope = self.empty(E, 4), self.empty(P, 6), self.empty(P, 6)
        self.fade, self.steep, cell = self.empty(P), self.empty(P), np.empty(P, dtype=np.int64)
        lower, upper = float(envelope.cutoff_lower), float(envelope.cutoff_upper)
        grid = (lower, upper, 1) if spline is None else (float(spline.start), float(spline.stop), spline.num_cells)
        out = (self.u, coef, slope, self.fade, self.steep, cell)
        edges = (vec.detach().contiguous().numpy(), self.dist, self.row)
        loops.geometry.direction_geometry(40 * E, *edges, *grid, _BASIS, lower, upper, *out)
        num_rows = 0
        if spline is None:
            assert recorded() is None, "without a grid nothing is repeated"
            coef.fill(0)
            slope.fill(0)
            coef[:, 0] = slope[:, 1] = 1
            cell[:] = 2 * np.arange(P)
        else:
            num_rows = spline.num_cells + 6
        self.order = Scheduled(cell, self.row, self.row_start, num_rows, np.int32)
        self.schedule, self.place, self.slot = self.order.schedule, self.order.place, self.order.slot
        self.coef, self.slope, self.num_others = coef, slope, pairs.atoms.shape[1]
        self._gradients: dict[tuple[int, int], Buffer] = {}
        self._fades: dict[bool, tuple[np.ndarray, np.ndarray]] = {}
        self._changes: dict[Any, Buffer] = {}
        self._shares: dict[Any, tuple[int, int]] = {}

    def empty(self, *shape: int) -> np.ndarray:
        """An array with arbitrary values that lives as long as this geometry."""
        self._held.append(self.places.empty(*shape))
        return self._held[-1].array

    @property
    def fits(self) -> bool:
        """Whether edges that were filled in fit what was recorded."""
        return self.order.fits

    # ------------------------------------------------------------------------------------------- what messages read

    @_made_once
    def bare(self) -> Coefficients:
        """Of functions that do not fade at the cutoff."""
        return self._picked(self.coef, self.slope)

    @_made_once
    def fading(self) -> Coefficients:
        """Of functions that do."""
        coef, slope = self.empty(*self.coef.shape), self.empty(*self.coef.shape)
        repeatable(self._fade, coef, slope)
        return self._picked(coef, slope)

    def _fade(self, coef: np.ndarray, slope: np.ndarray) -> None:
        np.multiply(self.fade[:, None], self.coef, out=coef)
        np.multiply(self.fade[:, None], self.slope, out=slope)
        slope += self.steep[:, None] * self.coef

    @_made_once
    def among_others(self) -> Coefficients:
        """Of functions that fade and leave out self loops, the last pairs."""
        if len(self.coef) == self.num_others:
            return self.fading
        found = Coefficients(*(np.empty_like(values) for values in self.fading))
        for values, out in zip(self.fading, found, strict=True):
            repeatable(lambda x, out: np.multiply((self.schedule.rows < self.num_others)[:, None], x, out), values, out)
        return found

    def _picked(self, coef: np.ndarray, slope: np.ndarray) -> Coefficients:
        rows = self.schedule.rows
        out = Coefficients(self.empty(len(rows), 6), self.empty(len(rows), 6))
        repeatable(loops.blocks.pick, coef, rows, out.coef)
        repeatable(loops.blocks.pick, slope, rows, out.slope)
        return out

    @cached_property
    def stride(self) -> int:
        """Length of rows of edges, whole vectors."""
        return -(-self.row.shape[0] // 8) * 8

    def fades(self, values_fade: bool) -> tuple[np.ndarray, np.ndarray]:
        """The envelope of attention on each edge and its derivative, (E',); one where the filters of values fade."""
        found = self._fades.get(values_fade)
        if found is None:
            fade, steep = self.empty(self.stride), self.empty(self.stride)
            fade.fill(1)
            steep.fill(0)
            if not values_fade:
                E = self.row.shape[0]
                with resumed():
                    for values, out in ((self.fade, fade), (self.steep, steep)):
                        repeatable(lambda x, out: np.copyto(out, x[self.row]), values, out[:E])
            found = self._fades[values_fade] = fade, steep
        return found

    def work(self, channels: int) -> int:
        """Multiply-adds of a loop over all edges, roughly."""
        return 6 * self.row.shape[0] * channels

    def shares(self, table: np.ndarray, *, sums: bool = False) -> tuple[int, int]:
        """How threads share the loops that read a table: see :func:`torchmdnet.ops.kernels.loops.blocks.shares`."""
        found = self._shares.get((table.shape, sums))
        if found is None:
            found = self._shares[table.shape, sums] = self._share(table, sums)
        return found

    def _share(self, table: np.ndarray, sums: bool) -> tuple[int, int]:
        blocks, *_, channels = table.shape
        threads = kernels.cores.count() if self.work(blocks * channels) >= kernels.WORTH_THREADS else 1
        return loops.blocks.shares(threads, blocks, len(self.schedule.chunk) - 1, sums=sums)

    def where(self, table: np.ndarray, *, sums: bool = False) -> tuple[Any, ...]:
        """Indices as the loops that read a table take them, behind the coefficients' places."""
        _, _, chunk, first, most = self.schedule
        return self.sender, self.slot, chunk, first, self.row_start, most, *self.shares(table, sums=sums)

    # --------------------------------------------------------------------------------------------- gradients in edges

    def clear(self) -> None:
        """Forget gradients."""
        self._gradients = {}

    def gradient(self, sides: int, size: int = 1) -> np.ndarray:
        """Where loops with this number of sides add gradients of edges, (S, E, size).

        Those in the distance of an edge, or of size 4 those in the distance and the direction of the opposite one.
        """
        found = self._gradients.get((sides, size))
        if found is None:
            found = self._gradients[sides, size] = self.places.empty(sides, len(self.row), size)
            repeatable(found.array.fill, 0)
        return found.array

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors (E, 3) and the distances (P,), of all that was summed."""
        E = self.row.shape[0]
        of_vec = torch.empty(E, 3, dtype=self.dtype)
        of_dist = torch.empty(self.dist.shape, dtype=self.dtype)
        found = {size: [x.array for (_, n), x in self._gradients.items() if n == size] for size in (1, 4)}
        of_edge, of_reverse = (_stacked(found[n], (E, n), self.u.dtype) for n in (1, 4))
        vec = of_vec.numpy()
        loops.geometry.direction_vectors_backward(40 * E, self.u, self.dist, self.row, self.reverse, of_reverse, vec)
        edges = (self.u, self.row, of_reverse, of_edge[:, :, 0], vec)
        repeatable(loops.geometry.direction_distances_backward, *edges, of_dist.numpy())
        return of_vec, of_dist

    # ------------------------------------------------------------------------------ a direction of change, for training

    def move(self, dvec: Tensor, ddist: Tensor) -> None:
        """Let vectors (E, 3) and distances (P,) change along a direction."""
        self._by_pair, self._by_edge = ddist.detach().contiguous().numpy(), dvec.detach().contiguous().numpy()
        self._changes = {}

    def change(self, coefficients: Coefficients) -> np.ndarray:
        """How coefficients change along the direction of :meth:`move`, (n, 6)."""

        def make(out: np.ndarray) -> None:
            np.multiply(coefficients.slope, self._by_pair[self.schedule.rows][:, None], out=out)

        return self._changed(id(coefficients), coefficients.slope.shape, make)

    def change_of_directions(self) -> np.ndarray:
        """How the directions u = -vec / dist change, (E, 4)."""

        def make(out: np.ndarray) -> None:
            dist = self.dist[self.row][:, None]
            along = self._by_edge + self.u[:, :3] * self._by_pair[self.row][:, None]
            out.fill(0)
            np.divide(-along, dist, out=out[:, :3], where=dist > 0)

        return self._changed("directions", self.u.shape, make)

    def change_of_fades(self, values_fade: bool) -> np.ndarray:
        """How the envelope of attention changes, (E',); see :meth:`fades`."""
        _, steep = self.fades(values_fade)

        def make(out: np.ndarray) -> None:
            out.fill(0)
            np.multiply(steep[: len(self.row)], self._by_pair[self.row], out=out[: len(self.row)])

        return self._changed(("fades", values_fade), steep.shape, make)

    def _changed(self, key: Any, shape: tuple[int, ...], make: Callable[[np.ndarray], None]) -> np.ndarray:
        found = self._changes.get(key)
        if found is None:
            found = self._changes[key] = self.places.empty(*shape)
            make(found.array)
        return found.array


class TensorGeometry:
    """Edges as loops over tensors see them, their gradients, and a direction in which they change.

    Functions of distance fade at the cutoff. Edges may stand alone, without one of opposite direction: then gradients
    flow along a second order of the edges, by sender.

    Args:
        spline: The grid of the radial functions; None for pair by pair.
        envelope: The cosine that fades at the cutoff.
        graph: The atoms.
        vec: Vectors of the edges, (E, 3).
        dist: Distances of the pairs, (P,).
        workspace: Where memory comes from.
        handedness: Sign of the antisymmetric components of directions.
    """

    def __init__(
        self,
        spline: Spline | None,
        envelope: CosineCutoff,
        graph: Graph,
        vec: Tensor,
        dist: Tensor,
        workspace: Workspace,
        handedness: float,
    ) -> None:
        assert graph.pairs is not None
        pairs, E, P = graph.pairs, vec.shape[0], dist.shape[0]
        self.num_atoms, self.dtype, self.places = graph.num_atoms, dist.dtype, workspace.begin(dist.dtype)
        self.handedness, self.spline, self.envelope, self.graph = handedness, spline, envelope, graph
        self._held: list[Buffer] = []
        (receiver, sender), row = graph.edge_index.numpy(), pairs.of_edge.numpy()
        self.row, self.dist = row, dist.detach().contiguous().numpy()
        if spline is None:
            grid, num = (float(envelope.cutoff_lower), float(envelope.cutoff_upper), 0), 2
        else:
            grid, num = (spline.start, spline.stop, spline.num_cells), 6
        self.u, self.Y = self.empty(E, 3), self.empty(E, 9)
        self.coef, self.slope = self.empty(P, num), self.empty(P, num)
        cell = np.empty(P, np.int64)
        arrays = (vec.detach().contiguous().numpy(), self.dist, row, *grid, _BASIS, handedness)
        loops.geometry.tensor_geometry(40 * E, *arrays, self.Y, self.u, self.coef, self.slope, cell)
        num_rows = 0 if spline is None else spline.num_cells + 6
        made = (self.places, self.coef, self.slope)
        self.by_receiver = Order(*made, sender, row, pairs.row_start.numpy(), cell, num_rows)
        self.by_sender = self.by_receiver
        if not in_pairs(graph):
            order = np.argsort(sender, kind="stable")
            starts = np.searchsorted(sender, np.arange(graph.num_atoms + 1), sorter=order)
            self.by_sender = Order(*made, receiver[order], row[order], starts, cell, num_rows)
        self._shares: dict[Any, tuple[int, int]] = {}
        self.dY = self.Y  # the change of Y, once there is one
        self.clear()

    def empty(self, *shape: int) -> np.ndarray:
        """An array with arbitrary values that lives as long as this geometry."""
        self._held.append(self.places.empty(*shape))
        return self._held[-1].array

    @property
    def fits(self) -> bool:
        """See :attr:`Geometry.fits`."""
        return self.by_receiver.order.fits

    @_made_once
    def readings(self) -> Readings:
        """For steps that read tables pair by pair."""
        P, spline = len(self.dist), self.spline
        lower, upper = float(self.envelope.cutoff_lower), float(self.envelope.cutoff_upper)
        grid = (lower, upper, 1) if spline is None else (float(spline.start), float(spline.stop), spline.num_cells)
        coef, slope, cell = self.empty(P, 6), self.empty(P, 6), np.empty(P, dtype=np.int64)
        made = Readings(coef, slope, self.empty(P), self.empty(P), cell)
        no_edges = np.empty((0, 3), coef.dtype), self.dist, self.row[:0]
        out = (np.empty((0, 4), coef.dtype), coef, slope, made.fade, made.steep, cell)
        loops.geometry.direction_geometry(40 * P, *no_edges, *grid, _BASIS, lower, upper, *out)
        if spline is not None:
            return made
        value, rise = self.empty(P, 2), self.empty(P, 2)
        value[:], rise[:], cell[:] = (1, 0), (0, 1), 2 * np.arange(P)
        return made._replace(coef=value, slope=rise)

    def work(self, channels: int, blends: int, of_edge: int) -> int:
        """Multiply-adds of a loop: blends of the table for each pair, and others for each channel of an edge."""
        rows, num = self.by_receiver.coef.shape
        return channels * (3 * num * rows * blends + of_edge * len(self.row))

    def shares(self, table: np.ndarray, *, sums: bool = False) -> tuple[int, int]:
        """How threads share the loops that read a table: see :func:`torchmdnet.ops.kernels.loops.blocks.shares`."""
        found = self._shares.get((table.shape, sums))
        if found is None:
            blocks, *_, size = table.shape
            is_worth = 27 * len(self.row) * blocks * size >= kernels.WORTH_THREADS
            threads, chunks = kernels.cores.count() if is_worth else 1, len(self.by_receiver.schedule.chunk) - 1
            found = self._shares[table.shape, sums] = loops.blocks.shares(threads, blocks, chunks, sums=sums)
        return found

    def clear(self) -> None:
        """Forget gradients."""
        self._of_Y: list[Buffer] = []
        self._of_edges: dict[bool, list[Buffer]] = {False: [], True: []}
        self._of_pairs: dict[int, Buffer] = {}

    def gradient_of_directions(self, sides: int) -> np.ndarray:
        """Where a loop with this number of sides writes gradients in components of directions, (S, E, 8)."""
        self._of_Y.append(self.places.empty(sides, len(self.row), 8))
        return self._of_Y[-1].array

    def gradient_of_edges(self, sides: int, *, by_sender: bool) -> np.ndarray:
        """Where a loop with this number of sides writes gradients in the distance of each edge, (S, E)."""
        found = self._of_edges[by_sender]
        found.append(self.places.empty(sides, len(self.row)))
        return found[-1].array

    def gradient_of_pairs(self, run: Any) -> np.ndarray:
        """Where a run of a step writes gradients in the distances of pairs, (P,)."""
        found = self._of_pairs.get(id(run))
        if found is None:
            found = self._of_pairs[id(run)] = self.places.empty(*self.dist.shape)
        return found.array

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors (E, 3) and the distances (P,), of all that was found."""
        E = len(self.row)
        of_vec, of_dist = torch.empty(E, 3, dtype=self.dtype), torch.empty(self.dist.shape, dtype=self.dtype)
        of_Y = _stacked([x.array for x in self._of_Y], (E, 8), self.u.dtype)
        edges = (self.u, self.dist, self.row, self.handedness)
        loops.geometry.tensor_vectors_backward(40 * E, *edges, of_Y, of_vec.numpy())
        there, back = (_stacked([x.array for x in self._of_edges[way]], (E,), self.u.dtype) for way in (False, True))
        edges = (self.u, self.row, self.by_sender.row, of_vec.numpy(), there, back)
        repeatable(loops.geometry.tensor_distances_backward, *edges, of_dist.numpy())
        for more in self._of_pairs.values():
            repeatable(of_dist.add_, more.tensor)
        return of_vec, of_dist

    def move(self, dvec: Tensor, ddist: Tensor) -> None:
        """Let vectors (E, 3) and distances (P,) change along a direction."""
        E = len(self.row)
        self.ddist = ddist.detach().contiguous().numpy()
        self._moved = self.places.empty(E, 9), self.places.empty(*self.slope.shape)
        self.dY, dcoef = (x.array for x in self._moved)
        arrays = (self.u, self.dist, self.row, self.handedness, self.slope, dvec.contiguous().numpy())
        loops.geometry.tensor_geometry_tangent(40 * E, *arrays, ddist.contiguous().numpy(), self.dY, dcoef)
        for order in {id(order): order for order in (self.by_receiver, self.by_sender)}.values():
            order.move(dcoef)


class Order:
    """Edges in the order of the atoms that sum over them.

    Args:
        places: Where memory comes from.
        coef: Coefficients of the pairs, (P, K).
        slope: Their derivatives in the distance, (P, K).
        far: The atoms at the other end of the edges, (E,).
        row: The pair of each edge, (E,).
        start: The first edge of each atom, (N + 1,).
        cell: First row of each pair in a table, (P,).
        num_rows: Of tables; 0 if each pair has rows of its own.
    """

    dcoef: np.ndarray  # changes of the coefficients along a direction, (n, K)

    def __init__(
        self,
        places: Places,
        coef: np.ndarray,
        slope: np.ndarray,
        far: Any,
        row: Any,
        start: Any,
        cell: Any,
        num_rows: int,
    ) -> None:
        self.far, self.row, self.start, self._places, self._slope = far, row, start, places, slope
        self.order = Scheduled(cell, row, start, num_rows, np.int64)
        self.schedule, self.place = self.order.schedule, self.order.place
        self._held: dict[str, Buffer] = {}
        self.coef = self._picked("coef", coef)  # (n, K) in the order in which loops come to the pairs

    @_made_once
    def slope(self) -> np.ndarray:
        """Derivatives of the coefficients in the distance, (n, K)."""
        return self._picked("slope", self._slope)

    def move(self, dcoef: np.ndarray) -> None:
        """Let the coefficients of pairs, (P, K), change."""
        self.dcoef = self._picked("dcoef", dcoef)

    def _picked(self, name: str, values: np.ndarray) -> np.ndarray:
        out = self._held[name] = self._places.empty(len(self.schedule.rows), values.shape[1])
        repeatable(loops.blocks.pick, values, self.schedule.rows, out.array)
        return out.array

    def where(self, shares: tuple[int, int]) -> tuple[Any, ...]:
        """Indices as loops over edges take them."""
        _, slot, chunk, first, most = self.schedule
        return self.far, slot, chunk, first, self.start, most, *shares
