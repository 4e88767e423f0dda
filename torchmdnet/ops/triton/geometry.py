"""Kernels between distances and vectors of edges and what messages read of them, and from slopes in these to forces.

Letters: r is the distance of a pair, t the place in its cell of the grid, u = vec / r the direction of an edge, Y its
nine components (:func:`torchmdnet.ops.irreps.harmonics`). An edge e and the edge ``reverse[e]`` of opposite direction
belong to the pair ``of_edge[e]``; a self loop is its own reverse, and all of them share the last pair, at distance 0.
Nothing is added atomically: sums have one order, so numbers are the same from call to call.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["edges_forward", "geometry_backward", "pairs_forward", "pull_back"]

_R2, _R3, _R6, _PI = tl.constexpr(2**0.5), tl.constexpr(3**0.5), tl.constexpr(6**-0.5), tl.constexpr(3.141592653589793)


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["dist", "cell"])
def pairs_forward(
    dist, coef, slope, cell, P,
    START: tl.constexpr, STOP: tl.constexpr, CELLS: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a pair reads of a table, Σ_k coef_k table[cell + k] with the envelope included, and derivatives in r."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    r = tl.load(dist + p, mask, 0)
    T = r.dtype
    scale = tl.full([1], CELLS / (STOP - START), T)
    start, stop = tl.full([1], START, T), tl.full([1], STOP, T)
    inside = (r >= start) & (r <= stop)
    place = (tl.where(r < start, start, tl.where(r > stop, stop, r)) - start) * scale
    whole = tl.floor(tl.where(place == place, place, 0))  # what is not a number reads the first cell
    whole = tl.minimum(whole, CELLS - 1)
    t = place - whole
    tl.store(cell + p, whole.to(tl.int64), mask)
    t2 = t * t
    t3, t4 = t2 * t, t2 * t2
    t5 = t4 * t
    half = tl.full([1], 0.5, T)
    pi = tl.full([1], _PI, T)
    if LOWER > 0:
        span = tl.full([1], 2 / (UPPER - LOWER), T)
        phase, rate = pi * (span * (r - tl.full([1], LOWER, T)) + 1), pi * span
        fades = (r < tl.full([1], UPPER, T)) & (r > tl.full([1], LOWER, T))
    else:
        rate = pi / tl.full([1], UPPER, T)
        phase = r * rate
        fades = r < tl.full([1], UPPER, T)
    fade = tl.where(fades, half * (tl.cos(phase) + 1), 0)
    steep = tl.where(fades, -half * tl.sin(phase) * rate, 0)
    rise = tl.where(inside, fade * scale, 0) / 120
    fade, steep = fade / 120, steep / 120
    s = 1 - t
    s4 = s * s * s * s
    b0, d0 = s4 * s, -5 * s4
    b1, d1 = 26 - 50 * t + 20 * t2 + 20 * t3 - 20 * t4 + 5 * t5, -50 + 40 * t + 60 * t2 - 80 * t3 + 25 * t4
    b2, d2 = 66 - 60 * t2 + 30 * t4 - 10 * t5, -120 * t + 120 * t3 - 50 * t4
    b3, d3 = 26 + 50 * t + 20 * t2 - 20 * t3 - 20 * t4 + 10 * t5, 50 + 40 * t - 60 * t2 - 80 * t3 + 50 * t4
    b4, d4 = 1 + 5 * t + 10 * t2 + 10 * t3 + 5 * t4 - 5 * t5, 5 + 20 * t + 30 * t2 + 20 * t3 - 25 * t4
    b5, d5 = t5, 5 * t4
    at, to = coef + 6 * p, slope + 6 * p
    tl.store(at, fade * b0, mask)
    tl.store(at + 1, fade * b1, mask)
    tl.store(at + 2, fade * b2, mask)
    tl.store(at + 3, fade * b3, mask)
    tl.store(at + 4, fade * b4, mask)
    tl.store(at + 5, fade * b5, mask)
    tl.store(to, steep * b0 + rise * d0, mask)
    tl.store(to + 1, steep * b1 + rise * d1, mask)
    tl.store(to + 2, steep * b2 + rise * d2, mask)
    tl.store(to + 3, steep * b3 + rise * d3, mask)
    tl.store(to + 4, steep * b4 + rise * d4, mask)
    tl.store(to + 5, steep * b5 + rise * d5, mask)


@triton.jit
def direction(vec, dist, of_edge, e, mask):
    """u of edges and 1 / r, zeros for self loops; and the pair."""
    p = tl.load(of_edge + e, mask, 0)
    r = tl.load(dist + p, mask, 0)
    share = tl.where(r == 0, 0, 1 / tl.where(r == 0, 1, r))
    u0 = tl.load(vec + 3 * e, mask, 0) * share
    u1 = tl.load(vec + 3 * e + 1, mask, 0) * share
    u2 = tl.load(vec + 3 * e + 2, mask, 0) * share
    return u0, u1, u2, share, p


@triton.jit(do_not_specialize=["E"], do_not_specialize_on_alignment=["vec", "dist", "of_edge"])
def edges_forward(vec, dist, of_edge, out, E, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Components Y of the directions of edges, (E, 9); SIGN is that of the antisymmetric ones."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    u0, u1, u2, _, _ = direction(vec, dist, of_edge, e, mask)
    r2, r6 = tl.full([1], _R2, u0.dtype), tl.full([1], _R6, u0.dtype)
    at, odd = out + 9 * e, SIGN * r2
    tl.store(at, tl.full([BLOCK], _R3, u0.dtype), mask)
    tl.store(at + 1, odd * u0, mask)
    tl.store(at + 2, odd * u1, mask)
    tl.store(at + 3, odd * u2, mask)
    tl.store(at + 4, r2 * u0 * u1, mask)
    tl.store(at + 5, r2 * u1 * u2, mask)
    tl.store(at + 6, r2 * u0 * u2, mask)
    tl.store(at + 7, (u0 * u0 - u1 * u1) / r2, mask)
    tl.store(at + 8, r6 * (2 * u2 * u2 - u0 * u0 - u1 * u1), mask)


@triton.jit
def component(of_Y, e, c, E, mask, NUM_Y: tl.constexpr):
    """The slope in one component of Y, of which several programs found parts."""
    total = tl.load(of_Y + 9 * e + c, mask, 0)
    for b in tl.static_range(1, NUM_Y):
        total += tl.load(of_Y + b * E.to(tl.int64) * 9 + 9 * e + c, mask, 0)
    return total


@triton.jit
def slopes_of_edge(
    vec, dist, of_edge, slope, of_Y, of_coef, e, E, mask, SIGN: tl.constexpr, NUM_Y: tl.constexpr, NUM: tl.constexpr
):
    """The slopes in the vector of each edge and, from this edge, in the distance of its pair."""
    u0, u1, u2, share, p = direction(vec, dist, of_edge, e, mask)
    r2, r6 = tl.full([1], _R2, u0.dtype), tl.full([1], _R6, u0.dtype)
    odd = SIGN * r2
    y4, y5 = component(of_Y, e, 4, E, mask, NUM_Y) * r2, component(of_Y, e, 5, E, mask, NUM_Y) * r2
    y6, y7 = component(of_Y, e, 6, E, mask, NUM_Y) * r2, component(of_Y, e, 7, E, mask, NUM_Y) * r2
    y8 = component(of_Y, e, 8, E, mask, NUM_Y) * r6
    g0 = odd * component(of_Y, e, 1, E, mask, NUM_Y) + y4 * u1 + y6 * u2 + y7 * u0 - 2 * y8 * u0
    g1 = odd * component(of_Y, e, 2, E, mask, NUM_Y) + y4 * u0 + y5 * u2 - y7 * u1 - 2 * y8 * u1
    g2 = odd * component(of_Y, e, 3, E, mask, NUM_Y) + y5 * u1 + y6 * u0 + 4 * y8 * u2
    along = -(g0 * u0 + g1 * u1 + g2 * u2) * share
    for k in tl.static_range(6):
        total = tl.zeros_like(u0)
        for b in tl.static_range(NUM):
            total += tl.load(of_coef + (b * E.to(tl.int64) + e) * 6 + k, mask, 0)
        along += total * tl.load(slope + 6 * p + k, mask, 0)
    return g0 * share, g1 * share, g2 * share, along, share, p


@triton.jit(do_not_specialize=["E"], do_not_specialize_on_alignment=["vec", "dist", "of_edge", "reverse"])
def geometry_backward(
    vec, dist, of_edge, reverse, slope, of_Y, of_coef, of_vec, of_dist, E,
    SIGN: tl.constexpr, NUM_Y: tl.constexpr, NUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slopes in vectors (E, 3) and distances (P,), from those in Y (NUM_Y, E, 9) and in coefficients (NUM, E, 6)."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < E
    g0, g1, g2, along, share, p = slopes_of_edge(vec, dist, of_edge, slope, of_Y, of_coef, e, E, mask, SIGN, NUM_Y, NUM)
    tl.store(of_vec + 3 * e, g0, mask)
    tl.store(of_vec + 3 * e + 1, g1, mask)
    tl.store(of_vec + 3 * e + 2, g2, mask)
    back = tl.load(reverse + e, mask, 0)
    _, _, _, more, _, _ = slopes_of_edge(vec, dist, of_edge, slope, of_Y, of_coef, back, E, mask, SIGN, NUM_Y, NUM)
    # one edge of a pair writes, the first, so that the order of the sum is always the same
    tl.store(of_dist + p, tl.where(share == 0, 0, along + more), mask & (e <= back))


@triton.jit
def whole_slope(vec, of_vec, dist, of_dist, of_edge, e, mask):
    """The whole slope in the vector of an edge, of which each direction of a pair has half of that in the distance."""
    p = tl.load(of_edge + e, mask, 0)
    r = tl.load(dist + p, mask, 0)
    half = tl.full([1], 0.5, r.dtype)
    ratio = tl.where(r == 0, 0, half * tl.load(of_dist + p, mask, 0) / tl.where(r == 0, 1, r))
    s0 = tl.load(of_vec + 3 * e, mask, 0) + ratio * tl.load(vec + 3 * e, mask, 0)
    s1 = tl.load(of_vec + 3 * e + 1, mask, 0) + ratio * tl.load(vec + 3 * e + 1, mask, 0)
    s2 = tl.load(of_vec + 3 * e + 2, mask, 0) + ratio * tl.load(vec + 3 * e + 2, mask, 0)
    return s0, s1, s2


@triton.jit(do_not_specialize_on_alignment=["row_start", "of_edge", "reverse", "vec", "dist", "of_vec", "of_dist"])
def pull_back(
    row_start, of_edge, reverse, vec, dist, of_vec, of_dist, forces, virial,
    HAS_VIRIAL: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Forces (N, 3) from slopes in vectors and distances, and what the edges of each atom add to a virial, (N, 9)."""
    i = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_start + i), tl.load(row_start + i + 1)
    zero = tl.zeros([EDGES], vec.dtype.element_ty)
    f0, f1, f2 = zero, zero, zero
    if HAS_VIRIAL:
        v0, v1, v2, v3, v4, v5, v6, v7, v8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(first, last, EDGES):
        e = start + tl.arange(0, EDGES)
        mask = e < last
        s0, s1, s2 = whole_slope(vec, of_vec, dist, of_dist, of_edge, e, mask)
        back = tl.load(reverse + e, mask, 0)
        t0, t1, t2 = whole_slope(vec, of_vec, dist, of_dist, of_edge, back, mask)
        f0 += t0 - s0
        f1 += t1 - s1
        f2 += t2 - s2
        if HAS_VIRIAL:
            x = tl.load(vec + 3 * e, mask, 0)
            y = tl.load(vec + 3 * e + 1, mask, 0)
            z = tl.load(vec + 3 * e + 2, mask, 0)
            v0 += x * s0
            v1 += x * s1
            v2 += x * s2
            v3 += y * s0
            v4 += y * s1
            v5 += y * s2
            v6 += z * s0
            v7 += z * s1
            v8 += z * s2
    at = forces + 3 * i
    tl.store(at, tl.sum(f0, 0))
    tl.store(at + 1, tl.sum(f1, 0))
    tl.store(at + 2, tl.sum(f2, 0))
    if HAS_VIRIAL:
        at = virial + 9 * i
        tl.store(at, tl.sum(v0, 0))
        tl.store(at + 1, tl.sum(v1, 0))
        tl.store(at + 2, tl.sum(v2, 0))
        tl.store(at + 3, tl.sum(v3, 0))
        tl.store(at + 4, tl.sum(v4, 0))
        tl.store(at + 5, tl.sum(v5, 0))
        tl.store(at + 6, tl.sum(v6, 0))
        tl.store(at + 7, tl.sum(v7, 0))
        tl.store(at + 8, tl.sum(v8, 0))
