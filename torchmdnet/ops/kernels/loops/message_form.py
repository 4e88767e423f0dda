r"""The message form in each of its slots.

.. math:: M(O, c, T, X) = \sum_{ij} \sum_{kcf} O_{icf}\, c_{ijk} T_{g(ij)+k,l(c),f}\, X_{jcf}

Its derivative in O are sums of neighbours and that in X is the same sum over edges of opposite direction, so one loop
serves both (``message_features``). Letters and layout are those of :mod:`torchmdnet.ops.kernels.loops.filters`.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.filters import clear, interpolate, project, scatter
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import lanes_that_fit

__all__ = [
    "message_coef",
    "message_features",
    "message_features_and_coef",
    "message_table",
]


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
def message_features(job, coef, cell, table, X, sender, row, row_start, starts, out):
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
def message_features_and_coef(job, coef, cell, table, O, X, sender, row, back, row_start, starts, out, out_edge):
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
