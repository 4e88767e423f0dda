"""A call in a process of its own: whatever it does to memory, time or the interpreter costs that call alone.

The process is forked from this one, which has imported everything, so that a call takes milliseconds more than here.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

#: Seconds of the processor that a call may take, seconds in which neither it nor what it has started wants one, and
#: bytes that it may ask for. A busy machine, on which it waits for its turn, changes none of them.
PROCESSOR, IDLE, BYTES = 60, 60, 4 * 2**30
#: Seconds in which what a call has started may want no processor before it ends after it.
LINGER = 10.0
#: ``PR_SET_PDEATHSIG`` of Linux.
_END_WITH_PARENT = 1
#: Lines of a traceback that are kept.
_LINES = 14


class Outcome(NamedTuple):
    """What became of a call."""

    accepted: bool  # it gave a result; otherwise it was refused, or failed
    kind: str = ""  # of the failure: the name of the exception, or what ended the process
    place: str = ""  # the innermost line of the package
    text: str = ""

    @property
    def failed(self) -> bool:
        """Whether neither a result came nor one of the package's own errors."""
        return bool(self.kind)


def place_of(error: BaseException) -> str:
    """The innermost line of the package in a traceback, looked for in causes too."""
    frames: list[traceback.FrameSummary] = []
    each: BaseException | None = error
    while each is not None and not frames:
        frames = [f for f in traceback.extract_tb(each.__traceback__) if "torchmdnet/" in f.filename]
        each = each.__cause__
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


def isolated(call: Callable[[], bool]) -> Outcome:
    """The outcome of a call in a forked process, with bounds on time and memory, and without the network.

    A call that leaves a process behind has failed, too.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        result, said = Path(name, "result"), Path(name, "said")
        pid = os.fork()
        if pid == 0:
            _live(call, result, said)
        status = _wait(pid)
        left = _end_session(pid)
        if result.is_file():
            outcome = pickle.loads(result.read_bytes())
            if not outcome.failed and left:
                return Outcome(False, "Outlived", "", f"processes went on without it: {left}")
            return outcome
        text = said.read_text(errors="replace")[-6000:] if said.is_file() else ""
        kind = f"idle for {IDLE} s" if status is None else f"status {os.waitstatus_to_exitcode(status)}"
        places = [line.strip() for line in text.splitlines() if "torchmdnet/" in line]
        return Outcome(False, kind, places[0][-80:] if places else "", text)


def _live(call: Callable[[], bool], result: Path, said: Path) -> None:
    """The life of the forked process; it never returns."""
    status = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115 (as long as the process lives)
        faulthandler.register(signal.SIGUSR1, open(2, "w", closefd=False))  # noqa: SIM115
        sys.modules["__main__"] = types.ModuleType("__main__")  # which spawned processes would import
        _without_network()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        try:
            outcome = Outcome(bool(call()))
        except BaseException as error:  # KeyboardInterrupt and SystemExit are failures here
            lines = traceback.format_exception(error)
            outcome = Outcome(False, type(error).__name__, place_of(error), "".join(lines[-_LINES:])[-6000:])
        draft = result.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(outcome))
        draft.rename(result)
        status = 0
    finally:
        os._exit(status)


def _without_network() -> None:
    """Let connections reach this machine alone."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def is_here(host: Any) -> bool:
        return str(host) in ("127.0.0.1", "::1", "localhost", "", "None") or str(host).startswith("/")

    def refused(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not is_here(address[0]):
            raise OSError(101, "Network is unreachable")
        connect(self, address)

    def looked_up(host: Any, *words: Any, **options: Any) -> Any:
        if isinstance(host, str) and not is_here(host):
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return look_up(host, *words, **options)

    setattr(socket.socket, "connect", refused)  # noqa: B010
    setattr(socket, "getaddrinfo", looked_up)  # noqa: B010


def _wait(pid: int) -> int | None:
    """The status of a process; None where it had to be killed because it waited for nothing that comes."""
    idle, looked, pause = 0.0, time.monotonic(), 0.001
    while idle < IDLE:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(0.05, 1.5 * pause)
        now = time.monotonic()
        if now - looked > 0.5:
            if not any(_wants_processor(process) for process in _of_session(pid)):
                idle += now - looked
            looked = now
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)  # where it is
        time.sleep(1.0)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _wants_processor(process: psutil.Process) -> bool:
    """Whether one of the threads of a process runs or waits for its turn."""
    for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
        with suppress(OSError, IndexError):
            if stat.read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


def _end_session(leader: int) -> list[str]:
    """Processes of a session that do not end by themselves, which are killed."""
    idle, looked = 0.0, time.monotonic()
    while (left := _of_session(leader)) and idle < LINGER and sum(map(_spent, left)) < PROCESSOR:
        time.sleep(0.05)
        now = time.monotonic()
        if not any(_wants_processor(process) for process in left):
            idle += now - looked
        looked = now
    told = []
    for process in left:
        with suppress(psutil.Error, OSError):
            told.append(" ".join(process.cmdline())[:200])
            process.kill()
    return told


def _spent(process: psutil.Process) -> float:
    """Seconds of the processor that a process has used."""
    with suppress(psutil.Error, OSError):
        return sum(process.cpu_times()[:2])
    return 0.0


def _of_session(leader: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        with suppress(psutil.Error, OSError):
            if os.getsid(pid) == leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(psutil.Process(pid))
    return found
