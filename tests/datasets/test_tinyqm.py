"""The shipped reference sets hold what was computed, number for number."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from importlib import resources
from pathlib import Path

import ase.io
import numpy as np
import pytest
from conftest import shared

from torchmdnet.datasets import TinyQM
from torchmdnet.datasets.tinyqm import encode, levels
from torchmdnet.errors import ConfigError, DataError

LEVELS = ["GFN2-xTB", "wB97X/6-31G(d)", "GFN1-xTB"]
SIZES = {"GFN2-xTB": (2352, 294, 294), "wB97X/6-31G(d)": (467, 69, 104), "GFN1-xTB": (278, 40, 79)}


def read(path):
    with gzip.open(path, "rt") as file:
        return ase.io.read(io.StringIO(file.read()), index=":", format="extxyz")


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_has_its_published_parts(level):
    data = TinyQM(level=level)
    assert tuple(len(part) for part in data.splits.values()) == SIZES[level]
    np.testing.assert_array_equal(np.sort(np.concatenate(list(data.splits.values()))), np.arange(len(data)))
    assert data.level_of_theory == level
    assert (data.energy_unit, data.length_unit) == ("eV", "Å")
    for name, size in zip(("train", "val", "test"), SIZES[level], strict=True):
        part = TinyQM(level=level, split=name)
        assert len(part) == len(part.names) == len(part.smiles) == len(part.temperature) == size
        assert part.splits is None
        assert part[0].y.item() == data[int(data.splits[f"idx_{name}"][0])].y.item()


def test_levels_are_listed_and_found_by_short_names():
    assert levels() == LEVELS
    assert TinyQM(level="wb97x").level_of_theory == TinyQM(level="ωB97X/6-31G(d)").level_of_theory == LEVELS[1]
    with pytest.raises(ConfigError, match=r"level: 'GFN3-xTB' is not available\. Did you mean"):
        TinyQM(level="GFN3-xTB")
    with pytest.raises(ConfigError, match=r"split: 'vall' is not a part\. Did you mean 'val'"):
        TinyQM(split="vall")


@pytest.mark.parametrize("level", LEVELS)
def test_the_labels_are_physical(level):
    frames = TinyQM(level=level).frames
    net = np.add.reduceat(frames["neg_dy"].astype(float), frames.ptr[:-1], axis=0)
    assert np.abs(net).max() < 0.02  # nothing pulls a whole molecule along
    assert 1.0 < np.sqrt((frames["neg_dy"].astype(float) ** 2).mean()) < 2.5
    counts, _ = frames.composition()
    electrons = np.add.reduceat(frames["z"].astype(int), frames.ptr[:-1]) - frames["q"]
    assert (counts.sum(axis=1) == frames.counts).all()
    assert ((electrons - frames["s"]) % 2 == 0).all()
    if "partial_charges" in frames:
        total = np.add.reduceat(frames["partial_charges"], frames.ptr[:-1])
        np.testing.assert_allclose(total, frames["q"], atol=1e-3)  # each has four places
    if "stress" in frames:
        np.testing.assert_allclose(frames["stress"], np.swapaxes(frames["stress"], 1, 2))
        assert (np.linalg.det(frames["box"]) > 50).all()


def test_the_dipole_of_an_ion_is_about_the_origin_of_its_coordinates():
    low, high = TinyQM(), TinyQM(level="wb97x")
    for data in (low, high):
        for name, sign in (("hydronium", 1), ("formate", -1)):
            rows = np.flatnonzero(data.names == name)
            # with a net charge, the dipole follows the centre of charge; the methods agree where that is
            assert np.abs(data.frames["dp"][rows]).max() < 1.5
            assert (data.frames["q"][rows] == sign).all()
    nearest = [
        np.abs(low.frames["dp"][i] - high.frames["dp"][j]).max()
        for j in np.flatnonzero(high.frames["q"] != 0)
        for i in np.flatnonzero(low.names == high.names[j])
        if np.array_equal(low[int(i)].pos, high[int(j)].pos)
    ]
    assert len(nearest) > 60
    assert max(nearest) < 0.3


def test_isolated_atoms_are_the_reference_energies():
    np.testing.assert_allclose(
        TinyQM(atomref="isolated").get_atomref()[[1, 6, 7, 8], 0],
        [-10.707211, -48.79808, -70.908087, -102.521807],
        rtol=1e-6,
    )
    dft = TinyQM(level="wb97x", atomref="isolated")
    np.testing.assert_allclose(dft.get_atomref()[6], -1029.511141, rtol=1e-6)
    counts, elements = dft.frames.composition()
    binding = dft.frames["y"][:, 0] - counts @ dft.get_atomref()[elements, 0].numpy().astype(float)
    assert (binding < 0).mean() > 0.99  # molecules hold together
    assert (binding / dft.frames.counts > -8).all()


def test_reference_energies_are_fitted_otherwise():
    data = TinyQM(level="gfn1")
    counts, elements = data.frames.composition()
    expected = np.linalg.lstsq(counts.astype(float), data.frames["y"][:, 0], rcond=None)[0]
    np.testing.assert_allclose(data.get_atomref()[elements, 0], expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="no isolated atoms"):
        TinyQM(level="gfn1", atomref="isolated")
    residual = TinyQM()
    counts, elements = residual.frames.composition()
    rest = residual.frames["y"][:, 0] - counts @ residual.get_atomref()[elements, 0].numpy().astype(float)
    assert rest.std() == pytest.approx(3.15, abs=0.01)  # of 180 eV; ions are what a composition cannot tell


def test_a_baseline_leaves_the_difference_of_two_methods():
    whole, difference = TinyQM(level="wb97x"), TinyQM(level="wb97x", baseline=True)
    assert "dp" not in difference[0]
    assert np.abs(difference.frames["neg_dy"]).mean() == pytest.approx(0.29, abs=0.03)
    assert np.abs(whole.frames["neg_dy"]).mean() > 1.0
    free = TinyQM(level="wb97x", baseline=True, atomref="isolated")
    np.testing.assert_allclose(free.get_atomref()[1], -13.587223 + 10.707211, rtol=1e-5)
    assert difference.level_of_theory == "wB97X/6-31G(d) minus GFN2-xTB"
    with pytest.raises(ConfigError, match="baseline: GFN2-xTB has none"):
        TinyQM(baseline=True)


@pytest.mark.parametrize(
    ("level", "files"),
    [
        ("GFN2-xTB", ["embedded/gfn2_small_molecules", "inhouse/gfn2_test_id"]),
        ("wB97X/6-31G(d)", ["embedded/wb97x_small_molecules", "inhouse/wb97x_test_id"]),
        ("GFN1-xTB", ["embedded/gfn1_periodic", "inhouse/gfn1_periodic_test"]),
    ],
)
def test_packing_lost_no_digit(level, files):
    frames = [atoms for name in files for atoms in read(shared(f"data/{name}.extxyz.gz"))]
    data = TinyQM(level=level)
    mine = {(n, y): i for i, (n, y) in enumerate(zip(data.names, data.frames["y"][:, 0], strict=True))}
    assert len(mine) > 0.99 * len(frames) == 0.99 * len(data)
    for atoms in frames[:: max(1, len(frames) // 300)]:
        i = mine[atoms.info["name"], atoms.get_potential_energy()]
        sample = data[i]
        np.testing.assert_array_equal(sample.z, atoms.numbers)
        np.testing.assert_array_equal(sample.pos, atoms.positions)
        np.testing.assert_array_equal(sample.neg_dy, atoms.get_forces().astype(np.float32))
        assert sample.q.item() == atoms.info["total_charge"]
        assert sample.s.item() == atoms.info["spin_multiplicity"] - 1
        if "stress" in sample:
            np.testing.assert_array_equal(sample.box[0], atoms.cell.array)
            np.testing.assert_array_equal(sample.stress[0], atoms.get_stress(voigt=False).astype(np.float32))
        else:
            if sample.q.item() == 0:  # those of ions were computed again, about the origin of their coordinates
                np.testing.assert_array_equal(sample.dp[0], atoms.calc.results["dipole"].astype(np.float32))
            assert data.smiles[i] == atoms.info["smiles"]
            assert data.temperature[i] == atoms.info["temperature_K"]


def test_a_damaged_file_is_refused(tmp_path):
    shutil.copytree(str(resources.files("torchmdnet.datasets") / "embedded"), tmp_path / "set")
    path = tmp_path / "set" / "gfn1.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"gfn1\.npz is damaged"):
        TinyQM(tmp_path / "set", "gfn1")
    assert len(TinyQM(tmp_path / "set", "gfn2")) == 2940


def test_a_root_without_a_set_means_the_shipped_ones(tmp_path):
    assert len(TinyQM(tmp_path)) == len(TinyQM("~/data")) == len(TinyQM()) == 2940


def test_the_shipped_files_are_small_and_hold_no_objects():
    folder = Path(str(resources.files("torchmdnet.datasets") / "embedded"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_500_000
    for path in folder.glob("*.npz"):
        with np.load(path, allow_pickle=False) as file:
            assert all(file[name].dtype.kind in "uifU" for name in file)
    assert json.loads((folder / "manifest.json").read_text())["licence"] == "CC0-1.0"


def test_six_decimal_places_survive_packing():
    values = np.array([-2042.009526, 0.0, 1e-6, 5000.123456])
    assert encode(values).dtype == np.int64
    np.testing.assert_array_equal(encode(values) / 1e6, values)
    assert encode(np.array([1.5, -2.25])).dtype == np.int32
    assert encode(np.array([np.pi])).dtype == np.float64
