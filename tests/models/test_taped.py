"""Programs in loops give what their definitions give, and so do all their derivatives."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from torchmdnet.models.base import set_radial_mode
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.ops import kernels
from torchmdnet.potential import TorchMD_Net
from torchmdnet.tape.tape import Tape
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

SYSTEMS = {"molecules": small_molecules(), "cell": cell_of_atoms()}
ONE = {"embedding_dimension": 16, "num_heads": 2}
OPTIONS = {
    "graph-network": {
        "one vector": {"embedding_dimension": 4},
        "a last block of one vector": {"embedding_dimension": 20},
        "three layers": {"embedding_dimension": 16, "num_layers": 3},
        "no layers": {"embedding_dimension": 16, "num_layers": 0},
        "no neighbour embedding": {"embedding_dimension": 16, "neighbor_embedding": False},
        "lower cutoff": {"embedding_dimension": 16, "cutoff_lower": 0.8},
        "messages of another width": {"embedding_dimension": 16, "num_filters": 12},
        "another activation": {"embedding_dimension": 16, "activation": "tanh"},
        "trained basis": {"embedding_dimension": 16, "trainable_rbf": True},
    },
}
CASES = [
    pytest.param(name, options, id=f"{name}, {case}") for name in OPTIONS for case, options in OPTIONS[name].items()
]
UNKNOWN = [
    ("graph-network", {"embedding_dimension": 10}),
    ("graph-network", {"aggr": "mean", "embedding_dimension": 16}),
]


def ask(
    model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, *, taped: bool, **options: bool
) -> dict[str, torch.Tensor]:
    """Energies, forces and, in training, gradients of all weights, by the tape, which has to run, or definitions."""
    calls = []
    model.zero_grad()
    with monkeypatch.context() as patch:
        if taped:
            backward = Tape.backward
            patch.setattr(Tape, "backward", lambda *args: calls.append(1) or backward(*args))
        else:
            patch.setattr(TapedRepresentation, "_call", lambda *args: None)
            patch.setattr(TapedRepresentation, "direct", lambda *args: None)
        z, pos, batch, box, _ = systems
        found = model(z, pos, batch, box=box, **options)._asdict()
        found = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        if model.training:
            loss = sum((torch.arange(x.numel()).view_as(x).cos() * x).sum() for x in found.values())
            (loss + found["forces"].square().sum()).backward()
            found |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert bool(calls) is taped
    return {name: value.detach() for name, value in found.items()}


def assert_same(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    ours, theirs = (ask(model, systems, monkeypatch, taped=taped, **options) for taped in (True, False))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_energies_and_forces(name: str, options: dict, systems: Systems, monkeypatch) -> None:
    assert_same(tiny_model(name, **options), systems, monkeypatch)


@pytest.mark.parametrize("mode", ["exact", "grid"])
@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_training_on_forces(name: str, options: dict, systems: Systems, mode: str, monkeypatch) -> None:
    model = tiny_model(name, **options).train()
    set_radial_mode(model, mode)
    assert_same(model, systems, monkeypatch)


@pytest.mark.parametrize("name", OPTIONS)
def test_stress(name: str, monkeypatch) -> None:
    assert_same(tiny_model(name, **ONE), SYSTEMS["cell"], monkeypatch, stress=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_on_stress(name: str, monkeypatch) -> None:
    assert_same(tiny_model(name, **ONE).train(), SYSTEMS["cell"], monkeypatch, stress=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("threads", "many"), [(3, 64), (7, 64), (3, 0)])
@pytest.mark.parametrize("name", OPTIONS)
def test_threads_share_blocks_of_channels_and_receivers(
    name: str, threads: int, many: int, training: bool, monkeypatch
) -> None:
    loops = kernels.tensor_edge_loops()
    monkeypatch.setattr(loops, "MANY", many)
    monkeypatch.setattr(loops, "ROOM", 20)
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = tiny_model(name, embedding_dimension=24, num_heads=3).train(training)
    assert_same(model, SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize(("name", "options"), UNKNOWN)
def test_what_the_loops_do_not_know_is_left_to_definitions(name: str, options: dict, monkeypatch) -> None:
    monkeypatch.setattr(Tape, "__init__", None)  # is not called
    z, pos, batch, box, _ = SYSTEMS["cell"]
    for training in (False, True):
        tiny_model(name, **options).train(training)(z, pos, batch, box=box)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_hooks_of_a_layer_are_called(name: str, training: bool, monkeypatch) -> None:
    model = tiny_model(name, **ONE).train(training)
    ask(model, SYSTEMS["molecules"], monkeypatch, taped=True)
    heard = []
    for module in model.representation_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: heard.append(module))
    assert_same(model, SYSTEMS["molecules"], monkeypatch)
    assert len({id(module) for module in heard}) >= 3


@pytest.mark.parametrize("name", OPTIONS)
def test_a_changed_weight_counts_at_once(name: str, monkeypatch) -> None:
    model = tiny_model(name, **ONE)
    ask(model, SYSTEMS["cell"], monkeypatch, taped=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
            assert_same(model, SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_copy_has_memory_of_its_own(name: str, again: Callable, monkeypatch) -> None:
    model = tiny_model(name, **ONE)
    ask(model, SYSTEMS["cell"], monkeypatch, taped=True)
    copied = again(model)
    assert copied.representation_model._workspace is not model.representation_model._workspace
    assert_same(copied, SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_and_gradients_of_weights(name: str, training: bool, monkeypatch) -> None:
    model = tiny_model(name, derivative=False, **ONE).train(training)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    results = []
    for taped in (True, False):
        with monkeypatch.context() as patch:
            if not taped:
                patch.setattr(TapedRepresentation, "_call", lambda *args: None)
            x = pos.clone().requires_grad_()
            energy = model(z, x, batch).energy.sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
            (curvature,) = torch.autograd.grad((slope * slope.detach().cos()).sum(), x, retain_graph=True)
            weights = torch.autograd.grad(energy + slope.square().sum(), list(model.parameters()))
            results.append((slope.detach(), curvature, *weights))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_can_be_asked_for_twice(name: str, training: bool) -> None:
    model = tiny_model(name, derivative=False, **ONE).train(training)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    x = pos.clone().requires_grad_()
    energy = model(z, x, batch).energy.sum()
    first, second = (torch.autograd.grad(energy, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_results_outlive_later_evaluations(name: str) -> None:
    model = tiny_model(name, **ONE)
    z, pos, batch, box, _ = SYSTEMS["cell"]
    features = model.representation_model(z, pos, batch, box)[0]
    before = features.detach().clone()
    for factor in (1.01, 1.02):
        model(z, factor * pos, batch, box=box)
        model.representation_model(z, factor * pos, batch, box)
    torch.testing.assert_close(features.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_of_systems_that_do_not_come_again_is_released(name: str) -> None:
    model = tiny_model(name, **ONE)
    z, pos, batch, box, _ = SYSTEMS["cell"]
    workspace = model.representation_model._workspace
    for number in range(2, 9):
        model(z[:number], pos[:number], batch[:number], box=box)

    def held() -> int:
        return sum(len(shelf.free) * shelf.size for shelf in workspace._shelves.values())

    model(z, pos, batch, box=box)
    many = held()
    for _ in range(40):
        model(z, pos, batch, box=box)
    assert 0 < held() < many
