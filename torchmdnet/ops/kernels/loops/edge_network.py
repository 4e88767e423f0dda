r"""Loops of networks on edges: what goes into them, and sums over neighbours with what comes out.

.. math::
    R_p = \sum_k c_{pk} T_{g(p) + k}, \qquad h_{ij} = R_p + A_i + B_j, \qquad
    M_i = \sum_j C_p\, w_{ij} \odot X_j

with weights w that a network makes of h. They work on the edges of a block of receivers, ``lower`` to ``upper``, and
arrays of a block begin with its first edge.

======================================  ======================  ======================================================
letters                                 shape                   meaning
======================================  ======================  ======================================================
``coef``, ``cell``, ``table``           (P, K), (P,), (R, F)    c, g and T
``radial``, ``receiving``, ``sending``  (P, F), (N, F), (N, F)  R, A and B
``pair``, ``sender``, ``row_start``     (E,), (E,), (N + 1,)    p and j of an edge, first edge of a receiver
``weight``, ``change``                  (edges, 3 F)            w and dw, for parts of 1, 3 and 5 components
``envelope``, ``denvelope``             (P,)                    C and dC
``X``, ``O``                            (N, 9, F)               features, and gradients in M
``slope``, ``bend``                     (edges, 3 F)            σ' of the activation that made w, and σ'' times change
``fade``, ``steep``, ``bare``                                   C, dC, w; ``faded`` is C w, ``moved`` dC w + C dw
======================================  ======================  ======================================================

In gradients several edges add to one sender, so threads share the channels (``groups``) instead of the receivers.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import called, inlined
from torchmdnet.ops.kernels.loops.algebra import components, put
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import fit, lanes_that_fit, load, num_lanes, repeat, splat, store, total

__all__ = [
    "add_along",
    "join",
    "join_backward",
    "message",
    "message_backward",
    "message_reverse",
    "message_tangent",
    "read",
    "read_backward",
    "read_reverse",
]


@compiled
def read(job, coef, cell, table, out):
    """out_p = Σ_k coef_pk table[cell_p + k]: a function of distance at each pair, (P, K)."""
    K, num = table.shape[1], coef.shape[1]
    W = lanes_that_fit(table, K)
    t, c, o = table.reshape(-1), coef.reshape(-1), out.reshape(-1)
    for p in claimed(job, out.shape[0]):
        for block in range(0, K, W):
            f = fit(block, K, W)
            value = repeat(c, p * num) * load(t, cell[p] * K + f)
            for k in range(1, num):
                value += repeat(c, p * num + k) * load(t, (cell[p] + k) * K + f)
            store(o, p * K + f, value)


@compiled
def read_backward(job, cell, table, grad, out):
    """The gradient of :func:`read` in the coefficients."""
    K, W = table.shape[1], num_lanes(table)
    t, g = table.reshape(-1), grad.reshape(-1)
    whole = K - K % W
    for p in claimed(job, out.shape[0]):
        for k in range(out.shape[1]):
            at = (cell[p] + k) * K
            along = splat(t, 0.0)
            for f in range(0, whole, W):
                along += load(g, p * K + f) * load(t, at + f)
            value = total(along)
            for f in range(whole, K):
                value += g[p * K + f] * t[at + f]
            out[p, k] = value


@compiled
def read_reverse(job, coef, dcoef, cell, grad, slope, groups, out):
    """What the table of :func:`read` grows by; threads share the channels.

    ``grad`` is the gradient in what was read with ``coef``, ``slope`` that in what was read with ``dcoef``.
    """
    K, num, W = grad.shape[1], coef.shape[1], num_lanes(grad)
    c, d, g, h, o = coef.reshape(-1), dcoef.reshape(-1), grad.reshape(-1), slope.reshape(-1), out.reshape(-1)
    for group in claimed(job, groups):
        first, last, end = share(group, groups, K, W)
        for p in range(grad.shape[0]):
            for k in range(num):
                at, n = (cell[p] + k) * K, p * num + k
                for f in range(first, last, W):
                    change = repeat(c, n) * load(g, p * K + f) + repeat(d, n) * load(h, p * K + f)
                    store(o, at + f, load(o, at + f) + change)
                for f in range(last, end):
                    o[at + f] += c[n] * g[p * K + f] + d[n] * h[p * K + f]


@compiled
def join(job, radial, receiving, sending, pair, sender, row_start, lower, upper, out):
    """out_ij = R_p + A_i + B_j: (P, K), (N, K), (N, K) -> (E, K)."""
    K = radial.shape[1]
    W = lanes_that_fit(radial, K)
    R, A, B, o = radial.reshape(-1), receiving.reshape(-1), sending.reshape(-1), out.reshape(-1)
    for n in claimed(job, upper - lower):
        i = lower + n
        for e in range(row_start[i], row_start[i + 1]):
            r, b, at = pair[e] * K, sender[e] * K, (e - row_start[lower]) * K
            for block in range(0, K, W):
                f = fit(block, K, W)
                store(o, at + f, load(R, r + f) + load(A, i * K + f) + load(B, b + f))


@compiled
def join_backward(job, grad, pair, sender, row_start, lower, upper, groups, out_radial, out_receiving, out_sending):
    """What :func:`join` read grows by its gradients; threads share the channels."""
    K, W = out_radial.shape[1], num_lanes(grad)
    g, R, A, B = grad.reshape(-1), out_radial.reshape(-1), out_receiving.reshape(-1), out_sending.reshape(-1)
    for group in claimed(job, groups):
        first, last, end = share(group, groups, K, W)
        for i in range(lower, upper):
            for e in range(row_start[i], row_start[i + 1]):
                a, r, b, at = i * K, pair[e] * K, sender[e] * K, (e - row_start[lower]) * K
                for f in range(first, last, W):
                    change = load(g, at + f)
                    store(R, r + f, load(R, r + f) + change)
                    store(A, a + f, load(A, a + f) + change)
                    store(B, b + f, load(B, b + f) + change)
                for f in range(last, end):
                    R[r + f] += g[at + f]
                    A[a + f] += g[at + f]
                    B[b + f] += g[at + f]


# Edges of one sender are spread over the block, so threads that shared receivers would add to the same rows. They take
# channels of their own instead, each of which visits all edges.


@inlined
def share(group, groups, num, W):
    """The numbers of one thread: where its vectors begin and end, and where what follows singly ends."""
    vectors = num // W
    last = (group + 1) * vectors // groups * W
    return group * vectors // groups * W, last, num if group == groups - 1 else last


@compiled
def message(job, weight, envelope, X, pair, sender, row_start, lower, upper, out):
    """out_i = Σ_j c_ij w_ij X_j: (E, 3 F), (P,), (N, 9, F) -> (N, 9, F)."""
    F, W = X.shape[2], num_lanes(X)
    w, x, o = weight.reshape(-1), X.reshape(-1), out.reshape(-1)
    whole = F - F % W
    for n in claimed(job, upper - lower):
        i = lower + n
        for k in range(i * 9 * F, (i + 1) * 9 * F):
            o[k] = 0
        for e in range(row_start[i], row_start[i + 1]):
            at, there = (e - row_start[lower]) * 3 * F, sender[e] * 9 * F
            fade = repeat(envelope, pair[e])
            for f in range(0, whole, W):
                w0, w1 = fade * load(w, at + f), fade * load(w, at + F + f)
                w2 = fade * load(w, at + 2 * F + f)
                x0, x1, x2, x3, x4, x5, x6, x7, x8 = components(x, there + f, F)
                y0, y1, y2, y3, y4, y5, y6, y7, y8 = components(o, i * 9 * F + f, F)
                sums = (
                    *(y0 + w0 * x0, y1 + w1 * x1, y2 + w1 * x2, y3 + w1 * x3),
                    *(y4 + w2 * x4, y5 + w2 * x5, y6 + w2 * x6, y7 + w2 * x7, y8 + w2 * x8),
                )
                put(o, i * 9 * F + f, F, sums)
            for f in range(whole, F):
                for c in range(9):
                    part = 0 if c < 1 else 1 if c < 4 else 2
                    weighted = envelope[pair[e]] * w[at + part * F + f]
                    o[(i * 9 + c) * F + f] += weighted * x[there + c * F + f]


@compiled
def message_backward(
    job, weight, slope, envelope, O, X, pair, sender, row_start, lower, upper, out, out_weight, out_envelope
):
    """Gradients of :func:`message`, for a gradient O in the sums.

    ``out`` grows by the gradient in X. ``out_weight`` is the gradient in the weights times ``slope``, which may be the
    same array. The gradient in the envelope, (G, E), is of one row for each of G threads, which share the channels.
    """
    F, W = X.shape[2], num_lanes(X)
    w, d, x, g = weight.reshape(-1), slope.reshape(-1), X.reshape(-1), O.reshape(-1)
    o, ow = out.reshape(-1), out_weight.reshape(-1)
    groups = out_envelope.shape[0]
    zero = splat(x, 0.0)
    for group in claimed(job, groups):
        first, last, end = share(group, groups, F, W)
        for i in range(lower, upper):
            for e in range(row_start[i], row_start[i + 1]):
                k, p, mine, other = e - row_start[lower], pair[e], i * 9 * F, sender[e] * 9 * F
                fade, along = repeat(envelope, p), zero
                for f in range(first, last, W):
                    at, here, there = k * 3 * F + f, mine + f, other + f
                    bare = load(w, at)
                    s = cross(g, x, o, here, there, fade * bare, zero)
                    along += bare * s
                    store(ow, at, fade * s * load(d, at))
                    at, here, there = at + F, here + F, there + F
                    bare = load(w, at)
                    s = cross(g, x, o, here, there, fade * bare, zero)
                    s = cross(g, x, o, here + F, there + F, fade * bare, s)
                    s = cross(g, x, o, here + 2 * F, there + 2 * F, fade * bare, s)
                    along += bare * s
                    store(ow, at, fade * s * load(d, at))
                    at, here, there = at + F, here + 3 * F, there + 3 * F
                    bare = load(w, at)
                    s = cross(g, x, o, here, there, fade * bare, zero)
                    s = cross(g, x, o, here + F, there + F, fade * bare, s)
                    s = cross(g, x, o, here + 2 * F, there + 2 * F, fade * bare, s)
                    s = cross(g, x, o, here + 3 * F, there + 3 * F, fade * bare, s)
                    s = cross(g, x, o, here + 4 * F, there + 4 * F, fade * bare, s)
                    along += bare * s
                    store(ow, at, fade * s * load(d, at))
                out_envelope[group, k] = total(along)
                for f in range(last, end):
                    for part in range(3):
                        at = (k * 3 + part) * F + f
                        bare = w[at]
                        s = 0 * bare
                        for c in range(part * part, (part + 1) * (part + 1)):
                            here, there = mine + c * F + f, other + c * F + f
                            s += g[here] * x[there]
                            o[there] += envelope[p] * bare * g[here]
                        out_envelope[group, k] += bare * s
                        ow[at] = envelope[p] * s * d[at]


@compiled
def message_tangent(job, weight, change, envelope, denvelope, X, dX, pair, sender, row_start, lower, upper, out):
    """out_i = Σ_j c_ij (w_ij dX_j + dw_ij X_j) + dc_ij w_ij X_j: how :func:`message` changes with all it reads."""
    F, W = X.shape[2], num_lanes(X)
    w, d, x, dx, o = weight.reshape(-1), change.reshape(-1), X.reshape(-1), dX.reshape(-1), out.reshape(-1)
    whole = F - F % W
    for n in claimed(job, upper - lower):
        i = lower + n
        for k in range(i * 9 * F, (i + 1) * 9 * F):
            o[k] = 0
        for e in range(row_start[i], row_start[i + 1]):
            at, there, p, mine = (e - row_start[lower]) * 3 * F, sender[e] * 9 * F, pair[e], i * 9 * F
            fade, steep = repeat(envelope, p), repeat(denvelope, p)
            for f in range(0, whole, W):
                for part in range(3):
                    bare = load(w, at + part * F + f)
                    faded, moved = fade * bare, steep * bare + fade * load(d, at + part * F + f)
                    for c in range(part * part, (part + 1) * (part + 1)):
                        k, q = mine + c * F + f, there + c * F + f
                        store(o, k, load(o, k) + faded * load(dx, q) + moved * load(x, q))
            for f in range(whole, F):
                for part in range(3):
                    bare = w[at + part * F + f]
                    moved = denvelope[p] * bare + envelope[p] * d[at + part * F + f]
                    for c in range(part * part, (part + 1) * (part + 1)):
                        q = there + c * F + f
                        o[mine + c * F + f] += envelope[p] * bare * dx[q] + moved * x[q]


@compiled
def message_reverse(
    job, weight, change, envelope, denvelope, O, dO, X, dX, pair, sender, row_start, lower, upper, groups, slope,
    bend, out, out_weight, out_change,
):  # fmt: skip
    """Gradients of :func:`message` for O in the sums and of :func:`message_tangent` for dO in their changes, together.

    ``out`` grows by the gradient in X. ``out_change`` is the gradient in dw times ``slope``; ``out_weight`` that in w
    times ``slope`` and that in dw times ``bend``. They may be the arrays of ``bend`` and ``slope``. Threads share the
    channels.
    """
    F, W = X.shape[2], num_lanes(X)
    w, d, x, dx = weight.reshape(-1), change.reshape(-1), X.reshape(-1), dX.reshape(-1)
    g, h, rise, turn = O.reshape(-1), dO.reshape(-1), slope.reshape(-1), bend.reshape(-1)
    o, ow, oc = out.reshape(-1), out_weight.reshape(-1), out_change.reshape(-1)
    zero = splat(x, 0.0)
    for group in claimed(job, groups):
        first, last, end = share(group, groups, F, W)
        for i in range(lower, upper):
            for e in range(row_start[i], row_start[i + 1]):
                p, mine, other = pair[e], i * 9 * F, sender[e] * 9 * F
                fade, steep, start = repeat(envelope, p), repeat(denvelope, p), (e - row_start[lower]) * 3 * F
                for f in range(first, last, W):
                    for part in range(3):
                        at = start + part * F + f
                        bare = load(w, at)
                        faded, moved = fade * bare, steep * bare + fade * load(d, at)
                        s, t = zero, zero
                        for c in range(part * part, (part + 1) * (part + 1)):
                            here, there = mine + c * F + f, other + c * F + f
                            v, dv, sent = load(g, here), load(h, here), load(x, there)
                            s += v * sent + dv * load(dx, there)
                            t += dv * sent
                            store(o, there, load(o, there) + faded * v + moved * dv)
                        of_change, up = fade * t, load(rise, at)
                        of_weight = (fade * s + steep * t) * up + of_change * load(turn, at)
                        store(ow, at, of_weight)
                        store(oc, at, of_change * up)
                for f in range(last, end):
                    for part in range(3):
                        at = start + part * F + f
                        faded, moved = envelope[p] * w[at], denvelope[p] * w[at] + envelope[p] * d[at]
                        s, t = 0 * faded, 0 * faded
                        for c in range(part * part, (part + 1) * (part + 1)):
                            here, there = mine + c * F + f, other + c * F + f
                            s += g[here] * x[there] + h[here] * dx[there]
                            t += h[here] * x[there]
                            o[there] += faded * g[here] + moved * h[here]
                        of_change, up = envelope[p] * t, rise[at]
                        ow[at] = (envelope[p] * s + denvelope[p] * t) * up + of_change * turn[at]
                        oc[at] = of_change * up


@inlined
def cross(g, x, o, here, there, w, s):
    """s + g x of one component, where o grows by w g."""
    v = load(g, here)
    s += v * load(x, there)
    store(o, there, load(o, there) + w * v)
    return s


@called
def add_along(per_edge, pair, first, out):
    """out_p += Σ_g of row g for the edges that begin at ``first``: (G, E) -> (P,)."""
    for group in range(per_edge.shape[0]):
        for k in range(per_edge.shape[1]):
            out[pair[first + k]] += per_edge[group, k]
