"""Messages, sums of weighted neighbours, with their derivatives."""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.blocks import (
    aligned,
    blend,
    blend_two,
    clear_up_to,
    longest,
    part_of,
    put_block,
    put_five,
    put_four,
    spread,
)
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import item, lanes_that_divide, load, splat, store, total

__all__ = [
    "message_backward",
    "message_reverse",
    "message_sum",
    "message_tangent",
    "scalar_message_backward",
    "scalar_message_reverse",
    "scalar_message_sum",
    "scalar_message_tangent",
]


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
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
                spread(t, c, d, first[n], first[n + 1], place, base, num, 6, s, W)


# -------------------------------------------------------------------------------------------------------------- scalars


@compiled
def scalar_message_sum(job, coef, place, tables, X, sender, slot, chunk, first, row_start, most, sides, ranges, out):
    """out_i = Σ_j w_ij X_j, (N, F), from packed tables and features."""
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), X.reshape(-1), out.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 2 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * 2 * W, 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi = row_start[i], row_start[i + 1]
                    a0, a1, b0, b1 = z, z, z, z
                    for e in range(lo, hi - 1, 2):  # two sums, as one waits for its last addition
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 2 * W
                        a0, a1 = a0 + load(w, k) * load(x, j), a1 + load(w, k + W) * load(x, j + W)
                        j, k = xo + item(sender, e + 1) * 2 * W, item(slot, e + 1) * 2 * W
                        b0, b1 = b0 + load(w, k) * load(x, j), b1 + load(w, k + W) * load(x, j + W)
                    if (hi - lo) % 2 == 1:
                        j, k = xo + item(sender, hi - 1) * 2 * W, item(slot, hi - 1) * 2 * W
                        a0, a1 = a0 + load(w, k) * load(x, j), a1 + load(w, k + W) * load(x, j + W)
                    put_block(o, i * F + f, F - f, a0 + b0, a1 + b1, W)


@compiled
def scalar_message_backward(
    job, coef, slope, place, tables, O, X, sender, slot, chunk, first, row_start, most, sides, ranges, out, out_edge
):
    """Gradients of :func:`scalar_message_sum`: in X, out_i = Σ_j w_ij O_j, and in the distances, w'_ij X_i O_j.

    The sums over the channels of each side are added to ``out_edge`` (S, E).
    """
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    x, grad = X.reshape(-1), O.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, to = aligned(most * 4 * W, X), out_edge[g % sides]
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * 2 * W, 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 2 * W
                    x0, x1 = load(x, mine), load(x, mine + W)
                    a0, a1 = z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                        g0, g1 = load(grad, j), load(grad, j + W)
                        a0, a1 = a0 + load(w, k) * g0, a1 + load(w, k + W) * g1
                        more = total(load(w, k + 2 * W) * (x0 * g0) + load(w, k + 3 * W) * (x1 * g1))
                        to[e] += more
                    put_block(o, i * F + f, F - f, a0, a1, W)


@compiled
def scalar_message_tangent(
    job, coef, dcoef, place, tables, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`scalar_message_sum`.

    With dO for X and O for dX it is the gradient in X of that sum and of its derivative together.
    """
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    x, dx = X.reshape(-1), dX.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 4 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * 2 * W, 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    a0, a1, b0, b1 = z, z, z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                        a0, a1 = a0 + load(w, k) * load(dx, j), a1 + load(w, k + W) * load(dx, j + W)
                        k += 2 * W
                        b0, b1 = b0 + load(w, k) * load(x, j), b1 + load(w, k + W) * load(x, j + W)
                    put_block(o, i * F + f, F - f, a0 + b0, a1 + b1, W)


@compiled
def scalar_message_reverse(
    job, coef, dcoef, place, O, dO, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """Gradients in the table of :func:`scalar_message_sum` and of :func:`scalar_message_tangent`, together.

    table[place + k] = Σ_e coef_k (O_i X_j + dO_i dX_j) + dcoef_k dO_i X_j; ``out`` (T, B, R, 1, 2 lanes) has a packed
    table for each range of receivers.
    """
    B, num_atoms, W = X.shape[0], X.shape[1], lanes_that_divide(X, X.shape[3])
    t, c, d = out.reshape(-1), coef.reshape(-1), dcoef.reshape(-1)
    x, dx, grad, dgrad = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1)
    size = out.shape[2] * 2 * W
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        s = aligned(most * 4 * W, X)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, base = b * num_atoms * 2 * W, (g // sides * B + b) * size
            clear_up_to(t[base : base + size], size, W, z)
            for n in range(chunks[0], chunks[1]):
                clear_up_to(s, (first[n + 1] - first[n]) * 4 * W, W, z)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 2 * W
                    g0, g1, h0, h1 = load(grad, mine), load(grad, mine + W), load(dgrad, mine), load(dgrad, mine + W)
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                        x0, x1 = load(x, j), load(x, j + W)
                        store(s, k, load(s, k) + g0 * x0 + h0 * load(dx, j))
                        store(s, k + W, load(s, k + W) + g1 * x1 + h1 * load(dx, j + W))
                        k += 2 * W
                        store(s, k, load(s, k) + h0 * x0)
                        store(s, k + W, load(s, k + W) + h1 * x1)
                spread(t, c, d, first[n], first[n + 1], place, base, 6, 2, s, W)
