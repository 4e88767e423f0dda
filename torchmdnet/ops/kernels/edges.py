"""Loops over edges, shared among threads by receiving atom.

The radial weights of an edge are never stored: each loop makes them in a buffer of one row from the table of its
filter, w = Σ_k coef_k table[cell + k]. Layout: O and X are (N, C, F), Y is (E, C), Z is (N, 2, F), the table (R, L, F),
coef (P, K). ``starts`` (L + 1,) says where the components of each part begin. Edges are sorted by receiver,
``row_start`` (N + 1,), and ``row`` (E,) is the filter row of an edge.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import called, inlined
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import fit, lanes_that_fit, load, repeat, splat, store, total

__all__ = [
    "embed_both",
    "embed_coef",
    "embed_direction",
    "embed_factor",
    "embed_sum",
    "embed_table",
    "fold",
    "message_both",
    "message_coef",
    "message_sum",
    "message_table",
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


# The three parts are spelled out below, as LLVM vectorises only where it can see that no index is negative.


@inlined
def weighted(here, w, there, F, parts):
    """here_c += w there_c, with the weight of each component's part."""
    if parts == 3:
        for f in range(F):
            here[f] += w[f] * there[f]
        for c in range(1, 4):
            for f in range(F):
                here[c * F + f] += w[F + f] * there[c * F + f]
        for c in range(4, 9):
            for f in range(F):
                here[c * F + f] += w[2 * F + f] * there[c * F + f]
    else:
        for c in range(here.shape[0] // F):
            for f in range(F):
                here[c * F + f] += w[f] * there[c * F + f]


@inlined
def overlap(here, there, F, parts, s):
    """s = Σ_c here_c there_c within each part."""
    if parts == 3:
        for f in range(F):
            s[f] = here[f] * there[f]
            s[F + f] = (
                here[F + f] * there[F + f] + here[2 * F + f] * there[2 * F + f] + here[3 * F + f] * there[3 * F + f]
            )
            s[2 * F + f] = (
                here[4 * F + f] * there[4 * F + f]
                + here[5 * F + f] * there[5 * F + f]
                + here[6 * F + f] * there[6 * F + f]
                + here[7 * F + f] * there[7 * F + f]
                + here[8 * F + f] * there[8 * F + f]
            )
    else:
        for f in range(F):
            s[f] = here[f] * there[f]
        for c in range(1, here.shape[0] // F):
            for f in range(F):
                s[f] += here[c * F + f] * there[c * F + f]


@compiled
def message_sum(job, coef, cell, table, X, sender, row, row_start, starts, out):
    """out_i = Σ_j w_ij X_j."""
    num_atoms, size = X.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(X, parts * F)
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, X.dtype)
        here = out[i]
        clear(here)
        for e in range(row_start[i], row_start[i + 1]):
            interpolate(table, coef, cell, row[e], w, W)
            there = X[sender[e]]
            weighted(here, w, there, F, parts)


@compiled
def message_both(job, coef, cell, table, O, X, sender, row, back, row_start, starts, out, out_edge):
    """out_j = Σ_i w_ij O_i, and the derivatives in the coefficients of every edge, Σ_f table[cell + k] O_i X_j."""
    num_atoms, size = X.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(X, parts * F)
    num = coef.shape[1]
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, X.dtype)
        here, mine = out[i], X[i]
        clear(here)
        for e in range(row_start[i], row_start[i + 1]):
            p = back[e]
            interpolate(table, coef, cell, p, w, W)
            there = O[sender[e]]
            weighted(here, w, there, F, parts)
            overlap(mine, there, F, parts, w)
            project(table, cell, p, w, num, out_edge, e, W)


@compiled
def message_coef(job, cell, table, O, X, sender, row, row_start, starts, out_edge):
    """The derivatives in the coefficients of every edge, Σ_f table[cell + k] O_i X_j."""
    num_atoms, size = X.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(X, parts * F)
    num = out_edge.shape[1]
    for i in claimed(job, num_atoms):
        s = np.empty(parts * F, X.dtype)
        mine = O[i]
        for e in range(row_start[i], row_start[i + 1]):
            overlap(mine, X[sender[e]], F, parts, s)
            project(table, cell, row[e], s, num, out_edge, e, W)


@inlined
def scatter(s, coef, cell, p, table):
    """table[cell + k] += coef_k s, the adjoint of :func:`interpolate` in the table."""
    size = s.shape[0]
    g = cell[p]
    for k in range(coef.shape[1]):
        scale, row = coef[p, k], table[g + k]
        for f in range(size):
            row[f] += scale * s[f]


@compiled
def message_table(job, coef, cell, O, X, sender, row, reverse, row_start, starts, out):
    """out[cell + k] = Σ_e coef_k O_i X_j; ``out`` (T, R, L F) has one table for each of T groups of atoms."""
    num_atoms, size = X.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    groups = out.shape[0]
    for group in claimed(job, groups):
        table = out[group]
        for r in range(table.shape[0]):
            clear(table[r])
        s, other = np.empty(parts * F, X.dtype), np.empty(parts * F, X.dtype)
        for i in range(group * num_atoms // groups, (group + 1) * num_atoms // groups):
            for e in range(row_start[i], row_start[i + 1]):
                j, r = sender[e], reverse[e]
                is_shared = row[r] == row[e] and r != e  # both directions in one go, by the first of them
                if is_shared and r < e:
                    continue
                overlap(O[i], X[j], F, parts, s)
                if is_shared:
                    overlap(O[j], X[i], F, parts, other)
                    for f in range(parts * F):
                        s[f] += other[f]
                scatter(s, coef, cell, row[e], table)


@inlined
def weigh(w, factor_i, factor_j):
    """w *= Z_i0 + Z_j1 for every part."""
    F = factor_i.shape[0]
    for part in range(w.shape[0] // F):
        weight = w[part * F : part * F + F]
        for f in range(F):
            weight[f] *= factor_i[f] + factor_j[f]


@compiled
def embed_sum(job, coef, cell, table, Y, Z, sender, row, row_start, starts, out):
    """out_i = Σ_j Y_ij w_ij (Z_i0 + Z_j1)."""
    num_atoms, size = out.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(Z, parts * F)
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, Z.dtype)
        here = out[i]
        clear(here)
        for e in range(row_start[i], row_start[i + 1]):
            interpolate(table, coef, cell, row[e], w, W)
            weigh(w, Z[i, 0], Z[sender[e], 1])
            spread(here, Y[e], w, F, parts)


@inlined
def along(here, y, F, parts, s):
    """s = Σ_c y_c here_c within each part."""
    if parts == 3:
        y0, y1, y2, y3, y4, y5, y6, y7, y8 = y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], y[8]
        for f in range(F):
            s[f] = y0 * here[f]
            s[F + f] = y1 * here[F + f] + y2 * here[2 * F + f] + y3 * here[3 * F + f]
            s[2 * F + f] = (
                y4 * here[4 * F + f]
                + y5 * here[5 * F + f]
                + y6 * here[6 * F + f]
                + y7 * here[7 * F + f]
                + y8 * here[8 * F + f]
            )
    else:
        for f in range(F):
            s[f] = y[0] * here[f]
        for c in range(1, y.shape[0]):
            for f in range(F):
                s[f] += y[c] * here[c * F + f]


@inlined
def spread(here, y, w, F, parts):
    """here_c += y_c w, with the weight of each component's part; the adjoint of :func:`along`."""
    if parts == 3:
        y0, y1, y2, y3, y4, y5, y6, y7, y8 = y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], y[8]
        for f in range(F):
            here[f] += y0 * w[f]
        for f in range(F):
            weight = w[F + f]
            here[F + f] += y1 * weight
            here[2 * F + f] += y2 * weight
            here[3 * F + f] += y3 * weight
        for f in range(F):
            weight = w[2 * F + f]
            here[4 * F + f] += y4 * weight
            here[5 * F + f] += y5 * weight
            here[6 * F + f] += y6 * weight
            here[7 * F + f] += y7 * weight
            here[8 * F + f] += y8 * weight
    else:
        for c in range(y.shape[0]):
            for f in range(F):
                here[c * F + f] += y[c] * w[f]


@inlined
def across(here, w, F, parts, out):
    """out_c = Σ_f w_f here_cf, with the weight of each component's part."""
    zero = w.dtype.type(0)
    if parts == 3:
        a0, a1, a2, a3, a4, a5, a6, a7, a8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        for f in range(F):
            a0 += w[f] * here[f]
            a1 += w[F + f] * here[F + f]
            a2 += w[F + f] * here[2 * F + f]
            a3 += w[F + f] * here[3 * F + f]
        for f in range(F):
            weight = w[2 * F + f]
            a4 += weight * here[4 * F + f]
            a5 += weight * here[5 * F + f]
            a6 += weight * here[6 * F + f]
            a7 += weight * here[7 * F + f]
            a8 += weight * here[8 * F + f]
        out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8] = a0, a1, a2, a3, a4, a5, a6, a7, a8
    else:
        for c in range(out.shape[0]):
            a0 = zero
            for f in range(F):
                a0 += w[f] * here[c * F + f]
            out[c] = a0


@compiled
def embed_both(job, coef, cell, table, O, Y, Z, sender, row, row_start, starts, out_Y, out_edge):
    """The derivatives in Y and in the coefficients of every edge."""
    num_atoms, size = O.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(O, parts * F)
    num = coef.shape[1]
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, O.dtype)
        here = O[i]
        for e in range(row_start[i], row_start[i + 1]):
            p = row[e]
            interpolate(table, coef, cell, p, w, W)
            weigh(w, Z[i, 0], Z[sender[e], 1])
            across(here, w, F, parts, out_Y[e])
            along(here, Y[e], F, parts, w)
            weigh(w, Z[i, 0], Z[sender[e], 1])
            project(table, cell, p, w, num, out_edge, e, W)


@compiled
def embed_direction(job, coef, cell, table, O, Z, sender, row, row_start, starts, out):
    """out_ij,c = Σ_f O_ic w_ij (Z_i0 + Z_j1)."""
    num_atoms, size = O.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(O, parts * F)
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, O.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            interpolate(table, coef, cell, row[e], w, W)
            weigh(w, Z[i, 0], Z[sender[e], 1])
            across(O[i], w, F, parts, out[e])


@compiled
def embed_coef(job, cell, table, O, Y, Z, sender, row, row_start, starts, out_edge):
    """The derivatives in the coefficients of every edge, Σ_cf table[cell + k] O_ic Y_ijc (Z_i0 + Z_j1)."""
    num_atoms, size = O.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(O, parts * F)
    num = out_edge.shape[1]
    for i in claimed(job, num_atoms):
        s = np.empty(parts * F, O.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            along(O[i], Y[e], F, parts, s)
            weigh(s, Z[i, 0], Z[sender[e], 1])
            project(table, cell, row[e], s, num, out_edge, e, W)


@compiled
def embed_table(job, coef, cell, O, Y, Z, sender, row, reverse, row_start, starts, out):
    """out[cell + k] = Σ_e coef_k Σ_c O_ic Y_ijc (Z_i0 + Z_j1), in T tables as in :func:`message_table`."""
    num_atoms, size = O.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    groups = out.shape[0]
    for group in claimed(job, groups):
        table = out[group]
        for r in range(table.shape[0]):
            clear(table[r])
        s, other = np.empty(parts * F, O.dtype), np.empty(parts * F, O.dtype)
        for i in range(group * num_atoms // groups, (group + 1) * num_atoms // groups):
            for e in range(row_start[i], row_start[i + 1]):
                j, r = sender[e], reverse[e]
                is_shared = row[r] == row[e] and r != e
                if is_shared and r < e:
                    continue
                along(O[i], Y[e], F, parts, s)
                weigh(s, Z[i, 0], Z[j, 1])
                if is_shared:
                    along(O[j], Y[r], F, parts, other)
                    weigh(other, Z[j, 0], Z[i, 1])
                    for f in range(parts * F):
                        s[f] += other[f]
                scatter(s, coef, cell, row[e], table)


@compiled
def embed_factor(job, coef, cell, table, O, Y, sender, row, back, reverse, row_start, starts, out):
    """out_i0 = Σ_j Σ_c O_ic Y_ijc w_ij and out_i1 = Σ_j Σ_c O_jc Y_jic w_ji."""
    num_atoms, size = O.shape
    parts = starts.shape[0] - 1
    F = size // starts[parts]
    W = lanes_that_fit(O, parts * F)
    for i in claimed(job, num_atoms):
        w = np.empty(parts * F, O.dtype)
        s = np.empty(parts * F, O.dtype)
        clear(out[i, 0])
        clear(out[i, 1])
        for e in range(row_start[i], row_start[i + 1]):
            for side in range(2):
                p = row[e] if side == 0 else back[e]
                if side == 0 or p != row[e]:
                    interpolate(table, coef, cell, p, w, W)
                if side == 0:
                    along(O[i], Y[e], F, parts, s)
                else:
                    along(O[sender[e]], Y[reverse[e]], F, parts, s)
                for part in range(parts):
                    accumulate(out[i, side], w[part * F : part * F + F], s[part * F : part * F + F])


@called
def fold(per_edge, rows, out):
    """Sum edges into the rows they belong to."""
    for p in range(out.shape[0]):
        clear(out[p])
    for e in range(per_edge.shape[0]):
        here = out[rows[e]]
        for k in range(per_edge.shape[1]):
            here[k] += per_edge[e, k]
