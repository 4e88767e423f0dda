"""Layers: defaults, files, flags."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import yaml
from conftest import shared

from torchmdnet.config import add_reference_prior, get_argparse, hyper_parameters, resolve
from torchmdnet.errors import CheckpointError, ConfigError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def conf(here):
    def conf(text: str, name: str = "conf.yaml"):
        (here / name).write_text(text)
        return name

    return conf


def merged(*words):
    return get_argparse().parse_args(list(words))


# Files and flags


def test_a_flag_wins_over_a_file_wherever_it_stands(conf):
    name = conf("lr: 0.1\nseed: 7\n")
    assert merged("--conf", name, "--lr", "0.5").lr == 0.5
    assert merged("--lr", "0.5", "--conf", name).lr == 0.5
    assert merged("--lr", "0.5", "--conf", name).seed == 7


def test_a_flag_before_a_file_that_it_overrides_is_announced(conf, caplog):
    name = conf("lr: 0.1\nseed: 7\n")
    with caplog.at_level(logging.WARNING):
        merged("--conf", name, "--lr", "0.5")
        merged("--seed", "7", "--conf", name)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        merged("--lr", "0.5", "--conf", name)
    assert "conf.yaml, line 1: lr=0.1 is not used, because --lr was given" in caplog.text


def test_of_two_files_the_later_wins(conf):
    first, second = conf("lr: 0.1\nseed: 7\n", "a.yaml"), conf("lr: 0.2\n", "b.yml")
    args = merged("-c", first, "-c", second)
    assert (args.lr, args.seed) == (0.2, 7)


def test_priors_of_a_flag_replace_those_of_a_file(conf):
    for given in ("prior_model: Atomref", "prior_model: [Atomref]", "prior_model: {ZBL: {cutoff_distance: 4}}",
                  "prior_model: ZBL\nprior_args: {cutoff_distance: 4}"):  # fmt: skip
        assert merged("--conf", conf(given), "--prior-model", "D2").prior_model == ["D2"]


def test_arguments_of_priors_join_their_names(conf):
    name = conf("prior_model: [ZBL, Atomref]\nprior_args: [{cutoff_distance: 4}, null]")
    args = merged("--conf", name)
    assert args.prior_model == [{"ZBL": {"cutoff_distance": 4}}, {"Atomref": {}}]
    assert args.prior_args is None


def test_arguments_without_a_prior_are_refused(conf):
    with pytest.raises(ConfigError, match=r"line 2: prior_args has 2 entries, but prior_model names 1 priors \(ZBL\)"):
        merged("--conf", conf("prior_model: ZBL\nprior_args: [{}, {}]"))


# YAML


def test_numbers_in_yaml_are_numbers(conf):
    args = merged("--conf", conf('lr: 1e-4\nlr_min: "1e-7"\nbatch_size: 16.0\nnum_epochs: 1e2\ntrain_size: 1e3\n'))
    assert (args.lr, args.lr_min, args.batch_size, args.num_epochs, args.train_size) == (1e-4, 1e-7, 16, 100, 1000)
    assert {type(x) for x in (args.batch_size, args.num_epochs, args.train_size)} == {int}
    assert type(args.lr) is float


def test_fractions_in_yaml_stay_fractions(conf):
    args = merged("--conf", conf("train_size: 1.0\nval_size: 0\ntest_size: null"))
    assert (args.train_size, type(args.train_size)) == (1.0, float)
    assert (args.val_size, args.test_size) == (0, None)


def test_false_in_yaml_is_false_also_as_text(conf):
    args = merged("--conf", conf('derivative: "false"\ncharge: no\nspin: 0\nstatic_shapes: true'))
    assert (args.derivative, args.charge, args.spin, args.static_shapes) == (False, False, False, True)


def test_null_turns_early_stopping_off(conf):
    assert merged("--conf", conf("early_stopping_monitor: null")).early_stopping_monitor is None


def test_yaml_can_say_what_only_flags_or_only_yaml_could(conf):
    text = "model: tensornet2\nq_dim: 4\nq_weights: [1.0, 0.5]\ncoulomb_cutoff: 10\nrepulsion: true\n"
    args = merged("--conf", conf(text))
    assert (args.model, args.q_dim, args.q_weights, args.coulomb_cutoff) == ("tensornet2", 4, [1.0, 0.5], 10.0)
    flags = merged("--model", "tensornet2", "--q-dim", "4", "--q-weights", "[1.0, 0.5]", "--coulomb-cutoff", "10",
                   "--repulsion")  # fmt: skip
    assert vars(flags) | {"conf": None} == vars(args) | {"conf": None}


def test_keys_may_be_written_with_dashes(conf):
    assert merged("--conf", conf("batch-size: 8\nbox-vecs: null")).batch_size == 8


@pytest.mark.parametrize(("line", "message"), [
    ("batch_sise: 8", r"Unknown argument in config file: batch_sise \(conf.yaml, line 2\). Did you mean 'batch_size'"),
    ("learning_rate: 8", "learning_rate .*Did you mean 'lr'"),
    ("precision: 48", "conf.yaml, line 2: precision: 48 is not available. Choose from 32, 64"),
    ("lr: fast", "conf.yaml, line 2: lr='fast' is not valid. It takes a number between 1e-12 and 100"),
    ("derivative: maybe", "conf.yaml, line 2: derivative='maybe' .*true or false"),
    ("dataset: ase", "dataset: 'ase' is not available. Did you mean 'ASE'"),
    ("model: tensor-net", "conf.yaml, line 2: model: 'tensor-net' is not available. Did you mean 'tensornet'"),
    ("lr: null", "conf.yaml, line 2: lr has no value.*leave it out for the default, 0.0001"),
])  # fmt: skip
def test_errors_name_file_line_key_value_and_fix(conf, line, message):
    with pytest.raises(ConfigError, match=message):
        merged("--conf", conf(f"seed: 1\n{line}\n"))


def test_keys_of_earlier_releases_are_accepted_with_a_warning(conf, caplog):
    text = "check_errors: true\ndistributed_backend: ddp\nprogress: false\nforce_weight: 0.8\nenergy_weight: 0.2\nlr: 1"
    with caplog.at_level(logging.WARNING):
        args = merged("--conf", conf(text))
    assert (args.neg_dy_weight, args.y_weight, args.lr) == (0.8, 0.2, 1)
    assert "line 1: check_errors is set aside" in caplog.text
    assert "line 4: force_weight is now spelt neg_dy_weight" in caplog.text


def test_an_architecture_of_the_user_brings_its_own_keys(conf, here, monkeypatch):
    (here / "nets_with_wobble.py").write_text(
        "from torch.nn import Module\n\nclass MyNet(Module):\n"
        "    def __init__(self, hidden_channels, wobble=1.0, dtype=None): ...\n"
        "    def reset_parameters(self): ...\n"
    )
    monkeypatch.syspath_prepend(str(here))
    name = conf("wobble: 0.3\n")
    assert merged("--conf", name, "--model", "nets_with_wobble:MyNet").wobble == 0.3
    with pytest.raises(ConfigError, match=r"Unknown argument in config file: wobble"):
        merged("--conf", name, "--model", "tensornet")
    with pytest.raises(ConfigError, match=r"Unknown argument in config file: wobbel .* Did you mean 'wobble'"):
        merged("--conf", conf("wobbel: 0.3\nmodel: nets_with_wobble:MyNet"))


# Continuing a run


@pytest.fixture
def run(here):
    """A folder with a checkpoint and the settings of its run."""

    def run(**changes):
        folder = here / "old"
        folder.mkdir(exist_ok=True)
        saved = hyper_parameters(merged("--dataset", "QM9", "--model", "tensornet", "--num-layers", "2")) | changes
        (folder / "hparams.yaml").write_text(yaml.dump(saved))
        torch.save({"state_dict": {}, "hyper_parameters": saved}, folder / "last.ckpt")
        return folder

    return run


def test_a_checkpoint_brings_the_settings_of_its_run(run):
    folder = run(lr=0.25, log_dir="old", seed=9)
    args = merged("--load-model", "old/last.ckpt")
    assert (args.load_model, args.dataset, args.model, args.lr, args.log_dir, args.seed) == (
        "old/last.ckpt", "QM9", "tensornet", 0.25, "old", 9,
    )  # fmt: skip
    assert folder.is_dir()


def test_a_run_goes_on_beside_its_checkpoint_also_from_another_working_folder(run, here, monkeypatch):
    run(log_dir="old")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert merged("--load-model", "../old/last.ckpt").log_dir == "../old"
    run(log_dir="logs/other")
    assert merged("--load-model", "../old/last.ckpt").log_dir == "../old"  # renamed since


@pytest.mark.parametrize("words", [["--num-epochs", "500", "--load-model", "old/last.ckpt"],
                                   ["--load-model", "old/last.ckpt", "--num-epochs", "500"]])  # fmt: skip
def test_flags_win_over_the_settings_of_a_checkpoint(run, words):
    run(num_epochs=3)
    assert merged(*words).num_epochs == 500


def test_between_a_file_and_a_checkpoint_the_later_wins(run, conf):
    run(lr=0.25)
    name = conf("lr: 0.5\n")
    assert merged("--conf", name, "--load-model", "old/last.ckpt").lr == 0.25
    assert merged("--load-model", "old/last.ckpt", "--conf", name).lr == 0.5


def test_a_load_model_flag_wins_over_the_file(run, conf, caplog):
    run()
    name = conf("load_model: null\n")
    with caplog.at_level(logging.WARNING):
        assert merged("--load-model", "old/last.ckpt", "--conf", name).load_model == "old/last.ckpt"
    assert "load_model=None is not used" in caplog.text


def test_load_model_in_a_file_does_not_import_settings(run, conf):
    run(lr=0.25)
    args = merged("--conf", conf("load_model: old/last.ckpt\n"))
    assert (args.load_model, args.lr) == ("old/last.ckpt", 1e-4)


def test_settings_come_from_the_checkpoint_when_there_is_no_hparams_file(run, caplog):
    folder = run(lr=0.25, unheard_of=3)
    (folder / "hparams.yaml").unlink()
    with caplog.at_level(logging.INFO):
        args = merged("--load-model", "old/last.ckpt")
    assert (args.load_model, args.lr, args.model) == ("old/last.ckpt", 0.25, "tensornet")
    assert "unheard_of=3 is not known here" in caplog.text


def test_settings_of_another_run_beside_a_checkpoint_are_not_used(run, caplog):
    folder = run(lr=0.25, seed=9)
    (folder / "last.ckpt").rename(folder / "epoch=3.ckpt")
    run(lr=0.5, seed=1)
    with caplog.at_level(logging.WARNING):
        args = merged("--load-model", "old/epoch=3.ckpt")
    assert (args.lr, args.seed) == (0.25, 9)
    assert "hparams.yaml is of another run" in caplog.text
    assert "differ in lr, seed." in caplog.text
    caplog.clear()
    assert merged("--load-model", "old/last.ckpt").seed == 1
    assert not caplog.text


def test_a_renamed_checkpoint_has_its_settings_renamed_beside_it(run, caplog):
    folder = run(lr=0.25)
    for name in ("last.ckpt", "hparams.yaml"):
        (folder / name).rename((folder / name).with_stem(f"{name.partition('.')[0]}_20260102-030405"))
    run(lr=0.5)
    with caplog.at_level(logging.INFO):
        assert merged("--load-model", "old/last_20260102-030405.ckpt").lr == 0.25
    assert not caplog.text


def test_a_run_that_was_given_more_epochs_is_no_other_run(run):
    folder = run(num_epochs=3)
    checkpoint = (folder / "last.ckpt").read_bytes()
    run(num_epochs=9)
    (folder / "last.ckpt").write_bytes(checkpoint)
    assert merged("--load-model", "old/last.ckpt").num_epochs == 9


def test_a_checkpoint_without_settings_is_refused(here):
    torch.save({"state_dict": {}}, "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"hyper_parameters"):
        merged("--load-model", "bare.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"bare.ckpt.*--load-weights"):
        merged("--load-model", "bare.ckpt")


def test_a_missing_checkpoint_is_refused(here):
    with pytest.raises(ConfigError, match=r"load_model: there is no file 'nowhere/x.ckpt'"):
        merged("--load-model", "nowhere/x.ckpt")


def test_an_unknown_key_in_hparams_is_refused(run):
    run(unheard_of=3)
    with pytest.raises(ConfigError, match=r"Unknown argument in the model checkpoint: unheard_of \(.*hparams.yaml"):
        merged("--load-model", "old/last.ckpt")


def test_hparams_are_not_executed(run):
    folder = run()
    (folder / "hparams.yaml").write_text("lr: !!python/object/apply:os.system ['echo']\n")
    with pytest.raises(ConfigError, match=r"refused"):
        merged("--load-model", "old/last.ckpt")


def test_what_started_the_old_run_does_not_start_the_new_one(run):
    run(load_model="older.ckpt", load_weights="w.ckpt", reset_trainer=True, conf="c.yaml", overwrite=True)
    args = merged("--load-model", "old/last.ckpt")
    assert (args.load_model, args.load_weights, args.reset_trainer, args.conf, args.overwrite) == (
        "old/last.ckpt", None, False, None, False,
    )  # fmt: skip


def test_delta_learning_adds_its_prior_once_however_often_a_run_continues(run):
    priors, arguments = None, []
    for _ in range(3):
        priors = add_reference_prior(priors)
        arguments = [{"max_z": 100, "trainable": False, "enable": False}]
        assert priors == [{"Atomref": {"enable": False}}]
        run(remove_ref_energy=True, prior_model=priors, prior_args=arguments)
        args = merged("--load-model", "old/last.ckpt")
        assert args.prior_model is None
        assert args.prior_args is None
        priors = args.prior_model


def test_files_of_older_releases_with_repeated_reference_priors_are_mended(run):
    disabled = {"Atomref": {"enable": False}}
    stored = [{"cutoff_distance": 4.0}, {"max_z": 100, "enable": False}]
    run(remove_ref_energy=True, prior_model=["ZBL", disabled, disabled], prior_args=stored)
    args = merged("--load-model", "old/last.ckpt")
    assert args.prior_model == [{"ZBL": {"cutoff_distance": 4.0}}]
    assert add_reference_prior(args.prior_model) == [{"ZBL": {"cutoff_distance": 4.0}}, disabled]


def test_priors_of_a_checkpoint_keep_their_arguments(run):
    run(prior_model="ZBL", prior_args=[{"cutoff_distance": 4.0, "max_num_neighbors": 50}])
    args = merged("--load-model", "old/last.ckpt")
    assert args.prior_model == [{"ZBL": {"cutoff_distance": 4.0, "max_num_neighbors": 50}}]


@pytest.mark.parametrize(
    "case", ["tn_o3", "tn_delta", "tn_priors", "tn_old_layout", "tn2_coul", "tn2_old_nqe", "et_scalar"]
)
def test_checkpoints_of_release_3_bring_their_settings(case):
    args = merged("--load-model", str(shared(f"interop/{case}/model.ckpt")))
    assert args.model in ("tensornet", "tensornet2", "equivariant-transformer")
    assert args.embedding_dimension == 16
    assert args.dataset == "Custom"
    if case == "tn_delta":
        assert args.remove_ref_energy
        assert args.prior_model is None


# The whole


def test_resolve_fills_what_follows_from_other_options(here):
    args = resolve(["--dataset", "QM9", "--model", "tensornet", "--batch-size", "7"])
    assert args.inference_batch_size == 7
    assert re.fullmatch(r"runs/QM9-tensornet-\d{8}-\d{6}", args.log_dir)
    assert not (here / "runs").exists()


def test_a_default_log_dir_is_never_a_used_one(here):
    first = resolve(["--dataset", "QM9"]).log_dir
    (here / first).mkdir(parents=True)
    (here / "runs").rename(here / "moved")
    names = set()
    for _ in range(3):
        name = resolve(["--dataset", "QM9"]).log_dir
        assert not (here / name).exists()
        (here / name).mkdir(parents=True)
        names.add(name)
    assert len(names) == 3


def test_the_processes_of_a_run_share_the_default_log_dir(here, monkeypatch):
    first = resolve(["--dataset", "QM9"]).log_dir
    (here / first).mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve(["--dataset", "QM9"]).log_dir == first


def test_release_3_can_read_what_is_saved_with_a_model(here):
    from torchmdnet.config import OPTIONS

    saved = hyper_parameters(resolve(["--dataset", "QM9"]))
    assert saved.keys() == {key for key, option in OPTIONS.items() if option.established}
    saved = hyper_parameters(resolve(["--dataset", "QM9", "--model", "tensornet2", "--q-dim", "4"]))
    assert saved["q_dim"] == 4
