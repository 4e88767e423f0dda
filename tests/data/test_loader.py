"""The order of batches is a function of seed, epoch and process, and nothing is lost or repeated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import Dataset
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader as GeometricLoader

from torchmdnet.data.loader import EpochBatchSampler, IndexedSubset, Loader
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames


def dataset(count=11, **kwargs):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, count)
    samples = [{"z": np.full(n, 6), "pos": rng.normal(size=(n, 3)), "y": float(i)} for i, n in enumerate(sizes)]
    return FramesDataset(Frames.from_samples(samples), **kwargs)


class OneByOne(Dataset):
    """A data set without a way to collect batches."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return Data(z=torch.tensor([1]), pos=torch.zeros(1, 3), y=torch.full((1, 1), float(index)))


def energies(loader):
    return [batch.y.reshape(-1).tolist() for batch in loader]


def test_unshuffled_batches_are_ascending():
    assert energies(Loader(dataset(), EpochBatchSampler(11, 4))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_every_sample_comes_once_in_an_epoch():
    sampler = EpochBatchSampler(11, 4, shuffle=True, seed=5)
    assert sorted(np.concatenate(list(sampler)).tolist()) == list(range(11))
    assert len(sampler) == len(list(sampler)) == 3


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.manual_seed(np.random.randint(1000))  # noqa: NPY002 (the global state must not matter)
        sampler = EpochBatchSampler(50, 8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return np.concatenate(list(sampler)).tolist()

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 4)
    assert order(1, 3) != order(2, 3)


def test_iterating_draws_no_global_random_numbers():
    loader = Loader(dataset(), EpochBatchSampler(11, 4, shuffle=True))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader)
    assert torch.equal(torch.rand(3), expected)


def test_lightning_reaches_the_epoch():
    loader = Loader(dataset(), EpochBatchSampler(11, 4, shuffle=True))
    _set_sampler_epoch(loader, 7)
    assert loader.batch_sampler.epoch == 7


@pytest.mark.parametrize(("total", "size", "world"), [(11, 4, 2), (9, 4, 2), (100, 8, 3), (16, 4, 4), (7, 2, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_samples_without_repeating_any(total, size, world, shuffle):
    samplers = [EpochBatchSampler(total, size, shuffle=shuffle, rank=r, world_size=world) for r in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(b) for b in batches} == {len(samplers[0])}  # the same number of steps for all
    assert max(len(b) for own in batches for b in own) <= size
    assert min(len(b) for own in batches for b in own) >= 1
    assert sorted(np.concatenate([b for own in batches for b in own]).tolist()) == list(range(total))


@pytest.mark.parametrize(("total", "size", "world"), [(1, 4, 3), (3, 1, 2)])
def test_no_process_is_left_without_a_batch(total, size, world):
    samplers = [EpochBatchSampler(total, size, rank=r, world_size=world) for r in range(world)]
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])}
    assert set(np.concatenate([np.concatenate(list(s)) for s in samplers])) == set(range(total))


def test_an_empty_part_has_no_batches():
    loader = Loader(IndexedSubset(dataset(), torch.zeros(0, dtype=torch.int64)), EpochBatchSampler(0, 4))
    assert len(loader) == 0
    assert list(loader) == []


def test_a_subset_maps_numbers_and_collects_batches():
    subset = IndexedSubset(dataset(), torch.tensor([9, 2, 5]))
    assert len(subset) == 3
    assert subset[1].y.item() == 2
    batch = subset.batch([2, 0])
    assert isinstance(batch, Batch)
    assert batch.y.reshape(-1).tolist() == [5, 9]


@pytest.mark.parametrize("data", [dataset(), IndexedSubset(dataset(), torch.arange(11))], ids=["whole", "part"])
def test_the_loader_of_torch_geometric_reads_our_data_too(data):
    ours = list(Loader(data, EpochBatchSampler(11, 4)))
    for one, other in zip(ours, GeometricLoader(data, batch_size=4), strict=True):
        for name in ("z", "pos", "y", "batch", "ptr"):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
        assert one.num_graphs == other.num_graphs


def test_data_at_memory_speed_need_no_workers():
    sampler = EpochBatchSampler(5, 2)
    assert Loader(dataset(5), sampler, num_workers=3).num_workers == 0
    assert Loader(IndexedSubset(dataset(5), torch.arange(5)), sampler, num_workers=3).num_workers == 0
    assert Loader(dataset(5, transform=lambda data: data), sampler, num_workers=3).num_workers == 3
    assert Loader(OneByOne(), sampler, num_workers=3).num_workers == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_other_data_sets_are_collated(workers):
    loader = Loader(IndexedSubset(OneByOne(), torch.tensor([4, 0, 2])), EpochBatchSampler(3, 2), workers)
    assert energies(loader) == [[4, 0], [2]]


def test_a_transform_sees_every_sample():
    def double(data):
        data.y = 2 * data.y
        return data

    assert energies(Loader(dataset(5, transform=double), EpochBatchSampler(5, 3))) == [[0, 2, 4], [6, 8]]


def test_data_sets_take_slices_and_lists():
    data = dataset()
    assert [sample.y.item() for sample in data[2:5]] == [2, 3, 4]
    assert [sample.y.item() for sample in data[[7, -1]]] == [7, 10]
    assert len(data[np.arange(11) > 8]) == 2
    assert data[torch.tensor(3)].y.item() == data.get(3).y.item() == 3


@pytest.mark.parametrize(("total", "block"), [(1000, 10), (1003, 16), (5, 8), (320, 1)])
def test_blocks_of_neighbours_are_shuffled_with_every_sample_once(total, block):
    sampler = EpochBatchSampler(total, 7, shuffle=True, seed=3, block=block)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(np.concatenate(list(sampler)).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(total))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    window = orders[0][: 32 * block]
    assert len({row // block for row in window}) <= 33


def test_neighbours_are_those_on_disk_and_a_run_continues_inside_an_epoch():
    stored = np.argsort(np.random.default_rng(1).permutation(5000))
    rows = np.argsort(stored)  # the sample at each place of the part
    sampler = EpochBatchSampler(5000, 50, shuffle=True, block=20, neighbours=stored)
    batches = list(sampler)
    places = rows[np.concatenate(batches[:12])]
    assert len({place // 20 for place in places.tolist()}) <= 33
    sampler.skip(3)
    np.testing.assert_array_equal(np.concatenate(list(sampler)), np.concatenate(batches[3:]))


def test_data_larger_than_memory_are_read_by_workers_in_the_same_batches(tmp_path, monkeypatch):
    import torchmdnet.data.loader as home

    frames = dataset(40).frames
    frames.save(tmp_path)
    data = FramesDataset(Frames.open(tmp_path))
    plain = Loader(data, EpochBatchSampler(40, 6, shuffle=True, seed=5, block=4), num_workers=2)
    assert plain.num_workers == 0
    monkeypatch.setattr(home, "total_memory", lambda: 10)
    sampler = EpochBatchSampler(40, 6, shuffle=True, seed=5, block=4)
    loader = Loader(data, sampler, num_workers=2)
    assert loader.num_workers == 2
    expected = energies(plain)
    assert energies(loader) == expected
    sampler.skip(2)  # exactly where an interrupted run was
    assert energies(loader) == expected[2:]
