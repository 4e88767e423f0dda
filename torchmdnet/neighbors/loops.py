"""Loops over pairs for the CPU, compiled by Numba: a small search, and sorting pairs into edges."""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["add_along", "add_differences", "along", "close_pairs", "differences", "edges_of_pairs"]


_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


# What Numba compiles for a slice that is assigned to takes seconds, a loop does not.


@numba.njit(**_OPTIONS)
def _widened(array, size):
    """The same numbers with room for more."""
    wider = np.empty(size, array.dtype)
    for k in range(array.shape[0]):
        wider[k] = array[k]
    return wider


@numba.njit(**_OPTIONS)
def close_pairs(pos, batch, square):
    """Pairs i < j of one system, closer than the root of ``square``, without images."""
    num_atoms = pos.shape[0]
    capacity = 16 * num_atoms + 16
    i, j = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    count = 0
    is_sorted = True
    for a in range(1, num_atoms):
        if batch[a] < batch[a - 1]:
            is_sorted = False
    for a in range(num_atoms):
        for b in range(a + 1, num_atoms):
            if batch[b] != batch[a]:
                if is_sorted:
                    break
                continue
            x, y, z = pos[a, 0] - pos[b, 0], pos[a, 1] - pos[b, 1], pos[a, 2] - pos[b, 2]
            if x * x + y * y + z * z < square:
                if count == capacity:
                    capacity *= 2
                    i, j = _widened(i, capacity), _widened(j, capacity)
                i[count], j[count] = a, b
                count += 1
    return i[:count], j[:count]


@numba.njit(**_OPTIONS)
def edges_of_pairs(i, j, num_atoms, loop):
    """Both directions of every pair, and self loops, sorted by receiver.

    Returns ``edge_index`` (2, E), the pair of each edge (E,), the edge of opposite direction (E,), ``row_start``
    (N + 1,), and the sign of the pair's vector along each edge, (E,): 1, -1, or 0 for a self loop.
    """
    num_pairs = i.shape[0]
    num_loops = num_atoms if loop else 0
    num_edges = num_loops + 2 * num_pairs
    row_start = np.zeros(num_atoms + 1, np.int64)
    for a in range(num_loops):
        row_start[a + 1] = 1
    for p in range(num_pairs):
        row_start[i[p] + 1] += 1
        row_start[j[p] + 1] += 1
    for a in range(num_atoms):
        row_start[a + 1] += row_start[a]
    place = _widened(row_start, num_atoms + 1)
    index = np.empty((2, num_edges), np.int64)
    pair, reverse = np.empty(num_edges, np.int64), np.empty(num_edges, np.int64)
    sign = np.empty(num_edges, np.int8)
    if loop:
        for a in range(num_atoms):
            e = place[a]
            place[a] += 1
            index[0, e], index[1, e], pair[e], reverse[e], sign[e] = a, a, num_pairs, e, 0
    forward = np.empty(num_pairs, np.int64)
    for p in range(num_pairs):
        e = place[i[p]]
        place[i[p]] += 1
        forward[p] = e
        index[0, e], index[1, e], pair[e], sign[e] = i[p], j[p], p, 1
    for p in range(num_pairs):
        e = place[j[p]]
        place[j[p]] += 1
        index[0, e], index[1, e], pair[e], sign[e] = j[p], i[p], p, -1
        reverse[e], reverse[forward[p]] = forward[p], e
    return index, pair, reverse, row_start, sign


@numba.njit(**_OPTIONS)
def differences(pos, i, j, out):
    """out_p = pos_i - pos_j."""
    for p in range(i.shape[0]):
        for k in range(3):
            out[p, k] = pos[i[p], k] - pos[j[p], k]


@numba.njit(**_OPTIONS)
def add_differences(vec, i, j, out):
    """out_i += vec_p and out_j -= vec_p."""
    for p in range(i.shape[0]):
        for k in range(3):
            out[i[p], k] += vec[p, k]
            out[j[p], k] -= vec[p, k]


@numba.njit(**_OPTIONS)
def along(vec, pair, sign, out):
    """out_e = sign_e vec of the edge's pair."""
    for e in range(pair.shape[0]):
        for k in range(3):
            out[e, k] = sign[e] * vec[pair[e], k]


@numba.njit(**_OPTIONS)
def add_along(edge, pair, sign, out):
    """out_p += sign_e edge_e for the edges of each pair."""
    for e in range(pair.shape[0]):
        for k in range(3):
            out[pair[e], k] += sign[e] * edge[e, k]
