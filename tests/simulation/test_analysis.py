"""What is read from trajectories, against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from torchmdnet.labelling.sound import REACH
from torchmdnet.neighbors.sound import CLOSEST as CLOSEST_TO_CUTOFF
from torchmdnet.simulation.analysis import drift_of, radial_distributions, rmsd, vibrational_density
from torchmdnet.simulation.modes import normal_modes_of, rigid_motions
from torchmdnet.simulation.sanity import COINCIDENT, clash_of, closest_pair, coincidence_of, explosion, what_is_wrong


def test_the_density_of_states_has_its_peak_at_the_frequency_of_the_motion() -> None:
    wavenumber = 1500.0  # 1/cm
    times = 4.0 * np.arange(3000)  # fs
    swing = np.sin(2 * np.pi * wavenumber * 2.99792458e-5 * times)
    velocities = np.zeros((len(times), 2, 3))
    velocities[:, 0, 0], velocities[:, 1, 0] = swing, -swing / 15.999 * 1.008
    spectrum = vibrational_density(velocities, Atoms("HO", [[0, 0, 0], [1, 0, 0]]), 4.0)
    assert spectrum is not None
    assert spectrum.wavenumbers[spectrum.total.argmax()] == pytest.approx(wavenumber, abs=spectrum.resolution)
    assert spectrum.total.sum() * spectrum.resolution == pytest.approx(1)
    assert sum(spectrum.elements.values()) == pytest.approx(spectrum.total)
    assert spectrum.elements["H"].sum() == pytest.approx(15.999 / 1.008 * spectrum.elements["O"].sum(), rel=1e-3)
    assert vibrational_density(velocities[:20], Atoms("HO"), 4.0) is None


def test_the_first_shell_of_a_crystal_has_twelve_neighbours() -> None:
    atoms = bulk("Cu", cubic=True)
    distance, found = radial_distributions([atoms, atoms], reach=5.0, bins=500)
    shells = 4 * np.pi * distance**2 * (distance[1] - distance[0])
    inside = distance < 3.0
    counted = (found["Cu-Cu"] * shells)[inside].sum() * len(atoms) / atoms.get_volume()
    assert counted == pytest.approx(12, rel=1e-3)


def test_pairs_of_elements_are_told_apart() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    _, found = radial_distributions([atoms])
    assert set(found) == {"Cl-Cl", "Cl-Na", "Na-Na"}
    assert found["Cl-Na"].argmax() < found["Cl-Cl"].argmax()


def test_the_deviation_is_without_turns_and_shifts() -> None:
    start = molecule("CH3CH2OH")
    turned = start.copy()
    turned.rotate(70, (1, 2, 3))
    turned.positions += 5
    moved = start.copy()
    moved.positions[0] += 0.3
    values = rmsd([start, turned, moved])
    assert values[:2] == pytest.approx([0, 0], abs=1e-6)
    assert 0.14 < values[2] < 0.1634  # without turning back it would be 0.3 √3 √8 / 9
    mirrored = start.copy()
    mirrored.positions[:, 2] *= -1
    mirrored.positions[:, 0] += 0.01 * np.arange(9)
    assert rmsd([start, mirrored])[1] > 0


def test_the_deviation_of_a_crystal_is_without_that_of_its_cell() -> None:
    atoms = bulk("Cu", cubic=True)
    grown = atoms.copy()
    grown.set_cell(1.1 * atoms.cell.array, scale_atoms=True)
    assert rmsd([atoms, grown])[1] == pytest.approx(0, abs=1e-9)


def test_the_drift_is_the_slope() -> None:
    time = np.linspace(0, 2, 50)
    drift = drift_of(time, 3.0 + 0.004 * time + 1e-5 * (-1.0) ** np.arange(50), 4)
    assert drift is not None
    assert drift.slope == pytest.approx(1.0, rel=1e-2)
    assert drift.noise == pytest.approx(0.0025, rel=0.1)
    assert drift_of(time[:2], time[:2], 4) is None


@pytest.mark.parametrize(("name", "number"), [("CH3CH2OH", 6), ("CO2", 5), ("H2O", 6)])
def test_a_molecule_has_six_motions_of_the_whole_and_a_linear_one_five(name, number) -> None:
    assert rigid_motions(molecule(name)).shape[1] == number


def test_two_masses_on_a_spring_swing_at_their_frequency() -> None:
    atoms = Atoms("HCl", [[0, 0, 0], [0, 0, 1.3]])
    hessian = np.zeros((6, 6))
    hessian[np.ix_([2, 5], [2, 5])] = 30.0 * np.array([[1, -1], [-1, 1]])
    squares, _ = normal_modes_of(hessian, atoms)
    reduced = 1 / (1 / atoms.get_masses()).sum()
    assert squares[-1] == pytest.approx(30.0 / reduced)
    assert squares[:-1] == pytest.approx(0, abs=1e-9)


def test_what_has_exploded_is_told() -> None:
    atoms = molecule("H2O")
    atoms.set_momenta(np.zeros((3, 3)))
    fine = {"forces": np.zeros((3, 3)), "energy": -1.0, "max_force": 50.0}
    assert what_is_wrong(atoms, **fine) is None
    assert explosion(atoms, 300, 4000) is None
    assert closest_pair(atoms) is None
    strong = np.zeros((3, 3))
    strong[1, 0] = 60
    assert "atom 1 (H) is 60 eV/Å" in str(what_is_wrong(atoms, **{**fine, "forces": strong}))
    assert "is no number" in str(what_is_wrong(atoms, **{**fine, "forces": strong * np.nan}))
    assert "nan" in str(what_is_wrong(atoms, **{**fine, "energy": np.nan}))
    atoms.set_momenta(np.full((3, 3), 20.0))
    assert "it reached" in str(explosion(atoms, 300, 4000))
    assert "an atom reached" in str(explosion(atoms, 300, 1e9))
    atoms.positions[1] = atoms.positions[0] + [0.2, 0, 0]
    assert "0.200 Å apart" in str(closest_pair(atoms))
    atoms.positions[1] = np.nan
    assert "not finite" in str(explosion(atoms, 300, 4000))


def test_which_atoms_are_at_one_place_and_what_would_help() -> None:
    assert pytest.approx(CLOSEST_TO_CUTOFF * REACH) == COINCIDENT
    crowd = Atoms("H100000", np.zeros((100_000, 3)))
    assert coincidence_of(crowd) is not None  # without 10^10 pairs
    wrapped = Atoms("C2", [[0, 0, 0.1], [0, 0, 3.9]], cell=[4, 4, 4], pbc=True)
    clash = clash_of(wrapped)
    assert clash is not None
    assert clash.can_be_relaxed
    assert clash.words == "atom 0 (C) and an image of atom 1 (C) are 0.200 Å apart"
    assert "Relax it first, torchmd-net relax, or check the cell: its lattice vectors are 4, 4, 4 Å long" in clash.told
    assert coincidence_of(wrapped) is None
