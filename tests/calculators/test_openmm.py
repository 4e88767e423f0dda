"""OpenMM and OpenMM-ML, with the real programs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from checkpoint_files import write_checkpoint
from conftest import REPOSITORY

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.calculators.structures import water_box
from torchmdnet.units import energy_factor

openmm = pytest.importorskip("openmm", reason="OpenMM is not installed")
openmmml = pytest.importorskip("openmmml", reason="OpenMM-ML is not installed")

from openmm import app, unit  # noqa: E402

from torchmdnet.calculators.openmm_potential import Computation, Potential, PotentialFactory, make_force  # noqa: E402

KJ = energy_factor("kJ/mol")  # in eV
NAME = "torchmd-net"


@pytest.fixture(autouse=True)
def registered():
    openmmml.MLPotential.registerImplFactory(NAME, PotentialFactory())


def topology_of(atoms, residues=1):
    topology = app.Topology()
    chain, found = topology.addChain(), []
    for number in range(residues):
        residue = topology.addResidue("HOH", chain)
        for place in range(len(atoms) // residues):
            z = int(atoms.numbers[number * (len(atoms) // residues) + place])
            element = app.Element.getByAtomicNumber(z)
            name = "O" if z == 8 else f"{element.symbol}{place}"
            found.append(topology.addAtom(name, element, residue))
        if residues > 1:
            topology.addBond(found[-3], found[-2])
            topology.addBond(found[-3], found[-1])
    if atoms.pbc.any():
        topology.setPeriodicBoxVectors(np.array(atoms.cell) / 10 * unit.nanometer)
    return topology


def simulate(system, atoms, integrator=None):
    integrator = integrator or openmm.VerletIntegrator(0.0005)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    if atoms.pbc.any():
        context.setPeriodicBoxVectors(*(np.array(atoms.cell) / 10))
    context.setPositions(atoms.positions / 10)
    return context


def asked(context):
    """Energy in eV and forces in eV/Å."""
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer)
    return state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole) * KJ, forces * KJ / 10


def expect_the_same(context, atoms, file, **options):
    atoms = atoms.copy()
    atoms.calc = TMDNETCalculator(file, dtype="float64", **options)
    energy, forces = asked(context)
    assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=1e-7, atol=1e-9)


def test_the_entry_point_names_the_factory():
    section = (REPOSITORY / "pyproject.toml").read_text().partition('entry-points."openmmml.potentials"]\n')[2]
    address = f"{PotentialFactory.__module__}:{PotentialFactory.__name__}"
    assert section.splitlines()[0] == f'"{NAME}" = "{address}"'


@pytest.mark.parametrize(("energy", "length"), [("eV", "Å"), ("kcal/mol", "Å"), ("Hartree", "Bohr"), ("kJ/mol", "nm")])
def test_a_molecule_has_the_energy_that_ase_sees(tmp_path: Path, energy, length):
    facts = {"units": {"energy": energy, "length": length}}
    file = write_checkpoint(tmp_path / "model.ckpt", facts=facts, cutoff_upper=4.0 if length == "Å" else 7.0)
    atoms = molecule("CH3CH2OH")
    system = openmmml.MLPotential(NAME, model=file).createSystem(topology_of(atoms), dtype="float64", device="cpu")
    assert not system.usesPeriodicBoundaryConditions()
    expect_the_same(simulate(system, atoms), atoms, file)


def test_a_triclinic_box_counts_and_follows_the_context(tmp_path: Path):
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = molecule("CH3CH2OH", cell=[[7.0, 0, 0], [1.0, 7.5, 0], [-0.6, 0.9, 8.0]], pbc=True)
    system = openmmml.MLPotential(NAME, modelPath=file).createSystem(topology_of(atoms), dtype="float64")
    assert system.usesPeriodicBoundaryConditions()
    context = simulate(system, atoms)
    expect_the_same(context, atoms, file)
    atoms.set_cell(0.97 * atoms.cell.array, scale_atoms=True)
    context.setPeriodicBoxVectors(*(np.array(atoms.cell) / 10))
    context.setPositions(atoms.positions / 10)
    expect_the_same(context, atoms, file)


def test_charge_and_spin_reach_the_model(tmp_path: Path, caplog):
    facts = {"units": {"energy": "eV", "length": "Å"}}
    options = {"charge": True, "spin": True, "system_embedding": "charge+spin"}
    file = write_checkpoint(tmp_path / "model.ckpt", facts=facts, **options)
    atoms, potential = molecule("CH3O"), openmmml.MLPotential(NAME, model=file)
    found = []
    for charge, multiplicity in ((0, 2), (-1, 1), (-1, 3)):
        atoms.info = {"charge": charge, "spin": multiplicity - 1}
        system = potential.createSystem(
            topology_of(atoms), charge=charge, multiplicity=multiplicity, dtype="float64", device="cpu"
        )
        context = simulate(system, atoms)
        expect_the_same(context, atoms, file)
        found.append(asked(context)[0])
    assert len({round(energy, 6) for energy in found}) == 3
    with pytest.raises(ValueError, match="spin: the model was trained with spin"):
        potential.createSystem(topology_of(atoms))
    with pytest.raises(ValueError, match="spin=2 contradicts multiplicity=2"):
        potential.createSystem(topology_of(atoms), spin=2, multiplicity=2)
    with caplog.at_level(logging.WARNING):
        simulate(potential.createSystem(topology_of(atoms), spin=0, device="cpu"), atoms).getState(getEnergy=True)
    assert "charge" in caplog.text
    assert "0 is assumed" in caplog.text


def test_a_part_of_a_force_field_is_modelled(tmp_path: Path):
    """The energy of a water in a box of water is that of the force field plus the change inside the water."""
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = water_box()
    topology = topology_of(atoms, residues=64)
    field = app.ForceField("tip3p.xml")
    options = {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.55, "rigidWater": False, "constraints": None}
    whole = field.createSystem(topology, **options)
    part = list(range(6, 12))
    potential = openmmml.MLPotential(NAME, model=file)
    mixed = potential.createMixedSystem(topology, whole, part, interpolate=True, dtype="float64", periodic=False)
    context = simulate(mixed, atoms)
    energies = {}
    for value in (0, 1):
        context.setParameter("lambda_interpolate", value)
        energies[value] = asked(context)
    reference = asked(simulate(whole, atoms))
    assert energies[0][0] == pytest.approx(reference[0], rel=1e-6)
    plain = potential.createMixedSystem(topology, whole, part, dtype="float64", periodic=False)
    context = simulate(plain, atoms)
    assert energies[1][0] == pytest.approx(asked(context)[0], rel=1e-8)
    np.testing.assert_allclose(energies[1][1], asked(context)[1], rtol=1e-5, atol=1e-6)
    alone = atoms[part]
    alone.pbc = False
    alone.calc = TMDNETCalculator(file, dtype="float64")
    for force in plain.getForces():
        force.setForceGroup(5 if force.getName() == "TorchMD-Net" else 0)
    context = simulate(plain, atoms)
    state = context.getState(getEnergy=True, getForces=True, groups={5})
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole) * KJ
    assert energy == pytest.approx(alone.get_potential_energy(), rel=1e-9)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoules_per_mole / unit.nanometer) * KJ / 10
    np.testing.assert_allclose(forces[part], alone.get_forces(), rtol=1e-7, atol=1e-9)
    assert not forces[[0, 1, 2, 60]].any()


def test_dynamics_conserves_energy_and_reuses_neighbours(tmp_path: Path):
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = water_box()
    force = make_force(file, atoms.numbers, periodic=True, dtype="float64", device="cpu", skin=0.5)
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.addForce(force)
    context = simulate(system, atoms, openmm.VerletIntegrator(0.00025))
    context.setVelocitiesToTemperature(100, 1)
    totals = []
    for _ in range(20):
        context.getIntegrator().step(1)
        state = context.getState(getEnergy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoules_per_mole))
    kinetic = state.getKineticEnergy().value_in_unit(unit.kilojoules_per_mole)
    assert np.ptp(totals) < 0.01 * kinetic


def test_a_list_of_neighbours_serves_many_steps(tmp_path: Path):
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = water_box()
    computation = Computation(file, atoms.numbers, periodic=True, device="cpu", skin=1.0)

    class State:
        def getPositions(self, asNumpy):
            return atoms.positions / 10 * unit.nanometer

        def getPeriodicBoxVectors(self, asNumpy):
            return np.array(atoms.cell) / 10 * unit.nanometer

    for _ in range(6):
        computation(State())
        atoms.rattle(0.01, seed=1)
    assert computation.potential.search.num_searches <= 2


def test_a_barostat_changes_the_volume(tmp_path: Path):
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = water_box()
    system = openmmml.MLPotential(NAME, model=file).createSystem(topology_of(atoms, 64), device="cpu")
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0, 2))
    context = simulate(system, atoms, openmm.LangevinMiddleIntegrator(300, 1, 0.00025))
    before = context.getState().getPeriodicBoxVolume().value_in_unit(unit.nanometer**3)
    context.getIntegrator().step(20)
    state = context.getState(getPositions=True)
    after = state.getPeriodicBoxVolume().value_in_unit(unit.nanometer**3)
    assert after != before
    moved = atoms.copy()
    moved.set_cell(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.angstrom))
    moved.positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    moved.calc = TMDNETCalculator(file)
    assert asked(context)[0] == pytest.approx(moved.get_potential_energy(), rel=1e-5)


def test_a_system_is_written_as_xml_and_read_again(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    atoms = molecule("H2O")
    system = openmmml.MLPotential(NAME, model="model.ckpt").createSystem(topology_of(atoms), dtype="float64")
    text = openmm.XmlSerializer.serialize(system)
    monkeypatch.chdir("/")
    again = openmm.XmlSerializer.deserialize(text)
    expect_the_same(simulate(again, atoms), atoms, tmp_path / "model.ckpt")


def test_what_cannot_be_meant_is_refused(tmp_path: Path):
    file = write_checkpoint(tmp_path / "model.ckpt", facts={"units": {"energy": "eV", "length": "Å"}})
    with pytest.raises(ValueError, match="torchmd-net: pass one model file"):
        openmmml.MLPotential(NAME)
    potential = openmmml.MLPotential(NAME, model=file)
    with pytest.raises(ValueError, match="embedding of this model ends"):
        potential.createSystem(topology_of(Atoms("U")))
    topology = topology_of(molecule("H2O"))
    next(topology.atoms()).element = None
    with pytest.raises(ValueError, match=r"atom 0 .* has no element"):
        potential.createSystem(topology)
    with pytest.warns(UserWarning, match="chrage is not an option here and is ignored. Did you mean 'charge'"):
        potential.createSystem(topology_of(molecule("H2O")), chrage=1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Potential(NAME, model="nowhere.ckpt").addForces(topology_of(molecule("H2O")), openmm.System(), None, 0)
