"""The loops, compiled for the CPU by Numba and shared among threads by receiving atom or by pair.

Layout: O and X are (N, 9, F), Y is (E, 9), w is (P, 3, F), Z is (N, 2, F). The last row of w belongs to self loops
when there are any; then it has one row more than there are pairs.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

__all__ = [
    "embed_direction",
    "embed_factor",
    "embed_sum",
    "embed_weight",
    "matrix_product",
    "message_sum",
    "message_weight",
]

#: Numbers in the largest array below which threads cost more than they bring.
_WORTH_THREADS = 200_000


def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop for one thread and for several, and pick by the work at hand."""
    options: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "cache": True, "nogil": True}
    serial = numba.njit(**options)(loop)
    threaded = numba.njit(parallel=True, **options)(loop)

    def run(*arrays: Any) -> None:
        wanted = torch.get_num_threads()
        threads = min(wanted, numba.config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
        work = max(array.size for array in arrays if isinstance(array, np.ndarray))
        if threads == 1 or work < _WORTH_THREADS:
            serial(*arrays)
        else:
            numba.set_num_threads(threads)
            threaded(*arrays)
            torch.set_num_threads(wanted)  # both pools are OpenMP's, and starting Numba's resets PyTorch's

    run.__doc__ = loop.__doc__
    return run


@_compiled
def message_sum(w, X, sender, pair_of, row_start, out):
    """out[i] = Σ_j w_ij X_j."""
    num_atoms, _, channels = X.shape
    for i in numba.prange(num_atoms):
        out[i] = 0
        for e in range(row_start[i], row_start[i + 1]):
            p = pair_of[e]
            j = sender[e]
            for f in range(channels):
                out[i, 0, f] += w[p, 0, f] * X[j, 0, f]
            for c in range(1, 4):
                for f in range(channels):
                    out[i, c, f] += w[p, 1, f] * X[j, c, f]
            for c in range(4, 9):
                for f in range(channels):
                    out[i, c, f] += w[p, 2, f] * X[j, c, f]


@_compiled
def message_weight(O, X, pair_index, out):
    """out[ij] = Σ_c O_i X_j + O_j X_i, and for self loops Σ_i O_i X_i."""
    num_atoms, _, channels = X.shape
    num_pairs = pair_index.shape[1]
    for p in numba.prange(num_pairs):
        i = pair_index[0, p]
        j = pair_index[1, p]
        for f in range(channels):
            out[p, 0, f] = O[i, 0, f] * X[j, 0, f] + O[j, 0, f] * X[i, 0, f]
            out[p, 1, f] = (
                O[i, 1, f] * X[j, 1, f]
                + O[j, 1, f] * X[i, 1, f]
                + O[i, 2, f] * X[j, 2, f]
                + O[j, 2, f] * X[i, 2, f]
                + O[i, 3, f] * X[j, 3, f]
                + O[j, 3, f] * X[i, 3, f]
            )
            out[p, 2, f] = (
                O[i, 4, f] * X[j, 4, f]
                + O[j, 4, f] * X[i, 4, f]
                + O[i, 5, f] * X[j, 5, f]
                + O[j, 5, f] * X[i, 5, f]
                + O[i, 6, f] * X[j, 6, f]
                + O[j, 6, f] * X[i, 6, f]
                + O[i, 7, f] * X[j, 7, f]
                + O[j, 7, f] * X[i, 7, f]
                + O[i, 8, f] * X[j, 8, f]
                + O[j, 8, f] * X[i, 8, f]
            )
    if out.shape[0] > num_pairs:
        out[num_pairs] = 0
        for i in range(num_atoms):
            for c in range(9):
                part = 0 if c == 0 else (1 if c < 4 else 2)
                for f in range(channels):
                    out[num_pairs, part, f] += O[i, c, f] * X[i, c, f]


@_compiled
def embed_sum(Y, w, Z, sender, pair_of, row_start, out):
    """out[i] = Σ_j Y_ij w_ij (Z_i0 + Z_j1)."""
    num_atoms, _, channels = Z.shape
    for i in numba.prange(num_atoms):
        out[i] = 0
        weighted = np.empty((3, channels), w.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            p = pair_of[e]
            j = sender[e]
            for part in range(3):
                for f in range(channels):
                    weighted[part, f] = w[p, part, f] * (Z[i, 0, f] + Z[j, 1, f])
            for c in range(9):
                part = 0 if c == 0 else (1 if c < 4 else 2)
                y = Y[e, c]
                if y != 0:
                    for f in range(channels):
                        out[i, c, f] += y * weighted[part, f]


@_compiled
def embed_direction(O, w, Z, sender, pair_of, row_start, out):
    """out[ij, c] = Σ_f O_ic w_ij (Z_i0 + Z_j1)."""
    num_atoms, _, channels = Z.shape
    for i in numba.prange(num_atoms):
        weighted = np.empty((3, channels), w.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            p = pair_of[e]
            j = sender[e]
            for part in range(3):
                for f in range(channels):
                    weighted[part, f] = w[p, part, f] * (Z[i, 0, f] + Z[j, 1, f])
            for c in range(9):
                part = 0 if c == 0 else (1 if c < 4 else 2)
                total = w.dtype.type(0)
                for f in range(channels):
                    total += O[i, c, f] * weighted[part, f]
                out[e, c] = total


@_compiled
def embed_weight(O, Y, Z, sender, pair_of, row_start, reverse, out):
    """out[ij] = Σ_c (O_i Y_ij (Z_i0 + Z_j1) + O_j Y_ji (Z_j0 + Z_i1)), and for self loops Σ_i over one direction."""
    num_atoms, _, channels = Z.shape
    if out.shape[0] > 0:  # the row of self loops, the last, collects from many atoms
        out[out.shape[0] - 1] = 0
    for i in numba.prange(num_atoms):
        here = np.empty((3, channels), Y.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            if reverse[e] <= e:  # each pair once, by its first edge
                continue
            p = pair_of[e]
            j = sender[e]
            r = reverse[e]
            for side in range(2):
                a = i if side == 0 else j
                b = j if side == 0 else i
                edge = e if side == 0 else r
                here[:] = 0
                for c in range(9):
                    part = 0 if c == 0 else (1 if c < 4 else 2)
                    y = Y[edge, c]
                    for f in range(channels):
                        here[part, f] += y * O[a, c, f]
                for part in range(3):
                    for f in range(channels):
                        value = here[part, f] * (Z[a, 0, f] + Z[b, 1, f])
                        if side == 0:
                            out[p, part, f] = value
                        else:
                            out[p, part, f] += value
    for i in range(num_atoms):
        for e in range(row_start[i], row_start[i + 1]):
            if reverse[e] != e:
                continue
            p = pair_of[e]
            for c in range(9):
                part = 0 if c == 0 else (1 if c < 4 else 2)
                y = Y[e, c]
                if y != 0:
                    for f in range(channels):
                        out[p, part, f] += y * O[i, c, f] * (Z[i, 0, f] + Z[i, 1, f])


@_compiled
def embed_factor(O, Y, w, sender, pair_of, row_start, reverse, out):
    """out[i, 0] = Σ_j Σ_c O_i Y_ij w_ij and out[i, 1] = Σ_j Σ_c O_j Y_ji w_ij."""
    num_atoms, _, channels = O.shape
    for i in numba.prange(num_atoms):
        out[i] = 0
        here = np.empty((3, channels), w.dtype)
        for e in range(row_start[i], row_start[i + 1]):
            p = pair_of[e]
            j = sender[e]
            for side in range(2):
                a = i if side == 0 else j
                edge = e if side == 0 else reverse[e]
                here[:] = 0
                for c in range(9):
                    part = 0 if c == 0 else (1 if c < 4 else 2)
                    y = Y[edge, c]
                    if y != 0:
                        for f in range(channels):
                            here[part, f] += y * O[a, c, f]
                for f in range(channels):
                    out[i, side, f] += here[0, f] * w[p, 0, f] + here[1, f] * w[p, 1, f] + here[2, f] * w[p, 2, f]


_R2, _R3, _R6 = 2**-0.5, 3**-0.5, 6**-0.5


@_compiled
def matrix_product(X, Y, sign_X, sign_Y, both, out):
    """out = X Y or X Y + Y X; a sign of -1 transposes by turning the antisymmetric part."""
    num_atoms, _, channels = X.shape
    r2, r3, r6 = X.dtype.type(_R2), X.dtype.type(_R3), X.dtype.type(_R6)
    sx, sy = X.dtype.type(sign_X), X.dtype.type(sign_Y)
    for n in numba.prange(num_atoms):
        for f in range(channels):
            trace, diagonal, last = r3 * X[n, 0, f], r2 * X[n, 7, f], r6 * X[n, 8, f]
            a, b, c = sx * r2 * X[n, 1, f], sx * r2 * X[n, 2, f], sx * r2 * X[n, 3, f]
            s, t, u = r2 * X[n, 4, f], r2 * X[n, 5, f], r2 * X[n, 6, f]
            x00, x01, x02 = trace + diagonal - last, s - c, u + b
            x10, x11, x12 = s + c, trace - diagonal - last, t - a
            x20, x21, x22 = u - b, t + a, trace + last + last

            trace, diagonal, last = r3 * Y[n, 0, f], r2 * Y[n, 7, f], r6 * Y[n, 8, f]
            a, b, c = sy * r2 * Y[n, 1, f], sy * r2 * Y[n, 2, f], sy * r2 * Y[n, 3, f]
            s, t, u = r2 * Y[n, 4, f], r2 * Y[n, 5, f], r2 * Y[n, 6, f]
            y00, y01, y02 = trace + diagonal - last, s - c, u + b
            y10, y11, y12 = s + c, trace - diagonal - last, t - a
            y20, y21, y22 = u - b, t + a, trace + last + last

            p00 = x00 * y00 + x01 * y10 + x02 * y20
            p01 = x00 * y01 + x01 * y11 + x02 * y21
            p02 = x00 * y02 + x01 * y12 + x02 * y22
            p10 = x10 * y00 + x11 * y10 + x12 * y20
            p11 = x10 * y01 + x11 * y11 + x12 * y21
            p12 = x10 * y02 + x11 * y12 + x12 * y22
            p20 = x20 * y00 + x21 * y10 + x22 * y20
            p21 = x20 * y01 + x21 * y11 + x22 * y21
            p22 = x20 * y02 + x21 * y12 + x22 * y22
            if both:
                p00 += y00 * x00 + y01 * x10 + y02 * x20
                p01 += y00 * x01 + y01 * x11 + y02 * x21
                p02 += y00 * x02 + y01 * x12 + y02 * x22
                p10 += y10 * x00 + y11 * x10 + y12 * x20
                p11 += y10 * x01 + y11 * x11 + y12 * x21
                p12 += y10 * x02 + y11 * x12 + y12 * x22
                p20 += y20 * x00 + y21 * x10 + y22 * x20
                p21 += y20 * x01 + y21 * x11 + y22 * x21
                p22 += y20 * x02 + y21 * x12 + y22 * x22

            out[n, 0, f] = r3 * (p00 + p11 + p22)
            out[n, 1, f] = r2 * (p21 - p12)
            out[n, 2, f] = r2 * (p02 - p20)
            out[n, 3, f] = r2 * (p10 - p01)
            out[n, 4, f] = r2 * (p01 + p10)
            out[n, 5, f] = r2 * (p12 + p21)
            out[n, 6, f] = r2 * (p02 + p20)
            out[n, 7, f] = r2 * (p00 - p11)
            out[n, 8, f] = r6 * (p22 + p22 - p00 - p11)
