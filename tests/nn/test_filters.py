"""Filters read from a grid are the filters themselves, to the stated tolerance, and know when a weight has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from daily import daily

from torchmdnet.errors import ConfigError
from torchmdnet.nn import filters
from torchmdnet.nn.filters import RadialEngine
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing import small_molecules, tiny_model

MOLECULES = small_molecules()


def ask(model: TorchMD_Net, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    model.representation_model.radial.mode = mode
    energy, forces = model(MOLECULES.z, MOLECULES.pos.to(model.dtype), MOLECULES.batch)
    return energy, forces


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"rbf_type": "gauss"}, {"cutoff_lower": 0.8}, {"trainable_rbf": True}])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["tensornet", "equivariant-transformer", "transformer", "graph-network"])
def test_energies_and_forces_do_not_depend_on_the_grid(name: str, options: dict, training: bool) -> None:
    model = tiny_model(name, **options).train(training)
    (energy, forces), (exact_energy, exact_forces) = ask(model, "grid"), ask(model, "exact")
    torch.testing.assert_close(energy, exact_energy, rtol=0, atol=1e-9)
    torch.testing.assert_close(forces, exact_forces, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", daily(["tensornet", "equivariant-transformer", "graph-network"], "tensornet"))
def test_gradients_of_weights_do_not_depend_on_the_grid(name: str) -> None:
    model = tiny_model(name, trainable_rbf=True).train()
    found = {}
    for mode in ("grid", "exact"):
        energy, forces = ask(model, mode)
        model.zero_grad()
        (energy.square().sum() + forces.square().sum()).backward()
        found[mode] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found["grid"].keys() == found["exact"].keys()
    for name, gradient in found["exact"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found["grid"][name], gradient, rtol=0, atol=1e-8 * (1 + scale), msg=name)


@pytest.mark.parametrize("name", ["tensornet", "equivariant-transformer", "graph-network"])
def test_a_kept_table_still_passes_gradients_to_the_weights(name: str) -> None:
    """In evaluation mode the table is made once; whoever asks for gradients of weights gets them all the same."""
    model = tiny_model(name, derivative=False)
    gradients = {}
    for mode in ("grid", "exact"):
        ask(model, mode)  # the table is at hand
        model.zero_grad()
        ask(model, mode)[0].sum().backward()
        gradients[mode] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["grid"].keys() == gradients["exact"].keys()
    for name, gradient in gradients["exact"].items():
        torch.testing.assert_close(gradients["grid"][name], gradient, rtol=0, atol=1e-8)


def test_tables_are_kept_until_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(filters, "_tables", lambda *args, build=filters._tables: made.append(1) or build(*args))
    model = tiny_model("tensornet")
    for _ in range(3):
        before = ask(model, "grid")[0]
    assert len(made) == 1
    with torch.no_grad():
        model.representation_model.layers[0].linears_scalar[0].weight.mul_(1.5)
    after = ask(model, "grid")[0]
    assert len(made) == 2
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, ask(model, "exact")[0], rtol=0, atol=1e-9)
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(ask(model, "grid")[0], ask(model, "exact")[0], rtol=0, atol=1e-9)
    model.float()
    assert ask(model, "grid")[0].dtype == torch.float32


def test_the_grid_is_as_fine_as_the_precision_asks() -> None:
    model = tiny_model("tensornet")
    sizes = {}
    for dtype in (torch.float32, torch.float64):
        ask(model.to(dtype), "grid")
        engine = model.representation_model.radial
        assert engine.error is not None
        assert engine.error <= filters.TOLERANCES[dtype]
        sizes[dtype] = engine.spline.num_cells
    assert sizes[torch.float32] < sizes[torch.float64]


def test_what_no_grid_resolves_is_evaluated_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "SIZES", (4, 8))
    model = tiny_model("tensornet")
    energy, _ = ask(model, "auto")
    assert model.representation_model.radial.spline is None
    torch.testing.assert_close(energy, ask(model, "exact")[0], rtol=0, atol=1e-13)


def test_in_training_few_pairs_are_not_worth_a_grid() -> None:
    model = tiny_model("tensornet").train()
    ask(model, "auto")
    assert model.representation_model.radial.spline is None


def test_copies_and_pickles_start_without_tables() -> None:
    model = tiny_model("tensornet")
    expected = ask(model, "grid")[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.representation_model.radial.mode == "grid"
        assert not other.representation_model.radial.tables
        torch.testing.assert_close(ask(other, "grid")[0], expected, rtol=0, atol=0)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"radial: 'fast' is not available. Choose from auto, exact, grid"):
        RadialEngine("fast")  # type: ignore[arg-type]


def test_the_configuration_chooses_how_filters_are_evaluated() -> None:
    assert tiny_model("tensornet", radial="exact").representation_model.radial.mode == "exact"
    assert tiny_model("tensornet").representation_model.radial.mode == "auto"
    with pytest.raises(ConfigError, match="radial: 'fast' is not available"):
        tiny_model("tensornet", radial="fast")
