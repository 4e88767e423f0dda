"""The Coulomb head adds the energy of the predicted charges, pair by pair, in any box it is given."""

from __future__ import annotations

import math

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.errors import ConfigError
from torchmdnet.graph import bare_graph
from torchmdnet.heads.coulomb import ScalarPlusWeightedCoulomb
from torchmdnet.models.base import Features
from torchmdnet.testing import CHECKS, cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

OPTIONS: dict = {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 0.5, [0.25, 2.0]]}
K = 27.211386024367243 * 0.5291772105638411


def head(**options) -> ScalarPlusWeightedCoulomb:
    torch.manual_seed(0)
    fixed = {"q_dim": 2, "num_layers": 2, "q_weights": OPTIONS["q_weights"], "dtype": torch.float64}
    return ScalarPlusWeightedCoulomb(8, **{**fixed, **options})


def damping(r: float) -> float:
    t = r / 4.6
    return 1 - math.exp(1 - 1 / (1 - t * t)) if t < 1 else 1.0


@pytest.mark.parametrize("cutoff", [None, 3.0])
def test_the_energy_is_the_sum_over_pairs(cutoff: float | None) -> None:
    systems = small_molecules()
    made = head(coulomb_cutoff=cutoff)
    x = torch.randn(10, 8 + 6, dtype=torch.float64)
    weights = torch.tensor([1, 1, 0.5, 0.5, 0.25, 2], dtype=torch.float64)
    expected = made.output_network(x[:, :8]).detach().clone()
    for i in range(10):
        for j in range(10):
            r = (systems.pos[i] - systems.pos[j]).norm().item()
            if i == j or systems.batch[i] != systems.batch[j] or (cutoff and r >= cutoff):
                continue
            g = 1 / r
            if cutoff:
                eps = 78.3
                g += r**2 / cutoff**3 * (eps - 1) / (2 * eps + 1) - 3 * eps / (2 * eps + 1) / cutoff
            product = (weights * x[i, 8:] * x[j, 8:]).sum() / weights.sum()
            expected[i] += 0.5 * K * damping(r) * g * product
    result = made.per_atom(Features(x), bare_graph(systems.z, systems.pos, systems.batch))
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_the_reaction_field_vanishes_at_the_cutoff() -> None:
    r = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    g = head(coulomb_cutoff=5.0).radial(r)
    (slope,) = torch.autograd.grad(g, r)
    assert abs(g.item()) < 1e-12
    assert slope.item() == pytest.approx(-3 / (2 * 78.3 + 1) / 5.0**2)  # nearly: a conductor's field would end flat


#: Charges act beyond every cutoff of the architecture, so there are no isolated atoms and no end of the energy there.
LONG_RANGE = [name for name in CHECKS if name not in ("energy_is_smooth_through_the_cutoff", "isolated_atoms_are_fine")]


@pytest.mark.parametrize("name", [name for name in LONG_RANGE if name != "forces_are_the_negative_gradient"])
def test_with_a_cutoff_it_meets_the_contract_in_a_cell(name: str) -> None:
    CHECKS[name](tiny_model("tensornet2", **OPTIONS, coulomb_cutoff=5.0), cell_of_atoms())


@pytest.mark.parametrize("name", LONG_RANGE)
def test_with_all_pairs_it_meets_the_contract(name: str) -> None:
    CHECKS[name](tiny_model("tensornet2", **OPTIONS), small_molecules(charges=True))


def test_a_stored_box_acts_like_one_given_in_the_call() -> None:
    systems = cell_of_atoms()
    assert systems.box is not None
    given, _ = tiny_model("tensornet2", **OPTIONS, coulomb_cutoff=6.0)(systems.z, systems.pos, box=systems.box)
    stored = tiny_model("tensornet2", **OPTIONS, coulomb_cutoff=6.0, box_vecs=systems.box.tolist())
    torch.testing.assert_close(stored(systems.z, systems.pos)[0], given, rtol=1e-12, atol=1e-12)


def test_all_pairs_in_a_box_are_refused() -> None:
    systems = cell_of_atoms()
    with pytest.raises(ValueError, match="Set coulomb_cutoff"):
        tiny_model("tensornet2", **OPTIONS)(systems.z, systems.pos, box=systems.box)
    with pytest.raises(ConfigError, match="coulomb_cutoff"):
        tiny_model("tensornet2", **OPTIONS, box_vecs=(9 * torch.eye(3)).tolist())


def test_a_model_for_all_pairs_can_be_loaded_with_a_cutoff(tmp_path) -> None:
    model, systems = tiny_model("tensornet2", **OPTIONS), cell_of_atoms()
    options = {**TINY, **OPTIONS, "model": "tensornet2"}
    path = tmp_path / "model.ckpt"
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": options, "state_dict": state}, path)
    expected, _ = tiny_model("tensornet2", **OPTIONS, coulomb_cutoff=5.0)(systems.z, systems.pos, box=systems.box)
    loaded = load_model(path, coulomb_cutoff=5.0)
    torch.testing.assert_close(loaded(systems.z, systems.pos, box=systems.box)[0], expected)


def test_the_permittivity_is_an_option() -> None:
    systems = cell_of_atoms()
    energies = [
        tiny_model("tensornet2", **OPTIONS, coulomb_cutoff=6.0, **more)(systems.z, systems.pos, box=systems.box)[0]
        for more in ({}, {"coulomb_epsilon_solvent": 78.3}, {"coulomb_epsilon_solvent": 2.0})
    ]
    torch.testing.assert_close(energies[1], energies[0])
    assert not torch.allclose(energies[2], energies[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_weights": [1.0, 1.0]}, "q_weights: 2 entries given for num_layers=2"),
        ({"q_weights": [1.0, 1.0, [1.0, 2.0, 3.0]]}, "q_weights: entry 2 has shape"),
        ({"q_weights": [1.0, -1.0, 0.0]}, "add up to zero"),
        ({"q_dim": 0}, "q_dim: .* needs charge channels"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head(**options)


def test_features_without_charges_are_refused() -> None:
    systems = small_molecules()
    graph = bare_graph(systems.z, systems.pos, systems.batch)
    with pytest.raises(ValueError, match="Use model: tensornet2"):
        head().per_atom(Features(torch.randn(10, 8, dtype=torch.float64)), graph)


def test_a_model_without_charges_is_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="needs charges, which model 'tensornet' does not predict"):
        tiny_model("tensornet", **OPTIONS)


def test_an_unknown_search_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ValueError, match="strategy: 'shared'"):
        head(coulomb_cutoff=4.0, coulomb_neighbor_strategy="shared")
