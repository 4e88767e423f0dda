"""The interpreters of a comparison, and the processes they run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OTHERS", "Failure", "Side", "Worker", "others", "ours", "reference"]

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
#: Other packages that ``others.py`` knows how to ask, by the name they are imported under.
OTHERS = {"mace": "MACE", "torchani": "TorchANI"}


class Failure(Exception):
    """A side could not do a workload; the message says why."""


@dataclass(frozen=True)
class Side:
    """An interpreter that imports one of the packages.

    Args:
        name: How tables call it.
        python: Path of the interpreter.
        search_path: Value of ``PYTHONPATH``; None leaves only what is installed.
        package: What it imports.
    """

    name: str
    python: str
    search_path: str | None = None
    package: str = "torchmdnet"

    @property
    def script(self) -> str:
        """The file that its processes run."""
        return str(BENCHMARKS / ("worker.py" if self.package == "torchmdnet" else "others.py"))

    def environment(self, threads: int) -> dict[str, str]:
        """Environment variables of a process: those of the caller, the package to import, and the threads to use."""
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        if self.search_path is not None:
            variables["PYTHONPATH"] = self.search_path
        for library in ("OMP", "MKL", "OPENBLAS"):
            variables[f"{library}_NUM_THREADS"] = str(threads)
        return variables

    def start_up(self, arguments: list[str], timeout: float) -> dict[str, Any]:
        """Run a fresh interpreter to its end; wall-clock and processor seconds, and peak memory in bytes.

        Raises:
            Failure: If it ends with an error, or not in time.
        """
        with tempfile.TemporaryFile() as output, tempfile.TemporaryDirectory() as elsewhere:
            start = time.perf_counter()
            process = subprocess.Popen(
                [self.python, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=elsewhere,
                env=self.environment(threads=1),
            )
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
            timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            if wall >= timeout:
                raise Failure(f"not finished within {timeout:.0f} s")
            if process.returncode != 0:
                raise Failure(_last_line(output) or f"ended with {process.returncode}")
        return {
            "wall": [wall],
            "cpu": [usage.ru_utime + usage.ru_stime],
            "peak_memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }


def ours() -> Side:
    """This checkout, imported by the running interpreter."""
    return Side("ours", sys.executable, str(REPOSITORY))


def reference(python: str) -> Side:
    """The reference package, by the interpreter of its environment.

    Raises:
        FileNotFoundError: If there is no such interpreter.
    """
    return Side("reference", _interpreter("--reference", python))


def others(python: str) -> list[Side]:
    """Those of the packages in :data:`OTHERS` that an environment has.

    Raises:
        FileNotFoundError: If there is no such interpreter, or it has none of them.
    """
    path = _interpreter("--others", python)
    look = f"import importlib.util as u; print(*(name for name in {list(OTHERS)} if u.find_spec(name)))"
    found = subprocess.run([path, "-c", look], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    if not found:
        raise FileNotFoundError(f"--others: {python} has none of {', '.join(OTHERS)}. Install one there.")
    return [Side(OTHERS[name], path, package=name) for name in found]


def _interpreter(option: str, python: str) -> str:
    path = Path(python).expanduser()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise FileNotFoundError(f"{option}: {python} is not a Python interpreter. Give .../bin/python.")
    return str(path.absolute())  # not resolved: the link is what makes it an environment's Python


class Worker:
    """A process of one side that holds one workload, ready to be timed again and again.

    Args:
        side: Which interpreter.
        order: What ``worker.py`` should prepare.
        timeout: Longest wait for any answer, in seconds.

    Raises:
        Failure: If the workload cannot be prepared, or not in time.
    """

    def __init__(self, side: Side, order: dict[str, Any], timeout: float) -> None:
        self.side = side
        self._timeout = timeout
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        here, there = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [side.python, side.script, str(there.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[there.fileno()],
                env=side.environment(order["threads"]),
            )
        finally:
            there.close()
        here.settimeout(timeout)
        self._socket = here
        self._lines = here.makefile("r", encoding="utf-8")
        try:
            self.facts = self._ask(order | {"package": side.package})
            self._check_package(self.facts.pop("package"))
        except BaseException:
            self.close()
            raise

    def measure(self, seconds: float) -> dict[str, Any]:
        """Times of as many calls as fit into ``seconds``, at least one.

        Raises:
            Failure: If the process fails, or does not answer in time.
        """
        return self._ask(seconds)

    def _check_package(self, package: str) -> None:
        """See that the side has imported what it should time."""
        if self.side.package != "torchmdnet":
            return
        checkout = Path(package).is_relative_to(REPOSITORY)
        if checkout != (self.side.search_path is not None):
            raise Failure(f"{self.side.python} imports torchmdnet from {package}, which is not {self.side.name}")

    def _ask(self, message: Any) -> dict[str, Any]:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            line = self._lines.readline()
        except TimeoutError:
            self._process.kill()  # or it would go on computing, and slow down the other side
            raise Failure(f"no answer within {self._timeout:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            code = self._process.wait()
            why = "out of memory" if code == -9 else _last_line(self._output) or f"ended with {code}"
            raise Failure(why)
        answer = json.loads(line)
        if "failed" in answer:
            raise Failure(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._lines.close()
        self._socket.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()


def available_memory() -> int | None:
    """Bytes that could be allocated now without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _last_line(output: Any) -> str:
    """The last line that a process has printed."""
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""
