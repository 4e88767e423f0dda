"""Loops over edges for derivatives of derivatives, for tensors of 1 + 3 + 5 components.

Training on forces differentiates the energy along a direction in which the atoms move. Names that begin with d are
derivatives along it: of the coefficients of a pair, dcoef (P, K); of features, dX (N, 9, F); of the directions of
edges, dY (E, 9). O is a gradient in what a loop makes, dO one in the derivative of that. Otherwise names are those of
:mod:`torchmdnet.ops.kernels.edges`; a pair has six coefficients, two or one.

A few channels at a time pass over all edges, so that what is read of neighbours and table stays in the second cache.
The last channels overlap those before where their number is no multiple of a vector.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numba
import numpy as np

from torchmdnet.ops.kernels.edges import clear
from torchmdnet.ops.kernels.nodes import add, components, put
from torchmdnet.ops.kernels.simd import load, num_lanes, repeat, splat, store
from torchmdnet.ops.kernels.threads import compiled, inlined

__all__ = ["embed_reverse", "embed_tangent", "gather_tangent", "table_reverse"]

#: Vectors of channels in a block.
BLOCK = 4


@inlined
def coefficients(c, at, num, zero):
    """Six coefficients, those beyond ``num`` zero."""
    if num == 6:
        c0, c1, c2 = repeat(c, at), repeat(c, at + 1), repeat(c, at + 2)
        return c0, c1, c2, repeat(c, at + 3), repeat(c, at + 4), repeat(c, at + 5)
    second = repeat(c, at + 1) if num > 1 else zero
    return repeat(c, at), second, zero, zero, zero, zero


@inlined
def rows(t, at, step, num, zero):
    """The rows of the table that a pair reads, in some channels of one part."""
    if num == 6:
        t0, t1, t2 = load(t, at), load(t, at + step), load(t, at + 2 * step)
        return t0, t1, t2, load(t, at + 3 * step), load(t, at + 4 * step), load(t, at + 5 * step)
    second = load(t, at + step) if num > 1 else zero
    return load(t, at), second, zero, zero, zero, zero


@inlined
def weight(c, t):
    """The weight that coefficients make of rows."""
    c0, c1, c2, c3, c4, c5 = c
    t0, t1, t2, t3, t4, t5 = t
    return (c0 * t0 + c1 * t1 + c2 * t2) + (c3 * t3 + c4 * t4 + c5 * t5)


@inlined
def weighted(x, w0, w1, w2):
    """Nine components times the weights of their parts."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = x
    return w0 * x0, w1 * x1, w1 * x2, w1 * x3, w2 * x4, w2 * x5, w2 * x6, w2 * x7, w2 * x8


@inlined
def by_part(x, y):
    """Inner products of two sets of nine within each part."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = x
    y0, y1, y2, y3, y4, y5, y6, y7, y8 = y
    return x0 * y0, x1 * y1 + x2 * y2 + x3 * y3, (x4 * y4 + x5 * y5) + (x6 * y6 + x7 * y7 + x8 * y8)


@inlined
def plus(a, b):
    """Sum of two sets of three."""
    a0, a1, a2 = a
    b0, b1, b2 = b
    return a0 + b0, a1 + b1, a2 + b2


@inlined
def times(s, v):
    """A set of three times a factor."""
    v0, v1, v2 = v
    return s * v0, s * v1, s * v2


@inlined
def directions(y, at):
    """The nine components of an edge's direction, each in all lanes."""
    y0, y1, y2, y3, y4 = repeat(y, at), repeat(y, at + 1), repeat(y, at + 2), repeat(y, at + 3), repeat(y, at + 4)
    return y0, y1, y2, y3, y4, repeat(y, at + 5), repeat(y, at + 6), repeat(y, at + 7), repeat(y, at + 8)


@inlined
def fresh_lanes(array, first, channel, keep):
    """1 for the channels from ``first`` on in a vector that begins at ``channel``, 0 for those that overlap."""
    for k in range(keep.shape[0]):
        keep[k] = 1.0 if channel + k >= first else 0.0
    return load(keep, 0)


@inlined
def raise_rows(t, at, step, num, c, d, s, r):
    """Rows of a table += c_k s + d_k r, in some channels of one part."""
    c0, c1, c2, c3, c4, c5 = c
    d0, d1, d2, d3, d4, d5 = d
    store(t, at, load(t, at) + c0 * s + d0 * r)
    if num > 1:
        store(t, at + step, load(t, at + step) + c1 * s + d1 * r)
    if num == 6:
        store(t, at + 2 * step, load(t, at + 2 * step) + c2 * s + d2 * r)
        store(t, at + 3 * step, load(t, at + 3 * step) + c3 * s + d3 * r)
        store(t, at + 4 * step, load(t, at + 4 * step) + c4 * s + d4 * r)
        store(t, at + 5 * step, load(t, at + 5 * step) + c5 * s + d5 * r)


@inlined
def raise_parts(t, at, F, num, c, d, s, r):
    """:func:`raise_rows` for all parts."""
    s0, s1, s2 = s
    r0, r1, r2 = r
    raise_rows(t, at, 3 * F, num, c, d, s0, r0)
    raise_rows(t, at + F, 3 * F, num, c, d, s1, r1)
    raise_rows(t, at + 2 * F, 3 * F, num, c, d, s2, r2)


@compiled
def gather_tangent(coef, dcoef, cell, table, X, dX, sender, row, row_start, out):
    """out_i = Σ_j w_ij dX_j + dw_ij X_j, the derivative of :func:`torchmdnet.ops.kernels.edges.message_sum`."""
    num_atoms, _, F = X.shape
    num, W = coef.shape[1], num_lanes(X)
    x, dx, t, o = X.reshape(-1), dX.reshape(-1), table.reshape(-1), out.reshape(-1)
    c, dc = coef.reshape(-1), dcoef.reshape(-1)
    zero = splat(x, 0.0)
    for i in numba.prange(num_atoms):
        here = np.empty(9 * BLOCK * W, X.dtype)
        for first in range(0, F, BLOCK * W):
            many = min(BLOCK, (F - first + W - 1) // W)
            clear(here)
            for e in range(row_start[i], row_start[i + 1]):
                p = row[e]
                C, D = coefficients(c, p * num, num, zero), coefficients(dc, p * num, num, zero)
                begin, there = cell[p] * 3 * F, sender[e] * 9 * F
                for v in range(many):
                    f, k = min(first + v * W, F - W), 9 * v * W
                    at = begin + f
                    T0, T1 = rows(t, at, 3 * F, num, zero), rows(t, at + F, 3 * F, num, zero)
                    T2 = rows(t, at + 2 * F, 3 * F, num, zero)
                    sums, a, b = components(here, k, W), components(dx, there + f, F), components(x, there + f, F)
                    sums = add(sums, weighted(a, weight(C, T0), weight(C, T1), weight(C, T2)))
                    put(here, k, W, add(sums, weighted(b, weight(D, T0), weight(D, T1), weight(D, T2))))
            for v in range(many):
                put(o, i * 9 * F + min(first + v * W, F - W), F, components(here, 9 * v * W, W))


@inlined
def overlaps(g, dg, x, dx, left, right, F):
    """Inner products by part of what edges ``left`` from ``right`` put into weights and into their derivatives."""
    slope, theirs = components(dg, left, F), components(x, right, F)
    value = plus(by_part(components(g, left, F), theirs), by_part(slope, components(dx, right, F)))
    return value, by_part(slope, theirs)


@compiled
def table_reverse(coef, dcoef, cell, O, dO, X, dX, sender, row, reverse, row_start, out):
    """Gradients in the table of a sum over neighbours and of :func:`gather_tangent`, together.

    out[cell + k] = Σ_e coef_k (O_i X_j + dO_i dX_j) + dcoef_k dO_i X_j, one table for each group of atoms.
    """
    num_atoms, _, F = X.shape
    num, W = coef.shape[1], num_lanes(X)
    x, dx, g, dg = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1)
    c, dc = coef.reshape(-1), dcoef.reshape(-1)
    zero = splat(x, 0.0)
    groups = out.shape[0]
    for group in numba.prange(groups):
        t = out[group].reshape(-1)
        keep = np.empty(W, X.dtype)
        clear(t)
        for first in range(0, F, BLOCK * W):
            many = min(BLOCK, (F - first + W - 1) // W)
            for i in range(group * num_atoms // groups, (group + 1) * num_atoms // groups):
                for e in range(row_start[i], row_start[i + 1]):
                    r, p = reverse[e], row[e]
                    if r < e:  # both directions in one go, by the first of them
                        continue
                    C, D = coefficients(c, p * num, num, zero), coefficients(dc, p * num, num, zero)
                    for v in range(many):
                        f = min(first + v * W, F - W)
                        mine, there = i * 9 * F + f, sender[e] * 9 * F + f
                        s, d = overlaps(g, dg, x, dx, mine, there, F)
                        if r != e:
                            more, steep = overlaps(g, dg, x, dx, there, mine, F)
                            s, d = plus(s, more), plus(d, steep)
                        if f < first + v * W:
                            fresh = fresh_lanes(x, first + v * W, f, keep)
                            s, d = times(fresh, s), times(fresh, d)
                        raise_parts(t, cell[p] * 3 * F + f, F, num, C, D, s, d)


@compiled
def embed_tangent(coef, dcoef, cell, table, Y, dY, Z, sender, row, row_start, out):
    """out_i = Σ_j (dY_ij w_ij + Y_ij dw_ij) (Z_i0 + Z_j1)."""
    num_atoms, _, F = out.shape
    num, W = coef.shape[1], num_lanes(Z)
    t, y, dy, z, o = table.reshape(-1), Y.reshape(-1), dY.reshape(-1), Z.reshape(-1), out.reshape(-1)
    c, dc = coef.reshape(-1), dcoef.reshape(-1)
    zero = splat(z, 0.0)
    for i in numba.prange(num_atoms):
        here = np.empty(9 * BLOCK * W, Z.dtype)
        for first in range(0, F, BLOCK * W):
            many = min(BLOCK, (F - first + W - 1) // W)
            clear(here)
            for e in range(row_start[i], row_start[i + 1]):
                p = row[e]
                C, D = coefficients(c, p * num, num, zero), coefficients(dc, p * num, num, zero)
                begin, there = cell[p] * 3 * F, (2 * sender[e] + 1) * F
                for v in range(many):
                    f, k = min(first + v * W, F - W), 9 * v * W
                    at = begin + f
                    factor = load(z, 2 * i * F + f) + load(z, there + f)
                    T0, T1 = rows(t, at, 3 * F, num, zero), rows(t, at + F, 3 * F, num, zero)
                    T2 = rows(t, at + 2 * F, 3 * F, num, zero)
                    w0, w1, w2 = factor * weight(C, T0), factor * weight(C, T1), factor * weight(C, T2)
                    sums = add(components(here, k, W), weighted(directions(dy, 9 * e), w0, w1, w2))
                    w0, w1, w2 = factor * weight(D, T0), factor * weight(D, T1), factor * weight(D, T2)
                    put(here, k, W, add(sums, weighted(directions(y, 9 * e), w0, w1, w2)))
            for v in range(many):
                put(o, i * 9 * F + min(first + v * W, F - W), F, components(here, 9 * v * W, W))


@inlined
def onto_directions(y, dy, at, g, dg):
    """Inner products by part of what an edge puts into its weights and into their derivatives."""
    Y = directions(y, at)
    return plus(by_part(g, Y), by_part(dg, directions(dy, at))), by_part(dg, Y)


@inlined
def dot3(w0, w1, w2, v):
    """Inner product of two sets of three."""
    v0, v1, v2 = v
    return w0 * v0 + w1 * v1 + w2 * v2


@compiled
def embed_reverse(coef, dcoef, cell, table, O, dO, Y, dY, Z, sender, row, reverse, row_start, out, out_Z):
    """Gradients of :func:`torchmdnet.ops.kernels.edges.embed_sum` and of :func:`embed_tangent` together.

    In the table, as in :func:`table_reverse`, and in the factors: (T, R, 3 F) and (T, N, 2, F) for T groups of atoms.
    """
    num_atoms, _, F = O.shape
    num, W = coef.shape[1], num_lanes(O)
    g, dg, t, z = O.reshape(-1), dO.reshape(-1), table.reshape(-1), Z.reshape(-1)
    y, dy, c, dc = Y.reshape(-1), dY.reshape(-1), coef.reshape(-1), dcoef.reshape(-1)
    zero, one = splat(g, 0.0), splat(g, 1.0)
    groups = out.shape[0]
    for group in numba.prange(groups):
        ow, oz = out[group].reshape(-1), out_Z[group].reshape(-1)
        keep = np.empty(W, O.dtype)
        clear(ow)
        clear(oz)
        for first in range(0, F, BLOCK * W):
            many = min(BLOCK, (F - first + W - 1) // W)
            for i in range(group * num_atoms // groups, (group + 1) * num_atoms // groups):
                for e in range(row_start[i], row_start[i + 1]):
                    r, p, j = reverse[e], row[e], sender[e]
                    if r < e:
                        continue
                    C, D = coefficients(c, p * num, num, zero), coefficients(dc, p * num, num, zero)
                    for v in range(many):
                        f = min(first + v * W, F - W)
                        fresh = fresh_lanes(g, first + v * W, f, keep) if f < first + v * W else one
                        at = cell[p] * 3 * F + f
                        T0, T1 = rows(t, at, 3 * F, num, zero), rows(t, at + F, 3 * F, num, zero)
                        T2 = rows(t, at + 2 * F, 3 * F, num, zero)
                        w0, w1, w2 = weight(C, T0), weight(C, T1), weight(C, T2)
                        d0, d1, d2 = weight(D, T0), weight(D, T1), weight(D, T2)
                        a, b = components(g, i * 9 * F + f, F), components(dg, i * 9 * F + f, F)
                        s, d = onto_directions(y, dy, 9 * e, a, b)
                        to_i, from_j = 2 * i * F + f, (2 * j + 1) * F + f
                        of_factor = fresh * (dot3(w0, w1, w2, s) + dot3(d0, d1, d2, d))
                        store(oz, to_i, load(oz, to_i) + of_factor)
                        store(oz, from_j, load(oz, from_j) + of_factor)
                        factor = fresh * (load(z, to_i) + load(z, from_j))
                        s, d = times(factor, s), times(factor, d)
                        if r != e:
                            a, b = components(g, j * 9 * F + f, F), components(dg, j * 9 * F + f, F)
                            more, steep = onto_directions(y, dy, 9 * r, a, b)
                            to_j, from_i = 2 * j * F + f, (2 * i + 1) * F + f
                            of_factor = fresh * (dot3(w0, w1, w2, more) + dot3(d0, d1, d2, steep))
                            store(oz, to_j, load(oz, to_j) + of_factor)
                            store(oz, from_i, load(oz, from_i) + of_factor)
                            factor = fresh * (load(z, to_j) + load(z, from_i))
                            s, d = plus(s, times(factor, more)), plus(d, times(factor, steep))
                        raise_parts(ow, at, F, num, C, D, s, d)
