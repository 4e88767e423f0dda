"""Ace files of both layouts, and the same columns as Hugging Face tables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from torchmdnet.datasets.ace import Ace, AceHF, download_gitea_dataset
from torchmdnet.errors import ConfigError, DataError

UNITS = {"positions": "Å", "energy": "eV", "forces": "eV/Å", "partial_charges": "e", "dipole": "e*Å"}


def make_molecules(seed: int, count: int = 3, frames: int = 4) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        f"mol{number}": {
            "atomic_numbers": rng.integers(1, 9, 3 + number).astype(np.uint8),
            "formal_charges": rng.integers(-1, 2, 3 + number).astype(np.int8),
            "positions": rng.normal(size=(frames, 3 + number, 3)).astype(np.float32),
            "energy": rng.normal(size=frames),
            "forces": 3 * rng.normal(size=(frames, 3 + number, 3)).astype(np.float32),
            "partial_charges": rng.normal(size=(frames, 3 + number)).astype(np.float32),
            "dipole": rng.normal(size=(frames, 3)).astype(np.float32),
        }
        for number in range(count)
    }


def write(path, version: str, molecules, failed=()) -> None:
    """``failed`` names conformers, (molecule, number), whose calculation did not end."""
    with h5py.File(path, "w") as file:
        file.attrs["layout"], file.attrs["layout_version"], file.attrs["name"] = "Ace", version, "test"
        top = file if version == "1.0" else file.create_group("master")
        for name, molecule in molecules.items():
            group = top.create_group(name)
            for key in ("atomic_numbers", "formal_charges"):
                group[key] = molecule[key]
            if version == "1.0":
                for i in range(len(molecule["energy"])):
                    conformer = group.create_group(f"conformations/c{i}")
                    for key, unit in UNITS.items():
                        stored = {"energy": "formation_energy", "dipole": "dipole_moment"}.get(key, key)
                        if not (key == "energy" and (name, i) in failed):
                            conformer.create_dataset(stored, data=molecule[key][i]).attrs["units"] = unit
            else:
                energy = molecule["energy"].copy()
                energy[[i for who, i in failed if who == name]] = np.nan
                for key, unit in UNITS.items():
                    stored = {"energy": "formation_energies", "dipole": "dipole_moments"}.get(key, key)
                    data = energy if key == "energy" else molecule[key]
                    group.create_dataset(stored, data=data).attrs["units"] = unit


def check(data, expected: list[tuple[dict, int]]) -> None:
    assert len(data) == len(expected)
    for sample, (molecule, i) in zip(data, expected, strict=True):
        assert sample.z.tolist() == molecule["atomic_numbers"].tolist()
        assert int(sample.q) == molecule["formal_charges"].sum()
        assert sample.y.tolist() == [[molecule["energy"][i]]]
        np.testing.assert_array_equal(sample.pos, molecule["positions"][i])
        np.testing.assert_array_equal(sample.neg_dy, molecule["forces"][i])
        np.testing.assert_array_equal(sample.pq, molecule["partial_charges"][i])
        np.testing.assert_array_equal(sample.dp, molecule["dipole"][i][None])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_every_conformer_that_ended_is_read(tmp_path, version):
    molecules = make_molecules(0)
    write(tmp_path / "a.h5", version, molecules, failed=[("mol0", 1), ("mol2", 3)])
    data = Ace(tmp_path / "root", paths=str(tmp_path / "a.h5"))
    left = [(m, i) for m in molecules for i in range(4) if (m, i) not in (("mol0", 1), ("mol2", 3))]
    check(data, [(molecules[m], i) for m, i in left])
    notes = [(sample.i_path, sample.mol_id, sample.i_conf) for sample in data.sample_iter(mol_ids=True)]
    assert notes[:4] == [(0, "mol0", 0), (0, "mol0", 1), (0, "mol0", 2), (0, "mol1", 0)]
    assert "mol_id" not in data[0]


def test_samples_and_batches_have_the_documented_shapes(tmp_path):
    write(tmp_path / "a.h5", "2.0", make_molecules(0))
    data = Ace(tmp_path, paths=tmp_path / "a.h5")
    assert {key: tuple(value.shape) for key, value in data[0].to_dict().items()} == {
        "z": (3,),
        "pos": (3, 3),
        "neg_dy": (3, 3),
        "pq": (3,),
        "y": (1, 1),
        "q": (),
        "dp": (1, 3),
    }
    batch, expected = data.batch([11, 0, 5]), Batch.from_data_list([data[11], data[0], data[5]])
    for key in ("z", "pos", "y", "neg_dy", "q", "pq", "dp", "batch"):
        assert torch.equal(batch[key], expected[key])
    assert batch.dp.shape == (3, 3)


def test_files_and_folders_are_read_in_natural_order(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in (10, 2, 1):
        write(folder / f"part_{number}.h5", "2.0", make_molecules(number, count=1))
    (folder / "notes.txt").write_text("...")
    whole = Ace(tmp_path, paths=str(folder))
    energies = [e for number in (1, 2, 10) for e in make_molecules(number, count=1)["mol0"]["energy"]]
    assert whole.batch(range(12)).y.flatten().tolist() == energies
    pair = Ace(tmp_path, paths=[folder / "part_10.h5", str(folder / "part_1.h5")])
    assert pair[0].y.item() == energies[8]
    assert [sample.i_path for sample in pair.sample_iter(mol_ids=True)] == [0] * 4 + [1] * 4


def test_molecules_are_thinned_in_each_file(tmp_path):
    molecules = make_molecules(0)
    write(tmp_path / "a.h5", "1.0", molecules)
    write(tmp_path / "b.h5", "2.0", molecules)
    data = Ace(tmp_path, paths=[str(tmp_path / "a.h5"), str(tmp_path / "b.h5")], subsample_molecules=2)
    check(data, 2 * [(molecules[m], i) for m in ("mol0", "mol2") for i in range(4)])


def test_large_forces_are_left_out(tmp_path):
    molecules = make_molecules(0)
    write(tmp_path / "a.h5", "2.0", molecules)
    pairs = [(m, i) for m in molecules.values() for i in range(4)]
    largest = [np.linalg.norm(m["forces"][i], axis=1).max() for m, i in pairs]
    limit = float(np.median(largest))
    data = Ace(tmp_path, paths=str(tmp_path / "a.h5"), max_gradient=limit)
    check(data, [pair for pair, force in zip(pairs, largest, strict=True) if force <= limit])
    with pytest.raises(DataError, match=r"Ace: no conformer is left of 1 files with max_gradient=0.001"):
        Ace(tmp_path, paths=str(tmp_path / "a.h5"), max_gradient=1e-3)


def test_an_edited_file_is_noticed(tmp_path):
    write(tmp_path / "a.h5", "2.0", make_molecules(0, count=2))
    assert len(Ace(tmp_path, paths=str(tmp_path / "a.h5"))) == 8
    write(tmp_path / "a.h5", "2.0", make_molecules(1, count=5))
    assert len(Ace(tmp_path, paths=str(tmp_path / "a.h5"))) == 20
    status = os.stat(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["master/mol0/formation_energies"][0] = 7.0
    os.utime(tmp_path / "a.h5", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert Ace(tmp_path, paths=str(tmp_path / "a.h5"))[0].y == 7.0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.attrs.update(layout="Other"), "layout 'Other', version '2.0'. Layout 'Ace', version 1.0 or 2.0"),
        (lambda f: f.attrs.update(layout_version="3.0"), "version '3.0'"),
        (
            lambda f: f["master/mol1/positions"].attrs.update(units="nm"),
            "mol1: 'positions' .*units='nm' instead of 'Å'",
        ),
        (lambda f: f["master/mol1/forces"].attrs.pop("units"), "mol1: 'forces' .*units=None instead of 'eV/Å'"),
        (lambda f: f["master/mol1"].pop("dipole_moments"), "mol1: 'dipole_moments' is missing"),
        (lambda f: f["master/mol1"].pop("atomic_numbers"), "does not have the expected layout"),
        (lambda f: f.create_group("second"), "has 2 top groups"),
    ],
)
def test_a_file_of_another_layout_is_named(tmp_path, edit, message):
    write(tmp_path / "a.h5", "2.0", make_molecules(0))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        edit(file)
    with pytest.raises(DataError, match=f"a.h5.*{message}"):
        Ace(tmp_path, paths=str(tmp_path / "a.h5"))


def test_root_and_paths_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.h5", "2.0", make_molecules(0))
    with pytest.raises(ConfigError, match="paths: no file is given"):
        Ace(tmp_path)
    with pytest.raises(ConfigError, match="root is missing"):
        Ace(None, paths="a.h5")
    with pytest.raises(DataError, match=r"There is no file 'b.h5'"):
        Ace(tmp_path, paths="b.h5")
    with pytest.raises(DataError, match="listed twice"):
        Ace(tmp_path, paths=["a.h5", "a.h5"])
    assert os.listdir(tmp_path) == ["a.h5"]


# -------------------------------------------------------------------------------------------------------- Hugging Face


def columns(molecules) -> dict[str, list]:
    rows = [(m, i) for m in molecules.values() for i in range(len(m["energy"]))]
    return {
        "atomic_numbers": [m["atomic_numbers"].tolist() for m, _ in rows],
        "positions": [m["positions"][i].tolist() for m, i in rows],
        "formation_energy": [float(m["energy"][i]) for m, i in rows],
        "forces": [m["forces"][i].tolist() for m, i in rows],
        "formal_charges": [m["formal_charges"].tolist() for m, _ in rows],
        "partial_charges": [m["partial_charges"][i].tolist() for m, i in rows],
        "dipole_moment": [m["dipole"][i].tolist() for m, i in rows],
        "smiles": ["C"] * len(rows),
    }


class Table:
    """As much of ``datasets.Dataset`` as is used."""

    def __init__(self, columns: dict[str, list], fingerprint: str) -> None:
        self.columns, self._fingerprint, self.column_names = columns, fingerprint, list(columns)

    def __len__(self) -> int:
        return len(self.columns["formation_energy"])

    def select_columns(self, names):
        return Table({name: self.columns[name] for name in names}, self._fingerprint)

    def with_format(self, kind):
        return self

    def iter(self, batch_size):
        for first in range(0, len(self), batch_size):
            yield {name: values[first : first + batch_size] for name, values in self.columns.items()}


@pytest.fixture
def table(monkeypatch, tmp_path, request):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    calls = []

    def load_dataset(root, data_files, split):
        calls.append((root, data_files, split))
        return Table(columns(make_molecules(0)), request.node.name)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_of_a_table_become_samples(table, tmp_path):
    data = AceHF("parquet", ["a.parquet", "~/b.parquet"], "test")
    assert table == [("parquet", ["a.parquet", os.path.expanduser("~/b.parquet")], "test")]
    check(data, [(m, i) for m in make_molecules(0).values() for i in range(4)])
    assert data.batch([3, 8]).dp.shape == (2, 3)


def test_one_file_may_be_given_as_text(table):
    AceHF("parquet", "a.parquet")
    assert table[0][1] == ["a.parquet"]


def test_rows_with_large_forces_are_left_out(table):
    pairs = [(m, i) for m in make_molecules(0).values() for i in range(4)]
    largest = [np.linalg.norm(m["forces"][i], axis=1).max() for m, i in pairs]
    limit = float(np.median(largest))
    data = AceHF(paths=["a.parquet"], max_gradient=limit)
    check(data, [pair for pair, force in zip(pairs, largest, strict=True) if force < limit])
    with pytest.raises(DataError, match=r"no row is left of 12 with max_gradient=0.001"):
        AceHF(paths=["a.parquet"], max_gradient=0.001)


def test_a_table_without_the_columns_is_refused(table, monkeypatch):
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: Table({"x": []}, "none"))
    with pytest.raises(DataError, match=r"atomic_numbers, positions, .* missing; the columns are x"):
        AceHF(paths=["a.parquet"])


def test_a_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install torchmd-net\[huggingface\]"):
        AceHF(paths=["a.parquet"])


def test_parquet_files_are_read_by_the_real_package(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Dataset"):  # this folder, seen as a package
        pytest.skip("the package 'datasets' is not installed")
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    molecules = make_molecules(0)
    datasets.Dataset.from_dict(columns(molecules)).to_parquet(str(tmp_path / "a.parquet"))
    check(AceHF(paths=str(tmp_path / "a.parquet")), [(m, i) for m in molecules.values() for i in range(4)])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """``ssh://gitea.host/user/repo`` stands for a repository in a folder."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    work, bare = tmp_path / "work", tmp_path / "server" / "user" / "repo.git"
    work.mkdir()
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.org")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{tmp_path}/server/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "ssh://gitea.host/")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=work, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    commits = []
    for number in (1, 2):
        (work / "data.parquet").write_text(f"version {number}")
        git("add", ".")
        git("commit", "-q", "-m", f"{number}")
        commits.append(git("rev-parse", "HEAD"))
    git("checkout", "-q", "-b", "trial")
    (work / "data.parquet").write_text("trial")
    git("commit", "-q", "-a", "-m", "trial")
    git("clone", "-q", "--bare", ".", str(bare))
    return commits


def test_files_come_from_a_branch_or_commit_of_a_repository(repository, tmp_path):
    for path, content in (
        ("data.parquet", "version 2"),
        ("branch/trial/data.parquet", "trial"),
        (f"src/commit/{repository[0]}/data.parquet", "version 1"),
        ("src/branch/main/data.parquet", "version 2"),
    ):
        place = download_gitea_dataset(f"ssh://gitea.host/user/repo/{path}", tmp_path / "clones")
        with open(place) as file:
            assert file.read() == content
    with pytest.raises(DataError, match="user/repo has no file 'other' at origin/main"):
        download_gitea_dataset("ssh://gitea.host/user/repo/other", tmp_path / "clones")
    with pytest.raises(DataError, match=r"'git .* origin/gone' failed"):
        download_gitea_dataset("ssh://gitea.host/user/repo/branch/gone/data.parquet", tmp_path / "clones")


@pytest.mark.parametrize("path", ["https://gitea.host/user/repo/file", "ssh://gitea.host/repo", "ssh://h/u/--upload/f"])
def test_other_addresses_are_refused(path, tmp_path):
    with pytest.raises(ConfigError, match="must look like ssh://"):
        download_gitea_dataset(path, tmp_path)
