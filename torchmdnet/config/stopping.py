"""Ctrl-C and SIGTERM outside of the training loop: an end with a status, which may be told how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["STOPS", "Stopped", "stop_signals"]

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
def stop_signals() -> Iterator[None]:
    """Raise :class:`Stopped` in this block when a signal asks for the end; only the main thread can."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    try:
        previous = {number: signal.signal(number, stop) for number in STOPS}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
