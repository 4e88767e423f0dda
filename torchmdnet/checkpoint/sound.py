"""Refusing model files whose numbers are no weights, and whose options are of another kind than a model takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.heads import named_head
from torchmdnet.options import OPTIONS, Option

__all__ = ["check_finite", "check_kinds", "check_weights"]


def check_kinds(options: Mapping[str, Any], path: str | Path) -> None:
    """Refuse hyper-parameters of another kind than the model takes, which would change what it computes or nothing.

    Args:
        options: Hyper-parameters by name; None counts as not given.
        path: The file, for the message.

    Raises:
        CheckpointError: Naming the key, its value and what it takes.
    """
    for key, value in options.items():
        option = OPTIONS.get(key)
        if option is None or value is None or not (option.group == "Architecture" or "model" in option.read_by.split()):
            continue
        what, holds = _KINDS.get("size" if _is_size(option) else option.type, _ANY)
        if not holds(value):
            raise CheckpointError(
                f"{path}: hyper_parameters, {key}: {str(value)[:40]!r} is not valid. It takes {what}."
            )


def _is_size(option: Option) -> bool:
    """Whether an option is a number from 0 on; of neighbours any number has been accepted."""
    return option.type == "int" and option.ge is not None and option.ge >= 0 and "neighbors" not in option.key


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_head(value: Any) -> bool:
    try:
        return bool(named_head(value))
    except ConfigError:
        return False


def _are_mappings(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(part is None or isinstance(part, Mapping) for part in parts)


_ANY: tuple[str, Callable[[Any], bool]] = ("anything", lambda value: True)
#: What values of each type of option are, and whether one is.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, int) and value in (0, 1)),
    "size": ("a whole number from 0 on", lambda value: _is_whole(value) and value >= 0),
    "int": ("a whole number", _is_whole),
    "float": ("a finite number", _is_finite_number),
    "text": ("text", lambda value: isinstance(value, str)),
    "head": ("text, or a mapping of one name to arguments", _is_head),
    "prior_args": ("a mapping, or a list of them", _are_mappings),
}


def check_weights(state: Mapping[str, Any], own: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights that would be cast into others, or are not finite.

    Buffers that are whole numbers, or not finite in a new model either, may be so in the file.

    Args:
        state: Tensors of the file by name.
        own: Those of a new model; what it has not is let be.
        path: The file, for the message.

    Raises:
        CheckpointError: Naming the tensor.
    """
    for name, mine in own.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.is_complex() and not mine.is_complex():
            raise _unsound(path, name, f"holds complex numbers ({value.dtype})")
        if mine.is_floating_point() and not value.is_floating_point():
            raise _unsound(path, name, f"holds {value.dtype}, where the model has {mine.dtype}")
        if not mine.is_floating_point() and value.is_floating_point():
            raise _unsound(path, name, f"holds {value.dtype}, where the model has {mine.dtype}")
        if not _is_finite(value.to(mine.dtype)) and _is_finite(mine):
            raise _unsound(path, name, "holds NaN or infinite numbers")


def check_finite(value: Any, name: str, path: str | Path) -> None:
    """Refuse numbers that are not finite in the state of an optimizer or of averaged weights.

    Args:
        value: Mappings and lists of tensors.
        name: What it is.
        path: The file, for the message.

    Raises:
        CheckpointError: Naming the tensor.
    """
    for where, tensor in _tensors(value, name):
        if not _is_finite(tensor):
            raise _unsound(path, where, "holds NaN or infinite numbers")


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (Mapping, list, tuple)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from _tensors(item, f"{name}.{key}")


def _is_finite(value: Tensor) -> bool:
    return value.is_meta or bool(torch.isfinite(value).all())


def _unsound(path: str | Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the tensor {name} {what}, so it is no weight of a trained model. The run diverged, or the file was "
        "changed; take an earlier checkpoint."
    )
