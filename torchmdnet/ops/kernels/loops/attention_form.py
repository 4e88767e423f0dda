"""Loops of attention over neighbours, shared among threads by the atom whose features they write.

Layout: q and k are (N, F), X is (N, 5 F) and the result (N, 4 F), or both (N, F) where there are no vectors; S is
(E, H), u (E, 3), fade (P,), the table (R, L F), coef (P, K). Edges are sorted by receiver and come in pairs:
``reverse`` (E,) is the edge of opposite direction, which uses the same row p of the filter.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

import numpy as np

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.loops.filters import clear, interpolate, project, scatter
from torchmdnet.ops.kernels.sharing import claimed, compiled
from torchmdnet.ops.kernels.simd import lanes_that_divide, lanes_that_fit, load, splat, store, total

__all__ = [
    "attend",
    "attend_backward",
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


# The two loops below run over blocks of channels; a head is a whole number of them. Threads share the atoms in
# ``num_ranges`` ranges. A pair is read once where both of its atoms are of one range, and else once for each.


@compiled
def attend(
    job,
    coef,
    cell,
    table,
    fade,
    q,
    k,
    X,
    u,
    sender,
    row,
    reverse,
    row_start,
    num_heads,
    vectors_fade,
    num_ranges,
    out,
):
    """See :func:`torchmdnet.ops.attention.attend`."""
    num_atoms, F = q.shape
    size, num_sent, num_got = table.shape[1], X.shape[1], out.shape[1]
    W = lanes_that_divide(q, F // num_heads)
    blocks = F // W // num_heads
    U, O = u.reshape(-1), out.reshape(-1)
    Q, K, V = q.reshape(-1), k.reshape(-1), X.reshape(-1)
    for part in claimed(job, num_ranges):
        w, a = np.empty(size, q.dtype), np.empty(num_heads, q.dtype)
        one = w.dtype.type(1)
        first, last = part * num_atoms // num_ranges, (part + 1) * num_atoms // num_ranges
        for n in range(first * num_got, last * num_got):
            O[n] = 0
        for atom in range(first, last):
            for edge in range(row_start[atom], row_start[atom + 1]):
                p, r = row[edge], reverse[edge]
                is_mine = first <= sender[edge] < last
                if is_mine and r < edge:
                    continue
                interpolate(table, coef, cell, p, w, W)
                for way in range(2 if is_mine and r > edge else 1):
                    i, j, e = (atom, sender[edge], edge) if way == 0 else (sender[edge], atom, r)
                    i_F, j_F, i_O, j_V = i * F, j * F, i * num_got, j * num_sent
                    for h in range(num_heads):
                        s = splat(w, 0.0)
                        for block in range(h * blocks, h * blocks + blocks):
                            f = W * block
                            s += load(Q, i_F + f) * load(K, j_F + f) * load(w, f)
                        a[h] = total(s)
                    for h in range(num_heads):
                        a[h] *= fade[p] / (one + math.exp(-a[h]))
                    for h in range(num_heads):
                        s = splat(w, a[h])
                        for block in range(h * blocks, h * blocks + blocks):
                            f = W * block
                            store(O, i_O + f, load(O, i_O + f) + s * load(V, j_V + f) * load(w, F + f))
                    if num_got == F:
                        continue
                    g = splat(w, fade[p] if vectors_fade else one)
                    u0, u1, u2 = splat(w, U[3 * e]), splat(w, U[3 * e + 1]), splat(w, U[3 * e + 2])
                    for block in range(F // W):
                        f = W * block
                        f1, x1 = i_O + F + f, j_V + F + f
                        f2, x2 = f1 + F, x1 + F
                        f3, x3 = f2 + F, x2 + F
                        beta, gamma = g * load(w, 2 * F + f), g * load(w, 3 * F + f) * load(V, x1)
                        store(O, f1, load(O, f1) + gamma * u0 + beta * load(V, x2))
                        store(O, f2, load(O, f2) + gamma * u1 + beta * load(V, x3))
                        store(O, f3, load(O, f3) + gamma * u2 + beta * load(V, x3 + F))


@compiled
def attend_backward(
    job, coef, cell, table, fade, q, k, X, u, grad, sender, row, reverse, row_start, num_heads, vectors_fade,
    num_ranges, of_q, of_k, of_X, of_u, of_edge,
):  # fmt: skip
    """Gradients of :func:`attend`, given that of its result; of_edge (E, K + 1) holds those of coef and of fade."""
    num_atoms, F = q.shape
    size, num_sent, num_got, num = table.shape[1], X.shape[1], grad.shape[1], coef.shape[1]
    W = lanes_that_divide(q, F // num_heads)
    blocks = F // W // num_heads
    U, G = u.reshape(-1), grad.reshape(-1)
    Q, K, V = q.reshape(-1), k.reshape(-1), X.reshape(-1)
    dQ, dK, dV, dU = of_q.reshape(-1), of_k.reshape(-1), of_X.reshape(-1), of_u.reshape(-1)
    for part in claimed(job, num_ranges):
        w, dw = np.empty(size, q.dtype), np.empty(size, q.dtype)
        a, b = np.empty(num_heads, q.dtype), np.empty(num_heads, q.dtype)
        zero, one = w.dtype.type(0), w.dtype.type(1)
        first, last = part * num_atoms // num_ranges, (part + 1) * num_atoms // num_ranges
        for n in range(first * F, last * F):
            dQ[n] = 0
            dK[n] = 0
        for n in range(first * num_sent, last * num_sent):
            dV[n] = 0
        for atom in range(first, last):
            for edge in range(row_start[atom], row_start[atom + 1]):
                p, r = row[edge], reverse[edge]
                is_mine = first <= sender[edge] < last
                if is_mine and r < edge:
                    continue
                interpolate(table, coef, cell, p, w, W)
                for n in range(size):
                    dw[n] = 0
                of_fade = zero
                for way in range(2 if r != edge else 1):
                    i, j, e = (atom, sender[edge], edge) if way == 0 else (sender[edge], atom, r)
                    i_F, j_F, i_G, j_V = i * F, j * F, i * num_got, j * num_sent
                    for h in range(num_heads):
                        s, y = splat(w, 0.0), splat(w, 0.0)
                        for block in range(h * blocks, h * blocks + blocks):
                            f = W * block
                            s += load(Q, i_F + f) * load(K, j_F + f) * load(w, f)
                            y += load(G, i_G + f) * load(V, j_V + f) * load(w, F + f)
                        a[h], b[h] = total(s), total(y)
                    of_attention = zero
                    for h in range(num_heads):  # a: the attention, b: the gradient of the product it is made of
                        x = a[h]
                        sigmoid = one / (one + math.exp(-x))
                        of_attention += b[h] * x * sigmoid
                        a[h] = fade[p] * x * sigmoid
                        b[h] *= fade[p] * sigmoid * (one + x * (one - sigmoid))
                    if way == 0 or is_mine:  # what belongs to the receiver
                        for h in range(num_heads):
                            y = splat(w, b[h])
                            for block in range(h * blocks, h * blocks + blocks):
                                f = W * block
                                store(dQ, i_F + f, load(dQ, i_F + f) + y * load(K, j_F + f) * load(w, f))
                    if way == 0 and not is_mine:
                        continue
                    of_fade += of_attention  # what belongs to the sender and to the edge
                    for h in range(num_heads):
                        s, y = splat(w, a[h]), splat(w, b[h])
                        for block in range(h * blocks, h * blocks + blocks):
                            f = W * block
                            of_key, of_value = y * load(Q, i_F + f), s * load(G, i_G + f)
                            store(dK, j_F + f, load(dK, j_F + f) + of_key * load(w, f))
                            store(dV, j_V + f, load(dV, j_V + f) + of_value * load(w, F + f))
                            store(dw, f, load(dw, f) + of_key * load(K, j_F + f))
                            store(dw, F + f, load(dw, F + f) + of_value * load(V, j_V + f))
                    if num_got == F:
                        continue
                    g = splat(w, fade[p] if vectors_fade else one)
                    u0, u1, u2 = splat(w, U[3 * e]), splat(w, U[3 * e + 1]), splat(w, U[3 * e + 2])
                    d0, d1, d2, d = splat(w, 0.0), splat(w, 0.0), splat(w, 0.0), splat(w, 0.0)
                    for block in range(F // W):
                        f = W * block
                        g1, x1 = i_G + F + f, j_V + F + f
                        G1, G2, G3 = load(G, g1), load(G, g1 + F), load(G, g1 + 2 * F)
                        V1, w2, w3 = load(V, x1), load(w, 2 * F + f), load(w, 3 * F + f)
                        x2 = x1 + F
                        x3 = x2 + F
                        x4 = x3 + F
                        along = G1 * u0 + G2 * u1 + G3 * u2
                        within = G1 * load(V, x2) + G2 * load(V, x3) + G3 * load(V, x4)
                        beta, sent = g * w2, V1 * w3
                        store(dV, x1, load(dV, x1) + g * along * w3)
                        store(dV, x2, load(dV, x2) + G1 * beta)
                        store(dV, x3, load(dV, x3) + G2 * beta)
                        store(dV, x4, load(dV, x4) + G3 * beta)
                        store(dw, 2 * F + f, load(dw, 2 * F + f) + g * within)
                        store(dw, 3 * F + f, load(dw, 3 * F + f) + g * along * V1)
                        d0 += sent * G1
                        d1 += sent * G2
                        d2 += sent * G3
                        d += within * w2 + along * sent
                    factor = fade[p] if vectors_fade else one
                    dU[3 * e], dU[3 * e + 1], dU[3 * e + 2] = factor * total(d0), factor * total(d1), factor * total(d2)
                    if vectors_fade:
                        of_fade += total(d)
                project(table, cell, p, dw, num, of_edge, edge, W)
                of_edge[edge, num] = of_fade
                if is_mine and r != edge:  # one of them speaks for both
                    for n in range(num + 1):
                        of_edge[r, n] = 0
