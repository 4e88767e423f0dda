"""Mapped data sets: documented files, one batch per gather, and a cache that is never stale."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader as GeometricLoader

from torchmdnet.datasets.memdataset import MemmappedDataset, conformers
from torchmdnet.errors import ConfigError, DataError

SIZES = (3, 5, 1)
EACH = 7


def make_arrays(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(size)
    return {
        "z": rng.integers(1, 118, size),
        "pos": rng.normal(size=(EACH, size, 3)).astype(np.float32),
        "y": rng.normal(size=EACH) * 1e6,
        "neg_dy": rng.normal(size=(EACH, size, 3)).astype(np.float32),
        "q": rng.integers(-3, 4, EACH),
        "pq": rng.normal(size=(EACH, size)).astype(np.float32),
        "dp": rng.normal(size=(EACH, 3)).astype(np.float32),
    }


class Blocks(MemmappedDataset):
    built = 0

    def blocks(self):
        type(self).built += 1
        for size in SIZES:
            arrays = make_arrays(size)
            yield conformers(arrays.pop("z"), arrays.pop("pos"), notes={"mol_id": [f"m{size}"] * EACH}, **arrays)


class Samples(MemmappedDataset):
    """A subclass as users write them: one system at a time."""

    def sample_iter(self, mol_ids=False):
        for size in SIZES:
            a = make_arrays(size)
            for i in range(EACH):
                yield Data(
                    z=torch.tensor(a["z"]),
                    pos=torch.tensor(a["pos"][i]),
                    y=torch.tensor(a["y"][i]).reshape(1, 1),
                    neg_dy=torch.tensor(a["neg_dy"][i]),
                    q=torch.tensor(a["q"][i]),
                    pq=torch.tensor(a["pq"][i]),
                    dp=torch.tensor(a["dp"][i]),
                )


class FromFile(MemmappedDataset):
    """Energies of single atoms, one a line."""

    def __init__(self, root, path, **kwargs):
        self.path = path
        super().__init__(root, properties=("y",), **kwargs)

    @property
    def source_files(self):
        return [str(self.path)]

    def blocks(self):
        y = np.loadtxt(self.path, ndmin=1)
        yield conformers(np.ones(1), np.zeros((len(y), 1, 3)), y=y)


def test_samples_have_the_documented_shapes_and_types(tmp_path):
    sample = Blocks(tmp_path)[8]
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in sample.to_dict().items()}
    assert shapes == {
        "z": ((5,), torch.int64),
        "pos": ((5, 3), torch.float32),
        "y": ((1, 1), torch.float64),
        "neg_dy": ((5, 3), torch.float32),
        "q": ((), torch.int64),
        "pq": ((5,), torch.float32),
        "dp": ((1, 3), torch.float32),
    }


@pytest.mark.parametrize("kind", [Blocks, Samples])
def test_every_label_comes_back_as_it_was(tmp_path, kind):
    data = kind(tmp_path)
    assert len(data) == len(SIZES) * EACH
    for number, (size, i) in enumerate(itertools.product(SIZES, range(EACH))):
        arrays, sample = make_arrays(size), data[number]
        assert sample.z.tolist() == arrays.pop("z").tolist()
        for name, values in arrays.items():
            np.testing.assert_array_equal(np.asarray(sample[name]).reshape(values[i].shape), values[i])


def test_files_have_the_documented_names_types_and_lengths(tmp_path):
    Blocks(tmp_path)
    folder = tmp_path / "processed"
    atoms, systems = sum(SIZES) * EACH, len(SIZES) * EACH
    layout = {
        "idx": ("<i8", systems + 1),
        "z": ("i1", atoms),
        "pos": ("<f4", 3 * atoms),
        "y": ("<f8", systems),
        "neg_dy": ("<f4", 3 * atoms),
        "q": ("i1", systems),
        "pq": ("<f4", atoms),
        "dp": ("<f4", 3 * systems),
    }
    arrays = {name: np.fromfile(folder / f"Blocks.{name}.mmap", dtype) for name, (dtype, _) in layout.items()}
    assert {name: len(array) for name, array in arrays.items()} == {name: n for name, (_, n) in layout.items()}
    assert arrays["idx"].tolist() == [0, *np.cumsum(np.repeat(SIZES, EACH))]
    np.testing.assert_array_equal(arrays["y"][:EACH], make_arrays(SIZES[0])["y"])
    assert {path.suffix for path in folder.iterdir()} == {".mmap", ".json"}


def test_files_of_an_earlier_release_are_opened(tmp_path):
    folder = tmp_path / "processed"
    folder.mkdir()
    np.array([0, 1, 3], "<i8").tofile(folder / "Old.idx.mmap")
    np.array([1, 6, 8], "i1").tofile(folder / "Old.z.mmap")
    np.arange(9, dtype="<f4").tofile(folder / "Old.pos.mmap")
    np.array([-0.5, -113.0], "<f8").tofile(folder / "Old.y.mmap")

    class Old(MemmappedDataset):
        def sample_iter(self, mol_ids=False):
            raise AssertionError("the source must not be read")

    data = Old(tmp_path, properties=("y",))
    assert data[1].z.tolist() == [6, 8]
    assert data[1].pos.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert data[1].y.tolist() == [[-113.0]]


@pytest.mark.parametrize("order", [[0], [20, 3, 3, 8], list(range(21)), [-1, -21]])
def test_a_batch_equals_its_samples_collated_one_by_one(tmp_path, order):
    data = Blocks(tmp_path)
    batch, expected = data.batch(order), Batch.from_data_list([data[i] for i in order])
    assert set(batch.keys()) == set(expected.keys())
    for key in expected.keys():  # noqa: SIM118
        assert batch[key].dtype == expected[key].dtype, key
        assert torch.equal(batch[key], expected[key]), key
    assert batch.dp.shape == (len(order), 3)
    assert batch.num_graphs == len(order)


def test_parts_of_a_set_are_sets_of_the_same_kind(tmp_path):
    data = Blocks(tmp_path)
    part = data[torch.tensor([20, 5, 9])][1:]
    assert isinstance(part, Blocks)
    assert len(part) == 2
    assert torch.equal(part[0].pos, data[5].pos)
    assert torch.equal(part.batch([1, 0]).y, torch.cat([data[9].y, data[5].y]))
    assert len(data[np.arange(21) % 2 == 0]) == 11


def test_a_transform_is_called_once_for_each_sample(tmp_path):
    calls = []

    def transform(sample):
        calls.append(sample)
        sample.y = sample.y * 0
        return sample

    data = Blocks(tmp_path, transform=transform)
    assert data[3].y == 0
    assert len(calls) == 1
    assert data.batch([0, 1]).y.tolist() == [[0], [0]]
    assert len(calls) == 3


def test_filters_and_transforms_before_storing_are_applied(tmp_path):
    def shift(sample):
        sample.pos = sample.pos + 1
        return sample

    data = Blocks(tmp_path, pre_filter=lambda sample: len(sample.z) == 5, pre_transform=shift)
    assert len(data) == EACH
    np.testing.assert_allclose(data[0].pos, make_arrays(5)["pos"][0] + 1)


def test_names_of_the_source_come_with_iterated_samples_only(tmp_path):
    data = Blocks(tmp_path)
    assert [sample.mol_id for sample in data.sample_iter(mol_ids=True)] == ["m3"] * 7 + ["m5"] * 7 + ["m1"] * 7
    assert "mol_id" not in next(data.sample_iter())
    assert "mol_id" not in data[0]


def test_the_source_is_read_once(tmp_path):
    Blocks.built = 0
    for _ in range(3):
        Blocks(tmp_path)
    assert Blocks.built == 1


def test_another_filter_makes_the_arrays_anew(tmp_path):
    assert len(Blocks(tmp_path, pre_filter=lambda sample: len(sample.z) == 5)) == 7
    assert len(Blocks(tmp_path, pre_filter=lambda sample: len(sample.z) > 1)) == 14
    assert len(Blocks(tmp_path)) == 21


def test_more_properties_than_stored_make_the_arrays_anew(tmp_path):
    assert "neg_dy" not in Blocks(tmp_path, properties=("y",))[0]
    assert "neg_dy" in Blocks(tmp_path, properties=("y", "neg_dy"))[0]


def test_a_changed_source_makes_the_arrays_anew(tmp_path):
    source = tmp_path / "energies.txt"
    source.write_text("1 2")
    assert len(FromFile(tmp_path, source)) == 2
    source.write_text("1 2 3 4 5")
    assert len(FromFile(tmp_path, source)) == 5
    source.write_text("1 2 3 4 6")
    assert FromFile(tmp_path, source)[4].y == 6


def test_a_source_that_was_only_touched_is_not_read_again(tmp_path, monkeypatch):
    source = tmp_path / "energies.txt"
    source.write_text("1 2")
    FromFile(tmp_path, source)
    os.utime(source, ns=(1, 1))
    monkeypatch.setattr(FromFile, "process", lambda self: pytest.fail("read again"))
    assert len(FromFile(tmp_path, source)) == 2


def test_files_older_than_their_source_are_made_anew(tmp_path):
    source = tmp_path / "energies.txt"
    source.write_text("1 2")
    FromFile(tmp_path, source)
    (tmp_path / "processed" / "FromFile.json").unlink()  # as an earlier release leaves them
    for path in (tmp_path / "processed").iterdir():
        os.utime(path, ns=(1, 1))
    source.write_text("1 2 3")
    assert len(FromFile(tmp_path, source)) == 3


@pytest.mark.parametrize("damage", ["truncate", "delete", "unfinished"])
def test_damaged_arrays_are_made_anew(tmp_path, damage):
    Blocks(tmp_path)
    folder = tmp_path / "processed"
    if damage == "truncate":
        with open(folder / "Blocks.neg_dy.mmap", "r+b") as file:
            file.truncate(100)
    elif damage == "delete":
        (folder / "Blocks.y.mmap").unlink()
    else:
        (folder / "Blocks.json").write_text("{")
    assert torch.equal(Blocks(tmp_path)[0].y, torch.tensor(make_arrays(3)["y"][:1, None]))


def test_a_failure_while_storing_leaves_no_arrays(tmp_path):
    class Fails(Blocks):
        def blocks(self):
            yield from itertools.islice(super().blocks(), 1)
            raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        Fails(tmp_path)
    assert list((tmp_path / "processed").iterdir()) == []


def test_an_empty_result_is_explained(tmp_path):
    with pytest.raises(DataError, match="Blocks: no system is left after the filters"):
        Blocks(tmp_path, pre_filter=lambda sample: False)


@pytest.mark.parametrize(("z", "q"), [(300, 1), (127, -200), (70000, 128)])
def test_numbers_beyond_a_byte_are_stored_in_full(tmp_path, z, q):
    class Large(MemmappedDataset):
        def blocks(self):
            yield conformers(np.array([1, 2]), np.zeros((3, 2, 3)), q=np.array([1, 2, 3]))
            yield conformers(np.array([1, z]), np.zeros((1, 2, 3)), q=np.array([q]))

    data = Large(tmp_path, properties=("q",))
    assert data[1].z.tolist() == [1, 2]
    assert data[3].z.tolist() == [1, z]
    assert data.batch([3, 2]).q.tolist() == [q, 3]
    assert Large(tmp_path, properties=("q",))[3].q == q


def test_forces_alone_are_enough(tmp_path):
    data = Blocks(tmp_path, properties=("neg_dy",))
    assert set(data[0].keys()) == {"z", "pos", "neg_dy"}
    assert data.get_atomref() is None


def test_a_property_the_source_lacks_is_named(tmp_path):
    class NoCharges(MemmappedDataset):
        def blocks(self):
            yield conformers(np.ones(1), np.zeros((1, 1, 3)), y=np.zeros(1))

    with pytest.raises(DataError, match="system 0 has no 'q'"):
        NoCharges(tmp_path, properties=("y", "q"))


def test_an_unknown_property_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match=r"'neg_dx' is not available\. Did you mean 'neg_dy'"):
        Blocks(tmp_path, properties=("neg_dx",))


@pytest.mark.parametrize("root", [None, ""])
def test_a_missing_root_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="root is missing"):
        Blocks(root)
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Blocks("~/data")
    assert (tmp_path / "data" / "processed" / "Blocks.y.mmap").exists()


def test_pickling_stores_where_the_files_are(tmp_path):
    data = Blocks(tmp_path)
    text = pickle.dumps(data[2:])
    assert len(text) < 2000
    assert torch.equal(pickle.loads(text)[0].pos, data[2].pos)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_open_the_files_themselves(tmp_path, start):
    data = Blocks(tmp_path)
    loader = DataLoader(
        data, batch_size=8, num_workers=1, collate_fn=Batch.from_data_list, multiprocessing_context=start
    )
    assert torch.equal(torch.cat([batch.y for batch in loader]), data.batch(range(21)).y)


def test_loaders_of_torch_geometric_collate_the_same_batches(tmp_path):
    data = Blocks(tmp_path)
    for part in (data, data[:], torch.utils.data.Subset(data, range(21))):
        batches = list(GeometricLoader(part, batch_size=8))
        assert torch.equal(torch.cat([batch.pos for batch in batches]), data.batch(range(21)).pos)


def test_two_processes_may_start_at_once(tmp_path):
    script = (
        "import sys, numpy as np; from torchmdnet.datasets.memdataset import MemmappedDataset, conformers\n"
        "class Slow(MemmappedDataset):\n"
        "    def blocks(self):\n"
        "        open(sys.argv[1] + '/built', 'a').write('x')\n"
        "        yield conformers(np.ones(1), np.zeros((9, 1, 3)), y=np.arange(9.0))\n"
        "print(Slow(sys.argv[1], properties=('y',))[8].y.item())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].split() for process in processes] == [["8.0"], ["8.0"]]
    assert (tmp_path / "built").read_text() == "x"


def test_processing_prints_nothing(tmp_path, capfd):
    Blocks(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_while_storing_leaves_no_arrays_and_says_so(tmp_path):
    class Made(MemmappedDataset):
        def blocks(self):
            yield conformers(np.array([1, 8]), np.zeros((5000, 2, 3)), y=np.zeros(5000))

    (tmp_path / "processed").mkdir()
    (tmp_path / "processed" / "Made.pos.mmap.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"Made: the disk of .*processed is full"):
        Made(tmp_path, properties=("y",))
    assert [path.name for path in (tmp_path / "processed").iterdir() if path.suffix in (".mmap", ".tmp", ".json")] == []
    assert len(Made(tmp_path, properties=("y",))) == 5000
