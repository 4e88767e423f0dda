"""What used to be imported from `models.utils` and `models.output_modules` is still there, and is the real thing."""

from __future__ import annotations

import importlib

import pytest
import torch

HOMES = {
    "models.utils": {
        "OptimizedDistance": "nn.distance",
        "GaussianSmearing": "nn.radial",
        "ExpNormalSmearing": "nn.radial",
        "CosineCutoff": "nn.cutoff",
        "NeighborEmbedding": "nn.embedding",
        "MLP": "nn.mlp",
        "GatedEquivariantBlock": "nn.gated",
        "ShiftedSoftplus": "nn.activation",
        "Swish": "nn.activation",
        "GLU": "nn.activation",
        "SwiGLU": "nn.activation",
        "RepulsionZBL": "nn.repulsion",
        "scatter": "ops.scatter",
        "visualize_basis": "nn.plots",
    },
    "models.output_modules": {
        "OutputModel": "heads.base",
        "Scalar": "heads.scalar",
        "EquivariantScalar": "heads.equivariant",
        "EquivariantVectorOutput": "heads.equivariant",
        "DipoleMoment": "heads.dipole",
        "EquivariantDipoleMoment": "heads.dipole",
        "ElectronicSpatialExtent": "heads.spatial_extent",
        "EquivariantElectronicSpatialExtent": "heads.spatial_extent",
        "ScalarPlusWeightedCoulomb": "heads.coulomb",
    },
}
TABLE = [(old, name, new) for old, names in HOMES.items() for name, new in names.items()]


@pytest.mark.parametrize(("old", "name", "new"), TABLE)
def test_the_old_address_gives_the_object_at_its_new_home(old: str, name: str, new: str) -> None:
    found = getattr(importlib.import_module(f"torchmdnet.{old}"), name)
    assert found is getattr(importlib.import_module(f"torchmdnet.{new}"), name)


def test_mappings_have_the_established_keys() -> None:
    from torchmdnet.models.utils import act_class_mapping, dtype_mapping, rbf_class_mapping

    assert set(act_class_mapping) == {"ssp", "silu", "tanh", "sigmoid", "swish", "mish"}
    assert set(rbf_class_mapping) == {"gauss", "expnorm"}
    assert dtype_mapping == {16: torch.float16, 32: torch.float32, 64: torch.float64}


def test_heads_for_every_architecture_are_listed() -> None:
    from torchmdnet.models import output_modules

    assert output_modules.__all__ == ["DipoleMoment", "ElectronicSpatialExtent", "Scalar"]
