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
    "message_sum",
    "message_weight",
]

#: What Numba's thread pool was made for.
_MOST_THREADS: int = numba.get_num_threads()

#: Numbers in the largest array below which threads cost more than they bring.
_WORTH_THREADS = 200_000


def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop for one thread and for several, and pick by the work at hand."""
    options: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "cache": True, "nogil": True}
    serial = numba.njit(**options)(loop)
    threaded = numba.njit(parallel=True, **options)(loop)

    def run(*arrays: np.ndarray) -> None:
        threads = min(torch.get_num_threads(), _MOST_THREADS)
        work = max(array.size for array in arrays)
        if threads == 1 or work < _WORTH_THREADS:
            serial(*arrays)
        else:
            numba.set_num_threads(threads)
            threaded(*arrays)

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
