"""Programs in loops give what their definitions give, and so do all their derivatives."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from daily import daily
from torch.utils.checkpoint import checkpoint

from torchmdnet.models import tensornet2
from torchmdnet.models.base import set_radial_mode
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.ops import edge_network, kernels
from torchmdnet.ops.kernels import loops
from torchmdnet.potential import TorchMD_Net
from torchmdnet.tape.replay import Recording
from torchmdnet.tape.tape import Tape
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

SYSTEMS = {"molecules": small_molecules(charges=True), "cell": cell_of_atoms()}
ONE = {"embedding_dimension": 16, "num_heads": 2}
TRANSFORMER = {
    "heads of one vector": {"embedding_dimension": 16, "num_heads": 4},
    "a last block of one vector": {"embedding_dimension": 20, "num_heads": 5},
    "heads of one block": ONE,
    "heads of three blocks": {"embedding_dimension": 48, "num_heads": 2, "num_layers": 1},
    "no layers": {**ONE, "num_layers": 0},
    "no neighbour embedding": {**ONE, "neighbor_embedding": False},
    "lower cutoff": {**ONE, "cutoff_lower": 0.8},
    "distances in keys": {**ONE, "distance_influence": "keys"},
}
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
    "tensornet": {
        "O(3)": {},
        "SO(3)": {"equivariance_invariance_group": "SO(3)"},
        "odd channels, one layer": {"embedding_dimension": 10, "num_layers": 1},
        "no layers": {"num_layers": 0},
        "lower cutoff": {"cutoff_lower": 0.8},
        "another activation": {"activation": "tanh"},
        "trained basis": {"trainable_rbf": True, "rbf_type": "gauss"},
    },
    "tensornet2": {
        "O(3)": {"q_dim": 3},
        "SO(3)": {"q_dim": 3, "equivariance_invariance_group": "SO(3)"},
        "odd channels, one layer": {"q_dim": 3, "embedding_dimension": 10, "num_layers": 1},
        "no layers": {"q_dim": 3, "num_layers": 0},
        "lower cutoff": {"q_dim": 3, "cutoff_lower": 0.8},
        "another activation": {"q_dim": 3, "activation": "tanh"},
        "repulsion": {"q_dim": 3, "repulsion": True},
        "no charges": {"q_dim": 0},
        "Coulomb": {
            "q_dim": 3,
            "output_model": "ScalarPlusWeightedCoulomb",
            "q_weights": [1.0, 0.5, 0.25],
            "coulomb_cutoff": 5.0,
        },
    },
    "transformer": TRANSFORMER,
    "equivariant-transformer": {
        **TRANSFORMER,
        "three layers, all fades": {**ONE, "num_layers": 3, "vector_cutoff": True},
    },
}
#: The layers of TensorNet2 do not read from the grid what goes into their networks.
TOLERANCE = {"tensornet2": 1e-8}
CASES = [
    pytest.param(name, options, id=f"{name}, {case}") for name in OPTIONS for case, options in OPTIONS[name].items()
]
UNKNOWN = [
    ("graph-network", {"embedding_dimension": 10}),
    ("tensornet", {"embedding_dimension": 2}),
    ("graph-network", {"aggr": "mean", "embedding_dimension": 16}),
    ("transformer", {"embedding_dimension": 24, "num_heads": 2}),
    ("equivariant-transformer", {"embedding_dimension": 16, "num_heads": 8}),
    ("equivariant-transformer", {**ONE, "attn_activation": "tanh"}),
]
pytestmark = pytest.mark.filterwarnings("ignore:The transformer is deprecated")


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
            repeat = Recording.backward
            patch.setattr(Recording, "backward", lambda *args: calls.append(1) or repeat(*args))
        else:
            patch.setattr(TapedRepresentation, "_call", lambda *args: None)
            patch.setattr(TapedRepresentation, "direct", lambda *args: None)
        z, pos, batch, box, q = systems
        q = q if "charge" in model.representation_model.reads else None
        found = model(z, pos, batch, box=box, q=q, **options)._asdict()
        found = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        if model.training:
            loss = sum((torch.arange(x.numel()).view_as(x).cos() * x).sum() for x in found.values())
            (loss + found["forces"].square().sum()).backward()
            found |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert bool(calls) is taped
    return {name: value.detach() for name, value in found.items()}


def assert_same(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, **options: bool) -> None:
    tolerance = TOLERANCE.get(model.hyper_parameters.get("model", ""), 1e-10)
    ours, theirs = (ask(model, systems, monkeypatch, taped=taped, **options) for taped in (True, False))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        scale = max(float(theirs[name].abs().max()), 0.1) if value.numel() else 0.1  # there may be no charges
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


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
    monkeypatch.setattr(loops.blocks, "CHUNKS_PER_THREAD", many)
    monkeypatch.setattr(loops.blocks, "PAIRS_PER_CHUNK", 20)
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


@pytest.mark.parametrize("name", daily(OPTIONS, "tensornet", "equivariant-transformer"))
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
            used = [weight for key, weight in model.named_parameters() if "charge_predicts.1" not in key]
            weights = torch.autograd.grad(energy + slope.square().sum(), used)
            results.append((slope.detach(), curvature, *weights))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


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


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_memory_of_systems_that_do_not_come_again_is_released(name: str, repeats: bool, monkeypatch) -> None:
    """Repeated evaluations have memory of their own, so that all of it may go."""
    if not repeats:
        monkeypatch.setattr("torchmdnet.models.taped.SMALL", -1)
    model = tiny_model(name, **ONE)
    z, pos, batch, box, _ = SYSTEMS["cell"]
    workspace = model.representation_model._workspace
    for number in range(2, 9):
        model(z[:number], pos[:number], batch[:number], box=box)

    def held() -> int:
        return sum(len(shelf.free) * shelf.size for shelf in workspace.shelves.values())

    model(z, pos, batch, box=box)
    many = held()
    for _ in range(40):
        model(z, pos, batch, box=box)
    assert held() < many
    assert repeats or held() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_two_evaluations_at_once_do_not_share_memory(name: str) -> None:
    model = tiny_model(name, derivative=False, **ONE)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    first, second = pos.clone().requires_grad_(), (1.1 * pos).requires_grad_()
    both = model(z, first, batch).energy.sum(), model(z, second, batch).energy.sum()
    together = [torch.autograd.grad(energy, x)[0] for energy, x in zip(both, (first, second), strict=True)]
    for x, expected in zip((first, second), together, strict=True):
        alone = torch.autograd.grad(model(z, x, batch).energy.sum(), x)[0]
        torch.testing.assert_close(alone, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_memory_returns_although_an_energy_is_kept(name: str, training: bool) -> None:
    """Without the help of the garbage collector, which does not know how much hangs on a tape."""
    model = tiny_model(name, **ONE).train(training)
    z, pos, batch, box, _ = SYSTEMS["cell"]
    workspace, counts = model.representation_model._workspace, []
    gc.disable()
    try:
        kept = []
        for _ in range(5):
            energy, forces = model(z, pos, batch, box=box)
            if model.training:
                forces.square().sum().backward()
            kept.append(energy.detach())
            del energy, forces
            counts.append(sum(len(shelf.free) for shelf in workspace.shelves.values()))
    finally:
        gc.enable()
    assert counts[1] == counts[-1] > 0


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_gradients_take_the_place_of_tensors_that_were_read(num_layers: int) -> None:
    """The backward pass, and evaluations that follow, need no more memory than the values and a few gradients."""
    model = tiny_model("tensornet", num_layers=num_layers, embedding_dimension=40)
    z, pos, batch, _, _ = SYSTEMS["molecules"]
    model(z, pos, batch)
    model(z, pos, batch)
    places = model.representation_model._workspace._places[torch.float64]
    tensors = places[len(z), 9, 40][0].free
    assert len({tensor.ctypes.data for tensor in tensors}) <= 6 + 4 * num_layers


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_weights_are_the_slope_of_the_loss(name: str) -> None:
    """Against finite differences, which do not depend on how it is done."""
    model = tiny_model(name).train()
    set_radial_mode(model, "exact")
    z, pos, batch, box, _ = SYSTEMS["cell"]

    def loss() -> torch.Tensor:
        energy, forces = model(z, pos, batch, box=box)
        return energy.square().mean() + forces.square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for key, weight in model.representation_model.named_parameters():
        if "charge_predicts.1" in key:  # of the last layer, which nothing reads
            continue
        step = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(step, alpha=sign * 1e-5)
            values.append(loss().item())
            with torch.no_grad():
                weight.add_(step, alpha=-sign * 1e-5)
        slope = (values[0] - values[1]) / 2e-5
        assert float((weight.grad * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("name", OPTIONS)
def test_a_second_loss_on_the_same_graph_does_not_use_what_the_first_left(name: str, monkeypatch) -> None:
    z, pos, batch, box, _ = SYSTEMS["cell"]
    results = []
    for taped in (True, False):
        model = tiny_model(name, **ONE).train()
        with monkeypatch.context() as patch:
            if not taped:
                patch.setattr(TapedRepresentation, "_call", lambda *args: None)
            energy, forces = model(z, pos, batch, box=box)
            head = list(model.output_model.parameters())
            forces.square().sum().backward(inputs=head, retain_graph=True)
            energy.sum().backward(retain_graph=True)
            forces.square().sum().backward()
        results.append([weight.grad for weight in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_positions_of_the_caller_still_have_second_derivatives_in_training(name: str, monkeypatch) -> None:
    z, pos, batch, box, _ = SYSTEMS["cell"]
    results = []
    for taped in (True, False):
        model = tiny_model(name, **ONE).train()
        with monkeypatch.context() as patch:
            if not taped:
                patch.setattr(TapedRepresentation, "_call", lambda *args: None)
            x = pos.clone().requires_grad_()
            forces = model(z, x, batch, box=box).forces
            forces.square().sum().backward()
        results.append([x.grad, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("training", [False, True])
def test_networks_on_edges_run_in_blocks_and_again(training: bool, kept: int, systems: Systems, monkeypatch) -> None:
    monkeypatch.setattr(tensornet2, "KEPT", kept)
    monkeypatch.setattr(edge_network, "BLOCK", 40)
    monkeypatch.setattr(edge_network, "SHARED", 40)
    assert_same(tiny_model("tensornet2", q_dim=3).train(training), systems, monkeypatch)


def test_energies_alone_are_the_same(monkeypatch) -> None:
    z, pos, batch, box, _ = SYSTEMS["cell"]
    for name in OPTIONS:
        model = tiny_model(name, **ONE)
        energy = model(z, pos, batch, box=box).energy
        model.derivative = False
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(model(z, pos, batch, box=box).energy, energy, rtol=1e-13, atol=0)


def test_a_charge_that_is_differentiated_takes_the_definitions() -> None:
    z, pos, batch, _, q = SYSTEMS["molecules"]
    assert q is not None
    for name in ("tensornet", "tensornet2"):
        model = tiny_model(name, derivative=False, **({"q_dim": 3} if name == "tensornet2" else {}))
        (slope,) = torch.autograd.grad(
            model(z, pos, batch, q=(given := q.clone().requires_grad_())).energy.sum(), given
        )
        step = torch.tensor([0.0, 1e-4, 0.0], dtype=torch.float64)
        up, down = (model(z, pos, batch, q=(q + sign * step).detach()).energy.sum() for sign in (1, -1))
        torch.testing.assert_close(slope[1], (up - down) / 2e-4, rtol=1e-5, atol=1e-7)


REPLACED = {
    torch.nn.Linear: lambda old: torch.nn.Linear(old.in_features, old.out_features, old.bias is not None).double(),
    torch.nn.Embedding: lambda old: torch.nn.Embedding(old.num_embeddings, old.embedding_dim).double(),
    torch.nn.LayerNorm: lambda old: torch.nn.LayerNorm(old.normalized_shape, eps=0.1).double(),
    torch.nn.SiLU: lambda old: torch.nn.Tanh(),
}


@pytest.mark.parametrize("name", daily(OPTIONS, "tensornet", "graph-network"))
def test_a_module_that_is_replaced_counts_at_once(name: str, monkeypatch) -> None:
    for kind, make in REPLACED.items():
        model = tiny_model(name, **ONE)
        ask(model, SYSTEMS["cell"], monkeypatch, taped=True)
        paths = [path for path, module in model.representation_model.named_modules() if type(module) is kind]
        for path in paths:
            place, _, last = path.rpartition(".")
            parent = model.representation_model.get_submodule(place)
            before = getattr(parent, last)
            setattr(parent, last, make(before).requires_grad_(False))
            z, pos, batch, box, _ = SYSTEMS["cell"]
            ours = model(z, pos, batch, box=box)
            fresh = pickle.loads(pickle.dumps(model))(z, pos, batch, box=box)
            torch.testing.assert_close(ours.forces, fresh.forces, rtol=0, atol=1e-12, msg=path)
            setattr(parent, last, before)


@pytest.mark.parametrize("name", OPTIONS)
def test_parametrized_weights_are_trained(name: str, monkeypatch) -> None:
    model = tiny_model(name, **ONE).train()
    for module in [*model.representation_model.modules()]:
        if type(module) is torch.nn.Linear:
            torch.nn.utils.parametrizations.weight_norm(module)
    assert_same(model, SYSTEMS["cell"], monkeypatch)


@pytest.mark.parametrize("name", OPTIONS)
def test_hooks_of_weights_run_once(name: str, monkeypatch) -> None:
    model = tiny_model(name, **ONE).train()
    before = ask(model, SYSTEMS["cell"], monkeypatch, taped=True)
    for weight in model.parameters():
        weight.register_hook(lambda grad: 3 * grad)
    after = ask(model, SYSTEMS["cell"], monkeypatch, taped=True)
    for key, _ in model.named_parameters():
        if key in before:
            torch.testing.assert_close(after[key], 3 * before[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", OPTIONS)
def test_third_derivatives_are_slopes_of_second(name: str) -> None:
    model = tiny_model(name, derivative=False, **ONE)
    set_radial_mode(model, "exact")
    z, pos, batch, box, _ = SYSTEMS["cell"]
    generator = torch.Generator().manual_seed(0)
    u, v, w = (torch.randn(pos.shape, generator=generator, dtype=pos.dtype) for _ in range(3))

    def second(x: torch.Tensor, *, follow: bool = False) -> torch.Tensor:
        (slope,) = torch.autograd.grad(model(z, x, batch, box=box).energy.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad((slope * u).sum(), x, create_graph=follow)
        return (curvature * v).sum()

    x = pos.clone().requires_grad_()
    (third,) = torch.autograd.grad(second(x, follow=True), x)
    ends = [second((pos + sign * 1e-5 * w).requires_grad_()) for sign in (1, -1)]
    torch.testing.assert_close((third * w).sum(), (ends[0] - ends[1]).detach() / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivatives_of_a_loss_in_the_weights(name: str) -> None:
    model = tiny_model(name, **ONE).train()
    set_radial_mode(model, "exact")
    z, pos, batch, box, _ = SYSTEMS["cell"]
    weights, generator = [*model.parameters()], torch.Generator().manual_seed(0)
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]

    def slope(*, follow: bool = False) -> torch.Tensor:
        energy, forces = model(z, pos, batch, box=box)
        loss = energy.square().sum() + forces.square().sum()
        found = torch.autograd.grad(loss, weights, create_graph=follow, allow_unused=True)
        return sum((g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None)

    found = torch.autograd.grad(slope(follow=True), weights, allow_unused=True)
    ours = sum((g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(direction, alpha=sign * 1e-6)
        ends.append(slope())
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(direction, alpha=-sign * 1e-6)
    torch.testing.assert_close(ours, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_may_be_computed_again_for_its_gradient(name: str) -> None:
    """In training, with ``torch.utils.checkpoint``, which gives what a function saved once only."""
    model = tiny_model(name, derivative=True, embedding_dimension=16, num_heads=2).train()
    systems = SYSTEMS["molecules"]
    z, pos, batch = systems.z, systems.pos, systems.batch

    def found(again: bool) -> list[torch.Tensor]:
        model.zero_grad()
        place = pos.clone().requires_grad_()
        call = lambda where: model(z, where, batch)  # noqa: E731
        energy, forces = checkpoint(call, place, use_reentrant=False) if again else call(place)
        loss = (energy**2).sum() + (forces**2).sum()
        loss.backward()
        return [energy, forces, *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    for new, old in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_in_evaluation_may_be_computed_again_for_its_gradient(name: str) -> None:
    """The first call makes grids and tables, which the repetition finds; they are none of its saved tensors."""
    systems = SYSTEMS["molecules"]

    def found(again: bool) -> list[torch.Tensor]:
        model = tiny_model(name, derivative=False, embedding_dimension=16, num_heads=2).eval()
        q = systems.q if "charge" in model.representation_model.reads else None
        place = systems.pos.clone().requires_grad_()
        call = lambda where: model(systems.z, where, systems.batch, q=q).energy  # noqa: E731
        results = []
        for _ in range(2):  # with tables that this call makes, and with those that it finds
            energy = checkpoint(call, place, use_reentrant=False) if again else call(place)
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(energy.square().sum(), [place, *weights], allow_unused=True)
            results += [energy, *(gradient for gradient in gradients if gradient is not None)]
        assert model.representation_model.radial.tables
        return results

    plain = found(False)
    assert any(gradient.abs().sum() > 0 for gradient in plain[2:])
    for new, old in zip(found(True), plain, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
