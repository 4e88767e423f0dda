r"""The embedding form in each of its slots.

.. math:: D(O, Y, c, T, Z) = \sum_{ij} \sum_{kcf} O_{icf} Y_{ijc}\, c_{ijk} T_{g(ij)+k,l(c),f} (Z_{i0f} + Z_{j1f})

with Y (E, C) and Z (N, 2, F). Other letters and the layout are those of :mod:`torchmdnet.ops.kernels.loops.filters`.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.filters import accumulate, clear, interpolate, project, scatter
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import lanes_that_fit

__all__ = [
    "embed_coef",
    "embed_direction",
    "embed_direction_and_coef",
    "embed_factor",
    "embed_features",
    "embed_table",
]


@inlined
def weigh(w, factor_i, factor_j):
    """w *= Z_i0 + Z_j1 for every part."""
    F = factor_i.shape[0]
    for part in range(w.shape[0] // F):
        weight = w[part * F : part * F + F]
        for f in range(F):
            weight[f] *= factor_i[f] + factor_j[f]


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
def raise_along(here, y, w, F, parts):
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
def embed_features(job, coef, cell, table, Y, Z, sender, row, row_start, starts, out):
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
            raise_along(here, Y[e], w, F, parts)


@compiled
def embed_direction_and_coef(job, coef, cell, table, O, Y, Z, sender, row, row_start, starts, out_Y, out_edge):
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
    """out[cell + k] = Σ_e coef_k Σ_c O_ic Y_ijc (Z_i0 + Z_j1), in T tables as in ``message_table``."""
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
