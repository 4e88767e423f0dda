"""Calls under ``torch.inference_mode``, whose tensors autograd refuses, and under ``torch.autocast``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["outside_modes"]

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_modes(function: Function) -> Function:
    """Let a function do its work outside of both, on copies of the inference tensors it is given.

    Forces are derivatives, and what is made from the weights once and kept has to serve later calls. Inference mode
    asks for no history; under it the function is called with ``no_grad``. Autocast would round some steps of a model to
    half precision and others not, which put forces off by a tenth; a potential computes in its own precision.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        rounding = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if rounding:
            with contextlib.ExitStack() as stack:
                for device in rounding:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return call(*args, **kwargs)
        is_inside = torch.is_inference_mode_enabled()
        if not is_inside and not any(map(_is_inference, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        keep = torch.is_grad_enabled() and not is_inside
        with torch.inference_mode(False), torch.set_grad_enabled(keep):
            return function(*map(_usable, args), **{name: _usable(value) for name, value in kwargs.items()})

    return call  # type: ignore[return-value]


def _is_inference(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_inference()
    if isinstance(value, Mapping):
        return any(map(_is_inference, value.values()))
    return isinstance(value, tuple) and any(map(_is_inference, value))


def _usable(value: Any) -> Any:
    """A value with copies in the place of inference tensors."""
    if not _is_inference(value):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _usable(item) for name, item in value.items()}
    items = [_usable(item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
