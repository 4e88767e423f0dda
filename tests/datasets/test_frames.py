"""Long arrays give the same systems and batches as objects collated one by one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from torchmdnet.datasets.frames import Field, FrameBuilder, Frames, JoinedFrames
from torchmdnet.errors import DataError


def make_samples(count: int, seed: int = 0, size: int | None = None) -> list[dict]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        n = size or int(rng.integers(1, 9))
        samples.append(
            {
                "z": rng.integers(1, 119, n),
                "pos": rng.normal(size=(n, 3)),
                "y": rng.normal() * 1e5,
                "neg_dy": rng.normal(size=(n, 3)),
                "box": rng.normal(size=(3, 3)),
                "q": int(rng.integers(-2, 3)),
            }
        )
    return samples


@pytest.mark.parametrize("size", [None, 5], ids=["different sizes", "one size"])
@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_gathered_batch_equals_a_collated_one(tmp_path, size, where):
    samples = make_samples(40, size=size)
    frames = Frames.from_samples(samples, None if where == "memory" else tmp_path)
    rows = np.array([3, 39, 0, 3, -1, 17])
    batch = frames.batch(rows)
    expected = Batch.from_data_list([frames.data(int(i)) for i in rows])
    assert set(batch.keys()) == set(expected.keys())
    for name in expected.keys():  # noqa: SIM118 (a Batch iterates over (name, value) pairs)
        assert batch[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert batch.num_graphs == len(rows)


def test_samples_hold_exactly_what_was_put_in():
    samples = make_samples(10)
    frames = Frames.from_samples(samples)
    for i, sample in enumerate(samples):
        data = frames.data(i)
        np.testing.assert_array_equal(data.z, sample["z"])
        np.testing.assert_array_equal(data.pos, sample["pos"])
        assert data.z.dtype == torch.int64
        assert data.pos.dtype == torch.float64
        assert data.y.shape == (1, 1)
        assert data.y.item() == sample["y"]
        np.testing.assert_array_equal(data.neg_dy, sample["neg_dy"].astype(np.float32))
        assert data.box.shape == (1, 3, 3)
        assert data.q.shape == (1,)
        assert data.q.item() == sample["q"]


def test_a_gathered_batch_splits_back_into_its_samples():
    frames = Frames.from_samples(make_samples(12))
    parts = frames.batch([7, 2, 11]).to_data_list()
    for part, row in zip(parts, [7, 2, 11], strict=True):
        original = frames.data(row)
        assert set(part.keys()) == set(original.keys())
        for name in original.keys():  # noqa: SIM118
            torch.testing.assert_close(part[name], original[name], rtol=0, atol=0)


def test_an_empty_request_gives_an_empty_batch():
    batch = Frames.from_samples(make_samples(3)).batch([])
    assert batch.num_graphs == 0
    assert batch.pos.shape == (0, 3)


def test_an_index_outside_the_data_is_refused():
    frames = Frames.from_samples(make_samples(3))
    for wrong in (3, -4):
        with pytest.raises(IndexError, match="3 systems"):
            frames.gather([0, wrong])
        with pytest.raises(IndexError, match="3 systems"):
            frames.sample(wrong)


def test_indices_may_be_lists_arrays_or_tensors():
    frames = Frames.from_samples(make_samples(6))
    expected = frames.gather([4, 1])["pos"]
    for form in (np.array([4, 1]), torch.tensor([4, 1]), (4, 1)):
        torch.testing.assert_close(frames.gather(form)["pos"], expected, rtol=0, atol=0)


def test_pickling_mapped_frames_stores_a_path_instead_of_the_data(tmp_path):
    frames = Frames.from_samples(make_samples(500), tmp_path)
    text = pickle.dumps(frames)
    assert len(text) < 500
    assert frames.nbytes > 50_000
    again = pickle.loads(text)
    torch.testing.assert_close(again.gather([3, 400])["pos"], frames.gather([3, 400])["pos"], rtol=0, atol=0)
    assert isinstance(again.atoms["pos"], np.memmap)


def test_pickling_reopens_raw_mapped_arrays_and_parts_of_them(tmp_path):
    path = tmp_path / "pos.mmap"
    numbers = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    numbers.tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(1000, 3))
    z = np.ones(900, dtype=np.int8)
    frames = Frames(np.arange(0, 901, 9), {"z": z, "pos": mapped[100:]})
    text = pickle.dumps(frames)
    assert len(text) < 4000
    again = pickle.loads(text)
    np.testing.assert_array_equal(again.atoms["pos"], numbers[100:])
    assert again.gather([0])["z"].dtype == torch.int64


def test_mapped_frames_work_in_a_spawned_process(tmp_path):
    frames = Frames.from_samples(make_samples(20), tmp_path / "frames")
    (tmp_path / "frames.pkl").write_bytes(pickle.dumps(frames))
    code = "import pickle, sys; print(float(pickle.load(open(sys.argv[1], 'rb')).gather([5])['y']))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "frames.pkl"], capture_output=True, text=True)
    assert float(done.stdout) == frames.gather([5])["y"].item(), done.stderr


def test_files_are_ordinary_npy_files(tmp_path):
    samples = make_samples(20)
    Frames.from_samples(samples, tmp_path)
    pos = np.load(tmp_path / "pos.npy", allow_pickle=False)
    np.testing.assert_array_equal(pos, np.concatenate([s["pos"] for s in samples]))
    assert np.load(tmp_path / "box.npy", mmap_mode="r", allow_pickle=False).shape == (20, 3, 3)


def test_saved_frames_open_again(tmp_path):
    frames = Frames.from_samples(make_samples(20))
    frames.save(tmp_path)
    for in_memory in (True, False):
        again = Frames.open(tmp_path, in_memory=in_memory, verify=True)
        assert again.fields == frames.fields
        for name in frames.fields:
            np.testing.assert_array_equal(again[name], frames[name])


def test_a_damaged_or_incomplete_folder_is_refused(tmp_path):
    Frames.from_samples(make_samples(20), tmp_path)
    path = tmp_path / "pos.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match="incomplete"):
        Frames.open(tmp_path)
    path.write_bytes(content[:-8] + bytes(8))
    Frames.open(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        Frames.open(tmp_path, verify=True)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        Frames.open(tmp_path)
    (tmp_path / "frames.json").write_text("{")
    with pytest.raises(DataError, match="unreadable"):
        Frames.open(tmp_path)


@pytest.mark.parametrize("arrays", [3, [], {"ptr": {}}, {"ptr": 3}, {"ptr": {"level": "x"}}, {}])
def test_a_description_of_something_else_is_refused(tmp_path, arrays):
    Frames.from_samples(make_samples(2), tmp_path)
    manifest = json.loads((tmp_path / "frames.json").read_text())
    (tmp_path / "frames.json").write_text(json.dumps({**manifest, "arrays": arrays}))
    with pytest.raises(DataError, match="checksum"):
        Frames.open(tmp_path)
    del manifest["crc32"]  # as earlier versions wrote it
    (tmp_path / "frames.json").write_text(json.dumps({**manifest, "arrays": arrays}))
    with pytest.raises(DataError, match=r"frames\.json describes no arrays"):
        Frames.open(tmp_path)


def test_blocks_and_single_samples_store_the_same():
    samples = make_samples(7, size=4)
    one = Frames.from_samples(samples)
    builder = FrameBuilder()
    builder.append(samples[0])
    builder.append_block({k: np.stack([s[k] for s in samples[1:]]) for k in samples[0]})
    block = builder.finish()
    for name in one.fields:
        np.testing.assert_array_equal(block[name], one[name])
    np.testing.assert_array_equal(block.ptr, one.ptr)


def test_a_block_may_share_its_atomic_numbers():
    builder = FrameBuilder()
    builder.append_block({"z": [8, 1, 1], "pos": np.zeros((5, 3, 3)), "y": np.zeros(5)})
    np.testing.assert_array_equal(builder.finish()["z"], [8, 1, 1] * 5)


def test_a_system_with_other_labels_is_refused_by_number():
    builder = FrameBuilder()
    first, second = make_samples(2)
    builder.append(first)
    with pytest.raises(DataError, match="system 1: neg_dy is missing"):
        builder.append({**second, "neg_dy": None})
    with pytest.raises(DataError, match="system 1: stress was not in the systems before it"):
        builder.append({**second, "stress": np.zeros((3, 3))})


def test_wrong_shapes_and_values_beyond_the_type_are_refused():
    good = make_samples(1, size=4)[0]
    for change, message in [
        ({"pos": np.zeros((4, 2))}, "pos has shape"),
        ({"pos": np.zeros((3, 4))}, "pos has shape"),
        ({"neg_dy": np.zeros((3, 3))}, "neg_dy has shape"),
        ({"y": np.zeros(2)}, "y has shape"),
        ({"z": np.array([1, 2, 3, 300])}, "beyond 0 ... 255"),
        ({"z": np.array([1, 2, 3, -1])}, "beyond 0 ... 255"),
        ({"pos": np.full((4, 3), "a")}, "instead of numbers"),
    ]:
        with pytest.raises(DataError, match=message):
            FrameBuilder().append({**good, **change})


def test_extra_quantities_need_a_description():
    sample = {**make_samples(1, size=4)[0], "spin_density": np.arange(4.0)}
    with pytest.raises(DataError, match="spin_density"):
        FrameBuilder().append(sample)
    frames = Frames.from_samples([sample], fields={"spin_density": Field("atom", (), "float64")})
    np.testing.assert_array_equal(frames.data(0).spin_density, np.arange(4.0))


def test_joined_frames_behave_as_one():
    samples = make_samples(30)
    whole = Frames.from_samples(samples)
    joined = JoinedFrames([Frames.from_samples(samples[a:b]) for a, b in [(0, 4), (4, 5), (5, 30)]])
    assert len(joined) == 30
    rows = [29, 0, 4, 5, 3, 4, -30]
    one, other = whole.batch(rows), joined.batch(rows)
    for name in one.keys():  # noqa: SIM118
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)
    for got, want in zip(joined.composition(), whole.composition(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert joined.data(4).y.item() == samples[4]["y"]


def test_joining_frames_with_different_labels_is_refused():
    first, second = make_samples(2)
    second.pop("q")
    with pytest.raises(DataError, match="Part 1"):
        JoinedFrames([Frames.from_samples([first]), Frames.from_samples([second])])


def test_composition_counts_the_atoms_of_each_element():
    frames = Frames.from_samples([{"z": z, "pos": np.zeros((len(z), 3))} for z in ([8, 1, 1], [6, 1, 1, 1, 1], [8])])
    counts, elements = frames.composition()
    np.testing.assert_array_equal(elements, [1, 6, 8])
    np.testing.assert_array_equal(counts, [[2, 0, 1], [4, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(frames.composition([2, 0])[0], [[0, 0, 1], [2, 0, 1]])


def test_atomic_numbers_may_be_shared_by_all_systems(tmp_path):
    rng = np.random.default_rng(0)
    pos, z = rng.normal(size=(30, 4, 3)), np.array([8, 1, 1, 300])
    shared = Frames(np.arange(0, 121, 4), {"pos": pos.reshape(-1, 3)}, {"y": rng.normal(size=(30, 1))}, shared={"z": z})
    plain = Frames(shared.ptr, {"z": np.tile(z, 30), "pos": pos.reshape(-1, 3)}, shared.systems)
    again = pickle.loads(pickle.dumps(shared))
    shared.save(tmp_path)
    for frames in (shared, again, shared.select(range(30)), Frames.open(tmp_path)):
        one, other = frames.batch([7, 2]), plain.batch([7, 2])
        for name in ("z", "pos", "y", "batch", "ptr"):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
        assert frames.data(3).z.tolist() == z.tolist()
        for got, want in zip(frames.composition([1, 2]), plain.composition([1, 2]), strict=True):
            np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(frames["z"], plain["z"])
    joined = JoinedFrames([shared, plain])
    assert joined.gather([35, 3])["z"].tolist() == z.tolist() * 2
    with pytest.raises(DataError, match="cannot be shared"):
        Frames(np.array([0, 2, 5]), {"pos": np.zeros((5, 3))}, shared={"z": np.ones(2)})


def test_selected_systems_are_an_independent_copy():
    frames = Frames.from_samples(make_samples(9))
    part = frames.select([8, 1])
    assert len(part) == 2
    assert part["z"].dtype == np.uint8
    np.testing.assert_array_equal(part.data(0).pos, frames.data(8).pos)
