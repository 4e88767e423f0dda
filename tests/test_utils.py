"""Helpers by their established names."""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pytest
import torch
import yaml

from torchmdnet import utils
from torchmdnet.errors import DataError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [
    "atomic_masses", "ATOMIC_NUMBERS", "train_val_test_split", "make_splits", "LoadFromFile", "LoadFromCheckpoint",
    "save_argparse", "number", "MissingEnergyException", "write_as_hdf5", "deprecated_class", "check_logs",
])  # fmt: skip
def test_established_names_are_there(name):
    assert getattr(utils, name) is not None
    assert name in utils.__all__


def test_forwarded_names_are_the_objects_at_their_homes():
    from torchmdnet.config.rundir import check_logs
    from torchmdnet.data.splits import make_splits
    from torchmdnet.elements import ATOMIC_NUMBERS, atomic_masses

    assert utils.make_splits is make_splits
    assert utils.atomic_masses is atomic_masses
    assert utils.ATOMIC_NUMBERS is ATOMIC_NUMBERS
    assert utils.check_logs is check_logs
    with pytest.raises(AttributeError, match=r"nonsense"):
        utils.nonsense


def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--load-model", action=utils.LoadFromCheckpoint)
    parser.add_argument("--conf", type=open, action=utils.LoadFromFile)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def test_a_parser_of_the_users_own_can_read_files(here):
    (here / "c.yaml").write_text("lr: 1e-4\n")
    assert parser().parse_args(["--conf", "c.yaml"]).lr == 1e-4
    assert parser().parse_args(["--conf", "c.yaml", "--lr", "3"]).lr == 3
    assert parser().parse_args(["--lr", "3", "--conf", "c.yaml"]).lr == 1e-4


def test_a_parser_of_the_users_own_refuses_unknown_keys(here):
    (here / "c.yaml").write_text("sed: 1\n")
    with pytest.raises(ValueError, match=r"Unknown argument in config file: sed. Did you mean 'seed'"):
        parser().parse_args(["--conf", "c.yaml"])


def test_a_parser_of_the_users_own_can_read_saved_settings(here):
    (here / "c.yaml").write_text("load_model: other.ckpt\nseed: 3\n")
    (here / "hparams.yaml").write_text("lr: 0.5\nprior_args: []\nload_model: older.ckpt\n")
    torch.save({"state_dict": {}}, "x.ckpt")
    args = parser().parse_args(["--load-model", "x.ckpt", "--conf", "c.yaml"])
    assert (args.lr, args.seed, args.load_model) == (0.5, 3, "x.ckpt")
    (here / "hparams.yaml").write_text("sed: 1\n")
    with pytest.raises(ValueError, match=r"Unknown argument in the model checkpoint: sed"):
        parser().parse_args(["--load-model", "x.ckpt"])


def test_settings_are_saved_without_naming_exclusions(here):
    utils.save_argparse(argparse.Namespace(a=1), "a.yaml")
    assert yaml.safe_load((here / "a.yaml").read_text()) == {"a": 1}


def test_a_deprecated_class_says_so_when_it_is_used():
    @utils.deprecated_class
    class Old:
        """Documented."""

        def __init__(self, x):
            self.x = x

    assert isinstance(Old, type)
    assert Old.__doc__ == "Documented."
    filters = list(warnings.filters)
    with pytest.warns(DeprecationWarning, match=r"Old is deprecated"):
        assert Old(3).x == 3
    assert warnings.filters == filters


@pytest.fixture
def arrays(here):
    rng = np.random.default_rng(0)
    files = {"pos": [], "z": [], "y": [], "neg_dy": []}
    for n, (samples, atoms) in enumerate([(4, 3), (2, 5)]):
        for key, array in {
            "pos": rng.normal(size=(samples, atoms, 3)), "z": rng.integers(1, 9, atoms),
            "y": rng.normal(size=(samples, 1)), "neg_dy": rng.normal(size=(samples, atoms, 3)),
        }.items():  # fmt: skip
            np.save(here / f"{key}{n}.npy", array)
            files[key].append(str(here / f"{key}{n}.npy"))
    return files


@pytest.mark.parametrize("tile", [True, False])
def test_npy_files_become_groups_of_one_hdf5_file(arrays, tile):
    import h5py

    utils.write_as_hdf5(arrays, "out.h5", tile_embed=tile)
    with h5py.File("out.h5") as h5:
        assert list(h5) == ["0", "1"]
        for n in range(2):
            group = h5[str(n)]
            assert group.keys() == {"pos", "types", "energy", "forces"}
            assert group["types"].shape == (group["pos"].shape[:2] if tile else group["pos"].shape[1:2])
            np.testing.assert_array_equal(group["pos"], np.load(arrays["pos"][n]))
            np.testing.assert_array_equal(group["energy"], np.load(arrays["y"][n]))
            np.testing.assert_array_equal(group["forces"], np.load(arrays["neg_dy"][n]))
            np.testing.assert_array_equal(np.atleast_2d(group["types"])[0], np.load(arrays["z"][n]))


def test_npy_files_without_energies_are_fine(arrays):
    import h5py

    del arrays["y"]
    utils.write_as_hdf5(arrays, "out.h5")
    with h5py.File("out.h5") as h5:
        assert h5["0"].keys() == {"pos", "types", "forces"}


def test_npy_files_that_do_not_fit_are_refused(arrays):
    with pytest.raises(DataError, match=r"as many files"):
        utils.write_as_hdf5(arrays | {"y": arrays["y"][:1]}, "out.h5")
    with pytest.raises(DataError, match=r"y1.npy: y has shape \(2, 1\), but .*pos0.npy has 4 samples of 3 atoms"):
        utils.write_as_hdf5(arrays | {"y": arrays["y"][::-1]}, "out.h5")
