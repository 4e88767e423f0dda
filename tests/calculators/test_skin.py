"""Neighbour lists that serve many steps of dynamics change no force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

from torchmdnet.calculators import External, TMDNETCalculator
from torchmdnet.testing import cell_of_atoms, tiny_model


def crystal() -> Atoms:
    cell = cell_of_atoms(40, 8.5)
    assert cell.box is not None
    return Atoms(cell.z.numpy(), positions=cell.pos.numpy(), cell=cell.box.numpy(), pbc=True)


@pytest.mark.parametrize("name", ["tensornet", "equivariant-transformer"])
def test_dynamics_meets_the_same_forces_with_and_without(name: str) -> None:
    model, atoms = tiny_model(name), crystal()
    with_skin = TMDNETCalculator(model, dtype="float64", units="eV/A", skin=0.5)
    without = TMDNETCalculator(model, dtype="float64", units="eV/A", skin=0)
    assert without.search is None
    atoms.calc = with_skin
    spread = np.sqrt(units.kB * 2000 / atoms.get_masses())[:, None]
    atoms.set_velocities(spread * np.random.default_rng(0).normal(0, 1, (len(atoms), 3)))
    dynamics = VelocityVerlet(atoms, 1.0 * units.fs)
    for step in range(60):
        if step == 30:  # a jump across the cell
            atoms.positions[3] += atoms.cell.array[0]
        if step == 40:
            atoms.set_cell(1.01 * atoms.cell.array, scale_atoms=True)
        dynamics.run(1)
        without.calculate(atoms, ["energy", "forces", "stress"])
        np.testing.assert_allclose(with_skin.results["forces"], without.results["forces"], rtol=0, atol=1e-11)
        np.testing.assert_allclose(with_skin.results["energy"], without.results["energy"], rtol=1e-12)
    assert with_skin.search is not None
    assert 3 < with_skin.search.num_searches < 30


def test_replicas_keep_lists_too() -> None:
    model, cell = tiny_model("tensornet"), cell_of_atoms(40, 8.5)
    with_skin, without = (External(model, [cell.z.tolist()] * 2, dtype="float64", skin=skin) for skin in (0.5, 0.0))
    generator = torch.Generator().manual_seed(0)
    pos = torch.stack([cell.pos, cell.pos + 0.1])
    for _ in range(20):
        pos = pos + 0.03 * torch.randn(pos.shape, generator=generator, dtype=torch.float64)
        for ours, theirs in zip(with_skin.calculate(pos, cell.box), without.calculate(pos, cell.box), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert with_skin.search is not None
    assert 2 < with_skin.search.num_searches < 15


def test_the_skin_is_in_angstrom_whatever_the_units_of_the_model() -> None:
    bohr = TMDNETCalculator(tiny_model("tensornet"), units="Hartree/Bohr", skin=1.0)
    assert bohr.search is not None
    assert bohr.search.skin == pytest.approx(1 / units.Bohr, rel=1e-6)
