"""Loops over edges of the networks of scalars and vectors, with their derivatives: convolutions and attention.

They are arranged as those of :mod:`torchmdnet.ops.kernels.tensor_edges`, whose layout, schedule and names they share:
channels in blocks, receivers in chunks, the weights of a chunk's pairs made once from the table. Both directions of a
pair use the same weights, so what an atom receives and what it sends is summed in one visit to its neighbours:
``reverse`` (E,) is the edge of opposite direction. Channels are whole vectors.

Attention goes in two rounds, as the product of query and key has to be there before a value is weighted. Products come
in pieces, (S, E'): of a vector of channels where that is a head, else of a block, of which a head has one or more.
``width`` are the vectors of a head. Rows of edges E' end with a whole vector, with anything in it.

What an atom sends, V (N, C, F), is C = 1 value; or a value and what goes along the direction u; or beside these the
three components of a vector, C = 5. Filters of values are in this order, one for all three components.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

from torchmdnet.ops.kernels.compiling import called, inlined, spliced
from torchmdnet.ops.kernels.edges import clear
from torchmdnet.ops.kernels.sharing import claimed, compiled, moving
from torchmdnet.ops.kernels.simd import exp, item, lanes_that_divide, load, raise_totals, repeat, splat, store, total
from torchmdnet.ops.kernels.tensor_edges import aligned, clear_up_to, longest, part_of

__all__ = [
    "attention",
    "attention_backward",
    "distances_backward",
    "geometry",
    "key_backward",
    "key_products",
    "message_backward",
    "message_reverse",
    "message_sum",
    "message_tangent",
    "pack_both",
    "receive",
    "receive_backward",
    "send",
    "send_backward",
    "value_backward",
    "value_sum",
    "vectors_backward",
]


# ------------------------------------------------------------------------------------------------------------- geometry


@moving
def geometry(job, vec, dist, row, start, stop, num_cells, basis, lower, upper, u, coef, slope, fade, steep, cell):
    """Directions u = -vec / dist, (E, 4) with a zero behind them, and where distances lie between the rows of a spline.

    ``slope`` (P, 6) are the derivatives of the coefficients ``coef`` in the distance, ``fade`` (P,) is the cosine
    envelope and ``steep`` its derivative. ``basis`` (6, 6) holds the polynomials of the B-splines. A self loop has no
    direction.
    """
    for e in claimed(job, vec.shape[0]):
        r = dist[row[e]]
        scale = -1 / r if r > 0 else 0.0
        u[e, 0], u[e, 1], u[e, 2], u[e, 3] = scale * vec[e, 0], scale * vec[e, 1], scale * vec[e, 2], 0
    step = (stop - start) / num_cells
    for p in claimed(job, dist.shape[0], 1):
        r = dist[p]
        fade[p], steep[p] = 0, 0
        if r < upper and (lower == 0 or r > lower):
            if lower > 0:
                scale = 2 * math.pi / (upper - lower)
                phase = scale * (r - lower) + math.pi
            else:
                scale = math.pi / upper
                phase = scale * r
            fade[p], steep[p] = 0.5 * (math.cos(phase) + 1), -0.5 * scale * math.sin(phase)
        place = (min(max(r, start), stop) - start) / step
        g = min(max(int(place), 0), num_cells - 1)
        t = place - g
        cell[p] = g
        for k in range(6):
            value, rise = basis[k, 5], 0.0
            for n in range(4, -1, -1):
                rise = rise * t + value
                value = value * t + basis[k, n]
            coef[p, k], slope[p, k] = value, rise / step


@moving
def vectors_backward(job, u, dist, row, reverse, of_reverse, out_vec):
    """The gradient of the energy in the vectors (E, 3).

    ``of_reverse`` (T, E, 4) holds what the distance and the three components of u of the opposite edge do, to be added
    up over T; ``of_edge`` (S, E) what the distance of an edge does.
    """
    for e in claimed(job, u.shape[0]):
        x, y, z = 0.0, 0.0, 0.0
        for t in range(of_reverse.shape[0]):
            g = of_reverse[t, reverse[e]]
            x, y, z = x + g[1], y + g[2], z + g[3]
        r = dist[row[e]]
        scale = -1 / r if r > 0 else 0.0
        out_vec[e, 0], out_vec[e, 1], out_vec[e, 2] = scale * x, scale * y, scale * z


@called
def distances_backward(u, row, of_reverse, of_edge, vec, out_dist):
    """The gradient in the distances (P,), when that in the vectors is known."""
    clear(out_dist)
    for e in range(u.shape[0]):
        slope = vec[e, 0] * u[e, 0] + vec[e, 1] * u[e, 1] + vec[e, 2] * u[e, 2]
        for t in range(of_reverse.shape[0]):
            slope += of_reverse[t, e, 0]
        for s in range(of_edge.shape[0]):
            slope += of_edge[s, e]
        out_dist[row[e]] += slope


# ------------------------------------------------------------------------------------------------------------- weights


@spliced
def blend(t, c, begin, end, place, base, count, w, W):
    """w = Σ_k coef_k table[place + k] for pairs of a chunk, with so many vectors of channels for each."""
    S = count * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * 6
        c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
        c3, c4, c5 = repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
        for _ in range(count):
            left = c0 * load(t, a) + c1 * load(t, a + S) + c2 * load(t, a + 2 * S)
            store(w, o, left + (c3 * load(t, a + 3 * S) + c4 * load(t, a + 4 * S) + c5 * load(t, a + 5 * S)))
            a, o = a + W, o + W


@spliced
def blend_two(t, c, d, begin, end, place, base, count, w, W):
    """:func:`blend` with two sets of coefficients, one result behind the other."""
    S = count * W
    o = 0
    for r in range(begin, end):
        a, at = base + item(place, r) * S, r * 6
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
        o += S


@inlined
def put(o, at, left, a, b, W):
    """Store a block of channels, of which so many are left."""
    store(o, at, a)
    if left > W:
        store(o, at + W, b)


# --------------------------------------------------------------------------------------------------------- convolution


@compiled
def message_sum(job, coef, place, tables, X, sender, slot, chunk, first, row_start, most, sides, ranges, out):
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
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
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
                    put(o, i * F + f, F - f, a0 + b0, a1 + b1, W)


@compiled
def message_backward(
    job, coef, slope, place, tables, O, X, sender, slot, chunk, first, row_start, most, sides, ranges, out, out_edge
):
    """Gradients of :func:`message_sum`: in X, out_i = Σ_j w_ij O_j, and in the distances, w'_ij X_i O_j.

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
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
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
                    put(o, i * F + f, F - f, a0, a1, W)


@compiled
def message_tangent(
    job, coef, dcoef, place, tables, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`message_sum`.

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
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    a0, a1, b0, b1 = z, z, z, z
                    for e in range(row_start[i], row_start[i + 1]):
                        j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 4 * W
                        a0, a1 = a0 + load(w, k) * load(dx, j), a1 + load(w, k + W) * load(dx, j + W)
                        k += 2 * W
                        b0, b1 = b0 + load(w, k) * load(x, j), b1 + load(w, k + W) * load(x, j + W)
                    put(o, i * F + f, F - f, a0 + b0, a1 + b1, W)


@spliced
def spread(t, c, d, begin, end, place, base, count, s, W):
    """table[place + k] += coef_k s + dcoef_k ds for pairs of a chunk, the adjoint of :func:`blend_two`.

    Neighbouring pairs read the same rows, and a sum would wait for the one before: the two halves take turns.
    """
    S, half = count * W, (end - begin + 1) // 2
    for n in range(end - begin):
        r = n // 2 + n % 2 * half
        o, r = r * 2 * S, begin + r
        a, at = base + item(place, r) * S, r * 6
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


@compiled
def message_reverse(
    job, coef, dcoef, place, O, dO, X, dX, sender, slot, chunk, first, row_start, most, sides, ranges, out
):
    """Gradients in the table of :func:`message_sum` and of :func:`message_tangent`, together.

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
                spread(t, c, d, first[n], first[n + 1], place, base, 2, s, W)


# ----------------------------------------------------------------------------------------------------------- attention


@compiled
def key_products(
    job, coef, place, tables, Q, K, sender, slot, chunk, first, row_start, most, sides, ranges, width, out
):
    """Pieces of the products q_i k_j w_ij, summed over channels, (S, E')."""
    B, num_atoms, W, E = Q.shape[0], Q.shape[1], lanes_that_divide(Q, Q.shape[3]), out.shape[1]
    t, c, q, x, o = tables.reshape(-1), coef.reshape(-1), Q.reshape(-1), K.reshape(-1), out.reshape(-1)
    for g in claimed(job, sides * ranges):
        w = aligned(most * 2 * W, Q)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo = b * num_atoms * 2 * W
            for n in range(chunks[0], chunks[1]):
                blend(t, c, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
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


@compiled
def value_sum(
    job, coef, place, tables, weight, V, u, sender, slot, chunk, first, row_start, most, sides, ranges, width, out,
    out_v,
):  # fmt: skip
    """What atoms receive: scalars (N, F) and, with directions, vectors (N, 3, F).

    m_i = Σ_j a_ij w_ij V_j0 and μ_i = Σ_j u_ij w_ij V_j1 + w_ij V_j,2...4, each with its own part of w.
    """
    (B, num_atoms, C, _), F, E = V.shape, out.shape[1], weight.shape[1]
    W = lanes_that_divide(V, F)
    t, c, x, o = tables.reshape(-1), coef.reshape(-1), V.reshape(-1), out.reshape(-1)
    a, y, ov = weight.reshape(-1), u.reshape(-1), out_v.reshape(-1)
    count = 2 * tables.shape[2]
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w = aligned(most * count * W, V)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * C * 2 * W, 2 * W * b
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= weight.shape[0]:  # beyond the last channel
                right = left
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                if C == 1:  # the compiler has to know how many vectors there are
                    blend(t, c, begin, end, place, base, 2, w, W)
                elif C == 2:
                    blend(t, c, begin, end, place, base, 4, w, W)
                else:
                    blend(t, c, begin, end, place, base, 6, w, W)
                for i in range(chunk[n], chunk[n + 1]):
                    lo, hi, at = row_start[i], row_start[i + 1], i * 3 * F + f
                    m0, m1 = z, z
                    if C == 1:
                        for e in range(lo, hi):
                            j, k = xo + item(sender, e) * 2 * W, item(slot, e) * 2 * W
                            m0 += repeat(a, left + e) * (load(w, k) * load(x, j))
                            m1 += repeat(a, right + e) * (load(w, k + W) * load(x, j + W))
                        put(o, i * F + f, F - f, m0, m1, W)
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
                    put(o, i * F + f, F - f, m0, m1, W)
                    put(ov, at, F - f, a0, a1, W)
                    put(ov, at + F, F - f, b0, b1, W)
                    put(ov, at + 2 * F, F - f, c0, c1, W)


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
    job, coef, slope, place, tables, weight, V, u, O, sender, reverse, slot, chunk, first, row_start, most, sides,
    ranges, width, out, out_piece, out_edge,
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
    for g in claimed(job, sides * ranges):
        w, d = aligned(most * 2 * count * W, V), aligned(edges * 6 * W, V)
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        to = g % sides * num_edges * sums
        for b in range(blocks[0], blocks[1]):
            xo, go, f = b * num_atoms * C * 2 * W, b * num_atoms * O.shape[2] * 2 * W, 2 * W * b
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= weight.shape[0]:  # beyond the last channel
                right = left
            has_room, at_piece = F - f > W, (2 * b if width == 1 else b) * E
            for n in range(chunks[0], chunks[1]):
                begin, end, base = first[n], first[n + 1], b * tables.shape[1] * count * W
                if C == 1:  # the compiler has to know how many vectors there are
                    blend_two(t, c, s, begin, end, place, base, 2, w, W)
                elif C == 2:
                    blend_two(t, c, s, begin, end, place, base, 4, w, W)
                else:
                    blend_two(t, c, s, begin, end, place, base, 6, w, W)
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
                        put(o, at, F - f, m0, m1, W)
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
def key_backward(
    job, coef, slope, place, tables, weight, Q, K, sender, reverse, slot, chunk, first, row_start, most, sides, ranges,
    width, out, out_edge,
):  # fmt: skip
    """Gradients of :func:`key_products`, given that in the products, ``weight`` (H, E').

    In queries and keys, the first 2 F numbers of each row of ``out`` (N, ...), and in the distance of each edge, which
    each side adds to ``out_edge`` (T, E).
    """
    B, num_atoms, L, W, E = Q.shape[0], Q.shape[1], out.shape[1], lanes_that_divide(Q, Q.shape[3]), weight.shape[1]
    F = width * W * weight.shape[0]
    t, c, d, o = tables.reshape(-1), coef.reshape(-1), slope.reshape(-1), out.reshape(-1)
    q, x, a = Q.reshape(-1), K.reshape(-1), weight.reshape(-1)
    z = splat(x, 0.0)
    for g in claimed(job, sides * ranges):
        w, to = aligned(most * 4 * W, Q), out_edge[g % sides]
        blocks, chunks = part_of(g % sides, sides, B), part_of(g // sides, ranges, chunk.shape[0] - 1)
        for b in range(blocks[0], blocks[1]):
            xo, f = b * num_atoms * 2 * W, 2 * W * b
            left, right = 2 * b // width * E, (2 * b + 1) // width * E
            if (2 * b + 1) // width >= weight.shape[0]:
                right = left
            for n in range(chunks[0], chunks[1]):
                blend_two(t, c, d, first[n], first[n + 1], place, b * tables.shape[1] * 2 * W, 2, w, W)
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
                    put(o, i * L + f, F - f, a0, a1, W)
                    put(o, i * L + F + f, F - f, b0, b1, W)


# --------------------------------------------------------------------------------------------------------------- atoms


@compiled
def send(job, projected, v, Q, K, V):
    """Queries, keys and what is sent, packed, from rows [q | k | values | factors of vectors | along directions].

    ``projected`` is (N, 3 F) without directions, else (N, 5 F); v (N, 3, F) is read where vectors are sent.
    """
    (B, num_atoms, C, _), L = V.shape, projected.shape[1]
    F = L // 3 if C == 1 else L // 5
    W = lanes_that_divide(V, F)
    x, vector = projected.reshape(-1), v.reshape(-1)
    q, k, o = Q.reshape(-1), K.reshape(-1), V.reshape(-1)
    z = splat(x, 0.0)
    for i in claimed(job, num_atoms):
        for n in range(2 * B):
            f = i * L + n * W
            to = (n // 2 * num_atoms + i) * 2 * W + n % 2 * W
            at = (n // 2 * num_atoms + i) * C * 2 * W + n % 2 * W
            if n * W >= F:
                store(q, to, z)
                store(k, to, z)
                for component in range(C):
                    store(o, at + component * 2 * W, z)
                continue
            store(q, to, load(x, f))
            store(k, to, load(x, f + F))
            store(o, at, load(x, f + 2 * F))
            if C > 1:
                store(o, at + 2 * W, load(x, f + 4 * F))
            if C == 5:
                factor, f = load(x, f + 3 * F), i * 3 * F + n * W
                store(o, at + 4 * W, factor * load(vector, f))
                store(o, at + 6 * W, factor * load(vector, f + F))
                store(o, at + 8 * W, factor * load(vector, f + 2 * F))


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


@compiled
def send_backward(job, projected, v, grad, out, out_v):
    """Gradients of :func:`send` beyond those of queries and keys, given that in V (N, C, F)."""
    num_atoms, C, F = grad.shape
    L, W = out.shape[1], lanes_that_divide(grad, F)
    x, o, g, vector, to = projected.reshape(-1), out.reshape(-1), grad.reshape(-1), v.reshape(-1), out_v.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, of = i * L + f, i * C * F + f
            store(o, at + 2 * F, load(g, of))
            if C > 1:
                store(o, at + 3 * F, splat(x, 0.0))
                store(o, at + 4 * F, load(g, of + F))
            if C == 5:
                n, m, k, factor = i * 3 * F + f, i * 3 * F + f + F, i * 3 * F + f + 2 * F, load(x, at + 3 * F)
                g0, g1, g2 = load(g, of + 2 * F), load(g, of + 3 * F), load(g, of + 4 * F)
                store(o, at + 3 * F, g0 * load(vector, n) + g1 * load(vector, m) + g2 * load(vector, k))
                store(to, n, factor * g0)
                store(to, m, factor * g1)
                store(to, k, factor * g2)


@compiled
def receive(job, x, v, mu, o, projected, out_x, out_v):
    """x + (v1 · v2) o2 + o3 and v + v3 o1 + μ, with [v1 | v2 | v3] (N, 3, 3 F)."""
    num_atoms, F = x.shape
    W = lanes_that_divide(x, F)
    y, p, s, vector = o.reshape(-1), projected.reshape(-1), x.reshape(-1), v.reshape(-1)
    m, to, to_v = mu.reshape(-1), out_x.reshape(-1), out_v.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, n = i * 3 * F + f, i * 9 * F + f
            first, dot = load(y, at), splat(x, 0.0)
            for _ in range(3):
                dot += load(p, n) * load(p, n + F)
                store(to_v, at, load(vector, at) + load(p, n + 2 * F) * first + load(m, at))
                at, n = at + F, n + 3 * F
            at = i * 3 * F + f
            store(to, i * F + f, load(s, i * F + f) + dot * load(y, at + F) + load(y, at + 2 * F))


@compiled
def receive_backward(job, grad_x, grad_v, o, projected, out_o, out_projected):
    """Gradients of :func:`receive` in o (N, 3 F) and in [v1 | v2 | v3] (N, 3, 3 F)."""
    num_atoms, F = grad_x.shape
    W = lanes_that_divide(grad_x, F)
    y, p, gx, gv = o.reshape(-1), projected.reshape(-1), grad_x.reshape(-1), grad_v.reshape(-1)
    to, to_p = out_o.reshape(-1), out_projected.reshape(-1)
    for i in claimed(job, num_atoms):
        for f in range(0, F, W):
            at, n = i * 3 * F + f, i * 9 * F + f
            g = load(gx, i * F + f)
            first, second = load(y, at), g * load(y, at + F)
            dot, turned = splat(gx, 0.0), splat(gx, 0.0)
            for c in range(3):
                a, b, change = load(p, n), load(p, n + F), load(gv, at + c * F)
                dot += a * b
                turned += change * load(p, n + 2 * F)
                store(to_p, n, second * b)
                store(to_p, n + F, second * a)
                store(to_p, n + 2 * F, change * first)
                n += 3 * F
            store(to, at, turned)
            store(to, at + F, g * dot)
            store(to, at + 2 * F, g)
