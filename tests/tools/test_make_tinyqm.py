"""Packing keeps every label, and the recipe gives the labels that are shipped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from torchmdnet.datasets import TinyQM

PATH = Path(__file__).resolve().parents[2] / "tools" / "make_tinyqm.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_tinyqm", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def frame(atoms: Atoms, rng: np.random.Generator, **info) -> Atoms:
    results = {"energy": round(rng.normal(), 6), "forces": np.round(rng.normal(size=(len(atoms), 3)), 6)}
    if atoms.pbc.any():
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(total_charge=0, spin_multiplicity=1, **info)
    return atoms


def test_packed_molecules_come_back(tmp_path, tool):
    rng = np.random.default_rng(0)
    names = ["H2O", "CH4", "NH3", "H2O", "CO2", "H2O"]
    parts = ["test", "train", "val", "train", "train", "val"]
    frames = [frame(molecule(n), rng, name=n, split=p) for n, p in zip(names, parts, strict=True)]
    ase.io.write(tmp_path / "a.extxyz", frames, format="extxyz")
    atoms = [frame(Atoms(s), rng, config_type="isolated_atom") for s in "HCNO"]
    ase.io.write(tmp_path / "atoms.extxyz", atoms, format="extxyz")
    arguments = ["pack", tmp_path / "set", tmp_path / "a.extxyz", "--level", "made up/level", "--atoms"]
    tool.main([str(a) for a in [*arguments, tmp_path / "atoms.extxyz"]])
    data = TinyQM(tmp_path / "set", "made up/level", atomref="isolated")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"idx_train": 3, "idx_val": 2, "idx_test": 1}
    expected = [frames[i] for i in (1, 3, 4, 2, 5, 0)]  # by part, otherwise in order
    assert data.names.tolist() == [a.info["name"] for a in expected]
    for i, one in enumerate(expected):
        np.testing.assert_allclose(data[i].pos, one.positions, atol=1e-8)
        np.testing.assert_array_equal(data[i].neg_dy, one.get_forces().astype(np.float32))
        assert data[i].y.item() == one.get_potential_energy()
    np.testing.assert_allclose(data.get_atomref()[1].item(), atoms[0].get_potential_energy(), rtol=1e-6)


def test_packed_cells_keep_box_and_stress(tmp_path, tool):
    rng = np.random.default_rng(0)
    cells = [frame(bulk("Cu", a=3.6 + 0.01 * i), rng, name="copper") for i in range(3)]
    tool.pack(tmp_path, "GFN1-xTB", cells)
    tool.pack(tmp_path, "GFN2-xTB", [frame(molecule("H2O"), rng, name="water")])  # a second level beside the first
    data = TinyQM(tmp_path, "gfn1")
    for i, atoms in enumerate(cells):
        np.testing.assert_array_equal(data[i].box[0], atoms.cell.array)
        np.testing.assert_allclose(data[i].stress[0], atoms.get_stress(voigt=False), rtol=1e-6)
    assert len(TinyQM(tmp_path, "gfn2")) == 1


def test_labels_that_are_not_finite_are_not_packed(tmp_path, tool):
    wrong = frame(molecule("H2O"), np.random.default_rng(0), name="water")
    wrong.calc.results["forces"][1, 1] = np.nan
    with pytest.raises(ValueError, match="forces is not finite"):
        tool.pack(tmp_path, "GFN2-xTB", [wrong])
    assert not (tmp_path / "manifest.json").exists()


def test_one_frame_in_nine_validates(tool):
    frames = [frame(molecule("H2O"), np.random.default_rng(0), name=n) for n in ["a"] * 18 + ["b"] * 10]
    parts = [atoms.info["split"] for atoms in tool.assign_splits(frames, None)]
    assert [i for i, part in enumerate(parts) if part == "val"] == [8, 17, 26]


def test_random_rotations_keep_lengths_and_handedness(tool):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rotation = tool.random_rotation(rng)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)


def test_the_recipe_gives_the_shipped_labels(tool):
    pytest.importorskip("tblite.ase")
    data = TinyQM(split="test")  # positions were rounded to 1e-6 Å after labelling
    for i in (0, 100, 212, 220, 290):
        sample = data[i]
        again = tool.label(Atoms(sample.z.numpy(), sample.pos.numpy()), "GFN2-xTB", int(sample.q))
        assert again.get_potential_energy() == pytest.approx(sample.y.item(), abs=2e-5)
        np.testing.assert_allclose(again.get_forces(), sample.neg_dy, atol=1e-4)
        np.testing.assert_allclose(again.arrays["partial_charges"], sample.partial_charges, atol=1e-4)
        np.testing.assert_allclose(again.calc.results["dipole"], sample.dp[0], atol=5e-5)


def test_the_recipe_gives_the_shipped_stress(tool):
    pytest.importorskip("tblite.ase")
    data = TinyQM(level="gfn1", split="test")
    cell = Atoms(data[0].z.numpy(), data[0].pos.numpy(), cell=data[0].box[0].numpy(), pbc=True)
    again = tool.label(cell, "GFN1-xTB", 0, accuracy=0.1)
    assert again.get_potential_energy() == pytest.approx(data[0].y.item(), abs=2e-5)
    np.testing.assert_allclose(again.get_stress(voigt=False), data[0].stress[0], rtol=1e-4, atol=1e-6)


def test_dynamics_of_a_molecule_make_a_set(tmp_path, tool):
    pytest.importorskip("tblite.ase")
    pytest.importorskip("rdkit")
    tool.main(["molecules", str(tmp_path / "a.extxyz"), "--frames", "6", "--only", "hydronium", "--split", "train"])
    tool.main(["pack", str(tmp_path / "set"), str(tmp_path / "a.extxyz"), "--level", "GFN2-xTB"])
    data = TinyQM(tmp_path / "set")
    assert len(data) == 6
    assert set(data.temperature.tolist()) == {300, 600, 1000}
    assert (data.frames["q"] == 1).all()
    assert np.abs(data.frames["neg_dy"]).max() < 30
    assert np.ptp(data.frames["y"]) > 0.01
