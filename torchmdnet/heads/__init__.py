"""Output heads: from features of atoms to a property of the system."""

from torchmdnet.catalogue import Catalogue

HEADS = Catalogue(
    "output_model",
    {
        "Scalar": "torchmdnet.heads.scalar:Scalar",
        "DipoleMoment": "torchmdnet.heads.dipole:DipoleMoment",
        "ElectronicSpatialExtent": "torchmdnet.heads.spatial_extent:ElectronicSpatialExtent",
    },
)

__all__ = ["HEADS"]
