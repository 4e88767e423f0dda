"""The loops of a TensorNet that are not operators of their own: geometry of edges, channel mixing, gates."""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import numpy as np

from torchmdnet.ops.kernels.compiling import called, inlined
from torchmdnet.ops.kernels.edges import clear
from torchmdnet.ops.kernels.nodes import add, components, dot, put
from torchmdnet.ops.kernels.sharing import claimed, compiled, moving
from torchmdnet.ops.kernels.simd import fit, lanes_that_fit, load, repeat, splat, store
from torchmdnet.ops.kernels.work import lanes_of

__all__ = [
    "add_norms_backward",
    "can_pack",
    "distances_backward",
    "fill_packed",
    "geometry",
    "geometry_tangent",
    "mix",
    "pack",
    "scale",
    "scale_backward",
    "scale_reverse",
    "scale_tangent",
    "squared_norms",
    "squared_norms_tangent",
    "vectors_backward",
]

_R2, _R6 = 2**0.5, 6**-0.5


@moving
def geometry(job, vec, dist, row, lower, upper, num_cells, basis, handedness, Y, u, coef, slope, cell):
    """Directions u = vec / dist, their components Y (E, 9), and where distances lie between the rows of a spline.

    ``coef`` (P, 6) are the coefficients times the cosine envelope, ``slope`` their derivatives in the distance.
    ``basis`` (6, 6) holds the polynomials of the B-splines. Without cells, each pair has two rows of its own, value and
    slope at its distance, and ``coef`` is (P, 2).
    """
    for e in claimed(job, vec.shape[0]):
        x, y, z = vec[e, 0], vec[e, 1], vec[e, 2]
        r = dist[row[e]]
        if r > 0:
            x, y, z = x / r, y / r, z / r
        u[e, 0], u[e, 1], u[e, 2] = x, y, z
        here = Y[e]
        here[0] = math.sqrt(3.0)
        here[1], here[2], here[3] = handedness * _R2 * x, handedness * _R2 * y, handedness * _R2 * z
        here[4], here[5], here[6] = _R2 * x * y, _R2 * y * z, _R2 * x * z
        here[7] = (x * x - y * y) / _R2
        here[8] = _R6 * (2 * z * z - x * x - y * y)
    step = (upper - lower) / max(num_cells, 1)
    for p in claimed(job, dist.shape[0], 1):
        r = dist[p]
        fade, steep = 0.0, 0.0
        if r < upper and (lower == 0 or r > lower):
            if lower > 0:
                scale = 2 * math.pi / (upper - lower)
                phase = scale * (r - lower) + math.pi
            else:
                scale = math.pi / upper
                phase = scale * r
            fade, steep = 0.5 * (math.cos(phase) + 1), -0.5 * scale * math.sin(phase)
        if num_cells == 0:
            cell[p] = 2 * p
            coef[p, 0], coef[p, 1], slope[p, 0], slope[p, 1] = fade, 0, steep, fade
            continue
        place = (min(max(r, lower), upper) - lower) / step
        g = min(max(int(place), 0), num_cells - 1)
        t = place - g
        cell[p] = g
        for k in range(6):
            value, rise = basis[k, 5], 0.0
            for n in range(4, -1, -1):
                rise = rise * t + value
                value = value * t + basis[k, n]
            coef[p, k] = fade * value
            slope[p, k] = fade * rise / step + steep * value


@moving
def vectors_backward(job, u, dist, row, handedness, grad_Y, out_vec):
    """The gradient of :func:`geometry` in the vectors (E, 3).

    ``grad_Y`` (S, E, 8), of the components beyond the first, is added up.
    """
    for e in claimed(job, u.shape[0]):
        r = dist[row[e]]
        x, y, z = u[e, 0], u[e, 1], u[e, 2]
        gx, gy, gz = 0.0, 0.0, 0.0
        for s in range(grad_Y.shape[0]):
            g = grad_Y[s, e]
            gx += handedness * _R2 * g[0] + _R2 * (g[3] * y + g[5] * z + g[6] * x) - 2 * _R6 * g[7] * x
            gy += handedness * _R2 * g[1] + _R2 * (g[3] * x + g[4] * z - g[6] * y) - 2 * _R6 * g[7] * y
            gz += handedness * _R2 * g[2] + _R2 * (g[4] * y + g[5] * x) + 4 * _R6 * g[7] * z
        if r > 0:
            out_vec[e, 0], out_vec[e, 1], out_vec[e, 2] = gx / r, gy / r, gz / r
        else:
            out_vec[e, 0], out_vec[e, 1], out_vec[e, 2] = 0, 0, 0


@called
def distances_backward(u, row, back, vec, grad_dist, grad_back, out_dist):
    """The gradient of :func:`geometry` in the distances (P,), when that in the vectors is known.

    ``grad_dist`` (S, E) is added up, as is ``grad_back`` (T, E) of edges in another order, whose pairs are ``back``.
    """
    clear(out_dist)
    for e in range(u.shape[0]):
        out_dist[row[e]] -= vec[e, 0] * u[e, 0] + vec[e, 1] * u[e, 1] + vec[e, 2] * u[e, 2]
    for t in range(grad_dist.shape[0]):
        for e in range(u.shape[0]):
            out_dist[row[e]] += grad_dist[t, e]
    for t in range(grad_back.shape[0]):
        for e in range(u.shape[0]):
            out_dist[back[e]] += grad_back[t, e]


@moving
def geometry_tangent(job, u, dist, row, handedness, slope, dvec, ddist, out_Y, out_coef):
    """Derivatives of :func:`geometry` as vectors and distances change: of the components Y and the coefficients."""
    for e in claimed(job, u.shape[0]):
        r = dist[row[e]]
        x, y, z = u[e, 0], u[e, 1], u[e, 2]
        dx, dy, dz = dvec[e, 0], dvec[e, 1], dvec[e, 2]
        change = ddist[row[e]]
        if r > 0:
            dx, dy, dz = (dx - change * x) / r, (dy - change * y) / r, (dz - change * z) / r
        else:
            dx, dy, dz = 0 * dx, 0 * dy, 0 * dz
        d = out_Y[e]
        d[0] = 0
        d[1], d[2], d[3] = handedness * _R2 * dx, handedness * _R2 * dy, handedness * _R2 * dz
        d[4], d[5], d[6] = _R2 * (dx * y + x * dy), _R2 * (dy * z + y * dz), _R2 * (dx * z + x * dz)
        d[7] = _R2 * (x * dx - y * dy)
        d[8] = 2 * _R6 * (2 * z * dz - x * dx - y * dy)
    for p in claimed(job, dist.shape[0], 1):
        for k in range(slope.shape[1]):
            out_coef[p, k] = slope[p, k] * ddist[p]


#: Atoms whose features stay in the first cache while weights pass by.
CHUNK = 8


def can_pack(num_channels: int, itemsize: int) -> bool:
    """Whether :func:`mix` takes so few channels."""
    return num_channels >= 2 * lanes_of(itemsize)


def pack(W: Any, *, turned: bool) -> Any:
    """Weights of the three parts (3, F, G), or turned (3, G, F), as :func:`mix` reads them: (3, blocks, F, 2 lanes)."""
    many = 2 * lanes_of(W.itemsize)
    F, G = W.shape[:0:-1] if turned else W.shape[1:]
    out = np.empty((3, (G + many - 1) // many, F, many), W.dtype)
    fill_packed(W, turned, out)
    return out


@called
def fill_packed(W, turned, out):
    """The loop of :func:`pack`; the last block overlaps the one before."""
    _, blocks, F, _ = out.shape
    G = W.shape[1] if turned else W.shape[2]
    many = 2 * lanes_that_fit(W, G, 2)
    for part in range(3):
        for block in range(blocks):
            first = fit(block * many, G, many)
            for f in range(F):
                for k in range(many):
                    out[part, block, f, k] = W[part, first + k, f] if turned else W[part, f, first + k]


@inlined
def row_of(r, c, first, atom):
    """Where row r of a part with c components lies among the components of all atoms."""
    return (atom + r // c) * 9 + first + r % c


@inlined
def put_two(o, k, W, a, b):
    """Store two vectors."""
    store(o, k, a)
    store(o, k + W, b)


@compiled
def mix(job, X, packed, out):
    """out_c = X_c W of the part of c: (N, 9, F) -> (N, 9, G), with weights from :func:`pack`.

    Six rows times two vectors of channels at a time keep twelve sums in registers; the last rows are made twice.
    """
    num_atoms, _, F = X.shape
    G, blocks = out.shape[2], packed.shape[1]
    W = lanes_that_fit(X, G, 2)
    x, w, o = X.reshape(-1), packed.reshape(-1), out.reshape(-1)
    zero = splat(x, 0.0)
    for chunk in claimed(job, (num_atoms + CHUNK - 1) // CHUNK):
        atom = chunk * CHUNK
        for part in range(3):
            c, first = 2 * part + 1, part * part
            last = min(CHUNK, num_atoms - atom) * c - 1
            for block in range(blocks):
                g = fit(block * 2 * W, G, 2 * W)
                for r in range(0, last + 1, 6):
                    i0, i1 = row_of(r, c, first, atom), row_of(min(r + 1, last), c, first, atom)
                    i2, i3 = row_of(min(r + 2, last), c, first, atom), row_of(min(r + 3, last), c, first, atom)
                    i4, i5 = row_of(min(r + 4, last), c, first, atom), row_of(min(r + 5, last), c, first, atom)
                    a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
                    b0, b1, b2, b3, b4, b5 = zero, zero, zero, zero, zero, zero
                    k = (part * blocks + block) * F * 2 * W
                    for f in range(F):
                        u, v = load(w, k), load(w, k + W)
                        x0, x1, x2 = repeat(x, i0 * F + f), repeat(x, i1 * F + f), repeat(x, i2 * F + f)
                        x3, x4, x5 = repeat(x, i3 * F + f), repeat(x, i4 * F + f), repeat(x, i5 * F + f)
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
                        k += 2 * W
                    put_two(o, i0 * G + g, W, a0, b0)
                    put_two(o, i1 * G + g, W, a1, b1)
                    put_two(o, i2 * G + g, W, a2, b2)
                    put_two(o, i3 * G + g, W, a3, b3)
                    put_two(o, i4 * G + g, W, a4, b4)
                    put_two(o, i5 * G + g, W, a5, b5)


@moving
def squared_norms(job, X, out):
    """out = |X|², (N, 9, F) -> (N, F)."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, o = X.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(x, n * 9 * F + f, F)
            total = v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3 + v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7 + v8 * v8
            store(o, n * F + f, total)


@moving
def squared_norms_tangent(job, X, dX, out):
    """The derivative of :func:`squared_norms`, 2 ⟨X, dX⟩."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, o = X.reshape(-1), dX.reshape(-1), out.reshape(-1)
    two = splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            store(o, n * F + f, two * dot(components(x, n * 9 * F + f, F), components(dx, n * 9 * F + f, F)))


@moving
def add_norms_backward(job, X, grad, out):
    """out += 2 X grad, the gradient of :func:`squared_norms`."""
    num_atoms, _, F = X.shape
    x, g, o = X.reshape(-1), grad.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for c in range(9):
            at = n * 9 * F + c * F
            for f in range(F):
                o[at + f] += 2 * x[at + f] * g[n * F + f]


@inlined
def gated(g, at, F, v):
    """Nine components times the gate of their part."""
    g0, g1, g2 = load(g, at), load(g, at + F), load(g, at + 2 * F)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = v
    return g0 * v0, g1 * v1, g1 * v2, g1 * v3, g2 * v4, g2 * v5, g2 * v6, g2 * v7, g2 * v8


@inlined
def multiply(a, b):
    """Products of two sets of nine, one by one."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = a
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = b
    return a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7, a8 * b8


@moving
def scale(job, X, gate, out):
    """out = X times the gate of each part: (N, 9, F), (N, 3 F)."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, g, o = X.reshape(-1), gate.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            k = n * 9 * F + f
            put(o, k, F, gated(g, n * 3 * F + f, F, components(x, k, F)))


@moving
def scale_backward(job, X, gate, grad, out_X, out_gate):
    """Gradients of :func:`scale`."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, g, d = X.reshape(-1), gate.reshape(-1), grad.reshape(-1)
    ox, og = out_X.reshape(-1), out_gate.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            change = components(d, k, F)
            put(ox, k, F, gated(g, at, F, change))
            p0, p1, p2, p3, p4, p5, p6, p7, p8 = multiply(components(x, k, F), change)
            store(og, at, p0)
            store(og, at + F, p1 + p2 + p3)
            store(og, at + 2 * F, p4 + p5 + p6 + p7 + p8)


@moving
def scale_tangent(job, X, dX, gate, dgate, out):
    """The derivative of :func:`scale`."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, g, dg, o = X.reshape(-1), dX.reshape(-1), gate.reshape(-1), dgate.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            put(o, k, F, add(gated(g, at, F, components(dx, k, F)), gated(dg, at, F, components(x, k, F))))


@moving
def scale_reverse(job, X, dX, gate, dgate, O, dO, out_X, out_gate):
    """Gradients of :func:`scale` and :func:`scale_tangent` together, O in the value and dO in the derivative."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, g, dg = X.reshape(-1), dX.reshape(-1), gate.reshape(-1), dgate.reshape(-1)
    d, dd, ox, og = O.reshape(-1), dO.reshape(-1), out_X.reshape(-1), out_gate.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            a, b = components(d, k, F), components(dd, k, F)
            put(ox, k, F, add(gated(g, at, F, a), gated(dg, at, F, b)))
            a0, a1, a2, a3, a4, a5, a6, a7, a8 = multiply(components(x, k, F), a)
            b0, b1, b2, b3, b4, b5, b6, b7, b8 = multiply(components(dx, k, F), b)
            store(og, at, a0 + b0)
            store(og, at + F, a1 + a2 + a3 + b1 + b2 + b3)
            store(og, at + 2 * F, a4 + a5 + a6 + a7 + a8 + b4 + b5 + b6 + b7 + b8)
