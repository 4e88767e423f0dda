"""The units a model predicts in, and conversions of its energies and forces by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.units import energy_factor, length_factor, normalise_unit

__all__ = ["Transform", "Units", "make_transform", "tranforms", "transforms"]

#: Takes energies and forces, returns both converted.
Transform = Callable[[Any, Any], tuple[Any, Any]]


class Units(NamedTuple):
    """Units of energy and length; forces are one per the other."""

    energy: str = "eV"
    length: str = "Å"

    @classmethod
    def parse(cls, stated: str | Sequence[str] | Mapping[str, str]) -> Units:
        """Read units the way people write them.

        Args:
            stated: A unit of energy, ``"kcal/mol"``, with Å for lengths; a unit of force, ``"kcal/mol/A"`` or
                ``"Hartree/Bohr"``; a pair ``("kcal/mol", "Å")``; or a mapping with ``energy_unit`` and ``length_unit``.

        Raises:
            ConfigError: If a unit is not known.
        """
        if isinstance(stated, str):
            stated = _energy_and_length(stated)
        elif isinstance(stated, Mapping):
            stated = (stated.get("energy_unit", "eV"), stated.get("length_unit", "Å"))
        energy, length = stated
        return cls(normalise_unit(energy, "energy"), normalise_unit(length, "length"))

    @property
    def in_ev(self) -> float:
        """Multiply an energy by this to have it in eV."""
        return energy_factor(self.energy)

    @property
    def in_angstrom(self) -> float:
        """Multiply a length by this to have it in Å."""
        return length_factor(self.length)

    def __str__(self) -> str:
        return f"{self.energy}/{self.length}"


def _energy_and_length(stated: str) -> tuple[str, str]:
    """Split ``"kcal/mol/A"`` where the length begins, if there is one."""
    for energy, length in ((stated, "Å"), (stated.rpartition("/")[0], stated.rpartition("/")[2])):
        try:
            return normalise_unit(energy, "energy"), normalise_unit(length, "length")
        except ConfigError:
            continue
    raise ConfigError(
        f"units: {stated!r} is not known. Write a unit of energy, such as 'eV' or 'kcal/mol', or one of force, such as "
        "'kcal/mol/A' or 'Hartree/Bohr'."
    )


def _scale(energy_by: float, forces_by: float, energy: Any, forces: Any) -> tuple[Any, Any]:
    return energy * energy_by, forces * forces_by


#: Conversions with the rounded constants that existing inputs rely on. The spelling of the name is established.
tranforms: dict[str, Transform] = {
    "eV/A -> kcal/mol/A": functools.partial(_scale, 23.0609, 23.0609),
    "Hartree/Bohr -> kcal/mol/A": functools.partial(_scale, 627.509, 627.509 / 0.529177),
    "Hartree/A -> kcal/mol/A": functools.partial(_scale, 627.509, 627.509),
}
transforms = tranforms


def make_transform(chosen: str | Transform | None, units: Units | None) -> Transform:
    """What to do with the energies and forces of a model.

    Args:
        chosen: None leaves them as they are; a name in :data:`tranforms`; the units to convert to, such as
            ``"kcal/mol/A"`` or ``"kJ/mol/nm"``, with exact factors; or a function of energies and forces.
        units: Units of the model, as far as they are stated.

    Raises:
        ConfigError: If the name is not known, or starts from other units than the model has.
    """
    if chosen is None:
        return functools.partial(_scale, 1, 1)
    if callable(chosen):
        return chosen
    if chosen in tranforms:
        start = Units.parse(chosen.partition(" -> ")[0])
        if units is not None and units != start:
            raise ConfigError(
                f"output_transform: {chosen!r} starts from {start}, but the model predicts {units}. "
                f"Pass {chosen.partition(' -> ')[2]!r}, which converts from the units of the model."
            )
        return tranforms[chosen]
    try:
        target = Units.parse(chosen)
    except (ConfigError, TypeError, ValueError):
        raise ConfigError(
            f"output_transform: {chosen!r} is not available.{did_you_mean(chosen, tranforms)} "
            f"Choose from {', '.join(map(repr, tranforms))}, give the units to convert to, such as 'kcal/mol/A' or "
            "'kJ/mol/nm', or pass a function of energies and forces."
        ) from None
    units = units or Units()
    energy_by = energy_factor(units.energy, target.energy)
    return functools.partial(_scale, energy_by, energy_by / length_factor(units.length, target.length))
