"""The transformers as one operation say what their layers say, and so do their derivatives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from torchmdnet.models.torchmd_fused import FrozenNet, FusedRepresentation
from torchmdnet.ops import kernels
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

SYSTEMS = {"molecules": small_molecules(), "cell": cell_of_atoms()}
NAMES = ("transformer", "equivariant-transformer")
OPTIONS = {
    "heads of one vector": {"embedding_dimension": 16, "num_heads": 4},
    "a last block of one vector": {"embedding_dimension": 20, "num_heads": 5},
    "heads of one block": {"embedding_dimension": 16, "num_heads": 2},
    "heads of three blocks": {"embedding_dimension": 48, "num_heads": 2, "num_layers": 1},
    "three layers, all fades": {"embedding_dimension": 16, "num_heads": 2, "num_layers": 3, "vector_cutoff": True},
    "no neighbour embedding": {"embedding_dimension": 16, "num_heads": 2, "neighbor_embedding": False},
    "lower cutoff": {"embedding_dimension": 16, "num_heads": 2, "cutoff_lower": 0.8},
    "distances in keys": {"embedding_dimension": 16, "num_heads": 2, "distance_influence": "keys"},
}
ONE = OPTIONS["heads of one block"]
pytestmark = pytest.mark.filterwarnings("ignore:The transformer is deprecated")


def ask(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, *, fused: bool, **options) -> tuple:
    """Energies and forces with or without the one operation, which has to run where it is wanted."""
    calls = []
    with monkeypatch.context() as patch:
        if fused:
            encode = FrozenNet.encode
            patch.setattr(FrozenNet, "encode", lambda *args: calls.append(1) or encode(*args))
        else:
            patch.setattr(FusedRepresentation, "_frozen_with", lambda *args: None)
        z, pos, batch, box, _ = systems
        found = model(z, pos, batch, box=box, **options)
    assert bool(calls) is fused
    return tuple(x for x in found if isinstance(x, torch.Tensor))


def assert_same(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, **options) -> None:
    both = (ask(model, systems, monkeypatch, fused=fused, **options) for fused in (True, False))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_forces_are_those_of_the_layers(name: str, options: dict, systems: Systems, monkeypatch) -> None:
    assert_same(tiny_model(name, **options), systems, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_the_stress_is_that_of_the_layers(name: str, monkeypatch) -> None:
    assert_same(tiny_model(name, **ONE), SYSTEMS["cell"], monkeypatch, stress=True)


@pytest.mark.parametrize(("threads", "many"), [(3, 64), (7, 64), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_threads_share_blocks_of_channels_and_receivers(name: str, threads: int, many: int, monkeypatch) -> None:
    loops = kernels.tensor_edge_loops()
    monkeypatch.setattr(loops, "MANY", many)
    monkeypatch.setattr(loops, "ROOM", 20)
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_same(tiny_model(name, embedding_dimension=24, num_heads=3), SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transformer", {"embedding_dimension": 24, "num_heads": 2}),
        ("equivariant-transformer", {"embedding_dimension": 16, "num_heads": 8}),
        ("equivariant-transformer", {**ONE, "attn_activation": "tanh"}),
    ],
)
def test_what_the_loops_do_not_know_is_left_to_the_layers(name: str, options: dict, monkeypatch) -> None:
    model = tiny_model(name, **options)
    z, pos, batch, box, _ = SYSTEMS["cell"]
    monkeypatch.setattr(FrozenNet, "encode", None)  # nobody calls it
    model(z, pos, batch, box=box)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_somebody_listens_to_is_called(name: str) -> None:
    model = tiny_model(name, **ONE)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    model(z, pos, batch)
    heard = []
    linear = next(module for key, module in model.named_modules() if key.endswith("q_proj"))
    linear.register_forward_hook(lambda *args: heard.append(1))
    model(z, pos, batch)
    assert heard


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_weight_counts_at_once(name: str, monkeypatch) -> None:
    model = tiny_model(name, **ONE)
    ask(model, SYSTEMS["cell"], monkeypatch, fused=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
            assert_same(model, SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_an_operation_of_its_own(name: str, again: Callable, monkeypatch) -> None:
    model = tiny_model(name, **ONE)
    ask(model, SYSTEMS["cell"], monkeypatch, fused=True)
    assert_same(again(model), SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_and_gradients_of_weights_come_from_the_layers(name: str, monkeypatch) -> None:
    model = tiny_model(name, derivative=False, **ONE)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    results = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(FusedRepresentation, "_frozen_with", lambda *args: None)
            x = pos.clone().requires_grad_()
            energy = model(z, x, batch).energy.sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            (curvature,) = torch.autograd.grad((slope * slope.detach().cos()).sum(), x, retain_graph=True)
            weights = torch.autograd.grad(energy + slope.square().sum(), list(model.parameters()))
            results.append((slope.detach(), curvature, *weights))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_can_be_asked_for_twice(name: str) -> None:
    model = tiny_model(name, derivative=False, **ONE)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    x = pos.clone().requires_grad_()
    energy = model(z, x, batch).energy.sum()
    first, second = (torch.autograd.grad(energy, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_vectors_have_derivatives_too(monkeypatch) -> None:
    model = tiny_model("equivariant-transformer", output_model="DipoleMoment", derivative=False, **ONE)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    slopes = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(FusedRepresentation, "_frozen_with", lambda *args: None)
            x = pos.clone().requires_grad_()
            slopes.append(torch.autograd.grad(model.representation_model(z, x, batch)[1].cos().sum(), x)[0])
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-11)
