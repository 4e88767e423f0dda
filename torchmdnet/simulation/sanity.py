"""Whether a structure in motion is still one that a potential can speak of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torchmdnet.datasets.labels import FARTHEST

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["CLOSEST", "COINCIDENT", "Clash", "clash_of", "closest_pair", "coincidence_of", "explosion", "what_is_wrong"]

#: Bounds of structures in motion: the closest two atoms, as a share of the sum of their covalent radii, and the energy
#: of motion of an atom beside its thermal one, in eV.
CLOSEST, FASTEST = 0.45, 10.0
#: Atoms nearer than this in Å are at one place: a model with a cutoff of 5 Å refuses them, see
#: :data:`torchmdnet.neighbors.sound.CLOSEST`.
COINCIDENT = 5e-5


class Clash(NamedTuple):
    """Two atoms that are too near to each other.

    Args:
        words: Which, and how far they are apart.
        distance: In Å.
        lengths: Of the lattice vectors, in Å, where one of the two is a periodic image; empty otherwise.
        is_itself: Whether the two are an atom and its own image.
        closest: Below this distance in Å they are at one place.
    """

    words: str
    distance: float
    lengths: tuple[float, ...] = ()
    is_itself: bool = False
    closest: float = COINCIDENT

    @property
    def can_be_relaxed(self) -> bool:
        """Whether forces could move the two apart."""
        return not self.is_itself and self.distance >= self.closest

    @property
    def told(self) -> str:
        """What is wrong, and what to do about it."""
        cell = f"heck the cell: its lattice vectors are {', '.join(f'{x:.4g}' for x in self.lengths)} Å long"
        if self.is_itself:
            return f"{self.words}. C{cell}."
        if self.can_be_relaxed:
            last = f"c{cell}" if self.lengths else "look at its units and coordinates"
            return f"{self.words}. Relax it first, torchmd-net relax, or {last}."
        last = f", or c{cell}" if self.lengths else ""
        return f"{self.words}, nearer than {self.closest:.2g} Å. Remove one of the two{last}."


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
    clash = clash_of(atoms)
    return None if clash is None else clash.words


def clash_of(atoms: Atoms, closest: float = COINCIDENT) -> Clash | None:
    """The two atoms, images included, that are nearest relative to their covalent radii, where they are too near.

    Args:
        atoms: N atoms.
        closest: Below this distance in Å two atoms are at one place.
    """
    from ase.data import covalent_radii

    return coincidence_of(atoms, closest) or _nearest(atoms, CLOSEST * covalent_radii[atoms.numbers], closest)


def coincidence_of(atoms: Atoms, closest: float = COINCIDENT) -> Clash | None:
    """Two atoms at one place, images included; None where there are none.

    Args:
        atoms: N atoms.
        closest: Below this distance in Å two atoms are at one place.
    """
    order = np.lexsort(atoms.positions.T)  # equal rows first: all atoms at the origin are more pairs than memory holds
    same = (np.diff(atoms.positions[order], axis=0) == 0).all(axis=1)
    if same.any():
        at = int(same.argmax())
        i, j = sorted(order[[at, at + 1]].tolist())
        return Clash(f"{_named(atoms, i)} and {_named(atoms, j)} are 0 Å apart", 0.0, closest=closest)
    return _nearest(atoms, np.full(len(atoms), closest / 2), closest)


def _nearest(atoms: Atoms, radii: np.ndarray, closest: float) -> Clash | None:
    """The two atoms that are nearest relative to their radii (N,), in Å, of those whose spheres touch."""
    from ase.neighborlist import neighbor_list

    i, j, distance, shifts = neighbor_list("ijdS", atoms, radii)
    if not len(i):
        return None
    is_itself = i == j
    share = distance / (radii[i] + radii[j])
    pair = int(np.where(is_itself, share - share.max() - 1, share).argmin())  # an atom and its own image before others
    first, second = int(i[pair]), int(j[pair])
    is_image = bool(shifts[pair].any())
    other = "its periodic image" if is_itself[pair] else f"{'an image of ' * is_image}{_named(atoms, second)}"
    size = float(distance[pair])
    return Clash(
        f"{_named(atoms, first)} and {other} are {size:{'.3f' if size >= 0.01 else '.2g'}} Å apart",
        size,
        tuple(atoms.cell.lengths()[atoms.pbc].tolist()) if is_image else (),
        bool(is_itself[pair]),
        closest,
    )


def _named(atoms: Atoms, atom: int) -> str:
    return f"atom {atom} ({atoms.symbols[atom]})"


def _first_lost(rows: np.ndarray) -> int:
    """The first row with something that is no number."""
    return int(np.isfinite(rows).all(axis=1).argmin())
