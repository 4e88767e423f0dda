"""Calls that are recorded while they are made, to be repeated on the same memory.

A small system costs more in Python, between the loops and before each of them, than in the loops. Within
:func:`recording`, every compiled loop and every :func:`repeatable` call is entered in a list of :class:`Calls`; those
of loops that one thread runs lie one behind the other as addresses, which a single compiled loop calls in turn.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

__all__ = ["Calls", "paused", "recorded", "recording", "repeatable", "resumed"]


class Calls:
    """What was called, in this order.

    Arrays and tensors among the arguments are kept, and read and written again by :meth:`repeat`.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []
        self._jobs: list[np.ndarray] = []  # of the last loops
        self._kept: list[Any] = []

    def add(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Enter a call from Python."""
        self.close()
        self._steps.append(partial(function, *args, **options) if args or options else function)

    def add_loop(self, job: np.ndarray, arguments: tuple[Any, ...], run: Callable[[np.ndarray], None]) -> None:
        """Enter a loop that one thread runs.

        Args:
            job: Holds its address and arguments, see :mod:`torchmdnet.ops.kernels.sharing`.
            arguments: The same as Python objects.
            run: Runs several, given the addresses of their jobs.
        """
        self._run = run
        self._jobs.append(job)
        self._kept.append(arguments)

    def close(self) -> None:
        """Put the last loops together; called before :meth:`repeat`."""
        if self._jobs:
            jobs, self._jobs = self._jobs, []
            self._kept.append(jobs)
            self._steps.append(partial(self._run, np.array([job.ctypes.data for job in jobs])))

    def repeat(self) -> None:
        """Make all calls again."""
        for step in self._steps:
            step()


class _Recorder(threading.local):
    calls: Calls | None = None
    #: Where they were entered before a pause.
    before: Calls | None = None


_recorder = _Recorder()


def recorded() -> Calls | None:
    """Where calls of this thread are entered; None for nowhere."""
    return _recorder.calls


@contextlib.contextmanager
def recording(calls: Calls | None) -> Iterator[None]:
    """Enter calls of this thread in a list."""
    outer = _recorder.calls, _recorder.before
    _recorder.calls, _recorder.before = calls, None
    try:
        yield
    finally:
        _recorder.calls, _recorder.before = outer


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Enter no calls, which somebody else will make again."""
    calls = _recorder.calls
    with recording(None):
        _recorder.before = calls
        yield


def resumed() -> contextlib.AbstractContextManager[None]:
    """Enter calls also within a pause: of what is made when it is first asked for, and kept."""
    return recording(_recorder.calls or _recorder.before)


def repeatable(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function that changes numbers in memory that stays where it is, such as one with an argument ``out``."""
    if _recorder.calls is not None:
        _recorder.calls.add(function, *args, **options)
    return function(*args, **options)
