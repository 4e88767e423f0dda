"""TensorNet2 shares the total charge out among atoms, and feels it everywhere."""

from __future__ import annotations

import warnings

import pytest
import torch

from torchmdnet.graph import build_graph
from torchmdnet.models.tensornet2 import ChargePredict, TensorNet2
from torchmdnet.ops.irreps import from_matrix
from torchmdnet.testing import small_molecules, tiny_model

OPTIONS: dict = {
    "hidden_channels": 8,
    "q_dim": 3,
    "num_layers": 2,
    "num_rbf": 5,
    "cutoff_upper": 3.0,
    "max_z": 10,
    "dtype": torch.float64,
}


def network(**options) -> TensorNet2:
    torch.manual_seed(0)
    return TensorNet2(**{**OPTIONS, **options}).double()


def test_charges_are_the_equation_and_add_up_to_the_total() -> None:
    torch.manual_seed(0)
    predict = ChargePredict(8, "silu", q_dim=3).double()
    systems = small_molecules(charges=True)
    graph = build_graph(*systems, cutoff_upper=3.0)
    X = torch.randn(len(systems.z), 3, 3, 8, dtype=torch.float64)
    trace = torch.einsum("naaf->nf", X) / 3
    eye = torch.eye(3, dtype=torch.float64)[None, :, :, None]
    A = (X - X.transpose(1, 2)) / 2
    S = (X + X.transpose(1, 2)) / 2 - trace[:, None, None] * eye
    inputs = torch.cat([trace, A.square().sum((1, 2)), S.square().sum((1, 2))], dim=1)
    c, f = predict.q_mlp(predict.q_norm(inputs)).split(3, dim=1)
    expected = c.clone()
    assert systems.q is not None
    for system, total in enumerate(systems.q):
        own = systems.batch == system
        expected[own] += f[own] ** 2 / ((f[own] ** 2).sum(0) + 1e-6) * (total - c[own].sum(0))
    charges = predict(from_matrix(X), graph)
    torch.testing.assert_close(charges, expected, rtol=1e-11, atol=1e-11)
    totals = torch.stack([charges[systems.batch == system].sum(0) for system in range(3)])
    torch.testing.assert_close(totals, systems.q[:, None].expand(3, 3), rtol=0, atol=1e-3)


def test_charges_follow_the_features_layer_by_layer() -> None:
    systems = small_molecules(charges=True)
    x, *_ = network(output_charges=False)(systems.z, systems.pos, systems.batch, q=systems.q)
    with_charges, *_ = network(output_charges=True)(systems.z, systems.pos, systems.batch, q=systems.q)
    assert x.shape == (10, 8)
    assert with_charges.shape == (10, 8 + 3 * 3)
    torch.testing.assert_close(with_charges[:, :8], x)
    for layer in range(3):
        charge = with_charges[:, 8 + 3 * layer : 11 + 3 * layer]
        total = torch.zeros(3, 3, dtype=torch.float64).index_add(0, systems.batch, charge)
        assert systems.q is not None
        torch.testing.assert_close(total, systems.q[:, None].expand(3, 3), rtol=0, atol=1e-2)


def test_charge_is_felt_beyond_the_cutoff() -> None:
    model = network()
    z = torch.tensor([6, 8, 6, 8])
    far = torch.tensor([[0.0, 0, 0], [1.2, 0, 0], [40.0, 0, 0], [41.2, 0, 0]], dtype=torch.float64)
    other = far.clone()
    other[3, 0] = 41.4  # a change in the far fragment moves charge in the near one
    near, moved = (model(z, pos, torch.zeros_like(z))[0][:2] for pos in (far, other))
    assert not torch.allclose(near, moved, rtol=0, atol=1e-9)


def test_without_charge_channels_it_is_blind_to_charge() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network(q_dim=0)
    systems = small_molecules(charges=True)
    with_charge, *_ = model(systems.z, systems.pos, systems.batch, q=systems.q)
    without, *_ = model(systems.z, systems.pos, systems.batch)
    torch.testing.assert_close(with_charge, without)


def test_repulsion_adds_its_energy_beside_the_head() -> None:
    systems = small_molecules()
    plain, repelled = (tiny_model("tensornet2", repulsion=repulsion) for repulsion in (False, True))
    repelled.load_state_dict(
        {**repelled.state_dict(), **plain.state_dict()}
    )  # the same weights, the tables of the repulsion kept
    graph = repelled.representation_model.graph(systems.z, systems.pos, systems.batch)
    expected = repelled.representation_model.repulsion(graph.z, graph.edge_index, graph.edge_dist)
    energy, _ = plain(systems.z, systems.pos, systems.batch)
    energy_repelled, _ = repelled(systems.z, systems.pos, systems.batch)
    total = torch.zeros(3, 1, dtype=torch.float64).index_add(0, systems.batch, expected)
    assert total.max().item() > 0.01
    torch.testing.assert_close(energy_repelled, energy + total, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("group", ["O(3)", "SO(3)"])
def test_mirror_images_differ_for_one_group_only(group: str) -> None:
    model = network(equivariance_invariance_group=group)
    systems = small_molecules()
    here, *_ = model(systems.z, systems.pos, systems.batch)
    mirrored, *_ = model(systems.z, -systems.pos, systems.batch)
    assert torch.allclose(here, mirrored, rtol=1e-9, atol=1e-9) == (group == "O(3)")


@pytest.mark.parametrize("name", ["tensornet", "tensornet2", "equivariant-transformer", "graph-network"])
def test_a_reset_restores_a_trained_radial_basis(name: str) -> None:
    model = tiny_model(name, trainable_rbf=True)  # its parameters are no longer the initial ones
    basis = model.representation_model.distance_expansion
    moved = basis.means.detach().clone()
    model.reset_parameters()
    initial, _ = basis._initial_params()
    torch.testing.assert_close(basis.means.detach(), initial.to(moved.dtype))
    assert not torch.allclose(moved, basis.means)
