import contextlib
import importlib
import io
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from toy_data import Toy
from toy_runs import SETTINGS, finished_run, one_thread, rows, settings, train_toy  # noqa: F401 (fixtures)

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.checkpoint.load import load_model
from torchmdnet.config.settings import read_saved_settings
from torchmdnet.errors import CheckpointError, ConfigError, DivergenceError, ResultError
from torchmdnet.options import OPTIONS
from torchmdnet.training import results, run
from torchmdnet.training.files import SafeCheckpointIO
from torchmdnet.training.lightning import LNNP

# What release 3.1 wrote for a run with forces, mse_loss, test_interval 2 and a test set.
GOLDEN_COLUMNS = (
    "epoch,lr,step,test_neg_dy_l1_loss,test_total_l1_loss,test_y_l1_loss,train_neg_dy_mse_loss,train_total_mse_loss,"
    "train_y_mse_loss,val_neg_dy_l1_loss,val_neg_dy_mse_loss,val_total_l1_loss,val_total_mse_loss,val_y_l1_loss,"
    "val_y_mse_loss"
)


def columns(folder):
    return (folder / "metrics.csv").read_text().splitlines()[0]


# ------------------------------------------------------------------------------------------------ metrics.csv


def test_metrics_have_the_established_columns_and_line_ends(finished):
    assert (finished.folder / "metrics.csv").read_bytes().split(b"\r\n")[0].decode() == GOLDEN_COLUMNS


def test_a_row_names_epoch_learning_rate_and_last_step(finished):
    table = rows(finished.folder)
    assert [row["epoch"] for row in table[:4]] == ["0.0", "1.0", "2.0", "3.0"]
    assert [int(row["step"]) for row in table[:4]] == [2, 5, 8, 11]  # 24 systems in batches of 8
    assert float(table[0]["lr"]) == pytest.approx(1e-2)


def test_the_test_set_is_evaluated_every_test_interval_but_not_in_epoch_0(finished):
    assert ["test_total_l1_loss" in row for row in rows(finished.folder)] == [False, False, True, False, True]


def test_totals_are_weighted_sums_of_their_terms(tmp_path):
    table = rows(train_toy(tmp_path / "run", num_epochs=1, y_weight=0.25, neg_dy_weight=3.0))
    for split, loss in (("train", "mse_loss"), ("val", "l1_loss"), ("val", "mse_loss")):
        y, f, total = (float(table[0][f"{split}_{term}_{loss}"]) for term in ("y", "neg_dy", "total"))
        assert total == pytest.approx(0.25 * y + 3.0 * f, rel=1e-5)


def test_the_final_test_is_filed_under_the_checkpoint_it_tested(finished):
    last, best = rows(finished.folder)[-1], read_checkpoint(finished.folder / "best.ckpt")
    assert float(last["epoch"]) == best["epoch"]
    assert int(last["step"]) == best["global_step"] - 1
    assert set(last) == {"epoch", "step", "test_neg_dy_l1_loss", "test_total_l1_loss", "test_y_l1_loss"}


def test_the_final_test_errors_are_those_of_the_best_checkpoint(finished):
    """Recomputed system by system from the file."""
    model = load_model(finished.folder / "best.ckpt", derivative=True)
    data, numbers = Toy(), np.load(finished.folder / "splits.npz")["idx_test"]
    energy, force = [], []
    for number in numbers:
        sample = data[int(number)]
        y, neg_dy = model(sample.z, sample.pos.float())
        energy.append(float((y.detach() - sample.y).abs()))
        force.append((neg_dy - sample.neg_dy).abs().numpy())
    last = rows(finished.folder)[-1]
    assert float(last["test_y_l1_loss"]) == pytest.approx(np.mean(energy), rel=1e-4)
    assert float(last["test_neg_dy_l1_loss"]) == pytest.approx(np.concatenate(force).mean(), rel=1e-4)
    total = float(last["test_y_l1_loss"]) + float(last["test_neg_dy_l1_loss"])
    assert float(last["test_total_l1_loss"]) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        ({"derivative": False}, "_neg_dy_", "val_y_l1_loss"),
        ({"dataset_arg": {"fields": ["neg_dy"]}}, "_y_", "val_neg_dy_l1_loss"),
        ({"neg_dy_weight": 0.0}, "_neg_dy_", "val_y_l1_loss"),
    ],
    ids=["energies only", "forces only", "no weight on forces"],
)
def test_terms_that_are_not_trained_have_no_columns(tmp_path, changes, absent, present):
    folder = train_toy(tmp_path / "run", num_epochs=1, **changes)
    assert absent not in columns(folder)
    assert present in columns(folder)
    assert "test_total_l1_loss" in columns(folder)


def test_l1_training_has_each_column_once_and_its_own_monitors(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=2, train_loss="l1_loss")
    assert columns(folder).split(",").count("val_total_l1_loss") == 1
    assert "mse_loss" not in columns(folder)
    assert (folder / "best.ckpt").exists()


def test_errors_are_tabled_in_the_units_of_the_data(finished):
    table = rows(finished.folder, "errors.csv")
    assert [(row["epoch"], row["split"]) for row in table] == [
        ("0", "val"), ("1", "val"), ("2", "val"), ("2", "test"), ("3", "val"), (table[-1]["epoch"], "final test"),
    ]  # fmt: skip
    assert float(table[0]["y_mae"]) == pytest.approx(float(rows(finished.folder)[0]["val_y_l1_loss"]), rel=1e-5)
    assert float(table[0]["y_rmse"]) >= float(table[0]["y_mae"]) > float(table[0]["y_mae_per_atom"]) > 0


# ------------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_carry_epoch_loss_and_test_loss_or_say_that_there_was_none(finished):
    names = sorted(path.name for path in finished.folder.glob("epoch=*.ckpt"))
    table = rows(finished.folder)
    assert names == [
        f"epoch={epoch}-val_loss={float(table[epoch]['val_total_mse_loss']):.4f}-test_loss="
        + (f"{float(table[epoch]['test_total_l1_loss']):.4f}" if epoch == 2 else "nan")
        + ".ckpt"
        for epoch in range(4)
    ]


def test_without_a_test_set_names_do_not_speak_of_one(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, test_size=0)
    (path,) = folder.glob("epoch=*.ckpt")
    assert re.fullmatch(r"epoch=0-val_loss=\d+\.\d{4}\.ckpt", path.name)
    assert rows(folder)[-1]["epoch"] == "0.0"
    assert json.loads((folder / "summary.json").read_text())["errors"]["split"] == "val"


def test_a_checkpoint_has_the_established_keys_and_ours_under_one_name(finished):
    checkpoint = torch.load(finished.folder / "last.ckpt", weights_only=True)
    assert set(checkpoint) == {
        "callbacks", "datamodule_hparams_name", "datamodule_hyper_parameters", "epoch", "global_step", "hparams_name",
        "hyper_parameters", "loops", "lr_schedulers", "optimizer_states", "pytorch-lightning_version", "state_dict",
        "torchmdnet",
    }  # fmt: skip
    assert checkpoint["hparams_name"] == "hparams"
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"model"}
    assert {"model.mean", "model.std"} <= set(checkpoint["state_dict"])
    assert checkpoint["callbacks"][
        "ModelCheckpoint{'monitor': 'val_total_mse_loss', 'mode': 'min', 'every_n_train_steps': 0, "
        "'every_n_epochs': 1, 'train_time_interval': None}"
    ]["best_model_path"].startswith(str(finished.folder / "epoch="))


def test_a_checkpoint_and_the_settings_beside_it_say_the_same(finished, caplog):
    settings, where = read_saved_settings(finished.folder / "last.ckpt")
    assert (where, settings["model"].value) == ("the model checkpoint", "tensornet")
    assert "another run" not in caplog.text


def test_hyper_parameters_are_the_options_release_3_knows_and_the_prior_arguments(finished):
    known = {key for key, option in OPTIONS.items() if option.established} | {"prior_args"}
    stored = read_checkpoint(finished.folder / "last.ckpt")["hyper_parameters"]
    assert set(stored) == known
    assert type(stored) is dict
    assert set(yaml.safe_load((finished.folder / "hparams.yaml").read_text())) == known
    assert stored["prior_args"] == []


def test_a_checkpoint_remembers_units_elements_and_level_of_theory(finished):
    facts = read_checkpoint(finished.folder / "best.ckpt")["torchmdnet"]
    assert facts["units"] == {"energy": "eV", "length": "Å"}
    assert facts["elements"] == [1, 6, 7, 8]
    assert facts["level_of_theory"] == "pair potential"


def test_only_the_best_ten_stay(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=13, test_size=0, early_stopping_monitor=None)
    losses = [float(row["val_total_mse_loss"]) for row in rows(folder)]
    kept = {int(re.match(r"epoch=(\d+)", path.name)[1]) for path in folder.glob("epoch=*.ckpt")}
    assert kept == set(np.argsort(losses)[:10].tolist())


@pytest.mark.parametrize("number", [0, 1])
def test_as_many_ranked_checkpoints_stay_as_are_asked_for(tmp_path, number):
    folder = train_toy(tmp_path / "run", num_epochs=3, test_size=0, keep_checkpoints=number)
    assert len(list(folder.glob("epoch=*.ckpt"))) == number
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in folder.iterdir()}


def test_best_is_the_best_epoch_even_between_save_intervals(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=3, save_interval=10)
    losses = [float(row["val_total_mse_loss"]) for row in rows(folder) if "lr" in row]
    assert list(folder.glob("epoch=*")) == []
    assert read_checkpoint(folder / "best.ckpt")["epoch"] == int(np.argmin(losses))
    assert read_checkpoint(folder / "last.ckpt")["epoch"] == 2
    assert float(rows(folder)[-1]["epoch"]) == int(np.argmin(losses))


def test_checkpoints_are_saved_after_every_nth_epoch(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=5, save_interval=2)
    assert sorted(path.name[:7] for path in folder.glob("epoch=*")) == ["epoch=1", "epoch=3"]


def test_the_file_alone_gives_the_module_back(finished):
    path = finished.folder / "best.ckpt"
    lnnp = LNNP.load_from_checkpoint(path)
    stored = read_checkpoint(path)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in lnnp.state_dict().items())
    assert lnnp.hparams.lr == 1e-2


# ------------------------------------------------------------------------------------------------ schedule


def test_warm_up_is_linear_in_steps(tmp_path):
    table = rows(train_toy(tmp_path / "run", num_epochs=3, lr=1e-3, lr_warmup_steps=8))
    # the rate of the last step of each epoch: steps 3, 6 and 9 of 8
    assert [float(row["lr"]) for row in table[:3]] == pytest.approx([3e-3 / 8, 6e-3 / 8, 1e-3])


def test_a_plateau_lowers_the_rate_to_the_floor(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=6, lr=1e-6, lr_factor=0.5, lr_min=2e-7, lr_patience=0)
    # with so small a step the loss improves by less than 1e-4 of itself, which counts as none
    expected = [1e-6, 1e-6, 5e-7, 2.5e-7, 2e-7, 2e-7]
    assert [float(row["lr"]) for row in rows(folder)[:6]] == pytest.approx(expected)


def test_early_stopping_counts_epochs_without_improvement(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        folder = train_toy(tmp_path / "run", num_epochs=20, lr=0.0, early_stopping_patience=2)
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0", "1.0", "2.0"]
    assert "Stopped early: val_total_mse_loss no longer improved (early_stopping_patience: 2 epochs)" in said.getvalue()


def test_a_run_that_comes_to_its_last_epoch_says_so_even_where_patience_ends_there(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        folder = train_toy(tmp_path / "run", num_epochs=3, lr=0.0, early_stopping_patience=2)
    assert "All epochs done." in said.getvalue()
    assert "Stopped" not in said.getvalue()
    assert json.loads((folder / "summary.json").read_text())["stopped"] == "all epochs done"


def test_a_loss_that_is_not_a_number_ends_the_run_with_advice(tmp_path):
    refused = pytest.raises(DivergenceError, match=r"batch \d of epoch \d.*No potential.safetensors.*lower lr")
    with contextlib.redirect_stdout(io.StringIO()) as said, refused:
        args = settings(folder := tmp_path / "run", num_epochs=9)
        args.lr = 1e30  # beyond what settings may be
        run.train(args)
    assert len(rows(folder)) < 9
    assert [row["test_total_l1_loss"] for row in rows(folder) if "test_total_l1_loss" in row][-1] in ("nan", "inf")
    assert rows(folder, "errors.csv")[-1]["neg_dy_mae"] in ("nan", "inf")
    assert not (folder / "potential.safetensors").exists()
    assert "is not a number any more; try a lower lr" in said.getvalue()
    assert json.loads((folder / "summary.json").read_text())["epochs"] < 9


@pytest.mark.parametrize("sizes", [{"val_size": 0}, {"splits": True}], ids=["val_size 0", "empty split in a file"])
def test_without_a_validation_set_training_losses_are_followed(tmp_path, sizes):
    if "splits" in sizes:
        parts = {"idx_train": np.arange(24), "idx_val": np.arange(0), "idx_test": np.arange(24, 32)}
        np.savez(tmp_path / "splits.npz", **parts)
        sizes = {"splits": str(tmp_path / "splits.npz")}
    folder = train_toy(tmp_path / "run", num_epochs=2, **sizes)
    assert columns(folder).startswith("epoch,lr,step,test_neg_dy_l1_loss")
    assert "train_total_mse_loss" in columns(folder)
    assert "val_" not in columns(folder)
    assert len(list(folder.glob("epoch=*-train_loss=*.ckpt"))) == 2


def test_periodic_tests_do_not_change_the_training(tmp_path, finished):
    table = rows(train_toy(tmp_path / "run", test_interval=-1))
    for column in ("train_total_mse_loss", "val_total_mse_loss"):
        assert [row[column] for row in table[:4]] == [row[column] for row in rows(finished.folder)[:4]]


def test_double_precision_reaches_the_logs(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, precision=64)
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float64}


# ------------------------------------------------------------------------------------------------ data


def test_data_are_read_once_and_split_once(tmp_path, monkeypatch):
    from torchmdnet.data import module as data_module

    made, split = [], []
    monkeypatch.setattr(
        Toy, "__init__", lambda self, *a, _init=Toy.__init__, **k: (made.append(1), _init(self, *a, **k))[1]
    )
    save = data_module.save_splits
    monkeypatch.setattr(data_module, "save_splits", lambda *a, **k: (split.append(1), save(*a, **k)))
    train_toy(tmp_path / "run", num_epochs=2, test_interval=1)
    assert (len(made), len(split)) == (1, 1)


def test_the_settings_given_are_not_changed(tmp_path):
    args = settings(tmp_path / "run", num_epochs=1, remove_ref_energy=True)
    before = dict(vars(args))
    run.train(args)
    assert vars(args) == before


def test_delta_learning_keeps_the_reference_energies_with_the_model(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, remove_ref_energy=True)
    stored = read_checkpoint(folder / "best.ckpt")["hyper_parameters"]
    assert stored["prior_model"] == [{"Atomref": {"enable": False}}]
    sample = Toy()[0]
    relative = load_model(folder / "best.ckpt", derivative=False)(sample.z, sample.pos.float())[0]
    total = load_model(folder / "best.ckpt", remove_ref_energy=False, derivative=False)(sample.z, sample.pos.float())[0]
    # the toy energy is a small pair repulsion less one per proton: -10 for water
    assert float((total - relative).detach()) == pytest.approx(-10.0, abs=1.0)


def test_standardising_takes_mean_and_deviation_of_the_training_labels(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, standardize=True)
    state = read_checkpoint(folder / "best.ckpt")["state_dict"]
    numbers = np.load(folder / "splits.npz")["idx_train"]
    energies = np.array([float(Toy()[int(n)].y) for n in numbers])
    assert float(state["model.mean"]) == pytest.approx(energies.mean(), rel=1e-5)
    assert float(state["model.std"]) == pytest.approx(energies.std(ddof=1), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"charge": True, "dataset_arg": {"fields": ["y", "neg_dy"]}}, r"charge.*'q'"),
        ({"spin": True}, r"spin.*'s'"),
        ({"max_z": 8}, r"max_z: 8 is too small.*atomic number 8.*9"),
        (
            {"atom_filter": 8, "derivative": False},
            r"atom_filter: 8 leaves no atom of 24 of 24 .* atomic number 8",
        ),
        ({"atom_filter": 99, "derivative": False}, r"atom_filter=99 hides every atom: .* max_z=100"),
        ({"precision": 16}, r"precision.*16"),
        ({"dataset_arg": {"fields": ["neg_dy"]}, "derivative": False}, "derivative: true"),
        ({"ngpus": 0}, "ngpus"),
    ],
    ids=["charge", "spin", "max_z", "no heavy atom", "no atom", "half precision", "forces unused", "no device"],
)
def test_options_the_data_cannot_serve_are_refused_before_training(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_toy(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ------------------------------------------------------------------------------------------------ starting points


def test_load_weights_starts_from_the_weights_alone(tmp_path, finished):
    folder = train_toy(tmp_path / "run", num_epochs=1, lr=0.0, load_weights=str(finished.folder / "best.ckpt"))
    ours = read_checkpoint(folder / "last.ckpt")
    theirs = read_checkpoint(finished.folder / "best.ckpt")["state_dict"]
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs.items())
    assert ours["epoch"] == 0


def test_load_weights_reads_old_files_without_box_and_with_a_namespace(tmp_path, finished):
    checkpoint = read_checkpoint(finished.folder / "best.ckpt")
    del checkpoint["state_dict"]["model.representation_model.distance.box"]
    checkpoint["hyper_parameters"] = Namespace(**checkpoint["hyper_parameters"])
    torch.save(checkpoint, tmp_path / "old.ckpt")
    folder = train_toy(tmp_path / "run", num_epochs=1, lr=0.0, load_weights=str(tmp_path / "old.ckpt"))
    name = "model.representation_model.tensor_embedding.distance_proj1.weight"
    assert torch.equal(read_checkpoint(folder / "last.ckpt")["state_dict"][name], checkpoint["state_dict"][name])


def test_reset_trainer_takes_the_weights_and_counts_from_zero(tmp_path, finished):
    args = settings(tmp_path / "run", num_epochs=1, load_model=str(finished.folder / "last.ckpt"), reset_trainer=True)
    folder = run.train(args)
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0"]
    first, before = rows(folder)[0], rows(finished.folder)[0]
    assert float(first["train_total_mse_loss"]) < float(before["train_total_mse_loss"])


def test_weights_without_an_optimizer_cannot_be_continued(tmp_path, finished):
    checkpoint = read_checkpoint(finished.folder / "last.ckpt")
    for key in ("optimizer_states", "lr_schedulers", "loops"):
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match=r"no optimizer state.*--reset-trainer"):
        train_toy(tmp_path / "run", load_model=str(tmp_path / "weights.ckpt"))


# ------------------------------------------------------------------------------------------------ telling


def test_without_a_terminal_there_is_one_line_per_epoch(finished):
    lines = [line for line in finished.said.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 4
    assert re.match(
        r"epoch 0  lr 1\.00e-02  train loss \S+  val energy MAE \S+ meV/atom  val force MAE \S+ meV/Å  time \S+ s  "
        r"samples/s \S+  1 of 4 epochs, .*\d s left  best$",
        lines[0],
    )
    assert re.search(r"  4 of 4 epochs(  best)?$", lines[3])
    assert "\x1b" not in finished.said
    assert "test force MAE" in lines[2]


def test_the_errors_shown_are_those_of_the_table_in_milli_electronvolt(finished):
    line = next(line for line in finished.said.splitlines() if line.startswith("epoch 1"))
    shown = float(re.search(r"val force MAE (\S+) meV/Å", line)[1])
    assert shown == pytest.approx(1000 * float(rows(finished.folder)[1]["val_neg_dy_l1_loss"]), rel=6e-3)


def test_the_end_names_the_best_checkpoint_and_compares_with_a_trivial_guess(finished):
    assert f"best: {finished.folder / 'best.ckpt'}, epoch" in finished.said
    assert re.search(r"force component +\S+ +\S+ +\S+  meV/Å", finished.said)
    assert "trivial: mean energy of the composition, zero force" in finished.said


def test_lightning_does_not_speak(finished, capfd, tmp_path):
    train_toy(tmp_path / "run", num_epochs=1)
    err = capfd.readouterr().err
    assert not any(word in err for word in ("GPU available", "Tip", "Trainer", "num_workers", "Warning"))


def test_the_summary_repeats_the_numbers(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    last = rows(finished.folder)[-1]
    assert summary["errors"]["split"] == "test"
    assert summary["errors"]["neg_dy_mae"] == pytest.approx(float(last["test_neg_dy_l1_loss"]))
    assert summary["units"] == {"energy": "eV", "length": "Å"}
    assert summary["tested"] == {"checkpoint": "best.ckpt", "epoch": int(float(last["epoch"]))}
    forces = np.concatenate([Toy()[int(n)].neg_dy.numpy() for n in np.load(finished.folder / "splits.npz")["idx_test"]])
    assert summary["baseline"]["neg_dy_mae"] == pytest.approx(abs(forces).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["potential.safetensors", "summary.json", "learning_curves.png", "report.html"])
def test_a_result_that_cannot_be_written_costs_no_other_and_is_an_error(tmp_path, monkeypatch, name):
    writer = {
        "potential.safetensors": "write_potential",
        "summary.json": "write_summary",
        "report.html": "write_report",
    }.get(name)
    owner = results if writer else importlib.import_module("torchmdnet.training.plots")
    monkeypatch.setattr(owner, writer or "draw_learning_curves", lambda *a: 1 / 0)
    files = {"potential.safetensors", "summary.json", "learning_curves.png", "parity.png", "report.html"}
    said = io.StringIO()
    with pytest.raises(ResultError, match=rf"{name} \(ZeroDivisionError.*best\.ckpt"), contextlib.redirect_stdout(said):
        train_toy(tmp_path / "run", num_epochs=1, report=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} & files == files - {name}
    assert ("report: " in said.getvalue()) == (name != "report.html")
    assert ("potential: " in said.getvalue()) == (name != "potential.safetensors")


def test_a_missing_result_ends_the_program_with_a_status(tmp_path, monkeypatch, capsys):
    from torchmdnet.scripts.train import main

    settings(tmp_path / "run", num_epochs=1)
    monkeypatch.setattr(results, "write_potential", lambda *a: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main(["--conf", str(tmp_path / "run.yaml")])
    assert ended.value.code == 1
    assert "potential.safetensors (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_results_are_named_when_they_are_there(tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(results, "write_report", lambda *a: said.write("[the report is written]"))
    with contextlib.redirect_stdout(said):
        train_toy(tmp_path / "run", num_epochs=1, report=True)
    moments = ["potential: ", "[the report is written]", "report: "]
    assert sorted(moments, key=said.getvalue().index) == moments


def test_report_can_be_switched_off(tmp_path):
    folder = train_toy(tmp_path / "run", num_epochs=1, report=False)
    assert not list(folder.glob("*.png"))
    assert not (folder / "report.html").exists()
    assert (folder / "summary.json").exists()


# ------------------------------------------------------------------------------------------------ accidents


def test_an_exception_inside_an_epoch_leaves_the_steps_so_far(tmp_path, monkeypatch):
    step, count = LNNP.training_step, []

    def breaks(self, batch, batch_idx=0):
        count.append(1)
        if len(count) == 6:
            raise RuntimeError("out of memory")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LNNP, "training_step", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_toy(tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert (last["epoch"], last["global_step"]) == (1, 5)


def test_an_exception_in_the_middle_of_an_update_keeps_the_last_whole_state(tmp_path, monkeypatch):
    step, count = torch.optim.AdamW.step, []

    def breaks(self, closure=None):
        result = step(self, closure)
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("half way")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    with pytest.raises(RuntimeError, match="half way"):
        train_toy(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 3


def test_drafts_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / "run").mkdir()
    draft = tmp_path / "run" / ".last.ckpt.123.tmp"
    draft.write_bytes(b"half")
    train_toy(tmp_path / "run", num_epochs=1)
    assert not draft.exists()


def test_every_checkpoint_is_written_through_the_safe_writer(tmp_path, monkeypatch):
    written, save = [], SafeCheckpointIO.save_checkpoint

    def note(self, checkpoint, path, storage_options=None):
        written.append(path)
        save(self, checkpoint, path)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", note)
    train_toy(tmp_path / "run", num_epochs=2)
    assert len(written) == 2  # one file per epoch is serialised, the others are copies of it


def test_weights_that_are_lost_are_not_saved_and_end_the_run(tmp_path, monkeypatch):
    """Early stopping is off; the second epoch makes the weights NaN."""
    step = LNNP.training_step

    def losing(self, *args, **kwargs):
        return step(self, *args, **kwargs) * (float("nan") if self.current_epoch == 1 else 1.0)

    monkeypatch.setattr(LNNP, "training_step", losing)
    ended = pytest.raises(DivergenceError, match=r"batch 1 of epoch 1.*holds the best weights before, those of epoch 0")
    with contextlib.redirect_stdout(io.StringIO()) as said, ended:
        train_toy(folder := tmp_path / "run", early_stopping_monitor=None, num_epochs=9)
    assert (folder / "potential.safetensors").exists()
    assert "Stopped: the weights are not numbers any more; try a lower lr" in said.getvalue()
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = read_checkpoint(folder / name)
        assert checkpoint["epoch"] == 0
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())
    monkeypatch.undo()
    train_toy(folder, load_model=str(folder / "last.ckpt"), num_epochs=3)
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0", "1.0", "2.0"]


def test_all_toy_settings_are_options():
    assert set(SETTINGS) <= set(OPTIONS)


def test_a_run_that_the_data_refuse_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="samples are asked for"):
        train_toy(tmp_path / "run", train_size=1000)
    assert not (tmp_path / "run").exists()
