"""The folder of a run."""

from __future__ import annotations

import argparse
import errno
import logging
import subprocess
import sys

import pytest
import yaml

from torchmdnet.config import get_argparse, is_main_process, prepare_log_dir, resolve
from torchmdnet.config.rundir import (
    Tee,
    check_logs,
    claim_log_dir,
    companion,
    holds_log_dir,
    reclaim_log_dir,
    redirect,
    release_log_dir,
    save_argparse,
    undo_log_dir,
)
from torchmdnet.errors import ConfigError, WriteError

RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def given(*words):
    return resolve(["--dataset", "QM9", *words])


# input.yaml


def test_input_yaml_holds_every_setting_but_conf_sorted(here):
    args = given("--log-dir", "deep/run", "--dataset-arg", '{"label": "homo"}', "--batch-size", "5")
    prepare_log_dir(args)
    text = (here / "deep/run/input.yaml").read_text()
    saved = yaml.safe_load(text)
    assert saved.keys() == vars(args).keys() - {"conf"}
    assert [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"] == sorted(saved)
    assert saved["dataset_arg"] == {"label": "homo"}
    assert saved["inference_batch_size"] == 5


def test_input_yaml_repeats_the_run(here):
    args = given("--log-dir", "run", "--lr", "1e-7", "--train-size", "1.0", "--val-size", "0", "--test-size", "0",
                 "--prior-model", '{"ZBL": {"cutoff_distance": 4}}', "Atomref",
                 "--box-vecs", "[[9,0,0],[0,9,0],[0,0,9]]",
                 "--early-stopping-monitor", "null", "--train-loss", "huber_loss", "--train-loss-arg",
                 "delta=1e-2")  # fmt: skip
    prepare_log_dir(args)
    again = resolve(["--conf", "run/input.yaml"])
    assert vars(again) | {"conf": None} == vars(args)
    assert type(again.train_size) is float


def test_other_processes_write_nothing(here, monkeypatch):
    args = given("--log-dir", "run")
    monkeypatch.setenv("LOCAL_RANK", "1")
    prepare_log_dir(args)
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", RANKS)
def test_the_main_process_is_the_one_without_a_rank_above_zero(name, monkeypatch):
    assert is_main_process()
    monkeypatch.setenv(name, "0")
    assert is_main_process()
    monkeypatch.setenv(name, "1")
    assert not is_main_process()


def test_a_folder_that_cannot_be_made_is_refused(here):
    (here / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log_dir: 'file/run' cannot be used .*--log-dir"):
        prepare_log_dir(given("--log-dir", "file/run"))


# Earlier runs


@pytest.fixture
def used(here):
    folder = here / "run"
    folder.mkdir()
    for name in (
        "metrics.csv",
        "last.ckpt",
        "best.ckpt",
        "errors.csv",
        "my.png",
        "epoch=9-val_loss=0.1.ckpt",
        "hparams.yaml",
        "notes.txt",
    ):
        (folder / name).write_text("old")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_an_earlier_run_is_kept_and_its_metrics_renamed(used, caplog):
    with caplog.at_level(logging.WARNING):
        prepare_log_dir(given("--log-dir", "run"))
    assert "run holds an earlier run" in caplog.text
    assert not {"metrics.csv", "last.ckpt", "best.ckpt", "errors.csv"} & names(used)
    assert {name.partition("_2")[0] for name in names(used) if "_2" in name} == {
        "metrics", "last", "best", "errors", "hparams",
    }  # fmt: skip
    assert len({path.stem.partition("_")[2] for path in used.iterdir() if "_2" in path.name}) == 1
    assert {"epoch=9-val_loss=0.1.ckpt", "notes.txt", "input.yaml"} <= names(used)


def test_overwrite_deletes_an_earlier_run_and_nothing_else(used):
    prepare_log_dir(given("--log-dir", "run", "--overwrite"))
    assert names(used) == {"notes.txt", "my.png", "input.yaml"}


def test_overwrite_spares_what_the_run_starts_from(used):
    prepare_log_dir(given("--log-dir", "run", "--overwrite", "--load-weights", "run/last.ckpt"))
    assert names(used) == {"notes.txt", "my.png", "input.yaml", "last.ckpt"}


def test_weights_to_start_from_stay_where_they_are_said_to_be(used):
    prepare_log_dir(given("--log-dir", "run", "--load-weights", "run/last.ckpt"))
    assert (used / "last.ckpt").read_text() == "old"
    assert len(list(used.glob("last_*.ckpt"))) == 1


def test_a_run_that_continues_keeps_everything(used):
    args = given("--log-dir", "run")
    args.load_model = "run/last.ckpt"
    prepare_log_dir(args)
    assert {"metrics.csv", "last.ckpt", "input.yaml"} <= names(used)


def test_the_lock_goes_with_the_run_and_can_be_taken_again(here):
    for _ in range(2):
        claim_log_dir(here)
        assert (here / ".lock").read_text().startswith("process ")
        release_log_dir(here)
        assert not (here / ".lock").exists()


def test_what_was_renamed_within_a_second_stays_together(here):
    for text in "ab":
        for name in ("last.ckpt", "metrics.csv", "hparams.yaml", "splits.npz", "report.html"):
            (here / name).write_text(text)
        prepare_log_dir(given("--log-dir", "."))
    for checkpoint in here.glob("last_*.ckpt"):
        for name in ("hparams.yaml", "splits.npz", "report.html"):
            assert companion(checkpoint, name).read_text() == checkpoint.read_text()


def test_metrics_renamed_within_a_second_do_not_collide(here):
    for text in "abc":
        (here / "metrics.csv").write_text(text)
        check_logs(here)
    kept = sorted(here.glob("metrics_*.csv"))
    assert sorted(path.read_text() for path in kept) == ["a", "b", "c"]
    check_logs(here)  # nothing there is fine


def test_settings_can_be_saved_in_part(here):
    args = argparse.Namespace(a=1, b=2, dataset_arg='{"label": "x"}', path=here)

    def saved(name):
        return yaml.safe_load((here / name).read_text())

    save_argparse(args, "x.yaml")
    assert saved("x.yaml") == {"a": 1, "b": 2, "dataset_arg": {"label": "x"}, "path": str(here)}
    save_argparse(args, "x.yml", exclude="a")
    assert "a" not in saved("x.yml")
    save_argparse(args, "x.yml", exclude=["a", "b"])
    assert saved("x.yml").keys() == {"dataset_arg", "path"}
    with pytest.raises(ValueError, match=r"'x.json' does not end in .yaml"):
        save_argparse(args, "x.json")


# The log


def test_the_log_has_what_the_terminal_shows_line_by_line(here, capsys):
    restore = redirect(here / "new" / "folder")
    log = here / "new" / "folder" / "log"
    try:
        print("to stdout")
        assert log.read_text() == "to stdout\n"
        print("to stderr", file=sys.stderr)
        assert log.read_text() == "to stdout\nto stderr\n"
        print("not yet", end="")
        assert "not yet" not in log.read_text()
    finally:
        restore()
    assert log.read_text() == "to stdout\nto stderr\nnot yet\n"
    print("later")
    assert "later" not in log.read_text()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("to stdout\nnot yetlater\n", "to stderr\n")


def test_the_log_shows_progress_bars_once_and_without_colours(here):
    restore = redirect(here)
    print("\r10%\r50%\r\x1b[32m100%\x1b[0m done")
    restore()
    assert (here / "log").read_text() == "100% done\n"


def test_the_log_has_the_messages_of_loggers_that_were_there_before(here):
    logger = logging.getLogger("some.library")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        restore = redirect(here)
        logger.warning("from a library")
        restore()
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
    assert (here / "log").read_text() == "from a library\n"
    assert handler.stream is sys.stderr


def test_a_second_run_adds_to_the_log(here):
    for text in ("one", "two"):
        restore = redirect(here)
        print(text)
        restore()
    assert (here / "log").read_text() == "one\ntwo\n"


def test_parsing_alone_writes_nothing(here):
    get_argparse().parse_args(["--log-dir", "run", "--redirect"])
    assert list(here.iterdir()) == []


# one run at a time

HOLDER = """
import sys, time
from torchmdnet.config import prepare_log_dir, resolve
prepare_log_dir(resolve(["--dataset", "QM9", "--log-dir", "run"]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_run_writes_to_is_refused_until_that_run_ends_or_is_killed(here):
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=here, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            before = (here / "run/input.yaml").read_bytes()
            with pytest.raises(ConfigError, match=rf"log_dir: 'run' belongs to .*process {holder.pid} on .*--log-dir"):
                prepare_log_dir(given("--log-dir", "run", "--overwrite", "true"))
            assert (here / "run/input.yaml").read_bytes() == before
            prepare_log_dir(given("--log-dir", "other"))
        finally:
            holder.kill()
    prepare_log_dir(given("--log-dir", "run"))
    prepare_log_dir(given("--log-dir", "run"))  # a second run of the same process, as scripts do


def test_a_log_that_cannot_be_written_leaves_the_terminal_alone(capsys):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    tee = Tee(sys.stdout, Full())
    tee.write("error: the disk is full\n")
    assert capsys.readouterr().out == "error: the disk is full\n"


def test_a_folder_that_goes_is_noticed_and_claimed_again(here):
    claim_log_dir("run")
    assert holds_log_dir("run")
    (here / "run").rename(here / "elsewhere")
    assert not holds_log_dir("run")
    reclaim_log_dir("run")
    assert holds_log_dir("run")
    release_log_dir("run")
    assert not list((here / "run").iterdir())


def test_settings_that_cannot_be_written_leave_the_old_ones(here, monkeypatch):
    save_argparse(argparse.Namespace(lr=1.0), "input.yaml")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(WriteError, match=r"input.yaml could not be written: No space left on device. The file"):
        save_argparse(argparse.Namespace(lr=2.0), "input.yaml")
    assert (here / "input.yaml").read_text() == "lr: 1.0\n"
    assert [path.name for path in here.iterdir()] == ["input.yaml"]


# A run that is refused


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "runs" / "new"
    prepare_log_dir(given("--log-dir", str(folder)))
    (folder / "splits.npz").write_bytes(b"")
    undo_log_dir(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_an_earlier_one_as_it_was(tmp_path):
    for name in ("metrics.csv", "last.ckpt", "input.yaml", "mine.txt"):
        (tmp_path / name).write_text(f"earlier {name}")
    prepare_log_dir(given("--log-dir", str(tmp_path)))
    assert (tmp_path / "input.yaml").read_text() != "earlier input.yaml"
    undo_log_dir(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: f"earlier {name}" for name in ("metrics.csv", "last.ckpt", "input.yaml", "mine.txt")
    }


def test_a_refused_continuation_keeps_the_settings_of_its_folder(tmp_path):
    (tmp_path / "last.ckpt").write_text("")
    (tmp_path / "input.yaml").write_text("earlier")
    args = given("--log-dir", str(tmp_path))
    args.load_model = str(tmp_path / "last.ckpt")
    prepare_log_dir(args)
    undo_log_dir(tmp_path)
    assert (tmp_path / "input.yaml").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.yaml", "last.ckpt"]


def test_what_others_put_into_a_refused_run_stays(tmp_path):
    prepare_log_dir(given("--log-dir", str(tmp_path / "new")))
    (tmp_path / "new/notes.txt").write_text("mine")
    undo_log_dir(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["notes.txt"]
