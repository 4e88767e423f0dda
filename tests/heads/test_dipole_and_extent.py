"""Dipole moments and spatial extents are sums over charges measured from the centre of mass."""

from __future__ import annotations

import logging

import pytest
import torch

from torchmdnet.elements import atomic_masses
from torchmdnet.heads import dipole
from torchmdnet.heads.dipole import DipoleMoment, EquivariantDipoleMoment
from torchmdnet.heads.spatial_extent import ElectronicSpatialExtent
from torchmdnet.models.base import Features
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model


def centred(systems) -> torch.Tensor:
    r = systems.pos.clone()
    for system in range(systems.num_systems):
        own = systems.batch == system
        mass = torch.tensor(atomic_masses)[systems.z[own]][:, None]
        r[own] -= (mass * systems.pos[own]).sum(0) / mass.sum()
    return r


def features(num_atoms: int) -> Features:
    torch.manual_seed(0)
    x, v = torch.randn(num_atoms, 8, dtype=torch.float64), torch.randn(num_atoms, 3, 8, dtype=torch.float64)
    return Features(x, v)


def value(head, systems) -> torch.Tensor:
    from torchmdnet.graph import bare_graph

    graph = bare_graph(systems.z, systems.pos, systems.batch)
    return head.per_system(head.reduce(head.per_atom(features(len(systems.z)), graph), systems.batch, 3), graph)


def per_system(x: torch.Tensor, systems) -> torch.Tensor:
    return torch.stack([x[systems.batch == system].sum(0) for system in range(3)])


def test_dipole_moment_is_the_length_of_the_sum() -> None:
    systems = small_molecules()
    head = DipoleMoment(8, dtype=torch.float64)
    charge = head.output_network(features(10).x)
    expected = per_system(charge * centred(systems), systems).norm(dim=1, keepdim=True)
    torch.testing.assert_close(value(head, systems), expected, rtol=1e-12, atol=1e-12)


def test_equivariant_dipole_moment_adds_atomic_dipoles() -> None:
    systems = small_molecules()
    head = EquivariantDipoleMoment(8, dtype=torch.float64)
    charge, vector = head.scalar_and_vector(features(10))
    expected = per_system(charge * centred(systems) + vector, systems).norm(dim=1, keepdim=True)
    torch.testing.assert_close(value(head, systems), expected, rtol=1e-12, atol=1e-12)


def test_spatial_extent_weighs_squared_distances() -> None:
    systems = small_molecules()
    head = ElectronicSpatialExtent(8, dtype=torch.float64)
    charge = head.output_network(features(10).x)
    expected = per_system(charge * centred(systems).square().sum(1, keepdim=True), systems)
    torch.testing.assert_close(value(head, systems), expected, rtol=1e-12, atol=1e-12)


def test_the_frame_of_reference_does_not_matter() -> None:
    systems = small_molecules()
    head = DipoleMoment(8, dtype=torch.float64)
    torch.testing.assert_close(value(head, systems._replace(pos=systems.pos + 5.0)), value(head, systems))


@pytest.mark.parametrize("output_model", ["DipoleMoment", "ElectronicSpatialExtent"])
def test_derivatives_stay_finite_where_the_dipole_vanishes(output_model: str) -> None:
    model = tiny_model("tensornet", output_model=output_model).train()
    pos = torch.zeros(1, 3, dtype=torch.float64)
    y, neg_dy = model(torch.tensor([8]), pos)  # at its own centre of mass
    (y.square().sum() + neg_dy.square().sum()).backward()
    assert torch.isfinite(neg_dy).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_priors_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = tiny_model("tensornet", output_model="DipoleMoment", prior_model="Atomref", prior_args={"max_z": 20})
    assert model.prior_model is None
    assert "does not allow prior models; dropping Atomref" in caplog.text


def test_a_box_is_warned_of_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dipole, "_warned", set())
    model = tiny_model("tensornet", output_model="DipoleMoment", derivative=False)
    systems = cell_of_atoms()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(systems.z, systems.pos, systems.batch, box=systems.box)
    assert caplog.text.count("centre of mass") == 1


def test_depth_of_the_network_is_an_option() -> None:
    model = tiny_model("tensornet", output_model="DipoleMoment", output_mlp_num_layers=2)
    assert {name for name, _ in model.output_model.named_parameters() if "weight" in name} == {
        f"output_network.layers.{n}.weight" for n in (0, 2, 4, 6)
    }


def test_the_masses_of_a_model_are_its_own() -> None:
    """What is loaded into a model in double precision does not change the table of the elements."""
    before = atomic_masses.copy()
    model = tiny_model("graph-network", output_model="DipoleMoment", derivative=False)
    with torch.no_grad():
        model.output_model.atomic_mass.mul_(2)
    assert (atomic_masses == before).all()
