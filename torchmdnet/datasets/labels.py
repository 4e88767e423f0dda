"""Labels beside energies and forces: how they are asked of a data set, and the names under which they are found."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

__all__ = [
    "ARTICLES",
    "FARTHEST",
    "LARGEST_LABEL",
    "USUAL_LABELS",
    "USUAL_NAMES",
    "Absence",
    "LabelKind",
    "LabelShape",
    "Labels",
    "find_label",
    "suggested_names",
    "suggested_option",
    "too_large",
]

#: No label, in any unit in use, is larger; the square of one that is does not fit single precision for long.
LARGEST_LABEL = 1e15
#: Coordinates beyond this are no positions, in Å; sums of their squares stay finite.
FARTHEST = 1e9

#: Where labels are looked for when no key is given; a name that says "reference" goes before a plain one.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "ref_energy", "reference_energy", "DFT_energy", "dft_energy", "qm_energy"),
        *("energy", "Energy", "total_energy", "potential_energy", "energies", "E"),
    ),
    "forces": (
        *("REF_forces", "ref_forces", "reference_forces", "DFT_forces", "dft_forces", "qm_forces"),
        *("forces", "Forces", "force", "atomic_forces", "F"),
    ),
    "stress": ("REF_stress", "ref_stress", "reference_stress", "DFT_stress", "dft_stress", "stress", "cauchy_stress"),
    "charge": ("total_charge", "charge", "q", "net_charge"),
    "spin": ("spin_multiplicity", "multiplicity", "n_unpaired", "unpaired_electrons", "nupdown", "spin"),
}

#: The labels that a potential is trained on.
LabelKind = Literal["energy", "forces", "stress"]
ARTICLES: dict[LabelKind, str] = {"energy": "an energy", "forces": "forces", "stress": "a stress"}


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


#: What names that may stand for a label contain, and what a name beside a weight or a unit contains.
_SIGNS: dict[LabelKind, str] = {
    "energy": r"energ|^e_|^u0?$|^e[0-9]?$|etot|_e$",
    "forces": r"forc|grad|^f$",
    "stress": "stress",
}
_BESIDE = r"weight|unit|zero"


class Absence(NamedTuple):
    """A label that training asks for and a data set does not have.

    Args:
        reason: What there is instead, and what to change.
        is_mistake: Whether it should be there; otherwise the set is known to be without.
    """

    reason: str
    is_mistake: bool


def suggested_names(kind: LabelKind, quantities: Mapping[str, str]) -> list[str]:
    """Names that may be those of a label, the likeliest first; a virial for a stress.

    Args:
        kind: The label.
        quantities: Name and form of each quantity, as :attr:`torchmdnet.datasets.ase.ASE.quantities` has them.
    """
    forms: dict[LabelKind, tuple[str, ...]] = {"energy": ("number",), "forces": ("atoms × 3",)}
    fitting = [
        name for name, form in quantities.items() if form in forms.get(kind, (form,)) and form not in _NO_NUMBERS
    ]
    found = [name for name in fitting if re.search(_SIGNS[kind], name, re.I) and not re.search(_BESIDE, name, re.I)]
    if kind == "stress":
        found += [name for name in fitting if "virial" in name.lower() and name not in found]
    return sorted(found, key=lambda name: "free" in name.lower())  # an energy goes before a free energy


def suggested_option(kind: LabelKind, name: str) -> str:
    """How to name a label: ``energy_key: E_scf``; forces are the negative of a gradient, a virial is no stress."""
    if kind == "forces" and "grad" in name.lower():
        return f"forces_key: '-{name}'"
    return f"{'virial' if kind == 'stress' and 'virial' in name.lower() else kind}_key: {name}"


_NO_NUMBERS = ("text", "true or false", "other")


def too_large(value: float) -> str:
    """What is wrong with a label beyond :data:`LARGEST_LABEL`, and what to do."""
    return (
        f"{value:.3g} is more than {LARGEST_LABEL:.0e}, which no label is in any unit. Check the units and the "
        "calculation, and leave the sample out."
    )
