"""Samples that belong together stay together, and trajectories are cut into blocks."""

from __future__ import annotations

import logging

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from torchmdnet.config.command_line import resolve
from torchmdnet.data import DataModule
from torchmdnet.data.groups import connectivity, formulas, groups_of, trajectories
from torchmdnet.data.splits import train_val_test_split
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def frames_of(structures, **columns):
    samples = [{"z": a.numbers, "pos": a.positions, "box": a.cell.array * a.pbc[:, None], "y": 0.0} for a in structures]
    return Frames.from_samples(samples)


def shaken(name, rng, amount=0.04):
    """A molecule turned, shaken, mirrored and with its atoms in another order."""
    atoms = molecule(name)
    atoms = atoms[rng.permutation(len(atoms))]
    atoms.rotate(rng.uniform(0, 360), rng.normal(size=3))
    if rng.integers(2):
        atoms.positions[:, 0] *= -1
    atoms.positions += rng.normal(size=(len(atoms), 3)) * amount
    return atoms


def module(data=None, **options):
    options = {"train_size": None, "val_size": 0.2, "test_size": 0.2, "seed": 1, "num_workers": 0, **options}
    built = DataModule(options, data)
    built.prepare_data()
    built.setup()
    return built


def parts_of(module):
    return module.idx_train.numpy(), module.idx_val.numpy(), module.idx_test.numpy()


def test_formulas_count_elements_whatever_their_order():
    found = formulas(frames_of([Atoms("OH2"), Atoms("HOH"), Atoms("CO"), Atoms("OC"), Atoms("H2O2")]))
    assert found[0] == found[1] != found[4]
    assert found[2] == found[3] != found[0]


def test_connectivity_is_that_of_the_molecule():
    """Isomers of one formula differ; copies of each, turned, shaken, mirrored and renumbered, do not."""
    rng = np.random.default_rng(4)
    names = ["CH3CH2OH", "CH3OCH3", "H2O", "C6H6", "isobutane", "trans-butane", "bicyclobutane", "cyclobutene"]
    made = [(name, shaken(name, rng)) for name in names for _ in range(6)]
    found = connectivity(frames_of([atoms for _, atoms in made]))
    assert len(set(found.tolist())) == len(names)
    for name in names:
        assert len({int(group) for group, (other, _) in zip(found, made, strict=True) if other == name}) == 1
    assert formulas(frames_of([made[0][1], made[6][1]])).tolist() == [0, 0]  # ethanol and dimethyl ether


def test_connectivity_knows_periodic_images_and_units():
    rng = np.random.default_rng(4)
    crystal = bulk("Si", cubic=True)
    moved = crystal.copy()
    moved.positions += rng.uniform(0, 5, 3)
    moved.wrap()
    gas = Atoms("Si8", positions=rng.permutation(np.arange(24).reshape(8, 3) * 4.0), cell=[40] * 3, pbc=True)
    found = connectivity(frames_of([crystal, moved, gas]))
    assert found[0] == found[1] != found[2]
    water = molecule("H2O")
    small = water.copy()
    small.positions /= 10  # nm
    assert connectivity(
        frames_of([small, Atoms("OH2", positions=[[0, 0, 0], [1, 0, 0], [0, 1, 0]])]), 10.0
    ).tolist() != [0, 0]
    assert connectivity(frames_of([small, small]), 10.0).tolist() == [0, 0]


def test_a_trajectory_is_a_file_or_a_row_of_equal_atoms():
    data = FramesDataset(frames_of([Atoms("OH2")] * 3 + [Atoms("HOH")] * 2 + [Atoms("OH2")] + [Atoms("CO")] * 2))
    assert trajectories(data).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    data.runs = np.array([5, 3])
    assert groups_of(data, "time").tolist() == groups_of(data, "file").tolist() == [0] * 5 + [1] * 3


@pytest.mark.parametrize("by", ["formula", "connectivity", "file"])
def test_groups_never_straddle_parts(by, caplog):
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(8)
    names = ["H2O", "CH4", "NH3", "CH3OH", "C2H4", "CH3CH2OH", "CH3OCH3", "CO2", "C2H2", "H2O2"]
    data = FramesDataset(frames_of([shaken(names[i % 10], rng) for i in range(100)]))
    data.runs = np.full(20, 5)
    parts = parts_of(module(data, split_by=by))
    groups = groups_of(data, by)
    held = [set(groups[part].tolist()) for part in parts]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]
    assert sum(map(len, parts)) == 100
    assert all(10 <= len(part) <= 80 for part in parts)
    assert f"in brackets groups by {by}" in caplog.text
    assert f"train {len(parts[0])} ({len(held[0])})" in caplog.text


def test_time_gives_each_trajectory_three_blocks_in_order():
    data = FramesDataset(frames_of([Atoms("OH2")] * 50 + [Atoms("CO")] * 30))
    train, val, test = parts_of(module(data, split_by="time"))
    assert train.tolist() == [*range(30), *range(50, 68)]
    assert val.tolist() == [*range(30, 40), *range(68, 74)]
    assert test.tolist() == [*range(40, 50), *range(74, 80)]


def test_a_gap_leaves_out_what_stands_before_a_cut(caplog):
    caplog.set_level(logging.INFO)
    data = FramesDataset(frames_of([Atoms("OH2")] * 50))
    train, val, test = parts_of(module(data, split_by="time", split_gap=4))
    assert train.tolist() == [*range(26)]
    assert val.tolist() == [*range(30, 36)]
    assert test.tolist() == [*range(40, 50)]
    assert "8 samples are left out as gaps of 4" in caplog.text
    with pytest.raises(ConfigError, match="the gap of 10 samples before each cut leaves none for val"):
        module(data, split_by="time", split_gap=10)


@pytest.mark.parametrize("lengths", [[7, 1, 1, 1, 20, 3], [4] * 30, [100], [33, 33, 33]])
def test_blocks_are_contiguous_and_sizes_are_met_over_all_trajectories(lengths):
    member = np.repeat(np.arange(len(lengths)), lengths)
    sizes = (0.5, 0.25, 0.25)
    parts = train_val_test_split(len(member), None, *sizes[1:], 1, groups=member, gap=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(member)))
    for part, size in zip(parts, sizes, strict=True):
        assert abs(len(part) - size * len(member)) <= len(lengths) / 2 + 1
        for number in range(len(lengths)):
            rows = part[member[part] == number]
            assert not len(rows) or rows[-1] - rows[0] == len(rows) - 1


def test_files_and_keys_of_structure_files_divide_them(caplog):
    rng = np.random.default_rng(0)
    for number in range(6):
        frames = []
        for i in range(5):
            atoms = shaken("H2O", rng)
            atoms.info.update(energy=rng.normal(), campaign=f"run {(number + i) % 3}")
            frames.append(atoms)
        ase.io.write(f"part_{number}.extxyz", frames)
    options = {
        "dataset": "ASE",
        "dataset_root": "part_*.extxyz",
        "derivative": False,
        "val_size": 1 / 3,
        "test_size": 1 / 3,
    }
    by_file = module(**options, split_by="file")
    assert all(set(np.bincount(part // 5, minlength=6)) <= {0, 5} for part in parts_of(by_file))
    by_key = module(**options, split_by="campaign")
    names = by_key.dataset.groups
    assert [len(set(names[part].tolist())) for part in parts_of(by_key)] == [1, 1, 1]
    fixed = module(
        dataset="ASE",
        dataset_arg={"files": ["part_[0-3].extxyz", {"path": "part_4.extxyz", "split": "test"}]},
        split_by="campaign",
    )
    train, val, test = parts_of(fixed)
    assert test.tolist() == [*range(20, 25)]  # as stated, without splits: dataset
    assert not {*fixed.dataset.groups[train].tolist()} & {*fixed.dataset.groups[val].tolist()}
    with pytest.raises(ConfigError, match="stands beside files"):
        module(dataset="ASE", dataset_root="part_0.extxyz", dataset_arg={"files": ["part_1.extxyz"]})


def trajectory(correlated):
    """A molecule whose atoms walk, or are shaken anew in each sample."""
    rng = np.random.default_rng(3)
    steps = rng.normal(size=(200, 5, 3)) * 0.05
    moves = np.cumsum(steps, axis=0) if correlated else steps
    z, pos = molecule("CH4").numbers, molecule("CH4").positions
    return FramesDataset(Frames.from_samples([{"z": z, "pos": pos + move, "y": 0.0} for move in moves]))


@pytest.mark.parametrize("correlated", [True, False])
def test_a_random_division_of_a_trajectory_is_warned_of(correlated, caplog):
    module(trajectory(correlated))
    assert ("look like a trajectory" in caplog.text) == correlated


def test_other_divisions_of_a_trajectory_are_not_warned_of(caplog):
    module(trajectory(True), split_by="time")
    module(trajectory(True), val_size=0, test_size=0)
    assert "look like a trajectory" not in caplog.text


def test_words_that_mean_nothing_are_refused():
    data = FramesDataset(frames_of([Atoms("OH2")] * 20))
    with pytest.raises(ConfigError, match=r"split_by: the data set has no 'formulas'.*Did you mean 'formula'"):
        module(data, split_by="formulas")
    with pytest.raises(ConfigError, match="does not say which file"):
        module(data, split_by="file")
    with pytest.raises(ConfigError, match="split_gap=3 is for blocks of time"):
        resolve(["--dataset", "TinyQM", "--split-gap", "3"])
    assert resolve(["--dataset", "TinyQM", "--split-by", "formula"]).split_by == "formula"


@pytest.fixture
def named_parts():
    """Twelve frames in one file and three in another, of which the headers name two for validation."""
    frames = [Atoms("H2", [[0, 0, 0], [0, 0, 0.7 + 0.01 * n]]) for n in range(15)]
    for number, atoms in enumerate(frames):
        atoms.info["energy"] = -1.0 - 0.1 * number
    ase.io.write("most.extxyz", frames[:12])
    ase.io.write("few.extxyz", frames[12:])
    for atoms in frames[10:12]:
        atoms.info["split"] = "val"
    ase.io.write("headers.extxyz", frames[:12])
    return {"dataset": "ASE", "derivative": False, "val_size": 0, "test_size": 0}


def test_parts_that_the_data_name_are_never_mixed_into_training(named_parts, tmp_path):
    ways = [
        {"dataset_root": "most.extxyz", "dataset_arg": {"test": "few.extxyz"}},
        {"dataset_arg": {"files": ["most.extxyz", {"path": "few.extxyz", "split": "test"}]}},
    ]
    for way in ways:
        train, val, test = parts_of(module(**named_parts, **way))
        assert sorted(train.tolist()) == [*range(12)]
        assert test.tolist() == [12, 13, 14]
    train, val, test = parts_of(module(**named_parts, dataset_root="headers.extxyz"))
    assert (sorted(train.tolist()), val.tolist(), len(test)) == ([*range(10)], [10, 11], 0)
    every = module(**named_parts, **ways[0], splits="random")
    assert sorted(parts_of(every)[0].tolist()) == [*range(15)]
    np.savez(tmp_path / "own.npz", idx_train=np.arange(13), idx_val=[], idx_test=[13, 14])
    with pytest.raises(ConfigError, match=r"trains on 1 samples that the data name for test \(sample 12"):
        module(**named_parts, **ways[0], splits=str(tmp_path / "own.npz"))
