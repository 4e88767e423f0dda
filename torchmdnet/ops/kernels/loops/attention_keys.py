r"""Attention: products of queries and keys, and weights made of them, with their derivatives.

For each head h and edge i <- j

.. math:: p_{ijh} = \sum_{f \in h} q_{if}\, k_{jf}\, w_{ij,f}, \qquad a_{ijh} = \tau(p_{ijh})\, C(r_{ij}), \qquad
          \tau(p) = p\, s, \quad s = \frac{1}{1 + e^{-p}}.

The product has to be complete before a value is weighted, so attention goes in two rounds over the edges: here, and in
:mod:`torchmdnet.ops.kernels.loops.attention_values`. Layout, schedule and indices are those of
:mod:`torchmdnet.ops.kernels.loops.blocks`; channels are whole vectors, and coefficients six.

====================  ==============  ====================================================================
letters               shape           meaning
====================  ==============  ====================================================================
``Q``, ``K``          (B, N, 1, 2 W)  packed queries and keys
``tables``            (B, R, 1, 2 W)  packed filters of keys
``width``                             vectors of channels in a head
``pieces``            (S, E')         partial products: of a vector if that is a head, else of a block
``fade``, ``steep``   (E',)           envelope C of each edge and its derivative; ``dfade`` its change
``weight``, ``of_p``  (H, E')         a, or a gradient in p; ``dweight``, ``of_dp`` likewise of the change
``value``, ``rise``   (H, E')         τ and τ' = s (1 + p (1 - s))
``of_reverse``        (S, E')         gradients in a of the opposite edge, in pieces
====================  ==============  ====================================================================

An atom's neighbours are visited once for what it receives and for what it sends, since w_ij = w_ji: with g = ∂/∂p,

.. math::
    \bar q_i = \sum_j g_{ij} w_{ij} k_j, \qquad \bar k_i = \sum_j g_{ji} w_{ij} q_j, \qquad
    \bar w_{ij} = g_{ij}\, q_i k_j.

Tangent and reverse follow with dp = Σ q (w dk + dw k) + dq w k, da = τ' C dp + τ dC, and

.. math:: \bar p = \tau' C\, o + (\tau'' C\, dp + \tau'\, dC)\, \hat o, \qquad \hat p = \tau' C\, \hat o, \qquad
          \tau'' = s (1 - s) (2 + p (1 - 2 s))

for gradients o in a and ô in da.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.blocks import aligned, blend, blend_two, part_of, put_block, share_of, spread
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import exp, item, lanes_that_divide, load, repeat, splat, store, total

__all__ = [
    "attention",
    "attention_backward",
    "attention_reverse",
    "attention_tangent",
    "firsts",
    "heads_of",
    "key_backward",
    "key_products",
    "key_reverse",
    "key_tangent",
    "raise_pair",
]


@inlined
def heads_of(b, width, rows):
    """Where the rows (H, E') of the heads of a block's two vectors begin; beyond the last channel that of the first."""
    H, E = rows.shape
    left, right = 2 * b // width, (2 * b + 1) // width
    return left * E, (right if right < H else left) * E


# Gradients in the weights of a pair come from its edges. The first edge of a pair in its chunk stores them and the
# others add, so that the memory of a chunk need not be cleared; `firsts` finds that once for all blocks of channels.


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
def firsts(slot, chunk, begin, end, row_start, max_pairs):
    """For each edge of some chunks, whether it is its pair's first in its chunk; self loops are all of one pair."""
    start = row_start[chunk[begin]]
    found, seen = np.zeros(row_start[chunk[end]] - start, np.int8), np.full(max_pairs, -1, np.int64)
    for n in range(begin, end):
        for e in range(row_start[chunk[n]], row_start[chunk[n + 1]]):
            k = slot[e]
            if seen[k] != n:
                seen[k] = n
                found[e - start] = 1
    return found


@compiled
def key_products(
    job, coef, place, tables, Q, K, sender, slot, chunk, first, row_start, max_pairs, channel_groups, atom_groups,
    width, out,
):  # fmt: skip
    """Pieces of the products q_i k_j w_ij, summed over channels, (S, E')."""
    B, num_atoms, W, E = Q.shape[0], Q.shape[1], lanes_that_divide(Q, Q.shape[3]), out.shape[1]
    t, c, q, x, o = tables.reshape(-1), coef.reshape(-1), Q.reshape(-1), K.reshape(-1), out.reshape(-1)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 2 * W, Q)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo = b * num_atoms * 2 * W
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    q0, q1 = load(q, xo + i * 2 * W), load(q, xo + i * 2 * W + W)
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 2 * W
                        s0, s1 = q0 * (load(x, j) * load(w, k)), q1 * (load(x, j + W) * load(w, k + W))
                        if width == 1:
                            o[2 * b * E + e], o[2 * b * E + E + e] = total(s0), total(s1)
                        else:
                            o[b * E + e] = total(s0 + s1)


@compiled
def key_backward(
    job, coef, slope, place, tables, weight, Q, K, sender, reverse, slot, chunk, first, row_start, max_pairs,
    channel_groups, atom_groups, width, out, out_edge,
):  # fmt: skip
    """Gradients of :func:`key_products`, given that in the products, ``weight`` (H, E').

    In queries and keys, the first 2 F numbers of each row of ``out`` (N, ...), and in the distance of each edge, which
    each side adds to ``out_edge`` (T, E).
    """
    B, num_atoms, L, W = Q.shape[0], Q.shape[1], out.shape[1], lanes_that_divide(Q, Q.shape[3])
    F = width * W * weight.shape[0]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    q, x, a = Q.reshape(-1), K.reshape(-1), weight.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, to = aligned(max_pairs * 4 * W, Q), out_edge[g % channel_groups]
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * 2 * W, 2 * W * b
            left, right = heads_of(b, width, weight)
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    mine = xo + i * 2 * W
                    q0, q1 = load(q, mine), load(q, mine + W)
                    a0, a1, b0, b1 = z, z, z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k, r = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W, item(reverse, e)
                        w0, w1 = load(w, k), load(w, k + W)
                        s0, s1 = repeat(a, left + e) * load(x, j), repeat(a, right + e) * load(x, j + W)
                        a0, a1 = a0 + w0 * s0, a1 + w1 * s1
                        b0 += repeat(a, left + r) * (w0 * load(q, j))
                        b1 += repeat(a, right + r) * (w1 * load(q, j + W))
                        more = total(load(w, k + 2 * W) * (q0 * s0) + load(w, k + 3 * W) * (q1 * s1))
                        to[e] += more
                    put_block(o, i * L + f, F - f, a0, a1, W)
                    put_block(o, i * L + F + f, F - f, b0, b1, W)


@compiled
def key_tangent(
    job, coef, dcoef, place, tables, Q, dQ, K, dK, sender, slot, chunk, first, row_start, max_pairs, channel_groups,
    atom_groups, width, out,
):  # fmt: skip
    """Pieces of dp = Σ q_i (w dk_j + dw k_j) + dq_i w k_j, (S, E')."""
    B, num_atoms, W, E = Q.shape[0], Q.shape[1], lanes_that_divide(Q, Q.shape[3]), out.shape[1]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1)
    q, dq, x, dx = Q.reshape(-1), dQ.reshape(-1), K.reshape(-1), dK.reshape(-1)
    for g in claimed(job, channel_groups * atom_groups):
        w = aligned(max_pairs * 4 * W, Q)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        for b in range(blocks[0], blocks[1]):
            xo = b * num_atoms * 2 * W
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 6, 2, w, W)
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
    job, coef, dcoef, place, tables, of_p, of_dp, Q, dQ, K, dK, sender, reverse, slot, chunk, first, row_start,
    max_pairs, channel_groups, atom_groups, width, out, out_table,
):  # fmt: skip
    """Gradients of p and dp, given those in p and dp of each head, (H, E').

    In queries and keys, the first 2 F numbers of each row of ``out`` (N, ...), and in the table.
    """
    B, num_atoms, L, W = Q.shape[0], Q.shape[1], out.shape[1], lanes_that_divide(Q, Q.shape[3])
    F, size = width * W * of_p.shape[0], tables.shape[1] * 2 * W
    t, c, d, o, to = tables.reshape(-1), coef.reshape(-1), dcoef.reshape(-1), out.reshape(-1), out_table.reshape(-1)
    q, dq, x, dx = Q.reshape(-1), dQ.reshape(-1), K.reshape(-1), dK.reshape(-1)
    a, da = of_p.reshape(-1), of_dp.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, channel_groups * atom_groups):
        w, s = aligned(max_pairs * 4 * W, Q), aligned(max_pairs * 4 * W, Q)
        blocks, chunks = share_of(g, channel_groups, atom_groups, B, chunk)
        fresh, start = firsts(slot, chunk, chunks[0], chunks[1], row_start, max_pairs), row_start[chunk[chunks[0]]]
        for b in range(blocks[0], blocks[1]):
            xo, f, base = b * num_atoms * 2 * W, 2 * W * b, (g // channel_groups * B + b) * size
            left, right = heads_of(b, width, of_p)
            for k in range(base, base + size, W):
                store(to, k, z)
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * size, 6, 2, w, W)
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
                    put_block(o, i * L + f, F - f, a0, a1, W)
                    put_block(o, i * L + F + f, F - f, b0, b1, W)
                spread(to, c, d, first[n], first[n + 1], place, base, 6, 2, s, W)


@compiled
def attention(job, pieces, fade, out, value, rise):
    """Attention of each head (H, E'), a = τ(x) C with the sum x of its pieces; τ(x) = x / (1 + exp(-x)), and τ'."""
    E, W = pieces.shape[1], lanes_that_divide(pieces, pieces.shape[1])
    many = pieces.shape[0] // out.shape[0]
    p, o, v, s = pieces.reshape(-1), out.reshape(-1), value.reshape(-1), rise.reshape(-1)
    one, zero = splat(p, 1.0), splat(p, 0.0)
    for h in claimed(job, out.shape[0]):
        for e in range(0, E, W):
            x = load(p, h * many * E + e)
            for m in range(1, many):
                x += load(p, (h * many + m) * E + e)
            share, at = one / (one + exp(zero - x)), h * E + e
            store(v, at, x * share)
            store(s, at, share * (one + x * (one - share)))
            store(o, at, load(fade, e) * (x * share))


@compiled
def attention_backward(job, of_reverse, reverse, fade, steep, value, rise, out, out_edge):
    """Gradients of :func:`attention`: in x, (H, E'), and, added, in the distances of edges, by the envelope, (E,).

    ``of_reverse`` (S, E') holds the gradient in the attention of the opposite edge, in pieces. ``steep`` (E',) is the
    derivative of the envelope.
    """
    many = of_reverse.shape[0] // out.shape[0]
    for e in claimed(job, reverse.shape[0]):
        r = reverse[e]
        for h in range(out.shape[0]):
            grad = of_reverse[h * many, r]
            for m in range(1, many):
                grad += of_reverse[h * many + m, r]
            out[h, e] = fade[e] * rise[h, e] * grad
            out_edge[e] += steep[e] * value[h, e] * grad


#: Parts in which threads share the edges of a head.
PARTS = 8


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
