"""Established address of the output heads."""

from torchmdnet.heads.base import OutputModel
from torchmdnet.heads.coulomb import ScalarPlusWeightedCoulomb
from torchmdnet.heads.dipole import DipoleMoment, EquivariantDipoleMoment
from torchmdnet.heads.equivariant import EquivariantScalar, EquivariantVectorOutput
from torchmdnet.heads.scalar import Scalar
from torchmdnet.heads.spatial_extent import ElectronicSpatialExtent, EquivariantElectronicSpatialExtent

__all__ = ["DipoleMoment", "ElectronicSpatialExtent", "Scalar"]  # heads for every architecture; the rest by name

_BY_NAME = (
    EquivariantDipoleMoment,
    EquivariantElectronicSpatialExtent,
    EquivariantScalar,
    EquivariantVectorOutput,
    OutputModel,
    ScalarPlusWeightedCoulomb,
)
