"""The heads that a configuration names: which class, and which of its arguments may be set."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torchmdnet.arguments import arguments_of, check_kinds, check_names
from torchmdnet.heads import HEADS, named_head
from torchmdnet.heads.base import OutputModel
from torchmdnet.options import keys_read_by

__all__ = ["check_head_arguments", "depth_of", "free_arguments", "head_for", "option_behind", "without_options"]

#: What a head is given in any case: facts about the architecture, and options of the whole model.
_GIVEN = ("self", "hidden_channels", "dtype", "static_shapes", "box_vecs", "has_vectors", "has_tensors")

#: What a head that reads charges is given beside: their number in all layers.
_OF_CHARGES = ("num_layers", "q_dim")


def head_for(architecture: type[Any], name: str) -> type[OutputModel]:
    """The class behind the name of a head, for an architecture that may have variants of its own."""
    variant = getattr(architecture, "head_prefix", "") + name
    return HEADS[variant if name in HEADS and variant in HEADS else name]


def free_arguments(head: type[OutputModel]) -> dict[str, inspect.Parameter]:
    """The parameters of a head that a configuration may set, by name."""
    return arguments_of(head, (*_GIVEN, *(_OF_CHARGES if getattr(head, "needs_charges", False) else ())))


def check_head_arguments(what: str, head: type[OutputModel], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a head does not take, and values of another kind.

    Args:
        what: The head as it opens the message: ``"output_model: Scalar"``.
        head: Its class.
        arguments: What a configuration says of it.

    Raises:
        ConfigError: Naming the argument, with what could have been meant.
    """
    known = free_arguments(head)
    check_names(what, arguments, known)
    check_kinds(known, arguments, what=what)


def depth_of(head: type[OutputModel]) -> str:
    """The parameter of a head that ``output_mlp_num_layers`` sets."""
    return "num_hidden_layers" if getattr(head, "needs_charges", False) else "num_layers"


def option_behind(head: type[OutputModel], argument: str) -> str | None:
    """The option that sets an argument of a head where the configuration does not give it; None where there is none."""
    if argument == depth_of(head):
        return "output_mlp_num_layers"
    return argument if argument in keys_read_by("head") else None


def without_options(architecture: type[Any], output_model: Any, keys: Collection[str]) -> Any:
    """An output model without those of its arguments that options take the place of.

    Args:
        architecture: The class of the architecture.
        output_model: Name, or name and arguments, of the head.
        keys: The options.
    """
    name, arguments = named_head(output_model)
    head = head_for(architecture, name)
    kept = {argument: value for argument, value in arguments.items() if option_behind(head, argument) not in keys}
    return {name: kept} if kept else name
