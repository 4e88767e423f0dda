"""TensorNet's encoder as one operation says what its layers say, whoever asks for which derivative."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from torchmdnet.models.base import set_radial_mode
from torchmdnet.models.tensornet import TensorNet
from torchmdnet.models.tensornet_fused import Encoder
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

SYSTEMS = {"charged molecules": small_molecules(charges=True), "cell": cell_of_atoms()}
MODELS = {
    "O(3)": {},
    "SO(3)": {"equivariance_invariance_group": "SO(3)"},
    "odd channels, one layer": {"embedding_dimension": 10, "num_layers": 1},
    "no layer": {"num_layers": 0},
    "lower cutoff": {"cutoff_lower": 0.8},
}


def ask(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, *, fused: bool) -> tuple:
    """Energies and forces with or without the one operation, which has to run where it is wanted."""
    calls = []
    with monkeypatch.context() as patch:
        if fused:
            forward = Encoder.forward
            patch.setattr(Encoder, "forward", lambda *args: calls.append(1) or forward(*args))
        else:
            patch.setattr(TensorNet, "_encoder", lambda *args: None)
            patch.setattr(TensorNet, "direct", lambda *args: None)
        z, pos, batch, box, q = systems
        found = model(z, pos, batch, box=box, q=q)
    assert bool(calls) is fused
    return tuple(found)


@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_energies_and_forces_are_those_of_the_layers(options: dict, systems: Systems, monkeypatch) -> None:
    model = tiny_model("tensornet", **options)
    for ours, theirs in zip(
        ask(model, systems, monkeypatch, fused=True), ask(model, systems, monkeypatch, fused=False), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("num_atoms", [1, 3, 200])
def test_few_and_many_atoms_take_the_same_path_to_the_same_numbers(num_atoms: int, monkeypatch) -> None:
    """Beyond a number of atoms PyTorch multiplies the matrices."""
    pos = 12 * torch.rand(num_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    systems = Systems(torch.full((num_atoms,), 6), pos, torch.zeros(num_atoms, dtype=torch.long), None, None)
    model = tiny_model("tensornet")
    for ours, theirs in zip(
        ask(model, systems, monkeypatch, fused=True), ask(model, systems, monkeypatch, fused=False), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_second_derivatives_and_gradients_of_weights_come_from_the_layers(monkeypatch) -> None:
    model = tiny_model("tensornet", derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    results = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(TensorNet, "_encoder", lambda *args: None)
            x = pos.clone().requires_grad_()
            energy = model(z, x, batch, q=q).energy.sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            (curvature,) = torch.autograd.grad((slope * slope.detach().cos()).sum(), x, retain_graph=True)
            weights = torch.autograd.grad(energy + slope.square().sum(), list(model.parameters()))
            results.append((slope.detach(), curvature, *weights))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_two_evaluations_at_once_do_not_share_arrays() -> None:
    """Memory is lent anew only when nobody waits for its derivative any more."""
    model = tiny_model("tensornet", derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    first, second = pos.clone().requires_grad_(), (1.1 * pos).requires_grad_()
    both = model(z, first, batch, q=q).energy.sum(), model(z, second, batch, q=q).energy.sum()
    together = [torch.autograd.grad(energy, x)[0] for energy, x in zip(both, (first, second), strict=True)]
    for x, expected in zip((first, second), together, strict=True):
        alone = torch.autograd.grad(model(z, x, batch, q=q).energy.sum(), x)[0]
        torch.testing.assert_close(alone, expected, rtol=0, atol=0)


def test_derivatives_can_be_asked_for_twice() -> None:
    model = tiny_model("tensornet", derivative=False)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    x = pos.clone().requires_grad_()
    energy = model(z, x, batch, q=q).energy.sum()
    first, second = (torch.autograd.grad(energy, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_arrays_are_lent_anew_although_an_energy_is_kept() -> None:
    model = tiny_model("tensornet")
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    kept = [model(z, pos.clone().requires_grad_(), batch, q=q) for _ in range(4)]
    assert kept[0].energy.requires_grad
    frozen = model.representation_model._frozen
    assert frozen is not None
    assert len(frozen.spare) == 1


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_gradients_take_the_place_of_what_is_not_read_any_more(num_layers: int) -> None:
    """Memory is what the way there needs; the way back, and calls that follow, need no more."""
    model = tiny_model("tensornet", num_layers=num_layers)
    z, pos, batch, _, q = SYSTEMS["charged molecules"]
    for _ in range(2):
        model(z, pos, batch, q=q)
        (spare,) = model.representation_model._frozen.spare
        assert len({tensor.ctypes.data for tensor in spare.tensors}) == len(spare.tensors) == 4 + 4 * num_layers
    model(z[:4], pos[:4])
    (spare,) = model.representation_model._frozen.spare
    assert {tensor.size for tensor in spare.tensors} == {4 * 9 * model.representation_model.hidden_channels}


def test_a_changed_weight_is_noticed(monkeypatch) -> None:
    model = tiny_model("tensornet")
    systems = SYSTEMS["cell"]
    before = ask(model, systems, monkeypatch, fused=True)[0]
    with torch.no_grad():
        model.representation_model.layers[0].linears_tensor[2].weight.mul_(2)
    after = ask(model, systems, monkeypatch, fused=True)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, ask(model, systems, monkeypatch, fused=False)[0], rtol=1e-11, atol=1e-12)


def test_copies_and_pickles_work_on(monkeypatch) -> None:
    model = tiny_model("tensornet")
    systems = SYSTEMS["cell"]
    expected = ask(model, systems, monkeypatch, fused=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(ask(other, systems, monkeypatch, fused=True), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_several_threads_give_the_numbers_of_one(monkeypatch) -> None:
    pos = 14 * torch.rand(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    systems = Systems(torch.full((400,), 8), pos, torch.zeros(400, dtype=torch.long), None, None)
    model = tiny_model("tensornet", embedding_dimension=32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ask(model, systems, monkeypatch, fused=True))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_another_activation_takes_the_layers() -> None:
    model = tiny_model("tensornet", activation="tanh")
    z, pos, batch, box, q = SYSTEMS["cell"]
    assert torch.isfinite(model(z, pos, batch, box=box, q=q).energy).all()
    assert model.representation_model._frozen is None


TRAINED = {
    **MODELS,
    "another activation": {"activation": "tanh"},
    "trained basis": {"trainable_rbf": True, "rbf_type": "gauss"},
    "single precision": {"precision": 32},
}


def train_once(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, *, fused: bool, **way) -> dict:
    """Gradients of a loss in energies and forces, by name of the weight, with or without the one operation."""
    calls = []
    with monkeypatch.context() as patch:
        if fused:
            reverse = Encoder.reverse
            patch.setattr(Encoder, "reverse", lambda *args: calls.append(1) or reverse(*args))
        else:
            patch.setattr(TensorNet, "_encoder", lambda *args: None)
        model.train().zero_grad()
        dtype = next(model.parameters()).dtype
        z, pos, batch, box, q = systems
        box, q = (None if x is None else x.to(dtype) for x in (box, q))
        energy, forces = model(z, pos.to(dtype), batch, box=box, q=q)
        loss = (energy - 1).square().mean() + (forces - 0.1).square().sum()
        loss.backward(**way)
    assert bool(calls) is fused
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("radial", ["grid", "exact"])
@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_training_on_forces_has_the_gradients_of_the_layers(
    options: dict, systems: Systems, radial: str, monkeypatch
) -> None:
    model = tiny_model("tensornet", **options)
    set_radial_mode(model, radial)
    ours = train_once(model, systems, monkeypatch, fused=True)
    theirs = train_once(model, systems, monkeypatch, fused=False)
    assert ours.keys() == theirs.keys()
    tolerance = 1e-10 if options.get("precision") != 32 else 2e-4
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=tolerance * scale + 1e-14, msg=name)


def test_gradients_of_weights_are_the_slope_of_the_loss() -> None:
    """Against finite differences, which know nothing of how it is done."""
    model = tiny_model("tensornet").train()
    set_radial_mode(model, "exact")
    z, pos, batch, box, _ = SYSTEMS["cell"]

    def loss() -> torch.Tensor:
        energy, forces = model(z, pos, batch, box=box)
        return energy.square().mean() + forces.square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.representation_model.named_parameters():
        step = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(step, alpha=sign * 1e-5)
            values.append(loss().item())
            with torch.no_grad():
                weight.add_(step, alpha=-sign * 1e-5)
        slope = (values[0] - values[1]) / 2e-5
        assert float((weight.grad * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_a_second_loss_on_the_same_graph_does_not_use_what_the_first_left(monkeypatch) -> None:
    z, pos, batch, box, _ = SYSTEMS["cell"]
    results = []
    for fused in (True, False):
        model = tiny_model("tensornet").train()
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(TensorNet, "_encoder", lambda *args: None)
            energy, forces = model(z, pos, batch, box=box)
            head = list(model.output_model.parameters())
            forces.square().sum().backward(inputs=head, retain_graph=True)
            energy.sum().backward(retain_graph=True)
            forces.square().sum().backward()
        results.append([weight.grad for weight in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_positions_of_the_caller_still_have_second_derivatives_in_training(monkeypatch) -> None:
    z, pos, batch, box, _ = SYSTEMS["cell"]
    results = []
    for fused in (True, False):
        model = tiny_model("tensornet").train()
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(TensorNet, "_encoder", lambda *args: None)
            x = pos.clone().requires_grad_()
            forces = model(z, x, batch, box=box).forces
            forces.square().sum().backward()
        results.append([x.grad, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_training_takes_its_memory_from_the_step_before() -> None:
    model = tiny_model("tensornet").train()
    z, pos, batch, box, _ = SYSTEMS["cell"]
    addresses = []
    for _ in range(3):
        model(z, pos, batch, box=box).forces.square().sum().backward()
        (spare,) = model.representation_model._trained.spare
        addresses.append({tensor.ctypes.data for tensor in spare.tensors})
    assert addresses[0] == addresses[1] == addresses[2]
