r"""Layers between the messages for few rows, such as the atoms of one molecule, where libraries take longer to start.

.. math:: y = W x + b, \qquad y = w \odot \hat x + b, \quad \hat x = (x - m) / s, \quad m = \bar x, \;
    s^2 = \overline{(x - m)^2} + \varepsilon

==================  ======  ==================================================================
letters             shape   meaning
==================  ======  ==================================================================
``x``, ``out``      (N, F)  what goes in and comes out, of a linear layer (N, G)
``weight``          (G, F)  W; of a layer norm w, (F,)
``bias``            (G,)    b, empty for none; of a layer norm (F,)
``grad``                    gradients in what comes out
``moments``         (N, 2)  m and 1 / s
==================  ======  ==================================================================

With a = w g, the gradient of a layer norm in x is (a - m(a) - x̂ m(a x̂)) / s.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import spliced
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import (
    fit,
    lanes_that_divide,
    lanes_that_fit,
    load,
    load_two,
    repeat_two,
    splat,
    splat_two,
    store,
    total,
)
from torchmdnet.ops.kernels.work import lanes_of

__all__ = ["FEW_ROWS", "add", "layer_norm", "layer_norm_backward", "linear", "linear_backward", "takes"]

#: Rows up to which these loops are quicker than the functions of PyTorch.
FEW_ROWS = 64


def takes(rows: int, itemsize: int, *widths: int) -> bool:
    """Whether these loops take rows of all widths, and are quicker than the functions of PyTorch."""
    lanes = lanes_of(itemsize)
    return 0 < rows <= FEW_ROWS and all(width >= 2 * lanes and width % lanes == 0 for width in widths)


@spliced
def put_sums(out, at, G, row, last, bias, g, h, a, b):
    """Store the sums of two channels, g and h, of a row."""
    if row <= last:
        out[at + row * G + g] = total(a) + bias[g]
        out[at + row * G + h] = total(b) + bias[h]


@compiled
def linear(job, x, weight, bias, out):
    """y = W x + b: (N, F) -> (N, G).

    Six rows times two channels at a time keep twelve sums in registers.
    """
    (N, F), G = x.shape, weight.shape[0]
    W = lanes_that_divide(x, F)
    flat, w, o, zero = x.reshape(-1), weight.reshape(-1), out.reshape(-1), splat(x.reshape(-1), 0.0)
    for n in claimed(job, (G + 1) // 2):
        g, h = 2 * n, min(2 * n + 1, G - 1)
        for first in range(0, N, 6):
            last = min(N - first, 6) - 1
            i0 = first * F
            i1, i2, i3 = i0 + min(1, last) * F, i0 + min(2, last) * F, i0 + min(3, last) * F
            i4, i5 = i0 + min(4, last) * F, i0 + min(5, last) * F
            a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
            b0, b1, b2, b3, b4, b5 = zero, zero, zero, zero, zero, zero
            for f in range(0, F, W):
                u, v = load(w, g * F + f), load(w, h * F + f)
                x0, x1, x2 = load(flat, i0 + f), load(flat, i1 + f), load(flat, i2 + f)
                x3, x4, x5 = load(flat, i3 + f), load(flat, i4 + f), load(flat, i5 + f)
                a0 += x0 * u
                b0 += x0 * v
                a1 += x1 * u
                b1 += x1 * v
                a2 += x2 * u
                b2 += x2 * v
                a3 += x3 * u
                b3 += x3 * v
                a4 += x4 * u
                b4 += x4 * v
                a5 += x5 * u
                b5 += x5 * v
            at = first * G
            put_sums(o, at, G, 0, last, bias, g, h, a0, b0)
            put_sums(o, at, G, 1, last, bias, g, h, a1, b1)
            put_sums(o, at, G, 2, last, bias, g, h, a2, b2)
            put_sums(o, at, G, 3, last, bias, g, h, a3, b3)
            put_sums(o, at, G, 4, last, bias, g, h, a4, b4)
            put_sums(o, at, G, 5, last, bias, g, h, a5, b5)


@compiled
def linear_backward(job, grad, weight, out):
    """The gradient in x of a linear layer, g W: (N, G) -> (N, F)."""
    (N, G), F = grad.shape, weight.shape[1]
    W = lanes_that_fit(grad, F, 2)
    flat, w, o, zero = grad.reshape(-1), weight.reshape(-1), out.reshape(-1), splat_two(grad.reshape(-1), 0.0)
    for n in claimed(job, (F + 2 * W - 1) // (2 * W)):
        f = fit(n * 2 * W, F, 2 * W)
        for first in range(0, N, 6):  # the last rows are made twice
            last = N - 1
            r1, r2, r3 = min(first + 1, last), min(first + 2, last), min(first + 3, last)
            r4, r5 = min(first + 4, last), min(first + 5, last)
            a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
            for g in range(G):
                u = load_two(w, g * F + f)
                a0 += repeat_two(flat, first * G + g) * u
                a1 += repeat_two(flat, r1 * G + g) * u
                a2 += repeat_two(flat, r2 * G + g) * u
                a3 += repeat_two(flat, r3 * G + g) * u
                a4 += repeat_two(flat, r4 * G + g) * u
                a5 += repeat_two(flat, r5 * G + g) * u
            store(o, first * F + f, a0)
            store(o, r1 * F + f, a1)
            store(o, r2 * F + f, a2)
            store(o, r3 * F + f, a3)
            store(o, r4 * F + f, a4)
            store(o, r5 * F + f, a5)


@compiled
def layer_norm(job, x, weight, bias, eps, out, moments):
    """y = w x̂ + b, and the moments."""
    N, F = x.shape
    W = lanes_that_divide(x, F)
    flat, o = x.reshape(-1), out.reshape(-1)
    for i in claimed(job, N):
        sums = splat(flat, 0.0)
        for f in range(0, F, W):
            sums += load(flat, i * F + f)
        mean = total(sums) / F
        m, squares = splat(flat, mean), splat(flat, 0.0)
        for f in range(0, F, W):
            away = load(flat, i * F + f) - m
            squares += away * away
        scale = 1 / np.sqrt(total(squares) / F + eps)
        s = splat(flat, scale)
        for f in range(0, F, W):
            store(o, i * F + f, (load(flat, i * F + f) - m) * s * load(weight, f) + load(bias, f))
        moments[i, 0], moments[i, 1] = mean, scale


@compiled
def layer_norm_backward(job, grad, x, weight, moments, out):
    """The gradient in x."""
    N, F = x.shape
    W = lanes_that_divide(x, F)
    flat, g, o = x.reshape(-1), grad.reshape(-1), out.reshape(-1)
    for i in claimed(job, N):
        m, s = splat(flat, moments[i, 0]), splat(flat, moments[i, 1])
        sums, along = splat(flat, 0.0), splat(flat, 0.0)
        for f in range(0, F, W):
            a = load(g, i * F + f) * load(weight, f)
            sums += a
            along += a * (load(flat, i * F + f) - m) * s
        mean, share = splat(flat, total(sums) / F), splat(flat, total(along) / F)
        for f in range(0, F, W):
            a = load(g, i * F + f) * load(weight, f)
            store(o, i * F + f, (a - mean - (load(flat, i * F + f) - m) * s * share) * s)


@compiled
def add(job, a, b, out):
    """out = a + b of flat arrays."""
    for _ in claimed(job, 1):
        for k in range(out.shape[0]):
            out[k] = a[k] + b[k]
