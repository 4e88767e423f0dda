r"""Embedding of atoms in their neighbourhood, with its derivatives.

.. math:: D_i = \sum_j Y(u_{ij}) \odot w_{ij} \odot (Z_{i0} + Z_{j1})

with the nine components Y of a direction, one weight for each of their parts, and factors Z of the elements. Layout,
schedule and indices are those of :mod:`torchmdnet.ops.kernels.loops.blocks`.

=============  ==================  =====================================================================
letters        shape               meaning
=============  ==================  =====================================================================
``Y``, ``dY``  (E, 9)              components of directions and their changes
``Z``          (B, N, 2, 2 W)      packed factors of receivers, Z_0, and of senders, Z_1
``O``, ``dO``  (B, N, 9, 2 W)      packed gradients in D and in dD
``p``, ``q``                       Z_i0 of the two vectors of a block; ``u``, ``r`` are Z_i0 + Z_j1
``w``, ``s``   (pairs, 2, 3, 2 W)  weights of a chunk's pairs with slopes or changes; gradients in these
``out_Y``      (S, E, 8)           gradients in Y beyond the first component, which is constant
=============  ==================  =====================================================================

With :math:`y = \langle O_i, Y_{ij} \rangle` within each part, the gradients are
:math:`\bar Y_{ij} = O_i\, w_{ij} (Z_{i0} + Z_{j1})` summed over channels,
:math:`\bar r_{ij} = \langle w'_{ij}, y\,(Z_{i0} + Z_{j1}) \rangle`, and
:math:`\bar Z_{i0}` and :math:`\bar Z_{j1}` both grow by :math:`\langle w_{ij}, y \rangle` over the parts. The reverse
pass has y = ⟨O_i, Y⟩ + ⟨dO_i, dY⟩ with w, and ⟨dO_i, Y⟩ with dw.
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
    put_five,
    put_four,
    share_of,
    spread,
)
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import item, lanes_that_divide, load, raise_totals, repeat, splat, store, total

__all__ = [
    "embed_backward",
    "embed_reverse",
    "embed_sum",
    "embed_tangent",
]


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
def embed_sum(
    job, coef, place, tables, Y, Z, sender, slot, chunk, first, row_start, max_pairs, channel_groups, atom_groups,
    out,
):  # fmt: skip
    """out_i = Σ_j Y_ij w_ij (Z_i0 + Z_j1), (N, 9, F), from packed tables and factors."""
    B, num_atoms, F, W, num = Z.shape[0], Z.shape[1], out.shape[2], lanes_that_divide(Z, Z.shape[3]), coef.shape[1]
    t, c, f, o, y = tables.reshape(-1), coef.reshape(-1), Z.reshape(-1), out.reshape(-1), Y.reshape(-1)
    z = splat(f, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, buffer = aligned(max_pairs * 6 * W, Z), aligned(10 * W, Z)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            zo, left = b * num_atoms * 4 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at, mine = row_start[i], row_start[i + 1], i * 9 * F + 2 * W * b, zo + i * 4 * W
                    p, q = load(f, mine), load(f, mine + W)
                    v = z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 6 * W
                        u, r = p + load(f, j), q + load(f, j + W)
                        u0, u1, w0, w1 = load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W)
                        v = turn_four(v, y, 9 * e, u * u0, r * u1, u * w0, r * w1)
                    put_four(o, at, F, left, v, W, buffer)
                    v5 = z, z, z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 6 * W + 4 * W
                        u, r = (p + load(f, j)) * load(w, k), (q + load(f, j + W)) * load(w, k + W)
                        v5 = turn_five(v5, y, 9 * e, u, r)
                    put_five(o, at, F, left, v5, W, buffer)


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
    job, coef, slope, place, tables, O, Y, Z, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out_Y, out_edge,
):  # fmt: skip
    """Gradients of :func:`embed_sum` in the components of directions beyond the first, and in the distances.

    ``out_Y`` (S, E, 8) and ``out_edge`` (S, E) hold the sums over the channels of each side.
    """
    B, num_atoms, W, num = O.shape[0], O.shape[1], lanes_that_divide(O, O.shape[3]), coef.shape[1]
    t, c, d, f = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), Z.reshape(-1)
    x, y = O.reshape(-1), Y.reshape(-1)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 12 * W, O)
        to, to_Y = out_edge[g % channel_groups], out_Y[g % channel_groups].reshape(-1)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, zo = b * num_atoms * 18 * W, b * num_atoms * 4 * W
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
    job, coef, dcoef, place, tables, Y, dY, Z, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, out,
):  # fmt: skip
    """out_i = Σ_j (dY_ij w_ij + Y_ij dw_ij) (Z_i0 + Z_j1), the derivative of :func:`embed_sum`."""
    B, num_atoms, F, W, num = Z.shape[0], Z.shape[1], out.shape[2], lanes_that_divide(Z, Z.shape[3]), coef.shape[1]
    t, c, d, f, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), Z.reshape(-1), out.reshape(-1)
    y, dy = Y.reshape(-1), dY.reshape(-1)
    z = splat(f, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, buffer = aligned(max_pairs * 12 * W, Z), aligned(10 * W, Z)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            zo, left = b * num_atoms * 4 * W, F - 2 * W * b
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
                    put_four(o, at, F, left, v, W, buffer)
                    v5 = z, z, z, z, z, z, z, z, z, z
                    for e in range(lo, hi):
                        j, k = zo + item(sender, e) * 4 * W + 2 * W, item(slot, e) * 12 * W + 4 * W
                        u, r = p + load(f, j), q + load(f, j + W)
                        v5 = turn_five(v5, dy, 9 * e, u * load(w, k), r * load(w, k + W))
                        v5 = turn_five(v5, y, 9 * e, u * load(w, k + 6 * W), r * load(w, k + 7 * W))
                    put_five(o, at, F, left, v5, W, buffer)


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
    job, coef, dcoef, place, tables, O, dO, Y, dY, Z, sender, slot, chunk, first, row_start, max_pairs,
    channel_groups, atom_groups, out, out_Z,
):  # fmt: skip
    """Gradients of :func:`embed_sum` and of :func:`embed_tangent` together.

    In the table, as in ``message_reverse``, and in the factors: (T, B, R, 3, 2 lanes) and (T, B, N, 2, 2 lanes) for
    T atom_groups of receivers.
    """
    B, num_atoms, W, num = O.shape[0], O.shape[1], lanes_that_divide(O, O.shape[3]), coef.shape[1]
    t, c, d, f = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), Z.reshape(-1)
    x, dx, y, dy = O.reshape(-1), dO.reshape(-1), Y.reshape(-1), dY.reshape(-1)
    o, oz = out.reshape(-1), out_Z.reshape(-1)
    size = out.shape[2] * 6 * W
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, s = aligned(max_pairs * 12 * W, O), aligned(max_pairs * 12 * W, O)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, zo, copy = b * num_atoms * 18 * W, b * num_atoms * 4 * W, g // channel_groups * B + b
            base, to = copy * size, copy * num_atoms * 4 * W
            for k in range(base, base + size, W):
                store(o, k, z)
            for k in range(to, to + num_atoms * 4 * W, W):
                store(oz, k, z)
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 6 * W, num, 6, w, W)
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
                spread(o, c, d, first[n], first[n + 1], place, base, num, 6, s, W)
