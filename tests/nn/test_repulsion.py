"""Repulsion of nuclei ends smoothly inside the bond, and counts each pair once."""

from __future__ import annotations

import torch
from ase.data import covalent_radii

from torchmdnet.nn.repulsion import RepulsionZBL, zbl_screening

REPULSION = RepulsionZBL(max_z=20, dtype=torch.float64)
BOTH_WAYS = torch.tensor([[0, 1], [1, 0]])


def pair_energy(z: list[int], r: torch.Tensor) -> torch.Tensor:
    return REPULSION(torch.tensor(z), BOTH_WAYS, r.expand(2)).sum()


def test_screening_starts_at_one_and_falls() -> None:
    x = torch.linspace(0, 20, 200, dtype=torch.float64)
    phi = zbl_screening(x)
    assert abs(float(phi[0]) - 1) < 1e-3
    assert (phi.diff() < 0).all()


def test_near_nuclei_feel_their_bare_charges() -> None:
    r = torch.tensor(1e-4, dtype=torch.float64)
    expected = 14.399645 * 6 * 8 / 1e-4
    torch.testing.assert_close(float(pair_energy([6, 8], r)), expected, rtol=5e-3, atol=0)


def test_it_ends_with_two_derivatives_at_the_sum_of_covalent_radii() -> None:
    reach = float(covalent_radii[6] + covalent_radii[8])
    for step, is_zero in ((-1e-3, False), (1e-9, True)):
        r = torch.tensor(reach + step, dtype=torch.float64, requires_grad=True)
        energy = pair_energy([6, 8], r)
        (slope,) = torch.autograd.grad(energy, r, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, r)
        assert abs(energy.item()) < 1e-5
        assert abs(slope.item()) < 1e-2
        assert (energy.item() == slope.item() == curvature.item() == 0) == is_zero


def test_self_loops_and_heavier_elements_are_fine() -> None:
    edges = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    r = torch.tensor([0.0, 0.9, 0.9, 0.0], dtype=torch.float64)
    with_loops = REPULSION(torch.tensor([6, 8]), edges, r)
    torch.testing.assert_close(with_loops.sum(), pair_energy([6, 8], torch.tensor(0.9, dtype=torch.float64)))
    last = REPULSION(torch.tensor([19, 19]), edges, r)
    torch.testing.assert_close(REPULSION(torch.tensor([60, 90]), edges, r), last)
