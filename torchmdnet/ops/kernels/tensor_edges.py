"""Loops over edges for tensors of 1 + 3 + 5 components, with their derivatives.

They are bound by what they read rather than by arithmetic, so everything is arranged for the caches. Channels come in
blocks of a cache line: :func:`pack` brings features (N, C, F) into the layout (B, N, C, 2 lanes), and a table of
filters likewise, in which a block of all atoms and of the whole table stays in the second cache. Receivers are visited
in chunks, see :func:`schedule`: the weights of the pairs of a chunk are made from the table in the order of their
distances, once for both directions where a chunk holds both, and then read by the receivers, whose sums are kept in
registers.

Names: ``coef`` (n, K) are the coefficients of the pairs of all chunks, ``place`` (n,) their first rows in the table,
``slot`` (E,) where in its chunk the pair of an edge is. ``slope`` (n, K) are derivatives of the coefficients in the
distance. Training on forces differentiates the energy along a direction in which the atoms move: names that begin with
d are derivatives along it, and O is a gradient in what a loop makes, dO one in the derivative of that. Threads share
the work as :func:`shares` says.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from torchmdnet.ops.kernels.compiling import called, inlined, spliced
from torchmdnet.ops.kernels.sharing import PARTS_PER_THREAD, claimed, compiled, moving
from torchmdnet.ops.kernels.simd import item, lanes_that_divide, load, raise_totals, repeat, splat, store, total
from torchmdnet.ops.kernels.work import lanes_of

__all__ = [
    "Schedule",
    "block_size",
    "embed_backward",
    "embed_reverse",
    "embed_sum",
    "embed_tangent",
    "message_backward",
    "message_reverse",
    "message_sum",
    "message_tangent",
    "pack",
    "packed",
    "pick",
    "schedule",
    "shares",
]

#: Pairs of a chunk, whose weights stay in the second cache.
ROOM = 512
#: Chunks of receivers for each thread that make it enough to divide these.
MANY = 64


class Schedule(NamedTuple):
    """The order in which edges are visited."""

    rows: Any  # (n,) pairs of all chunks
    slot: Any  # (E,) the place of an edge's pair in its chunk
    chunk: Any  # (C + 1,) receivers of each chunk
    first: Any  # (C + 1,) pairs of each chunk
    most: int  # pairs of the largest chunk


def schedule(cell: Any, row: Any, row_start: Any, num_cells: int) -> Schedule:
    """Divide receivers into chunks.

    Args:
        cell: First row of each pair in the table, (P,).
        row: Pair of each edge, (E,), sorted by receiver.
        row_start: First edge of each receiver, (N + 1,).
        num_cells: The table's rows; 0 if each pair has rows of its own, in which case the order is theirs.
    """
    return Schedule(*divided(cell, row, row_start, ROOM, num_cells))


@called
def divided(cell, row, row_start, room, num_cells):
    """The loop of :func:`schedule`; pairs of a chunk are sorted by counting."""
    num_atoms = row_start.shape[0] - 1
    seen = np.full(cell.shape[0], -1, np.int64)
    rows, slot = np.empty(row.shape[0], np.int64), np.empty(row.shape[0], np.int64)
    chunk, first = np.zeros(num_atoms + 1, np.int64), np.zeros(num_atoms + 1, np.int64)
    count = np.empty(num_cells + 1, np.int64)
    chunks, n, i, most = 0, 0, 0, 0
    while i < num_atoms:
        begin, base = i, n
        while i < num_atoms and (i == begin or n - base + row_start[i + 1] - row_start[i] <= room):
            for e in range(row_start[i], row_start[i + 1]):
                p = row[e]
                if seen[p] < base:
                    seen[p] = n
                    rows[n] = p
                    n += 1
            i += 1
        if num_cells > 0:
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
        chunk[chunks], first[chunks], most = i, n, max(most, n - base)
    return rows[:n].copy(), slot, chunk[: chunks + 1].copy(), first[: chunks + 1].copy(), most


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
    """Into how many parts threads divide blocks of channels, the sides S, and receivers, the ranges T.

    Each thread would best read blocks of its own. But what is made for edges needs memory for every side, so where
    receivers are many only these are divided. There are more parts than threads, so that they end together, except
    where each range has a table of its own and the ``sums`` over all ranges are wanted.
    """
    sides = 1 if num_chunks >= MANY * threads else min(threads, num_blocks)
    if sums or threads == 1:
        return sides, max(threads // sides, 1)
    return sides, max(min(PARTS_PER_THREAD * threads // sides, num_chunks), 1)


@moving
def pack(job, X, out):
    """Channels in blocks: (N, C, F) -> (B, N, C, 2 lanes), with zeros behind the last channel."""
    num_atoms, C, F = X.shape
    x, o, W = X.reshape(-1), out.reshape(-1), lanes_that_divide(out, out.shape[3])
    for i in claimed(job, num_atoms):
        for b in range(out.shape[0]):
            room = F - 2 * W * b
            for c in range(C):
                at, to = (i * C + c) * F + 2 * W * b, ((b * num_atoms + i) * C + c) * 2 * W
                if room >= 2 * W:
                    store(o, to, load(x, at))
                    store(o, to + W, load(x, at + W))
                else:
                    for k in range(2 * W):
                        out[b, i, c, k] = X[i, c, 2 * W * b + k] if k < room else 0.0


def packed(X: Any) -> Any:
    """:func:`pack` into new memory."""
    num_atoms, C, F = X.shape
    size = block_size(X.itemsize)
    dtype = torch.float32 if X.itemsize == 4 else torch.float64
    out = torch.empty(-(-F // size), num_atoms, C, size, dtype=dtype).numpy()  # aligned, unlike NumPy's
    pack(X.size, np.ascontiguousarray(X), out)
    return out


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
def blend(t, c, begin, end, place, base, num, w, W):
    """w = Σ_k coef_k table[place + k] for pairs of a chunk, (n, 3, 2 lanes)."""
    S = 6 * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * num
        if num == 6:
            c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
            c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
            for _ in range(6):
                left = c0 * load(t, a) + c1 * load(t, a + S) + c2 * load(t, a + 2 * S)
                store(w, o, left + (c3 * load(t, a + 3 * S) + c4 * load(t, a + 4 * S) + c5 * load(t, a + 5 * S)))
                a, o = a + W, o + W
        else:
            for _ in range(6):
                value = repeat(c, at) * load(t, a)
                for k in range(1, num):
                    value += repeat(c, at + k) * load(t, a + k * S)
                store(w, o, value)
                a, o = a + W, o + W


@inlined
def blend_two(t, c, d, begin, end, place, base, num, w, W):
    """:func:`blend` with two sets of coefficients, (n, 2, 3, 2 lanes)."""
    S = 6 * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * num
        if num == 6:
            c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
            c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
            d0, d1, d2 = repeat(d, at), repeat(d, at + 1), repeat(d, at + 2)
            d3, d4, d5 = repeat(d, at + 3), repeat(d, at + 4), repeat(d, at + 5)
            for _ in range(6):
                t0, t1, t2 = load(t, a), load(t, a + S), load(t, a + 2 * S)
                left, steep = c0 * t0 + c1 * t1 + c2 * t2, d0 * t0 + d1 * t1 + d2 * t2
                t0, t1, t2 = load(t, a + 3 * S), load(t, a + 4 * S), load(t, a + 5 * S)
                store(w, o, left + (c3 * t0 + c4 * t1 + c5 * t2))
                store(w, o + S, steep + (d3 * t0 + d4 * t1 + d5 * t2))
                a, o = a + W, o + W
        else:
            for _ in range(6):
                value, steep = repeat(c, at) * load(t, a), repeat(d, at) * load(t, a)
                for k in range(1, num):
                    value += repeat(c, at + k) * load(t, a + k * S)
                    steep += repeat(d, at + k) * load(t, a + k * S)
                store(w, o, value)
                store(w, o + S, steep)
                a, o = a + W, o + W
        o += S


@inlined
def spread(t, c, d, begin, end, place, base, num, s, W):
    """table[place + k] += coef_k s + dcoef_k ds for pairs of a chunk, with s and ds (n, 2, 3, 2 lanes)."""
    S = 6 * W
    for r in range(begin, end):
        at, o = r * num, (r - begin) * 2 * S
        for k in range(num):
            a = base + (item(place, r) + k) * S
            value, change = repeat(c, at + k), repeat(d, at + k)
            for v in range(6):
                store(t, a + v * W, load(t, a + v * W) + value * load(s, o + v * W) + change * load(s, o + S + v * W))


@spliced
def put_four(o, at, F, left, v, W, spare):
    """Store the first four components of an atom, of which ``left`` channels exist."""
    a0, b0, a1, b1, a2, b2, a3, b3 = v
    step, to = (F, at) if left >= 2 * W else (2 * W, 0)
    goal = o if left >= 2 * W else spare
    store(goal, to, a0)
    store(goal, to + W, b0)
    store(goal, to + step, a1)
    store(goal, to + step + W, b1)
    store(goal, to + 2 * step, a2)
    store(goal, to + 2 * step + W, b2)
    store(goal, to + 3 * step, a3)
    store(goal, to + 3 * step + W, b3)
    if left < 2 * W:
        put_rest(o, at, F, left, 4, W, spare)


@spliced
def put_five(o, at, F, left, v, W, spare):
    """Store the last five components of an atom, of which ``left`` channels exist."""
    a0, b0, a1, b1, a2, b2, a3, b3, a4, b4 = v
    at += 4 * F
    step, to = (F, at) if left >= 2 * W else (2 * W, 0)
    goal = o if left >= 2 * W else spare
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
        put_rest(o, at, F, left, 5, W, spare)


@inlined
def put_rest(o, at, F, left, many, W, spare):
    """Copy what exists of some components."""
    for c in range(many):
        for k in range(left):
            o[at + c * F + k] = spare[2 * W * c + k]


@inlined
def add_four(v, u0, u1, w0, w1, x, j, W):
    """The first four components += weights times those of a neighbour."""
    a0, b0, a1, b1, a2, b2, a3, b3 = v
    a0 += u0 * load(x, j)
    b0 += u1 * load(x, j + W)
    a1 += w0 * load(x, j + 2 * W)
    b1 += w1 * load(x, j + 3 * W)
    a2 += w0 * load(x, j + 4 * W)
    b2 += w1 * load(x, j + 5 * W)
    a3 += w0 * load(x, j + 6 * W)
    b3 += w1 * load(x, j + 7 * W)
    return a0, b0, a1, b1, a2, b2, a3, b3


@inlined
def add_five(v, u, w, x, j, W):
    """The last five components += weights times those of a neighbour."""
    a0, b0, a1, b1, a2, b2, a3, b3, a4, b4 = v
    a0 += u * load(x, j + 8 * W)
    b0 += w * load(x, j + 9 * W)
    a1 += u * load(x, j + 10 * W)
    b1 += w * load(x, j + 11 * W)
    a2 += u * load(x, j + 12 * W)
    b2 += w * load(x, j + 13 * W)
    a3 += u * load(x, j + 14 * W)
    b3 += w * load(x, j + 15 * W)
    a4 += u * load(x, j + 16 * W)
    b4 += w * load(x, j + 17 * W)
    return a0, b0, a1, b1, a2, b2, a3, b3, a4, b4


@inlined
def sum_four(x, xo, w, stride, sender, slot, lo, hi, W, z):
    """The first four components of Σ_j w_ij X_j."""
    v = z, z, z, z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * stride
        v = add_four(v, load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W), x, j, W)
    return v


@inlined
def sum_five(x, xo, w, stride, sender, slot, lo, hi, W, z):
    """The last five components of Σ_j w_ij X_j."""
    v = z, z, z, z, z, z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * stride
        v = add_five(v, load(w, k + 4 * W), load(w, k + 5 * W), x, j, W)
    return v


@compiled
def message_sum(job, coef, place, tables, X, sender, slot, chunk, first, row_start, most, sides, ranges, out):
    """out_i = Σ_j w_ij X_j, (N, 9, F), from packed tables and features."""
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), X.reshape(-1), out.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, spare = aligned(most * 6 * W, X), aligned(10 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    v = sum_four(x, xo, w, 6 * W, sender, slot, lo, hi, W, z)
                    put_four(o, at, F, left, v, W, spare)
                    v5 = sum_five(x, xo, w, 6 * W, sender, slot, lo, hi, W, z)
                    put_five(o, at, F, left, v5, W, spare)


@inlined
def back_four(g, xo, x, mine, w, sender, slot, lo, hi, d, W, z):
    """The first four components of Σ_j w_ij O_j, and the parts of w'_ij X_i O_j that they make."""
    v = z, z, z, z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * 12 * W
        v = add_four(v, load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W), g, j, W)
        k += 6 * W
        s = load(w, k) * (load(x, mine) * load(g, j)) + load(w, k + W) * (load(x, mine + W) * load(g, j + W))
        left = load(x, mine + 2 * W) * load(g, j + 2 * W) + load(x, mine + 4 * W) * load(g, j + 4 * W)
        right = load(x, mine + 3 * W) * load(g, j + 3 * W) + load(x, mine + 5 * W) * load(g, j + 5 * W)
        s += load(w, k + 2 * W) * (left + load(x, mine + 6 * W) * load(g, j + 6 * W))
        s += load(w, k + 3 * W) * (right + load(x, mine + 7 * W) * load(g, j + 7 * W))
        store(d, (e - lo) * W, s)
    return v


@inlined
def back_five(g, xo, x, mine, w, wo, sender, slot, lo, hi, d, W, z):
    """The last five components, likewise, of one vector of channels, as registers hold; what they make is added."""
    a0, a1, a2, a3, a4 = z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * 12 * W + wo
        u = load(w, k)
        y = load(g, j + 8 * W)
        a0, s = a0 + u * y, load(x, mine + 8 * W) * y
        y = load(g, j + 10 * W)
        a1, s = a1 + u * y, s + load(x, mine + 10 * W) * y
        y = load(g, j + 12 * W)
        a2, s = a2 + u * y, s + load(x, mine + 12 * W) * y
        y = load(g, j + 14 * W)
        a3, s = a3 + u * y, s + load(x, mine + 14 * W) * y
        y = load(g, j + 16 * W)
        a4, s = a4 + u * y, s + load(x, mine + 16 * W) * y
        store(d, (e - lo) * W, load(d, (e - lo) * W) + load(w, k + 6 * W) * s)
    return a0, a1, a2, a3, a4


@inlined
def longest(row_start):
    """Edges of the atom that has most."""
    found = 0
    for i in range(row_start.shape[0] - 1):
        found = max(found, row_start[i + 1] - row_start[i])
    return found


@compiled
def message_backward(
    job, coef, slope, place, tables, O, X, sender, slot, chunk, first, row_start, most, sides, ranges, out, out_edge
):
    """Gradients of :func:`message_sum`: in X, out_i = Σ_j w_ij O_j, and in the distances, w'_ij X_i O_j.

    ``out_edge`` (S, E) holds the sums over the channels of each side. Pairs are shared by both
    directions, and out_edge counts what the distance of i and j does to the message from i to j.
    """
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    x, grad = X.reshape(-1), O.reshape(-1)
    z, edges = splat(x, 0.0), longest(row_start)
    for g in claimed(job, sides * ranges):
        w, s, spare = aligned(most * 12 * W, X), aligned(edges * W, X), aligned(10 * W, X)
        to = out_edge[g % sides]
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    mine = xo + i * 18 * W
                    v = back_four(grad, xo, x, mine, w, sender, slot, lo, hi, s, W, z)
                    put_four(o, at, F, left, v, W, spare)
                    a0, a1, a2, a3, a4 = back_five(grad, xo, x, mine, w, 4 * W, sender, slot, lo, hi, s, W, z)
                    b0, b1, b2, b3, b4 = back_five(grad, xo + W, x, mine + W, w, 5 * W, sender, slot, lo, hi, s, W, z)
                    v5 = a0, b0, a1, b1, a2, b2, a3, b3, a4, b4
                    put_five(o, at, F, left, v5, W, spare)
                    for e in range(lo, hi):
                        more = total(load(s, (e - lo) * W))
                        to[e] = more if b == blocks[0] else to[e] + more


@inlined
def change_four(x, dx, xo, w, sender, slot, lo, hi, W, z):
    """The first four components of Σ_j w_ij dX_j + dw_ij X_j."""
    v = z, z, z, z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * 12 * W
        v = add_four(v, load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W), dx, j, W)
        k += 6 * W
        v = add_four(v, load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W), x, j, W)
    return v


@inlined
def change_five(x, dx, xo, w, sender, slot, lo, hi, W, z):
    """The last five components of Σ_j w_ij dX_j + dw_ij X_j."""
    v = z, z, z, z, z, z, z, z, z, z
    for e in range(lo, hi):
        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * 12 * W + 4 * W
        v = add_five(v, load(w, k), load(w, k + W), dx, j, W)
        v = add_five(v, load(w, k + 6 * W), load(w, k + 7 * W), x, j, W)
    return v


@compiled
def message_tangent(
    job, coef, dcoef, place, tables, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`message_sum`."""
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    x, dx = X.reshape(-1), dX.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, spare = aligned(most * 12 * W, X), aligned(10 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    v = change_four(x, dx, xo, w, sender, slot, lo, hi, W, z)
                    put_four(o, at, F, left, v, W, spare)
                    v5 = change_five(x, dx, xo, w, sender, slot, lo, hi, W, z)
                    put_five(o, at, F, left, v5, W, spare)


@inlined
def raise_overlaps(g, dg, mine, x, dx, j, s, k, W):
    """s += O_i X_j + dO_i dX_j and ds += dO_i X_j by part, for one vector of channels."""
    a, y = load(dg, mine), load(x, j)
    store(s, k, load(s, k) + load(g, mine) * y + a * load(dx, j))
    k += 6 * W
    store(s, k, load(s, k) + a * y)
    mine, j, k = mine + 2 * W, j + 2 * W, k - 4 * W
    v, dv = load(s, k), load(s, k + 6 * W)
    for _ in range(3):
        a, y = load(dg, mine), load(x, j)
        v += load(g, mine) * y + a * load(dx, j)
        dv += a * y
        mine, j = mine + 2 * W, j + 2 * W
    store(s, k, v)
    store(s, k + 6 * W, dv)
    k += 2 * W
    v, dv = load(s, k), load(s, k + 6 * W)
    for _ in range(5):
        a, y = load(dg, mine), load(x, j)
        v += load(g, mine) * y + a * load(dx, j)
        dv += a * y
        mine, j = mine + 2 * W, j + 2 * W
    store(s, k, v)
    store(s, k + 6 * W, dv)


@inlined
def clear_up_to(values, number, W, z):
    """Zeros in the first numbers, a multiple of a vector."""
    for k in range(0, number, W):
        store(values, k, z)


@compiled
def message_reverse(
    job, coef, dcoef, place, O, dO, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """Gradients in the table of :func:`message_sum` and of :func:`message_tangent`, together.

    table[place + k] = Σ_e coef_k (O_i X_j + dO_i dX_j) + dcoef_k dO_i X_j; ``out`` (T, B, R, 3, 2 lanes) has a packed
    table for each range of receivers.
    """
    B, num_atoms, W, num = X.shape[0], X.shape[1], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d = out.reshape(-1), coef.reshape(-1), dcoef.reshape(-1)
    x, dx, grad, dgrad = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1)
    size = out.shape[2] * 6 * W
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        s = aligned(most * 12 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, base = b * num_atoms * 18 * W, (g // sides * B + b) * size
            for k in range(base, base + size, W):
                store(t, k, z)
            for n in range(chunks[0], chunks[1]):
                clear_up_to(s, (first[n + 1] - first[n]) * 12 * W, W, z)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 18 * W
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 18 * W, item(slot, e) * 12 * W
                        raise_overlaps(grad, dgrad, mine, x, dx, j, s, k, W)
                        raise_overlaps(grad, dgrad, mine + W, x, dx, j + W, s, k + W, W)
                spread(t, c, d, first[n], first[n + 1], place, base, num, s, W)


# ------------------------------------------------------------------------------------------------------------ embedding


@inlined
def turn_four(v, y, at, u0, u1, w0, w1):
    """The first four components += those of a direction times weights."""
    a0, b0, a1, b1, a2, b2, a3, b3 = v
    y0, y1, y2, y3 = repeat(y, at), repeat(y, at + 1), repeat(y, at + 2), repeat(y, at + 3)
    return (
        a0 + y0 * u0,
        b0 + y0 * u1,
        a1 + y1 * w0,
        b1 + y1 * w1,
        a2 + y2 * w0,
        b2 + y2 * w1,
        a3 + y3 * w0,
        b3 + y3 * w1,
    )


@inlined
def turn_five(v, y, at, u, w):
    """The last five components += those of a direction times weights."""
    a0, b0, a1, b1, a2, b2, a3, b3, a4, b4 = v
    y0, y1, y2 = repeat(y, at + 4), repeat(y, at + 5), repeat(y, at + 6)
    a0, b0, a1, b1, a2, b2 = a0 + y0 * u, b0 + y0 * w, a1 + y1 * u, b1 + y1 * w, a2 + y2 * u, b2 + y2 * w
    y3, y4 = repeat(y, at + 7), repeat(y, at + 8)
    return a0, b0, a1, b1, a2, b2, a3 + y3 * u, b3 + y3 * w, a4 + y4 * u, b4 + y4 * w


@compiled
def embed_sum(job, coef, place, tables, Y, Z, sender, slot, chunk, first, row_start, most, sides, ranges, out):
    """out_i = Σ_j Y_ij w_ij (Z_i0 + Z_j1), (N, 9, F), from packed tables and factors."""
    B, num_atoms, F, W, num = Z.shape[0], Z.shape[1], out.shape[2], lanes_that_divide(Z, Z.shape[3]), coef.shape[1]
    t, c, f, o, y = tables.reshape(-1), coef.reshape(-1), Z.reshape(-1), out.reshape(-1), Y.reshape(-1)
    z = splat(f, 0.0)
    for g in claimed(job, sides * ranges):
        w, spare = aligned(most * 6 * W, Z), aligned(10 * W, Z)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            zo, left = b * num_atoms * 4 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at, mine = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b, zo + i * 4 * W
                    p, q = load(f, mine), load(f, mine + W)
                    v = z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 6 * W
                        u, r = p + load(f, j), q + load(f, j + W)
                        u0, u1, w0, w1 = load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W)
                        v = turn_four(v, y, 9 * e, u * u0, r * u1, u * w0, r * w1)
                    put_four(o, at, F, left, v, W, spare)
                    v5 = z, z, z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 6 * W + 4 * W
                        u, r = (p + load(f, j)) * load(w, k), (q + load(f, j + W)) * load(w, k + W)
                        v5 = turn_five(v5, y, 9 * e, u, r)
                    put_five(o, at, F, left, v5, W, spare)


@inlined
def nine(x, at, W):
    """Nine components of an atom, one vector of channels."""
    x0, x1, x2, x3, x4 = load(x, at), load(x, at + 2 * W), load(x, at + 4 * W), load(x, at + 6 * W), load(x, at + 8 * W)
    return x0, x1, x2, x3, x4, load(x, at + 10 * W), load(x, at + 12 * W), load(x, at + 14 * W), load(x, at + 16 * W)


@inlined
def onto(y, at, v):
    """Inner products by part of nine components with those of a direction."""
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = v
    first = repeat(y, at) * v0
    second = repeat(y, at + 1) * v1 + repeat(y, at + 2) * v2 + repeat(y, at + 3) * v3
    third = repeat(y, at + 4) * v4 + repeat(y, at + 5) * v5 + repeat(y, at + 6) * v6
    return first, second, third + (repeat(y, at + 7) * v7 + repeat(y, at + 8) * v8)


@compiled
def embed_backward(
    job,
    coef,
    slope,
    place,
    tables,
    O,
    Y,
    Z,
    sender,
    slot,
    chunk,
    first,
    row_start,
    most,
    sides,
    ranges,
    out_Y,
    out_edge,
):
    """Gradients of :func:`embed_sum` in the components of directions beyond the first, and in the distances.

    ``out_Y`` (S, E, 8) and ``out_edge`` (S, E) hold the sums over the channels of each side.
    """
    B, num_atoms, W, num = O.shape[0], O.shape[1], lanes_that_divide(O, O.shape[3]), coef.shape[1]
    t, c, d, f = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), Z.reshape(-1)
    x, y = O.reshape(-1), Y.reshape(-1)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 12 * W, O)
        to, to_Y = out_edge[g % sides], out_Y[g % sides].reshape(-1)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, zo = b * num_atoms * 18 * W, b * num_atoms * 4 * W
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    mine, factor = xo + i * 18 * W, zo + i * 4 * W
                    p, q = load(f, factor), load(f, factor + W)
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 12 * W
                        if b == blocks[0]:
                            to[e] = 0
                            for m in range(8):
                                to_Y[8 * e + m] = 0
                        u, r = p + load(f, j), q + load(f, j + W)
                        _, a1, a2, a3, a4, a5, a6, a7, a8 = left = nine(x, mine, W)
                        _, b1, b2, b3, b4, b5, b6, b7, b8 = right = nine(x, mine + W, W)
                        v, h = u * load(w, k + 2 * W), r * load(w, k + 3 * W)
                        a1, a2, a3 = v * a1 + h * b1, v * a2 + h * b2, v * a3 + h * b3
                        v, h = u * load(w, k + 4 * W), r * load(w, k + 5 * W)
                        a4, a5, a6 = v * a4 + h * b4, v * a5 + h * b5, v * a6 + h * b6
                        raise_totals(to_Y, 8 * e, a1, a2, a3, a4, a5, a6, v * a7 + h * b7, v * a8 + h * b8)
                        k += 6 * W
                        s0, s1, s2 = onto(y, 9 * e, left)
                        s = u * (load(w, k) * s0 + load(w, k + 2 * W) * s1 + load(w, k + 4 * W) * s2)
                        s0, s1, s2 = onto(y, 9 * e, right)
                        s += r * (load(w, k + W) * s0 + load(w, k + 3 * W) * s1 + load(w, k + 5 * W) * s2)
                        to[e] += total(s)


@compiled
def embed_tangent(
    job, coef, dcoef, place, tables, Y, dY, Z, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """out_i = Σ_j (dY_ij w_ij + Y_ij dw_ij) (Z_i0 + Z_j1), the derivative of :func:`embed_sum`."""
    B, num_atoms, F, W, num = Z.shape[0], Z.shape[1], out.shape[2], lanes_that_divide(Z, Z.shape[3]), coef.shape[1]
    t, c, d, f, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), Z.reshape(-1), out.reshape(-1)
    y, dy = Y.reshape(-1), dY.reshape(-1)
    z = splat(f, 0.0)
    for g in claimed(job, sides * ranges):
        w, spare = aligned(most * 12 * W, Z), aligned(10 * W, Z)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            zo, left = b * num_atoms * 4 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at, mine = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b, zo + i * 4 * W
                    p, q = load(f, mine), load(f, mine + W)
                    v = z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 12 * W
                        u, r = p + load(f, j), q + load(f, j + W)
                        u0, u1, w0, w1 = load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W)
                        v = turn_four(v, dy, 9 * e, u * u0, r * u1, u * w0, r * w1)
                        k += 6 * W
                        u0, u1, w0, w1 = load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W)
                        v = turn_four(v, y, 9 * e, u * u0, r * u1, u * w0, r * w1)
                    put_four(o, at, F, left, v, W, spare)
                    v5 = z, z, z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 12 * W + 4 * W
                        u, r = p + load(f, j), q + load(f, j + W)
                        v5 = turn_five(v5, dy, 9 * e, u * load(w, k), r * load(w, k + W))
                        v5 = turn_five(v5, y, 9 * e, u * load(w, k + 6 * W), r * load(w, k + 7 * W))
                    put_five(o, at, F, left, v5, W, spare)


@inlined
def raise_turned(x, dx, at, y, dy, e, u, w, s, k, W):
    """s += Z (O_i Y + dO_i dY) and ds += Z dO_i Y by part, for one vector of channels with the factors Z = u.

    Returns:
        The gradient in the factors.
    """
    change = nine(dx, at, W)
    a0, a1, a2 = onto(y, 9 * e, nine(x, at, W))
    b0, b1, b2 = onto(dy, 9 * e, change)
    a0, a1, a2 = a0 + b0, a1 + b1, a2 + b2
    b0, b1, b2 = onto(y, 9 * e, change)
    store(s, k, load(s, k) + u * a0)
    store(s, k + 2 * W, load(s, k + 2 * W) + u * a1)
    store(s, k + 4 * W, load(s, k + 4 * W) + u * a2)
    v = load(w, k) * a0 + load(w, k + 2 * W) * a1 + load(w, k + 4 * W) * a2
    k += 6 * W
    store(s, k, load(s, k) + u * b0)
    store(s, k + 2 * W, load(s, k + 2 * W) + u * b1)
    store(s, k + 4 * W, load(s, k + 4 * W) + u * b2)
    return v + load(w, k) * b0 + load(w, k + 2 * W) * b1 + load(w, k + 4 * W) * b2


@compiled
def embed_reverse(
    job,
    coef,
    dcoef,
    place,
    tables,
    O,
    dO,
    Y,
    dY,
    Z,
    sender,
    slot,
    chunk,
    first,
    row_start,
    most,
    sides,
    ranges,
    out,
    out_Z,
):
    """Gradients of :func:`embed_sum` and of :func:`embed_tangent` together.

    In the table, as in :func:`message_reverse`, and in the factors: (T, B, R, 3, 2 lanes) and (T, B, N, 2, 2 lanes) for
    T ranges of receivers.
    """
    B, num_atoms, W, num = O.shape[0], O.shape[1], lanes_that_divide(O, O.shape[3]), coef.shape[1]
    t, c, d, f = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), Z.reshape(-1)
    x, dx, y, dy = O.reshape(-1), dO.reshape(-1), Y.reshape(-1), dY.reshape(-1)
    o, oz = out.reshape(-1), out_Z.reshape(-1)
    size = out.shape[2] * 6 * W
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, s = aligned(most * 12 * W, O), aligned(most * 12 * W, O)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, zo, copy = b * num_atoms * 18 * W, b * num_atoms * 4 * W, g // sides * B + b
            base, to = copy * size, copy * num_atoms * 4 * W
            for k in range(base, base + size, W):
                store(o, k, z)
            for k in range(to, to + num_atoms * 4 * W, W):
                store(oz, k, z)
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, w, W)
                clear_up_to(s, (first[n + 1] - first[n]) * 12 * W, W, z)
                for i in range(chunk[n], chunk[n + 1]):
                    mine, my = xo + i * 18 * W, i * 4 * W
                    p, q = load(f, zo + my), load(f, zo + my + W)
                    v, h = z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = item(sender, e) * 4 * W + 2 * W, item(slot, e) * 12 * W
                        u, r = p + load(f, zo + j), q + load(f, zo + j + W)
                        left = raise_turned(x, dx, mine, y, dy, e, u, w, s, k, W)
                        right = raise_turned(x, dx, mine + W, y, dy, e, r, w, s, k + W, W)
                        store(oz, to + j, load(oz, to + j) + left)
                        store(oz, to + j + W, load(oz, to + j + W) + right)
                        v, h = v + left, h + right
                    store(oz, to + my, load(oz, to + my) + v)
                    store(oz, to + my + W, load(oz, to + my + W) + h)
                spread(o, c, d, first[n], first[n + 1], place, base, num, s, W)
