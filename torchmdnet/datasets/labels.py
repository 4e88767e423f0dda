"""Labels beside energies and forces: how they are asked of a data set, and the names under which they are found."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

__all__ = ["USUAL_LABELS", "LabelShape", "Labels", "find_label"]


class LabelShape(NamedTuple):
    """One row per atom or per system, and the shape of a row; () and (1,) are the same."""

    level: Literal["atom", "system"]
    shape: tuple[int, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of a stored row: () for a number."""
        return () if self.shape == (1,) else self.shape

    @property
    def words(self) -> str:
        """``3 numbers per system``, ``one number per atom``."""
        size = 1
        for length in self.shape:
            size *= length
        return f"{'one number' if size == 1 else f'{size} numbers'} per {self.level}"


#: Labels a data set is asked for: name of the field in a sample, and its shape.
Labels = Mapping[str, LabelShape]

#: Names under which sources hold a label that is asked for by its plain name; an exact match goes before them.
USUAL_LABELS: dict[str, tuple[str, ...]] = {
    "dipole": (
        *("REF_dipole", "ref_dipole", "DFT_dipole", "dft_dipole"),
        *("dipole", "dp", "dipole_moment", "dipole_moments", "scf_dipole", "mu"),
    ),
    "charges": (
        *("REF_charges", "ref_charges", "DFT_charges", "dft_charges"),
        *("charges", "partial_charges", "atomic_charges", "pq", "mbis_charges"),
    ),
    "polarizability": (
        *("REF_polarizability", "ref_polarizability", "DFT_polarizability", "dft_polarizability"),
        *("polarizability", "polarisability", "polarizability_tensor", "alpha"),
    ),
    "stress": ("stress",),
}


def find_label(name: str, available: Collection[str]) -> str | None:
    """The name a label has in a source: its own, or else a usual spelling; None where there is neither."""
    if name in available:
        return name
    return next((usual for usual in USUAL_LABELS.get(name, ()) if usual in available), None)
