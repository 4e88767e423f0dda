"""Processes that do not outlive the process that started them, however that one ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

__all__ = ["Guard", "end_with_parent", "kill_group", "lead_group", "memory_of_groups"]

#: Seconds between two looks for the parent.
LOOK = 0.5

_HAS_GROUPS = hasattr(os, "killpg")


def end_with_parent(*_: Any) -> None:
    """End this process soon after its parent has died.

    A thread looks for the parent twice a second, so code that holds the interpreter's lock for long delays the end;
    :class:`Guard` is for such code. The signal that Linux can send at the death of a parent comes when the *thread* has
    ended that started the process, which would end the workers of a program that trains in a thread.

    Args:
        _: Ignored, so that this function can be the ``worker_init_fn`` of a loader.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def lead_group() -> None:
    """Make this process and the programs that it will start a process group, to be ended as one."""
    if _HAS_GROUPS:
        with contextlib.suppress(OSError):  # it leads a session
            os.setpgid(0, 0)


def kill_group(leader: int) -> None:
    """Kill a process that called :func:`lead_group`, if it is there, and the programs that it has started."""
    if _HAS_GROUPS:
        with contextlib.suppress(OSError):
            os.killpg(leader, signal.SIGKILL)


def memory_of_groups(leaders: set[int]) -> dict[int, int]:
    """Bytes in use by the processes of each group, without files and without memory that they share."""
    if not _HAS_GROUPS:
        return {}
    import psutil

    used = dict.fromkeys(leaders, 0)
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended, or is another user's
            group = os.getpgid(pid)
            if group in used:
                memory = psutil.Process(pid).memory_info()
                used[group] += memory.rss - getattr(memory, "shared", 0)
    return used


#: Reads which groups there are until the other end of the pipe is closed, by whatever way its process ended.
_GUARD = """
import os, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
leaders = set()
for line in sys.stdin:
    (leaders.add if line[0] == "+" else leaders.discard)(int(line[1:]))
for leader in leaders:
    for kill in (os.killpg, os.kill):
        try:
            kill(leader, signal.SIGKILL)
        except OSError:
            pass
"""


class Guard:
    """A small process that kills process groups when this process has ended without doing so itself.

    Unlike anything within these processes it also reaches those whose code does not let go of the interpreter's lock,
    and the programs that they have started.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        if _HAS_GROUPS:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )

    def add(self, leader: int) -> None:
        """Watch over a process, and the group that it leads or is going to lead."""
        self._tell(f"+{leader}")

    def remove(self, leader: int) -> None:
        """No longer watch over a process, which has ended."""
        self._tell(f"-{leader}")

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # somebody killed the guard
                print(line, file=self._process.stdin, flush=True)

    def close(self) -> None:
        """End the guard, and what it still watches over."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process.wait()
