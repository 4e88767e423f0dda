"""The checks: each looks at one thing and says what it found.

A check is a function from a :class:`~torchmdnet.data.doctor.diagnosis.Diagnosis` to findings, and is listed in
:data:`CHECKS`. It says "error" where training would stop or learn something wrong, "warning" where a person should
look, and "note" for the rest; thresholds stand beside it as named constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from torchmdnet.data.doctor.checks import charges, energies, forces, geometry, labels, units
from torchmdnet.data.doctor.findings import Finding

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["CHECKS"]


def cutoff(d: Diagnosis) -> Iterator[Finding]:
    """Which cutoff to start from."""
    cost = d.cost
    yield Finding(
        "cutoff", "note",
        f"cutoff_upper: {cost.suggested:g} is a good start ({cost.edges[cost.suggested]:.0f} edges per atom): "
        f"{cost.reason}.",
        {"cutoff": cost.suggested, "edges per atom": cost.edges[cost.suggested]},
    )  # fmt: skip


#: Name of each check and the function that makes it, in the order of the report.
CHECKS: dict[str, Callable[[Diagnosis], Iterable[Finding]]] = {
    "readable": labels.readable,
    "labels": labels.labels,
    "elements": labels.elements,
    "length units": units.length_units,
    "energy units": units.energy_units,
    "force units": units.force_units,
    "stress": units.stress_units,
    "net force": forces.net_force,
    "torque": forces.torque,
    "large forces": forces.large_forces,
    "positions": geometry.positions,
    "cells": geometry.cells,
    "close contacts": geometry.contacts,
    "duplicates": geometry.repeated,
    "odd energies": energies.odd_energies,
    "levels of theory": energies.levels,
    "isolated atoms": energies.isolated_atoms,
    "charges": charges.charges,
    "dipoles": charges.dipoles,
    "charge and spin": charges.spins,
    "cutoff": cutoff,
}
