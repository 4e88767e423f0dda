"""TensorNet2's encoder as one operation says what its layers say, whoever asks for which derivative."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from torchmdnet.models import tensornet2_fused
from torchmdnet.models.tensornet2 import TensorNet2
from torchmdnet.models.tensornet2_fused import FrozenTensorNet2
from torchmdnet.ops import edge_network
from torchmdnet.ops.kernels import sharing
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

SYSTEMS = {"charged molecules": small_molecules(charges=True), "cell": cell_of_atoms()}
MODELS = {
    "O(3)": {},
    "SO(3)": {"equivariance_invariance_group": "SO(3)"},
    "odd channels, one layer": {"embedding_dimension": 10, "num_layers": 1},
    "no layer": {"num_layers": 0},
    "lower cutoff": {"cutoff_lower": 0.8},
    "repulsion": {"repulsion": True},
    "no charges": {"q_dim": 0},
    "Coulomb": {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, 0.25], "coulomb_cutoff": 5.0},
}


def model_of(**options) -> TorchMD_Net:
    return tiny_model("tensornet2", **{"q_dim": 3, **options})


def ask(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> tuple:
    """Energies and forces with or without the one operation, which has to run where it is wanted."""
    calls = []
    with monkeypatch.context() as patch:
        if fused:
            encoder = FrozenTensorNet2.encoder
            patch.setattr(FrozenTensorNet2, "encoder", lambda *args: calls.append(1) or encoder(*args))
        else:
            without(patch)
        z, pos, batch, box, q = systems
        found = model(z, pos, batch, box=box, q=q)
    assert bool(calls) is fused
    return tuple(found)


def without(patch: pytest.MonkeyPatch) -> None:
    """Turn the one operation off."""
    patch.setattr(TensorNet2, "_can_fuse", lambda *args: False)
    patch.setattr(TensorNet2, "direct", lambda *args: None)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_energies_and_forces_are_those_of_the_layers(options: dict, systems: Systems, kept: int, monkeypatch) -> None:
    """Up to the grid, from which the layers do not read what goes into their networks."""
    monkeypatch.setattr(tensornet2_fused, "KEPT", kept)
    monkeypatch.setattr(edge_network, "BLOCK", 40)
    monkeypatch.setattr(edge_network, "SHARED", 40)
    model = model_of(**options)
    for ours, theirs in zip(
        ask(model, systems, monkeypatch, fused=True), ask(model, systems, monkeypatch, fused=False), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_energies_without_forces_are_the_same(monkeypatch) -> None:
    systems, model = SYSTEMS["cell"], model_of()
    energy, _ = ask(model, systems, monkeypatch, fused=True)
    model.derivative = False
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(ask(model, systems, monkeypatch, fused=True)[0], energy, rtol=0, atol=0)


def test_second_derivatives_and_gradients_of_weights_come_from_the_layers(monkeypatch) -> None:
    model = model_of(derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    results = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                without(patch)
            x = pos.clone().requires_grad_()
            energy = model(z, x, batch, q=q).energy.sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            (curvature,) = torch.autograd.grad((slope * slope.detach().cos()).sum(), x, retain_graph=True)
            used = [weight for name, weight in model.named_parameters() if "charge_predicts.1" not in name]
            weights = torch.autograd.grad(energy + slope.square().sum(), used)
            results.append((slope.detach(), curvature, *weights))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_two_evaluations_at_once_do_not_share_arrays() -> None:
    model = model_of(derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    first, second = pos.clone().requires_grad_(), (1.1 * pos).requires_grad_()
    both = model(z, first, batch, q=q).energy.sum(), model(z, second, batch, q=q).energy.sum()
    together = [torch.autograd.grad(energy, x)[0] for energy, x in zip(both, (first, second), strict=True)]
    for x, expected in zip((first, second), together, strict=True):
        alone = torch.autograd.grad(model(z, x, batch, q=q).energy.sum(), x)[0]
        torch.testing.assert_close(alone, expected, rtol=0, atol=0)


def test_derivatives_can_be_asked_for_twice() -> None:
    model = model_of(derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    x = pos.clone().requires_grad_()
    energy = model(z, x, batch, q=q).energy.sum()
    first, second = (torch.autograd.grad(energy, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["layers.0.linears_tensor.2.weight", "layers.1.linears_scalar.0.weight", "charge_predict_0.q_norm.weight"]
)
def test_a_changed_weight_is_noticed(name: str, monkeypatch) -> None:
    model = model_of()
    systems = SYSTEMS["charged molecules"]
    before = ask(model, systems, monkeypatch, fused=True)[0]
    with torch.no_grad():
        model.representation_model.get_parameter(name).mul_(2)
    after = ask(model, systems, monkeypatch, fused=True)[0]
    assert not torch.allclose(before, after, rtol=1e-7)
    torch.testing.assert_close(after, ask(model, systems, monkeypatch, fused=False)[0], rtol=1e-8, atol=1e-9)


def test_a_charge_that_is_differentiated_takes_the_layers() -> None:
    model = model_of(derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    assert q is not None
    q = q.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(z, pos, batch, q=q).energy.sum(), q)
    step = torch.tensor([0.0, 1e-4, 0.0], dtype=torch.float64)
    up, down = (model(z, pos, batch, q=(q + sign * step).detach()).energy.sum() for sign in (1, -1))
    torch.testing.assert_close(slope[1], (up - down) / 2e-4, rtol=1e-5, atol=1e-7)


def test_copies_and_pickles_work_on(monkeypatch) -> None:
    model = model_of()
    systems = SYSTEMS["cell"]
    expected = ask(model, systems, monkeypatch, fused=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(ask(other, systems, monkeypatch, fused=True), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow  # copies of the loops for several threads take longest to compile
@pytest.mark.parametrize("kept", [0, 10**6])
def test_several_threads_give_the_numbers_of_one(kept: int, monkeypatch) -> None:
    monkeypatch.setattr(tensornet2_fused, "KEPT", kept)
    monkeypatch.setattr(sharing, "WORTH_THREADS", 0)
    model, systems = model_of(embedding_dimension=24), SYSTEMS["cell"]
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(ask(model, systems, monkeypatch, fused=True))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_another_activation_takes_the_layers() -> None:
    model = model_of(activation="tanh")
    z, pos, batch, box, q = SYSTEMS["cell"]
    assert torch.isfinite(model(z, pos, batch, box=box, q=q).energy).all()
    assert model.representation_model._frozen is None


def test_memory_is_used_again() -> None:
    model = model_of()
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    held = []
    for _ in range(8):
        model(z, pos, batch, q=q)
        held.append({array.ctypes.data for array in model.representation_model.spare.flat})
    assert held[-2] == held[-1]
