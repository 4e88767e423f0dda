"""Normal modes of vibration from a Hessian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["normal_modes_of", "rigid_motions"]


def normal_modes_of(hessian: np.ndarray, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the mass-weighted Hessian without the motion of the whole.

    Translations, and rotations of what is not periodic, are projected out, so their eigenvalues are zero.

    Args:
        hessian: (3N, 3N) in eV/Å²; its symmetric part is used.
        atoms: The N atoms.

    Returns:
        Squared angular frequencies (3N,) in ASE's unit of 1/time², ascending, and the mass-weighted modes (3N, 3N) as
        rows, orthonormal.
    """
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    weighted = (hessian + hessian.T) / 2 / np.outer(root, root)
    free = rigid_motions(atoms)  # (3N, K)
    inside = np.eye(len(root)) - free @ free.T
    squares, vectors = np.linalg.eigh(inside @ weighted @ inside)
    return squares, vectors.T


def rigid_motions(atoms: Atoms) -> np.ndarray:
    """Mass-weighted translations and, in open space, rotations: orthonormal columns (3N, K)."""
    masses = np.sqrt(atoms.get_masses())[:, None]
    centred = atoms.positions - atoms.get_center_of_mass()
    axes = np.eye(3)
    motions = [np.broadcast_to(axis, centred.shape) for axis in axes]
    if not atoms.pbc.any():
        motions += [np.cross(axis, centred) for axis in axes]
    columns = np.stack([(masses * motion).ravel() for motion in motions], axis=1)
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > 1e-6 * sizes[0]]  # a linear molecule has two rotations
