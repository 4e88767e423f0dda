r"""The contraction of attention in each of its slots.

.. math:: T(S, q, k, c, T) = \sum_{ij} \sum_h S_{ijh} \sum_{d \in h} q_{id}\, k_{jd} \sum_n c_{ijn} T_{g(ij)+n,d}

with q and k (N, F) and S (E, H); the derivatives in q and k are one loop, with edges of opposite direction. Other
letters and the layout are those of :mod:`torchmdnet.ops.kernels.loops.filters`.
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
    "contract_coef",
    "contract_edges",
    "contract_receivers",
    "contract_table",
]


@inlined
def sum_heads(s, num_heads, total):
    """total_h = Σ_d s_hd."""
    D = s.shape[0] // num_heads
    for h in range(num_heads):
        add = s.dtype.type(0)
        for d in range(D):
            add += s[h * D + d]
        total[h] = add


@inlined
def spread_heads(total, num_heads, s):
    """s_hd = total_h."""
    D = s.shape[0] // num_heads
    for h in range(num_heads):
        value = total[h]
        for d in range(D):
            s[h * D + d] = value


@compiled
def contract_edges(job, coef, cell, table, q, k, sender, row, row_start, out):
    """out_ijh = Σ_d q_i k_j w_ij."""
    num_atoms, F = q.shape
    W = lanes_that_fit(q, F)
    num_heads = out.shape[1]
    for i in claimed(job, num_atoms):
        w = np.empty(F, q.dtype)
        mine = q[i]
        for e in range(row_start[i], row_start[i + 1]):
            interpolate(table, coef, cell, row[e], w, W)
            there = k[sender[e]]
            for f in range(F):
                w[f] *= mine[f] * there[f]
            sum_heads(w, num_heads, out[e])


@compiled
def contract_receivers(job, coef, cell, table, S, k, sender, row, row_start, out):
    """out_i = Σ_j S_ij k_j w_ij."""
    num_atoms, F = k.shape
    W = lanes_that_fit(k, F)
    num_heads = S.shape[1]
    for i in claimed(job, num_atoms):
        w, s = np.empty(F, k.dtype), np.empty(F, k.dtype)
        here = out[i]
        clear(here)
        for e in range(row_start[i], row_start[i + 1]):
            interpolate(table, coef, cell, row[e], w, W)
            spread_heads(S[e], num_heads, s)
            there = k[sender[e]]
            for f in range(F):
                here[f] += s[f] * there[f] * w[f]


@compiled
def contract_coef(job, cell, table, S, q, k, sender, row, row_start, out_edge):
    """The derivatives in the coefficients of every edge, Σ_f table[cell + k] S_ij q_i k_j."""
    num_atoms, F = q.shape
    W = lanes_that_fit(q, F)
    num_heads, num = S.shape[1], out_edge.shape[1]
    for i in claimed(job, num_atoms):
        s = np.empty(F, q.dtype)
        mine = q[i]
        for e in range(row_start[i], row_start[i + 1]):
            spread_heads(S[e], num_heads, s)
            there = k[sender[e]]
            for f in range(F):
                s[f] *= mine[f] * there[f]
            project(table, cell, row[e], s, num, out_edge, e, W)


@compiled
def contract_table(job, coef, cell, S, q, k, sender, row, row_start, out):
    """out[cell + k] = Σ_e coef_k S_ij q_i k_j; ``out`` (T, R, F) has one table for each of T groups of atoms."""
    num_atoms, F = q.shape
    num_heads, groups = S.shape[1], out.shape[0]
    for group in claimed(job, groups):
        table = out[group]
        for r in range(table.shape[0]):
            clear(table[r])
        s = np.empty(F, q.dtype)
        for i in range(group * num_atoms // groups, (group + 1) * num_atoms // groups):
            mine = q[i]
            for e in range(row_start[i], row_start[i + 1]):
                spread_heads(S[e], num_heads, s)
                there = k[sender[e]]
                for f in range(F):
                    s[f] *= mine[f] * there[f]
                scatter(s, coef, cell, row[e], table)
