"""Heads for vector features: scalars stay and vectors turn with the frame, and invariant models are told apart."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.heads.equivariant import EquivariantScalar, EquivariantVectorOutput
from torchmdnet.models.base import Features
from torchmdnet.testing import small_molecules, tiny_model


def predict(output_model: str, pos_of, systems=None) -> torch.Tensor:
    systems = small_molecules() if systems is None else systems
    model = tiny_model("equivariant-transformer", output_model=output_model, derivative=False)
    return model(systems.z, pos_of(systems.pos), systems.batch)[0]


def test_vectors_turn_with_the_frame() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    here = predict("VectorOutput", lambda pos: pos)
    there = predict("VectorOutput", lambda pos: pos @ rotation.T - 0.4)
    assert here.shape == (3, 3)
    assert here.abs().max() > 1e-3
    torch.testing.assert_close(there, here @ rotation.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output_model", ["Scalar", "DipoleMoment", "ElectronicSpatialExtent"])
def test_scalars_do_not(output_model: str) -> None:
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    here = predict(output_model, lambda pos: pos)
    there = predict(output_model, lambda pos: pos @ rotation.T - 0.4)
    assert here.shape == (3, 1)
    torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-10)


def test_a_single_atom_gives_one_vector() -> None:
    model = tiny_model("equivariant-transformer", output_model="VectorOutput", derivative=False)
    y, _ = model(torch.tensor([6]), torch.zeros(1, 3, dtype=torch.float64))
    assert y.shape == (1, 3)
    x, v = torch.randn(1, 8), torch.randn(1, 3, 8)
    y = EquivariantVectorOutput(8).pre_reduce(x, v, torch.tensor([6]), torch.zeros(1, 3), torch.tensor([0]))
    assert y.shape == (1, 3)


def test_every_weight_gets_a_gradient() -> None:
    model = tiny_model("equivariant-transformer").train()
    systems = small_molecules()
    energy, forces = model(systems.z, systems.pos, systems.batch)
    (energy.sum() + forces.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.output_model.parameters())


@pytest.mark.parametrize("output_model", ["VectorOutput", "EquivariantScalar"])
@pytest.mark.parametrize("model", ["transformer", "graph-network"])
def test_a_model_without_vectors_is_refused(model: str, output_model: str) -> None:
    with pytest.raises(ConfigError, match=rf"output_model: '{output_model}' needs vector features.*'{model}'"):
        tiny_model(model, output_model=output_model)
    with pytest.raises(ValueError, match="needs vector features"):
        EquivariantScalar(8).scalar_and_vector(Features(torch.randn(2, 8)))


def test_a_head_can_be_named_in_full() -> None:
    model = tiny_model("equivariant-transformer", output_model="EquivariantScalar")
    assert type(model.output_model) is EquivariantScalar


def test_a_head_that_reads_charges_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ScalarPlusWeightedCoulomb' needs charges, which model 'equivariant-t"):
        tiny_model("equivariant-transformer", output_model="ScalarPlusWeightedCoulomb")


def test_vectors_cannot_be_standardised() -> None:
    from torchmdnet.build import create_model
    from torchmdnet.testing.tiny import TINY

    options = {**TINY, "model": "equivariant-transformer", "derivative": False}
    for output_model in ("VectorOutput", "DipoleMoment"):
        with pytest.raises(ConfigError, match="Set standardize to false"):
            create_model({**options, "output_model": output_model}, mean=torch.tensor(1.5), std=torch.tensor(2.0))
    create_model({**options, "output_model": "DipoleMoment"}, mean=torch.tensor(0.0), std=torch.tensor(2.0))
    create_model({**options, "output_model": "Scalar"}, mean=torch.tensor(1.5), std=torch.tensor(2.0))
