r"""Samples that are alike: what their energies and forces say about each other, and duplicates.

Between two samples of the same atoms that are close to each other, the energy changes by the work of the forces,

.. math::

    E_b - E_a \approx -\tfrac12 (F_a + F_b) \cdot (x_b - x_a) + \tfrac12 V (\sigma_a + \sigma_b) : \varepsilon_{ab},

with an error of third order in the step. The slope of the left side over the right is 1 if energies, lengths and forces
go together, -1 if the forces are gradients, 23.06 if energies are in kcal/mol and forces in eV/Å, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchmdnet.data.doctor.samples import Block, Measured, draw

__all__ = ["Alike", "Work", "duplicates", "near_pairs", "nearest", "work_between"]

#: Samples of one sequence of atoms among which close ones are looked for.
GROUP = 20_000
#: Pairs whose work is computed.
PAIRS = 2_000
#: Duplicates have all distances equal to within this, in Å; near-duplicates to within the other. Two or three atoms are
#: alike by chance.
SAME, SAME_OF_FEW, ALMOST = 1e-3, 1e-5, 2e-2
#: Atoms up to which all distances of an open system are compared.
ALL_DISTANCES = 400


@dataclass
class Work:
    """Energy differences and the work between pairs of samples, in the units of the data.

    Args:
        first: First sample of each pair, (P,).
        second: Second sample, (P,).
        rise: E_b - E_a, (P,).
        work: Minus the work of the forces, (P,), which should be the same.
        strain: Work of the stress, (P,), zero where there is no stress or the cell is the same.
        step: Root mean square displacement, (P,), in Å.
    """

    first: np.ndarray
    second: np.ndarray
    rise: np.ndarray
    work: np.ndarray
    strain: np.ndarray
    step: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def keep(self, mask: np.ndarray) -> Work:
        """Some of the pairs."""
        return Work(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def nearest(points: np.ndarray, number: int, reach: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest points and which they are, (n, number) each; a point is the nearest to itself."""
    from scipy.spatial import KDTree

    distance, index = KDTree(points).query(points, k=number, distance_upper_bound=reach)
    return np.asarray(distance), np.asarray(index)


def near_pairs(measured: Measured, seed: int = 0) -> np.ndarray:
    """Pairs of samples with the same atoms in the same order that look alike, (P, 2), most alike first."""
    usable = np.flatnonzero(measured.complete & (measured.counts > 1))
    if not len(usable):
        return np.zeros((0, 2), dtype=np.int64)
    key = np.stack([measured.sequence[usable].astype(np.int64), measured.formula[usable]], axis=1)
    _, which, number = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    found, apart = [], []
    ends = np.cumsum(number)
    for kind in np.argsort(-number)[:2000]:
        rows = usable[order[ends[kind] - number[kind] : ends[kind]]]
        if len(rows) < 2:
            break
        rows = rows[draw(len(rows), GROUP, seed)]
        marks = measured.fingerprint[rows] / np.sqrt(measured.counts[rows])[:, None]
        distance, index = nearest(marks, min(4, len(rows)))
        near = np.stack([np.repeat(rows, index.shape[1] - 1), rows[index[:, 1:]].reshape(-1)], axis=1)
        found += [np.sort(near, axis=1), np.stack([rows[:-1], rows[1:]], axis=1)]  # frames of a trajectory follow on
        apart += [distance[:, 1:].reshape(-1), np.linalg.norm(np.diff(marks, axis=0), axis=1)]
    if not found:
        return np.zeros((0, 2), dtype=np.int64)
    pairs, first = np.unique(np.concatenate(found), axis=0, return_index=True)
    distance = np.concatenate(apart)[first]
    return pairs[np.argsort(distance, kind="stable")][: 4 * PAIRS]


def work_between(measured: Measured, pairs: np.ndarray) -> Work:
    """Energy differences and work of the forces, and of the stress where cells differ.

    Open systems are turned onto each other; periodic ones are compared through the nearest images, and what their cells
    differ by is strain. Pairs that are the same, or too far apart to follow, are left out.

    Args:
        measured: The set.
        pairs: Samples to compare, (P, 2).
    """
    energies = measured.y
    assert energies is not None
    rows, columns = [], []
    for first in range(0, len(pairs), 500):
        chunk = pairs[first : first + 500]
        a, b = measured.samples.take(chunk[:, 0]), measured.samples.take(chunk[:, 1])
        for number, (i, j) in enumerate(chunk.tolist()):
            terms = _one(a, b, number, measured)
            if terms is not None:
                rows.append((i, j))
                columns.append((energies[j] - energies[i], *terms))
        if len(rows) >= PAIRS:
            break
    if not rows:
        return Work(*(np.zeros(0, dtype=np.int64) for _ in range(2)), *(np.zeros(0) for _ in range(4)))
    ends, values = np.array(rows), np.array(columns)
    return Work(ends[:, 0], ends[:, 1], *values.T)


def _one(a: Block, b: Block, number: int, measured: Measured) -> tuple[float, float, float] | None:
    """Work, strain work and step between one pair."""
    part = slice(a.ptr[number], a.ptr[number + 1])
    other = slice(b.ptr[number], b.ptr[number + 1])
    forces_a, forces_b = a.get("neg_dy"), b.get("neg_dy")
    assert forces_a is not None
    assert forces_b is not None
    x_a, x_b, f_a, f_b = a.pos[part], b.pos[other], forces_a[part], forces_b[other]
    box_a, box_b = a.box[number], b.box[number]
    strain_work = 0.0
    if box_a.any():
        if not (np.abs(box_a).sum(axis=1) > 0).all():
            shift = x_b - x_a  # periodic in one or two directions: only frames of the same cell, unwrapped
            if not np.allclose(box_a, box_b):
                return None
            step = shift
        else:
            fractional = x_b @ np.linalg.inv(box_b) - x_a @ np.linalg.inv(box_a)
            fractional -= np.round(fractional - fractional[0])
            fractional -= fractional.mean(axis=0)
            step = fractional @ ((box_a + box_b) / 2)
            gradient = np.linalg.inv((box_a + box_b) / 2) @ (box_b - box_a)
            strain = (gradient + gradient.T) / 2
            size = np.abs(strain).max()
            if size > 0.1:
                return None
            if size > 1e-9:
                stress_a, stress_b = a.get("stress"), b.get("stress")
                if stress_a is None or stress_b is None:
                    return None
                stress = (stress_a.reshape(-1, 3, 3)[number] + stress_b.reshape(-1, 3, 3)[number]) / 2
                if not np.isfinite(stress).all():
                    return None
                volume = np.sqrt(abs(np.linalg.det(box_a) * np.linalg.det(box_b)))
                strain_work = float(volume * (stress * strain).sum())
    else:
        x_a, x_b = x_a - x_a.mean(axis=0), x_b - x_b.mean(axis=0)
        left, _, right = np.linalg.svd(x_b.T @ x_a)
        turn = left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right
        x_b, f_b = x_b @ turn, f_b @ turn
        step = x_b - x_a
    size = float(np.sqrt((step**2).sum(axis=1).mean())) * measured.scale
    if size > 0.7 or (size < 1e-4 and strain_work == 0.0):
        return None
    return -float(((f_a + f_b) / 2 * step).sum()), strain_work, size


# ---------------------------------------------------------------------------------------------------- duplicates


@dataclass
class Alike:
    """Samples that repeat an earlier one up to rotation, translation, reflection and the order of atoms.

    Args:
        sample: The later sample of each pair, (P,).
        original: The earlier one, (P,).
        distance: Largest difference between their interatomic distances in Å, (P,).
        is_same: Whether they are the same, (P,); the others are nearly so.
    """

    sample: np.ndarray
    original: np.ndarray
    distance: np.ndarray
    is_same: np.ndarray


def duplicates(measured: Measured) -> Alike:
    """Pairs of samples of the same elements, charge and spin whose interatomic distances agree.

    Candidates have fingerprints, sums over pairs of smooth functions of their distance, that nearly agree; then the
    sorted distances of each pair of elements decide, in periodic samples those within 5 Å.
    """
    fine = np.ones(len(measured.samples), dtype=bool)
    fine[measured.rows_of(measured.broken, "pos")] = False
    usable = np.flatnonzero(fine & (measured.counts > 1))
    _, which, number = np.unique(measured.formula[usable], return_inverse=True, return_counts=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    ends = np.cumsum(number)
    candidates = []
    for kind in np.flatnonzero(number > 1):
        rows = usable[order[ends[kind] - number[kind] : ends[kind]]]
        marks = measured.fingerprint[rows]
        # moving all distances by ALMOST changes the fingerprint by no more than this
        reach = ALMOST * 3.0 * np.maximum(marks.sum(axis=1).max(), 1.0) ** 0.5
        distance, index = nearest(marks, min(4, len(rows)), reach)
        first, column = np.nonzero(np.isfinite(distance) & (index != np.arange(len(rows))[:, None]))
        candidates.append(np.stack([rows[first], rows[index[first, column]]], axis=1))
    empty = np.zeros(0, dtype=np.int64)
    if not candidates:
        return Alike(empty, empty, np.zeros(0), np.zeros(0, dtype=bool))
    pairs = np.unique(np.sort(np.concatenate(candidates), axis=1), axis=0)
    if not len(pairs):
        return Alike(empty, empty, np.zeros(0), np.zeros(0, dtype=bool))
    gap = np.concatenate([_gaps(measured, pairs[n : n + 2000]) for n in range(0, len(pairs), 2000)])
    pairs, gap = pairs[gap < ALMOST], gap[gap < ALMOST]
    # of several originals, the closest
    best = np.lexsort((pairs[:, 0], gap, pairs[:, 1]))
    best = best[np.flatnonzero(np.diff(pairs[best, 1], prepend=-1))]
    pairs, gap = pairs[best], gap[best]
    limit = np.where(measured.counts[pairs[:, 0]] > 3, SAME, SAME_OF_FEW)
    return Alike(pairs[:, 1], pairs[:, 0], gap, gap < limit)


def _gaps(measured: Measured, pairs: np.ndarray) -> np.ndarray:
    """Largest difference between the sorted distances of two samples, in Å, (P,)."""
    rows, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(pairs.shape)
    block = measured.samples.take(rows)
    lists, surroundings = _distances(block, measured.scale)
    boxes = block.box * measured.scale
    out = np.full(len(pairs), np.inf)
    for number in range(len(place)):
        a, b = int(place[number, 0]), int(place[number, 1])
        if not np.allclose(np.linalg.norm(boxes[a], axis=1), np.linalg.norm(boxes[b], axis=1), atol=ALMOST):
            continue
        (kind_a, distance_a), (kind_b, distance_b) = lists[a], lists[b]
        if boxes[a].any():  # a pair at the edge of the sphere may be in one and not in the other
            kind_a, distance_a = kind_a[distance_a < 4.5], distance_a[distance_a < 4.5]
            kind_b, distance_b = kind_b[: len(kind_a)], distance_b[: len(distance_a)]
        if len(kind_a) == len(kind_b) and len(kind_a):
            by_a, by_b = np.lexsort((distance_a, kind_a)), np.lexsort((distance_b, kind_b))
            if (kind_a[by_a] == kind_b[by_b]).all():
                gap = np.abs(distance_a[by_a] - distance_b[by_b]).max()
                if gap < ALMOST and boxes[a].any():  # the same pairs may be put together in another way
                    here, there = surroundings[a], surroundings[b]
                    if np.abs(here - there).max() > (1e-3 + 2 * gap) * np.abs(here).max():
                        continue
                out[number] = gap
    return out


def _distances(block: Block, scale: float) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Pairs of each sample, and what surrounds its atoms.

    Returns:
        Kinds of pairs and their distances in Å, ascending: all of them where the sample is open; and a number for the
        surroundings of each atom, to second neighbours, ascending.
    """
    i, j, vectors = block.pairs(5.0, scale)
    which, near = block.batch[i], np.linalg.norm(vectors, axis=1)
    ends = np.searchsorted(which, np.arange(len(block) + 1)) if (np.diff(which) >= 0).all() else None
    size, weight = len(block.z), np.sin(1.0 + 0.7 * block.z) + 1.5  # a number for each element
    closeness = (1 - near / 5.0) ** 2
    inner = np.zeros(size)
    outer = np.zeros(size)
    for to, of in ((i, j), (j, i)):
        inner += np.bincount(to, weights=closeness * weight[of], minlength=size)
    inner *= weight
    for to, of in ((i, j), (j, i)):
        outer += np.bincount(to, weights=closeness * inner[of], minlength=size)
    outer *= weight
    surroundings = [np.sort(outer[first:last]) for first, last in zip(block.ptr[:-1], block.ptr[1:], strict=True)]
    out = []
    for number in range(len(block)):
        first, last = block.ptr[number], block.ptr[number + 1]
        if block.box[number].any() or last - first > ALL_DISTANCES:
            mine = slice(ends[number], ends[number + 1]) if ends is not None else np.flatnonzero(which == number)
            a, b, distance = i[mine], j[mine], near[mine]
        else:
            a, b = (index + first for index in np.triu_indices(last - first, 1))
            distance = np.linalg.norm(block.pos[a] - block.pos[b], axis=1) * scale
        low, high = np.minimum(block.z[a], block.z[b]), np.maximum(block.z[a], block.z[b])
        order = np.argsort(distance)
        out.append(((low * 256 + high)[order], distance[order]))
    return out, surroundings


# ------------------------------------------------------------------------------------------- without near samples


def fitted_energies(measured: Measured, seed: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    r"""Energies of one molecule as its forces alone would have them, beside those of the data.

    Snapshots too far apart for :func:`work_between` still share one surface. A sum of functions of interatomic
    distances, :math:`E = \sum_{ij} a_{ij} u + b_{ij} u^2 + c_{ij} / u` with :math:`u = r_{ij} / \bar r_{ij}`, is fitted
    to the forces, and its energies are compared with those given.

    Returns:
        Energies of the data and of the fit, (n,) each, without their means; None where no molecule of 3 to 30 atoms has
        enough snapshots.
    """
    size, open_ = measured.counts, ~measured.is_periodic
    usable = np.flatnonzero(measured.complete & open_ & (size >= 3) & (size <= 30))
    if not len(usable) or measured.y is None:
        return None
    key = np.stack([measured.sequence[usable].astype(np.int64), measured.formula[usable]], axis=1)
    _, which, number = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    rows = usable[which.reshape(-1) == number.argmax()]
    num_atoms = int(size[rows[0]])
    i, j = np.triu_indices(num_atoms, 1)
    needed = max(40, 3 * len(i) // num_atoms)  # three unknowns a pair, 3N equations a snapshot, three times over
    if len(rows) < needed:
        return None
    rows = rows[draw(len(rows), max(needed, 6000 // num_atoms), seed)]
    block = measured.samples.take(rows)
    forces = block.get("neg_dy")
    assert forces is not None
    pos = block.pos.reshape(len(rows), num_atoms, 3)
    forces = forces.reshape(len(rows), -1)
    vectors = pos[:, i] - pos[:, j]  # (n, P, 3)
    distance = np.linalg.norm(vectors, axis=2)
    mean = distance.mean(axis=0)
    u, unit = distance / mean, vectors / distance[:, :, None]
    basis = np.concatenate([u, u**2, 1 / u], axis=1)  # (n, 3P)
    slopes = np.stack([np.ones_like(u), 2 * u, -1 / u**2]) / mean  # (3, n, P)
    normal, right = np.zeros((3 * len(i), 3 * len(i))), np.zeros(3 * len(i))
    pairs = np.arange(len(i))
    for n in range(len(rows)):
        jacobian = np.zeros((num_atoms, 3, 3, len(i)))  # of energies in positions, for each function and pair
        for f in range(3):
            gradient = slopes[f, n][:, None] * unit[n]  # (P, 3)
            jacobian[i, :, f, pairs] += gradient
            jacobian[j, :, f, pairs] -= gradient
        design = -jacobian.reshape(3 * num_atoms, -1)
        normal += design.T @ design
        right += design.T @ forces[n]
    normal += 1e-8 * np.trace(normal) / len(normal) * np.eye(len(normal))
    fitted = basis @ np.linalg.solve(normal, right)
    given = measured.y[rows]
    return given - np.median(given), fitted - np.median(fitted)
