"""Structures that no calculator can answer for, refused before one runs into them, perhaps without end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchmdnet.datasets.labels import FARTHEST
from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import DataError
from torchmdnet.simulation.sanity import COINCIDENT, coincidence_of

if TYPE_CHECKING:
    import numpy as np
    from ase import Atoms

__all__ = ["check_structure"]

#: Reach of an interaction in Å, with which the periodic images of an atom are counted.
REACH = 5.0
#: Periodic images of an atom within reach, at most, and those to either side along one lattice vector.
MOST_IMAGES, MOST_ALONG = 1_000_000, 500


def check_structure(atoms: Atoms, closest: float = COINCIDENT) -> None:
    """Refuse structures without atoms, with unknown elements, no places, flat or tiny cells, or atoms at one place.

    Args:
        atoms: The structure.
        closest: Below this distance in Å two atoms are at one place.

    Raises:
        DataError: With what is wrong.
    """
    import numpy as np

    if not len(atoms):
        raise DataError("the structure has no atoms")
    unknown = (atoms.numbers < 0) | (atoms.numbers >= len(SYMBOLS))
    if unknown.any():
        row = int(unknown.argmax())
        raise DataError(f"atom {row} has the atomic number {atoms.numbers[row]}, which no element has")
    for what, values in (("the position", atoms.positions), ("the lattice vector", atoms.cell.array)):
        wrong = ~(np.abs(values) <= FARTHEST).all(axis=1)  # also where a number is not finite
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(
                f"{what} {row} is {values[row].tolist()}, counting from 0; coordinates are finite and up to "
                f"{FARTHEST:g} Å"
            )
    periodic = atoms.cell.array[atoms.pbc]  # (P, 3)
    if len(periodic):
        _check_cell(periodic)
    if clash := coincidence_of(atoms, closest):
        raise DataError(clash.told.rstrip("."))


def _check_cell(periodic: np.ndarray) -> None:
    """Refuse lattice vectors (P, 3), in Å, that span no volume, and cells with too many images within reach."""
    import numpy as np

    lengths = np.linalg.norm(periodic, axis=1)
    if not lengths.all() or np.linalg.matrix_rank(periodic / lengths[:, None], tol=1e-6) < len(periodic):
        raise DataError(f"the cell spans no volume: its periodic lattice vectors are {periodic.tolist()}")
    heights = 1 / np.linalg.norm(np.linalg.pinv(periodic), axis=0)  # (P,) Å, distances between opposite faces
    along = np.floor(REACH / heights)
    images = float((2 * along + 1).prod())
    if images > MOST_IMAGES or (along > MOST_ALONG).any():
        raise DataError(
            f"the cell is only {heights.min():.3g} Å high: {images:.2g} periodic images of each atom lie within "
            f"{REACH:g} Å; check the unit of its lattice vectors, {periodic.tolist()}"
        )
