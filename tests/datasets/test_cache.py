"""Cached frames are never stale, half-written or damaged."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule

from torchmdnet.datasets import cache
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Source:
    """Counts how often it is built."""

    def __init__(self):
        self.builds = 0

    def __call__(self, folder):
        self.builds += 1
        samples = [{"z": [1, 1], "pos": np.full((2, 3), float(i)), "y": float(i)} for i in range(20)]
        return Frames.from_samples(samples, folder), {"note": "kept"}


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("test/*"))


def test_the_second_time_nothing_is_built(folder):
    source = Source()
    first, notes = cache.cached_frames("test", "k" * 64, source)
    again, more = cache.cached_frames("test", "k" * 64, source)
    assert source.builds == 1
    assert notes == more == {"note": "kept"}
    np.testing.assert_array_equal(again["pos"], first["pos"])
    assert len(entries(folder)) == 1  # no lock, no scratch


def test_large_entries_are_mapped(monkeypatch):
    assert cache.cached_frames("test", "k" * 64, Source())[0].in_memory
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 100)
    frames, _ = cache.cached_frames("test", "k" * 64, Source())
    assert not frames.in_memory
    assert len(pickle.dumps(frames)) < 500


@pytest.mark.parametrize("name", ["pos.npy", "frames.json", "notes.json", "ptr.npy"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_entry_is_built_anew(folder, name, damage, caplog):
    source = Source()
    expected = cache.cached_frames("test", "k" * 64, source)[0]["pos"]
    path = entries(folder)[0] / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 255]) + content[-8:])
    frames, notes = cache.cached_frames("test", "k" * 64, source)
    assert source.builds == 2
    assert notes == {"note": "kept"}
    np.testing.assert_array_equal(frames["pos"], expected)
    assert "damaged" in caplog.text
    cache.cached_frames("test", "k" * 64, source)
    assert source.builds == 2
    assert len(entries(folder)) == 1


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("notes.json", "kept", "lost"),
        ("notes.json", '{"note": "kept"}', "0.1"),
        ("frames.json", '"<f8"', '"<i8"'),  # as many bytes
        ("frames.json", '"level": "atom"', '"level": "atoms"'),
    ],
)
def test_descriptions_that_say_something_else_are_made_anew(folder, name, before, after):
    source = Source()
    expected = cache.cached_frames("test", "k" * 64, source)[0]["pos"]
    path = entries(folder)[0] / name
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    frames, notes = cache.cached_frames("test", "k" * 64, source)
    assert source.builds == 2
    assert notes == {"note": "kept"}
    np.testing.assert_array_equal(frames["pos"], expected)


def test_an_entry_of_an_earlier_version_is_made_again_without_a_word(folder, caplog):
    source = Source()
    cache.cached_frames("test", "k" * 64, source)
    (entries(folder)[0] / "sha256sums").unlink()
    cache.cached_frames("test", "k" * 64, source)
    assert source.builds == 2
    assert not caplog.text


def test_a_source_that_fails_leaves_nothing(folder):
    def fails(where):
        Frames.from_samples([{"z": [1], "pos": np.zeros((1, 3))}], where)
        raise DataError("frame 2 is wrong")

    with pytest.raises(DataError, match="frame 2"):
        cache.cached_frames("test", "k" * 64, fails)
    assert entries(folder) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "file"))
    frames, notes = cache.cached_frames("test", "k" * 64, Source())
    assert len(frames) == 20
    assert notes == {"note": "kept"}
    assert "kept in memory" in caplog.text


def test_leftovers_of_killed_processes_go_after_a_day(folder):
    for name, age in (("old.tmp-1", 2 * 86400), ("new.tmp-2", 60)):
        path = folder / "test" / name
        path.mkdir(parents=True)
        os.utime(path, (time.time() - age,) * 2)
    cache.cached_frames("test", "k" * 64, Source())
    assert [path.name for path in entries(folder)] == ["k" * 40, "new.tmp-2"]


def test_the_place_of_the_cache_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHMDNET_CACHE", "~/here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("TORCHMDNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "torchmdnet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / ".cache" / "torchmdnet"


# ------------------------------------------------------------------------------------------------- with real files


def write(path, shift=0.0, count=5):
    frames = []
    for i in range(count):
        atoms = molecule("H2O")
        atoms.info["energy"] = i + shift
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")
    return path


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.extxyz")
    assert ASE(path)[0].y.item() == 0
    stamp = path.stat()
    write(path, shift=7.0)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time, other content
    assert ASE(path)[0].y.item() == 7


def test_other_arguments_have_their_own_entry(tmp_path, folder):
    path = write(tmp_path / "a.extxyz")
    assert len(ASE(path)) == 5
    assert len(ASE(path, index="::2")) == 3
    assert ASE(path, energy_unit="kcal/mol")[1].y.item() == pytest.approx(0.0433641, rel=1e-5)
    assert len(list(folder.glob("ase/*"))) == 3
    (tmp_path / "moved").mkdir()
    path = path.rename(tmp_path / "moved" / "b.extxyz")
    ASE(path)  # the same content under another name
    assert len(list(folder.glob("ase/*"))) == 3


def test_nothing_is_cached_when_not_wanted(tmp_path, folder):
    assert len(ASE(write(tmp_path / "a.extxyz"), cache=False)) == 5
    assert not folder.exists()


def test_processes_may_build_the_same_entry_at_once(tmp_path, folder):
    path = write(tmp_path / "a.extxyz", count=300)
    code = "import sys; from torchmdnet.datasets import ASE; d = ASE(sys.argv[1]); print(len(d), d.frames['y'].sum())"

    def run(_):
        return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    assert set(results) == {f"300 {sum(range(300))}.0\n"}
    assert len(list(folder.glob("ase/*"))) == 1
