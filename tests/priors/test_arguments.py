"""Arguments of priors that no data make right are refused by name, before any are read."""

import re

import pytest

from torchmdnet.config import resolve
from torchmdnet.errors import ConfigError
from torchmdnet.priors.named import check_priors, create_prior_models

BAD = [float("nan"), float("inf"), -1, 0, "abc", True, 1e308]


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("name", ["ZBL", "D2", "D3"])
def test_ranges_are_finite_and_positive(name, value):
    own = {"functional": "pbe"} if name == "D3" else {}
    with pytest.raises(ConfigError, match=rf"{name}: cutoff_distance={re.escape(repr(value))} is not valid"):
        check_priors({name: {"cutoff_distance": value, **own}})


@pytest.mark.parametrize("value", [*BAD, 1e-300], ids=str)
@pytest.mark.parametrize("scale", ["distance_scale", "energy_scale"])
@pytest.mark.parametrize("name", ["ZBL", "D2", "Coulomb"])
def test_units_are_finite_and_positive(name, scale, value):
    own = {"lower_switch_distance": 0.1, "upper_switch_distance": 0.3} if name == "Coulomb" else {"cutoff_distance": 5}
    with pytest.raises(ConfigError, match=rf"{name}: {scale}={re.escape(repr(value))} is not valid"):
        check_priors({name: {scale: value, **own}})


@pytest.mark.parametrize("name", ["lower_switch_distance", "upper_switch_distance", "cutoff_distance", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), -1, "abc"], ids=str)
def test_the_distances_of_charges_are_checked(name, value):
    good = {"lower_switch_distance": 0.1, "upper_switch_distance": 0.3, "cutoff_distance": 9, "lattice_sum": "ewald"}
    check_priors({"Coulomb": good})
    with pytest.raises(ConfigError, match=f"Coulomb: .*{name}={re.escape(repr(value))}"):
        check_priors({"Coulomb": {**good, name: value}})


@pytest.mark.parametrize("value", [-1, 0, 10**12, 1.5, "abc", float("nan"), True], ids=str)
@pytest.mark.parametrize("name", ["Atomref", "LearnableAtomref"])
def test_tables_of_elements_have_a_size(name, value):
    with pytest.raises(ConfigError, match=rf"{name}: max_z={re.escape(repr(value))} is not valid"):
        check_priors({name: {"max_z": value}})


@pytest.mark.parametrize("parameter", ["s6", "s8", "a1", "a2"])
def test_the_parameters_of_dispersion_are_numbers(parameter):
    with pytest.raises(ConfigError, match=f"D3: {parameter}=nan is not valid. It takes a finite number"):
        check_priors({"D3": {"functional": "pbe", parameter: float("nan")}})


@pytest.mark.parametrize("value", ["x", [1, "x"], [1, 500], [-1], 3, [float("nan")]], ids=str)
def test_types_of_atoms_are_elements(value):
    with pytest.raises(ConfigError, match=r"atomic_number=.* is not valid. It takes the atomic number of each type"):
        check_priors({"ZBL": {"cutoff_distance": 5, "atomic_number": value}})


def test_missing_and_unknown_arguments_are_told_in_words():
    with pytest.raises(ConfigError, match=re.escape('D2 needs cutoff_distance: {"D2": {"cutoff_distance": ...}}')):
        create_prior_models({"prior_model": "D2"})
    with pytest.raises(ConfigError, match=r"ZBL has no argument 'cutoff'. Did you mean 'cutoff_distance'"):
        create_prior_models({"prior_model": {"ZBL": {"cutoff": 3}}})
    with pytest.raises(ConfigError, match="ZBL has no argument 'dataset'"):
        create_prior_models({"prior_model": {"ZBL": {"dataset": 3}}})


def test_a_run_with_a_wrong_prior_is_refused_before_data_are_read():
    with pytest.raises(ConfigError, match="--prior-model: prior_model: ZBL: cutoff_distance=nan is not valid"):
        resolve(["--dataset", "TinyQM", "--prior-model", '{"ZBL": {"cutoff_distance": .nan}}'])
    resolve(["--dataset", "TinyQM", "--prior-model", "Atomref", '{"ZBL": {"cutoff_distance": 4}}'])
