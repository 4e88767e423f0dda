"""Small runs for tests: their settings, a finished one, and processes to run and kill them in."""

from __future__ import annotations

import contextlib
import csv
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SETTINGS = {
    "dataset": "toy_data:Toy",
    "model": "tensornet",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 8,
    "derivative": True,
    "num_epochs": 4,
    "save_interval": 1,
    "batch_size": 8,
    "inference_batch_size": 8,
    "lr": 1e-2,
    "train_size": 24,
    "val_size": 8,
    "test_size": 8,
    "report": False,
}


def settings(folder, **changes):
    """The Namespace of a toy run that writes to ``folder``."""
    from torchmdnet.config.reader import write_yaml
    from torchmdnet.config.rundir import release_log_dir
    from torchmdnet.scripts.train import get_args

    conf = Path(folder).with_name(f"{Path(folder).name}.yaml")
    write_yaml(conf, {**SETTINGS, "log_dir": str(folder), **changes})
    args = get_args(["--conf", str(conf)])
    release_log_dir(folder)  # for the process that will run it
    return args


def train_toy(folder, **changes):
    """Train in this process; the folder."""
    from torchmdnet.training.run import train

    return train(settings(folder, **changes))


def rows(folder, name="metrics.csv"):
    """The rows of a table as dictionaries of text, without empty cells."""
    with open(Path(folder) / name, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="session", name="finished")
def finished_run(tmp_path_factory):
    """Four epochs with forces, tested every second epoch; what it wrote and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_toy(folder, test_interval=2, report=True)
    return SimpleNamespace(folder=folder, said=said.getvalue())


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that runs can be compared bit by bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torchmdnet.training.run", "torchmdnet.training.plots", "torchmdnet.models.tensornet"])


def start(flags, environment=None, fault=None):
    """Run the program in a process of its own with one thread; ``fault`` is called there before it starts."""
    process = _CONTEXT.Process(target=_program, args=(list(map(str, flags)), environment or {}, fault))
    process.start()
    return process


def finish(process, seconds=120):
    """Wait for the end; the exit status, minus the number of the signal that ended it."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the run did not end within {seconds} s")
    return process.exitcode


def _program(flags, environment, fault):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if fault is not None:
        fault()
    from torchmdnet.scripts.train import main

    main(flags)


def kill_me():
    """End this process as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(count, owner, name):
    """Die at the ``count``-th call of a method."""
    method, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            kill_me()
        return method(*args, **kwargs)

    setattr(owner, name, dies)


def in_slow_motion():
    """Let a batch take long enough for a signal to arrive in the middle of an epoch."""
    from toy_data import Toy

    batch = Toy.batch

    def slow(self, indices):
        time.sleep(0.1)
        return batch(self, indices)

    Toy.batch = slow
