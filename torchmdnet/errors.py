"""Errors meant for people: each names the value, the accepted values, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "NotEnoughMemory",
    "PeerError",
    "ResultError",
    "SplitError",
    "WriteError",
    "did_you_mean",
    "shown",
]


class ConfigError(ValueError):
    """An option, a name or a combination of options that cannot work."""


class SplitError(ConfigError, AssertionError):
    """Sizes or parts of a data set that cannot be had; an ``AssertionError`` in earlier releases, so it is one too."""


class DataError(ValueError):
    """Reference data that cannot be used; the message names the file and the frame."""


class CheckpointError(ValueError):
    """A model file that cannot be read, or must not be trusted."""


class ResultError(RuntimeError):
    """A file that a finished run promises and could not write; everything else of the run is in its folder."""


class WriteError(OSError):
    """A file that could not be written: a full disk, a folder that went or is read-only; an earlier file stays.

    Args:
        message: What happened.
        number: The ``errno`` behind it, if it is known.
        reason: The part of the message that says why.
    """

    def __init__(self, message: str, number: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.errno, self.reason = number, reason


class DivergenceError(ResultError):
    """A training whose loss or weights are not numbers any more; tables and checkpoints before it are in its folder."""


class NotEnoughMemory(MemoryError):
    """A calculation that needs more memory than there is; it has not been started."""


class PeerError(RuntimeError):
    """Another process of the same run is gone or no longer answers."""


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``options``, or an empty string."""
    options = list(options)
    same = [option for option in options if option.lower() == str(word).lower()]
    close = same or difflib.get_close_matches(str(word), options, n=1, cutoff=0.55)
    if not close and len(str(word)) > 1:
        close = [option for option in options if option.startswith(str(word))]
    return f" Did you mean {close[0]!r}?" if close else ""


def shown(error: BaseException, most: int = 3000) -> str:
    """What a program prints of an error: its message, of which a very long value does not fill the screen.

    What the system says of a file, which nothing caught before, begins with the name of the file.
    """
    text = str(error) or type(error).__name__
    if text.startswith("[Errno") and isinstance(error, OSError) and error.strerror:
        name = "" if error.filename is None else f"{error.filename}: "
        text = f"{name}{error.strerror}."
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
