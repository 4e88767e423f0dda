"""Processes that label end with the one that started them, and within the time and the memory that they may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from torchmdnet.errors import DataError
from torchmdnet.labelling import workers
from torchmdnet.labelling.workers import run

HERE = Path(__file__).parent

#: What a piece of work may do wrong, and the words with which it is reported.
FAULTS = {
    "raises an exception": "RuntimeError: the density does not converge",
    "aborts the interpreter": "the process was ended by SIGABRT",
    "ends the interpreter": "the process ended with status 3",
    "is killed": "the process was ended by SIGKILL",
    "allocates without end": "more than the allowed 0.4 GB (--memory)",
    "never returns": "no result after 1.5 s",
    "never returns nor lets go of the interpreter": "no result after 1.5 s",
    "runs a program that never ends": "no result after 1.5 s",
    "leaves a child and aborts": "the process was ended by SIGABRT",
}
#: What a process may be doing when the one that started it is ended, and by which signal.
BUSY = [
    ("never returns", "SIGKILL"),
    ("never returns", "SIGTERM"),
    ("never returns nor lets go of the interpreter", "SIGKILL"),
    ("runs a program that never ends", "SIGKILL"),
    ("has nothing to do", "SIGKILL"),
]


class Faulty:
    """Does what the piece of work says."""

    def prepare(self) -> Callable[[Any], dict[str, Any]]:
        return do


class Slow:
    """Is never ready."""

    def prepare(self) -> Callable[[Any], dict[str, Any]]:
        time.sleep(60)
        return do


def do(piece: str) -> dict[str, Any]:
    from hard_calculators import eat, hold_the_interpreter, run_a_program

    if "BEGUN" in os.environ:
        Path(os.environ["BEGUN"]).touch()
    if piece == "raises an exception":
        raise RuntimeError("the density\ndoes not converge")
    if piece == "ends the interpreter":
        raise SystemExit(3)
    if piece == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if piece == "leaves a child and aborts" and os.fork() == 0:
        time.sleep(60)
    if "aborts" in piece:
        os.abort()
    if piece == "allocates without end":
        eat()
    if piece == "never returns":
        time.sleep(60)
    if piece == "never returns nor lets go of the interpreter":
        hold_the_interpreter(60)
    if piece == "runs a program that never ends":
        run_a_program(60)
    return {"done": piece}


@pytest.fixture(autouse=True)
def hard_calculators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def left_over() -> Iterator[None]:
    """No test leaves a process behind."""
    before = children()
    yield
    until = time.monotonic() + 3
    while left := children() - before:
        assert time.monotonic() < until, [process.cmdline() for process in left]
        time.sleep(0.05)


def children() -> set[psutil.Process]:
    return {
        child for child in psutil.Process().children(recursive=True) if "resource_tracker" not in str(child.cmdline())
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_piece_and_nothing_else(fault: str) -> None:
    pieces = [("a", "works"), ("b", fault), ("c", "works")]
    bounds = {"memory": 0.4e9} if "allocates" in fault else {"timeout": 1.5}
    outcomes = dict(run(Faulty(), pieces, **bounds))
    assert outcomes["a"] == outcomes["c"] == {"result": {"done": "works"}}
    assert FAULTS[fault] in outcomes["b"]["error"]


def test_bounds_hold_beside_work_that_goes_well() -> None:
    """Quick answers of one process do not keep anybody from looking at the other."""
    pieces = ((str(n), "never returns" if n == 0 else "works") for n in range(10**9))
    began = time.monotonic()
    outcomes = run(Faulty(), pieces, processes=2, timeout=1.0)
    late = next(outcome for key, outcome in outcomes if key == "0")
    outcomes.close()
    assert late == {"error": "no result after 1 s"}
    assert time.monotonic() - began < 30


def test_getting_ready_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PREPARATION", 0.5)
    with pytest.raises(DataError, match=r"a process was not ready after 0.5 s"):
        list(run(Slow(), [("a", "works")]))


def test_the_default_bound_of_memory_is_below_what_is_available() -> None:
    assert 0 < workers._Bounds(None, None).memory < psutil.virtual_memory().total


PARENT = """
import sys, test_workers
from torchmdnet.labelling.workers import run
def pieces():
    yield "a", sys.argv[1]
    yield "b", sys.stdin.readline()  # which never comes
if __name__ == "__main__":
    list(run(test_workers.Faulty(), pieces(), processes=2))
"""


@pytest.mark.parametrize(("busy", "how"), BUSY)
def test_no_process_outlives_the_one_that_started_it(busy: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    parent = psutil.Popen([sys.executable, str(tmp_path / "parent.py"), busy], stdin=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": path, "BEGUN": str(tmp_path / "begun")})  # fmt: skip
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)
    family = parent.children(recursive=True)
    assert len(family) >= 3  # the guard, Python's resource tracker, a process that computes and what it has started
    parent.send_signal(getattr(signal, how))
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
