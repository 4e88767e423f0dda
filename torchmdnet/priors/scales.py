"""What physical priors ask of a data set: its units, and which element each type of atom is."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.limits import LARGEST
from torchmdnet.units import energy_factor, length_factor

__all__ = [
    "FARTHEST",
    "JOULES_PER_EV",
    "count_of",
    "elements_of_types",
    "joules_per_energy",
    "metres_per_length",
    "number_of",
]

JOULES_PER_EV = 1.602176634e-19

#: The largest range of a prior, in any unit of length.
FARTHEST = 10_000.0


def number_of(value: Any, name: str, prior: str, *, above: float = 0.0, most: float = math.inf) -> float:
    """An argument of a prior as a finite number, above a bound.

    Raises:
        ConfigError: With the argument and its value.
    """
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    size = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of whole numbers with hundreds of digits
            size = float(value)
    if not (above < size <= most and math.isfinite(size)):
        bounds = "" if above == -math.inf else f" above {above:g}" + ("" if most == math.inf else f", up to {most:,g}")
        raise ConfigError(f"{prior}: {name}={repr(value)[:60]} is not valid. It takes a finite number{bounds}.")
    return cast(float, value)


def count_of(value: Any, name: str, prior: str, most: int = int(LARGEST["max_z"])) -> int:
    """An argument of a prior as a whole number from 1 on.

    Raises:
        ConfigError: With the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 < int(value) <= most:
        raise ConfigError(
            f"{prior}: {name}={repr(value)[:60]} is not valid. It takes a whole number from 1 to {most:,}."
        )
    return int(value)


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
    return float(number_of(distance_scale, "distance_scale", prior, above=1e-20, most=1.0))


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
    return float(number_of(energy_scale, "energy_scale", prior, above=1e-40, most=1e10))


def elements_of_types(atomic_number: Iterable[Any] | None, dataset: Any) -> Tensor:
    """The atomic number of each type of atom, (types,) int64.

    Types are what ``z`` holds: as given, as the data set states in ``atomic_number``, or else atomic numbers already.
    """
    if atomic_number is None:
        atomic_number = getattr(dataset, "atomic_number", None)
    if atomic_number is None:
        return torch.arange(len(SYMBOLS))
    try:
        elements = [int(number) for number in atomic_number]
    except (TypeError, ValueError, OverflowError):
        elements = [-1]
    if not all(0 <= number < len(SYMBOLS) for number in elements):
        raise ConfigError(
            f"atomic_number={str(atomic_number)[:60]} is not valid. It takes the atomic number of each type of atom, a "
            f"list of whole numbers from 0 to {len(SYMBOLS) - 1}."
        )
    return torch.tensor(elements, dtype=torch.long)
