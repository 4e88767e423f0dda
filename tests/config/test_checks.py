"""Options that must fit together."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging

import numpy as np
import pytest
import torch

from torchmdnet.config import resolve
from torchmdnet.config.rundir import save_argparse
from torchmdnet.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(*words):
    return resolve(["--dataset", "QM9", *words])


def test_a_loss_per_atom_of_a_mean_over_atoms_is_refused():
    with pytest.raises(ConfigError, match="reduce_op=average y is a mean over atoms already"):
        given("--y-loss-per-atom", "--reduce-op", "average")


def test_a_run_needs_a_data_set():
    with pytest.raises(ConfigError, match=r"dataset is not given.*--dataset TinyQM.*QM9"):
        resolve([])


def test_custom_data_need_their_files():
    with pytest.raises(ConfigError, match=r"Custom needs coord_files, embed_files, energy_files or force_files"):
        resolve(["--dataset", "Custom"])
    with pytest.raises(ConfigError, match=r"Custom needs energy_files or force_files"):
        resolve(["--dataset", "Custom", "--coord-files", "c*", "--embed-files", "e*"])
    resolve(["--dataset", "Custom", "--coord-files", "c*", "--embed-files", "e*", "--force-files", "f*"])


# Loss and monitors


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "huber_loss"])
def test_monitors_follow_the_loss_unless_they_were_given(loss):
    args = given("--train-loss", loss)
    assert (args.early_stopping_monitor, args.checkpoint_monitor) == (f"val_total_{loss}",) * 2
    args = given("--train-loss", loss, "--early-stopping-monitor", f"train_total_{loss}",
                 "--checkpoint-monitor", "val_total_l1_loss")  # fmt: skip
    assert (args.early_stopping_monitor, args.checkpoint_monitor) == (f"train_total_{loss}", "val_total_l1_loss")


def test_monitors_of_the_default_loss_follow_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        args = given("--train-loss", "huber_loss", "--checkpoint-monitor", "train_total_mse_loss")
    assert args.checkpoint_monitor == "train_total_huber_loss"
    assert "checkpoint_monitor=train_total_mse_loss is never logged with train_loss=huber_loss" in caplog.text


@pytest.mark.parametrize("monitor", ["val_total_huber_loss", "train_total_l1_loss", "val_loss", "loss"])
def test_monitors_that_are_never_logged_are_refused(monitor):
    with pytest.raises(ConfigError, match=rf"--checkpoint-monitor: .*'{monitor}' is never logged.*val_total_mse_loss"):
        given("--checkpoint-monitor", monitor)


def test_monitors_can_be_turned_off():
    args = given("--early-stopping-monitor", "null", "--train-loss", "l1_loss")
    assert args.early_stopping_monitor is None


def test_a_loss_of_the_user_gives_the_monitors_its_name(here, monkeypatch):
    (here / "my_losses.py").write_text("def cauchy(x, y):\n    return (x - y).abs().mean()\n")
    monkeypatch.syspath_prepend(str(here))
    assert given("--train-loss", "my_losses:cauchy").early_stopping_monitor == "val_total_cauchy"


def test_without_validation_data_the_training_loss_is_followed(caplog):
    with caplog.at_level(logging.WARNING):
        args = given("--val-size", "0", "--train-loss", "l1_loss")
    assert (args.early_stopping_monitor, args.checkpoint_monitor) == ("train_total_l1_loss",) * 2
    assert args.lr_metric == "train"
    assert "val_size is 0" in caplog.text


def test_arguments_that_the_loss_does_not_take_are_refused():
    assert given("--train-loss", "huber_loss", "--train-loss-arg", "delta=0.5").train_loss_arg == {"delta": 0.5}
    with pytest.raises(ConfigError, match=r"train_loss_arg: .*beta.*delta"):
        given("--train-loss", "huber_loss", "--train-loss-arg", "beta=0.5")


def test_something_must_be_trained_on():
    with pytest.raises(ConfigError, match=r"y_weight=0 and neg_dy_weight=0"):
        given("--y-weight", "0", "--neg-dy-weight", "0", "--derivative")
    with pytest.raises(ConfigError, match=r"y_weight=0 and derivative=False"):
        given("--y-weight", "0")
    given("--y-weight", "0", "--derivative")


def test_a_force_weight_without_forces_is_pointed_out(caplog):
    with caplog.at_level(logging.WARNING):
        given("--neg-dy-weight", "1")
        given("--neg-dy-weight", "10", "--derivative")
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        given("--neg-dy-weight", "10")
    assert "neg_dy_weight=10 has no effect" in caplog.text


# Splits


@pytest.mark.parametrize("key", ["train_size", "val_size", "test_size"])
def test_fractions_above_one_are_refused_by_name(key):
    flag = "--" + key.replace("_", "-")
    with pytest.raises(ConfigError, match=rf"{flag}: {key}=2.0 is a fraction above 1. Write 2 for a count"):
        given(flag, "2.0")
    assert getattr(given(flag, "2"), key) == 2


def test_sizes_are_explained():
    with pytest.raises(ConfigError, match=r"above 1. A count is a whole number, and a fraction lies between 0"):
        given("--val-size", "1.2")
    with pytest.raises(ConfigError, match=r"--val-size: val_size='10%' is not valid \(write 0.1 for 10%\)"):
        given("--val-size", "10%")


def test_only_one_size_takes_the_rest():
    with pytest.raises(ConfigError, match=r"train_size and test_size are both None"):
        given("--test-size", "None")
    given("--test-size", "None", "--train-size", "10")


def test_fractions_cannot_exceed_the_whole():
    with pytest.raises(ConfigError, match=r"more than the whole \(1.1\)"):
        given("--train-size", "0.95")
    given("--train-size", "0.85")


def test_an_empty_training_set_is_refused():
    with pytest.raises(ConfigError, match=r"train_size=0 leaves nothing"):
        given("--train-size", "0")


def test_a_split_file_makes_sizes_irrelevant(here):
    np.savez(here / "s.npz", idx_train=[0], idx_val=[1], idx_test=[2])
    args = given("--splits", "s.npz", "--train-size", "None", "--val-size", "None", "--test-size", "None")
    assert args.splits == "s.npz"
    assert given("--splits", "dataset").splits == "dataset"
    with pytest.raises(ConfigError, match=r"^--splits: there is no file 'x.npz'.*the word 'dataset'"):
        given("--splits", "x.npz")
    with pytest.raises(ConfigError, match=r"^--splits: '\.' is a folder, not a file\. Give an .npz file"):
        given("--splits", ".")
    with pytest.raises(ConfigError, match=r"^--splits: '/dev/zero' is no regular file"):
        given("--splits", "/dev/zero")


# Model


def test_an_atom_filter_excludes_forces():
    with pytest.raises(ConfigError, match=r"atom_filter=1 cannot be combined with derivative"):
        given("--atom-filter", "1", "--derivative")
    given("--atom-filter", "1")


def test_cutoffs_must_leave_room():
    with pytest.raises(ConfigError, match=r"cutoff_lower=5 is not below cutoff_upper=5"):
        given("--cutoff-lower", "5")


def test_heads_share_channels_evenly():
    with pytest.raises(ConfigError, match=r"embedding_dimension=100 cannot be shared evenly by num_heads=8"):
        given("--model", "equivariant-transformer", "--embedding-dimension", "100")
    given("--model", "tensornet", "--embedding-dimension", "100")


def test_minus_one_gpu_needs_no_gpu():
    assert given("--ngpus", "-1").ngpus == -1
    with pytest.raises(ConfigError, match=r"ngpus=0 leaves nothing to run on"):
        given("--ngpus", "0")


def test_half_precision_is_refused():
    with pytest.raises(ConfigError, match=r"precision: 16 is not available.*32, 64"):
        given("--precision", "16")


@pytest.mark.parametrize("prior", ["Atomref", "LearnableAtomref", '{"Atomref": {"max_z": 10}}'])
def test_reference_energies_cannot_be_removed_twice(prior):
    with pytest.raises(ConfigError, match=r"remove_ref_energy and prior_model.*count them twice"):
        given("--remove-ref-energy", "--prior-model", '{"ZBL": {"cutoff_distance": 4}}', prior)
    given("--prior-model", prior)
    given("--remove-ref-energy", "--prior-model", '{"ZBL": {"cutoff_distance": 4}}', '{"Atomref": {"enable": false}}')


# What must be there


@pytest.mark.parametrize(("key", "package"), [("tensorboard_use", "tensorboard"), ("wandb_use", "wandb")])
def test_trackers_are_looked_for_before_any_work(key, package, monkeypatch, here):
    flag = "--" + key.replace("_", "-")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{key} is on, but {package} is not installed. Run 'pip install {package}'"):
        given(flag)
    # A folder with that name is not the package.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(ConfigError, match=r"is not installed"):
        given(flag)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin="x")
    )
    given(flag)


@pytest.mark.parametrize("flag", ["--model", "--output-model", "--prior-model", "--dataset"])
def test_addresses_are_looked_for_before_any_work(flag, here, monkeypatch):
    (here / "my_parts.py").write_text(
        "from torchmdnet.heads.base import OutputModel\nfrom torchmdnet.priors.base import BasePrior\n"
        "class Head(OutputModel): ...\nclass Prior(BasePrior): ...\n"
        "class Part(Head):\n    def __len__(self): ...\n    def __getitem__(self, i): ...\n"
        "    def reset_parameters(self): ...\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(str(here))
    given(flag, "my_parts:Prior" if flag == "--prior-model" else "my_parts:Part")
    for address, message in [
        ("my_part:Part", "module 'my_part', which cannot be found"),
        ("my_parts:Prt", "has no 'Prt'"),
        ("my_parts:number", "is no class|is no subclass of torch"),
    ]:
        with pytest.raises(ConfigError, match=message):
            given(flag, address)


def test_files_to_start_from_must_exist():
    with pytest.raises(ConfigError, match=r"^--load-weights: there is no file 'w.ckpt'"):
        given("--load-weights", "w.ckpt")


@pytest.mark.parametrize("flag", ["--load-model", "--load-weights"])
def test_the_checkpoint_that_was_probably_meant_is_named(here, flag):
    (here / "run").mkdir()
    (here / "run/last.ckpt").touch()
    with pytest.raises(ConfigError, match=r"It is a folder. Name the checkpoint in it: 'run/last.ckpt'"):
        given(flag, "run")
    with pytest.raises(ConfigError, match=r"there is no file 'run/lst.ckpt'. Did you mean 'run/last.ckpt'"):
        given(flag, "run/lst.ckpt")
    with pytest.raises(ConfigError, match=r"Beside it: last.ckpt"):
        given(flag, "run/0")


def test_weights_come_from_the_checkpoint_that_is_continued(here, caplog):
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "tensornet"}}, "a.ckpt")
    torch.save({"state_dict": {}}, "w.ckpt")
    with caplog.at_level(logging.WARNING):
        args = given("--load-model", "a.ckpt", "--load-weights", "w.ckpt")
    assert args.load_weights is None
    assert "load_weights='w.ckpt' is not used" in caplog.text


def test_a_checkpoint_that_is_continued_cannot_be_overwritten(here):
    (here / "run").mkdir()
    torch.save({"state_dict": {}, "hyper_parameters": {"model": "tensornet"}}, "run/a.ckpt")
    with pytest.raises(ConfigError, match=r"overwrite would delete 'run/a.ckpt'"):
        given("--load-model", "run/a.ckpt", "--log-dir", "run", "--overwrite")


def test_resetting_without_a_checkpoint_is_pointed_out(caplog):
    with caplog.at_level(logging.WARNING):
        given("--reset-trainer", "--accept-changed-data")
    assert "reset_trainer has no effect" in caplog.text
    assert "accept_changed_data has no effect" in caplog.text


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "warmup-stable-decay"])
@pytest.mark.parametrize(
    ("key", "value"), [("lr_patience", "3"), ("lr_factor", "0.5"), ("lr_min", "0"), ("lr_metric", "train")]
)
def test_options_of_the_plateau_are_refused_with_another_schedule(schedule, key, value, here):
    flag = "--" + key.replace("_", "-")
    with pytest.raises(
        ConfigError, match=rf"^{flag}: {key}=.* belongs to lr_schedule=plateau; with lr_schedule={schedule}"
    ):
        given("--lr-schedule", schedule, flag, value)
    (here / "run.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(ConfigError, match=rf"^run.yaml, line 1: {key}="):
        given("--conf", "run.yaml", "--lr-schedule", schedule)
    given(flag, value)


def test_the_settings_that_a_planned_run_wrote_can_be_used_again(here):
    args = given("--lr-schedule", "cosine", "--val-size", "0", "--log-dir", "first")
    assert args.lr_metric == "val"
    save_argparse(args, here / "input.yaml", exclude="conf")
    again = given("--conf", "input.yaml", "--log-dir", "second")
    assert (again.lr_schedule, again.early_stopping_monitor) == ("cosine", None)


def test_a_share_of_decay_needs_its_schedule():
    for schedule in ("plateau", "cosine"):
        with pytest.raises(ConfigError, match=rf"lr_decay_fraction=0.5 belongs to .*, but lr_schedule is {schedule}"):
            given("--lr-schedule", schedule, "--lr-decay-fraction", "0.5")
    assert given("--lr-schedule", "warmup-stable-decay", "--lr-decay-fraction", "0.5").lr_decay_fraction == 0.5


def test_a_planned_run_has_an_end():
    with pytest.raises(ConfigError, match=r"num_epochs=-1 has no end. Give num_epochs, or max_time"):
        given("--lr-schedule", "cosine", "--num-epochs", "-1")
    assert given("--lr-schedule", "cosine", "--num-epochs", "-1", "--max-time", "01:00:00").max_time == 3600


def test_a_planned_run_is_stopped_early_only_where_that_is_asked_for(caplog):
    assert given("--lr-schedule", "cosine").early_stopping_monitor is None
    assert "early stopping" not in caplog.text
    assert given("--lr-schedule", "cosine", "--early-stopping-patience", "5").early_stopping_monitor
    assert "early stopping may end the run before lr_schedule=cosine" in caplog.text


def test_groups_of_weight_decay_without_any_are_warned_of(caplog):
    given("--weight-decay-on", "matrices")
    assert "weight_decay_on=matrices has no effect, because weight_decay is 0" in caplog.text


def test_words_of_other_programs_lead_to_the_average_of_weights():
    with pytest.raises(ConfigError, match="--model-ema-decay"):
        given("--ema-decay", "0.99")
