"""Whether a call is being recorded as a list of PyTorch operations, and of which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["is_recording", "recording", "records_operators"]

_is_recording = _records_operators = False


@contextlib.contextmanager
def recording(*, operators: bool = False) -> Iterator[None]:
    """Within it every call is recorded by :mod:`torchmdnet.recording`.

    Args:
        operators: Whether to name the operators of :mod:`torchmdnet.ops.library`, which need this package to run, where
            there is a compiled twin. Otherwise the definitions are written out.
    """
    global _is_recording, _records_operators
    before = _is_recording, _records_operators
    _is_recording, _records_operators = True, operators
    try:
        yield
    finally:
        _is_recording, _records_operators = before


def is_recording() -> bool:
    """Whether the call is being recorded."""
    return _is_recording


def records_operators() -> bool:
    """Whether operators with compiled twins are named in the recording."""
    return _records_operators
