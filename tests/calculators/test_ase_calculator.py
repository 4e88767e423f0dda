"""The ASE calculator against finite differences, ASE's own drivers, and what users do by accident."""

from __future__ import annotations

import json
import logging
import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators import lj
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, LBFGS
from checkpoint_files import write_checkpoint
from conftest import shared
from torch import nn

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.calculators import ase as ase_door
from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import ConfigError
from torchmdnet.graph import build_graph, sum_to_atoms, sum_to_systems
from torchmdnet.priors.base import BasePrior
from torchmdnet.testing import tiny_model

CHARGE_NOTICE = "the atoms state none; 0 is assumed"


@pytest.fixture(scope="module")
def model():
    return tiny_model("tensornet")


@pytest.fixture
def calculator(model) -> TMDNETCalculator:
    return TMDNETCalculator(model, dtype="float64", units="eV")


def methanol(seed: int = 1) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def crystal() -> Atoms:
    """Four atoms in a triclinic cell in general orientation, narrower than the cutoff of 4 Å."""
    generator = np.random.default_rng(0)
    cell = 3.6 * np.eye(3) + 0.4 * generator.standard_normal((3, 3))
    places = [[0.1, 0.1, 0.1], [0.6, 0.5, 0.1], [0.55, 0.1, 0.6], [0.05, 0.6, 0.55]]
    return Atoms("CNOH", scaled_positions=places, cell=cell, pbc=True)


def slab() -> Atoms:
    atoms = fcc111("C", size=(1, 2, 2), a=3.7, vacuum=3.0)
    atoms.rattle(0.1, seed=2)
    return atoms


class LennardJones(nn.Module):
    """The potential ASE has too, cut off and shifted to zero at 2.5 σ."""

    def forward(self, z, pos, batch, box=None):
        graph = build_graph(z, pos, batch, box, cutoff_upper=2.5 * 3.4)
        sixth = (3.4 / graph.edge_dist) ** 6
        pairs = 2 * 0.0104 * (sixth * (sixth - 1) - 2.5**-12 + 2.5**-6)
        return sum_to_systems(sum_to_atoms(pairs, graph), graph)[:, None]


@pytest.fixture
def argon() -> TMDNETCalculator:
    return TMDNETCalculator(LennardJones(), dtype="float64", units="eV")


def solid_argon(a: float = 5.0) -> Atoms:
    """A compressed, distorted crystal; its cell is narrower than the cutoff."""
    atoms = bulk("Ar", "fcc", a=a, cubic=True)
    atoms.set_cell(atoms.cell.array @ [[1, 0.05, 0], [0, 1.04, 0.02], [0, 0, 0.97]], scale_atoms=True)
    atoms.rattle(0.05, seed=4)
    return atoms


def rotation() -> np.ndarray:
    turn, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((3, 3)))
    return turn * np.linalg.det(turn)


# ------------------------------------------------------------------------------------- derivatives and cells


@pytest.mark.parametrize("make", [methanol, crystal, slab])
def test_forces_are_finite_differences_of_the_energy(make, calculator) -> None:
    atoms = make()
    atoms.calc = calculator
    forces = atoms.get_forces()
    np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-4), rtol=1e-6, atol=1e-7)
    assert np.abs(forces).max() > 1e-3


@pytest.mark.parametrize("make", [crystal, slab, lambda: bulk("C", "diamond", a=3.4)])
def test_stress_is_the_finite_difference_of_the_energy_in_the_strain(make, calculator) -> None:
    atoms = make()
    atoms.calc = calculator
    stress = atoms.get_stress()
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-5), rtol=1e-6, atol=1e-8)
    assert np.abs(stress).max() > 1e-4


@pytest.mark.parametrize("pbc", [True, (True, False, True), False])
def test_a_potential_that_ase_knows_gives_what_ase_gives(argon, pbc) -> None:
    atoms = solid_argon()
    atoms.pbc = pbc
    reference = lj.LennardJones(sigma=3.4, epsilon=0.0104, rc=2.5 * 3.4)
    assert argon.get_potential_energy(atoms) == pytest.approx(reference.get_potential_energy(atoms), rel=1e-10)
    np.testing.assert_allclose(argon.get_forces(atoms), reference.get_forces(atoms), atol=1e-10)
    np.testing.assert_allclose(argon.get_stress(atoms), reference.get_stress(atoms), atol=1e-12)


@pytest.mark.parametrize("case", ["tn_priors", "tn_so3_f64", "tn2_rf", "et_scalar", "t_scalar", "gn_add"])
def test_every_kind_of_model_has_a_consistent_stress(case) -> None:
    path = shared(f"interop/{case}/model.ckpt")
    arrays = np.load(path.parent / "data.npz")
    atoms = Atoms(arrays["pbc/z"], arrays["pbc/pos"], cell=arrays["pbc/box"], pbc=True)
    atoms.calc = TMDNETCalculator(path, dtype="float64", units="eV")
    energy = atoms.get_potential_energy()
    assert energy == pytest.approx(arrays["pbc/y64"].item(), abs=1e-5)  # priors of the reference are in float32
    stress = atoms.get_stress(voigt=False)
    strain = np.diag([1.0, -0.6, 0.3]) + 0.4 * (np.eye(3, k=1) + np.eye(3, k=-1))
    step, energies = 1e-5, []
    for sign in (1, -1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ (np.eye(3) + sign * step * strain), scale_atoms=True)
        energies.append(atoms.calc.get_potential_energy(strained))
    slope = (energies[0] - energies[1]) / (2 * step)
    assert atoms.get_volume() * np.sum(stress * strain) == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_stress_of_a_molecule_in_a_box_that_does_not_repeat_is_there_when_asked(calculator) -> None:
    atoms = methanol()
    atoms.cell = 9 * np.eye(3)
    atoms.calc = calculator
    atoms.get_forces()
    assert "stress" not in calculator.results
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prepare", [lambda atoms: None, lambda atoms: atoms.set_cell([5, 5, 0])])
def test_stress_without_a_volume_is_refused_with_the_reason(prepare, calculator) -> None:
    atoms = methanol()
    prepare(atoms)
    atoms.calc = calculator
    with pytest.raises(PropertyNotImplementedError, match="the cell has no volume"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())


def test_a_turned_cell_gives_the_same_energy_turned_forces_and_turned_stress(calculator) -> None:
    atoms, turn = crystal(), rotation()
    atoms.calc = calculator
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn)
    turned.positions = atoms.positions @ turn
    turned.calc = calculator
    assert turned.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(turned.get_forces(), forces @ turn, atol=1e-10)
    np.testing.assert_allclose(turned.get_stress(voigt=False), turn.T @ stress @ turn, atol=1e-10)


def test_a_swapped_cell_is_as_good_as_any(calculator) -> None:
    atoms = methanol()
    atoms.calc = calculator
    free = atoms.get_potential_energy()
    atoms.set_cell([[0, 20, 0], [20, 0, 0], [0, 0, 20]])
    atoms.pbc = True
    assert atoms.get_potential_energy() == pytest.approx(free, abs=1e-10)


def test_a_cell_smaller_than_the_cutoff_equals_its_supercell(calculator) -> None:
    atoms = crystal()
    atoms.calc = calculator
    big = atoms.repeat((2, 3, 2))
    big.calc = TMDNETCalculator(calculator.model, dtype="float64", units="eV")
    assert big.get_potential_energy() == pytest.approx(12 * atoms.get_potential_energy(), rel=1e-11)
    np.testing.assert_allclose(big.get_forces()[:4], atoms.get_forces(), atol=1e-10)
    np.testing.assert_allclose(big.get_stress(), atoms.get_stress(), atol=1e-10)


def test_the_open_direction_of_a_slab_does_not_repeat(calculator) -> None:
    atoms = slab()
    atoms.calc = calculator
    energies = []
    for height in (0.0, 3.0, 30.0):
        cell = atoms.cell.array.copy()
        cell[2] = [0, 0, height]
        atoms.set_cell(cell)
        energies.append(atoms.get_potential_energy())
    assert np.ptp(energies) < 1e-10
    atoms.set_cell([*atoms.cell.array[:2], [0, 0, 4.0]])
    atoms.pbc = True
    assert abs(atoms.get_potential_energy() - energies[0]) > 1e-3


def test_a_wire_repeats_along_one_direction(calculator) -> None:
    wire = Atoms("CO", [[0, 0, 0], [0.2, 0.3, 1.3]], cell=[0, 0, 2.9], pbc=[False, False, True])
    wire.calc = calculator
    long = wire.repeat((1, 1, 3))
    long.calc = TMDNETCalculator(calculator.model, dtype="float64", units="eV")
    assert long.get_potential_energy() == pytest.approx(3 * wire.get_potential_energy(), rel=1e-11)


def test_a_molecule_in_a_box_without_periodicity_ignores_the_box(calculator) -> None:
    atoms = methanol()
    atoms.calc = calculator
    free = atoms.get_potential_energy()
    atoms.set_cell(3 * np.eye(3))
    assert atoms.get_potential_energy() == free


def test_a_box_inside_the_model_is_pointed_out_for_atoms_without_one(caplog) -> None:
    model = tiny_model("tensornet", box_vecs=[[4, 0, 0], [0, 4, 0], [0, 0, 4]])
    atoms = methanol()
    atoms.calc = TMDNETCalculator(model, dtype="float64", units="eV")
    with caplog.at_level(logging.WARNING):
        inside = atoms.get_potential_energy()
    assert "box of its own (box_vecs)" in caplog.text
    atoms.set_cell(4 * np.eye(3))
    atoms.pbc = True
    assert atoms.get_potential_energy() == pytest.approx(inside, rel=1e-12)


# ---------------------------------------------------------------------------------------------- ASE's drivers


def test_the_optimizer_finds_the_bond_length(argon) -> None:
    atoms = Atoms("Ar3", [[0, 0, 0], [4.2, 0, 0], [1.5, 3.4, 0.3]])
    atoms.calc = argon
    assert LBFGS(atoms, logfile=None).run(fmax=1e-5, steps=100)
    np.testing.assert_allclose(atoms.get_all_distances()[np.triu_indices(3, 1)], 2 ** (1 / 6) * 3.4, rtol=1e-4)


def test_cell_relaxation_removes_the_stress(argon) -> None:
    atoms = solid_argon()
    atoms.calc = argon
    before, stress_before = atoms.get_potential_energy(), np.abs(atoms.get_stress()).max()
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=100)
    assert atoms.get_potential_energy() < before - 0.01
    assert np.abs(atoms.get_stress()).max() < 1e-3 * stress_before
    ideal = bulk("Ar", "fcc", a=1.0, cubic=True).get_volume() * 5.23**3
    assert atoms.get_volume() == pytest.approx(ideal, rel=0.05)


@pytest.mark.parametrize("which", ["a molecule", "a crystal"])
def test_dynamics_without_a_thermostat_conserve_the_energy(which, calculator, argon) -> None:
    atoms = methanol() if which == "a molecule" else solid_argon(a=5.25)
    atoms.calc = calculator if which == "a molecule" else argon
    step = 0.25 * units.fs if which == "a molecule" else 2 * units.fs
    warm(atoms, 300 if which == "a molecule" else 40)
    total, potential = [], []
    dynamics = VelocityVerlet(atoms, timestep=step)
    dynamics.attach(lambda: (total.append(atoms.get_total_energy()), potential.append(atoms.get_potential_energy())))
    dynamics.run(80)
    assert np.std(potential) > 1e-3
    assert np.ptp(total) < 0.02 * np.ptp(potential)
    assert atoms.calc.evals == 81  # each step is calculated once


def warm(atoms: Atoms, kelvin: float) -> None:
    momenta = np.random.default_rng(3).standard_normal((len(atoms), 3))
    atoms.set_momenta(momenta * np.sqrt(atoms.get_masses() * units.kB * kelvin)[:, None])
    Stationary(atoms)


def test_a_thermostat_runs_in_single_precision(model) -> None:
    atoms = methanol()
    atoms.calc = TMDNETCalculator(model, units="eV")
    generator = np.random.default_rng(0)
    Langevin(atoms, 0.5 * units.fs, temperature_K=100, friction=0.01, rng=generator, fixcm=False).run(10)
    assert np.isfinite(atoms.positions).all()


def test_atoms_that_flew_apart_are_reported(calculator) -> None:
    atoms = methanol()
    atoms.positions[2, 1] = np.nan
    atoms.calc = calculator
    with pytest.raises(ValueError, match="position of atom 2"):
        atoms.get_forces()


# -------------------------------------------------------------------------------------- results and the cache


def test_stored_models_give_their_stored_numbers() -> None:
    folder = shared("interop/tn_o3")
    arrays = np.load(folder / "data.npz")
    calculator = TMDNETCalculator(folder / "model.ckpt", dtype=torch.float64, units="eV")
    for scenario in json.loads((folder / "case.json").read_text())["scenarios"]:
        z, pos, batch = (arrays[f"{scenario}/{name}"] for name in ("z", "pos", "batch"))
        boxes = arrays.get(f"{scenario}/box")
        for system in range(batch.max() + 1):
            members = batch == system
            atoms = Atoms(z[members], pos[members])
            if boxes is not None:
                atoms.set_cell(boxes if boxes.ndim == 2 else boxes[system])
                atoms.pbc = True
            atoms.info["charge"] = float(arrays.get(f"{scenario}/q", np.zeros(9))[system])
            atoms.calc = calculator
            expected = float(arrays[f"{scenario}/y64"][system, 0])
            assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-7, abs=1e-7)
            np.testing.assert_allclose(atoms.get_forces(), arrays[f"{scenario}/f64"][members], rtol=1e-6, atol=1e-6)


def test_free_energy_is_the_energy_and_the_atoms_add_up_to_it(calculator) -> None:
    atoms = crystal()
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    assert isinstance(energy, float)
    assert atoms.get_potential_energy(force_consistent=True) == energy
    assert atoms.get_potential_energies().shape == (4,)
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, rel=1e-12)


def test_reference_energies_are_part_of_each_atom() -> None:
    model = tiny_model("tensornet", prior_model={"Atomref": {"max_z": 20}})
    model.prior_model[0].atomref.weight.data += 100 * torch.arange(20.0)[:, None]
    lone = Atoms("NC", [[0, 0, 0], [50, 0, 0]])
    lone.calc = TMDNETCalculator(model, dtype="float64", units="eV")
    energies = lone.get_potential_energies()
    assert energies[0] - energies[1] == pytest.approx(100, abs=5)


class Offset(BasePrior):
    def per_system(self, graph):
        return graph.pos.new_ones(graph.num_systems, 1)


@pytest.mark.parametrize("what", ["a mean over atoms", "a shift", "a prior for the whole"])
def test_energies_of_atoms_are_declined_where_they_do_not_add_up(what) -> None:
    model = tiny_model("tensornet", reduce_op="mean" if what == "a mean over atoms" else "add")
    if what == "a shift":
        model.mean += 1.0
    elif what == "a prior for the whole":
        model.prior_model = nn.ModuleList([Offset()])
    atoms = crystal()
    atoms.calc = TMDNETCalculator(model, dtype="float64", units="eV")
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_potential_energies()
    batch = torch.zeros(4, dtype=torch.long)
    z, pos, box = (torch.from_numpy(x) for x in (atoms.numbers, atoms.positions, atoms.cell.array))
    assert atoms.get_potential_energy() == pytest.approx(model(z, pos, batch, box).energy.item(), rel=1e-12)


def test_unchanged_atoms_are_not_calculated_again(calculator) -> None:
    atoms = crystal()
    atoms.info["label"] = np.arange(3)
    atoms.calc = calculator
    assert calculator.evals == 0
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_stress()
    assert calculator.evals == 1
    atoms.info["label"] = np.arange(4)  # an array is nothing to compare, and says nothing of the physics
    atoms.get_potential_energy()
    assert calculator.evals == 1
    atoms.positions[0, 0] += 0.01
    atoms.get_potential_energy()
    atoms.set_cell(atoms.cell.array * 1.01)
    atoms.get_potential_energy()
    assert calculator.evals == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda atoms: None, []),
        (lambda atoms: atoms.positions.__setitem__((2, 1), atoms.positions[2, 1] + 1e-4), ["positions"]),
        (lambda atoms: atoms.set_atomic_numbers([6, 7, 8, 8]), ["numbers"]),
        (lambda atoms: atoms.set_cell(1.01 * atoms.cell.array), ["cell"]),
        (lambda atoms: atoms.set_pbc([True, True, False]), ["pbc"]),
        (lambda atoms: atoms.set_initial_charges([0, 0, 0, 1]), ["initial_charges"]),
        (lambda atoms: atoms.info.update(charge=1), ["info"]),
    ],
)
def test_every_change_of_the_atoms_is_named(change, named: list[str], calculator: TMDNETCalculator) -> None:
    atoms = crystal()
    calculator.calculate(atoms)
    change(atoms)
    assert calculator.check_state(atoms) == named


@pytest.mark.parametrize("dtype", [torch.float32, "float32", torch.float64, "float64", "torch.float64"])
def test_precision_may_be_a_type_or_its_name(model, dtype) -> None:
    atoms = crystal()
    atoms.calc = TMDNETCalculator(model, dtype=dtype, units="eV")
    reference = TMDNETCalculator(model, dtype="float64", units="eV")
    assert next(atoms.calc.model.parameters()).dtype == (torch.float64 if "64" in str(dtype) else torch.float32)
    tolerance = 1e-12 if "64" in str(dtype) else 1e-4
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(atoms), rel=tolerance)
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(atoms), atol=tolerance)
    assert atoms.get_forces().dtype == np.float64


def test_results_can_be_written_and_read(tmp_path, calculator) -> None:
    atoms = crystal()
    atoms.calc = calculator
    atoms.get_stress()
    for name in ("frames.extxyz", "frames.traj"):
        write(tmp_path / name, atoms)
        again = read(tmp_path / name)
        assert isinstance(again, Atoms)
        assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-7)


# ------------------------------------------------------------------------------------------ charge and spin


@pytest.fixture
def charged(tmp_path):
    return TMDNETCalculator(write_checkpoint(tmp_path / "charged.ckpt", charge=True), dtype="float64", units="eV")


def test_a_missing_charge_is_zero_with_one_notice(charged, caplog) -> None:
    atoms = methanol()
    atoms.calc = charged
    with caplog.at_level(logging.WARNING):
        neutral = atoms.get_potential_energy()
        atoms.rattle(0.01)
        atoms.get_potential_energy()
    assert caplog.text.count(CHARGE_NOTICE) == 1
    stated = methanol()
    stated.info["charge"] = 0
    stated.calc = charged
    assert stated.get_potential_energy() == neutral


def test_initial_charges_add_up_to_the_total_charge(charged, caplog) -> None:
    atoms = methanol()
    atoms.calc = charged
    atoms.set_initial_charges([-1.5, 0.5, 0, 0, 0, 0])
    with caplog.at_level(logging.WARNING):
        anion = atoms.get_potential_energy()
    assert CHARGE_NOTICE not in caplog.text
    atoms.set_initial_charges(None)
    atoms.info["charge"] = -1
    assert atoms.get_potential_energy() == pytest.approx(anion, rel=1e-12)
    atoms.set_initial_charges([1, 1, 0, 0, 0, 0])  # what is stated for the whole counts
    assert atoms.get_potential_energy() == pytest.approx(anion, rel=1e-12)


@pytest.mark.parametrize("one", [1, 1.0, np.int64(1), np.array([1]), torch.tensor(1), "1"])
def test_a_new_charge_is_a_new_calculation(charged, one) -> None:
    atoms = methanol()
    atoms.calc = charged
    atoms.info["charge"] = 0
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = one
    assert atoms.get_potential_energy() != neutral
    assert charged.evals == 2
    atoms.info["charge"] = 1.0
    atoms.get_potential_energy()
    assert charged.evals == 2


def test_charge_and_spin_go_by_the_names_that_data_sets_use(tmp_path, charged) -> None:
    atoms = methanol()
    atoms.info["charge"] = -1
    anion = charged.get_potential_energy(atoms)
    for name in ("total_charge", "net_charge", "q"):
        atoms.info = {name: -1}
        assert charged.get_potential_energy(atoms) == anion
    atoms.info = {"total_charge": -1, "charge": 1}  # its own name goes first
    assert charged.get_potential_energy(atoms) != anion

    spinful = TMDNETCalculator(Magnet(), dtype="float64", units="eV")
    for info in ({"spin": 2}, {"spin_multiplicity": 3}, {"multiplicity": 3}, {"n_unpaired": 2}):
        atoms.info = info
        assert spinful.get_potential_energy(atoms) == pytest.approx(2 * np.square(atoms.positions).sum())


def test_a_charge_that_is_no_number_is_refused(charged) -> None:
    atoms = methanol()
    atoms.calc = charged
    atoms.info["charge"] = "plus"
    with pytest.raises(ValueError, match=r'atoms.info\["charge"\] is \'plus\''):
        atoms.get_potential_energy()


def test_a_charge_the_model_never_learned_of_is_reported(tmp_path, caplog) -> None:
    atoms = methanol()
    atoms.calc = TMDNETCalculator(write_checkpoint(tmp_path / "neutral.ckpt"), units="eV")
    with caplog.at_level(logging.WARNING):
        atoms.get_potential_energy()
        assert caplog.text == ""
        atoms.info["charge"] = 1
        atoms.get_potential_energy()
    assert "trained without charges" in caplog.text


class Magnet(nn.Module):
    def forward(self, z, pos, batch, box=None, s=None):
        return (pos.square().sum() * (1 if s is None else s)).reshape(1, 1)


def test_spin_is_asked_for_and_reaches_the_model(tmp_path) -> None:
    atoms = methanol()
    atoms.calc = TMDNETCalculator(Magnet(), dtype="float64", units="eV")
    spinless = atoms.get_potential_energy()
    atoms.info["spin"] = 3
    assert atoms.get_potential_energy() == pytest.approx(3 * spinless)

    atoms = methanol()
    atoms.calc = TMDNETCalculator(write_checkpoint(tmp_path / "spin.ckpt", spin=True), units="eV")
    with pytest.raises(ConfigError, match=r'trained with spin. Set atoms.info\["spin"\], the number of unpaired'):
        atoms.get_potential_energy()
    atoms.info["spin"] = 1
    assert np.isfinite(atoms.get_potential_energy())


def test_charge_and_spin_outside_of_the_training_data_are_told(tmp_path, caplog) -> None:
    model = load_model(write_checkpoint(tmp_path / "both.ckpt", charge=True, spin=True))
    training = {"total_charge": [-1.0, 1.0], "spin": [0.0, 0.0]}
    save_model(model, tmp_path / "both.safetensors", provenance={"training": training})
    atoms = methanol()
    atoms.calc = TMDNETCalculator(tmp_path / "both.safetensors", units="eV")
    with pytest.raises(ConfigError, match=r"\(multiplicity - 1\).*; it was trained on 0; or .*spin_multiplicity"):
        atoms.get_potential_energy()
    atoms.info = {"charge": 1, "spin_multiplicity": 1}
    atoms.get_potential_energy()
    assert "never seen" not in caplog.text
    atoms.info = {"charge": 3, "spin_multiplicity": 3}
    atoms.get_potential_energy()
    assert "never seen charge 3: it was trained on -1 to 1" in caplog.text
    assert "never seen spin 2: it was trained on 0" in caplog.text


# ---------------------------------------------------------------------------------------- models and options


def test_elements_outside_the_embedding_are_named(calculator) -> None:
    atoms = Atoms("OU", [[0, 0, 0], [0, 0, 1.8]])
    atoms.calc = calculator
    with pytest.raises(ValueError, match=r"z holds 92 \(U\).*max_z=20"):
        atoms.get_potential_energy()


def test_elements_the_training_never_showed_are_pointed_out_once(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", facts={"elements": [1, 6, 8]})
    calculator = TMDNETCalculator(path, units="eV")
    with caplog.at_level(logging.WARNING):
        calculator.get_potential_energy(methanol())
        assert caplog.text == ""
        calculator.get_potential_energy(crystal())
        calculator.get_potential_energy(crystal())
    assert [record.message.partition(".")[0] for record in caplog.records] == [
        "The model has never seen N: it was trained on H, C, O"
    ]


def test_files_give_the_same_as_the_model_inside(tmp_path, model) -> None:
    atoms = methanol()
    path = write_checkpoint(tmp_path / "model.ckpt")
    energies = [
        TMDNETCalculator(source, dtype="float64", units="eV").get_potential_energy(atoms)
        for source in (path, str(path), model)
    ]
    assert energies[0] == energies[1] == pytest.approx(energies[2], rel=1e-12)


def test_a_model_in_training_is_copied_not_changed() -> None:
    class Training(nn.Module):
        def __init__(self, model) -> None:
            super().__init__()
            self.model = model

    inner = tiny_model("tensornet").train()
    atoms = crystal()
    atoms.calc = TMDNETCalculator(Training(inner), units="eV")
    atoms.get_stress()
    assert inner.training
    assert inner.derivative
    assert inner.dtype == torch.float64
    assert all(p.requires_grad for p in inner.representation_model.parameters())
    assert all(p.grad is None for p in inner.parameters())


def test_an_ensemble_gives_means_and_spreads(tmp_path) -> None:
    paths = [write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed) for seed in range(3)]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    atoms = crystal()
    alone = [TMDNETCalculator(path, dtype="float64", units="eV") for path in paths]
    energies = [one.get_potential_energy(atoms) for one in alone]
    forces = np.stack([one.get_forces(atoms) for one in alone])
    for source in (paths, tmp_path / "all.zip"):
        together = TMDNETCalculator(source, dtype="float64", units="eV")
        assert together.get_potential_energy(atoms) == pytest.approx(np.mean(energies))
        np.testing.assert_allclose(together.get_forces(atoms), forces.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(
            together.get_stress(atoms), np.mean([one.get_stress(atoms) for one in alone], axis=0), atol=1e-12
        )
        assert together.results["energy_std"] == pytest.approx(np.std(energies, ddof=1))
        np.testing.assert_allclose(together.results["forces_std"], forces.std(axis=0, ddof=1), atol=1e-12)
        assert together.get_property("energy_std", atoms) == together.results["energy_std"]
    atoms.calc = together
    write(tmp_path / "frames.extxyz", atoms)
    write(tmp_path / "frames.traj", atoms)


def test_a_model_of_something_else_than_energies_is_refused() -> None:
    class Vector(nn.Module):
        def forward(self, z, pos, batch, box=None):
            return pos.sum(dim=0, keepdim=True)

    atoms = methanol()
    atoms.calc = TMDNETCalculator(Vector(), units="eV")
    with pytest.raises(ValueError, match="one energy per system"):
        atoms.get_potential_energy()


def test_delta_learned_models_give_relative_energies_unless_told_otherwise() -> None:
    path = shared("interop/tn_delta/model.ckpt")
    arrays = np.load(path.parent / "data.npz")
    members = arrays["vac/batch"] == 0
    atoms = Atoms(arrays["vac/z"][members], arrays["vac/pos"][members])
    relative = TMDNETCalculator(path, dtype="float64", units="eV").get_potential_energy(atoms)
    total = TMDNETCalculator(path, dtype="float64", units="eV", remove_ref_energy=False).get_potential_energy(atoms)
    assert relative == pytest.approx(float(arrays["vac/y64_removed"][0, 0]), rel=1e-6)
    kwargs = json.loads((path.parent / "case.json").read_text())["load_kwargs"]
    expected = {True: relative, False: total}[kwargs.get("remove_ref_energy", True)]
    assert expected == pytest.approx(float(arrays["vac/y64"][0, 0]), rel=1e-6)
    assert relative != total


def test_a_misspelt_option_is_pointed_out(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match=r"max_num_neighbours.*Did you mean 'max_num_neighbors'"):
        TMDNETCalculator(path, units="eV", max_num_neighbours=40)


def test_crowded_atoms_need_no_neighbour_budget(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", max_num_neighbors=2)
    atoms = bulk("C", "diamond", a=3.0, cubic=True)
    atoms.rattle(0.05, seed=0)
    energies = [
        TMDNETCalculator(path, dtype="float64", units="eV", **options).get_potential_energy(atoms)
        for options in ({}, {"max_num_neighbors": 500})
    ]
    assert energies[0] == energies[1]


# -------------------------------------------------------------------------------------------------- units


def test_results_come_in_ev_and_angstrom_whatever_the_file_measures_in(tmp_path, caplog) -> None:
    facts = {"units": {"energy": "Hartree", "length": "Bohr"}}
    path = write_checkpoint(tmp_path / "model.ckpt", facts=facts)
    plain = write_checkpoint(tmp_path / "plain.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    in_bohr, scaled = crystal(), crystal()
    scaled.set_cell(scaled.cell.array * units.Bohr, scale_atoms=True)
    with caplog.at_level(logging.WARNING):
        in_bohr.calc = TMDNETCalculator(plain, dtype="float64")
        scaled.calc = TMDNETCalculator(path, dtype="float64")
        energy = in_bohr.get_potential_energy() * units.Hartree
    assert caplog.text == ""
    assert scaled.get_potential_energy() == pytest.approx(energy, rel=1e-6)
    assert scaled.get_potential_energies().sum() == pytest.approx(energy, rel=1e-6)
    np.testing.assert_allclose(scaled.get_forces(), in_bohr.get_forces() * units.Hartree / units.Bohr, rtol=1e-6)
    np.testing.assert_allclose(scaled.get_forces(), calculate_numerical_forces(scaled, 1e-4), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled.get_stress(), calculate_numerical_stress(scaled, 1e-5), rtol=1e-5, atol=1e-7)


def test_units_are_read_as_training_writes_them(tmp_path, caplog) -> None:
    nested = write_checkpoint(tmp_path / "nested.ckpt", facts={"units": {"energy": "kcal/mol", "length": None}})
    unknown = write_checkpoint(tmp_path / "unknown.ckpt", facts={"units": {"energy": None, "length": None}})
    with caplog.at_level(logging.WARNING):
        assert TMDNETCalculator(nested).units == ("kcal/mol", "Å")
        assert caplog.text == ""
        assert TMDNETCalculator(unknown).units == ("eV", "Å")
    assert "eV and Å are assumed" in caplog.text


def test_units_that_nobody_states_are_taken_as_ev_with_one_warning(tmp_path, caplog) -> None:
    paths = [write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed) for seed in range(2)]
    with caplog.at_level(logging.WARNING):
        TMDNETCalculator(paths)
    assert len(caplog.records) == 1
    assert "Pass units='kcal/mol/A'" in caplog.text


def test_units_can_be_stated_by_hand(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt")
    atoms = methanol()
    with caplog.at_level(logging.WARNING):
        in_kcal = TMDNETCalculator(path, dtype="float64", units="kcal/mol").get_potential_energy(atoms)
        in_ev = TMDNETCalculator(path, dtype="float64", units="eV/A").get_potential_energy(atoms)
    assert caplog.text == ""
    assert in_kcal == pytest.approx(in_ev * units.kcal / units.mol, rel=1e-7)


def test_units_that_contradict_the_file_are_reported(tmp_path, caplog) -> None:
    path = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": None}})
    with caplog.at_level(logging.WARNING):
        TMDNETCalculator(path, units="Hartree")
    assert "the file states eV/Å; Hartree/Å is used as given" in caplog.text


def test_an_ensemble_in_different_units_is_refused(tmp_path) -> None:
    paths = [
        write_checkpoint(tmp_path / f"{number}.ckpt", facts={"units": {"energy": unit}})
        for number, unit in enumerate(("eV", "Hartree"))
    ]
    with pytest.raises(ConfigError, match="predict in Hartree/Å and eV/Å"):
        TMDNETCalculator(paths)


# ---------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("failure", ["no compiler", "other numbers"])
def test_a_compilation_that_fails_is_reported_and_done_without(calculator, model, monkeypatch, caplog, failure) -> None:
    def compiled(_):
        if failure == "no compiler":
            raise RuntimeError("no C++ compiler found\nmore")
        other = tiny_model("tensornet", seed=9)
        other.derivative = False
        return other

    monkeypatch.setattr(ase_door, "compiled", compiled)
    atoms = methanol()
    atoms.calc = TMDNETCalculator(model, dtype="float64", units="eV", compile=True)
    with caplog.at_level(logging.WARNING):
        energy = atoms.get_potential_energy()
        atoms.rattle(0.01)
        atoms.get_potential_energy()
    assert caplog.text.count("compile: failed") == 1
    assert ("no C++ compiler found" if failure == "no compiler" else "energy differs") in caplog.text
    assert energy == calculator.get_potential_energy(methanol())


@pytest.mark.slow
def test_the_compiled_model_gives_the_same_numbers(model, calculator) -> None:
    quick = TMDNETCalculator(model, dtype="float64", units="eV", compile=True)
    for atoms in (crystal(), methanol(), slab(), crystal().repeat((2, 1, 1))):
        atoms.rattle(0.02, seed=3)
        assert quick.get_potential_energy(atoms) == pytest.approx(calculator.get_potential_energy(atoms), rel=1e-9)
        np.testing.assert_allclose(quick.get_forces(atoms), calculator.get_forces(atoms), atol=1e-9)
        if atoms.pbc.any():
            np.testing.assert_allclose(quick.get_stress(atoms), calculator.get_stress(atoms), atol=1e-9)
    assert quick.compiled


# ------------------------------------------------------------------------------------- properties


PROPERTIES = {"dipole": None, "charges": None, "alpha": "Polarizability", "gap": "Scalar"}


def test_properties_of_a_model_are_results() -> None:
    model = tiny_model("tensornet", properties=PROPERTIES)
    atoms = methanol()
    atoms.calc = calculator = TMDNETCalculator(model, dtype="float64", units="eV")
    assert set(PROPERTIES) <= set(calculator.implemented_properties)
    z, pos = torch.tensor(atoms.numbers), torch.tensor(atoms.positions)
    expected = {name: value.detach() for name, value in model(z, pos, properties=True).properties.items()}
    np.testing.assert_allclose(atoms.get_dipole_moment(), expected["dipole"][0], rtol=1e-10)
    np.testing.assert_allclose(atoms.get_charges(), expected["charges"][:, 0], rtol=1e-10)
    np.testing.assert_allclose(calculator.get_property("alpha", atoms), expected["alpha"][0], rtol=1e-10)
    assert calculator.get_property("gap", atoms) == pytest.approx(expected["gap"].item(), rel=1e-10)
    assert calculator.evals == 1


def test_a_model_without_properties_has_none(calculator) -> None:
    atoms = methanol()
    atoms.calc = calculator
    assert "dipole" not in calculator.implemented_properties
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_dipole_moment()


def test_charges_of_an_ion_add_up_to_its_charge() -> None:
    atoms = methanol()
    atoms.info["charge"] = -1
    atoms.calc = TMDNETCalculator(tiny_model("tensornet", properties={"charges": None}), dtype="float64", units="eV")
    assert atoms.get_charges().sum() == pytest.approx(-1)


def test_dipoles_of_a_model_in_bohr_are_in_e_angstrom() -> None:
    model = tiny_model("tensornet", properties={"dipole": None})
    atoms = methanol()
    atoms.calc = TMDNETCalculator(model, dtype="float64", units="Hartree/Bohr")
    z, pos = torch.tensor(atoms.numbers), torch.tensor(atoms.positions / units.Bohr)
    dipole = units.Bohr * model(z, pos, properties=True).properties["dipole"][0].detach()
    np.testing.assert_allclose(atoms.get_dipole_moment(), dipole, rtol=1e-8)


def test_an_ensemble_gives_spreads_of_stress_and_properties() -> None:
    models = [tiny_model("tensornet", seed=seed, properties=PROPERTIES) for seed in range(3)]
    atoms = crystal()
    together = TMDNETCalculator(Ensemble(models), dtype="float64", units="eV")
    alone = [TMDNETCalculator(model, dtype="float64", units="eV") for model in models]
    for name in ("energy", "forces", "stress", *PROPERTIES):
        values = np.stack([np.asarray(one.get_property(name, atoms)) for one in alone])
        np.testing.assert_allclose(together.get_property(name, atoms), values.mean(axis=0), rtol=1e-9, atol=1e-10)
        spread = together.get_property(f"{name}_std", atoms)
        np.testing.assert_allclose(spread, values.std(axis=0, ddof=1), rtol=1e-8, atol=1e-10)
