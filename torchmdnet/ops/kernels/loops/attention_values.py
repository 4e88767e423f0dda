r"""Attention: sums of weighted values, with their derivatives.

.. math::
    m_i = \sum_j a_{ij}\, w^0_{ij} V_{j0}, \qquad
    \mu_i = \sum_j u_{ij}\, w^1_{ij} V_{j1} + w^2_{ij} V_{j,2 \ldots 4}

with attention a from :mod:`torchmdnet.ops.kernels.loops.attention_keys`. Layout, schedule and indices are those of
:mod:`torchmdnet.ops.kernels.loops.blocks`; channels are whole vectors, and coefficients six.

============  ===================  ================================================================================
letters       shape                meaning
============  ===================  ================================================================================
``V``         (B, N, C, 2 W)       packed: 1 weighted by a, 2 with one along u, 5 with a vector too
``tables``    (B, R, L, 2 W)       packed filters w^0, w^1, w^2; L = 1, 2 or 3
``weight``    (H, E')              a of heads of ``width`` vectors; ``left``, ``right`` a block's rows
``u``, ``y``  (E, 4)               directions with a zero behind them
``O``         (B, N, 1 or 4, 2 W)  packed gradients in m and μ
``pieces``    (S, E')              gradients in a of the opposite edge, summed over a vector or a block of channels
``d``         (edges, 4 or 6, W)   terms of an atom's edges, before they are summed over channels
``half``                           which of the two vectors of a block; the second adds to the terms of the first
============  ===================  ================================================================================

Gradients are those of the messages that atom i sends: V is its own, O that of a neighbour, and a belongs to the edge
j <- i. Its direction is -u_ij, hence ``along`` = -⟨u_ij, O_j⟩ in V_1:

.. math::
    \bar V_{i0} = \sum_j a_{ji} w^0 O_{j0}, \quad \bar V_{i1} = -\sum_j w^1 \langle u_{ij}, O_j \rangle, \quad
    \bar V_{i,2 \ldots 4} = \sum_j w^2 O_{j,1 \ldots 3}, \quad \bar u_{ji} = w^1 V_{i1} O_{j,1 \ldots 3}.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.attention_keys import firsts, heads_of, raise_pair
from torchmdnet.ops.kernels.loops.blocks import aligned, blend, blend_two, longest, put_block, share_of, spread
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import item, lanes_that_divide, load, raise_totals, repeat, splat, store, total

__all__ = [
    "value_backward",
    "value_reverse",
    "value_sum",
    "value_tangent",
]


# The compiler has to know how many vectors of channels there are, to keep them in registers: one filter for scalars,
# two with a direction, three with vectors beside these.


@inlined
def blend_values(t, c, begin, end, place, base, C, w, W):
    """Weights of what is sent, for pairs of a chunk."""
    if C == 1:
        blend(t, c, begin, end, place, base, 6, 2, w, W)
    elif C == 2:
        blend(t, c, begin, end, place, base, 6, 4, w, W)
    else:
        blend(t, c, begin, end, place, base, 6, 6, w, W)


@inlined
def blend_two_values(t, c, d, begin, end, place, base, C, w, W):
    """The same with their slopes or changes."""
    if C == 1:
        blend_two(t, c, d, begin, end, place, base, 6, 2, w, W)
    elif C == 2:
        blend_two(t, c, d, begin, end, place, base, 6, 4, w, W)
    else:
        blend_two(t, c, d, begin, end, place, base, 6, 6, w, W)


@inlined
def spread_values(t, c, d, begin, end, place, base, C, s, W):
    """The adjoint of :func:`blend_two_values` in the table."""
    if C == 1:
        spread(t, c, d, begin, end, place, base, 6, 2, s, W)
    elif C == 2:
        spread(t, c, d, begin, end, place, base, 6, 4, s, W)
    else:
        spread(t, c, d, begin, end, place, base, 6, 6, s, W)


@compiled
def value_sum(
    job, coef, place, tables, weight, V, u, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, width, out, out_v,
):  # fmt: skip
    """What atoms receive: scalars (N, F) and, with directions, vectors (N, 3, F).

    m_i = Σ_j a_ij w_ij V_j0 and μ_i = Σ_j u_ij w_ij V_j1 + w_ij V_j,2...4, each with its own part of w.
    """
    (B, num_atoms, C, _), F = V.shape, out.shape[1]
    W = lanes_that_divide(V, F)
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), V.reshape(-1), out.reshape(-1)
    a, y, ov = weight.reshape(-1), u.reshape(-1), out_v.reshape(-1)
    count = 2 * tables.shape[2]
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * count * W, V)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * C * 2 * W, 2 * W * b
            left, right = heads_of(b, width, weight)
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                blend_values(t, c, begin, end, place, base, C, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 3 * F + f
                    m0, m1 = z, z
                    if C == 1:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 2 * W
                            m0 += repeat(a, left + e) * (load(w, k) * load(x, j))
                            m1 += repeat(a, right + e) * (load(w, k + W) * load(x, j + W))
                        put_block(o, i * F + f, F - f, m0, m1, W)
                        continue
                    a0, a1, b0, b1, c0, c1 = z, z, z, z, z, z
                    if C == 2:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 4 * W, item(slot, e) * 4 * W
                            m0 += repeat(a, left + e) * (load(w, k) * load(x, j))
                            m1 += repeat(a, right + e) * (load(w, k + W) * load(x, j + W))
                            v0, v1 = load(w, k + 2 * W) * load(x, j + 2 * W), load(w, k + 3 * W) * load(x, j + 3 * W)
                            d = repeat(y, 4 * e)
                            a0, a1 = a0 + d * v0, a1 + d * v1
                            d = repeat(y, 4 * e + 1)
                            b0, b1 = b0 + d * v0, b1 + d * v1
                            d = repeat(y, 4 * e + 2)
                            c0, c1 = c0 + d * v0, c1 + d * v1
                    else:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 10 * W, item(slot, e) * 6 * W
                            m0 += repeat(a, left + e) * (load(w, k) * load(x, j))
                            m1 += repeat(a, right + e) * (load(w, k + W) * load(x, j + W))
                            v0, v1 = load(w, k + 2 * W) * load(x, j + 2 * W), load(w, k + 3 * W) * load(x, j + 3 * W)
                            r, s = load(w, k + 4 * W), load(w, k + 5 * W)
                            d = repeat(y, 4 * e)
                            a0, a1 = a0 + d * v0 + r * load(x, j + 4 * W), a1 + d * v1 + s * load(x, j + 5 * W)
                            d = repeat(y, 4 * e + 1)
                            b0, b1 = b0 + d * v0 + r * load(x, j + 6 * W), b1 + d * v1 + s * load(x, j + 7 * W)
                            d = repeat(y, 4 * e + 2)
                            c0, c1 = c0 + d * v0 + r * load(x, j + 8 * W), c1 + d * v1 + s * load(x, j + 9 * W)
                    put_block(o, i * F + f, F - f, m0, m1, W)
                    put_block(ov, at, F - f, a0, a1, W)
                    put_block(ov, at + F, F - f, b0, b1, W)
                    put_block(ov, at + 2 * F, F - f, c0, c1, W)


# Sums over the channels would end each edge with a reduction of a vector, a chain of shuffles. Terms are stored for the
# edges of an atom instead and reduced together, eight at a time where they go to neighbouring numbers.


@inlined
def back_along(x, mine, grad, go, a, head, y, w, wo, sender, slot, reverse, lo, hi, d, half, o, at, F, has_room, W, z):
    """Gradients in the first two components of V, of one vector of channels, and terms of sums over the channels.

    For each edge those of the two vectors of a block for the attention, and then those of the distance and of u,
    to which the second vector of a block adds.
    """
    v, v1 = load(x, mine), load(x, mine + 2 * W)
    m, n = z, z
    for e in range(lo, hi):
        j, k, to = go + item(sender, e) * 8 * W, item(slot, e) * 8 * W + wo, (e - lo) * 6 * W
        s, weight = load(grad, j), repeat(a, head + item(reverse, e))
        m += weight * (load(w, k) * s)
        s *= v
        store(d, to + half * W, load(w, k) * s)
        to += 2 * W
        g0, g1, g2 = load(grad, j + 2 * W), load(grad, j + 4 * W), load(grad, j + 6 * W)
        along = z - (repeat(y, 4 * e) * g0 + repeat(y, 4 * e + 1) * g1 + repeat(y, 4 * e + 2) * g2)
        r = load(w, k + 2 * W)
        n += along * r
        r *= v1
        change = load(w, k + 4 * W) * (weight * s) + load(w, k + 6 * W) * (along * v1)
        if half == 0:
            store(d, to, change)
            store(d, to + W, r * g0)
            store(d, to + 2 * W, r * g1)
            store(d, to + 3 * W, r * g2)
        else:
            store(d, to, load(d, to) + change)
            store(d, to + W, load(d, to + W) + r * g0)
            store(d, to + 2 * W, load(d, to + 2 * W) + r * g1)
            store(d, to + 3 * W, load(d, to + 3 * W) + r * g2)
    if has_room:
        store(o, at, m)
        store(o, at + F, n)


@inlined
def back_vector(x, mine, grad, go, a, head, y, w, wo, sender, slot, reverse, lo, hi, d, half, o, at, F, has_room, W, z):
    """:func:`back_along` of vectors too."""
    v, v1, v2, v3, v4 = (
        load(x, mine), load(x, mine + 2 * W), load(x, mine + 4 * W), load(x, mine + 6 * W), load(x, mine + 8 * W)
    )  # fmt: skip
    m, n, n2, n3, n4 = z, z, z, z, z
    for e in range(lo, hi):
        j, k, to = go + item(sender, e) * 8 * W, item(slot, e) * 12 * W + wo, (e - lo) * 6 * W
        s, weight = load(grad, j), repeat(a, head + item(reverse, e))
        m += weight * (load(w, k) * s)
        s *= v
        store(d, to + half * W, load(w, k) * s)
        to += 2 * W
        change = load(w, k + 6 * W) * (weight * s)
        g0, g1, g2 = load(grad, j + 2 * W), load(grad, j + 4 * W), load(grad, j + 6 * W)
        r = load(w, k + 4 * W)
        n2, n3, n4 = n2 + r * g0, n3 + r * g1, n4 + r * g2
        change += load(w, k + 10 * W) * (g0 * v2 + g1 * v3 + g2 * v4)
        along = z - (repeat(y, 4 * e) * g0 + repeat(y, 4 * e + 1) * g1 + repeat(y, 4 * e + 2) * g2)
        r = load(w, k + 2 * W)
        n += along * r
        r *= v1
        change += load(w, k + 8 * W) * (along * v1)
        if half == 0:
            store(d, to, change)
            store(d, to + W, r * g0)
            store(d, to + 2 * W, r * g1)
            store(d, to + 3 * W, r * g2)
        else:
            store(d, to, load(d, to) + change)
            store(d, to + W, load(d, to + W) + r * g0)
            store(d, to + 2 * W, load(d, to + 2 * W) + r * g1)
            store(d, to + 3 * W, load(d, to + 3 * W) + r * g2)
    if has_room:
        store(o, at, m)
        store(o, at + F, n)
        store(o, at + 2 * F, n2)
        store(o, at + 3 * F, n3)
        store(o, at + 4 * F, n4)


@inlined
def add_terms(d, lo, hi, pieces, at, E, width, out, to, W):
    """Sum what :func:`back_along` left of the edges of an atom over the channels of a block."""
    for e in range(lo, hi):
        k = (e - lo) * 6 * W
        if width == 1:
            pieces[at + e], pieces[at + E + e] = total(load(d, k)), total(load(d, k + W))
        else:
            pieces[at + e] = total(load(d, k) + load(d, k + W))
    for e in range(lo, hi - 1, 2):
        k = (e - lo) * 6 * W + 2 * W
        v0, v1, v2, v3 = load(d, k), load(d, k + W), load(d, k + 2 * W), load(d, k + 3 * W)
        k += 6 * W
        u0, u1, u2, u3 = load(d, k), load(d, k + W), load(d, k + 2 * W), load(d, k + 3 * W)
        raise_totals(out, to + 4 * e, v0, v1, v2, v3, u0, u1, u2, u3)
    if (hi - lo) % 2 == 1:
        for n in range(4):
            out[to + 4 * (hi - 1) + n] += total(load(d, ((hi - 1 - lo) * 6 + 2 + n) * W))


@compiled
def value_backward(
    job, coef, slope, place, tables, weight, V, u, O, sender, reverse, slot, chunk, first, row_start, max_pairs,
    channel_groups, atom_groups, width, out, out_piece, out_edge,
):  # fmt: skip
    """Gradients of :func:`value_sum`, given that of its result: in V, out (N, C, F), and of edges.

    ``out_piece`` (S, E') is the gradient in the attention of the opposite edge, in pieces. To ``out_edge``
    (T, E, 1 or 4) each side adds those in its distance and in the three components of its u.
    """
    (B, num_atoms, C, _), F = V.shape, out.shape[2]
    W = lanes_that_divide(V, F)
    E, num_edges = weight.shape[1], u.shape[0]
    t, c, s, x, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), V.reshape(-1), out.reshape(-1)
    a, y, grad, op, oe = weight.reshape(-1), u.reshape(-1), O.reshape(-1), out_piece.reshape(-1), out_edge.reshape(-1)
    count, sums = 2 * tables.shape[2], out_edge.shape[2]
    z, edges = splat(x, 0.0), longest(row_start)
    for g in claimed(job, channel_groups * atom_groups):
        w, d = aligned(max_pairs * 2 * count * W, V), aligned(edges * 6 * W, V)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        to = g % channel_groups * num_edges * sums
        for b in range(blocks[0], blocks[1]):
            xo, go, f = b * num_atoms * C * 2 * W, b * num_atoms * O.shape[2] * 2 * W, 2 * W * b
            left, right = heads_of(b, width, weight)
            has_room, at_piece = F - f > W, (2 * b if width == 1 else b) * E
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                blend_two_values(t, c, s, begin, end, place, base, C, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at, mine = row_start[i], row_start[i + 1], i * C * F + f, xo + i * C * 2 * W
                    if C == 1:
                        v0, v1 = load(x, mine), load(x, mine + W)
                        m0, m1 = z, z
                        for e in range(lo, hi):
                            j, k, r = go + item(sender, e) * 2 * W, item(slot, e) * 4 * W, item(reverse, e)
                            s0, s1, w0, w1 = load(grad, j), load(grad, j + W), load(w, k), load(w, k + W)
                            a0, a1 = repeat(a, left + r), repeat(a, right + r)
                            m0, m1 = m0 + a0 * (w0 * s0), m1 + a1 * (w1 * s1)
                            s0, s1 = s0 * v0, s1 * v1
                            if width == 1:
                                op[at_piece + e], op[at_piece + E + e] = total(w0 * s0), total(w1 * s1)
                            else:
                                op[at_piece + e] = total(w0 * s0 + w1 * s1)
                            oe[to + e] += total(load(w, k + 2 * W) * (a0 * s0) + load(w, k + 3 * W) * (a1 * s1))
                        put_block(o, at, F - f, m0, m1, W)
                        continue
                    if C == 2:
                        back_along(
                            x, mine, grad, go, a, left, y, w, 0, sender, slot, reverse, lo, hi, d, 0, o, at, F,
                            True, W, z,
                        )  # fmt: skip
                        back_along(
                            x, mine + W, grad, go + W, a, right, y, w, W, sender, slot, reverse, lo, hi, d, 1, o,
                            at + W, F, has_room, W, z,
                        )  # fmt: skip
                    else:
                        back_vector(
                            x, mine, grad, go, a, left, y, w, 0, sender, slot, reverse, lo, hi, d, 0, o, at, F,
                            True, W, z,
                        )  # fmt: skip
                        back_vector(
                            x, mine + W, grad, go + W, a, right, y, w, W, sender, slot, reverse, lo, hi, d, 1, o,
                            at + W, F, has_room, W, z,
                        )  # fmt: skip
                    add_terms(d, lo, hi, op, at_piece, E, width, oe, to, W)


@compiled
def value_tangent(
    job, coef, dcoef, place, tables, weight, dweight, V, dV, u, du, sender, slot, chunk, first, row_start, max_pairs,
    channel_groups, atom_groups, width, out, out_v,
):  # fmt: skip
    """dm (N, F) and, with directions, dμ (N, 3, F)."""
    (B, num_atoms, C, _), F = V.shape, out.shape[1]
    W = lanes_that_divide(V, F)
    t, c, s, x, dx, o = (
        tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), V.reshape(-1), dV.reshape(-1), out.reshape(-1)
    )  # fmt: skip
    a, da, y, dy = weight.reshape(-1), dweight.reshape(-1), u.reshape(-1), du.reshape(-1)
    count, ov = 2 * tables.shape[2], out_v.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 2 * count * W, V)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * C * 2 * W, 2 * W * b
            left, right = heads_of(b, width, weight)
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                blend_two_values(t, c, s, begin, end, place, base, C, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 3 * F + f
                    m0, m1 = z, z
                    if C == 1:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                            v0, v1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                            m0 += repeat(da, left + e) * (w0 * v0)
                            m0 += repeat(a, left + e) * (w0 * load(dx, j) + load(w, k + 2 * W) * v0)
                            m1 += repeat(da, right + e) * (w1 * v1)
                            m1 += repeat(a, right + e) * (w1 * load(dx, j + W) + load(w, k + 3 * W) * v1)
                        put_block(o, i * F + f, F - f, m0, m1, W)
                        continue
                    a0, a1, b0, b1, c0, c1 = z, z, z, z, z, z
                    if C == 2:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 4 * W, item(slot, e) * 8 * W
                            v0, v1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                            m0 += repeat(da, left + e) * (w0 * v0)
                            m0 += repeat(a, left + e) * (w0 * load(dx, j) + load(w, k + 4 * W) * v0)
                            m1 += repeat(da, right + e) * (w1 * v1)
                            m1 += repeat(a, right + e) * (w1 * load(dx, j + W) + load(w, k + 5 * W) * v1)
                            j, k = j + 2 * W, k + 2 * W
                            v0, v1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                            g0, g1 = w0 * load(dx, j), w1 * load(dx, j + W)
                            g0, g1 = g0 + load(w, k + 4 * W) * v0, g1 + load(w, k + 5 * W) * v1
                            v0, v1 = w0 * v0, w1 * v1
                            d, r = repeat(y, 4 * e), repeat(dy, 4 * e)
                            a0, a1 = a0 + d * g0 + r * v0, a1 + d * g1 + r * v1
                            d, r = repeat(y, 4 * e + 1), repeat(dy, 4 * e + 1)
                            b0, b1 = b0 + d * g0 + r * v0, b1 + d * g1 + r * v1
                            d, r = repeat(y, 4 * e + 2), repeat(dy, 4 * e + 2)
                            c0, c1 = c0 + d * g0 + r * v0, c1 + d * g1 + r * v1
                    else:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 10 * W, item(slot, e) * 12 * W
                            v0, v1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                            m0 += repeat(da, left + e) * (w0 * v0)
                            m0 += repeat(a, left + e) * (w0 * load(dx, j) + load(w, k + 6 * W) * v0)
                            m1 += repeat(da, right + e) * (w1 * v1)
                            m1 += repeat(a, right + e) * (w1 * load(dx, j + W) + load(w, k + 7 * W) * v1)
                            j, k = j + 2 * W, k + 2 * W
                            v0, v1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                            g0, g1 = w0 * load(dx, j), w1 * load(dx, j + W)
                            g0, g1 = g0 + load(w, k + 6 * W) * v0, g1 + load(w, k + 7 * W) * v1
                            v0, v1 = w0 * v0, w1 * v1
                            d, r = repeat(y, 4 * e), repeat(dy, 4 * e)
                            a0, a1 = a0 + d * g0 + r * v0, a1 + d * g1 + r * v1
                            d, r = repeat(y, 4 * e + 1), repeat(dy, 4 * e + 1)
                            b0, b1 = b0 + d * g0 + r * v0, b1 + d * g1 + r * v1
                            d, r = repeat(y, 4 * e + 2), repeat(dy, 4 * e + 2)
                            c0, c1 = c0 + d * g0 + r * v0, c1 + d * g1 + r * v1
                            j, k = j + 2 * W, k + 2 * W
                            w0, w1, g0, g1 = load(w, k), load(w, k + W), load(w, k + 6 * W), load(w, k + 7 * W)
                            a0, a1 = a0 + w0 * load(dx, j), a1 + w1 * load(dx, j + W)
                            a0, a1 = a0 + g0 * load(x, j), a1 + g1 * load(x, j + W)
                            b0, b1 = b0 + w0 * load(dx, j + 2 * W), b1 + w1 * load(dx, j + 3 * W)
                            b0, b1 = b0 + g0 * load(x, j + 2 * W), b1 + g1 * load(x, j + 3 * W)
                            c0, c1 = c0 + w0 * load(dx, j + 4 * W), c1 + w1 * load(dx, j + 5 * W)
                            c0, c1 = c0 + g0 * load(x, j + 4 * W), c1 + g1 * load(x, j + 5 * W)
                    put_block(o, i * F + f, F - f, m0, m1, W)
                    put_block(ov, at, F - f, a0, a1, W)
                    put_block(ov, at + F, F - f, b0, b1, W)
                    put_block(ov, at + 2 * F, F - f, c0, c1, W)


# One vector of channels of atom i, which sends to all its neighbours j: V is its own, O that of a neighbour, and a, u
# and du belong to the edge j <- i. Its u is that of i <- j turned round; changes of the two may be any.
#   in V_0      a w O + (da w + a dw) dO = w g + dw h     with g = a O + da dO, h = a dO
#   in V_1      w (u O + du dO) + dw (u dO) = w g + dw h  with g = u O + du dO, h = u dO
#   in V_2..4   w O + dw dO                               with g = O,           h = dO
#   in w        V g + dV h, and in dw V h
#   in a        V (w O + dw dO) + dV w dO, and in da V w dO


@inlined
def reverse_scalar(v, dv, O, dO, a, da, w, k, s, step, is_new, d, to, W):
    """The first component for an edge: terms of gradients in a and da go to d, in w and dw to s.

    Returns:
        The gradient in V_0.
    """
    u, r = load(w, k), load(w, k + step)
    along = u * dO
    store(d, to, v * (u * O + r * dO) + dv * along)
    store(d, to + W, v * along)
    g, h = a * O + da * dO, a * dO
    raise_pair(s, k, step, v * g + dv * h, v * h, is_new)
    return u * g + r * h


@inlined
def reverse_along(
    x, dx, mine, grad, dgrad, go, a, da, head, y, dy, w, s, wo, sender, slot, reverse, fresh, start, lo, hi, d, half,
    o, at, F, has_room, W, z,
):  # fmt: skip
    """Gradients in V_0 and V_1, terms of those in a and da of each edge, and those in w and dw."""
    v, v1, dv, dv1 = load(x, mine), load(x, mine + 2 * W), load(dx, mine), load(dx, mine + 2 * W)
    m, n = z, z
    for e in range(lo, hi):
        j, k, r = go + item(sender, e) * 8 * W, item(slot, e) * 8 * W + wo, item(reverse, e)
        is_new, p, to = item(fresh, e - start) != 0, head + r, (e - lo) * 4 * W + half * 2 * W
        c, dc = load(grad, j), load(dgrad, j)
        m += reverse_scalar(v, dv, c, dc, repeat(a, p), repeat(da, p), w, k, s, 4 * W, is_new, d, to, W)
        u0, u1, u2 = repeat(y, 4 * e), repeat(y, 4 * e + 1), repeat(y, 4 * e + 2)
        c0, c1, c2 = load(dgrad, j + 2 * W), load(dgrad, j + 4 * W), load(dgrad, j + 6 * W)
        g = repeat(dy, 4 * r) * c0 + repeat(dy, 4 * r + 1) * c1 + repeat(dy, 4 * r + 2) * c2
        h = z - (u0 * c0 + u1 * c1 + u2 * c2)
        g -= u0 * load(grad, j + 2 * W) + u1 * load(grad, j + 4 * W) + u2 * load(grad, j + 6 * W)
        k += 2 * W
        n += load(w, k) * g + load(w, k + 4 * W) * h
        raise_pair(s, k, 4 * W, v1 * g + dv1 * h, v1 * h, is_new)
    if has_room:
        store(o, at, m)
        store(o, at + F, n)


@inlined
def reverse_vector(
    x, dx, mine, grad, dgrad, go, a, da, head, y, dy, w, s, wo, sender, slot, reverse, fresh, start, lo, hi, d, half,
    o, at, F, has_room, W, z,
):  # fmt: skip
    """:func:`reverse_along` of vectors too."""
    v, v1, v2, v3, v4 = (
        load(x, mine), load(x, mine + 2 * W), load(x, mine + 4 * W), load(x, mine + 6 * W), load(x, mine + 8 * W)
    )  # fmt: skip
    dv, dv1, dv2, dv3, dv4 = (
        load(dx, mine), load(dx, mine + 2 * W), load(dx, mine + 4 * W), load(dx, mine + 6 * W), load(dx, mine + 8 * W)
    )  # fmt: skip
    m, n, n2, n3, n4 = z, z, z, z, z
    for e in range(lo, hi):
        j, k, r = go + item(sender, e) * 8 * W, item(slot, e) * 12 * W + wo, item(reverse, e)
        is_new, p, to = item(fresh, e - start) != 0, head + r, (e - lo) * 4 * W + half * 2 * W
        c, dc = load(grad, j), load(dgrad, j)
        m += reverse_scalar(v, dv, c, dc, repeat(a, p), repeat(da, p), w, k, s, 6 * W, is_new, d, to, W)
        b0, b1, b2 = load(grad, j + 2 * W), load(grad, j + 4 * W), load(grad, j + 6 * W)
        c0, c1, c2 = load(dgrad, j + 2 * W), load(dgrad, j + 4 * W), load(dgrad, j + 6 * W)
        u, q = load(w, k + 4 * W), load(w, k + 10 * W)
        n2, n3, n4 = n2 + u * b0 + q * c0, n3 + u * b1 + q * c1, n4 + u * b2 + q * c2
        h = v2 * c0 + v3 * c1 + v4 * c2
        raise_pair(s, k + 4 * W, 6 * W, v2 * b0 + v3 * b1 + v4 * b2 + (dv2 * c0 + dv3 * c1 + dv4 * c2), h, is_new)
        u0, u1, u2 = repeat(y, 4 * e), repeat(y, 4 * e + 1), repeat(y, 4 * e + 2)
        g = repeat(dy, 4 * r) * c0 + repeat(dy, 4 * r + 1) * c1 + repeat(dy, 4 * r + 2) * c2
        h = z - (u0 * c0 + u1 * c1 + u2 * c2)
        g -= u0 * b0 + u1 * b1 + u2 * b2
        k += 2 * W
        n += load(w, k) * g + load(w, k + 6 * W) * h
        raise_pair(s, k, 6 * W, v1 * g + dv1 * h, v1 * h, is_new)
    if has_room:
        store(o, at, m)
        store(o, at + F, n)
        store(o, at + 2 * F, n2)
        store(o, at + 3 * F, n3)
        store(o, at + 4 * F, n4)


@inlined
def put_pieces(d, lo, hi, pieces, dpieces, at, E, width, W):
    """Sum terms of gradients in a and da over the channels of a vector or of a block."""
    for e in range(lo, hi):
        k = (e - lo) * 4 * W
        if width == 1:
            pieces[at + e], dpieces[at + e] = total(load(d, k)), total(load(d, k + W))
            pieces[at + E + e], dpieces[at + E + e] = total(load(d, k + 2 * W)), total(load(d, k + 3 * W))
        else:
            pieces[at + e] = total(load(d, k) + load(d, k + 2 * W))
            dpieces[at + e] = total(load(d, k + W) + load(d, k + 3 * W))


@compiled
def value_reverse(
    job, coef, dcoef, place, tables, weight, dweight, V, dV, u, du, O, dO, sender, reverse, slot, chunk, first,
    row_start, max_pairs, channel_groups, atom_groups, width, out, out_pieces, out_dpieces, out_table,
):  # fmt: skip
    """Gradients of m, μ and of dm, dμ in V, out (N, C, F), in the table, and in a and da of the opposite edge."""
    (B, num_atoms, C, _), F = V.shape, out.shape[2]
    W, E, count = lanes_that_divide(V, F), weight.shape[1], 2 * tables.shape[2]
    t, c, s, x, dx, o = (
        tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), V.reshape(-1), dV.reshape(-1), out.reshape(-1)
    )  # fmt: skip
    a, da, y, dy = weight.reshape(-1), dweight.reshape(-1), u.reshape(-1), du.reshape(-1)
    grad, dgrad, op, odp, ot = (
        O.reshape(-1), dO.reshape(-1), out_pieces.reshape(-1), out_dpieces.reshape(-1), out_table.reshape(-1)
    )  # fmt: skip
    z, edges, size = splat(x, 0.0), longest(row_start), tables.shape[1] * count * W
    for g in claimed(job, channel_groups * atom_groups):
        w, of_w, d = (
            aligned(max_pairs * 2 * count * W, V),
            aligned(max_pairs * 2 * count * W, V),
            aligned(edges * 4 * W, V),
        )
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        fresh, start = firsts(slot, chunk, chunks[0], chunks[1], row_start, max_pairs), row_start[chunk[chunks[0]]]
        for b in range(blocks[0], blocks[1]):
            xo, go, f = b * num_atoms * C * 2 * W, b * num_atoms * O.shape[2] * 2 * W, 2 * W * b
            left, right = heads_of(b, width, weight)
            has_room, at_piece, to = F - f > W, (2 * b if width == 1 else b) * E, (g // channel_groups * B + b) * size
            for k in range(to, to + size, W):
                store(ot, k, z)
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * size
                blend_two_values(t, c, s, begin, end, place, base, C, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at, mine = row_start[i], row_start[i + 1], i * C * F + f, xo + i * C * 2 * W
                    if C == 1:
                        v0, v1, dv0, dv1 = load(x, mine), load(x, mine + W), load(dx, mine), load(dx, mine + W)
                        m0, m1 = z, z
                        for e in range(lo, hi):
                            j, k, r = go + item(sender, e) * 2 * W, item(slot, e) * 4 * W, item(reverse, e)
                            q, p, is_new = (e - lo) * 4 * W, left + r, item(fresh, e - start) != 0
                            m0 += reverse_scalar(
                                v0, dv0, load(grad, j), load(dgrad, j), repeat(a, p), repeat(da, p), w, k, of_w, 2 * W,
                                is_new, d, q, W,
                            )  # fmt: skip
                            j, k, q, p = j + W, k + W, q + 2 * W, right + r
                            m1 += reverse_scalar(
                                v1, dv1, load(grad, j), load(dgrad, j), repeat(a, p), repeat(da, p), w, k, of_w, 2 * W,
                                is_new, d, q, W,
                            )  # fmt: skip
                        put_block(o, at, F - f, m0, m1, W)
                    elif C == 2:
                        reverse_along(
                            x, dx, mine, grad, dgrad, go, a, da, left, y, dy, w, of_w, 0, sender, slot, reverse, fresh,
                            start, lo, hi, d, 0, o, at, F, True, W, z,
                        )  # fmt: skip
                        reverse_along(
                            x, dx, mine + W, grad, dgrad, go + W, a, da, right, y, dy, w, of_w, W, sender, slot,
                            reverse, fresh, start, lo, hi, d, 1, o, at + W, F, has_room, W, z,
                        )  # fmt: skip
                    else:
                        reverse_vector(
                            x, dx, mine, grad, dgrad, go, a, da, left, y, dy, w, of_w, 0, sender, slot, reverse, fresh,
                            start, lo, hi, d, 0, o, at, F, True, W, z,
                        )  # fmt: skip
                        reverse_vector(
                            x, dx, mine + W, grad, dgrad, go + W, a, da, right, y, dy, w, of_w, W, sender, slot,
                            reverse, fresh, start, lo, hi, d, 1, o, at + W, F, has_room, W, z,
                        )  # fmt: skip
                    put_pieces(d, lo, hi, op, odp, at_piece, E, width, W)
                spread_values(ot, c, s, begin, end, place, to, C, of_w, W)
