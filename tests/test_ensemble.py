"""Ensembles: means and spreads of everything, one graph for all, and one call where systems are small."""

from __future__ import annotations

import pytest
import torch

from torchmdnet import stacking
from torchmdnet.ensemble import Ensemble, EnsembleOutputs, EnsemblePrediction
from torchmdnet.models import ARCHITECTURES
from torchmdnet.potential import Outputs, Prediction
from torchmdnet.testing import cell_of_atoms, mixed_boxes, small_molecules, tiny_model

SYSTEMS = {"molecules": small_molecules(charges=True), "cell": cell_of_atoms(), "mixed": mixed_boxes()}
OPTIONS: dict[str, dict] = {name: {"model": name} for name in ARCHITECTURES} | {
    "tensornet, SO(3)": {"model": "tensornet", "equivariance_invariance_group": "SO(3)"},
    "tensornet2, charges": {
        "model": "tensornet2",
        "output_model": "ScalarPlusWeightedCoulomb",
        "q_weights": [1.0, 2.0, 1.0],
        "coulomb_cutoff": 5.0,
    },
    "tensornet, prior": {
        "model": "tensornet",
        "prior_model": {"ZBL": {"cutoff_distance": 3.0, "distance_scale": 1e-10, "energy_scale": 1.6e-19}},
    },
}


def members(count: int = 3, **options) -> list:
    return [tiny_model(seed=seed, properties={"dipole": None, "charges": None}, **options) for seed in range(count)]


def call(systems, **flags):
    periodic = bool(systems.is_periodic.any())
    return (systems.z, systems.pos, systems.batch, systems.box, systems.q), {"stress": periodic, **flags}


@pytest.mark.parametrize("limit", [0, 10**9], ids=["in turn", "batched"])
@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_members_say_together_what_they_say_alone(options, systems, limit, monkeypatch) -> None:
    monkeypatch.setitem(stacking.BATCHED_EDGES, "cpu", limit)
    models = members(**options)
    arguments, flags = call(systems, properties=True)
    alone = [model(*arguments, **flags) for model in models]
    found = Ensemble(models, return_std=True)(*arguments, **flags)
    assert type(found) is EnsembleOutputs
    for name in ("energy", "forces", "stress"):
        if alone[0].stress is None and name == "stress":
            assert found.stress is found.stress_std is None
            continue
        values = torch.stack([getattr(one, name) for one in alone]).detach()
        close = {"rtol": 1e-9, "atol": 1e-10, "equal_nan": True}
        torch.testing.assert_close(getattr(found, name), values.mean(dim=0), **close)
        torch.testing.assert_close(getattr(found, f"{name}_std"), values.std(dim=0), **close)
    for name in ("dipole", "charges"):
        values = torch.stack([one.properties[name] for one in alone]).detach()
        torch.testing.assert_close(found.properties[name], values.mean(dim=0), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.properties_std[name], values.std(dim=0), rtol=1e-9, atol=1e-10)


def test_edges_are_searched_once(monkeypatch) -> None:
    systems, counted = SYSTEMS["molecules"], []
    arguments, _ = call(systems)
    models = members(4, model="tensornet")
    search = type(models[0].representation_model).graph
    monkeypatch.setattr(
        type(models[0].representation_model), "graph", lambda *a, **k: (counted.append(1), search(*a, **k))[1]
    )
    Ensemble(models)(*arguments)
    assert len(counted) == 1


def test_the_flags_decide_what_comes_back() -> None:
    arguments, _ = call(SYSTEMS["cell"])
    for std, two, more in ((False, Prediction, Outputs), (True, EnsemblePrediction, EnsembleOutputs)):
        ensemble = Ensemble(members(2, model="graph-network"), return_std=std)
        assert type(ensemble(*arguments)) is two
        assert type(ensemble(*arguments, stress=True)) is more
        found = ensemble(*arguments, properties=True)
        assert type(found) is more
        assert found.stress is None


def test_new_weights_are_noticed() -> None:
    arguments, _ = call(SYSTEMS["molecules"])
    models = members(3, model="tensornet")
    ensemble = Ensemble(models)
    before = ensemble(*arguments).energy
    for step in ("in place", "loaded"):
        if step == "in place":
            with torch.no_grad():
                models[1].representation_model.linear.bias.add_(0.3)
        else:
            models[2].load_state_dict(
                tiny_model("tensornet", seed=9, properties={"dipole": None, "charges": None}).state_dict()
            )
        after = ensemble(*arguments).energy
        assert not torch.allclose(after, before, rtol=1e-6)
        torch.testing.assert_close(after, torch.stack([m(*arguments).energy for m in models]).mean(dim=0).detach())
        before = after


@pytest.mark.parametrize("other", [{"activation": "tanh"}, {"cutoff_upper": 3.5}, {"model": "graph-network"}])
def test_members_may_differ(other) -> None:
    arguments, flags = call(SYSTEMS["cell"], properties=True)
    models = [*members(2, model="tensornet"), *members(1, **{"model": "tensornet", **other})]
    found = Ensemble(models)(*arguments, **flags)
    alone = torch.stack([model(*arguments).energy for model in models]).detach()
    torch.testing.assert_close(found.energy.detach(), alone.mean(dim=0), rtol=1e-9, atol=1e-10)


def test_a_stored_box_is_shared() -> None:
    cell = SYSTEMS["cell"]
    models = members(2, model="tensornet", box_vecs=cell.box.tolist())
    arguments, flags = call(cell)
    inside = Ensemble(models)(cell.z, cell.pos, cell.batch, stress=True)
    torch.testing.assert_close(inside.stress, Ensemble(models)(*arguments, **flags).stress)


def test_energies_alone_can_be_differentiated() -> None:
    systems = SYSTEMS["molecules"]
    models = members(2, model="tensornet", derivative=False)
    pos = systems.pos.clone().requires_grad_()
    energy, forces = Ensemble(models)(systems.z, pos, systems.batch, q=systems.q)
    assert forces.shape == (0,)
    (slope,) = torch.autograd.grad(energy.sum(), pos)
    for model in models:
        model.derivative = True
    torch.testing.assert_close(-slope, Ensemble(models)(systems.z, pos, systems.batch, q=systems.q).forces)


def test_members_that_predict_other_properties_are_refused() -> None:
    models = [tiny_model("tensornet"), *members(1, model="tensornet")]
    arguments, _ = call(SYSTEMS["cell"])
    with pytest.raises(
        ValueError, match=r"the members of the ensemble predict different ones \(none; charges, dipole\)"
    ):
        Ensemble(models)(*arguments, properties=True)


def test_training_goes_through_members_one_by_one() -> None:
    models = members(2, model="tensornet")
    ensemble = Ensemble(models).train()
    arguments, flags = call(SYSTEMS["cell"], properties=True)
    found = ensemble(*arguments, **flags)
    (found.energy.sum() + found.forces.square().sum() + found.stress.square().sum()).backward()
    assert all(parameter.grad is not None for model in models for parameter in model.representation_model.parameters())
