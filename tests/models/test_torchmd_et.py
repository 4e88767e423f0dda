"""The equivariant transformer turns its vectors with the frame, and is continuous where it says so."""

from __future__ import annotations

import warnings

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.models.torchmd_et import TorchMD_ET
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.tape.tape import Definitions
from torchmdnet.testing import small_molecules, tiny_model

OPTIONS: dict = {
    "hidden_channels": 8,
    "num_layers": 2,
    "num_rbf": 5,
    "num_heads": 2,
    "cutoff_upper": 3.0,
    "max_z": 10,
    "dtype": torch.float64,
}


def network(**options) -> TorchMD_ET:
    torch.manual_seed(0)
    model = TorchMD_ET(**{**OPTIONS, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("influence", ["keys", "values", "both", "none"])
def test_one_layer_is_the_equation(influence: str) -> None:
    model = network(distance_influence=influence, num_layers=1, vector_cutoff=influence == "both")
    layer = model.attention_layers[0]
    systems = small_molecules()
    num_atoms, H, D = len(systems.z), 2, 4
    x, v = torch.randn(num_atoms, 8, dtype=torch.float64), torch.randn(num_atoms, 3, 8, dtype=torch.float64)
    h = layer.layernorm(x)
    q, k = layer.q_proj(h).view(-1, H, D), layer.k_proj(h).view(-1, H, D)
    p = layer.v_proj(h).view(-1, H, 3 * D)
    v1, v2, v3 = layer.vec_proj(v).split(8, dim=-1)
    m, mu = torch.zeros(num_atoms, H, D, dtype=torch.float64), torch.zeros(num_atoms, 3, H, D, dtype=torch.float64)
    for i in range(num_atoms):
        for j in range(num_atoms):
            d = systems.pos[j] - systems.pos[i]
            r = d.norm()
            if systems.batch[i] != systems.batch[j] or r >= 3.0:
                continue
            rbf, envelope = model.distance_expansion(r), 0.5 * (torch.cos(torch.pi * r / 3.0) + 1)
            weight, value = q[i] * k[j], p[j]
            if layer.dk_proj is not None:
                weight = weight * layer.act(layer.dk_proj(rbf)).view(H, D)
            if layer.dv_proj is not None:
                value = value * layer.act(layer.dv_proj(rbf)).view(H, 3 * D)
            weight = torch.nn.functional.silu(weight.sum(-1, keepdim=True))
            if layer.vector_cutoff:
                value = value * envelope
            else:
                weight = weight * envelope
            alpha, beta, gamma = value.split(D, dim=-1)
            u = d / r if i != j else torch.zeros_like(d)
            m[i] += alpha * weight
            mu[i] += v[j].view(3, H, D) * beta + gamma * u[:, None, None]
    o1, o2, o3 = layer.o_proj(m.view(-1, 8)).split(8, dim=-1)
    expected_x = (v1 * v2).sum(1) * o2 + o3
    expected_v = v3 * o1[:, None] + mu.view(-1, 3, 8)

    graph = model.graph(systems.z, systems.pos, systems.batch)
    function = RadialFunction(layer, "radial", fades=False)
    radial = model.radial(graph, model.distance_expansion, model.envelope, [function], training=True)
    found_x, found_v = model.refine(Definitions(graph, radial), layer, function, x, v)
    torch.testing.assert_close(found_x, x + expected_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_v, v + expected_v, rtol=1e-12, atol=1e-12)


def test_vectors_turn_with_the_frame_and_scalars_stay() -> None:
    model, systems = network(), small_molecules()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    x_here, v_here, *_ = model(systems.z, systems.pos, systems.batch)
    x_there, v_there, *_ = model(systems.z, systems.pos @ rotation.T + 1.3, systems.batch)
    assert v_here is not None
    assert v_there is not None
    assert float(v_here.detach().abs().max()) > 0.1
    torch.testing.assert_close(x_there, x_here, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(v_there, torch.einsum("ab,nbf->naf", rotation, v_here), rtol=1e-11, atol=1e-11)


def test_energy_jumps_at_the_cutoff_only_without_vector_cutoff() -> None:
    z = torch.tensor([6, 8])
    for vector_cutoff, jumps in ((False, True), (True, False)):
        model = tiny_model("equivariant-transformer", vector_cutoff=vector_cutoff)
        inside, outside = (
            model(z, torch.tensor([[0.0, 0, 0], [distance, 0, 0]], dtype=torch.float64))[0].item()
            for distance in (4.0 - 1e-9, 4.0 + 1e-9)
        )
        assert (abs(inside - outside) > 1e-6) == jumps


def test_isolated_atoms_train_without_a_warning() -> None:
    model = tiny_model("equivariant-transformer").train()
    z = torch.tensor([6, 8, 1])
    pos = torch.tensor([[0.0, 0, 0], [1.2, 0, 0], [50.0, 0, 0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy, forces = model(z, pos)
        (energy.square().sum() + forces.square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_atoms_at_one_place_have_finite_energy_and_forces() -> None:
    model = tiny_model("equivariant-transformer")
    energy, forces = model(torch.tensor([6, 8]), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.isfinite(energy).all()
    assert torch.isfinite(forces).all()


def test_channels_that_heads_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads=3"):
        TorchMD_ET(**{**OPTIONS, "num_heads": 3})
    with pytest.raises(ConfigError, match="attn_activation: 'relu'"):
        TorchMD_ET(**OPTIONS, attn_activation="relu")
