"""Energies, forces, stress and gradients of weights are the frozen ones, whatever computes them."""

from __future__ import annotations

from collections.abc import Iterator

import gates
import numpy as np
import pytest
import torch

from torchmdnet.models import ARCHITECTURES

FROZEN = dict(np.load(gates.FROZEN))
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def systems(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """What is computed, with one thread or with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield tuple(gates.SYSTEMS) if request.param == 1 else ("ions", "crystal")
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", gates.MODES)
@pytest.mark.parametrize("name", gates.MODELS)
def test_numbers_in_double_precision_are_the_frozen_ones(name: str, mode: str, systems: tuple[str, ...]) -> None:
    found = gates.deviations(gates.all_numbers(name, mode, torch.float64, systems), FROZEN)
    assert max(found.values()) <= gates.TOLERANCE, found


@pytest.mark.parametrize("mode", gates.MODES)
@pytest.mark.parametrize("name", gates.MODELS)
def test_single_precision_spreads_no_further_than_it_did(name: str, mode: str, systems: tuple[str, ...]) -> None:
    found = gates.deviations(gates.all_numbers(name, mode, torch.float32, systems), FROZEN)
    for quantity, spread in zip(gates.QUANTITIES, FROZEN[f"spread/{name}/{mode}"], strict=True):
        assert found[quantity] <= gates.ROOM * spread, quantity


def test_every_architecture_is_frozen_on_its_grid_and_without_one() -> None:
    assert {options["model"] for options in gates.MODELS.values()} == set(ARCHITECTURES)
    for name in gates.MODELS:
        for mode in gates.MODES:
            model = gates.model_of(name, mode, torch.float64)
            gates.numbers(model, gates.SYSTEMS["ion"])
            model.eval()
            gates._asked(model, gates.SYSTEMS["ion"])
            assert (model.representation_model.radial.used is not None) == (mode == "grid"), name


def test_a_change_in_the_twelfth_digit_is_seen() -> None:
    key = "tensornet/grid/ion/forces"
    moved = FROZEN[key].copy()
    moved[0, 0] += 2 * gates.TOLERANCE * np.abs(moved).max()
    assert gates.deviations({key: moved}, FROZEN)["forces"] > gates.TOLERANCE
