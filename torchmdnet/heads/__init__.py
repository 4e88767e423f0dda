"""Output heads: from features of atoms to a property of the system."""

from torchmdnet.catalogue import Catalogue

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

__all__ = ["HEADS"]
