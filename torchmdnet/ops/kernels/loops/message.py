r"""Messages, sums of weighted neighbours, with their derivatives.

.. math:: M_i = \sum_j w_{ij} \odot X_j, \qquad w_{ij} = \sum_k c_k(r_{ij})\, T_{g(ij) + k}

of tensors, whose parts of 1 + 3 + 5 components have weights of their own, and of scalars (``scalar_message``). Layout,
schedule and indices are those of :mod:`torchmdnet.ops.kernels.loops.blocks`.

============  ==================  =====================================================================
letters       shape               meaning
============  ==================  =====================================================================
``X``, ``O``  (B, N, C, 2 W)      packed features and gradients in M; C = 9, or 1 for scalars
``tables``    (B, R, L, 2 W)      packed table; L = 3 parts, or 1 for scalars
``out``       (N, C, F)           M, or the gradient in X
``w``         (pairs, L, 2 W)     weights of a chunk's pairs; behind each the slopes w' or changes dw
``s``         (pairs, 2, L, 2 W)  gradients in w and in dw of a chunk's pairs
``out_edge``  (S, E)              gradients in the distances, summed over the channels of each group
``a``, ``b``                      sums of the first and the second vector of a block, kept in registers
============  ==================  =====================================================================

Both directions of a pair have one weight, so the gradient in X visits the neighbours of an atom as the sum does:

.. math::
    \bar X_i = \sum_j w_{ij} O_j, \qquad
    \bar r_{ij} = \langle w'_{ij},\, X_i \odot O_j \rangle.

Therefore ``out_edge`` at the edge i <- j counts what the distance does to the message from i to j. Then

.. math::
    dM_i = \sum_j w_{ij}\, dX_j + dw_{ij}\, X_j, \qquad
    \bar T_{g + k} = \sum_{ij} c_k\, (O_i X_j + dO_i\, dX_j) + dc_k\, dO_i X_j,

and the gradient of :math:`\langle O, M \rangle + \langle dO, dM \rangle` in X is a tangent too, of dO for X and O for
dX, since its sum over i has the same weights.
"""

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
    put_block,
    put_five,
    put_four,
    share_of,
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


# A block has two vectors of channels, a and b. Nine components of both would need eighteen registers for their sums
# alone, so four are summed over the neighbours first and then the five that are left, from weights in the first cache.


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
def message_sum(
    job, coef, place, tables, X, sender, slot, chunk, first, row_start, max_pairs, channel_groups, atom_groups, out
):
    """out_i = Σ_j w_ij X_j, (N, 9, F), from packed tables and features."""
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), X.reshape(-1), out.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, buffer = aligned(max_pairs * 6 * W, X), aligned(10 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    v = sum_four(x, xo, w, 6 * W, sender, slot, lo, hi, W, z)
                    put_four(o, at, F, left, v, W, buffer)
                    v5 = sum_five(x, xo, w, 6 * W, sender, slot, lo, hi, W, z)
                    put_five(o, at, F, left, v5, W, buffer)


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
    job, coef, slope, place, tables, O, X, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out, out_edge,
):  # fmt: skip
    """Gradients of :func:`message_sum`: in X, out_i = Σ_j w_ij O_j, and in the distances, w'_ij X_i O_j.

    ``out_edge`` (S, E) holds the sums over the channels of each side. Pairs are shared by both
    directions, and out_edge counts what the distance of i and j does to the message from i to j.
    """
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    x, grad = X.reshape(-1), O.reshape(-1)
    z, edges = splat(x, 0.0), longest(row_start)
    for g in claimed(job, channel_groups * atom_groups):
        w, s, buffer = aligned(max_pairs * 12 * W, X), aligned(edges * W, X), aligned(10 * W, X)
        to = out_edge[g % channel_groups]
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    mine = xo + i * 18 * W
                    v = back_four(grad, xo, x, mine, w, sender, slot, lo, hi, s, W, z)
                    put_four(o, at, F, left, v, W, buffer)
                    a0, a1, a2, a3, a4 = back_five(grad, xo, x, mine, w, 4 * W, sender, slot, lo, hi, s, W, z)
                    b0, b1, b2, b3, b4 = back_five(grad, xo + W, x, mine + W, w, 5 * W, sender, slot, lo, hi, s, W, z)
                    v5 = a0, b0, a1, b1, a2, b2, a3, b3, a4, b4
                    put_five(o, at, F, left, v5, W, buffer)
                    # one sum over lanes for each edge, of terms that four and five components have left in s
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
    job, coef, dcoef, place, tables, X, dX, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out,
):  # fmt: skip
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`message_sum`."""
    B, num_atoms, F, W, num = X.shape[0], X.shape[1], out.shape[2], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    x, dx = X.reshape(-1), dX.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, buffer = aligned(max_pairs * 12 * W, X), aligned(10 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, left = b * num_atoms * 18 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b
                    v = change_four(x, dx, xo, w, sender, slot, lo, hi, W, z)
                    put_four(o, at, F, left, v, W, buffer)
                    v5 = change_five(x, dx, xo, w, sender, slot, lo, hi, W, z)
                    put_five(o, at, F, left, v5, W, buffer)


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
    job, coef, dcoef, place, O, dO, X, dX, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out,
):  # fmt: skip
    """Gradients in the table of :func:`message_sum` and of :func:`message_tangent`, together.

    table[place + k] = Σ_e coef_k (O_i X_j + dO_i dX_j) + dcoef_k dO_i X_j; ``out`` (T, B, R, 3, 2 lanes) has a packed
    table for each range of receivers.
    """
    B, num_atoms, W, num = X.shape[0], X.shape[1], lanes_that_divide(X, X.shape[3]), coef.shape[1]
    t, c, d = out.reshape(-1), coef.reshape(-1), dcoef.reshape(-1)
    x, dx, grad, dgrad = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1)
    size = out.shape[2] * 6 * W
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        s = aligned(max_pairs * 12 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, base = b * num_atoms * 18 * W, (g // channel_groups * B + b) * size
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
def scalar_message_sum(
    job, coef, place, tables, X, sender, slot, chunk, first, row_start, max_pairs, channel_groups, atom_groups, out
):
    """out_i = Σ_j w_ij X_j, (N, F), from packed tables and features."""
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), X.reshape(-1), out.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 2 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
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
    job, coef, slope, place, tables, O, X, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out, out_edge,
):  # fmt: skip
    """Gradients of :func:`scalar_message_sum`: in X, out_i = Σ_j w_ij O_j, and in the distances, w'_ij X_i O_j.

    The sums over the channels of each side are added to ``out_edge`` (S, E).
    """
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    x, grad = X.reshape(-1), O.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, to = aligned(max_pairs * 4 * W, X), out_edge[g % channel_groups]
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
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
    job, coef, dcoef, place, tables, X, dX, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out,
):  # fmt: skip
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`scalar_message_sum`.

    With dO for X and O for dX it is the gradient in X of that sum and of its derivative together.
    """
    B, num_atoms, F, W = X.shape[0], X.shape[1], out.shape[1], lanes_that_divide(X, out.shape[1])
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    x, dx = X.reshape(-1), dX.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 4 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
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
    job, coef, dcoef, place, O, dO, X, dX, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out,
):  # fmt: skip
    """Gradients in the table of :func:`scalar_message_sum` and of :func:`scalar_message_tangent`, together.

    table[place + k] = Σ_e coef_k (O_i X_j + dO_i dX_j) + dcoef_k dO_i X_j; ``out`` (T, B, R, 1, 2 lanes) has a packed
    table for each range of receivers.
    """
    B, num_atoms, W = X.shape[0], X.shape[1], lanes_that_divide(X, X.shape[3])
    t, c, d = out.reshape(-1), coef.reshape(-1), dcoef.reshape(-1)
    x, dx, grad, dgrad = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1)
    size = out.shape[2] * 2 * W
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        s = aligned(max_pairs * 4 * W, X)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, base = b * num_atoms * 2 * W, (g // channel_groups * B + b) * size
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
