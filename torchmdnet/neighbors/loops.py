"""Loops over pairs for the CPU, compiled by Numba: searching, sorting them into edges, and measuring those."""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import numpy as np

from torchmdnet.ops.kernels.compiling import exact

__all__ = [
    "close_images",
    "close_of_list",
    "close_pairs",
    "edge_geometry",
    "edge_geometry_backward",
    "edges_of_pairs",
    "farthest",
    "measured_edges",
    "pull_back",
    "sorted_pairs",
]


# What Numba compiles for a slice that is assigned to takes seconds, a loop does not.


@exact
def _widened(array, size):
    """The same numbers with room for more."""
    wider = np.empty(size, array.dtype)
    for k in range(array.shape[0]):
        wider[k] = array[k]
    return wider


@exact
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


@exact
def duals_of(boxes, duals):
    """Vectors that count how many lattice vectors a vector is long, zero for open directions, (B, 3, 3).

    Whether there are any: False where lattice vectors are not finite or lie in a plane.
    """
    for s in range(boxes.shape[0]):
        for k in range(3):
            u, v, w = boxes[s, k], boxes[s, (k + 1) % 3], boxes[s, (k + 2) % 3]
            for c in range(3):  # across both others, or the only other, or along the vector itself
                duals[s, k, c] = v[(c + 1) % 3] * w[(c + 2) % 3] - v[(c + 2) % 3] * w[(c + 1) % 3]
            vv, ww = v[0] * v[0] + v[1] * v[1] + v[2] * v[2], w[0] * w[0] + w[1] * w[1] + w[2] * w[2]
            uu = u[0] * u[0] + u[1] * u[1] + u[2] * u[2]
            if uu == 0:
                duals[s, k, 0], duals[s, k, 1], duals[s, k, 2] = 0, 0, 0
                continue
            if vv == 0 or ww == 0:
                along = 0.0
                if vv > 0:
                    along = (u[0] * v[0] + u[1] * v[1] + u[2] * v[2]) / vv
                if ww > 0:
                    along = (u[0] * w[0] + u[1] * w[1] + u[2] * w[2]) / ww
                for c in range(3):
                    duals[s, k, c] = u[c] - along * (v[c] + w[c])  # one of them is zero
            d = duals[s, k]
            height = u[0] * d[0] + u[1] * d[1] + u[2] * d[2]
            size = uu * (vv if vv > 0 else 1.0) * (ww if ww > 0 else 1.0) if vv > 0 and ww > 0 else uu * uu
            if not height * height > 1e-18 * size:
                return False
            for c in range(3):
                d[c] /= height
    return True


#: Adding and taking away this number rounds one of less than half of it to an integer.
_ROUNDS = 1.5 * 2.0**52


@exact
def nearest_squares(first, last, place, count, h, out):
    """Squares of the distances from one atom to others, ``first`` to ``last``, in the nearest image by ``count``.

    ``place`` (3, N) are positions and ``count`` (3, N) how many lattice vectors h they are long.
    """
    x, y, z = place[0, first:last], place[1, first:last], place[2, first:last]
    f, g, k = count[0, first:last], count[1, first:last], count[2, first:last]
    x0, y0, z0, f0, g0, k0 = x[0], y[0], z[0], f[0], g[0], k[0]
    for b in range(last - first):
        u = ((f[b] - f0) + _ROUNDS) - _ROUNDS
        v = ((g[b] - g0) + _ROUNDS) - _ROUNDS
        w = ((k[b] - k0) + _ROUNDS) - _ROUNDS
        dx = (x0 - x[b]) + u * h[0, 0] + v * h[1, 0] + w * h[2, 0]
        dy = (y0 - y[b]) + u * h[0, 1] + v * h[1, 1] + w * h[2, 1]
        dz = (z0 - z[b]) + u * h[0, 2] + v * h[1, 2] + w * h[2, 2]
        out[b] = dx * dx + dy * dy + dz * dz


@exact
def close_images(pos, batch, boxes, cutoff, most_images, most_along):
    """Pairs of atoms and images closer than a cutoff, in their order, and the lattice vectors between them (P, 3).

    An atom and its partner come as i <= j, sorted by i, then j, then lattice vectors. The last result is False for
    boxes without volume, or with more than ``most_images`` in reach, or ``most_along`` a vector.
    """
    num_atoms = pos.shape[0]
    duals, reach = np.empty_like(boxes), np.empty((boxes.shape[0], 3))
    has_volume = duals_of(boxes, duals)
    for s in range(boxes.shape[0]):
        for k in range(3):
            x, y, z = duals[s, k, 0], duals[s, k, 1], duals[s, k, 2]
            reach[s, k] = cutoff * np.sqrt(x * x + y * y + z * z) + 1e-9
        images = 1.0
        for k in range(3):
            images *= 2 * np.floor(reach[s, k]) + 1
            has_volume = has_volume and reach[s, k] < most_along + 1
        has_volume = has_volume and images <= most_images
    place, count = np.empty((3, num_atoms)), np.empty((3, num_atoms))
    is_sorted = True
    for a in range(num_atoms if has_volume else 0):
        s = batch[a] if boxes.shape[0] > 1 else 0
        is_sorted = is_sorted and (a == 0 or batch[a] >= batch[a - 1])
        for k in range(3):
            place[k, a] = pos[a, k]
            count[k, a] = pos[a, 0] * duals[s, k, 0] + pos[a, 1] * duals[s, k, 1] + pos[a, 2] * duals[s, k, 2]
            if not abs(count[k, a]) < 1e12:  # an atom at infinity or NaN has no neighbours
                place[k, a], count[k, a] = np.inf, 0
    capacity = 32 * num_atoms + 16
    i, j = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    shifts, squares = np.empty(3 * capacity, pos.dtype), np.empty(num_atoms)
    found, last = 0, 0
    for a in range(num_atoms if has_volume else 0):
        if a == last or not is_sorted:
            last = num_atoms
            for b in range(a + 1, num_atoms):
                if is_sorted and batch[b] != batch[a]:
                    last = b
                    break
        s = batch[a] if boxes.shape[0] > 1 else 0
        h, r = boxes[s], reach[s]
        has_one = max(r[0], r[1], r[2]) < 0.5  # image of a pair within the cutoff, at most
        if has_one:
            nearest_squares(a, last, place, count, h, squares)
        for b in range(a, last):
            if batch[b] != batch[a] or (has_one and (b == a or not squares[b - a] < cutoff * cutoff)):
                continue
            f, g, k = count[0, b] - count[0, a], count[1, b] - count[1, a], count[2, b] - count[2, a]
            for u in range(int(np.ceil(f - r[0])), int(np.floor(f + r[0])) + 1):
                for v in range(int(np.ceil(g - r[1])), int(np.floor(g + r[1])) + 1):
                    for w in range(int(np.ceil(k - r[2])), int(np.floor(k + r[2])) + 1):
                        dx = (place[0, a] - place[0, b]) + u * h[0, 0] + v * h[1, 0] + w * h[2, 0]
                        dy = (place[1, a] - place[1, b]) + u * h[0, 1] + v * h[1, 1] + w * h[2, 1]
                        dz = (place[2, a] - place[2, b]) + u * h[0, 2] + v * h[1, 2] + w * h[2, 2]
                        is_once = a != b or u > 0 or (u == 0 and (v > 0 or (v == 0 and w > 0)))
                        if is_once and dx * dx + dy * dy + dz * dz < cutoff * cutoff:
                            if found == capacity:
                                capacity *= 2
                                i, j = _widened(i, capacity), _widened(j, capacity)
                                shifts = _widened(shifts, 3 * capacity)
                            i[found], j[found] = a, b
                            shifts[3 * found], shifts[3 * found + 1], shifts[3 * found + 2] = u, v, w
                            found += 1
    return i[:found], j[:found], shifts[: 3 * found].reshape(found, 3), has_volume


@exact
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


@exact
def measured_edges(pos, boxes, batch, i, j, shifts, loop):
    """:func:`edges_of_pairs` and :func:`edge_geometry` at once, without signs.

    Then follow the vectors of the edges (E, 3), the distances of the pairs and of the edges, and the pairs (2, P).
    """
    index, pair, reverse, row_start, sign = edges_of_pairs(i, j, pos.shape[0], loop)
    num_pairs, num_edges = i.shape[0], pair.shape[0]
    vec, edge_dist = np.empty((num_edges, 3), pos.dtype), np.empty(num_edges, pos.dtype)
    dist = np.zeros(num_pairs + (1 if loop else 0), pos.dtype)
    atoms = np.empty((2, num_pairs), np.int64)
    for e in range(num_edges):
        p, r = pair[e], reverse[e]
        if sign[e] == 0:
            vec[e, 0], vec[e, 1], vec[e, 2], edge_dist[e] = 0, 0, 0, 0
        elif sign[e] > 0:
            a, b = index[0, e], index[1, e]
            x, y, z = pos[a, 0] - pos[b, 0], pos[a, 1] - pos[b, 1], pos[a, 2] - pos[b, 2]
            if boxes.shape[0] > 0:
                s = 0
                if boxes.shape[0] > 1:
                    s = batch[a]
                u, v, w = shifts[p, 0], shifts[p, 1], shifts[p, 2]
                x += u * boxes[s, 0, 0] + v * boxes[s, 1, 0] + w * boxes[s, 2, 0]
                y += u * boxes[s, 0, 1] + v * boxes[s, 1, 1] + w * boxes[s, 2, 1]
                z += u * boxes[s, 0, 2] + v * boxes[s, 1, 2] + w * boxes[s, 2, 2]
            d = np.sqrt(x * x + y * y + z * z)
            vec[e, 0], vec[e, 1], vec[e, 2], edge_dist[e] = x, y, z, d
            vec[r, 0], vec[r, 1], vec[r, 2], edge_dist[r] = -x, -y, -z, d
            dist[p], atoms[0, p], atoms[1, p] = d, a, b
    return index, pair, reverse, row_start, vec, dist, edge_dist, atoms


@exact
def edge_geometry(pos, boxes, index, pair, sign, shifts, batch, vec, dist):
    """Vectors of edges, pos_i - pos_j and lattice vectors, and the distance of each pair."""
    for e in range(pair.shape[0]):
        a, b, p = index[0, e], index[1, e], pair[e]
        s = 0
        if boxes.shape[0] > 1:
            s = batch[a]
        square = pos.dtype.type(0)
        for k in range(3):
            vec[e, k] = 0
            if sign[e] != 0:
                d = pos[a, k] - pos[b, k]
                if boxes.shape[0] > 0:
                    along = (
                        shifts[p, 0] * boxes[s, 0, k] + shifts[p, 1] * boxes[s, 1, k] + shifts[p, 2] * boxes[s, 2, k]
                    )
                    d += sign[e] * along
                vec[e, k] = d
                square += d * d
        if sign[e] > 0:
            dist[p] = np.sqrt(square)


@exact
def edge_geometry_backward(pos, boxes, index, pair, sign, shifts, batch, of_vec, of_dist, of_pos, of_boxes):
    """Add the gradient in positions and boxes."""
    d = np.zeros(3, pos.dtype)
    for e in range(pair.shape[0]):
        if sign[e] == 0:
            continue
        a, b, p = index[0, e], index[1, e], pair[e]
        s = 0
        if boxes.shape[0] > 1:
            s = batch[a]
        slope = pos.dtype.type(0)
        if sign[e] > 0:  # a distance belongs to both directions, and is counted once
            square = pos.dtype.type(0)
            for k in range(3):
                d[k] = pos[a, k] - pos[b, k]
                if boxes.shape[0] > 0:
                    d[k] += (
                        shifts[p, 0] * boxes[s, 0, k] + shifts[p, 1] * boxes[s, 1, k] + shifts[p, 2] * boxes[s, 2, k]
                    )
                square += d[k] * d[k]
            if square > 0:
                slope = of_dist[p] / np.sqrt(square)
        for k in range(3):
            g = of_vec[e, k] + slope * d[k]
            of_pos[a, k] += g
            of_pos[b, k] -= g
            if boxes.shape[0] > 0:
                for m in range(3):
                    of_boxes[s, m, k] += sign[e] * shifts[p, m] * g


@exact
def pull_back(row_start, of_edge, reverse, vec, dist, of_vec, of_dist, batch, out_forces, out_virial):
    """Minus the gradient in positions (N, 3), and that in the strain of each system (S, 3, 3).

    From the gradients in the vectors of edges (E, 3) and the distances of pairs (P,).
    """
    for a in range(row_start.shape[0] - 1):
        fx, fy, fz = 0.0, 0.0, 0.0
        for e in range(row_start[a], row_start[a + 1]):
            r, p = reverse[e], of_edge[e]
            slope = 0.0
            if dist[p] > 0:
                slope = of_dist[p] / dist[p]
            x, y, z = np.float64(vec[e, 0]), np.float64(vec[e, 1]), np.float64(vec[e, 2])
            fx -= of_vec[e, 0] - of_vec[r, 0] + slope * x
            fy -= of_vec[e, 1] - of_vec[r, 1] + slope * y
            fz -= of_vec[e, 2] - of_vec[r, 2] + slope * z
            if out_virial.shape[0] > 0:
                s = batch[a]
                gx = of_vec[e, 0] + 0.5 * slope * x  # each direction counts half of the distance
                gy = of_vec[e, 1] + 0.5 * slope * y
                gz = of_vec[e, 2] + 0.5 * slope * z
                out_virial[s, 0, 0] += x * gx
                out_virial[s, 1, 1] += y * gy
                out_virial[s, 2, 2] += z * gz
                out_virial[s, 0, 1] += 0.5 * (x * gy + y * gx)
                out_virial[s, 0, 2] += 0.5 * (x * gz + z * gx)
                out_virial[s, 1, 2] += 0.5 * (y * gz + z * gy)
        out_forces[a, 0], out_forces[a, 1], out_forces[a, 2] = fx, fy, fz
    for s in range(out_virial.shape[0]):
        out_virial[s, 1, 0] = out_virial[s, 0, 1]
        out_virial[s, 2, 0] = out_virial[s, 0, 2]
        out_virial[s, 2, 1] = out_virial[s, 1, 2]


@exact
def farthest(pos, before):
    """Largest square of the distance an atom has moved."""
    largest = 0.0
    for a in range(pos.shape[0]):
        x, y, z = pos[a, 0] - before[a, 0], pos[a, 1] - before[a, 1], pos[a, 2] - before[a, 2]
        square = float(x * x + y * y + z * z)
        if not square <= largest:  # what is not a number has moved, too
            largest = square
    return largest


@exact
def sorted_pairs(i, j, counts, num_atoms):
    """The same pairs with i <= j, sorted by i, then j, then the lattice vectors between them, (P, 3) or (0, 3)."""
    num_pairs = i.shape[0]
    first, second = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.int64)
    place, order = np.zeros(num_atoms + 1, np.int64), np.empty(num_pairs, np.int64)
    for p in range(num_pairs):  # by the larger atom
        place[max(i[p], j[p]) + 1] += 1
    for a in range(num_atoms):
        place[a + 1] += place[a]
    for p in range(num_pairs):
        b = max(i[p], j[p])
        order[place[b]] = p
        place[b] += 1
    for a in range(num_atoms + 1):
        place[a] = 0
    for p in range(num_pairs):  # by the smaller one, keeping that order
        place[min(i[p], j[p]) + 1] += 1
    for a in range(num_atoms):
        place[a + 1] += place[a]
    rows = np.empty(num_pairs, np.int64)
    for n in range(num_pairs):
        p = order[n]
        a = min(i[p], j[p])
        rows[place[a]] = p
        place[a] += 1
    steps = np.empty((counts.shape[0], 3), counts.dtype)
    for n in range(num_pairs):
        p = rows[n]
        sign = 1
        if i[p] > j[p]:
            sign = -1
        first[n], second[n] = min(i[p], j[p]), max(i[p], j[p])
        if counts.shape[0] > 0:
            x, y, z = counts[p, 0], counts[p, 1], counts[p, 2]
            if i[p] == j[p] and (x < 0 or (x == 0 and (y < 0 or (y == 0 and z < 0)))):
                sign = -1
            x, y, z = sign * x, sign * y, sign * z
            m = n
            while m > 0 and first[m - 1] == first[n] and second[m - 1] == second[n]:
                u, v, w = steps[m - 1, 0], steps[m - 1, 1], steps[m - 1, 2]
                if u < x or (u == x and (v < y or (v == y and w < z))):
                    break
                steps[m, 0], steps[m, 1], steps[m, 2] = u, v, w
                m -= 1
            steps[m, 0], steps[m, 1], steps[m, 2] = x, y, z
    return first, second, steps


@exact
def close_of_list(pos, batch, boxes, i, j, counts, upper, lower):
    """The pairs of a list that are within ``lower`` and ``upper`` of one another now, and their lattice vectors."""
    num_pairs = i.shape[0]
    first, second = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.int64)
    shifts = np.empty((counts.shape[0], 3), pos.dtype)
    has_images = counts.shape[0] > 0
    n = 0
    for p in range(num_pairs):
        a, b = i[p], j[p]
        x = np.float64(pos[a, 0]) - np.float64(pos[b, 0])
        y = np.float64(pos[a, 1]) - np.float64(pos[b, 1])
        z = np.float64(pos[a, 2]) - np.float64(pos[b, 2])
        if has_images:
            u, v, w = counts[p, 0], counts[p, 1], counts[p, 2]
            if u != 0 or v != 0 or w != 0:
                s = 0
                if boxes.shape[0] > 1:
                    s = batch[a]
                x += u * boxes[s, 0, 0] + v * boxes[s, 1, 0] + w * boxes[s, 2, 0]
                y += u * boxes[s, 0, 1] + v * boxes[s, 1, 1] + w * boxes[s, 2, 1]
                z += u * boxes[s, 0, 2] + v * boxes[s, 1, 2] + w * boxes[s, 2, 2]
        square = x * x + y * y + z * z
        if square < upper * upper and square >= lower * lower:
            first[n], second[n] = a, b
            if has_images:
                shifts[n, 0], shifts[n, 1], shifts[n, 2] = counts[p, 0], counts[p, 1], counts[p, 2]
            n += 1
    return first[:n], second[:n], shifts[:n]
