"""Recorded and compiled potentials give the numbers, and the gradients of weights, of the plain ones."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from daily import daily

from torchmdnet.compiled import CompiledPotential
from torchmdnet.graph import Inputs
from torchmdnet.models import ARCHITECTURES
from torchmdnet.recording import Recorded, needs_compiler, record
from torchmdnet.testing import cell_of_atoms, mixed_boxes, small_molecules, tiny_model

#: A prior that looks for pairs itself.
ZBL_OPTIONS = {
    "cutoff_distance": 3.0,
    "atomic_number": list(range(20)),
    "distance_scale": 1e-10,
    "energy_scale": 1.6e-19,
}
#: Odd and even numbers of atoms, one system and several, open and periodic, with charges and without.
MANY = {
    "molecules": small_molecules(charges=True),
    "mixed": mixed_boxes(),
    "cell of 7": cell_of_atoms(7),
    "cell of 5": cell_of_atoms(5, 4.2),
    "water": small_molecules(charges=True).system(0),
}
NAMES = sorted(set(ARCHITECTURES))


def asked(model, systems, *, training: bool) -> list[torch.Tensor]:
    """Energy, forces and virial, and in training the gradients of a loss of all three."""
    inputs = Inputs(*systems, num_systems=systems.num_systems)
    with torch.set_grad_enabled(training):
        found = model.evaluate(inputs, virial=True)
    results = [found.energy, found.forces, found.virial]
    if training:
        loss = sum(x.square().sum() for x in results)
        weights = [x for x in model.parameters() if x.requires_grad]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        results += [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    return [x.detach() for x in results]


def expect_same(model, quick, systems, *, training: bool) -> None:
    model.train(training)
    pairs = zip(asked(quick, systems, training=training), asked(model, systems, training=training), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * max(1.0, float(expected.abs().max())))
    assert not quick.is_given_up


def check_all(name: str, systems: list[str], **options) -> CompiledPotential:
    model = tiny_model(name)
    quick = CompiledPotential(model, **options)
    for training in (True, False):
        for which in systems:
            expect_same(model, quick, MANY[which], training=training)
    return quick


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_gives_the_same_gradients(backend: str) -> None:
    """One program serves batches of all sizes, odd ones included."""
    model = tiny_model("graph-network", num_layers=1, neighbor_embedding=False, activation="tanh", rbf_type="gauss")
    quick = CompiledPotential(model, backend=backend)
    molecules = MANY["molecules"]
    kept = molecules.batch < 2  # nine atoms
    fewer = molecules._replace(
        z=molecules.z[kept], pos=molecules.pos[kept], batch=molecules.batch[kept], q=molecules.q[:2]
    )
    for systems in (molecules, fewer):
        expect_same(model, quick, systems, training=True)
    assert len(quick.programs) == 1


@pytest.mark.parametrize("radial", daily(["exact", "grid"], "grid"))
def test_an_evaluation_follows_weights_that_change_or_are_replaced(radial: str) -> None:
    model = tiny_model("graph-network", num_layers=1, radial=radial)
    quick = CompiledPotential(model, backend="eager")
    water = small_molecules().system(0)
    expect_same(model, quick, water, training=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    expect_same(model, quick, water, training=False)
    smaller = {name: 0.9 * x if x.is_floating_point() else x for name, x in model.state_dict().items()}
    model.load_state_dict(smaller, assign=True)
    expect_same(model, quick, water, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("operators", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_trains_through_a_recording(name: str, operators: bool) -> None:
    check_all(name, list(MANY), backend="aot_eager", operators=operators)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_compiled_to_the_same_numbers(name: str) -> None:
    quick = check_all(name, ["mixed", "molecules"])
    assert len(quick.programs) == 2  # one to train, one to evaluate


@pytest.mark.slow
def test_priors_that_look_for_pairs_are_added_to_what_is_compiled() -> None:
    model = tiny_model("graph-network", prior_model=[{"ZBL": ZBL_OPTIONS}])
    quick = CompiledPotential(model, backend="aot_eager")
    for which in ("molecules", "cell of 7"):
        expect_same(model, quick, MANY[which], training=False)
        expect_same(model, quick, MANY[which], training=True)


def test_what_cannot_be_compiled_runs_plainly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("graph-network", reduce_op="mean", prior_model=[{"ZBL": ZBL_OPTIONS}])
    quick = CompiledPotential(model)
    systems = small_molecules()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = asked(quick, systems, training=False)
    assert quick.is_given_up
    assert caplog.text.count("compile: failed") == 1
    torch.testing.assert_close(found, asked(model, systems, training=False))


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler was found. Install g\+\+"):
        needs_compiler("export")


def test_a_function_that_depends_on_a_size_is_refused() -> None:
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.shape[0] == 11 else 1)

    with pytest.raises(RuntimeError, match="would only hold for sizes"):
        record(odd, [Recorded(torch.ones(11), {0: "atoms"})])


def test_the_gradients_of_a_recording_pass_through_results_that_were_kept() -> None:
    """The derivative of tanh is made from its value, that of exp is its value."""

    def slope(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            value = (weights["w"] * x).tanh().exp().sum()
            return torch.autograd.grad(value, x, create_graph=True)[0]

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    recorded = record(slope, [Recorded(x, {0: "atoms"})], {"w": weight})
    found, expected = (
        torch.autograd.grad(function({"w": weight}, x).square().sum(), weight)[0] for function in (recorded, slope)
    )
    torch.testing.assert_close(found, expected)


def test_a_recording_holds_for_other_sizes() -> None:
    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((x**3).sum(), x)[0]

    recorded = record(slope, [Recorded(torch.ones(11), {0: "atoms"})])
    x = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(recorded(x), 3 * x**2)


def test_the_training_option_compiles_steps_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmdnet.training.lightning import LNNP

    options = {**tiny_model("graph-network").hyper_parameters, "derivative": True}
    from torchmdnet.testing.tiny import TINY

    module = LNNP({**TINY, **options, "model": "graph-network", "compile": True})
    module.compiled = [CompiledPotential(module.model, backend="eager")]
    plain = LNNP({**TINY, **options, "model": "graph-network"})
    plain.load_state_dict(module.state_dict())  # the same names: nothing is saved twice
    systems = small_molecules()
    call = SimpleNamespace(z=systems.z, pos=systems.pos, batch=systems.batch)
    for training in (True, False):
        found, expected = (
            each.train(training)(call.z, call.pos.clone(), call.batch, num_systems=3) for each in (module, plain)
        )
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-10, atol=1e-10)
    assert {kind.training for kind in module.compiled[0].programs} == {True}
