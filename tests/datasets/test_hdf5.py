"""HDF5 files in the established layout, in memory and read on demand."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from torchmdnet.data.loader import EpochBatchSampler, Loader
from torchmdnet.datasets import HDF5
from torchmdnet.errors import DataError
from torchmdnet.utils import write_as_hdf5


def group(file, name, num, size, seed=0, **changes):
    rng = np.random.default_rng(seed)
    arrays = {
        "pos": rng.normal(size=(num, size, 3)).astype(np.float32),
        "types": rng.integers(1, 10, (num, size)),
        "energy": rng.normal(size=num) * 1e5,
        "forces": rng.normal(size=(num, size, 3)).astype(np.float32),
        **changes,
    }
    arrays = {key: array for key, array in arrays.items() if array is not None}
    for key, array in arrays.items():
        file[f"{name}/{key}"] = array
    return arrays


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "first", 4, 3, 1)
        group(file, "second", 5, 6, 2)
        file["_metadata/atomic_number"] = np.array([0, 1, 6])
        file["_metadata/distance_scale"] = 1e-10
    return tmp_path / "a.h5"


LIMITS = pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "on demand"])


@LIMITS
def test_samples_are_those_of_the_groups_in_order(path, limit):
    data = HDF5(str(path), limit)
    assert len(data) == 9
    assert data.gathers_in_process == (limit > 0)
    with h5py.File(path) as file:
        for row, (name, i) in enumerate([("first", i) for i in range(4)] + [("second", i) for i in range(5)]):
            sample = data[row]
            np.testing.assert_array_equal(sample.pos, file[name]["pos"][i])
            np.testing.assert_array_equal(sample.z, file[name]["types"][i])
            np.testing.assert_array_equal(sample.neg_dy, file[name]["forces"][i])
            assert sample.y.shape == (1,)
            assert sample.y.item() == file[name]["energy"][i]
            assert sample.z.dtype == torch.int64


@LIMITS
def test_a_batch_equals_collated_samples(path, limit):
    data = HDF5(path, limit)
    rows = [8, 0, 3, 0, 5]
    batch, expected = data.batch(rows), Batch.from_data_list([data[i] for i in rows])
    for name in expected.keys():  # noqa: SIM118
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert batch.y.shape == (5,)


@LIMITS
def test_metadata_become_attributes(path, limit):
    data = HDF5(path, limit)
    assert data.atomic_number.tolist() == [0, 1, 6]
    assert data.distance_scale.item() == 1e-10


@LIMITS
@pytest.mark.parametrize("num", [3, 4])
def test_types_may_be_shared_also_by_as_many_samples_as_atoms(tmp_path, limit, num):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "g", num, 3, types=np.array([8, 1, 1]), partial_charges=np.array([-0.8, 0.4, 0.4]))
    data = HDF5(tmp_path / "a.h5", limit)
    for i in range(num):
        assert data[i].z.tolist() == [8, 1, 1]
        np.testing.assert_allclose(data[i].partial_charges, [-0.8, 0.4, 0.4])
    assert data.batch([1, 0]).z.tolist() == [8, 1, 1] * 2


@LIMITS
def test_energies_may_have_a_second_axis(tmp_path, limit):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "g", 4, 3, energy=np.arange(4.0)[:, None])
    data = HDF5(tmp_path / "a.h5", limit)
    assert data[2].y.tolist() == [2.0]
    assert data.batch([3, 1]).y.tolist() == [3.0, 1.0]


def test_several_files_are_joined(path, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "b.h5", "w") as file:
        group(file, "third", 2, 2)
    assert len(HDF5(f"{path};{tmp_path / 'b.h5'}")) == 11
    assert len(HDF5([path, tmp_path / "b.h5"], 0)) == 11
    assert len(HDF5(str(tmp_path / "*.h5"))) == 11
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(HDF5("~/a.h5")) == 9


@LIMITS
def test_reference_energies_are_fitted(tmp_path, limit):
    rng = np.random.default_rng(0)
    types = rng.choice([1, 8], (20, 4))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "g", 20, 4, types=types, energy=np.where(types == 1, -13.5, -2043.0).sum(axis=1))
    table = HDF5(tmp_path / "a.h5", limit).get_atomref()
    np.testing.assert_allclose(table[[1, 8], 0], [-13.5, -2043.0], rtol=1e-5)


def test_what_write_as_hdf5_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(2):
        np.save(tmp_path / f"pos{i}.npy", rng.normal(size=(3, 3, 3)).astype(np.float32))
        np.save(tmp_path / f"z{i}.npy", np.array([8, 1, 1]))
        np.save(tmp_path / f"y{i}.npy", rng.normal(size=(3, 1)).astype(np.float32))
    files = {key: [str(tmp_path / f"{key}{i}.npy") for i in range(2)] for key in ("pos", "z", "y")}
    for tile in (True, False):
        write_as_hdf5(files, str(tmp_path / f"{tile}.h5"), tile_embed=tile)
        data = HDF5(tmp_path / f"{tile}.h5")
        assert len(data) == 6
        assert all(data[i].z.tolist() == [8, 1, 1] for i in range(6))
        assert data[4].y.item() == np.load(tmp_path / "y1.npy")[1, 0]


def test_pickling_leaves_the_file_where_it_is(path):
    data = HDF5(path, 0)
    expected = data[7].pos
    text = pickle.dumps(data)
    assert len(text) < 5000
    torch.testing.assert_close(pickle.loads(text)[7].pos, expected, rtol=0, atol=0)


@LIMITS
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_it(path, limit, workers):
    data = HDF5(path, limit)
    data[0]  # opened here first, then used in workers
    loader = Loader(data, EpochBatchSampler(9, 4), workers)
    assert loader.num_workers == (workers if limit == 0 else 0)
    torch.testing.assert_close(torch.cat([b.y for b in loader]), torch.cat([data[i].y for i in range(9)]))


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": None}, r"group 'second': energy is missing \(.*group 'first' holds pos, types, energy, forces\)"),
        ({"partial_charges": np.zeros((5, 6))}, "partial_charges is not in the other groups"),
        ({"types": None}, "group 'second': 'types' is missing"),
        ({"energy": None, "forces": None}, "group 'second': energy, forces is missing"),
        ({"pos": np.zeros((5, 6))}, r"pos has shape \(5, 6\)"),
        ({"types": np.ones(5, int)}, r"types has shape \(5,\).*so \(5, 6\) or \(6,\) is needed"),
        ({"energy": np.ones(6)}, r"energy has shape \(6,\)"),
        ({"forces": np.zeros((6, 5, 3))}, r"forces has shape \(6, 5, 3\)"),
        ({"energy": np.array([1, 2, np.nan, 3, 4])}, "group 'second', sample 2: energy is NaN"),
        ({"forces": np.full((5, 6, 3), np.inf)}, "group 'second', sample 0: forces is NaN"),
        ({"types": np.full((5, 6), 0.5)}, r"types hold 0\.5"),
        ({"energy": np.array([b"a"] * 5)}, "instead of numbers"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tmp_path, changes, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "first", 4, 3)
        group(file, "second", 5, 6, **changes)
    with pytest.raises(DataError, match=message):
        HDF5(tmp_path / "a.h5")
    with pytest.raises(DataError, match=message):
        HDF5(tmp_path / "a.h5", 0).batch(range(9))


def test_files_that_cannot_be_read_are_refused(path, tmp_path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.h5: the file cannot be read"):
        HDF5(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["_metadata/x"] = 1.0
    with pytest.raises(DataError, match="no group with samples"):
        HDF5(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["pos"] = np.zeros((3, 3))
    with pytest.raises(DataError, match="samples are expected in groups"):
        HDF5(tmp_path / "b.h5")
    with pytest.raises(DataError, match="There is no file"):
        HDF5(tmp_path / "c.h5")


def test_unknown_arguments_are_reported(path, caplog):
    HDF5(path, molecules="aspirin")
    assert "molecules have no effect" in caplog.text


@LIMITS
def test_boxes_stresses_and_weights_belong_to_each_sample(tmp_path, limit):
    rng = np.random.default_rng(3)
    first, second = ({"box": rng.normal(size=(n, 3, 3)), "stress": rng.normal(size=(n, 3, 3))} for n in (4, 5))
    second["stress"][1] = np.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "first", 4, 3, 1, **first, config_weight=np.arange(4.0))
        group(file, "second", 5, 6, 2, **second, config_weight=np.ones(5))
    data = HDF5(tmp_path / "a.h5", limit)
    assert data.runs.tolist() == [4, 5]
    batch = data.batch([3, 5])
    np.testing.assert_allclose(batch.box, [first["box"][3], second["box"][1]], rtol=1e-6)
    np.testing.assert_allclose(batch.stress[0], first["stress"][3], rtol=1e-6)
    assert torch.isnan(batch.stress[1]).all()
    assert batch.config_weight.tolist() == [3.0, 1.0]
    assert data[8].box.shape == data[8].stress.shape == (1, 3, 3)


@LIMITS
def test_a_box_of_nan_is_refused_by_sample(tmp_path, limit):
    box = np.ones((4, 3, 3))
    box[2, 0, 0] = np.nan
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group(file, "first", 4, 3, 1, box=box)
    with pytest.raises(DataError, match=r"a\.h5, group 'first', sample 2: box is NaN"):
        HDF5(tmp_path / "a.h5", limit).batch([0, 1, 2, 3])


def test_attributes_of_the_file_state_its_units_and_files_have_to_agree(tmp_path):
    for name, unit in (("a", "hartree"), ("b", "Hartree"), ("c", "eV")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            group(file, "first", 4, 3)
            file.attrs.update(energy_unit=unit, length_unit="Bohr", level_of_theory="PBE")
    data = HDF5([tmp_path / "b.h5", tmp_path / "a.h5"])
    assert (data.energy_unit, data.length_unit, data.level_of_theory) == ("Hartree", "Bohr", "PBE")
    assert HDF5.energy_unit is None
    with pytest.raises(DataError, match=r"c\.h5: energy_unit is 'eV', but 'Hartree' in the files before it"):
        HDF5([tmp_path / "a.h5", tmp_path / "c.h5"])
