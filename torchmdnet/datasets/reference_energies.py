r"""Energies of the elements, so that a network learns what is left: the energy of binding.

.. math:: E_s \approx \sum_k n_{sk}\, e_k

with :math:`n_{sk}` atoms of element k in system s. The :math:`e_k` come from the source, from isolated atoms, or from
least squares.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["fit_energies", "isolated_atom_energies"]


def fit_energies(
    counts: np.ndarray,
    elements: np.ndarray,
    energies: np.ndarray,
    known: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Least-squares energy of each element, in float64; the shortest solution where compositions leave a choice.

    Args:
        counts: Atoms of each element in each system, (S, K).
        elements: The K atomic numbers.
        energies: Energy of each system, (S,).
        known: Elements whose energy is settled; only the others are fitted.

    Returns:
        Atomic number to energy, for all K elements that occur in ``counts``.
    """
    known = {z: e for z, e in (known or {}).items() if z in set(elements.tolist())}
    settled = np.array([z in known for z in elements.tolist()], dtype=bool)
    values = np.array([known.get(z, 0.0) for z in elements.tolist()])
    rest = np.asarray(energies, dtype=np.float64).reshape(-1) - counts @ values
    present = counts.any(axis=0) & ~settled
    if present.any():
        # systems of one composition are one equation, weighted by how many there are: same minimum, small matrix
        kinds, which, number = np.unique(counts[:, present], axis=0, return_inverse=True, return_counts=True)
        mean = np.bincount(which.reshape(-1), weights=rest, minlength=len(kinds)) / number
        weight = np.sqrt(number)
        values[present] = np.linalg.lstsq(kinds * weight[:, None], mean * weight, rcond=None)[0]
    occurs = present | settled
    return {int(z): float(e) for z, e in zip(elements[occurs], values[occurs], strict=True)}


def isolated_atom_energies(z: np.ndarray, energies: np.ndarray, charges: np.ndarray) -> dict[int, float]:
    """Energy of each element from single atoms: the neutral ones where there are any, then the lowest in energy.

    Args:
        z: Atomic number of each atom, (n,).
        energies: Its energy, (n,).
        charges: Its charge, (n,).
    """
    table: dict[int, float] = {}
    for number in np.unique(z).tolist():
        mine = z == number
        neutral = mine & (charges == 0)
        table[number] = float(energies[neutral if neutral.any() else mine].min())
    return table
