"""What a trajectory shows: distances of pairs, deviation from the start, vibrations, drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Drift", "Spectrum", "column", "drift_of", "radial_distributions", "rmsd", "vibrational_density"]

#: Speed of light in cm/fs.
_CM_PER_FS = 2.99792458e-5
#: Resolution of a spectrum that is long enough, in 1/cm.
RESOLUTION = 8.0


class Drift(NamedTuple):
    """Of the conserved energy."""

    slope: float  # meV/atom/ps
    noise: float  # meV/atom, rms deviation from the line


class Spectrum(NamedTuple):
    """Vibrational density of states."""

    wavenumbers: np.ndarray  # (K,) 1/cm
    total: np.ndarray  # (K,) with integral 1
    elements: dict[str, np.ndarray]  # symbol -> (K,), which add up to the total
    resolution: float  # 1/cm


def drift_of(picoseconds: np.ndarray, energies: np.ndarray, num_atoms: int) -> Drift | None:
    """The line through the conserved energy.

    Args:
        picoseconds: Times (T,).
        energies: (T,) eV.
        num_atoms: N.

    Returns:
        None for fewer than three times.
    """
    if len(picoseconds) < 3:
        return None
    per_atom = 1000 * (energies - energies[0]) / num_atoms
    slope, offset = np.polyfit(picoseconds, per_atom, 1)
    return Drift(float(slope), float(np.std(per_atom - slope * picoseconds - offset)))


def radial_distributions(
    frames: Sequence[Atoms], reach: float = 6.0, bins: int = 120
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    r"""Radial distribution functions of periodic frames, for each pair of elements.

    .. math:: g_{ab}(r) = \frac{V}{N_a N_b} \frac{n_{ab}(r, r + dr)}{4 \pi r^2 dr}

    with the ordered pairs :math:`n_{ab}` of all periodic images.

    Args:
        frames: Frames of the same atoms.
        reach: Largest distance, in Å.
        bins: Number of intervals K.

    Returns:
        Middles of the intervals (K,) in Å, and g (K,) by pair, ``"O-H"``.
    """
    from ase.data import chemical_symbols
    from ase.neighborlist import neighbor_list

    edges = np.linspace(0.0, reach, bins + 1)
    shells = 4 / 3 * math.pi * (edges[1:] ** 3 - edges[:-1] ** 3)
    numbers = frames[0].numbers
    elements, counts = np.unique(numbers, return_counts=True)
    share = dict(zip(elements.tolist(), counts.tolist(), strict=True))
    found = {pair: np.zeros(bins) for pair in combinations_with_replacement(sorted(share, reverse=True), 2)}
    for atoms in frames:
        i, j, distance = neighbor_list("ijd", atoms, reach)
        for (a, b), total in found.items():
            chosen = (numbers[i] == a) & (numbers[j] == b)
            histogram, _ = np.histogram(distance[chosen], edges)
            total += histogram * atoms.get_volume() / (share[a] * share[b])
    names = {(a, b): f"{chemical_symbols[a]}-{chemical_symbols[b]}" for a, b in found}
    return (edges[1:] + edges[:-1]) / 2, {names[pair]: total / len(frames) / shells for pair, total in found.items()}


def rmsd(frames: Sequence[Atoms]) -> np.ndarray:
    """Root-mean-square deviation of each frame from the first, in Å, without motion of the whole.

    Open structures are superimposed by rotation (Kabsch, Acta Cryst. A32, 922, 1976), all atoms weighted alike; of
    periodic ones only the motion of the centre is taken away, in scaled coordinates where the cell changes.
    """
    first = frames[0]
    if first.pbc.any():
        start = first.positions
        found = []
        for atoms in frames:
            moved = atoms.positions - start
            if not np.array_equal(atoms.cell.array, first.cell.array) and first.cell.rank == 3:
                moved = (atoms.cell.scaled_positions(atoms.positions) - first.cell.scaled_positions(start)) @ (
                    first.cell.array
                )
            moved = moved - moved.mean(axis=0)
            found.append(math.sqrt((moved**2).sum(axis=1).mean()))
        return np.array(found)
    target = first.positions - first.positions.mean(axis=0)
    found = []
    for atoms in frames:
        here = atoms.positions - atoms.positions.mean(axis=0)
        left, singular, right = np.linalg.svd(here.T @ target)
        singular[-1] *= np.sign(np.linalg.det(left @ right)) or 1.0
        squares = (here**2).sum() + (target**2).sum() - 2 * singular.sum()
        found.append(math.sqrt(max(squares, 0.0) / len(atoms)))
    return np.array(found)


def vibrational_density(velocities: np.ndarray, atoms: Atoms, femtoseconds: float) -> Spectrum | None:
    r"""The vibrational density of states, from the power spectrum of velocities.

    .. math:: D(\nu) \propto \sum_i m_i \left| \int v_i(t) e^{-2 \pi i \nu t} dt \right|^2

    which by the Wiener-Khinchin theorem is the Fourier transform of their autocorrelation, averaged over overlapping
    pieces under a Hann window (Welch, 1967).

    Args:
        velocities: (T, N, 3) at equal times, in any unit.
        atoms: The N atoms.
        femtoseconds: Between two of the times.

    Returns:
        None for fewer than 32 times.
    """
    times = len(velocities)
    if times < 32:
        return None
    longest = math.ceil(1 / (RESOLUTION * _CM_PER_FS * femtoseconds))
    length = min(times, longest)
    window = np.hanning(length)[:, None, None]
    weights = atoms.get_masses()[:, None]
    by_atom = np.zeros((length // 2 + 1, len(atoms)))
    for begin in range(0, times - length + 1, max(length // 2, 1)):
        piece = velocities[begin : begin + length].astype(np.float64)
        piece = piece - (weights * piece).sum(axis=1, keepdims=True) / weights.sum()  # without motion of the whole
        by_atom += (np.abs(np.fft.rfft(piece * window, axis=0)) ** 2 * weights).sum(axis=2)
    wavenumbers = np.fft.rfftfreq(length, femtoseconds) / _CM_PER_FS
    width = wavenumbers[1]
    norm = by_atom.sum() * width
    if not norm > 0:
        return None
    symbols = np.array(atoms.get_chemical_symbols())
    elements = {str(symbol): by_atom[:, symbols == symbol].sum(axis=1) / norm for symbol in dict.fromkeys(symbols)}
    return Spectrum(wavenumbers, by_atom.sum(axis=1) / norm, elements, float(width))


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """A column of the log, NaN where a cell is empty."""
    return np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows])
