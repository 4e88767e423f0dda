"""QM9q: energies relative to ions of the same total charge."""

from __future__ import annotations

import itertools

import h5py
import numpy as np
import pytest

from torchmdnet.datasets.qm9q import QM9q
from torchmdnet.errors import ConfigError, DataError

HARTREE, BOHR, DEBYE = 27.211386246, 0.529177, 0.2081943
MOLECULES = {"water": [8, 1, 1], "methane": [6, 1, 1, 1, 1], "ammonia": [7, 1, 1, 1]}
CHARGES = {"c0": 0, "c1": 1, "c2": -1}


def write(path, seed: int = 0, molecules=MOLECULES) -> dict:
    rng, expected = np.random.default_rng(seed), {}
    with h5py.File(path, "w") as file:
        for molecule, z in molecules.items():
            group = file.create_group(f"qm9/{molecule}")
            group["atomic_numbers"] = np.array(z)
            for quantity, unit in QM9q.UNITS.items():
                group.create_group(quantity).attrs["units"] = unit
            for conformer, charge in CHARGES.items():
                values = {
                    "positions": rng.normal(size=(len(z), 3)),
                    "energy": rng.normal() - 76,
                    "gradient_vector": 0.1 * rng.normal(size=(len(z), 3)),
                    "electronic_charge": rng.normal(size=len(z)),
                    "dipole_moment": rng.normal(size=3),
                }
                values["electronic_charge"] += (charge + 0.01 - values["electronic_charge"].sum()) / len(z)
                expected[molecule, conformer] = values
                for quantity, value in values.items():
                    group[quantity][conformer] = value
    return expected


def order(molecules=MOLECULES):
    return list(itertools.product(sorted(molecules), CHARGES))


def test_values_are_converted_with_the_established_constants(tmp_path):
    expected = write(tmp_path / "a.h5")
    data = QM9q(tmp_path, paths=str(tmp_path / "a.h5"))
    assert len(data) == 9
    for sample, (molecule, conformer) in zip(data, order(), strict=True):
        raw, z, charge = expected[molecule, conformer], MOLECULES[molecule], CHARGES[conformer]
        assert sample.z.tolist() == z
        assert int(sample.q) == charge
        reference = QM9q.compute_reference_energy(z, charge)
        assert sample.y.item() == pytest.approx(raw["energy"] * HARTREE - reference, rel=1e-14)
        np.testing.assert_array_equal(sample.pos, raw["positions"].astype(np.float32))
        np.testing.assert_allclose(sample.neg_dy, -raw["gradient_vector"] * HARTREE / BOHR, rtol=1e-6)
        np.testing.assert_allclose(sample.pq, raw["electronic_charge"], rtol=1e-6)
        np.testing.assert_allclose(sample.dp, raw["dipole_moment"][None] * DEBYE, rtol=1e-6)
    assert next(data.sample_iter(mol_ids=True)).mol_id == "ammonia"


@pytest.mark.parametrize(
    ("z", "charge", "energy"),
    [
        ([8, 1, 1], 0, -2067.62794837),
        ([8, 1, 1], 1, -2053.98603143),
        ([6, 1, 1, 1, 1], 0, -1083.26262285),
        ([6, 6, 1], 1, -2059.569690890071),
        ([6, 7, 9, 1], -1, -5238.237197980479),
    ],
)
def test_reference_energies_are_those_of_the_best_charge_states(z, charge, energy):
    assert QM9q.compute_reference_energy(z, charge) == pytest.approx(energy, abs=1e-7)


@pytest.mark.parametrize("charge", [-2, -1, 0, 1, 2])
def test_reference_energies_are_the_lowest_there_are(charge):
    z = [6, 8, 9, 7, 1]
    states = [QM9q.ELEMENT_ENERGIES[number] for number in z]
    lowest = min(
        sum(state[q] for state, q in zip(states, choice, strict=True))
        for choice in itertools.product(*states)
        if sum(choice) == charge
    )
    assert QM9q.compute_reference_energy(z, charge) == pytest.approx(lowest * HARTREE, abs=1e-9)


@pytest.mark.parametrize(("z", "charge"), [([6, 1, 1], 5), ([8, 1, 1], -4), ([16, 1, 1], 0)])
def test_what_the_table_does_not_cover_is_refused(z, charge):
    with pytest.raises(IndexError):
        QM9q.compute_reference_energy(z, charge)
    with pytest.raises(DataError):
        QM9q.compute_reference_energy(z, charge)


def test_large_forces_are_left_out(tmp_path):
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        gradient = np.zeros((3, 3))
        gradient[1, :2] = 80 * BOHR / HARTREE
        file["qm9/water/gradient_vector/c1"][...] = gradient
    data = QM9q(tmp_path, paths=str(tmp_path / "a.h5"))
    assert len(data) == 8
    assert [int(sample.q) for sample in data][6:] == [0, -1]


def test_other_files_make_other_arrays(tmp_path):
    write(tmp_path / "a.h5")
    write(tmp_path / "b.h5", molecules={"water": MOLECULES["water"]})
    assert len(QM9q(tmp_path, paths=str(tmp_path / "a.h5"))) == 9
    assert len(QM9q(tmp_path, paths=str(tmp_path / "b.h5"))) == 3
    assert len(QM9q(tmp_path, paths=str(tmp_path))) == 12
    assert (tmp_path / "processed" / "QM9q.y.mmap").exists()


def test_other_units_are_refused(tmp_path):
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["qm9/methane/energy"].attrs["units"] = "eV"
    with pytest.raises(DataError, match=r"a\.h5, molecule methane: 'energy' has the attribute units='eV' instead of"):
        QM9q(tmp_path, paths=str(tmp_path / "a.h5"))


def test_paths_are_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="paths: no file is given"):
        QM9q(tmp_path)
    with pytest.raises(DataError, match="There is no file"):
        QM9q(tmp_path, paths="/no/such/file.h5")
    with pytest.raises(DataError, match=r"holds no \.h5 file"):
        QM9q(tmp_path, paths=str(tmp_path))
