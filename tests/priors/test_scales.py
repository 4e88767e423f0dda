"""Priors take their units from what is given, or from what the data set states, and never guess."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.priors import PRIORS
from torchmdnet.priors.scales import elements_of_types, joules_per_energy, metres_per_length


def test_units_of_the_data_set_are_converted() -> None:
    data = SimpleNamespace(length_unit="nm", energy_unit="kcal/mol")
    assert metres_per_length(None, data, "ZBL") == pytest.approx(1e-9)
    assert joules_per_energy(None, data, "ZBL") == pytest.approx(4184 / 6.02214076e23)


def test_scales_of_the_data_set_come_before_its_units_and_given_ones_before_both() -> None:
    data = SimpleNamespace(distance_scale=torch.tensor(5e-11), length_unit="nm", energy_scale=2.0, energy_unit="eV")
    assert metres_per_length(None, data, "ZBL") == pytest.approx(5e-11)
    assert metres_per_length(1e-10, data, "ZBL") == 1e-10
    assert joules_per_energy(None, data, "ZBL") == 2.0


def test_a_unit_nobody_states_is_asked_for() -> None:
    for data in (None, SimpleNamespace(length_unit=None)):
        with pytest.raises(ConfigError, match=r"D2: distance_scale is not given .* 1e-10 for Å"):
            metres_per_length(None, data, "D2")
        with pytest.raises(ConfigError, match=r"D2: energy_scale is not given .* for eV"):
            joules_per_energy(None, data, "D2")


def test_types_are_atomic_numbers_unless_somebody_says_otherwise() -> None:
    assert elements_of_types(None, None)[[1, 8, 118]].tolist() == [1, 8, 118]
    assert elements_of_types(None, SimpleNamespace(atomic_number=torch.tensor([6, 1]))).tolist() == [6, 1]
    stored = [torch.tensor(0), torch.tensor(8)]  # as older files hold them
    assert elements_of_types(stored, None).tolist() == [0, 8]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ZBL", {"cutoff_distance": 3.5}),
        ("D2", {"cutoff_distance": 7.0}),
        ("D2", {"cutoff_distance": 7.0, "periodic": False}),
        ("Coulomb", {"lower_switch_distance": 0.1, "upper_switch_distance": 0.4}),
        ("Coulomb", {"lower_switch_distance": 0.1, "upper_switch_distance": 0.4, "box_vecs": torch.eye(3) * 9}),
    ],
)
def test_what_a_checkpoint_keeps_rebuilds_the_prior(name: str, options: dict) -> None:
    data = SimpleNamespace(length_unit="Å", energy_unit="eV", atomic_number=torch.arange(20))
    prior = PRIORS[name](**options, dataset=data)
    kept = prior.get_init_args()
    assert not any(isinstance(value, torch.Tensor) for value in kept.values())
    again = PRIORS[name](**kept)
    assert again.get_init_args() == kept
    again.load_state_dict(prior.state_dict())
    for key in ("cutoff_distance", "max_num_neighbors"):
        assert getattr(again, key, None) == getattr(prior, key, None)
