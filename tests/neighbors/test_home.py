"""Positions in double precision far from the origin, for models in single precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from torchmdnet.calculators import External, TMDNETCalculator
from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.elements import ATOMIC_NUMBERS, ISOTOPES, atomic_number
from torchmdnet.neighbors import Home
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

BOX = cell_of_atoms().box
assert BOX is not None
SLAB = BOX * torch.tensor([[1.0], [1.0], [0.0]])


def test_near_positions_are_left_alone() -> None:
    pos = 15 * torch.rand(5, 3, dtype=torch.float64)
    assert Home()(pos, torch.zeros(5).long(), BOX, 1) is pos


@pytest.mark.parametrize("box", [None, BOX, SLAB], ids=["open", "cell", "slab"])
def test_atoms_move_by_lattice_vectors_and_systems_as_a_whole(box: torch.Tensor | None) -> None:
    home, batch = Home(), torch.zeros(4).long()
    pos = 3 * torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5000.0
    moved = home(pos, batch, box, 1)
    by = pos - moved
    assert float(moved.abs().max()) < 40
    if box is None:
        torch.testing.assert_close(by, by[:1].expand(4, 3))
    else:
        counts = torch.linalg.lstsq(box.T, by.T).solution.T
        if box is BOX:
            torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-6)
        normal = torch.linalg.cross(box[0], box[1])
        if box is SLAB:
            torch.testing.assert_close(by @ normal, (by @ normal)[:1].expand(4))
    again = home(pos + 0.05, batch, box, 1)  # the same way, so that lists of neighbours serve on
    torch.testing.assert_close(again, moved + 0.05, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tensornet", "graph-network"])
@pytest.mark.parametrize("pbc", [False, True, (True, True, False)])
def test_forces_do_not_depend_on_how_far_away_the_atoms_are(name: str, pbc) -> None:
    systems = cell_of_atoms()
    assert systems.box is not None
    atoms = Atoms(systems.z.numpy(), systems.pos.numpy(), cell=systems.box.numpy(), pbc=pbc)
    model = tiny_model(name).float()
    atoms.calc = TMDNETCalculator(model, units="eV/A")
    forces, energy = atoms.get_forces(), atoms.get_potential_energy()
    far = atoms.copy()
    far.calc = TMDNETCalculator(model, units="eV/A")
    shift = np.where(atoms.pbc, 10_000, 0) @ atoms.cell.array + np.where(atoms.pbc.all(), 0, 1e4)
    far.positions += shift if not isinstance(pbc, tuple) else np.array([10_000, -3_000, 0]) @ atoms.cell.array
    far.positions[0] += 7 * atoms.cell.array[0] * atoms.pbc[0]  # one atom in another cell
    tolerance = 1e-5 * np.abs(forces).max()
    np.testing.assert_allclose(far.get_forces(), forces, rtol=0, atol=tolerance)
    assert far.get_potential_energy() == pytest.approx(energy, rel=1e-5)
    if far.pbc.all():
        np.testing.assert_allclose(far.get_stress(), atoms.get_stress(), rtol=1e-4, atol=1e-7)
    box = torch.where(torch.tensor(atoms.pbc)[:, None], systems.box, 0.0)
    external = External(model, systems.z[None], units="eV/A")
    found = external.calculate(torch.from_numpy(far.positions)[None], box)[1][0]
    np.testing.assert_allclose(found.numpy(), forces, rtol=0, atol=tolerance)


def test_dummy_atoms_are_refused(tmp_path) -> None:
    model = tiny_model("tensornet")
    atoms = Atoms("XH", [[0, 0, 0], [0, 0, 1]])
    atoms.calc = TMDNETCalculator(model, units="eV/A")
    with pytest.raises(ValueError, match="Atom 0 has atomic number 0"):
        atoms.get_potential_energy()
    External(model, [0, 1])  # numbers of types, as far as is known
    model.provenance["elements"] = [1, 8]
    with pytest.raises(ValueError, match=r"Atom 0 has atomic number 0 .* trained on H, O"):
        External(model, [0, 1])
    for wrong in (-1, 99):
        with pytest.raises(ValueError, match=f"z holds {wrong}"):
            External(model, [wrong, 1])


def test_a_run_folder_stands_for_its_model(tmp_path, caplog) -> None:
    with pytest.raises(FileNotFoundError, match=r"without potential\.safetensors, best\.ckpt or last\.ckpt"):
        load_model(tmp_path)
    model, systems = tiny_model("tensornet"), small_molecules().system(0)
    for name in ("last.ckpt", "best.ckpt", "potential.safetensors"):
        save_model(model, tmp_path / name)
        with caplog.at_level("INFO"):
            loaded = load_model(tmp_path, derivative=True)
        assert caplog.messages[-1].endswith(f"its {name} is read.")
    torch.testing.assert_close(loaded(systems.z, systems.pos), model(systems.z, systems.pos))
    TMDNETCalculator(tmp_path)
    External(tmp_path, systems.z)


def test_deuterium_and_tritium_are_hydrogen() -> None:
    assert [atomic_number(symbol) for symbol in ("D", "T", "O")] == [1, 1, 8]
    assert 2.01 < ISOTOPES["D"][1] < 2.02
    assert not ISOTOPES.keys() & ATOMIC_NUMBERS.keys()
