"""What physical priors ask of a data set: its units, and which element each type of atom is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.units import energy_factor, length_factor

__all__ = ["JOULES_PER_EV", "elements_of_types", "joules_per_energy", "metres_per_length"]

JOULES_PER_EV = 1.602176634e-19


def metres_per_length(distance_scale: float | None, dataset: Any, prior: str) -> float:
    """Metres per unit of length: as given, or as the data set states in ``distance_scale`` or ``length_unit``.

    Raises:
        ConfigError: If neither states it.
    """
    if distance_scale is None:
        distance_scale = getattr(dataset, "distance_scale", None)
    if distance_scale is None and getattr(dataset, "length_unit", None) is not None:
        distance_scale = length_factor(dataset.length_unit) * 1e-10
    if distance_scale is None:
        raise ConfigError(
            f"{prior}: distance_scale is not given and the data set does not state its unit of length. "
            "Give the metres in one unit of length, distance_scale: 1e-10 for Å."
        )
    return float(distance_scale)


def joules_per_energy(energy_scale: float | None, dataset: Any, prior: str) -> float:
    """Joules per unit of energy: as given, or as the data set states in ``energy_scale`` or ``energy_unit``.

    Raises:
        ConfigError: If neither states it.
    """
    if energy_scale is None:
        energy_scale = getattr(dataset, "energy_scale", None)
    if energy_scale is None and getattr(dataset, "energy_unit", None) is not None:
        energy_scale = energy_factor(dataset.energy_unit) * JOULES_PER_EV
    if energy_scale is None:
        raise ConfigError(
            f"{prior}: energy_scale is not given and the data set does not state its unit of energy. "
            "Give the joules in one unit of energy, energy_scale: 1.602176634e-19 for eV."
        )
    return float(energy_scale)


def elements_of_types(atomic_number: Iterable[Any] | None, dataset: Any) -> Tensor:
    """The atomic number of each type of atom, (types,) int64.

    Types are what ``z`` holds: as given, as the data set states in ``atomic_number``, or else atomic numbers already.
    """
    if atomic_number is None:
        atomic_number = getattr(dataset, "atomic_number", None)
    if atomic_number is None:
        return torch.arange(len(SYMBOLS))
    return torch.tensor([int(number) for number in atomic_number], dtype=torch.long)
