r"""Attention: what atoms send and how they use what they receive, with derivatives.

.. math::
    [q \,|\, k \,|\, V_0 \,|\, \phi \,|\, V_1] = P, \qquad V_{2 \ldots 4} = \phi \odot v, \\
    x' = x + (v_1 \cdot v_2) \odot o_2 + o_3, \qquad v' = v + v_3 \odot o_1 + \mu

===================  ===================  ================================================================
letters              shape                meaning
===================  ===================  ================================================================
``projected``        (N, 3 F or 5 F)      in ``send`` rows P, without φ and V_1 where there are no vectors
``projected``        (N, 3, 3 F)          in ``receive`` [v_1 | v_2 | v_3]
``x``, ``v``         (N, F), (N, 3, F)    scalars and vectors of atoms
``o``, ``mu``        (N, 3 F), (N, 3, F)  [o_1 | o_2 | o_3], made of m, and μ
``Q``, ``K``, ``V``  (B, N, C, 2 W)       packed, see :mod:`torchmdnet.ops.kernels.loops.blocks`
``grad``             (N, C, F)            gradient in V
===================  ===================  ================================================================

Only products, φ v and those of three factors in x' and v', have tangents and gradients that differ from the sums
themselves; each is the product rule, written out.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import lanes_that_divide, load, splat, store

__all__ = [
    "receive",
    "receive_backward",
    "receive_reverse",
    "receive_tangent",
    "send",
    "send_backward",
    "send_reverse",
    "send_tangent",
]


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


@compiled
def send_tangent(job, projected, dprojected, v, dv, Q, K, V):
    """Changes of queries, keys and V = [values | along directions | factors · v], packed; see :func:`send`.

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
    """Changes of x + (v1 · v2) o2 + o3 and of v + v3 o1 + μ; see :func:`receive`."""
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
def receive_reverse(job, grad_x, grad_v, dgrad_x, dgrad_v, o, do, projected, dprojected, out_o, out_projected):
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
