r"""Weights of edges from the table of a filter, row by row, and the adjoints of that.

.. math:: w_p = \sum_k c_{pk}\, T_{g(p) + k}

The operators of any order, whose rooms end with ``_form``, never store the weights of an edge: each loop makes them in
a buffer of one row. Threads share the receiving atoms.

==================  ============  ==========================================================================
letters             shape         meaning
==================  ============  ==========================================================================
``O``, ``X``        (N, C F)      gradients and features; C components of F channels
``table``           (R, L F)      T, for L parts
``coef``, ``cell``  (P, K), (P,)  c, and the first row g of each filter row p
``row``, ``back``   (E,)          filter row of an edge and of the edge of opposite direction, ``reverse``
``row_start``       (N + 1,)      first edge of each receiver; edges are sorted by receiver
``starts``          (L + 1,)      first component of each part
``w``, ``s``        (L F,)        weights of an edge, and a gradient in them
``out_edge``        (E, K)        gradients in the coefficients, to be added up for each row by :func:`fold`
==================  ============  ==========================================================================
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import called, inlined
from torchmdnet.ops.kernels.simd import fit, load, repeat, splat, store, total

__all__ = [
    "accumulate",
    "clear",
    "fold",
    "interpolate",
    "project",
    "scatter",
]


# Rows of the table are not sliced: Numba would count references to it, which costs more than the arithmetic. The lanes
# of the last block overlap those of the block before.


@inlined
def clear(values):
    """values = 0; assigning to a slice would do, but takes a second to compile."""
    for k in range(values.shape[0]):
        values[k] = 0


@inlined
def interpolate(table, coef, cell, p, w, W):
    """w = Σ_k coef_k table[cell + k] for filter row p, over all parts and channels."""
    size, num = w.shape[0], coef.shape[1]
    first, at = cell[p] * size, p * num
    if num == 6:
        c0, c1, c2 = repeat(coef, at), repeat(coef, at + 1), repeat(coef, at + 2)
        c3, c4, c5 = repeat(coef, at + 3), repeat(coef, at + 4), repeat(coef, at + 5)
        for block in range((size + W - 1) // W):
            f = fit(block * W, size, W)
            t = first + f
            left = c0 * load(table, t) + c1 * load(table, t + size) + c2 * load(table, t + 2 * size)
            right = c3 * load(table, t + 3 * size) + c4 * load(table, t + 4 * size) + c5 * load(table, t + 5 * size)
            store(w, f, left + right)
    else:
        for block in range((size + W - 1) // W):
            f = fit(block * W, size, W)
            value = repeat(coef, at) * load(table, first + f)
            for k in range(1, num):
                value += repeat(coef, at + k) * load(table, first + k * size + f)
            store(w, f, value)


@inlined
def project(table, cell, p, s, num, out, e, W):
    """out_ek = Σ_f s_f table[cell + k]_f, the adjoint of :func:`interpolate` in the coefficients."""
    size = s.shape[0]
    g = cell[p]
    first, whole = g * size, size // W
    if num == 6:
        d0, d1, d2 = splat(s, 0.0), splat(s, 0.0), splat(s, 0.0)
        d3, d4, d5 = splat(s, 0.0), splat(s, 0.0), splat(s, 0.0)
        for block in range(whole):
            t = first + block * W
            d = load(s, block * W)
            d0 += d * load(table, t)
            d1 += d * load(table, t + size)
            d2 += d * load(table, t + 2 * size)
            d3 += d * load(table, t + 3 * size)
            d4 += d * load(table, t + 4 * size)
            d5 += d * load(table, t + 5 * size)
        out[e, 0], out[e, 1], out[e, 2] = total(d0), total(d1), total(d2)
        out[e, 3], out[e, 4], out[e, 5] = total(d3), total(d4), total(d5)
    else:
        for k in range(num):
            d = splat(s, 0.0)
            for block in range(whole):
                d += load(s, block * W) * load(table, first + k * size + block * W)
            out[e, k] = total(d)
    if whole * W < size:
        for k in range(num):
            for f in range(whole * W, size):
                out[e, k] += s[f] * table[g + k, f]


@inlined
def accumulate(total, left, right):
    """total += left right."""
    for f in range(total.shape[0]):
        total[f] += left[f] * right[f]


@inlined
def scatter(s, coef, cell, p, table):
    """table[cell + k] += coef_k s, the adjoint of :func:`interpolate` in the table."""
    size = s.shape[0]
    g = cell[p]
    for k in range(coef.shape[1]):
        scale, row = coef[p, k], table[g + k]
        for f in range(size):
            row[f] += scale * s[f]


@called
def fold(per_edge, rows, out):
    """Sum edges into the rows they belong to."""
    for p in range(out.shape[0]):
        clear(out[p])
    for e in range(per_edge.shape[0]):
        here = out[rows[e]]
        for k in range(per_edge.shape[1]):
            here[k] += per_edge[e, k]
