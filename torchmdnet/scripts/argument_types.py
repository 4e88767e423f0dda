"""Numbers on a command line: one type for each kind, all of them finite and within bounds."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import NoReturn

from torchmdnet.errors import ConfigError

__all__ = [
    "MAX_PROCESSES",
    "CommandParser",
    "count",
    "finite",
    "index",
    "limit",
    "non_negative",
    "positive",
    "processes",
    "seed",
]


class CommandParser(argparse.ArgumentParser):
    """The arguments of a command, whose errors are one line, like all others, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """See :meth:`argparse.ArgumentParser.error`.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}. See {self.prog} --help.")


#: More processes than this are a slip of the pen.
MAX_PROCESSES = 4096
_MOST = 10**9


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    return _real(text, "a finite number", lambda value: True)


def positive(text: str) -> float:
    """A finite number above zero."""
    return _real(text, "a finite number above zero", lambda value: value > 0)


def limit(text: str) -> float:
    """A number above zero; infinite where there is no limit."""
    return math.inf if text.strip().lower() in ("inf", "infinity") else positive(text)


def non_negative(text: str) -> float:
    """Zero or a finite number above it."""
    return _real(text, "zero or a finite number above it", lambda value: value >= 0)


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, f"a whole number from 1 to {_MOST:,}", 1, _MOST)


def seed(text: str) -> int:
    """A whole number from 0 on, of as many bits as generators take."""
    return _whole(text, "a whole number from 0 to 2^63 - 1", 0, 2**63 - 1)


def index(text: str) -> int:
    """The number of a frame; counted from the end if it is below zero."""
    return _whole(text, "the number of a frame", -(2**63), 2**63 - 1)


def processes(text: str) -> int:
    """A number of processes; 0 stands for one for each core."""
    number = _whole(text, f"a number of processes up to {MAX_PROCESSES}, or 0 for one for each core", 0, MAX_PROCESSES)
    return number or os.cpu_count() or 1


def _real(text: str, what: str, holds: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{_short(text)} is not {what}")
    return value


def _whole(text: str, what: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:  # among others for more than 4,300 digits
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not {what}")
    return value


def _short(text: str, most: int = 40) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."
