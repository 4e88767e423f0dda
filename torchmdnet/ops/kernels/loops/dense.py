r"""Layers between the messages for few rows, such as the atoms of one molecule, where libraries take longer to start.

.. math:: y = W x + b, \qquad y = w \odot \hat x + b, \quad \hat x = (x - m) / s, \quad m = \bar x, \;
    s^2 = \overline{(x - m)^2} + \varepsilon

==================  ======  ==================================================================
letters             shape   meaning
==================  ======  ==================================================================
``x``, ``out``      (N, F)  what goes in and comes out, of a linear layer (N, G)
``matrix``          (F, G)  the transpose of W, or W as (G, F) for the gradient in x
``weight``          (F,)    w of a layer norm
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

__all__ = ["FEW_ROWS", "add", "layer_norm", "layer_norm_backward", "linear", "takes"]

#: Rows up to which these loops are quicker than the functions of PyTorch.
FEW_ROWS = 64


def takes(rows: int, itemsize: int, *widths: int) -> bool:
    """Whether these loops take rows of all widths, and are quicker than the functions of PyTorch."""
    lanes = lanes_of(itemsize)
    return 0 < rows <= FEW_ROWS and all(width >= 2 * lanes and width % lanes == 0 for width in widths)


@compiled
def linear(job, x, matrix, bias, out):
    """y = x M + b: (N, F) -> (N, G). A linear layer with the transpose of W as M; its gradient with W and no b.

    Six rows times two vectors of channels at a time keep twelve sums in registers.
    """
    (N, F), G = x.shape, out.shape[1]
    W = lanes_that_fit(x, G, 2)
    flat, m, o, zero = x.reshape(-1), matrix.reshape(-1), out.reshape(-1), splat_two(x.reshape(-1), 0.0)
    for n in claimed(job, (G + 2 * W - 1) // (2 * W)):
        g, last = fit(n * 2 * W, G, 2 * W), N - 1
        start = load_two(bias, g) if bias.shape[0] > 0 else zero
        for first in range(0, N, 6):  # the last rows are made twice
            r1, r2, r3 = min(first + 1, last), min(first + 2, last), min(first + 3, last)
            r4, r5 = min(first + 4, last), min(first + 5, last)
            a0, a1, a2, a3, a4, a5 = start, start, start, start, start, start
            for f in range(F):
                u = load_two(m, f * G + g)
                a0 += repeat_two(flat, first * F + f) * u
                a1 += repeat_two(flat, r1 * F + f) * u
                a2 += repeat_two(flat, r2 * F + f) * u
                a3 += repeat_two(flat, r3 * F + f) * u
                a4 += repeat_two(flat, r4 * F + f) * u
                a5 += repeat_two(flat, r5 * F + f) * u
            store(o, first * G + g, a0)
            store(o, r1 * G + g, a1)
            store(o, r2 * G + g, a2)
            store(o, r3 * G + g, a3)
            store(o, r4 * G + g, a4)
            store(o, r5 * G + g, a5)


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
