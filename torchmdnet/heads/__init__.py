"""Output heads: from features of atoms to a property of the system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmdnet.catalogue import Catalogue
from torchmdnet.errors import ConfigError

HEADS = Catalogue(
    "output_model",
    {
        "Scalar": "torchmdnet.heads.scalar:Scalar",
        "DipoleMoment": "torchmdnet.heads.dipole:DipoleMoment",
        "ElectronicSpatialExtent": "torchmdnet.heads.spatial_extent:ElectronicSpatialExtent",
        "VectorOutput": "torchmdnet.heads.equivariant:EquivariantVectorOutput",
        "Dipole": "torchmdnet.heads.dipole:Dipole",
        "Polarizability": "torchmdnet.heads.polarizability:Polarizability",
        "PartialCharges": "torchmdnet.heads.charges:PartialCharges",
        "AtomScalar": "torchmdnet.heads.atom_scalar:AtomScalar",
        "ScalarPlusWeightedCoulomb": "torchmdnet.heads.coulomb:ScalarPlusWeightedCoulomb",
        "EquivariantScalar": "torchmdnet.heads.equivariant:EquivariantScalar",
        "EquivariantDipoleMoment": "torchmdnet.heads.dipole:EquivariantDipoleMoment",
        "EquivariantElectronicSpatialExtent": "torchmdnet.heads.spatial_extent:EquivariantElectronicSpatialExtent",
        "EquivariantVectorOutput": "torchmdnet.heads.equivariant:EquivariantVectorOutput",
    },
    base="torchmdnet.heads.base:OutputModel",
)

__all__ = ["HEADS", "named_head"]


def named_head(output_model: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a head, ``Name`` or ``{Name: {argument: value}}``.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(output_model, str):
        return output_model, {}
    if isinstance(output_model, Mapping) and len(output_model) == 1:
        ((name, arguments),) = output_model.items()
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return name, dict(arguments or {})
    raise ConfigError(
        f"output_model: {output_model!r} is neither the name of a head nor one name with its arguments, "
        "{Name: {argument: value}}."
    )
