"""How model files changed over the years: one small function for each change, applied in order."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MIGRATIONS", "RETIRED_KEYS", "has_old_tensor_layout", "migrate"]

State = dict[str, Tensor]
Args = dict[str, Any]

#: Hyper-parameters and keywords of older releases that no longer mean anything.
RETIRED_KEYS = frozenset({"check_errors", "compatibility_load"})

_MODEL_NAMES = {"tensornetv2_alt": "tensornet2", "tensornet-nqe": "tensornet2"}


def strip_module_prefix(state: State, args: Args) -> tuple[State, Args]:
    """Training saves the potential as the attribute ``model`` of a module."""
    return {re.sub(r"^model\.", "", key): value for key, value in state.items()}, args


def rename_architectures(state: State, args: Args) -> tuple[State, Args]:
    """TensorNet2 had working titles."""
    return state, {**args, "model": _MODEL_NAMES.get(args.get("model", ""), args.get("model"))}


def rename_head_layers(state: State, args: Args) -> tuple[State, Args]:
    """Heads kept their layers in a bare sequence before the MLP class."""

    def renamed(key: str) -> str:
        key = re.sub(r"(output_model\.output_network\.\d+\.update_net)\.(\d+)\.", r"\1.layers.\2.", key)
        return re.sub(r"(output_model\.output_network)\.(\d+)\.(weight|bias)$", r"\1.layers.\2.\3", key)

    return {renamed(key): value for key, value in state.items()}, args


def has_old_tensor_layout(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> bool:
    """Whether the scalar layers of a TensorNet file are ordered channel first.

    The file decides: releases that ordered them so wrote ``check_errors``, or did not have the box buffer yet.
    Release 2.6.2 left neither trace; its files need ``compatibility_load=True``.
    """
    if args.get("model") not in ("tensornet", "tensornet2"):
        return False
    return "check_errors" in args or f"{representation_prefix(state)}distance.box" not in state


def representation_prefix(state: Mapping[str, Tensor]) -> str:
    """Where the weights of the architecture lie: one level deeper when a wrapper is around it."""
    inside = "representation_model.model."
    return inside if any(key.startswith(inside) for key in state) else "representation_model."


def component_first_gates(state: State, args: Args) -> tuple[State, Args]:
    """Rows of the layers that gate the three tensor parts: channel-major before 3.0, component-major since.

    Files of that time also embed directions with the other handedness, which only SO(3) models can tell.
    """
    asked = args.pop("compatibility_load", None)
    if not (has_old_tensor_layout(state, args) if asked is None else asked):
        return state, args
    if args.get("model") not in ("tensornet", "tensornet2"):
        return state, args
    prefix = representation_prefix(state)
    layers = [f"{prefix}tensor_embedding.linears_scalar.1"]
    if args["model"] == "tensornet":
        layers += [f"{prefix}layers.{n}.linears_scalar.2" for n in range(args["num_layers"])]
    state = dict(state)
    for name in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        rows = state[name]
        state[name] = rows.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1).contiguous()
    if asked is None:
        warnings.warn(
            "The file is in the tensor layout of releases before 3.0; its weights are reordered.", stacklevel=5
        )
    if args.get("equivariance_invariance_group") == "SO(3)":
        args = {**args, "handedness": "legacy"}
    return state, args


def count_head_layers(state: State, args: Args) -> tuple[State, Args]:
    """Some releases ignored ``output_mlp_num_layers`` in most heads; the layers in the file are what counts."""
    numbers = [
        int(m[1]) for key in state if (m := re.match(r"output_model\.output_network\.layers\.(\d+)\.weight$", key))
    ]
    if numbers:
        args = {**args, "output_mlp_num_layers": max(numbers) // 2 - 1}
    return state, args


def scalar_mean_and_std(state: State, args: Args) -> tuple[State, Args]:
    """Standardisation used to store one-element vectors."""
    scalars = {key: state[key].reshape(()) for key in ("mean", "std") if key in state and state[key].numel() == 1}
    return {**state, **scalars}, args


def open_dispersion(state: State, args: Args) -> tuple[State, Args]:
    """The D2 prior, known by its ``Z_map``, used to ignore boxes; a model trained beside it keeps doing so."""
    stored = args.get("prior_args")
    if not stored:
        return state, args
    stored = [stored] if isinstance(stored, Mapping) else list(stored)
    for n, keywords in enumerate(stored):
        if f"prior_model.{n}.Z_map" in state:
            stored[n] = {"periodic": False, **keywords}
    return state, {**args, "prior_args": stored}


def absent_system_embedding(state: State, args: Args) -> tuple[State, Args]:
    """Total charge and spin were not embedded before; ``spin`` then had no effect, nor had ``charge`` everywhere."""
    prefix = f"{representation_prefix(state)}system_embedding."
    if args.get("system_embedding") in (None, "auto") and not any(key.startswith(prefix) for key in state):
        args = {**args, "system_embedding": "none"}
    return state, args


MIGRATIONS: list[Callable[[State, Args], tuple[State, Args]]] = [
    strip_module_prefix,
    rename_architectures,
    rename_head_layers,
    component_first_gates,
    count_head_layers,
    scalar_mean_and_std,
    open_dispersion,
    absent_system_embedding,
]


def migrate(state: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[State, Args]:
    """Bring the weights and hyper-parameters of any release into today's form.

    Args:
        state: The ``state_dict`` of a checkpoint.
        args: Its hyper-parameters; ``compatibility_load``, if present, overrules the detection of the tensor layout.

    Returns:
        New dictionaries, the given ones are not modified.
    """
    state, args = dict(state), dict(args)
    for step in MIGRATIONS:
        state, args = step(state, args)
    for key in RETIRED_KEYS:
        args.pop(key, None)
    return state, args


def fill_boxes(state: State, model: torch.nn.Module) -> State:
    """Give boxes to modules that did not store one when the file was written, and take boxes of any shape."""
    state = dict(state)
    for name, buffer in model.named_buffers():
        if not name.endswith(".box"):
            continue
        if name not in state:
            state[name] = buffer
        elif state[name].shape != buffer.shape:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.box = torch.zeros_like(state[name], dtype=buffer.dtype)
    return state
