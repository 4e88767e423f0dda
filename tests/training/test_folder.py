"""A run whose disk is full, whose folder goes, or that is stopped where nothing is trained, says what is safe."""

import errno
import logging
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from toy_runs import one_thread, rows, settings, train_toy  # noqa: F401 (fixtures)

from torchmdnet import files
from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.data import DataModule
from torchmdnet.errors import ResultError, WriteError
from torchmdnet.files import draft_of
from torchmdnet.scripts.train import main
from torchmdnet.training import run
from torchmdnet.training.folder import potential_so_far
from torchmdnet.training.lightning import LNNP

# ------------------------------------------------------------------------------------------- the folder goes


def _at_epoch(monkeypatch, epoch, act):
    """Do something at the first step of an epoch."""
    step, done = LNNP.training_step, []

    def training_step(self, batch, batch_idx=0):
        if self.current_epoch == epoch and not done:
            done.append(act())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LNNP, "training_step", training_step)


@pytest.mark.parametrize("act", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("elsewhere"))])
def test_a_folder_that_goes_is_made_again_with_settings_division_and_tables(act, tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    args = settings(folder, num_epochs=4)
    names = {path.name for path in folder.iterdir()}
    _at_epoch(monkeypatch, 2, lambda: act(folder))
    run.train(args)
    assert "was deleted or renamed while the run was going; input.yaml, splits.npz, hparams.yaml" in caplog.text
    assert "the best epoch is chosen from those to come" in caplog.text
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0", "1.0", "2.0", "3.0"]
    assert names | {"splits.npz", "hparams.yaml", "best.ckpt", "last.ckpt", "potential.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert len(np.load(folder / "splits.npz")["idx_train"]) == 24
    assert not (folder / ".lock").exists()
    main(["--load-model", str(folder / "last.ckpt"), "--num-epochs", "5"])


def test_files_that_go_are_written_again(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "run"
    args = settings(folder, num_epochs=3)
    lost = ("input.yaml", "splits.npz", "errors.csv")
    _at_epoch(monkeypatch, 1, lambda: [(folder / name).unlink() for name in lost])
    run.train(args)
    assert "lost files while the run was going; input.yaml, splits.npz, errors.csv are written again." in caplog.text
    assert all((folder / name).is_file() for name in lost)
    assert [row["epoch"] for row in rows(folder, "errors.csv")][:3] == ["0", "1", "2"]


def test_a_run_whose_folder_stays_warns_of_nothing(tmp_path, caplog):
    train_toy(tmp_path / "run", num_epochs=2)
    assert "while the run was going" not in caplog.text


# ------------------------------------------------------------------------------------------- the disk is full


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _protected(source, target):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(source), None, os.fspath(target))


def _half_a_checkpoint(content, path, *args, **kwargs):
    path.write_bytes(b"PK\x03\x04")
    raise RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0")


FAULTS = {
    "full": (os, "fsync", _full, "No space left on device"),
    "protected": (os, "replace", _protected, "Permission denied"),
    "full for PyTorch": (torch, "save", _half_a_checkpoint, "PytorchStreamWriter failed writing file"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_that_cannot_write_keeps_its_last_checkpoint_and_tells_how_to_go_on(kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    settings(folder, num_epochs=4)
    owner, name, fault, words = FAULTS[kind]
    monkeypatch.setattr(files, "_FULL", 0)  # whatever the disk of this machine holds
    with monkeypatch.context() as patch:
        _at_epoch(patch, 2, lambda: patch.setattr(owner, name, fault))
        with pytest.raises(SystemExit) as ended:
            main(["--conf", str(folder.with_name("run.yaml"))])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    error = said[said.index("error: ") :]
    assert f"could not be written: {words}" in error.replace("[enforce fail at inline_container.cc:783] . ", "")
    last = folder / "last.ckpt"
    assert f"{last} holds the state after step 6. Continue with: torchmd-train --load-model {last}" in error
    assert "Traceback" not in said
    assert read_checkpoint(last)["global_step"] == 6
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    main(["--load-model", str(last)])
    assert [row["epoch"] for row in rows(folder) if "lr" in row] == ["0.0", "1.0", "2.0", "3.0"]


def test_a_disk_that_is_full_from_the_start_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.os, "fsync", _full)
    with pytest.raises(SystemExit) as ended:
        main(["--dataset", "TinyQM", "--log-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "error: log_dir:" in (error := capsys.readouterr().err)
    assert "No space left on device" in error


def test_a_division_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    args = settings(tmp_path / "run")
    monkeypatch.setattr(files.os, "fsync", _full)
    with pytest.raises(ResultError, match=r"before the first step: .*splits.npz .*Nothing is left of it.*same command"):
        run.train(args)


def test_other_errors_in_a_draft_are_not_taken_for_those_of_the_disk(tmp_path):
    def fail(error):
        with draft_of(tmp_path / "a"):
            raise error

    for error in (FileNotFoundError(errno.ENOENT, "no", "source"), RuntimeError("a shape"), WriteError("inner")):
        with pytest.raises(type(error)) as raised:
            fail(error)
        assert raised.value is error


# ------------------------------------------------------------------------------------------- signals


def _killed_in(owner, name, number):
    original = getattr(owner, name)

    def dies(*args, **kwargs):
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    return dies


MOMENTS = {
    "data": (DataModule, "setup", "stopped before the first step. Nothing is saved yet: start the same command again."),
    "references": (run, "_load_module", "stopped before the first step. Nothing is saved yet"),
    "test": (run, "evaluate_split", "stopped in the final test. {last} holds the state after step 3. Continue with: "),
    "report": (run, "write_all", "stopped while its results were written. {last} holds the state after step 3."),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_outside_of_the_loop_ends_the_run_and_tells_how_to_go_on(
    moment, number, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "run"
    settings(folder, num_epochs=1)
    command = ["--conf", str(folder.with_name("run.yaml"))]
    owner, name, words = MOMENTS[moment]
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(owner, name, _killed_in(owner, name, number))
        with pytest.raises(SystemExit) as ended:
            main(command)
    assert ended.value.code == 128 + number
    last = folder / "last.ckpt"
    assert f"{signal.Signals(number).name}: {words.format(last=last)}" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is handler
    main(["--load-model", str(last)] if last.exists() else command)
    assert (folder / "potential.safetensors").is_file()


def test_a_signal_before_a_resumed_run_begins_points_to_the_checkpoint(tmp_path, monkeypatch, caplog):
    folder = train_toy(tmp_path / "run", num_epochs=1)
    monkeypatch.setattr(DataModule, "setup", _killed_in(DataModule, "setup", signal.SIGTERM))
    with pytest.raises(SystemExit):
        main(["--load-model", str(folder / "last.ckpt"), "--num-epochs", "2"])
    assert f"{folder / 'last.ckpt'} is as it was: start the same command again." in caplog.text


def test_a_run_that_ends_early_says_how_to_make_a_potential_of_its_best_epoch(tmp_path):
    assert potential_so_far(tmp_path / "last.ckpt") == []
    (tmp_path / "best.ckpt").write_bytes(b"")
    (line,) = potential_so_far(tmp_path / "last.ckpt")
    assert line.endswith(f"torchmd-net convert {tmp_path / 'best.ckpt'} {tmp_path / 'potential.safetensors'}")
