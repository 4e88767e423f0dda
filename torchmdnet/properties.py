"""The table ``properties`` of a configuration: what a potential predicts beside its main output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.heads import HEADS
from torchmdnet.heads.base import OutputModel
from torchmdnet.heads.named import free_arguments

__all__ = ["DEFAULT_HEADS", "PropertySpec", "property_specs"]

#: The head of a property that names none.
DEFAULT_HEADS = {"charges": "PartialCharges", "dipole": "Dipole", "polarizability": "Polarizability"}

#: Names that mean something else in a batch, a call or its results.
_TAKEN = frozenset(("y", "neg_dy", "stress", "energy", "forces", "z", "pos", "batch", "box", "q", "s")) | frozenset(
    ("energies", "free_energy", "energy_std", "forces_std", "stress_std")
)


class PropertySpec(NamedTuple):
    """One property: how it is predicted and trained."""

    name: str
    head: str  # as in HEADS, or an address
    weight: float  # of its loss
    loss: str | None  # None is that of the energy
    label: str  # name of the reference values in the data set
    keywords: dict[str, Any]  # arguments of the head


def property_specs(args: Mapping[str, Any]) -> dict[str, PropertySpec]:
    """Read the table ``properties``.

    Args:
        args: A configuration. ``properties`` maps names to None (the usual head of that name), to the name of a head,
            or to a table with ``head``, ``weight``, ``loss``, ``label`` and arguments of the head.

    Returns:
        The properties by name, in the order of the table; empty without one.

    Raises:
        ConfigError: If a name, a head, a key or a value is not what it could be.
    """
    table = args.get("properties")
    if not table:
        return {}
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"properties: {table!r} is not a table. Give names with heads, for example {{dipole: Dipole}}; "
            f"{', '.join(DEFAULT_HEADS)} need no head."
        )
    return {name: _spec(name, entry) for name, entry in table.items()}


def _spec(name: Any, entry: Any) -> PropertySpec:
    where = f"properties: {name}"
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"{where} cannot be a name. Use letters, digits and underscores, for example dipole.")
    if name in _TAKEN:
        raise ConfigError(f"{where} already has another meaning. Choose another name, and the data's name as label.")
    if entry is None or isinstance(entry, str):
        entry = {"head": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: {entry!r} is neither a head nor a table such as {{head: Dipole, weight: 1.0}}.")
    keywords = dict(entry)
    head = keywords.pop("head", None) or DEFAULT_HEADS.get(name)
    if head is None:
        raise ConfigError(f"{where} needs a head. Choose from {', '.join(HEADS)}.")
    try:
        part = HEADS[head]
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('output_model: ')}") from error
    if not issubclass(part, OutputModel):
        raise ConfigError(f"{where}: {head!r} is no subclass of torchmdnet.heads.base.OutputModel.")
    weight, loss, label = keywords.pop("weight", 1.0), keywords.pop("loss", None), keywords.pop("label", name)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ConfigError(f"{where}: weight: {weight!r} is not a number of 0 or more.")
    for key, value in (("loss", loss), ("label", label)):
        if not (isinstance(value, str) and value) and not (key == "loss" and value is None):
            raise ConfigError(f"{where}: {key}: {value!r} is not a name.")
    accepted = free_arguments(part)
    for key in keywords:
        if key not in accepted:
            known = ("head", "weight", "loss", "label", *accepted)
            raise ConfigError(f"{where}: {key!r} is unknown.{did_you_mean(key, known)} Choose from {', '.join(known)}.")
    return PropertySpec(name, head, float(weight), loss, label, keywords)
