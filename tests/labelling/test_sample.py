"""Sampled structures have the distributions that are asked for, and depend on the seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.io import read, write

from torchmdnet.errors import DataError
from torchmdnet.labelling.methods import Method
from torchmdnet.labelling.sample import Sampling, closest_contact, displaced, harmonic_modes, normal_modes, sample
from torchmdnet.scripts.main import main


class Harmonic(Calculator):
    """Springs between all pairs of atoms: exactly known second derivatives at the minimum."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, rest: Atoms, k: float = 20.0) -> None:
        super().__init__()
        self.lengths, self.k = rest.get_all_distances(), k

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        bonds = atoms.positions[:, None] - atoms.positions
        lengths = np.linalg.norm(bonds, axis=-1) + np.eye(len(atoms))
        stretch = (lengths - self.lengths) * (1 - np.eye(len(atoms)))
        self.results["energy"] = self.k * (stretch**2).sum() / 4
        self.results["forces"] = -self.k * (stretch[..., None] * bonds / lengths[..., None]).sum(axis=1)


def springs(name: str = "CH4") -> Atoms:
    atoms = molecule(name)
    atoms.calc = Harmonic(atoms)
    return atoms


def test_the_mode_of_a_diatomic_is_that_of_its_spring():
    atoms = springs("CO")
    omega, modes = harmonic_modes(atoms)
    reduced = 1 / (1 / atoms.get_masses()).sum()
    assert omega == pytest.approx([np.sqrt(20.0 / reduced)], rel=1e-5)
    along = (modes[0].reshape(2, 3) / np.sqrt(atoms.get_masses())[:, None])[:, 2]
    assert along[0] / along[1] == pytest.approx(-atoms.get_masses()[1] / atoms.get_masses()[0], rel=1e-6)


@pytest.mark.parametrize(("name", "count"), [("CO", 1), ("H2O", 3), ("CH4", 9)])
def test_a_molecule_has_as_many_vibrations_as_it_should(name, count):
    omega, modes = harmonic_modes(springs(name))
    assert len(omega) == count
    np.testing.assert_allclose(modes @ modes.T, np.eye(count), atol=1e-10)


def test_a_crystal_keeps_all_modes_but_three():
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    assert len(harmonic_modes(atoms)[0]) == 3 * 4 - 3


def test_harmonic_energies_are_a_random_division_of_the_thermal_one():
    atoms, kelvin = springs(), 50.0
    omega, modes = harmonic_modes(atoms)
    thermal = 1.5 * len(atoms) * units.kB * kelvin
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(4000):
        moved = displaced(atoms, omega, modes, kelvin, rng)
        shift = moved.positions - atoms.positions + atoms.get_center_of_mass()
        q = modes @ (shift * np.sqrt(atoms.get_masses())[:, None]).ravel()
        shares.append((omega * q) ** 2 / 2 / thermal)
    shares = np.array(shares)  # (samples, 9), uniform over the simplex
    assert shares.sum(axis=1).max() <= 1 + 1e-9
    np.testing.assert_allclose(shares.mean(axis=0), 1 / 10, atol=0.006)
    np.testing.assert_allclose(shares.var(axis=0), 9 / (10**2 * 11), rtol=0.15)


def test_the_energy_along_modes_is_the_harmonic_one_when_it_is_cold():
    atoms, kelvin = springs(), 0.01
    omega, modes = harmonic_modes(atoms)
    moved = displaced(atoms, omega, modes, kelvin, np.random.default_rng(2))
    shift = moved.positions - atoms.positions + atoms.get_center_of_mass()
    q = modes @ (shift * np.sqrt(atoms.get_masses())[:, None]).ravel()
    moved.calc = atoms.calc
    assert moved.get_potential_energy() == pytest.approx(((omega * q) ** 2).sum() / 2, rel=1e-2)


def run(tmp_path: Path, start: Atoms | list[Atoms], name: str, *words: str) -> list[Atoms]:
    write(tmp_path / "start.extxyz", start)
    main(["sample", str(tmp_path / "start.extxyz"), "-o", str(tmp_path / name), *words])
    return read(tmp_path / name, ":")


def test_structures_do_not_depend_on_the_number_of_processes_but_on_the_seed(tmp_path):
    starts = [bulk("Cu", cubic=True), bulk("Au", cubic=True)]
    words = ["-m", "md", "-c", "emt", "-t", "300", "600", "-n", "2", "--interval", "5", "--equilibration", "5"]
    one = run(tmp_path, starts, "one.extxyz", *words)
    two = run(tmp_path, starts, "two.extxyz", *words, "-p", "2")
    other = run(tmp_path, starts, "other.extxyz", *words, "--seed", "1")
    assert len(one) == len(two) == len(other) == 8
    assert [atoms.info["temperature_K"] for atoms in one] == [300, 300, 600, 600] * 2
    for a, b, c in zip(one, two, other, strict=True):
        assert a == b
        assert np.abs(a.positions - c.positions).max() > 1e-3
        assert a.calc is None


def test_dynamics_has_the_temperature_asked_for():
    from torchmdnet.labelling.methods import Calculators
    from torchmdnet.labelling.sample import dynamics

    atoms = bulk("Cu", cubic=True).repeat(2)
    sampling = Sampling("md", count=30, interval=20, equilibration=200, timestep=4, friction=0.05)
    temperatures = []
    for _ in dynamics(atoms, sampling, 500.0, Calculators(Method("emt")), np.random.default_rng(3)):
        temperatures.append(atoms.get_temperature())
    assert np.mean(temperatures) == pytest.approx(500, rel=0.1)


def test_rattling_has_the_deviation_and_the_strain_asked_for(tmp_path):
    start = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    frames = run(tmp_path, start, "out.extxyz", "-m", "rattle", "-n", "200", "--stdev", "0.1", "--strain", "0.02")
    strains = np.array([np.linalg.solve(start.cell.array, atoms.cell.array) - np.eye(3) for atoms in frames])
    np.testing.assert_allclose(strains, strains.transpose(0, 2, 1), atol=1e-7)
    assert strains[:, range(3), range(3)].std() == pytest.approx(0.02, rel=0.1)
    shifts = [atoms.positions - start.get_scaled_positions() @ atoms.cell.array for atoms in frames]
    shifts = [shift - np.round(shift / 5.64) * 5.64 for shift in shifts]
    assert np.std(shifts) == pytest.approx(0.1, rel=0.03)


def test_atoms_do_not_come_too_close(tmp_path):
    start = molecule("H2O")
    frames = run(tmp_path, start, "out.extxyz", "-m", "rattle", "-n", "60", "--stdev", "0.3", "--min-distance", "0.8")
    radii = {"OH": 0.66 + 0.31, "HH": 0.31 + 0.31}
    for atoms in frames:
        distance = atoms.get_all_distances()
        assert min(distance[0, 1:]) >= 0.8 * radii["OH"] - 1e-6
        assert distance[1, 2] >= 0.8 * radii["HH"] - 1e-6


def test_contacts_across_the_boundary_of_a_cell_count():
    atoms = Atoms("Ar2", [[0.1, 0, 0], [9.9, 0, 0]], cell=[10, 10, 10], pbc=True)
    assert closest_contact(atoms) == pytest.approx(0.2 / (2 * 1.06), rel=1e-6)
    atoms.pbc = False
    assert closest_contact(atoms) == 1.0


def test_settings_that_allow_no_structure_are_refused_with_what_to_change(tmp_path):
    write(tmp_path / "start.extxyz", molecule("H2O"))
    settings = Sampling("rattle", stdev=0.01, min_distance=1.5)
    with pytest.raises(DataError, match=r"200 structures in a row had atoms closer .*--min-distance"):
        sample([tmp_path / "start.extxyz"], tmp_path / "out.extxyz", settings)


def test_charge_and_spin_stay_and_labels_do_not(tmp_path):
    start = molecule("O2")
    start.info.update(total_charge=-1, spin_multiplicity=2, energy=3.0, REF_energy=4.0, smiles="[O][O-]")
    start.arrays["forces"] = np.ones((2, 3))
    (atoms, *_) = run(tmp_path, start, "out.extxyz", "-m", "rattle")
    assert atoms.info.items() >= {"total_charge": -1, "spin_multiplicity": 2, "smiles": "[O][O-]"}.items()
    assert "REF_energy" not in atoms.info
    assert atoms.calc is None


def test_normal_modes_start_from_the_minimum(tmp_path):
    start = bulk("Cu", cubic=True)
    start.rattle(0.05, seed=1)
    frames = run(tmp_path, start, "out.extxyz", "-m", "modes", "-c", "emt", "-t", "1", "-n", "3")
    for atoms in frames:  # a hundredth of a thermal amplitude away from the perfect crystal
        away = atoms.positions - bulk("Cu", cubic=True).positions
        assert np.abs(away - away.mean(axis=0)).max() < 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "mc"], "method: 'mc' is not available. Choose from md, modes, rattle"),
        (["-m", "md"], "calculator: sampling by md needs one"),
        (["-m", "rattle", "--stdev", "0"], "argument --stdev: '0' is not a finite number above zero"),
        (["-m", "rattle", "-n", "-3"], "argument -n/--count: '-3' is not a whole number from 1"),
        (["-m", "rattle", "-o", "out.h5"], "out.h5 should end in .extxyz"),
        (["-m", "rattle", "--option", "a=1"], "Pass --calculator"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write("in.extxyz", molecule("H2O"))
    with pytest.raises(SystemExit) as end:
        main(["sample", "in.extxyz", *(["-o", "out.extxyz"] if "-o" not in words else []), *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gas_of_one_atom_has_no_modes():
    atoms = Atoms("Ar")
    with pytest.raises(DataError, match="no modes"):
        list(normal_modes(atoms, Sampling("modes"), 300.0, FakeCalculators(), np.random.default_rng(0)))


class FakeCalculators:
    def attach(self, atoms: Atoms) -> Atoms:
        atoms.calc = Harmonic(atoms)
        return atoms


def test_a_dynamics_that_explodes_is_stopped_and_nothing_of_it_is_written(tmp_path, capsys):
    start = bulk("Cu", cubic=True)
    start.rattle(0.1, seed=1)
    write(tmp_path / "in.extxyz", start)
    words = ["sample", str(tmp_path / "in.extxyz"), "-o", str(tmp_path / "out.extxyz"), "-m", "md", "-c", "emt"]
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--timestep", "60", "--equilibration", "0", "--interval", "600"])
    assert "the dynamics exploded at 300 K: " in capsys.readouterr().err
    assert not (tmp_path / "out.extxyz").exists()


@pytest.mark.parametrize(("step", "reason"), [("collide", "atoms closer than 0.45"), ("heat", "a temperature above")])
def test_structures_out_of_bounds_are_left_out_and_counted(tmp_path, capsys, monkeypatch, step, reason):
    from ase.md.langevin import Langevin

    def run(self, steps):
        self.runs = getattr(self, "runs", 0) + 1
        self.atoms.positions[:] = bulk("Cu", cubic=True).positions
        self.atoms.set_momenta(np.zeros((4, 3)))
        if self.runs == 3 and step == "collide":
            self.atoms.positions[1] = self.atoms.positions[0] + (0, 0, 0.8)
        if self.runs == 3 and step == "heat":
            self.atoms.set_momenta(np.sqrt(self.atoms.get_masses() * units.kB * 1800.0)[:, None] * np.ones((4, 3)))

    monkeypatch.setattr(Langevin, "run", run)
    frames = run_in_process(tmp_path, monkeypatch, bulk("Cu", cubic=True), "-m", "md", "-c", "emt", "-n", "4")
    assert len(frames) == 3
    said = capsys.readouterr().out
    assert "1 structures were out of bounds and are left out" in said
    assert f"1 × {reason}" in said


def run_in_process(tmp_path: Path, monkeypatch, start: Atoms, *words: str) -> list[Atoms]:
    """Sample without processes, so that what is patched here holds."""

    def here(work, pieces, **_):
        call = work.prepare()
        for key, piece in pieces:
            yield key, {"result": call(piece)}

    monkeypatch.setattr("torchmdnet.labelling.sample.run", here)
    return run(tmp_path, start, "out.extxyz", *words)


def test_dynamics_that_never_end_are_given_up_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    starts = [Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]], info={"mood": mood}) for mood in ("good", "hang")]
    write(tmp_path / "in.extxyz", starts)
    words = ["sample", str(tmp_path / "in.extxyz"), "-o", str(tmp_path / "out.extxyz"), "-c", "hard_calculators:Moody"]
    words += ["--option", "sigma=3.4", "--method", "md", "--count", "1", "--equilibration", "0", "--interval", "1"]
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--timeout", "4"])
    assert f"1 × no result after 4 s ({tmp_path / 'in.extxyz'}, frame 1)" in capsys.readouterr().out
    assert len(read(tmp_path / "out.extxyz", ":")) == 1
