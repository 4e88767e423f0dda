"""Kernels over edges, one program for each receiving atom and block of channels.

The radial weights of an edge are never stored: each kernel makes them from the table of its filter,
w = Σ_k coef_k table[cell + k]. Layout: O and X are (N, C, F), Y is (E, C), Z is (N, 2, F), the table (R, L, F), coef
(P, K), S (E, H). Edges are sorted by receiver, ``row_start`` (N + 1,), and ``rows`` (E,) is the filter row of an edge.

A program works on tiles of EDGES × CHANNELS and sums them over the edges at the end, so the edges of one atom are on
their way together. L = 3 parts stand for C = 9 components, which go together: part 0 has the first, part 1 the next
three, part 2 the last five. With L = 1 there are any number, and a program for each. What an edge receives from
several programs is written apart, to be added by the caller.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["contract_edges", "embed", "embed_factor", "message", "table_items", "table_sum"]


@triton.jit
def load(x, row, f, mask):
    """Channels f of each edge, which begin at the given places: (EDGES, CHANNELS)."""
    return tl.load(x + row[:, None] + f[None, :], mask, 0)


@triton.jit
def others(x, step, mask):
    """Components 1 to 8, which lie so far apart, of where component 0 is."""
    return (
        tl.load(x + step, mask, 0),
        tl.load(x + 2 * step, mask, 0),
        tl.load(x + 3 * step, mask, 0),
        tl.load(x + 4 * step, mask, 0),
        tl.load(x + 5 * step, mask, 0),
        tl.load(x + 6 * step, mask, 0),
        tl.load(x + 7 * step, mask, 0),
        tl.load(x + 8 * step, mask, 0),
    )


@triton.jit
def interpolate(
    coef, table, p, g, s0, s1, s2, out_edge, e, f, is_edge, mask, F,
    L: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Weights Σ_k coef_k table[cell + k] of each part and, while the rows are in registers, their products with s.

    Those, out_edge_ek = Σ_f s_f table[cell + k]_f, are the derivatives in the coefficients.
    """
    w0 = tl.zeros_like(s0)
    w1, w2 = w0, w0
    for k in tl.static_range(K):
        at = (g + k) * (L * F)
        t0 = load(table, at, f, mask)
        if L == 3:
            t1, t2 = load(table, at + F, f, mask), load(table, at + 2 * F, f, mask)
        if WEIGHTS:
            c = tl.load(coef + p * K + k, is_edge, 0)[:, None]
            w0 += c * t0
            if L == 3:
                w1 += c * t1
                w2 += c * t2
        if SLOPES:
            d = s0 * t0
            if L == 3:
                d += s1 * t1 + s2 * t2
            tl.store(out_edge + e * K + k, tl.sum(d, 1), is_edge)
    return w0, w1, w2


@triton.jit(do_not_specialize=["num_edges"], do_not_specialize_on_alignment=["sender", "rows", "row_start", "cell"])
def message(
    coef, cell, table, here, there, S, sender, rows, row_start, out, out_edge, num_edges, F,
    C, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SUMS: tl.constexpr, SLOPES: tl.constexpr,
    EDGES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j w_ij there_j, and the derivatives of here_i · w_ij there_j in the coefficients of every edge.

    With D > 0 channels in a head, each edge has weights S of the heads besides.
    """
    i, c = tl.program_id(0).to(tl.int64), tl.program_id(2)
    f = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (f < F)[None, :]
    first, last = tl.load(row_start + i), tl.load(row_start + i + 1)
    zero = tl.zeros([EDGES, CHANNELS], there.dtype.element_ty)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    if SLOPES:
        out_edge += (tl.program_id(1) * tl.num_programs(2) + c).to(tl.int64) * num_edges * K
        h = here + (i * C + c) * F + f[None, :]
        h0 = tl.load(h, is_channel, 0)
        if L == 3:
            h1, h2, h3, h4, h5, h6, h7, h8 = others(h, F, is_channel)
    for start in range(first, last, EDGES):
        e = start + tl.arange(0, EDGES)
        is_edge = e < last
        mask = is_edge[:, None] & is_channel
        p = tl.load(rows + e, is_edge, 0)
        g = tl.load(cell + p, is_edge, 0)
        x = there + ((tl.load(sender + e, is_edge, 0) * C + c) * F)[:, None] + f[None, :]
        x0 = tl.load(x, mask, 0)
        if D > 0:
            x0 *= tl.load(S + e[:, None] * (F // D) + f[None, :] // D, mask, 0)
        if L == 3:
            x1, x2, x3, x4, x5, x6, x7, x8 = others(x, F, mask)
        s0, s1, s2 = zero, zero, zero
        if SLOPES:
            s0 = h0 * x0
            if L == 3:
                s1 = h1 * x1 + h2 * x2 + h3 * x3
                s2 = h4 * x4 + h5 * x5 + h6 * x6 + h7 * x7 + h8 * x8
        w0, w1, w2 = interpolate(coef, table, p, g, s0, s1, s2, out_edge, e, f, is_edge, mask, F, L, K, SUMS, SLOPES)
        if SUMS:
            a0 += w0 * x0
            if L == 3:
                a1 += w1 * x1
                a2 += w1 * x2
                a3 += w1 * x3
                a4 += w2 * x4
                a5 += w2 * x5
                a6 += w2 * x6
                a7 += w2 * x7
                a8 += w2 * x8
    if SUMS:
        put(out + (i * C + c) * F + f, f < F, F, a0, a1, a2, a3, a4, a5, a6, a7, a8, L)


@triton.jit
def put(out, mask, F, a0, a1, a2, a3, a4, a5, a6, a7, a8, L: tl.constexpr):
    """Store the sums over edges of all components a program has."""
    tl.store(out, tl.sum(a0, 0), mask)
    if L == 3:
        tl.store(out + F, tl.sum(a1, 0), mask)
        tl.store(out + 2 * F, tl.sum(a2, 0), mask)
        tl.store(out + 3 * F, tl.sum(a3, 0), mask)
        tl.store(out + 4 * F, tl.sum(a4, 0), mask)
        tl.store(out + 5 * F, tl.sum(a5, 0), mask)
        tl.store(out + 6 * F, tl.sum(a6, 0), mask)
        tl.store(out + 7 * F, tl.sum(a7, 0), mask)
        tl.store(out + 8 * F, tl.sum(a8, 0), mask)


@triton.jit(do_not_specialize=["num_edges"], do_not_specialize_on_alignment=["sender", "rows", "row_start", "cell"])
def embed(
    coef, cell, table, O, Y, Z, sender, rows, row_start, out, out_Y, out_edge, num_edges, F,
    C, L: tl.constexpr, K: tl.constexpr, SUMS: tl.constexpr, DIRECTIONS: tl.constexpr, SLOPES: tl.constexpr,
    EDGES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Derivatives of O_i · Y_ij w_ij (Z_i0 + Z_j1) in O, summed over the edges, in Y and in the coefficients."""
    i, c = tl.program_id(0).to(tl.int64), tl.program_id(2)
    f = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (f < F)[None, :]
    first, last = tl.load(row_start + i), tl.load(row_start + i + 1)
    zero = tl.zeros([EDGES, CHANNELS], Z.dtype.element_ty)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    if SLOPES:
        out_edge += (tl.program_id(1) * tl.num_programs(2) + c).to(tl.int64) * num_edges * K
    if DIRECTIONS:
        out_Y += tl.program_id(1).to(tl.int64) * num_edges * C
    if SLOPES or DIRECTIONS:
        h = O + (i * C + c) * F + f[None, :]
        h0 = tl.load(h, is_channel, 0)
        if L == 3:
            h1, h2, h3, h4, h5, h6, h7, h8 = others(h, F, is_channel)
    mine = tl.load(Z + 2 * i * F + f[None, :], is_channel, 0)
    for start in range(first, last, EDGES):
        e = start + tl.arange(0, EDGES)
        is_edge = e < last
        mask = is_edge[:, None] & is_channel
        p = tl.load(rows + e, is_edge, 0)
        g = tl.load(cell + p, is_edge, 0)
        factor = mine + load(Z, (2 * tl.load(sender + e, is_edge, 0) + 1) * F, f, mask)
        y = Y + e[:, None] * C + c
        s0, s1, s2 = zero, zero, zero
        if SUMS or SLOPES:
            y0 = tl.load(y, is_edge[:, None], 0)
            if L == 3:
                y1, y2, y3, y4, y5, y6, y7, y8 = others(y, 1, is_edge[:, None])
        if SLOPES:
            s0 = h0 * y0 * factor
            if L == 3:
                s1 = (h1 * y1 + h2 * y2 + h3 * y3) * factor
                s2 = (h4 * y4 + h5 * y5 + h6 * y6 + h7 * y7 + h8 * y8) * factor
        w0, w1, w2 = interpolate(
            coef, table, p, g, s0, s1, s2, out_edge, e, f, is_edge, mask, F, L, K, SUMS or DIRECTIONS, SLOPES
        )
        w0, w1, w2 = w0 * factor, w1 * factor, w2 * factor
        if SUMS:
            a0 += w0 * y0
            if L == 3:
                a1 += w1 * y1
                a2 += w1 * y2
                a3 += w1 * y3
                a4 += w2 * y4
                a5 += w2 * y5
                a6 += w2 * y6
                a7 += w2 * y7
                a8 += w2 * y8
        if DIRECTIONS:
            o = out_Y + e * C + c
            tl.store(o, tl.sum(h0 * w0, 1), is_edge)
            if L == 3:
                tl.store(o + 1, tl.sum(h1 * w1, 1), is_edge)
                tl.store(o + 2, tl.sum(h2 * w1, 1), is_edge)
                tl.store(o + 3, tl.sum(h3 * w1, 1), is_edge)
                tl.store(o + 4, tl.sum(h4 * w2, 1), is_edge)
                tl.store(o + 5, tl.sum(h5 * w2, 1), is_edge)
                tl.store(o + 6, tl.sum(h6 * w2, 1), is_edge)
                tl.store(o + 7, tl.sum(h7 * w2, 1), is_edge)
                tl.store(o + 8, tl.sum(h8 * w2, 1), is_edge)
    if SUMS:
        put(out + (i * C + c) * F + f, f < F, F, a0, a1, a2, a3, a4, a5, a6, a7, a8, L)


@triton.jit
def along(O, Y, i, e, f, is_edge, mask, zero, F, C: tl.constexpr, L: tl.constexpr):
    """s = Σ_c Y_ec O_ic within each part."""
    s0, s1, s2 = zero, zero, zero
    for c in tl.static_range(C):
        s = tl.load(Y + e * C + c, is_edge, 0)[:, None] * load(O, (i * C + c) * F, f, mask)
        if L == 1 or c == 0:
            s0 += s
        elif c < 4:
            s1 += s
        else:
            s2 += s
    return s0, s1, s2


@triton.jit(do_not_specialize_on_alignment=["sender", "row", "back", "reverse", "row_start", "cell"])
def embed_factor(
    coef, cell, table, O, Y, sender, row, back, reverse, row_start, out, F,
    C: tl.constexpr, L: tl.constexpr, K: tl.constexpr, IS_SHARED: tl.constexpr,
    EDGES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out_i0 = Σ_j O_i · Y_ij w_ij and out_i1 = Σ_j O_j · Y_ji w_ji; with IS_SHARED both read the same weights."""
    i = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = (f < F)[None, :]
    first, last = tl.load(row_start + i), tl.load(row_start + i + 1)
    zero = tl.zeros([EDGES, CHANNELS], O.dtype.element_ty)
    received, sent = zero, zero
    for start in range(first, last, EDGES):
        e = start + tl.arange(0, EDGES)
        is_edge = e < last
        mask = is_edge[:, None] & is_channel
        p = tl.load(row + e, is_edge, 0)
        g = tl.load(cell + p, is_edge, 0)
        w0, w1, w2 = interpolate(coef, table, p, g, zero, zero, zero, coef, e, f, is_edge, mask, F, L, K, True, False)
        s0, s1, s2 = along(O, Y, i + 0 * e, e, f, is_edge, mask, zero, F, C, L)
        received += w0 * s0
        if L == 3:
            received += w1 * s1 + w2 * s2
        if not IS_SHARED:
            p = tl.load(back + e, is_edge, 0)
            g = tl.load(cell + p, is_edge, 0)
            w0, w1, w2 = interpolate(
                coef, table, p, g, zero, zero, zero, coef, e, f, is_edge, mask, F, L, K, True, False
            )
        j, r = tl.load(sender + e, is_edge, 0), tl.load(reverse + e, is_edge, 0)
        s0, s1, s2 = along(O, Y, j, r, f, is_edge, mask, zero, F, C, L)
        sent += w0 * s0
        if L == 3:
            sent += w1 * s1 + w2 * s2
    tl.store(out + 2 * i * F + f, tl.sum(received, 0), f < F)
    tl.store(out + (2 * i + 1) * F + f, tl.sum(sent, 0), f < F)


@triton.jit(do_not_specialize_on_alignment=["sender", "rows", "row_start", "cell"])
def contract_edges(
    coef, cell, table, q, k, sender, rows, row_start, out, F,
    D, K: tl.constexpr, EDGES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out_ijh = Σ_d q_i k_j w_ij over the D channels of a head, one program for each atom and head."""
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, CHANNELS)
    f = head * D + d
    is_channel = (d < D)[None, :]
    first, last = tl.load(row_start + i), tl.load(row_start + i + 1)
    zero = tl.zeros([EDGES, CHANNELS], q.dtype.element_ty)
    mine = tl.load(q + i * F + f[None, :], is_channel, 0)
    for start in range(first, last, EDGES):
        e = start + tl.arange(0, EDGES)
        is_edge = e < last
        mask = is_edge[:, None] & is_channel
        p = tl.load(rows + e, is_edge, 0)
        g = tl.load(cell + p, is_edge, 0)
        w, _, _ = interpolate(coef, table, p, g, zero, zero, zero, coef, e, f, is_edge, mask, F, 1, K, True, False)
        s = mine * load(k, tl.load(sender + e, is_edge, 0) * F, f, mask) * w
        tl.store(out + e * tl.num_programs(1) + head, tl.sum(s, 1), is_edge)


# The gradient of the table: edges are sorted by the cell they read and cut into items of one cell and at most SIZE
# edges. Each item is summed by a program of its own, and each row of the table sums the items that touch it, always in
# the same order. Adding straight to the table would take E K L F atomic additions, in an order that changes.


@triton.jit(
    do_not_specialize=["SIZE"],
    do_not_specialize_on_alignment=["order", "receiver", "sender", "row", "item_cell", "item_start", "edge_start"],
)
def table_items(
    coef, O, X, Y, Z, S, order, receiver, sender, row, item_cell, item_start, edge_start, out, F, SIZE,
    C: tl.constexpr, L: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[item, k] = Σ_e coef_k O_i X_j, or where there is no X, Σ_e coef_k O_i Y_ij (Z_i0 + Z_j1)."""
    item = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = f < F
    g = tl.load(item_cell + item)
    first = tl.load(edge_start + g) + (item - tl.load(item_start + g)) * SIZE
    last = tl.minimum(first + SIZE, tl.load(edge_start + g + 1))
    k = tl.arange(0, ROWS)  # K, rounded up
    zero = tl.zeros([ROWS, CHANNELS], O.dtype.element_ty)
    a0, a1, a2 = zero, zero, zero
    for at in range(first, last):
        e = tl.load(order + at)
        i, j, p = tl.load(receiver + e), tl.load(sender + e), tl.load(row + e)
        coefs = tl.load(coef + p * K + k, k < K, 0)[:, None]
        s0 = tl.zeros([CHANNELS], O.dtype.element_ty)
        s1, s2 = s0, s0
        for c in tl.static_range(C):
            s = tl.load(O + (i * C + c) * F + f, mask, 0)
            if X is None:
                s *= tl.load(Y + e * C + c)
            else:
                s *= tl.load(X + (j * C + c) * F + f, mask, 0)
            if L == 1 or c == 0:
                s0 += s
            elif c < 4:
                s1 += s
            else:
                s2 += s
        if X is None:
            coefs_f = coefs * (tl.load(Z + 2 * i * F + f, mask, 0) + tl.load(Z + (2 * j + 1) * F + f, mask, 0))[None, :]
        elif D > 0:
            coefs_f = coefs * tl.load(S + e * (F // D) + f // D, mask, 0)[None, :]
        else:
            coefs_f = coefs
        a0 += coefs_f * s0[None, :]
        if L == 3:
            a1 += coefs_f * s1[None, :]
            a2 += coefs_f * s2[None, :]
    put_at = out + (item * K + k[:, None]) * (L * F) + f[None, :]
    inside = (k < K)[:, None] & mask[None, :]
    tl.store(put_at, a0, inside)
    if L == 3:
        tl.store(put_at + F, a1, inside)
        tl.store(put_at + 2 * F, a2, inside)


@triton.jit(do_not_specialize=["num_cells"], do_not_specialize_on_alignment=["item_start"])
def table_sum(items, item_start, out, num_cells, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """out[r] = Σ_k of the items of cell r - k, their k-th row; a row has ``width`` numbers."""
    r = tl.program_id(0)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    for k in tl.static_range(K):
        g = r - k
        is_cell = (g >= 0) & (g < num_cells)
        first = tl.load(item_start + g, is_cell, 0)
        last = tl.load(item_start + g + 1, is_cell, 0)
        for item in range(first, last):
            total += tl.load(items + (item * K + k) * width + f, f < width, 0)
    tl.store(out + r.to(tl.int64) * width + f, total, f < width)
