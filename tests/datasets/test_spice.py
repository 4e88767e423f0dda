"""SPICE: bohr and Hartree in the file, Å and eV in the samples, filters that say what they did."""

from __future__ import annotations

import hashlib
import io
import logging
import shutil

import h5py
import numpy as np
import pytest
from conftest import shared
from file_server import serve

from torchmdnet.datasets import download
from torchmdnet.datasets.spice import SPICE, _total_charge
from torchmdnet.errors import ConfigError, DataError

HARTREE, BOHR = 27.211386246, 0.529177
MOLECULES = {  # name: atomic numbers, conformers, subset
    "C": ([6, 1, 1, 1, 1], 4, "S1"),
    "CO": ([6, 8], 3, "S2"),
    "[Na+]": ([11], 2, "S1"),
}


def content() -> bytes:
    file, rng = io.BytesIO(), np.random.default_rng(0)
    with h5py.File(file, "w") as h5:
        for name, (z, count, subset) in MOLECULES.items():
            group = h5.create_group(name)
            group["subset"] = np.array([subset.encode()], dtype=object)
            group["atomic_numbers"] = np.array(z, dtype=np.int16)
            group["conformations"] = rng.normal(size=(count, len(z), 3)).astype(np.float32)
            group["formation_energy"] = rng.normal(size=count)
            group["dft_total_energy"] = rng.normal(size=count) - 100
            group["dft_total_gradient"] = (0.05 * rng.normal(size=(count, len(z), 3))).astype(np.float32)
    return file.getvalue()


CONTENT = content()


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    return tmp_path


def names(data: SPICE) -> list[str]:
    return [sample.mol_id for sample in data.sample_iter(mol_ids=True)]


def largest_force(group: h5py.Group) -> np.ndarray:
    return np.linalg.norm(group["dft_total_gradient"][()], axis=2).max(axis=1) * HARTREE / BOHR


def test_values_are_converted_with_the_established_constants(root):
    data, number = SPICE(root, version="1.1.4"), 0
    with h5py.File(io.BytesIO(CONTENT)) as file:
        for group in file.values():
            for i in range(len(group["formation_energy"])):
                sample = data[number]
                assert sample.z.tolist() == group["atomic_numbers"][()].tolist()
                assert sample.y.item() == group["formation_energy"][i] * HARTREE
                np.testing.assert_allclose(sample.pos, group["conformations"][i] * BOHR, rtol=1e-6)
                np.testing.assert_allclose(sample.neg_dy, -group["dft_total_gradient"][i] * HARTREE / BOHR, rtol=1e-6)
                number += 1
    assert len(data) == number


def test_subsets_are_chosen_by_name(root):
    assert names(SPICE(root, version="1.1.4", subsets=["S1"])) == ["C"] * 4 + ["[Na+]"] * 2
    assert names(SPICE(root, version="1.1.4", subsets="S2")) == ["CO"] * 3
    assert len(SPICE(root, version="1.1.4", subsets=["S1", "S2"])) == 9


def test_every_nth_molecule_is_counted_before_the_subsets(root):
    assert names(SPICE(root, version="1.1.4", subsample_molecules=2)) == ["C"] * 4 + ["[Na+]"] * 2
    with pytest.raises(DataError, match=r"no conformer is left with subsets=\['S2'\], subsample_molecules=2"):
        SPICE(root, version="1.1.4", subsample_molecules=2, subsets=["S2"])


def test_large_forces_are_left_out(root):
    with h5py.File(io.BytesIO(CONTENT)) as file:
        forces = np.concatenate([largest_force(group) for group in file.values()])
        energies = np.concatenate([group["formation_energy"][()] for group in file.values()]) * HARTREE
    limit = float(np.median(forces))
    data = SPICE(root, version="1.1.4", max_gradient=limit)
    assert data.batch(range(len(data))).y.flatten().tolist() == energies[forces <= limit].tolist()
    assert len(SPICE(root, version="1.1.4", max_gradient=0)) == 9


def test_nothing_left_is_an_error_that_repeats_the_filters(root):
    with pytest.raises(DataError, match=r"SPICE: no conformer is left with max_gradient=0.0001"):
        SPICE(root, version="1.1.4", max_gradient=1e-4)


def test_an_unknown_subset_is_an_error_that_lists_the_known_ones(root):
    with pytest.raises(DataError, match=r"subsets: SPICE 1.1.4 has no 's1'. .*Choose from 'S1', 'S2'"):
        SPICE(root, version="1.1.4", subsets=["S2", "s1"])


def test_an_unknown_version_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"version: '1.1.5' is not published. Did you mean .* Choose from 1.0, 1.1,"):
        SPICE(tmp_path, version="1.1.5")
    assert list(tmp_path.iterdir()) == []


def test_every_combination_of_arguments_has_its_own_arrays(root):
    SPICE(root, version="1.1.4")
    name = f"SPICE-{hashlib.md5(b'1.1.4NoneNone1').hexdigest()}"
    assert (root / "processed" / f"{name}.y.mmap").exists()
    assert len(SPICE(root, version="1.1.4", subsets=["S2"])) == 3
    assert len(SPICE(root, version="1.1.4")) == 9


def test_molecules_without_proper_positions_are_left_out_with_a_warning(root, caplog):
    place = root / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5"
    with h5py.File(place, "a") as file:
        del file["CO/conformations"]
        file["CO/conformations"] = np.zeros(0)
    with caplog.at_level(logging.WARNING):
        assert len(SPICE(root, version="1.1.4")) == 6
    assert "CO is left out" in caplog.text


def test_a_download_with_the_wrong_checksum_is_refused_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    with serve() as publisher:
        publisher.files["SPICE-1.1.4.hdf5"] = CONTENT
        for _ in range(2):
            with pytest.raises(DataError, match=r"wrong checksum: MD5 \w+ instead of f27d4c81da0e37d6547276bf6b4ae6a1"):
                SPICE(tmp_path, version="1.1.4", mirror=publisher.address)
    assert not list(tmp_path.rglob("*.hdf5"))
    assert not list(tmp_path.rglob("*.mmap"))


def test_a_download_with_the_right_checksum_is_used(tmp_path, monkeypatch):
    right = hashlib.md5(CONTENT).hexdigest()
    with serve() as publisher:
        monkeypatch.setitem(SPICE.VERSIONS, "1.1.4", (publisher.address, "SPICE-1.1.4.hdf5", right))
        publisher.files["SPICE-1.1.4.hdf5"] = CONTENT
        assert len(SPICE(tmp_path, version="1.1.4")) == 9
        assert len(SPICE(tmp_path, version="1.1.4", subsets="S2")) == 3
        assert len(publisher.requests) == 1


def test_deleting_the_download_leaves_the_arrays_usable(root):
    SPICE(root, version="1.1.4")
    shutil.rmtree(root / "raw")
    assert len(SPICE(root, version="1.1.4")) == 9


def test_a_piece_of_the_published_file_is_read_in_full(tmp_path):
    source = shared("data/raw/spice/SPICE-1.1.4_n2.hdf5")
    place = tmp_path / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5"
    place.parent.mkdir(parents=True)
    shutil.copy(source, place)
    data = SPICE(tmp_path, version="1.1.4")
    with h5py.File(source) as file:
        energies = np.concatenate([group["formation_energy"][()] for group in file.values()])
        gradients = np.concatenate([group["dft_total_gradient"][()].reshape(-1, 3) for group in file.values()])
    batch = data.batch(range(len(data)))
    assert batch.y.flatten().tolist() == (energies * HARTREE).tolist()
    np.testing.assert_allclose(batch.neg_dy, -gradients * HARTREE / BOHR, rtol=1e-6, atol=1e-9)
    kept = SPICE(tmp_path, version="1.1.4", subsets="SPICE DES370K Single Points Dataset Supplement v1.0")
    assert set(names(kept)) == {"C#C.[Na+]"}


@pytest.fixture
def with_more(root):
    """Dipoles of all molecules, charges of all but one, and SMILES with formal charges."""
    place = root / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5"
    rng = np.random.default_rng(5)
    with h5py.File(place, "a") as file:
        for name, group in file.items():
            n, size = group["conformations"].shape[:2]
            smiles = {"C": "[H:1][C:2]([H:3])([H:4])[H:5]", "CO": "[C-:1]#[O+:2]", "[Na+]": "[Na+:1]"}[name]
            group["smiles"] = np.array([smiles.encode()], dtype=object)
            group["scf_dipole"] = rng.normal(size=(n, 3)).astype(np.float32)
            if name != "CO":
                group["mbis_charges"] = rng.normal(size=(n, size, 1)).astype(np.float32)
    return root


def test_dipoles_and_charges_are_stored_when_asked_for(with_more):
    plain = SPICE(with_more, version="1.1.4")
    data = SPICE(with_more, version="1.1.4", labels=["dipole", "charges"])
    assert sorted(plain[0].keys()) == ["neg_dy", "pos", "y", "z"]
    assert data.name != plain.name
    with h5py.File(with_more / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5") as file:
        np.testing.assert_allclose(data[0].dp[0], file["C"]["scf_dipole"][0] * BOHR, rtol=1e-6)
        np.testing.assert_array_equal(data[1].pq, file["C"]["mbis_charges"][1, :, 0])
    assert [int(sample.q) for sample in data] == [0] * 7 + [1] * 2
    assert [bool(np.isnan(sample.pq).any()) for sample in data] == [False] * 4 + [True] * 3 + [False] * 2


def test_another_label_is_refused_with_those_there_are(with_more):
    with pytest.raises(ConfigError, match=r"SPICE has no 'charge' to learn. Did you mean 'charges'"):
        SPICE(with_more, version="1.1.4", labels=["charge"])


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [("CC(=O)[O-]", -1), ("[NH3+][C@@H](C)C([O-])=O", 0), ("[Ca+2]", 2), ("[Fe+++]", 3), ("[O--]", -2), ("C#N", 0)],
)
def test_the_total_charge_is_the_sum_of_the_formal_ones(smiles, charge):
    assert _total_charge(np.array([smiles.encode()], dtype=object)) == charge


def test_dipoles_of_the_published_file_are_those_of_its_charges(tmp_path):
    """MBIS charges and atomic dipoles add up to the dipole of the density, so unit and origin are right."""
    source = shared("data/raw/spice/SPICE-1.1.4_n2.hdf5")
    place = tmp_path / "raw" / "spice" / "1.1.4" / "SPICE-1.1.4.hdf5"
    place.parent.mkdir(parents=True)
    shutil.copy(source, place)
    with h5py.File(source) as file:
        (name, molecule) = next((name, group) for name, group in file.items() if "mbis_dipoles" in group)
        local = molecule["mbis_dipoles"][()].sum(axis=1) * BOHR
    data = SPICE(tmp_path, version="1.1.4", labels=["dipole", "charges"])
    first = names(data).index(name)
    for i in range(3):
        sample = data[first + i]
        np.testing.assert_allclose(sample.pq.numpy() @ sample.pos.numpy() + local[i], sample.dp[0], atol=2e-3)
        assert round(float(sample.pq.sum())) == int(sample.q)
