"""COMP6: gradients in the first version become forces, and its parts stand in a row."""

from __future__ import annotations

import io
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import shared
from file_server import serve
from torch_geometric.data import Batch

from torchmdnet.datasets.ani import ANI1, ANI2X
from torchmdnet.datasets.comp6 import ANIMD, S66X8, COMP6Base, COMP6v1, COMP6v2, DrugBank, GDB07to09, GDB10to13
from torchmdnet.errors import ConfigError, DataError

HARTREE = 27.211386246


def hdf5(seed: int, molecules: int = 2, count: int = 3, symbols: str = "CHHO") -> bytes:
    content, rng, size = io.BytesIO(), np.random.default_rng(seed), len(symbols)
    with h5py.File(content, "w") as file:
        for number in range(molecules):
            group = file.create_group(f"top/mol{number:02d}")
            group["species"] = np.array([symbol.encode() for symbol in symbols])
            group["coordinates"] = rng.normal(size=(count, size, 3)).astype(np.float32)
            group["energies"] = rng.normal(size=count) - 100
            group["forces"] = rng.normal(size=(count, size, 3)).astype(np.float32)
            charges = rng.normal(size=(count, size)).astype(np.float32)
            group["cm5"] = np.concatenate([charges, charges.sum(axis=1, keepdims=True)], axis=1)
            group["lot"] = np.array([b"wb97x/6-31g*"])
    return content.getvalue()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "raw").mkdir()
    seed = 0
    for part in COMP6v1.PARTS:
        for file in part.files:
            (tmp_path / "raw" / file).write_bytes(hdf5(seed, symbols="CHHO" if part is not S66X8 else "OHH"))
            seed += 1
    return tmp_path


def test_gradients_become_forces(root):
    data = DrugBank(root)
    with h5py.File(root / "raw" / "drugbank_testset.h5") as file:
        molecule = file["top/mol01"]
        np.testing.assert_allclose(data[4].neg_dy, -molecule["forces"][1] * HARTREE, rtol=1e-6)
        assert data[4].y.item() == molecule["energies"][1] * HARTREE
        np.testing.assert_array_equal(data[4].pos, molecule["coordinates"][1])
    assert data[4].z.tolist() == [6, 1, 1, 8]


def test_charges_are_stored_when_asked_for_in_every_part(root):
    data = DrugBank(root, labels=["charges"])
    with h5py.File(root / "raw" / "drugbank_testset.h5") as file:
        np.testing.assert_array_equal(data[4].pq, file["top/mol01/cm5"][1, :-1])  # the last column is the sum
    whole = COMP6v1(root, labels=["charges"])
    assert all(sample.pq.shape == sample.z.shape for sample in whole)
    assert torch.equal(whole[-1].pq, S66X8(root, labels=["charges"])[-1].pq)
    with pytest.raises(ConfigError, match=r"S66X8 has no 'dipole' to learn\. It has charges"):
        S66X8(root, labels=["dipole"])


def test_molecules_are_named_by_file_and_group(root):
    names = [sample.mol_id for sample in GDB07to09(root).sample_iter(mol_ids=True)]
    assert names[0] == "gdb11_07_test500.h5_mol00"
    assert names[-1] == "gdb11_09_test500.h5_mol01"
    assert len(names) == 3 * 6


def test_the_parts_stand_in_a_row(root):
    whole, parts = COMP6v1(root), [part(root) for part in COMP6v1.PARTS]
    assert len(whole) == sum(map(len, parts)) == 11 * 6
    expected = torch.cat([part.batch(range(len(part))).y for part in parts])
    assert torch.equal(whole.batch(range(len(whole))).y, expected)
    assert torch.equal(whole[-1].pos, parts[-1][-1].pos)


def test_batches_mix_the_parts(root):
    data, order = COMP6v1(root), [65, 0, 30, 64, 7]
    batch, expected = data.batch(order), Batch.from_data_list([data[i] for i in order])
    for key in ("z", "pos", "y", "neg_dy", "batch", "ptr"):
        assert torch.equal(batch[key], expected[key])


def test_a_transform_is_called_once(root):
    def add_one(sample):
        sample.y = sample.y + 1
        return sample

    assert COMP6v1(root, transform=add_one)[3].y == COMP6v1(root)[3].y + 1
    assert torch.equal(COMP6v1(root, transform=add_one).batch([3, 4]).y, COMP6v1(root).batch([3, 4]).y + 1)


def test_a_filter_may_leave_a_part_empty(root):
    assert len(COMP6v1(root, pre_filter=lambda sample: len(sample.z) == 3)) == 6
    with pytest.raises(DataError, match="COMP6v1: no system is left after the filters"):
        COMP6v1(root, pre_filter=lambda sample: False)


def test_parts_of_the_whole_can_be_taken_and_sent_to_workers(root):
    data = pickle.loads(pickle.dumps(COMP6v1(root)[[60, 2]]))
    assert torch.equal(data[1].y, ANIMD(root)[2].y)
    assert len(pickle.dumps(data)) < 2000


def test_element_energies_are_those_of_isolated_atoms_in_all_of_version_1(root):
    energies = torch.tensor([ANI1._ELEMENT_ENERGIES[z] * HARTREE for z in (1, 6, 7, 8)], dtype=torch.float32)
    for kind in (*COMP6v1.PARTS, COMP6v1):
        assert torch.equal(kind(root).get_atomref()[[1, 6, 7, 8], 0], energies)
    assert COMP6v2._ELEMENT_ENERGIES == ANI2X._ELEMENT_ENERGIES


def test_each_file_is_downloaded_from_its_folder(tmp_path):
    addresses = [address for remote in GDB10to13.remotes.fget(GDB10to13) for address in remote.urls]
    place = "https://raw.githubusercontent.com/isayev/COMP6/master/COMP6v1/GDB10to13"
    assert addresses[0] == f"{place}/gdb11_10_test500.h5"
    assert addresses[-1] == f"{place}/gdb13_13_test1000.h5"
    with serve() as publisher:
        publisher.files = {file: hdf5(0) for file in GDB10to13.files}
        assert len(GDB10to13(tmp_path, mirror=publisher.address)) == 24
        assert sorted(path for path, _ in publisher.requests) == sorted(f"/{file}" for file in GDB10to13.files)


def test_version_2_stores_forces_as_forces(tmp_path):
    path = tmp_path / "raw" / "comp6v2_final_h5" / "COMP6v2_wB97X-631Gd.h5"
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for size in (4, 12):
            group = file.create_group(f"{size:03d}")
            group["species"] = rng.choice([1, 6, 7, 8, 9, 16, 17], (5, size))
            group["coordinates"] = rng.normal(size=(5, size, 3)).astype(np.float32)
            group["energies"] = rng.normal(size=5)
            group["forces"] = rng.normal(size=(5, size, 3))
            group["cm5_atomic_charges"] = rng.normal(size=(5, size))
    data = COMP6v2(tmp_path, labels=["charges"])
    with h5py.File(path) as file:
        np.testing.assert_allclose(data[7].neg_dy, file["012/forces"][2] * HARTREE, rtol=1e-6)
        assert data[7].z.tolist() == file["012/species"][2].tolist()
        np.testing.assert_allclose(data[7].pq, file["012/cm5_atomic_charges"][2], rtol=1e-6)


def test_the_published_s66x8_is_read_in_full(tmp_path):
    source = shared("data/raw/comp6/s66x8_wb97x6-31gd.h5")
    (tmp_path / "raw").mkdir()
    shutil.copy(source, tmp_path / "raw")
    data = S66X8(tmp_path)
    assert len(data) == 528
    assert issubclass(S66X8, COMP6Base)
    number = 0
    with h5py.File(source) as file:
        for molecule in file["s66x8"].values():
            for i in range(len(molecule["energies"])):
                sample = data[number]
                assert sample.y.item() == molecule["energies"][i] * HARTREE
                np.testing.assert_allclose(sample.neg_dy, -molecule["forces"][i] * HARTREE, rtol=1e-6)
                number += 1
    assert number == 528
