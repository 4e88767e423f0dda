r"""Directions and distances of edges as other loops read them, with derivatives.

.. math::
    u_{ij} = \pm \frac{r_i - r_j}{r_{ij}}, \qquad
    C(r) = \tfrac12 \Big(\cos \frac{\pi r}{r_c} + 1\Big), \qquad
    c_k(r) = \sum_n b_{kn}\, t^n, \quad t = \frac{r - r_0}{h} - g

C is the cosine envelope, between a lower and an upper cutoff :math:`\tfrac12 (\cos(2 \pi (r - r_l) / (r_c - r_l) + \pi)
+ 1)`, and c are the coefficients of six neighbouring B-splines of degree 5 at a distance in cell g of a grid of step h.

Networks of tensors (``tensor_``) read u = +, its nine components Y in the basis of :mod:`torchmdnet.ops.irreps`, and
c C. Networks of scalars and vectors (``direction_``) read u = -, and c and C apart.

===================  ============  ==================================================================
letters              shape         meaning
===================  ============  ==================================================================
``vec``, ``dist``    (E, 3), (P,)  vectors of edges and distances of pairs
``row``              (E,)          pair of each edge; ``back`` and ``reverse`` of the opposite edge
``basis``            (6, 6)        b: polynomials of the B-splines, lowest power first
``coef``, ``slope``  (P, K)        c and its derivative; K = 6, or 2 for a pair's own value and slope
``cell``             (P,)          g: first row in the table
``fade``, ``steep``  (P,)          C and its derivative
``Y``                (E, 9)        components of √3 I, ±√2 u and of the traceless part of u uᵀ
``handedness``                     sign of the antisymmetric part
===================  ============  ==================================================================

The gradient in u gives that in the vectors by 1 / r; what depends on u alone does not change along u, so the part of it
along u goes to the distances: :math:`\bar r_{ij} \mathrel{-}= \bar x \cdot u` for a gradient :math:`\bar x` in x = r u.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

from torchmdnet.ops.kernels.compiling import called
from torchmdnet.ops.kernels.loops.filters import clear
from torchmdnet.ops.kernels.sharing import claimed, moving

__all__ = [
    "direction_distances_backward",
    "direction_geometry",
    "direction_vectors_backward",
    "tensor_distances_backward",
    "tensor_geometry",
    "tensor_geometry_tangent",
    "tensor_vectors_backward",
]


_R2, _R6 = 2**0.5, 6**-0.5


@moving
def tensor_geometry(job, vec, dist, row, lower, upper, num_cells, basis, handedness, Y, u, coef, slope, cell):
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
def tensor_vectors_backward(job, u, dist, row, handedness, grad_Y, out_vec):
    """The gradient of :func:`tensor_geometry` in the vectors (E, 3).

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
def tensor_distances_backward(u, row, back, vec, grad_dist, grad_back, out_dist):
    """The gradient of :func:`tensor_geometry` in the distances (P,), when that in the vectors is known.

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
def tensor_geometry_tangent(job, u, dist, row, handedness, slope, dvec, ddist, out_Y, out_coef):
    """Changes of Y and of the coefficients of :func:`tensor_geometry` as vectors and distances change."""
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


@moving
def direction_geometry(
    job, vec, dist, row, start, stop, num_cells, basis, lower, upper, u, coef, slope, fade, steep, cell
):
    """Directions u = -vec / dist, (E, 4) with a zero behind them, and where distances lie between the rows of a spline.

    ``slope`` (P, 6) are the derivatives of the coefficients ``coef`` in the distance, ``fade`` (P,) is the cosine
    envelope and ``steep`` its derivative. ``basis`` (6, 6) holds the polynomials of the B-splines. A self loop has no
    direction.
    """
    for e in claimed(job, vec.shape[0]):
        r = dist[row[e]]
        scale = -1 / r if r > 0 else 0.0
        u[e, 0], u[e, 1], u[e, 2], u[e, 3] = scale * vec[e, 0], scale * vec[e, 1], scale * vec[e, 2], 0
    step = (stop - start) / num_cells
    for p in claimed(job, dist.shape[0], 1):
        r = dist[p]
        fade[p], steep[p] = 0, 0
        if r < upper and (lower == 0 or r > lower):
            if lower > 0:
                scale = 2 * math.pi / (upper - lower)
                phase = scale * (r - lower) + math.pi
            else:
                scale = math.pi / upper
                phase = scale * r
            fade[p], steep[p] = 0.5 * (math.cos(phase) + 1), -0.5 * scale * math.sin(phase)
        place = (min(max(r, start), stop) - start) / step
        g = min(max(int(place), 0), num_cells - 1)
        t = place - g
        cell[p] = g
        for k in range(6):
            value, rise = basis[k, 5], 0.0
            for n in range(4, -1, -1):
                rise = rise * t + value
                value = value * t + basis[k, n]
            coef[p, k], slope[p, k] = value, rise / step


@moving
def direction_vectors_backward(job, u, dist, row, reverse, of_reverse, out_vec):
    """The gradient of the energy in the vectors (E, 3).

    ``of_reverse`` (T, E, 4) holds what the distance and the three components of u of the opposite edge do, to be added
    up over T; ``of_edge`` (S, E) what the distance of an edge does.
    """
    for e in claimed(job, u.shape[0]):
        x, y, z = 0.0, 0.0, 0.0
        for t in range(of_reverse.shape[0]):
            g = of_reverse[t, reverse[e]]
            x, y, z = x + g[1], y + g[2], z + g[3]
        r = dist[row[e]]
        scale = -1 / r if r > 0 else 0.0
        out_vec[e, 0], out_vec[e, 1], out_vec[e, 2] = scale * x, scale * y, scale * z


@called
def direction_distances_backward(u, row, of_reverse, of_edge, vec, out_dist):
    """The gradient in the distances (P,), when that in the vectors is known."""
    clear(out_dist)
    for e in range(u.shape[0]):
        slope = vec[e, 0] * u[e, 0] + vec[e, 1] * u[e, 1] + vec[e, 2] * u[e, 2]
        for t in range(of_reverse.shape[0]):
            slope += of_reverse[t, e, 0]
        for s in range(of_edge.shape[0]):
            slope += of_edge[s, e]
        out_dist[row[e]] += slope
