r"""SiLU of x + bias with its derivatives, for rows of any width of at least a vector.

.. math::
    \tau(x) = x\, s, \quad s = \frac{1}{1 + e^{-x}}, \qquad \tau' = s + \tau\, (1 - s), \qquad
    \tau'' = s (1 - s) (2 + x (1 - 2 s))

===================  ======  ===========================
letters              shape   meaning
===================  ======  ===========================
``x``, ``out``       (E, K)  arguments and values
``bias``             (K,)    added to every row
``change``           (E, K)  dx; ``out_change`` is τ' dx
``grad``, ``slope``  (E, K)  gradients in τ and in τ' dx
``rest``, ``rise``           1 - s and τ'
===================  ======  ===========================
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import exp, fit, lanes_that_fit, load, splat, store

__all__ = [
    "silu",
    "silu_backward",
    "silu_bend",
    "silu_both",
    "silu_reverse",
    "silu_tangent",
    "silu_twice",
]


@inlined
def sigmoid(x, zero, one):
    """1 / (1 + exp(-x))."""
    return one / (one + exp(zero - x))


@compiled
def silu(job, x, bias, out):
    """SiLU of x + bias: (E, K), (K,) -> (E, K)."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, o = x.reshape(-1), out.reshape(-1)
    zero, one = splat(flat, 0.0), splat(flat, 1.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            v = load(flat, e * K + f) + load(bias, f)
            store(o, e * K + f, v * sigmoid(v, zero, one))


@compiled
def silu_both(job, x, bias, out, out_slope):
    """SiLU and its derivative."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, o, os = x.reshape(-1), out.reshape(-1), out_slope.reshape(-1)
    zero, one = splat(flat, 0.0), splat(flat, 1.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            v = load(flat, e * K + f) + load(bias, f)
            s = sigmoid(v, zero, one)
            value = v * s
            store(o, e * K + f, value)
            store(os, e * K + f, s + value * (one - s))


@compiled
def silu_backward(job, x, bias, grad, out):
    """The gradient times the derivative of SiLU."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, g, o = x.reshape(-1), grad.reshape(-1), out.reshape(-1)
    zero, one = splat(flat, 0.0), splat(flat, 1.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            v = load(flat, e * K + f) + load(bias, f)
            s = sigmoid(v, zero, one)
            store(o, e * K + f, load(g, e * K + f) * (s + v * s * (one - s)))


@compiled
def silu_tangent(job, x, bias, change, out, out_change):
    """SiLU, and how it changes with x."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, d, o, oc = x.reshape(-1), change.reshape(-1), out.reshape(-1), out_change.reshape(-1)
    zero, one = splat(flat, 0.0), splat(flat, 1.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            k = e * K + f
            v, dv = load(flat, k) + load(bias, f), load(d, k)
            s = sigmoid(v, zero, one)
            value = v * s
            store(o, k, value)
            store(oc, k, dv * (s + value * (one - s)))


@compiled
def silu_bend(job, x, bias, change, out, out_change, out_slope, out_bend):
    """SiLU and its derivative, and how both change with x."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, d, o, oc = x.reshape(-1), change.reshape(-1), out.reshape(-1), out_change.reshape(-1)
    os, ob = out_slope.reshape(-1), out_bend.reshape(-1)
    zero, one, two = splat(flat, 0.0), splat(flat, 1.0), splat(flat, 2.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            k = e * K + f
            v, dv = load(flat, k) + load(bias, f), load(d, k)
            s = sigmoid(v, zero, one)
            rest, value = one - s, v * s
            slope = s + value * rest
            store(o, k, value)
            store(oc, k, dv * slope)
            store(os, k, slope)
            store(ob, k, dv * s * rest * (two + v * (rest - s)))


@compiled
def silu_reverse(job, x, bias, change, grad, slope, out, out_change, out_grad, out_slope):
    """SiLU and how it changes with x, :func:`silu_tangent`, and gradients in x and in its change.

    ``grad`` is the gradient in the value and ``slope`` that in its change. Results have arrays of their own.
    """
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, d, g, h = x.reshape(-1), change.reshape(-1), grad.reshape(-1), slope.reshape(-1)
    o, oc, og, oh = out.reshape(-1), out_change.reshape(-1), out_grad.reshape(-1), out_slope.reshape(-1)
    zero, one, two = splat(flat, 0.0), splat(flat, 1.0), splat(flat, 2.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            f = fit(block, K, W)
            k = e * K + f
            v, dv, along = load(flat, k) + load(bias, f), load(d, k), load(h, k)
            s = sigmoid(v, zero, one)
            rest, value = one - s, v * s
            rise = s + value * rest
            store(o, k, value)
            store(oc, k, dv * rise)
            store(og, k, load(g, k) * rise + along * dv * s * rest * (two + v * (rest - s)))
            store(oh, k, along * rise)


@compiled
def silu_twice(job, x, inner, grad, out_x, out_inner):
    """Gradients of :func:`silu_backward` without bias, in x and in the gradient it was given, ``inner``."""
    E, K = x.shape
    W = lanes_that_fit(x, K)
    flat, g, h, ox, og = x.reshape(-1), inner.reshape(-1), grad.reshape(-1), out_x.reshape(-1), out_inner.reshape(-1)
    zero, one, two = splat(flat, 0.0), splat(flat, 1.0), splat(flat, 2.0)
    for e in claimed(job, E):
        for block in range(0, K, W):
            k = e * K + fit(block, K, W)
            v, change = load(flat, k), load(h, k)
            s = sigmoid(v, zero, one)
            rest = one - s
            store(og, k, change * (s + v * s * rest))
            store(ox, k, change * load(g, k) * s * rest * (two + v * (rest - s)))
