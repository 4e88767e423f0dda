"""Ctrl-C and SIGTERM outside of the training loop: an end with a status, which may be told how to go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPS", "Stopped", "interrupt_compiling", "signals_to", "stop_signals"]

#: What asks a run to end.
STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: The signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number

    @property
    def name(self) -> str:
        """``SIGINT`` or ``SIGTERM``."""
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status that shells expect."""
        return 128 + self.number


@contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[bool]:
    """Give the signals of :data:`STOPS` to a function in this block; whether it gets them: only the main thread can."""
    try:
        previous = {number: signal.signal(number, handler) for number in STOPS}
    except ValueError:
        yield False
        return
    try:
        yield True
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def interrupt_compiling(error: BaseException) -> bool:
    """See :func:`torchmdnet.loop_cache.interrupt`; where nothing was compiled, nothing is imported for it."""
    loops = sys.modules.get("torchmdnet.loop_cache")
    return loops is not None and loops.interrupt(error)


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise :class:`Stopped` in this block when a signal asks for the end."""

    def stop(number: int, frame: Any) -> None:
        if not interrupt_compiling(Stopped(number)):
            raise Stopped(number)

    with signals_to(stop), _asking_again():
        yield


#: Seconds after which a stop that was lost is asked for again.
_AGAIN = 0.02


@contextmanager
def _asking_again() -> Iterator[None]:
    """Send a signal again whose error falls into a destructor or a callback, where Python prints and drops errors."""
    previous = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            previous(dropped)
            return
        number = getattr(dropped.exc_value, "number", signal.SIGINT)
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous
