r"""Attention differentiated along a direction, and its gradients in weights: what training on forces needs.

The loops of :mod:`torchmdnet.ops.kernels.vector_edges` compute, for each head h and edge i <- j,

.. math:: p = \sum_{f \in h} q_i k_j w, \qquad a = \tau(p)\, C, \qquad m_i = \sum_j a w^0 V_{j0}, \qquad
          \mu_i = \sum_j u w^1 V_{j1} + w^2 V_{j,2 \ldots 4}

with filters :math:`w = \sum_k c_k T_{g + k}` from a table T. Here are two more passes of each. The *tangent* is the
derivative as everything but the tables changes; names that begin with d are such changes. The *reverse* pass makes the
gradients of :math:`\langle O, (m, \mu) \rangle + \langle dO, (dm, d\mu) \rangle` in queries, keys, values and tables.

========================  ================================  ====================================================
letters                   shape                             meaning
========================  ================================  ====================================================
``coef``, ``dcoef``       (n, 6)                            coefficients of the scheduled pairs
``tables``                (B, R, parts, 2 W)                packed filters: of keys 1 part, of values 1, 2 or 3
``Q``, ``K``              (B, N, 1, 2 W)                    packed queries and keys
``V``                     (B, N, C, 2 W)                    packed values; C = 1, 2 or 5 components
``pieces``                (S, E')                           parts of p: of a vector or of a block of channels
``weight``, ``dweight``   (H, E')                           a and its change
``of_pieces``             (S, E')                           gradients in a of the opposite edge, in the same parts
``fade``, ``dfade``       (E',)                             C of each edge and its change
``u``, ``du``             (E, 4)                            directions and their changes
``O``, ``dO``             (B, N, 1 or 4, 2 W)               gradients in m and μ, and in their changes
========================  ================================  ====================================================

Layout, schedule and ``width`` are those of :mod:`torchmdnet.ops.kernels.vector_edges`. Gradients in tables are summed
over the ranges of receivers by the caller: each range has a table of its own, (T, B, R, parts, 2 W).
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import exp, item, lanes_that_divide, load, repeat, splat, store, total
from torchmdnet.ops.kernels.tensor_edges import aligned, longest, part_of
from torchmdnet.ops.kernels.vector_edges import blend_two, put, spread

__all__ = [
    "attention_reverse",
    "attention_tangent",
    "key_reverse",
    "key_tangent",
    "receive_reverse",
    "receive_tangent",
    "send_reverse",
    "send_tangent",
    "value_reverse",
    "value_tangent",
]

#: Parts in which threads share the edges of a head.
PARTS = 8


@inlined
def raise_pair(s, k, step, x, y, is_new):
    """s += x and ds += y, which lies a step behind; or the first terms of a pair."""
    if is_new:
        store(s, k, x)
        store(s, k + step, y)
    else:
        store(s, k, load(s, k) + x)
        store(s, k + step, load(s, k + step) + y)


@inlined
def firsts(slot, chunk, begin, end, row_start, most):
    """For each edge of some chunks, whether it is its pair's first in its chunk; self loops are all of one pair."""
    start = row_start[chunk[begin]]
    found, seen = np.zeros(row_start[chunk[end]] - start, np.int8), np.full(most, -1, np.int64)
    for n in range(begin, end):
        for e in range(row_start[chunk[n]], row_start[chunk[n + 1]]):
            k = slot[e]
            if seen[k] != n:
                seen[k] = n
                found[e - start] = 1
    return found


# ---------------------------------------------------------------------------------------------------------------- keys


@compiled
def key_tangent(
    job, coef, dcoef, place, tables, Q, dQ, K, dK, sender, slot, chunk, first, row_start, most, sides, ranges, width,
    out,
):  # fmt: skip
    """Pieces of dp = Σ q_i (w dk_j + dw k_j) + dq_i w k_j, (S, E')."""
    B, num_atoms, W, E = Q.shape[0], Q.shape[1], lanes_that_divide(Q, Q.shape[3]), out.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    q, dq, x, dx = Q.reshape(-1), dQ.reshape(-1), K.reshape(-1), dK.reshape(-1)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 4 * W, Q)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo = b * num_atoms * 2 * W
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 2 * W
                    q0, q1, p0, p1 = load(q, mine), load(q, mine + W), load(dq, mine), load(dq, mine + W)
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                        x0, x1, w0, w1 = load(x, j), load(x, j + W), load(w, k), load(w, k + W)
                        s0 = q0 * (w0 * load(dx, j) + load(w, k + 2 * W) * x0) + p0 * (w0 * x0)
                        s1 = q1 * (w1 * load(dx, j + W) + load(w, k + 3 * W) * x1) + p1 * (w1 * x1)
                        if width == 1:
                            o[2 * b * E + e], o[2 * b * E + E + e] = total(s0), total(s1)
                        else:
                            o[b * E + e] = total(s0 + s1)


@compiled
def key_reverse(
    job, coef, dcoef, place, tables, of_p, of_dp, Q, dQ, K, dK, sender, reverse, slot, chunk, first, row_start, most,
    sides, ranges, width, out, out_table,
):  # fmt: skip
    """Gradients of p and dp, given those in p and dp of each head, (H, E').

    In queries and keys, the first 2 F numbers of each row of ``out`` (N, ...), and in the table.
    """
    B, num_atoms, L, W, E = Q.shape[0], Q.shape[1], out.shape[1], lanes_that_divide(Q, Q.shape[3]), of_p.shape[1]
    F, size = width * W * of_p.shape[0], tables.shape[1] * 2 * W
    t, c, d, o, to = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1), out_table.reshape(-1)
    q, dq, x, dx = Q.reshape(-1), dQ.reshape(-1), K.reshape(-1), dK.reshape(-1)
    a, da = of_p.reshape(-1), of_dp.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, s = aligned(most * 4 * W, Q), aligned(most * 4 * W, Q)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        fresh, start = firsts(slot, chunk, chunks[0], chunks[1], row_start, most), row_start[chunk[chunks[0]]]
        for b in range(blocks[0], blocks[1]):
            xo, f, base = b * num_atoms * 2 * W, 2 * W * b, (g // sides * B + b) * size
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= of_p.shape[0]:  # beyond the last channel
                right = left
            for k in range(base, base + size, W):
                store(to, k, z)
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * size, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 2 * W
                    q0, q1, p0, p1 = load(q, mine), load(q, mine + W), load(dq, mine), load(dq, mine + W)
                    a0, a1, b0, b1 = z, z, z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k, r = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W, item(reverse, e)
                        w0, w1, e0, e1 = load(w, k), load(w, k + W), load(w, k + 2 * W), load(w, k + 3 * W)
                        is_new = item(fresh, e - start) != 0
                        v, y = load(x, j), repeat(da, left + e)
                        y, v = y * v, repeat(a, left + e) * v + y * load(dx, j)
                        a0 += w0 * v + e0 * y
                        raise_pair(s, k, 2 * W, q0 * v + p0 * y, q0 * y, is_new)
                        v, y = load(x, j + W), repeat(da, right + e)
                        y, v = y * v, repeat(a, right + e) * v + y * load(dx, j + W)
                        a1 += w1 * v + e1 * y
                        raise_pair(s, k + W, 2 * W, q1 * v + p1 * y, q1 * y, is_new)
                        v, y = load(q, j), repeat(da, left + r)
                        b0 += w0 * (repeat(a, left + r) * v + y * load(dq, j)) + e0 * (y * v)
                        v, y = load(q, j + W), repeat(da, right + r)
                        b1 += w1 * (repeat(a, right + r) * v + y * load(dq, j + W)) + e1 * (y * v)
                    put(o, i * L + f, F - f, a0, a1, W)
                    put(o, i * L + F + f, F - f, b0, b1, W)
                spread(to, c, d, first[n], first[n + 1], place, base, 2, s, W)


# ----------------------------------------------------------------------------------------------------------- attention


@compiled
def attention_tangent(job, pieces, dpieces, fade, dfade, out, change):
    """a = τ(p) C and da = τ'(p) C dp + τ(p) dC of each head, (H, E'); τ(p) = p s with s = 1 / (1 + exp(-p))."""
    E, W, H = pieces.shape[1], lanes_that_divide(pieces, pieces.shape[1]), out.shape[0]
    many = pieces.shape[0] // H
    p, dp, o, d = pieces.reshape(-1), dpieces.reshape(-1), out.reshape(-1), change.reshape(-1)
    one, zero = splat(p, 1.0), splat(p, 0.0)
    for g in claimed(job, H * PARTS):
        h, part = g // PARTS, part_of(g % PARTS, PARTS, E // W)
        for e in range(part[0] * W, part[1] * W, W):
            x, dx = load(p, h * many * E + e), load(dp, h * many * E + e)
            for m in range(1, many):
                x += load(p, (h * many + m) * E + e)
                dx += load(dp, (h * many + m) * E + e)
            s, at, c = one / (one + exp(zero - x)), h * E + e, load(fade, e)
            value = x * s
            store(o, at, c * value)
            store(d, at, c * (s * (one + x * (one - s)) * dx) + load(dfade, e) * value)


@compiled
def attention_reverse(job, pieces, dpieces, of_pieces, of_dpieces, reverse, fade, dfade, out, change):
    """Gradients in p, ``out``, and in dp, ``change``, (H, E'), given those in a and da of the opposite edge.

    Those are τ' C o + (τ'' C dp + τ' dC) do and τ' C do; τ' = s (1 + p (1 - s)) and
    τ'' = s (1 - s) (2 + p (1 - 2 s)).
    """
    E, W, H = pieces.shape[1], lanes_that_divide(pieces, pieces.shape[1]), out.shape[0]
    many, num_edges = pieces.shape[0] // H, reverse.shape[0]
    p, dp, o, d = pieces.reshape(-1), dpieces.reshape(-1), out.reshape(-1), change.reshape(-1)
    of_p, of_dp = of_pieces.reshape(-1), of_dpieces.reshape(-1)
    one, zero = splat(p, 1.0), splat(p, 0.0)
    for g in claimed(job, H * PARTS):
        h, part = g // PARTS, part_of(g % PARTS, PARTS, E // W)
        for e in range(part[0] * W, part[1] * W, W):
            x, dx = load(p, h * many * E + e), load(dp, h * many * E + e)
            for m in range(1, many):
                x += load(p, (h * many + m) * E + e)
                dx += load(dp, (h * many + m) * E + e)
            s, at, c = one / (one + exp(zero - x)), h * E + e, load(fade, e)
            rest = one - s
            rise = s * (one + x * rest)
            store(d, at, c * rise)
            store(o, at, c * (s * rest * (one + one + x * (rest - s)) * dx) + load(dfade, e) * rise)
        for e in range(part[0] * W, min(part[1] * W, num_edges)):
            at, r = h * E + e, h * many * E + item(reverse, e)
            grad, dgrad = item(of_p, r), item(of_dp, r)
            for m in range(1, many):
                grad += item(of_p, r + m * E)
                dgrad += item(of_dp, r + m * E)
            slope = item(d, at)
            o[at] = slope * grad + item(o, at) * dgrad
            d[at] = slope * dgrad


# -------------------------------------------------------------------------------------------------------------- values


@compiled
def value_tangent(
    job, coef, dcoef, place, tables, weight, dweight, V, dV, u, du, sender, slot, chunk, first, row_start, most, sides,
    ranges, width, out, out_v,
):  # fmt: skip
    """dm (N, F) and, with directions, dμ (N, 3, F)."""
    (B, num_atoms, C, _), F, E = V.shape, out.shape[1], weight.shape[1]
    W = lanes_that_divide(V, F)
    t, c, s, x, dx, o = (
        tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), V.reshape(-1), dV.reshape(-1), out.reshape(-1)
    )  # fmt: skip
    a, da, y, dy = weight.reshape(-1), dweight.reshape(-1), u.reshape(-1), du.reshape(-1)
    count, ov = 2 * tables.shape[2], out_v.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 2 * count * W, V)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * C * 2 * W, 2 * W * b
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= weight.shape[0]:  # beyond the last channel
                right = left
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                if C == 1:  # the compiler has to know how many vectors there are
                    blend_two(t, c, s, begin, end, place, base, 2, w, W)
                elif C == 2:
                    blend_two(t, c, s, begin, end, place, base, 4, w, W)
                else:
                    blend_two(t, c, s, begin, end, place, base, 6, w, W)
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
                        put(o, i * F + f, F - f, m0, m1, W)
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
                    put(o, i * F + f, F - f, m0, m1, W)
                    put(ov, at, F - f, a0, a1, W)
                    put(ov, at + F, F - f, b0, b1, W)
                    put(ov, at + 2 * F, F - f, c0, c1, W)


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
    row_start, most, sides, ranges, width, out, out_pieces, out_dpieces, out_table,
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
    for g in claimed(job, sides * ranges):
        w, of_w, d = aligned(most * 2 * count * W, V), aligned(most * 2 * count * W, V), aligned(edges * 4 * W, V)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        fresh, start = firsts(slot, chunk, chunks[0], chunks[1], row_start, most), row_start[chunk[chunks[0]]]
        for b in range(blocks[0], blocks[1]):
            xo, go, f = b * num_atoms * C * 2 * W, b * num_atoms * O.shape[2] * 2 * W, 2 * W * b
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= weight.shape[0]:  # beyond the last channel
                right = left
            has_room, at_piece, to = F - f > W, (2 * b if width == 1 else b) * E, (g // sides * B + b) * size
            for k in range(to, to + size, W):
                store(ot, k, z)
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * size
                if C == 1:  # the compiler has to know how many vectors there are
                    blend_two(t, c, s, begin, end, place, base, 2, w, W)
                elif C == 2:
                    blend_two(t, c, s, begin, end, place, base, 4, w, W)
                else:
                    blend_two(t, c, s, begin, end, place, base, 6, w, W)
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
                        put(o, at, F - f, m0, m1, W)
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
                if C == 1:
                    spread(ot, c, s, begin, end, place, to, 2, of_w, W)
                elif C == 2:
                    spread(ot, c, s, begin, end, place, to, 4, of_w, W)
                else:
                    spread(ot, c, s, begin, end, place, to, 6, of_w, W)


# --------------------------------------------------------------------------------------------------------------- atoms


@compiled
def send_tangent(job, projected, dprojected, v, dv, Q, K, V):
    """Changes of queries, keys and V = [values | along directions | factors · v], packed; see ``vector_edges.send``.

    Only vectors make sending other than linear: without them this is ``send`` of the changes.
    """
    (B, num_atoms, _, _), L = V.shape, projected.shape[1]
    F = L // 5
    W = lanes_that_divide(V, F)
    x, dx, vector, change = projected.reshape(-1), dprojected.reshape(-1), v.reshape(-1), dv.reshape(-1)
    q, k, o = Q.reshape(-1), K.reshape(-1), V.reshape(-1)
    z = splat(x, 0.0)
    for i in claimed(job, num_atoms):
        for n in range(2 * B):
            f = i * L + n * W
            to = (n // 2 * num_atoms + i) * 2 * W + n % 2 * W
            at = (n // 2 * num_atoms + i) * 10 * W + n % 2 * W
            if n * W >= F:
                store(q, to, z)
                store(k, to, z)
                for component in range(5):
                    store(o, at + component * 2 * W, z)
                continue
            store(q, to, load(dx, f))
            store(k, to, load(dx, f + F))
            store(o, at, load(dx, f + 2 * F))
            store(o, at + 2 * W, load(dx, f + 4 * F))
            factor, dfactor, f = load(x, f + 3 * F), load(dx, f + 3 * F), i * 3 * F + n * W
            for _ in range(3):
                at += 2 * W
                store(o, at + 2 * W, dfactor * load(vector, f) + factor * load(change, f))
                f += F


@compiled
def send_reverse(job, projected, dprojected, v, dv, grad, dgrad, out, out_v):
    """Gradients beyond those of queries and keys, given those in V and in its change, (N, 5, F).

    Without vectors this is ``send_backward`` of ``grad``.
    """
    num_atoms, _, F = grad.shape
    L, W = out.shape[1], lanes_that_divide(grad, F)
    x, dx, vector, change = projected.reshape(-1), dprojected.reshape(-1), v.reshape(-1), dv.reshape(-1)
    g, dg, o, to = grad.reshape(-1), dgrad.reshape(-1), out.reshape(-1), out_v.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, of, n = i * L + f, i * 5 * F + f, i * 3 * F + f
            store(o, at + 2 * F, load(g, of))
            store(o, at + 4 * F, load(g, of + F))
            factor, dfactor, slope = load(x, at + 3 * F), load(dx, at + 3 * F), splat(x, 0.0)
            for component in range(2, 5):
                a, da = load(g, of + component * F), load(dg, of + component * F)
                slope += a * load(vector, n) + da * load(change, n)
                store(to, n, factor * a + dfactor * da)
                n += F
            store(o, at + 3 * F, slope)


@compiled
def receive_tangent(job, dx, dv, dmu, o, do, projected, dprojected, out_x, out_v):
    """Changes of x + (v1 · v2) o2 + o3 and of v + v3 o1 + μ; see ``vector_edges.receive``."""
    num_atoms, F = dx.shape
    W = lanes_that_divide(dx, F)
    y, dy, p, dp = o.reshape(-1), do.reshape(-1), projected.reshape(-1), dprojected.reshape(-1)
    s, vector, m, to, to_v = dx.reshape(-1), dv.reshape(-1), dmu.reshape(-1), out_x.reshape(-1), out_v.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, n = i * 3 * F + f, i * 9 * F + f
            first, dfirst, dot, change = load(y, at), load(dy, at), splat(s, 0.0), splat(s, 0.0)
            for _ in range(3):
                a, b = load(p, n), load(p, n + F)
                dot += a * b
                change += load(dp, n) * b + a * load(dp, n + F)
                turned = load(dp, n + 2 * F) * first + load(p, n + 2 * F) * dfirst
                store(to_v, at, load(vector, at) + turned + load(m, at))
                at, n = at + F, n + 3 * F
            at = i * 3 * F + f
            more = change * load(y, at + F) + dot * load(dy, at + F)
            store(to, i * F + f, load(s, i * F + f) + more + load(dy, at + 2 * F))


@compiled
def receive_reverse(
    job, grad_x, grad_v, dgrad_x, dgrad_v, o, do, projected, dprojected, out_o, out_projected
):  # fmt: skip
    """Gradients in o (N, 3 F) and [v1 | v2 | v3] (N, 3, 3 F) of what is received and of its change."""
    num_atoms, F = grad_x.shape
    W = lanes_that_divide(grad_x, F)
    y, dy, p, dp = o.reshape(-1), do.reshape(-1), projected.reshape(-1), dprojected.reshape(-1)
    gx, gv, hx, hv = grad_x.reshape(-1), grad_v.reshape(-1), dgrad_x.reshape(-1), dgrad_v.reshape(-1)
    to, to_p = out_o.reshape(-1), out_projected.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, n = i * 3 * F + f, i * 9 * F + f
            g, h = load(gx, i * F + f), load(hx, i * F + f)
            first, dfirst = load(y, at), load(dy, at)
            dsecond = h * load(y, at + F)
            second = g * load(y, at + F) + h * load(dy, at + F)
            dot, change, turned = splat(gx, 0.0), splat(gx, 0.0), splat(gx, 0.0)
            for c in range(3):
                a, b, da, db = load(p, n), load(p, n + F), load(dp, n), load(dp, n + F)
                r, s = load(gv, at + c * F), load(hv, at + c * F)
                dot += a * b
                change += da * b + a * db
                turned += r * load(p, n + 2 * F) + s * load(dp, n + 2 * F)
                store(to_p, n, second * b + dsecond * db)
                store(to_p, n + F, second * a + dsecond * da)
                store(to_p, n + 2 * F, r * first + s * dfirst)
                n += 3 * F
            store(to, at, turned)
            store(to, at + F, g * dot + h * change)
            store(to, at + 2 * F, g)
