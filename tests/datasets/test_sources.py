"""Several files with a weight, a part, keys and units each, and weights in the frames."""

from __future__ import annotations

import logging

import ase.io
import numpy as np
import pytest
from ase.build import molecule

from torchmdnet.datasets.ase import ASE
from torchmdnet.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(path, names, *, energy="energy", forces="forces", factor=1.0, **info):
    """Molecules whose energy is minus their number of atoms, in eV times a factor."""
    frames = []
    for i, name in enumerate(names):
        atoms = molecule(name)
        atoms.info[energy] = -float(len(atoms)) * factor
        atoms.arrays[forces] = np.full((len(atoms), 3), 0.5 * factor)
        atoms.info.update({key: value[i] if isinstance(value, list) else value for key, value in info.items()})
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")


def test_each_listed_file_has_its_weight_its_part_its_keys_and_its_units():
    write("a.extxyz", ["H2O", "CH4"])
    write("b.extxyz", ["CO"], energy="e_h", forces="f_h", factor=1 / 27.211386245988)
    write("c_1.extxyz", ["NH3"])
    write("c_2.extxyz", ["H2"])
    data = ASE(
        files=[
            "a.extxyz",
            {"path": "b.extxyz", "weight": 2.5, "energy_key": "e_h", "forces_key": "f_h", "energy_unit": "Hartree"},
            {"path": "c_*.extxyz", "split": "test", "weight": 0.5},
        ]
    )
    np.testing.assert_allclose(data.frames["y"][:, 0], [-3, -5, -2, -4, -2], rtol=1e-9)
    np.testing.assert_allclose(data.frames["neg_dy"], 0.5, rtol=1e-6)
    assert data.frames["config_weight"].tolist() == [1, 1, 2.5, 0.5, 0.5]
    assert {name: rows.tolist() for name, rows in data.splits.items()} == {"idx_train": [0, 1, 2], "idx_test": [3, 4]}
    assert data.runs.tolist() == [2, 1, 1, 1]
    assert data[2].config_weight.tolist() == [2.5]


def test_an_index_may_be_of_one_file():
    write("a.extxyz", ["H2O", "CH4", "CO"])
    write("b.extxyz", ["H2O", "CH4", "CO"])
    assert len(ASE(files=["a.extxyz", {"path": "b.extxyz", "index": "-1:"}])) == 4


def test_without_weights_samples_have_none():
    write("a.extxyz", ["H2O"], config_weight=1.0)
    assert not {"config_weight", "y_weight", "neg_dy_weight"} & set(ASE("a.extxyz").frames.fields)


def test_weights_in_the_frames_multiply_that_of_the_file(caplog):
    caplog.set_level(logging.INFO)
    write("a.extxyz", ["H2O", "CO"], config_weight=[2.0, 3.0], energy_weight=[0.0, 1.0], config_forces_weight=4.0)
    write("b.extxyz", ["CH4"])
    data = ASE(files=[{"path": "a.extxyz", "weight": 10}, "b.extxyz"])
    assert data.frames["config_weight"].tolist() == [20, 30, 1]
    assert data.frames["y_weight"].tolist() == [0, 1, 1]
    assert data.frames["neg_dy_weight"].tolist() == [4, 4, 1]
    assert "Weights ('config_weight') of 1 to 30 multiply losses" in caplog.text


def test_weights_of_other_names_are_named_and_others_can_be_ignored(caplog):
    caplog.set_level(logging.INFO)
    write("a.extxyz", ["H2O", "CO"], weight=[2.0, 3.0], config_weight=7.0)
    assert ASE("a.extxyz", weight_keys={"configuration": "weight"}).frames["config_weight"].tolist() == [2, 3]
    assert "config_weight" not in ASE("a.extxyz", weight_keys=False).frames.fields
    assert ASE("a.extxyz").frames["config_weight"].tolist() == [7, 7]
    assert "The frames have 'weight', which is not used" in caplog.text
    with pytest.raises(DataError, match=r"weight_keys: no frame has 'wieght'.*Did you mean 'weight'"):
        ASE("a.extxyz", weight_keys={"energy": "wieght"})


@pytest.mark.parametrize(("value", "message"), [(-1.0, "cannot be negative"), (np.nan, "is nan")])
def test_impossible_weights_are_refused_by_frame(value, message):
    write("a.extxyz", ["H2O", "CO"], config_weight=[1.0, value])
    with pytest.raises(DataError, match=rf"a\.extxyz, frame 1: config_weight.*{message}"):
        ASE("a.extxyz")


def test_files_of_different_labels_are_refused():
    write("a.extxyz", ["H2O"], energy="REF_energy")
    write("b.extxyz", ["H2O"])
    with pytest.raises(DataError, match=r"b\.extxyz, frame 0: 'REF_energy' is missing, although a\.extxyz, frame 0"):
        ASE(files=["a.extxyz", "b.extxyz"])
    with pytest.raises(DataError, match=r"b\.extxyz, frame 0: forces would be read from one"):
        ASE(files=["a.extxyz", {"path": "b.extxyz", "energy_key": "energy", "forces_key": False}])
    assert len(ASE(files=["a.extxyz", {"path": "b.extxyz", "energy_key": "energy"}])) == 2


def test_mixed_units_are_refused_where_files_state_them_and_read_where_each_has_its_own():
    write("a.extxyz", ["H2O"], energy_unit="eV")
    write("b.extxyz", ["H2O"], energy_unit="Hartree", factor=1 / 27.211386245988)
    with pytest.raises(DataError, match=r"b\.extxyz, frame 0: energy_unit is 'Hartree', although it is 'eV' in a\.ext"):
        ASE(["a.extxyz", "b.extxyz"])
    np.testing.assert_allclose(ASE(files=["a.extxyz", "b.extxyz"]).frames["y"], -3, rtol=1e-9)


def test_what_belongs_together_is_read_as_numbers_or_texts():
    write("a.extxyz", ["H2O", "CO", "H2O"], system=["water", "gas", "water"])
    assert ASE("a.extxyz", group_key="system").groups.tolist() == ["water", "gas", "water"]
    write("b.extxyz", ["H2O"])
    with pytest.raises(DataError, match=r"b\.extxyz, frame 0: 'system' is missing.*split_by needs it in every frame"):
        ASE(["a.extxyz", "b.extxyz"], group_key="system")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.extxyz", "files: 'a.extxyz' should be a list"),
        ([], "should be a list"),
        ([{"weight": 1}], "files, entry 1: .* has no path"),
        (["a.extxyz", {"path": "b.extxyz", "wieght": 2}], "files, entry 2: 'wieght' is not.*Did you mean 'weight'"),
        ([{"path": "a.extxyz", "weight": -1}], "weight: -1 is not a number of 0 or more"),
        ([{"path": "a.extxyz", "weight": "2"}], "weight: '2' is not a number"),
        ([{"path": "a.extxyz", "split": "dev"}], "split: 'dev' is not known"),
        ([{"path": "a.extxyz", "energy_unit": "J"}], "energy_unit: 'J' is not known"),
        ([{"path": "no.extxyz"}], "files, entry 1: There is no file 'no.extxyz'"),
        (["a.extxyz", {"path": "a.*", "split": "test"}], "is in both the train and the test files"),
        (["a.extxyz", "a.*"], "is in both the number 1 and the number 2 files"),
    ],
)
def test_entries_that_make_no_sense_are_refused(files, message):
    write("a.extxyz", ["H2O"])
    write("b.extxyz", ["H2O"])
    with pytest.raises((ConfigError, DataError), match=message):
        ASE(files=files)


def test_files_stand_alone():
    write("a.extxyz", ["H2O"])
    with pytest.raises(ConfigError, match="in place of root"):
        ASE("a.extxyz", files=["a.extxyz"])
    with pytest.raises(ConfigError, match="no files are given"):
        ASE()
