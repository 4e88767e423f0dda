"""The program."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import yaml
from conftest import REPOSITORY

from torchmdnet.errors import CheckpointError, ConfigError, DataError
from torchmdnet.scripts import train as program


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


@pytest.fixture
def training(monkeypatch):
    """Stands in for the training itself: takes the settings, or fails as it is told."""

    class Training(ModuleType):
        seen = None
        failure: BaseException | None = None

        def train(self, args):
            self.seen = args
            if self.failure:
                raise self.failure
            print("trained")

    module = Training("torchmdnet.training.run")
    monkeypatch.setitem(sys.modules, "torchmdnet.training.run", module)
    return module


def test_the_program_trains_with_the_settings(training, here):
    program.main(["--dataset", "QM9", "--lr", "1e-3", "--log-dir", "run"])
    assert training.seen.lr == 1e-3
    assert yaml.safe_load((here / "run/input.yaml").read_text())["lr"] == 1e-3


def test_the_program_reads_sys_argv(training, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchmd-train", "--dataset", "QM9", "-l", "run"])
    program.main()
    assert training.seen.log_dir == "run"
    assert program.get_args().dataset == "QM9"


def test_a_default_folder_is_announced(training, here, capfd):
    program.main(["--dataset", "QM9"])
    assert (here / training.seen.log_dir / "input.yaml").is_file()


@pytest.mark.parametrize(("failure", "status"), [(ConfigError, 2), (DataError, 1), (CheckpointError, 1)])
def test_what_cannot_work_is_said_in_one_line(training, capsys, failure, status):
    training.failure = failure("the reason")
    with pytest.raises(SystemExit) as end:
        program.main(["--dataset", "QM9", "-l", "run"])
    assert end.value.code == status
    assert capsys.readouterr().err.splitlines()[-1] == "error: the reason"


def test_an_interrupt_outside_of_training_ends_in_one_line(training, capsys):
    training.failure = KeyboardInterrupt()
    with pytest.raises(SystemExit) as end:
        program.main(["--dataset", "QM9", "-l", "run"])
    assert end.value.code == 130
    said = "SIGINT: stopped before anything was saved. Start the same command again."
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_traceback_can_be_asked_for(training, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_TRACEBACK", "1")
    training.failure = DataError("the reason")
    with pytest.raises(DataError, match=r"the reason"):
        program.main(["--dataset", "QM9", "-l", "run"])


def test_other_failures_keep_their_traceback(training):
    training.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        program.main(["--dataset", "QM9", "-l", "run"])


@pytest.mark.parametrize("words", [
    [], ["--dataset", "QM-9"], ["--conf", "missing.yaml"], ["--conf", "empty.yaml"], ["--conf", "list.yaml"],
    ["--conf", "broken.yaml"], ["--conf", "x.txt"], ["--nonsense"], ["--conf", "unknown.yaml"],
    ["--dataset", "QM9", "--load-model", "no.ckpt"],
])  # fmt: skip
def test_usage_errors_end_with_status_2_and_write_nothing(words, training, here, capsys):
    (here / "empty.yaml").write_text("")
    (here / "list.yaml").write_text("- 1")
    (here / "broken.yaml").write_text("a: [")
    (here / "unknown.yaml").write_text("nonsense: 1")
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        program.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert training.seen is None
    assert sorted(here.rglob("*")) == before


def test_the_log_is_made_with_its_folder_and_holds_errors(training, here, capsys):
    training.failure = DataError("bad frame")
    with pytest.raises(SystemExit):
        program.main(["--dataset", "QM9", "-l", "new/run", "--redirect"])
    assert (here / "new/run/log").read_text().endswith("error: bad frame\n")
    assert sys.stderr.__class__.__name__ != "Tee"
    assert "error: bad frame" in capsys.readouterr().err


def test_help_ends_without_training(training, capsys):
    program.main(["--help"])
    assert "--num-epochs" in capsys.readouterr().out
    assert training.seen is None


def test_parts_from_the_working_folder_are_found(training, here):
    source = "from torch.nn import Module\nclass Net(Module):\n    def reset_parameters(self): ...\n"
    (here / "cwd_nets.py").write_text(source)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(here))]
    program.main(["--dataset", "QM9", "--model", "cwd_nets:Net", "-l", "run"])
    assert training.seen.model == "cwd_nets:Net"


def test_weights_lose_their_prefix_and_get_todays_names():
    state = {
        "model.a.b": 1,
        "model.output_model.output_network.0.update_net.2.weight": 2,
        "model.output_model.output_network.2.bias": 3,
        "output_model.output_network.layers.0.weight": 4,
        "x.model.y": 5,
    }
    assert program.fix_state_dict({"state_dict": state}) == {
        "a.b": 1,
        "output_model.output_network.0.update_net.layers.2.weight": 2,
        "output_model.output_network.layers.2.bias": 3,
        "output_model.output_network.layers.0.weight": 4,
        "x.model.y": 5,
    }


def run_program(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "torchmdnet.scripts.train", *words],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_the_real_program_shows_one_line_for_a_crafted_checkpoint(here):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("was-here",)

    torch.save({"state_dict": {}, "hyper_parameters": {"model": Evil()}}, "evil.ckpt")
    end = run_program("--load-model", "evil.ckpt")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith("error: evil.ckpt is refused")
    assert "Traceback" not in end.stderr
    assert not (here / "was-here").exists()
