r"""Layout and order of the loops that the tape runs over edges: channels in blocks, receivers in chunks.

These loops are bound by what they read rather than by arithmetic, so everything is arranged for the caches.

Channels come in blocks of a cache line, two vectors of W channels: :func:`pack` brings features (N, C, F) into the
layout (B, N, C, 2 W), and a table of filters (R, L, F) into (B, R, L, 2 W). A block of all atoms and of the whole table
stays in the second cache.

Receivers are visited in chunks, see :func:`schedule`. The weights of the pairs of a chunk,

.. math:: w_{ij} = \sum_k c_k(r_{ij})\, T_{g(ij) + k},

are made from the table in the order of their distances by :func:`blend`, once for both directions where a chunk holds
both, and then read by the receivers, whose sums are kept in registers.

==========================  =============  =========================================================================
letters                     shape          meaning
==========================  =============  =========================================================================
``N``, ``E``, ``P``                        atoms, edges i <- j sorted by receiver, pairs of opposite edges
``B``, ``W``, ``F``                        blocks of channels, channels in a vector, channels
``n``                                      scheduled pairs: those of the first chunk, those of the second, and so on
``coef``                    (n, K)         coefficients c; ``slope`` their derivatives in the distance
``place``                   (n,)           first row g of a scheduled pair in the table
``sender``                  (E,)           j of each edge; ``reverse`` the edge j <- i
``slot``                    (E,)           where in its chunk the pair of an edge is
``row_start``               (N + 1,)       first edge of each receiver
``chunk``                   (chunks + 1,)  first receiver of each chunk; ``first`` its first scheduled pair
``max_pairs``                              pairs of the largest chunk
``channel_groups``          S              groups of blocks that threads share, and
``atom_groups``             T              groups of chunks; threads claim S T parts, see :func:`shares`
``b``, ``n``, ``i``, ``e``                 the block, chunk, receiver and edge that a loop is at
==========================  =============  =========================================================================

Training on forces differentiates the energy along a direction in which the atoms move. In all rooms, names that begin
with d are changes along it, O is a gradient in what a loop makes and dO one in the change of that. Each loop has four
passes: the sum, ``_backward`` with its gradients for O, ``_tangent`` with its change, and ``_reverse`` with the
gradients of ⟨O, sum⟩ + ⟨dO, tangent⟩.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from torchmdnet.ops.kernels.compiling import called, inlined, spliced
from torchmdnet.ops.kernels.sharing import PARTS_PER_THREAD, claimed, moving
from torchmdnet.ops.kernels.simd import item, lanes_that_divide, load, repeat, splat, store
from torchmdnet.ops.kernels.work import lanes_of

__all__ = [
    "Schedule",
    "aligned",
    "blend",
    "blend_two",
    "block_size",
    "clear_up_to",
    "divided",
    "longest",
    "pack",
    "pack_both",
    "packed",
    "part_of",
    "pick",
    "put_block",
    "put_five",
    "put_four",
    "schedule",
    "share_of",
    "shares",
    "spread",
]


#: Pairs of a chunk, whose weights stay in the second cache.
PAIRS_PER_CHUNK = 512
#: Chunks of receivers for each thread that make it enough to divide these.
CHUNKS_PER_THREAD = 64


class Schedule(NamedTuple):
    """The order in which edges are visited."""

    rows: Any  # (n,) pairs of all chunks
    slot: Any  # (E,) the place of an edge's pair in its chunk
    chunk: Any  # (C + 1,) receivers of each chunk
    first: Any  # (C + 1,) pairs of each chunk
    max_pairs: int  # pairs of the largest chunk


def schedule(cell: Any, row: Any, row_start: Any, num_cells: int) -> Schedule:
    """Divide receivers into chunks.

    Args:
        cell: First row of each pair in the table, (P,).
        row: Pair of each edge, (E,), sorted by receiver.
        row_start: First edge of each receiver, (N + 1,).
        num_cells: The table's rows; 0 if each pair has rows of its own, in which case the order is theirs.
    """
    return Schedule(*divided(cell, row, row_start, PAIRS_PER_CHUNK, num_cells))


@called
def divided(cell, row, row_start, capacity, num_cells):
    """The loop of :func:`schedule`; pairs of a chunk are sorted by counting."""
    num_atoms = row_start.shape[0] - 1
    seen = np.full(cell.shape[0], -1, np.int64)
    rows, slot = np.empty(row.shape[0], np.int64), np.empty(row.shape[0], np.int64)
    chunk, first = np.zeros(num_atoms + 1, np.int64), np.zeros(num_atoms + 1, np.int64)
    count = np.empty(num_cells + 1, np.int64)
    chunks, n, i, max_pairs = 0, 0, 0, 0
    while i < num_atoms:
        # a chunk takes receivers as long as their pairs may all be new; seen[p] < base says that p is not in it yet
        begin, base = i, n
        while i < num_atoms and (i == begin or n - base + row_start[i + 1] - row_start[i] <= capacity):
            for e in range(row_start[i], row_start[i + 1]):
                p = row[e]
                if seen[p] < base:
                    seen[p] = n
                    rows[n] = p
                    n += 1
            i += 1
        if num_cells > 0:  # order the chunk's pairs by their rows in the table, by counting
            for k in range(num_cells + 1):
                count[k] = 0
            for k in range(base, n):
                count[cell[rows[k]] + 1] += 1
            for k in range(num_cells):
                count[k + 1] += count[k]
            for k in range(base, n):
                p = rows[k]
                seen[p] = base + count[cell[p]]
                count[cell[p]] += 1
        for e in range(row_start[begin], row_start[i]):
            place = seen[row[e]]
            slot[e] = place - base
            rows[place] = row[e]
        chunks += 1
        chunk[chunks], first[chunks], max_pairs = i, n, max(max_pairs, n - base)
    return rows[:n].copy(), slot, chunk[: chunks + 1].copy(), first[: chunks + 1].copy(), max_pairs


@called
def pick(values, rows, out):
    """out = values[rows]."""
    for n in range(rows.shape[0]):
        for k in range(values.shape[1]):
            out[n, k] = values[rows[n], k]


def block_size(itemsize: int) -> int:
    """Channels of a block."""
    return 2 * lanes_of(itemsize)


def shares(threads: int, num_blocks: int, num_chunks: int, sums: bool = False) -> tuple[int, int]:
    """Into how many parts threads divide blocks of channels, the channel_groups S, and receivers, the atom_groups T.

    Each thread would best read blocks of its own. But what is made for edges needs memory for every side, so where
    receivers are many only these are divided. There are more parts than threads, so that they end together, except
    where each range has a table of its own and the ``sums`` over all atom_groups are wanted.
    """
    channel_groups = 1 if num_chunks >= CHUNKS_PER_THREAD * threads else min(threads, num_blocks)
    if sums or threads == 1:
        return channel_groups, max(threads // channel_groups, 1)
    return channel_groups, max(min(PARTS_PER_THREAD * threads // channel_groups, num_chunks), 1)


@moving
def pack(job, X, out):
    """Channels in blocks: (N, C, F) -> (B, N, C, 2 lanes), with zeros behind the last channel."""
    num_atoms, C, F = X.shape
    x, o, W = X.reshape(-1), out.reshape(-1), lanes_that_divide(out, out.shape[3])
    for i in claimed(job, num_atoms):
        for b in range(out.shape[0]):
            capacity = F - 2 * W * b
            for c in range(C):
                at, to = (i * C + c) * F + 2 * W * b, ((b * num_atoms + i) * C + c) * 2 * W
                if capacity >= 2 * W:
                    store(o, to, load(x, at))
                    store(o, to + W, load(x, at + W))
                else:
                    for k in range(2 * W):
                        out[b, i, c, k] = X[i, c, 2 * W * b + k] if k < capacity else 0.0


def packed(X: Any) -> Any:
    """:func:`pack` into new memory."""
    num_atoms, C, F = X.shape
    size = block_size(X.itemsize)
    dtype = torch.float32 if X.itemsize == 4 else torch.float64
    out = torch.empty(-(-F // size), num_atoms, C, size, dtype=dtype).numpy()  # aligned, unlike NumPy's
    pack(X.size, np.ascontiguousarray(X), out)
    return out


@moving
def pack_both(job, x, v, out):
    """Scalars (N, F) and vectors (N, 3, F) behind them in blocks of channels, (B, N, 4, 2 lanes)."""
    (num_atoms, F), W = x.shape, lanes_that_divide(out, x.shape[1])
    s, vector, o = x.reshape(-1), v.reshape(-1), out.reshape(-1)
    for i in claimed(job, num_atoms):
        for n in range(2 * out.shape[0]):
            to, f = (n // 2 * num_atoms + i) * 8 * W + n % 2 * W, n * W
            if f < F:
                store(o, to, load(s, i * F + f))
                for c in range(3):
                    store(o, to + (c + 1) * 2 * W, load(vector, (3 * i + c) * F + f))
            else:
                for c in range(4):
                    store(o, to + c * 2 * W, splat(o, 0.0))


# ----------------------------------------------------------------------------------------------- what loops are made of


@inlined
def aligned(size, like):
    """Memory that begins where a cache line does."""
    memory = np.empty(size + 64 // like.itemsize, like.dtype)
    begin = (64 - memory.ctypes.data % 64) % 64 // like.itemsize
    return memory[begin : begin + size]


@inlined
def part_of(g, parts, number):
    """The g-th of about equal parts."""
    return g * number // parts, (g + 1) * number // parts


@inlined
def longest(row_start):
    """Edges of the atom that has max_pairs."""
    found = 0
    for i in range(row_start.shape[0] - 1):
        found = max(found, row_start[i + 1] - row_start[i])
    return found


@inlined
def clear_up_to(values, number, W, z):
    """Zeros in the first numbers, a multiple of a vector."""
    for k in range(0, number, W):
        store(values, k, z)


@inlined
def put_block(o, at, left, a, b, W):
    """Store a block of channels, of which so many are left."""
    store(o, at, a)
    if left > W:
        store(o, at + W, b)


@inlined
def share_of(g, channel_groups, atom_groups, num_blocks, chunk):
    """The blocks of channels and the chunks of the g-th part that a thread claims."""
    chunks = part_of(g // channel_groups, atom_groups, chunk.shape[0] - 1)
    return part_of(g % channel_groups, channel_groups, num_blocks), chunks


@inlined
def blend_rows(t, c, at, a, num, count, w, o, W):
    """:func:`blend` for one pair with any number of rows."""
    for v in range(count):
        value = repeat(c, at) * load(t, a + v * W)
        for k in range(1, num):
            value += repeat(c, at + k) * load(t, a + (k * count + v) * W)
        store(w, o + v * W, value)


@spliced
def blend(t, c, begin, end, place, base, num, count, w, W):
    """w = Σ_k coef_k table[place + k] for pairs of a chunk, (n, count) vectors of channels."""
    S = count * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * num
        if num == 6:
            c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
            c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
            for _ in range(count):
                left = c0 * load(t, a) + c1 * load(t, a + S) + c2 * load(t, a + 2 * S)
                store(w, o, left + (c3 * load(t, a + 3 * S) + c4 * load(t, a + 4 * S) + c5 * load(t, a + 5 * S)))
                a, o = a + W, o + W
        else:
            blend_rows(t, c, at, a, num, count, w, o, W)
            o += S


@spliced
def blend_two(t, c, d, begin, end, place, base, num, count, w, W):
    """:func:`blend` with two sets of coefficients, one result behind the other: (n, 2, count) vectors."""
    S = count * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * num
        if num == 6:
            c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
            c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
            d0, d1, d2 = repeat(d, at), repeat(d, at + 1), repeat(d, at + 2)
            d3, d4, d5 = repeat(d, at + 3), repeat(d, at + 4), repeat(d, at + 5)
            for _ in range(count):
                t0, t1, t2 = load(t, a), load(t, a + S), load(t, a + 2 * S)
                left, steep = c0 * t0 + c1 * t1 + c2 * t2, d0 * t0 + d1 * t1 + d2 * t2
                t0, t1, t2 = load(t, a + 3 * S), load(t, a + 4 * S), load(t, a + 5 * S)
                store(w, o, left + (c3 * t0 + c4 * t1 + c5 * t2))
                store(w, o + S, steep + (d3 * t0 + d4 * t1 + d5 * t2))
                a, o = a + W, o + W
        else:
            blend_rows(t, c, at, a, num, count, w, o, W)
            blend_rows(t, d, at, a, num, count, w, o + S, W)
            o += S
        o += S


@inlined
def spread_rows(t, c, d, at, a, num, count, s, o, W):
    """:func:`spread` for one pair with any number of rows."""
    S = count * W
    for k in range(num):
        value, change = repeat(c, at + k), repeat(d, at + k)
        for v in range(count):
            to, of = a + k * S + v * W, o + v * W
            store(t, to, load(t, to) + value * load(s, of) + change * load(s, of + S))


@spliced
def spread(t, c, d, begin, end, place, base, num, count, s, W):
    """table[place + k] += coef_k s + dcoef_k ds for pairs of a chunk, the adjoint of :func:`blend_two`.

    Neighbouring pairs read the same rows, and a sum would wait for the one before: the two halves take turns.
    """
    S, half = count * W, (end - begin + 1) // 2
    for n in range(end - begin):
        r = n // 2 + n % 2 * half
        o, r = r * 2 * S, begin + r
        a, at = base + item(place, r) * S, r * num
        if num == 6:
            c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
            c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
            d0, d1, d2 = repeat(d, at), repeat(d, at + 1), repeat(d, at + 2)
            d3, d4, d5 = repeat(d, at + 3), repeat(d, at + 4), repeat(d, at + 5)
            for _ in range(count):
                x, y = load(s, o), load(s, o + S)
                store(t, a, load(t, a) + c0 * x + d0 * y)
                store(t, a + S, load(t, a + S) + c1 * x + d1 * y)
                store(t, a + 2 * S, load(t, a + 2 * S) + c2 * x + d2 * y)
                store(t, a + 3 * S, load(t, a + 3 * S) + c3 * x + d3 * y)
                store(t, a + 4 * S, load(t, a + 4 * S) + c4 * x + d4 * y)
                store(t, a + 5 * S, load(t, a + 5 * S) + c5 * x + d5 * y)
                a, o = a + W, o + W
        else:
            spread_rows(t, c, d, at, a, num, count, s, o, W)


@spliced
def put_four(o, at, F, left, v, W, buffer):
    """Store the first four components of an atom, of which ``left`` channels exist."""
    a0, b0, a1, b1, a2, b2, a3, b3 = v
    step, to = (F, at) if left >= 2 * W else (2 * W, 0)
    goal = o if left >= 2 * W else buffer
    store(goal, to, a0)
    store(goal, to + W, b0)
    store(goal, to + step, a1)
    store(goal, to + step + W, b1)
    store(goal, to + 2 * step, a2)
    store(goal, to + 2 * step + W, b2)
    store(goal, to + 3 * step, a3)
    store(goal, to + 3 * step + W, b3)
    if left < 2 * W:
        put_rest(o, at, F, left, 4, W, buffer)


@spliced
def put_five(o, at, F, left, v, W, buffer):
    """Store the last five components of an atom, of which ``left`` channels exist."""
    a0, b0, a1, b1, a2, b2, a3, b3, a4, b4 = v
    at += 4 * F
    step, to = (F, at) if left >= 2 * W else (2 * W, 0)
    goal = o if left >= 2 * W else buffer
    store(goal, to, a0)
    store(goal, to + W, b0)
    store(goal, to + step, a1)
    store(goal, to + step + W, b1)
    store(goal, to + 2 * step, a2)
    store(goal, to + 2 * step + W, b2)
    store(goal, to + 3 * step, a3)
    store(goal, to + 3 * step + W, b3)
    store(goal, to + 4 * step, a4)
    store(goal, to + 4 * step + W, b4)
    if left < 2 * W:
        put_rest(o, at, F, left, 5, W, buffer)


@inlined
def put_rest(o, at, F, left, many, W, buffer):
    """Copy what exists of some components."""
    for c in range(many):
        for k in range(left):
            o[at + c * F + k] = buffer[2 * W * c + k]
