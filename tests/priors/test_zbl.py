"""ZBL repels nuclei, in any lattice and unit."""

from __future__ import annotations

import math

import pytest
import torch

from torchmdnet.priors import PRIORS
from torchmdnet.testing import CHECKS, cell_of_atoms, small_molecules, tiny_model

EV_AND_ANGSTROM = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
ZBL = {"cutoff_distance": 3.5, **EV_AND_ANGSTROM}


def energy(z: list[int], pos: torch.Tensor, **options) -> float:
    batch = torch.zeros(len(z), dtype=torch.long)
    prior = PRIORS["ZBL"](**{**ZBL, **options})
    return prior.post_reduce(torch.zeros(1, 1, dtype=torch.float64), torch.tensor(z), pos, batch).item()


def pair(r: float) -> torch.Tensor:
    return torch.tensor([[0.0, 0, 0], [r, 0, 0]], dtype=torch.float64)


def test_a_pair_has_the_energy_of_the_formula() -> None:
    r, Z_1, Z_2, cutoff = 0.9, 6, 8, 3.5
    a = 0.8854 * 0.529177210903 / (Z_1**0.23 + Z_2**0.23)
    terms = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4029), (0.02817, 0.2016))
    phi = sum(c * math.exp(-d * r / a) for c, d in terms)
    expected = 14.399645 * Z_1 * Z_2 / r * phi * 0.5 * (math.cos(math.pi * r / cutoff) + 1)
    assert energy([Z_1, Z_2], pair(r)) == pytest.approx(expected, rel=1e-5)


def test_the_unit_of_the_data_does_not_change_the_physics() -> None:
    hartree_and_nm = {"cutoff_distance": 0.35, "distance_scale": 1e-9, "energy_scale": 4.3597447222071e-18}
    in_hartree = energy([6, 8], pair(0.09), **hartree_and_nm)
    assert in_hartree * 27.211386245988 == pytest.approx(energy([6, 8], pair(0.9)), rel=1e-6)


def test_types_can_stand_for_elements() -> None:
    assert energy([0, 1], pair(0.9), atomic_number=[6, 8]) == pytest.approx(energy([6, 8], pair(0.9)))


def test_it_ends_at_the_cutoff() -> None:
    assert energy([6, 8], pair(3.4999)) < 1e-6
    assert energy([6, 8], pair(3.5001)) == 0


@pytest.mark.parametrize("systems", [small_molecules(), cell_of_atoms()], ids=["molecules", "cell"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_potential_with_it_meets_the_contract(check, systems) -> None:
    check(tiny_model("graph-network", prior_model={"ZBL": ZBL}), systems)
