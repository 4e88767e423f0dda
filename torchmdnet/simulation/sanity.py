"""Whether a structure in motion is still one that a potential can speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.datasets.labels import FARTHEST

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["CLOSEST", "closest_pair", "explosion", "what_is_wrong"]

#: Bounds of structures in motion: the closest two atoms, as a share of the sum of their covalent radii, and the energy
#: of motion of an atom beside its thermal one, in eV.
CLOSEST, FASTEST = 0.45, 10.0


def explosion(atoms: Atoms, kelvin: float, hottest: float) -> str | None:
    """How a dynamics has exploded; None while it has not.

    Args:
        atoms: N atoms with momenta.
        kelvin: The temperature asked for, in K.
        hottest: A temperature that is never reached otherwise, in K.
    """
    from ase import units

    momenta = atoms.get_momenta()
    energy = (momenta**2).sum(axis=1) / (2 * atoms.get_masses())  # (N,) eV
    if not (np.isfinite(atoms.positions).all() and np.isfinite(energy).all()):
        return "a position is not finite"
    temperature = atoms.get_temperature()
    if np.abs(atoms.positions).max(initial=0.0) > FARTHEST or temperature > hottest:
        return f"it reached {temperature:.4g} K"
    if energy.max(initial=0.0) > FASTEST + 60 * units.kB * kelvin:
        return f"an atom reached {energy.max():.3g} eV"
    return None


def what_is_wrong(
    atoms: Atoms,
    *,
    forces: np.ndarray,
    energy: float,
    max_force: float,
) -> str | None:
    """What shows that a structure has left the range in which its energy means anything; None while all is well.

    Args:
        atoms: N atoms.
        forces: (N, 3) eV/Å.
        energy: eV.
        max_force: Force on an atom above which something is wrong, in eV/Å.
    """
    if not np.isfinite(energy):
        return f"the energy is {energy}"
    if not np.isfinite(forces).all():
        return f"the force on {_named(atoms, _first_lost(forces))} is no number"
    sizes = np.sqrt(np.einsum("ij,ij->i", forces, forces))
    if sizes.max(initial=0.0) > max_force:
        atom = int(sizes.argmax())
        return f"the force on {_named(atoms, atom)} is {sizes[atom]:.4g} eV/Å, more than {max_force:g}"
    return None


def closest_pair(atoms: Atoms) -> str | None:
    """Two atoms that have run into each other, images included; None where there are none."""
    from ase.data import covalent_radii
    from ase.neighborlist import neighbor_list

    radii = CLOSEST * covalent_radii[atoms.numbers]
    i, j, distance = neighbor_list("ijd", atoms, radii)  # pairs whose small spheres touch
    if not len(i):
        return None
    pair = int((distance / (radii[i] + radii[j])).argmin())
    return f"{_named(atoms, int(i[pair]))} and {_named(atoms, int(j[pair]))} are {distance[pair]:.3f} Å apart"


def _named(atoms: Atoms, atom: int) -> str:
    return f"atom {atom} ({atoms.symbols[atom]})"


def _first_lost(rows: np.ndarray) -> int:
    """The first row with something that is no number."""
    return int(np.isfinite(rows).all(axis=1).argmin())
