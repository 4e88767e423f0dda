"""Whether a call is being recorded as a list of PyTorch operations, and of which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["is_abstract", "is_recording", "is_traced", "recording", "records_operators"]

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


def is_abstract() -> bool:
    """Whether tensors have no values: the call is being recorded, compiled or exported, for any numbers and sizes."""
    return is_recording() or torch.compiler.is_compiling()


def is_traced() -> bool:
    """Whether the call is abstract or a transform of torch.func, so that definitions run, not their compiled twins."""
    transforms = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return is_abstract() or transforms is not None
