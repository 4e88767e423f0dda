"""From a configuration to a potential."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchmdnet.arguments import arguments_of, check_kinds
from torchmdnet.errors import ConfigError
from torchmdnet.heads import HEADS, named_head
from torchmdnet.heads.base import OutputModel
from torchmdnet.heads.named import check_head_arguments, depth_of, head_for
from torchmdnet.limits import check_limits, is_small
from torchmdnet.memory import available_memory
from torchmdnet.models import ARCHITECTURES
from torchmdnet.models.base import set_radial_mode
from torchmdnet.options import OPTIONS, has_fixed_default, keys_read_by, value_of
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.named import create_prior_models
from torchmdnet.properties import property_specs

__all__ = [
    "PRECISIONS",
    "box_from_config",
    "check_head",
    "check_size",
    "create_model",
    "default_of",
    "precision_of",
    "reads_charge",
    "representation_arguments",
    "system_embedding_of",
]

#: Floating point numbers by the bits that ``precision`` gives; models take 32 and 64.
PRECISIONS = {16: torch.float16, 32: torch.float32, 64: torch.float64}

#: Constructor parameters whose configuration key has another name.
KEY_OF_PARAMETER = {"hidden_channels": "embedding_dimension", "num_filters": "embedding_dimension"}

#: Constructor parameters that no configuration sets: they follow from its precision and its head.
_DERIVED = ("dtype", "output_charges")


@torch.inference_mode(False)
def create_model(
    args: Mapping[str, Any],
    prior_model: BasePrior | Sequence[BasePrior] | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> TorchMD_Net:
    """Build a potential from its configuration.

    Args:
        args: Configuration keys, see the configuration reference; not modified. Keys an architecture does not read
            are ignored; for what a missing key means see :func:`default_of`.
        prior_model: Priors to use in place of the ones the configuration names.
        mean: See :class:`torchmdnet.potential.TorchMD_Net`.
        std: See :class:`torchmdnet.potential.TorchMD_Net`.

    Raises:
        ConfigError: For an unknown architecture, head, prior or option value.
    """
    args, dtype = dict(args), precision_of(args)
    architecture = ARCHITECTURES[_required(args, "model")]
    if "system_embedding" in representation_arguments(architecture):
        args["system_embedding"] = system_embedding_of(architecture, args)
    check_size(args)
    representation = architecture(**_arguments(architecture, args, dtype))
    if _filters_atoms(args):
        if value_of(args, "derivative"):
            raise ConfigError(
                "atom_filter: cannot be combined with derivative, forces need every atom. Set one of them."
            )
        from torchmdnet.models.wrappers import AtomFilter

        representation = AtomFilter(representation, int(args["atom_filter"]))
    if args.get("prior_model") and prior_model is None:
        prior_model = create_prior_models(args)
    model = TorchMD_Net(
        representation,
        _output_model(architecture, args, dtype, has_mean=mean is not None and bool((mean != 0).any())),
        prior_model=prior_model,
        mean=mean,
        std=std,
        derivative=bool(value_of(args, "derivative")),
        dtype=dtype,
        property_heads=_property_heads(architecture, args, dtype),
    )
    model.hyper_parameters = args
    set_radial_mode(model, value_of(args, "radial"))
    return model


# ------------------------------------------------------------------------------------------ what keys mean


def _required(args: Mapping[str, Any], key: str) -> Any:
    if key not in args:
        raise ConfigError(f"{key}: missing from the model configuration.")
    return args[key]


def precision_of(args: Mapping[str, Any]) -> torch.dtype:
    """The dtype of ``precision: 32 | 64``."""
    precision = value_of(args, "precision")
    if precision == 16:
        raise ConfigError(
            "precision: 16 is not available: distances, and the derivatives behind forces, need at least 32 bits. "
            "Choose from 32, 64."
        )
    if precision not in (32, 64):
        raise ConfigError(f"precision: {precision!r} is not available. Choose from 32, 64.")
    return PRECISIONS[precision]


def box_from_config(box_vecs: Any, dtype: torch.dtype) -> Tensor | None:
    """A box given as nested lists; None and all zeros mean no box.

    Raises:
        ConfigError: If the shape is neither (3, 3) nor (S, 3, 3).
    """
    if box_vecs is None:
        return None
    box = torch.as_tensor(box_vecs, dtype=dtype)
    if box.dim() not in (2, 3) or box.shape[-2:] != (3, 3):
        raise ConfigError(f"box_vecs: shape {tuple(box.shape)} given. Give three lattice vectors, [[ax, ay, az], ...].")
    return box if bool(box.any()) else None


def representation_arguments(architecture: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The configuration keys an architecture reads, with the constructor parameter behind each."""
    parameters = inspect.signature(architecture).parameters
    return {KEY_OF_PARAMETER.get(name, name): parameter for name, parameter in parameters.items() if name != "dtype"}


def default_of(key: str, parameter: inspect.Parameter) -> Any:
    """What an architecture takes for a key that its configuration lacks; ``parameter`` is that of its constructor.

    That is the default of the constructor, or of the option table where the table says so; see
    :func:`torchmdnet.options.has_fixed_default`.
    """
    return OPTIONS[key].default if has_fixed_default(key) else parameter.default


def reads_charge(architecture: type[Any], args: Mapping[str, Any]) -> bool:
    """Whether the total charge enters the features of an architecture without being embedded."""
    settings = {key: default_of(key, parameter) for key, parameter in representation_arguments(architecture).items()}
    return bool(architecture.reads_charge({**settings, **args, "output_charges": _needs_charges(architecture, args)}))


def system_embedding_of(architecture: type[Any], args: Mapping[str, Any]) -> str:
    """What ``system_embedding: auto`` comes to; any other value stands.

    The spin is embedded if ``spin`` is set, with the total charge if ``charge`` is set too. A charge alone is embedded
    where the architecture has no other use for it.
    """
    asked = value_of(args, "system_embedding") or "auto"
    if asked != "auto":
        return str(asked)
    has_charge, has_spin = bool(value_of(args, "charge")), bool(value_of(args, "spin"))
    if has_charge and not has_spin and reads_charge(architecture, args):
        return "none"
    return "+".join(name for name, has in (("charge", has_charge), ("spin", has_spin)) if has) or "none"


def _filters_atoms(args: Mapping[str, Any]) -> bool:
    return int(value_of(args, "atom_filter")) > -1


# ------------------------------------------------------------------------------------------ architecture


def check_size(args: Mapping[str, Any], copies: int = 1) -> None:
    """Refuse a model that cannot be made or held, before anything of it is allocated.

    Args:
        args: Configuration keys.
        copies: How often the weights are held: once, or four times in training, with gradients and two moments.

    Raises:
        ConfigError: With the key and its value; or with the sizes, the number of parameters, and the memory needed and
            available.
    """
    _check_representation(ARCHITECTURES[_required(args, "model")], args)
    check_limits(args)
    if is_small(args) or args.get("model") not in ARCHITECTURES:
        return
    if torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        model = create_model({**args, "box_vecs": None}, prior_model=())
    count = sum(weights.numel() for weights in model.parameters())
    needed, available = count * copies * precision_of(args).itemsize, available_memory()
    if available is not None and needed > available:
        sizes = ("embedding_dimension", "num_layers", "num_rbf", "max_z", "q_dim")
        given = ", ".join(f"{key}={args[key]}" for key in sizes if args.get(key))
        raise ConfigError(
            f"{given}: the model has {count:,} parameters, which take {needed / 1e9:,.3g} GB"
            f"{' to train (weights, gradients and the moments of AdamW)' if copies > 1 else ''}, but "
            f"{available / 1e9:,.3g} GB are available. Make embedding_dimension smaller."
        )


def _check_representation(architecture: type[nn.Module], args: Mapping[str, Any]) -> None:
    """Refuse a configuration without a key that has no default, and values of another kind than the parameters take.

    Raises:
        ConfigError: Naming the key.
    """
    _required(args, "embedding_dimension")
    parameters = {
        key: parameter
        for key, parameter in representation_arguments(architecture).items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in _DERIVED and not has_fixed_default(key):
            _required(args, key)
    check_kinds(parameters, args, takes_none=has_fixed_default)


def _arguments(architecture: type[nn.Module], args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of an architecture, taken from the configuration by name."""
    derived = {"dtype": dtype, "output_charges": _needs_charges(architecture, args)}
    chosen: dict[str, Any] = {}
    for name in arguments_of(architecture):
        key = KEY_OF_PARAMETER.get(name, name)
        if key in derived:
            chosen[name] = derived[key]
        elif key in args or has_fixed_default(key):
            is_default = args.get(key) is None and has_fixed_default(key)
            chosen[name] = _converted(key, OPTIONS[key].default if is_default else args[key], dtype)
    return chosen


def _converted(key: str, value: Any, dtype: torch.dtype) -> Any:
    """A value as constructors take it: files may hold an integer for a number, nested lists for a box."""
    if key == "box_vecs":
        return box_from_config(value, dtype)
    if key in OPTIONS and isinstance(value, numbers.Real):
        kinds: dict[str, type] = {"int": int, "float": float, "bool": bool}
        converted = kinds.get(OPTIONS[key].type, lambda number: number)(value)
        return converted if converted == value else value
    return value


# ------------------------------------------------------------------------------------------ heads


def _needs_charges(architecture: type[Any], args: Mapping[str, Any]) -> bool:
    """Whether the output model reads the charges that an architecture predicts."""
    name, _ = named_head(_required(args, "output_model"))
    return bool(getattr(head_for(architecture, name), "needs_charges", False))


def _output_model(
    architecture: type[Any], args: Mapping[str, Any], dtype: torch.dtype, has_mean: bool = False
) -> OutputModel:
    name, arguments = named_head(_required(args, "output_model"))
    head = _create_head(architecture, name, args, dtype, arguments, "output_model")
    if getattr(head, "per_atom_output", False):
        raise ConfigError(
            f"output_model: {name!r} gives a value of each atom and cannot be the output of a system. "
            f"Name it under properties, for example properties: {{my_label: {name}}}."
        )
    if has_mean and not getattr(head, "can_standardize", True):
        raise ConfigError(
            f"standardize: output_model {name!r} predicts vectors, or a length of one, to which a mean "
            "cannot be added. Set standardize to false."
        )
    return head


def _property_heads(architecture: type[Any], args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, OutputModel]:
    heads = {}
    for spec in property_specs(args).values():
        key = f"properties: {spec.name}"
        if getattr(HEADS[spec.head], "needs_charges", False):
            raise ConfigError(f"{key}: {spec.head!r} can only be the output_model.")
        head = _create_head(architecture, spec.head, args, dtype, spec.keywords, key)
        if head.per_atom_output and _filters_atoms(args):
            raise ConfigError(f"{key} is a value of each atom, but atom_filter hides atoms. Set one of them.")
        heads[spec.name] = head
    return heads


def _create_head(
    architecture: type[Any], name: str, args: Mapping[str, Any], dtype: torch.dtype, own: Mapping[str, Any], key: str
) -> OutputModel:
    """A head by its name, with the options of the model and, over them, arguments of its own."""
    head = head_for(architecture, name)
    check_head_arguments(f"{key}: {name}", head, own)
    has_vectors = bool(getattr(architecture, "head_prefix", "")) or getattr(architecture, "has_vectors", False)
    if getattr(head, "needs_vectors", False) and not has_vectors:
        raise ConfigError(
            f"{key}: {name!r} needs vector features, which model {args['model']!r} does not have. "
            "Use model: tensornet, tensornet2 or equivariant-transformer."
        )
    parameters = representation_arguments(architecture)
    needs_charges = getattr(head, "needs_charges", False)
    if needs_charges and "output_charges" not in parameters:
        raise ConfigError(
            f"{key}: {name!r} needs charges, which model {args['model']!r} does not predict. Use model: tensornet2."
        )
    options: dict[str, Any] = {option: value_of(args, option) for option in keys_read_by("head")}
    if needs_charges:  # of every layer, so their number has the name of the depth
        options["num_layers"] = args.get("num_layers", parameters["num_layers"].default)
    options |= {
        depth_of(head): value_of(args, "output_mlp_num_layers"),
        "box_vecs": box_from_config(args.get("box_vecs"), dtype),
        "dtype": dtype,
        "has_vectors": has_vectors,
        "has_tensors": getattr(architecture, "has_tensors", False),
    }
    accepted = inspect.signature(head).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        options = {option: value for option, value in options.items() if option in accepted}
    return cast(Any, head)(args["embedding_dimension"], **{**options, **own})


def check_head(args: Mapping[str, Any]) -> None:
    """Refuse arguments of the output model that it does not take, or that it cannot be made of.

    Args:
        args: Configuration keys.

    Raises:
        ConfigError: Naming the argument.
    """
    architecture = ARCHITECTURES[_required(args, "model")]
    try:
        _output_model(architecture, {**args, "embedding_dimension": 8}, precision_of(args))
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        name, arguments = named_head(args["output_model"])
        raise ConfigError(
            f"output_model: {name} cannot be built from {arguments or 'no arguments'}: {str(error).splitlines()[0]}"
        ) from error
