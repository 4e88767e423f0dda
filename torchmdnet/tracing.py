"""How a call is carried out: recorded as a list of PyTorch operations or not, and by the code of which device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["as_if_on", "device_kind", "is_abstract", "is_recording", "is_traced", "recording", "records_operators"]

_is_recording = _records_operators = False
_kind: str | None = None


def device_kind(x: Tensor | torch.device) -> str:
    """``"cpu"``, ``"cuda"``, ...: whose code a tensor takes, that of its device or of the one of :func:`as_if_on`."""
    if _kind is not None:
        return _kind
    return x.type if isinstance(x, torch.device) else x.device.type


@contextlib.contextmanager
def as_if_on(kind: str) -> Iterator[None]:
    """Within it tensors of the CPU take the code of another kind of device; for tests and for counting.

    Code that runs on every device gives its results, so that it can be tested without that device. Kernels have to be
    replaced, see :func:`torchmdnet.testing.launches.counting`, or run in Triton's interpreter.

    Args:
        kind: Such as ``"cuda"``.
    """
    global _kind
    before, _kind = _kind, kind
    try:
        yield
    finally:
        _kind = before


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
