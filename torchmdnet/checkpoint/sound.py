"""Refusing model files whose numbers are no weights, and whose options are of another kind than a model takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmdnet.errors import CheckpointError

__all__ = ["check_finite", "check_kinds", "check_weights"]

_SWITCHES = (
    *("derivative", "remove_ref_energy", "trainable_rbf", "neighbor_embedding"),
    *("charge", "spin", "static_shapes"),
)
_SIZES = ("embedding_dimension", "num_layers", "num_rbf", "num_heads", "num_filters", "max_z", "q_dim")
_COUNTS = (*_SIZES, "output_mlp_num_layers", "atom_filter", "max_num_neighbors", "coulomb_max_num_neighbors")
_REALS = ("cutoff_lower", "cutoff_upper", "coulomb_cutoff")
_TEXTS = (
    *("model", "output_model", "activation", "attn_activation", "rbf_type", "aggr", "distance_influence"),
    *("reduce_op", "system_embedding", "equivariance_invariance_group"),
)


def check_kinds(options: Mapping[str, Any], path: str | Path) -> None:
    """Refuse hyper-parameters of another kind than the model takes, which would change what it computes or nothing.

    Args:
        options: Hyper-parameters by name; None counts as not given.
        path: The file, for the message.

    Raises:
        CheckpointError: Naming the key, its value and what it takes.
    """
    for keys, what, holds in (
        (_SWITCHES, "true or false", lambda value: value in (0, 1)),
        (_SIZES, "a whole number from 0 on", lambda value: value >= 0),
        (_COUNTS, "a whole number", lambda value: True),
        (_REALS, "a finite number", math.isfinite),
        (_TEXTS, "text", lambda value: True),
        (("prior_args",), "a mapping, or a list of them", lambda value: True),
    ):
        for key in keys:
            value = options.get(key)
            if value is not None and not (_is_of(value, keys) and holds(value)):
                raise CheckpointError(
                    f"{path}: hyper_parameters, {key}: {str(value)[:40]!r} is not valid. It takes {what}."
                )


def _is_of(value: Any, keys: tuple[str, ...]) -> bool:
    """Whether a value is of the kind that these keys take."""
    if keys is _TEXTS:
        return isinstance(value, str)
    if keys is _SWITCHES:
        return isinstance(value, int)
    if keys == ("prior_args",):
        parts = value if isinstance(value, (list, tuple)) else [value]
        return all(part is None or isinstance(part, Mapping) for part in parts)
    return isinstance(value, (int, float) if keys is _REALS else int) and not isinstance(value, bool)


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
