"""From a configuration to a potential."""

from __future__ import annotations

import inspect
import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.heads import HEADS
from torchmdnet.heads.base import OutputModel
from torchmdnet.limits import check_limits, is_small
from torchmdnet.memory import available_memory
from torchmdnet.models import ARCHITECTURES
from torchmdnet.models.base import set_radial_mode
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors import PRIORS
from torchmdnet.priors.base import BasePrior
from torchmdnet.properties import PropertySpec, property_specs

__all__ = [
    "MODEL_KEYS",
    "PRECISIONS",
    "PropertySpec",
    "check_priors",
    "check_size",
    "create_model",
    "create_prior_models",
    "default_of",
    "property_specs",
    "representation_arguments",
    "system_embedding_of",
]

log = logging.getLogger(__name__)

PRECISIONS = {16: torch.float16, 32: torch.float32, 64: torch.float64}

#: What :func:`create_model` reads beside the parameters of the architecture.
MODEL_KEYS = frozenset(
    {
        "atom_filter",
        "coulomb_cutoff",
        "coulomb_max_num_neighbors",
        "coulomb_neighbor_strategy",
        "derivative",
        "model",
        "output_mlp_num_layers",
        "output_model",
        "precision",
        "prior_args",
        "prior_model",
        "properties",
        "q_dim",
        "q_weights",
        "radial",
        "reduce_op",
        "remove_ref_energy",
    }
)

#: What a key that a configuration lacks means, where that is not the default of the constructor. Files leave out
#: newer options at the defaults of the option table, so a newer option that differs there needs its line here.
WHEN_MISSING: dict[str, Any] = {"q_dim": 0, "box_vecs": None, "static_shapes": False}

#: Constructor parameters whose configuration key has another name.
KEY_OF_PARAMETER = {"hidden_channels": "embedding_dimension", "num_filters": "embedding_dimension"}


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
            are ignored.
        prior_model: Priors to use in place of the ones the configuration names.
        mean: See :class:`torchmdnet.potential.TorchMD_Net`.
        std: See :class:`torchmdnet.potential.TorchMD_Net`.

    Raises:
        ConfigError: For an unknown architecture, head, prior or option value.
    """
    args = dict(args)
    dtype = precision_of(args)
    architecture = ARCHITECTURES[_required(args, "model")]
    if "system_embedding" in representation_arguments(architecture):
        args["system_embedding"] = system_embedding_of(architecture, args)
    check_size(args)
    representation = architecture(**_arguments(architecture, args, dtype))
    if args.get("atom_filter", -1) is not None and int(args.get("atom_filter", -1)) > -1:
        if args.get("derivative"):
            raise ConfigError(
                "atom_filter: cannot be combined with derivative, forces need every atom. Set one of them."
            )
        from torchmdnet.models.wrappers import AtomFilter

        representation = AtomFilter(representation, int(args["atom_filter"]))
    if args.get("prior_model") and prior_model is None:
        prior_model = create_prior_models(args)
    output_model = _create_head(architecture, _required(args, "output_model"), args, dtype)
    if getattr(output_model, "per_atom_output", False):
        raise ConfigError(
            f"output_model: {args['output_model']!r} gives a value of each atom and cannot be the output of a system. "
            f"Name it under properties, for example properties: {{my_label: {args['output_model']}}}."
        )
    if mean is not None and bool((mean != 0).any()) and not getattr(output_model, "can_standardize", True):
        raise ConfigError(
            f"standardize: output_model {args['output_model']!r} predicts vectors, or a length of one, to which a mean "
            "cannot be added. Set standardize to false."
        )
    model = TorchMD_Net(
        representation,
        output_model,
        prior_model=prior_model,
        mean=mean,
        std=std,
        derivative=bool(args.get("derivative", False)),
        dtype=dtype,
        property_heads=_create_property_heads(architecture, args, dtype),
    )
    model.hyper_parameters = args
    set_radial_mode(model, args.get("radial") or "auto")
    return model


def check_size(args: Mapping[str, Any], copies: int = 1) -> None:
    """Refuse a model that cannot be made or held, before anything of it is allocated.

    Args:
        args: Configuration keys.
        copies: How often the weights are held: once, or four times in training, with gradients and two moments.

    Raises:
        ConfigError: With the key and its value; or with the sizes, the number of parameters, and the memory needed and
            available.
    """
    _check_kinds(ARCHITECTURES[_required(args, "model")], args)
    check_limits(args)
    if is_small(args) or args.get("model") not in ARCHITECTURES:
        return
    if torch.get_default_device().type == "meta":
        return
    with torch.device("meta"):
        model = create_model({**args, "box_vecs": None}, prior_model=())
    count = sum(weights.numel() for weights in model.parameters())
    needed, available = count * copies * (8 if args.get("precision") == 64 else 4), available_memory()
    if available is not None and needed > available:
        sizes = ("embedding_dimension", "num_layers", "num_rbf", "max_z", "q_dim")
        given = ", ".join(f"{key}={args[key]}" for key in sizes if args.get(key))
        raise ConfigError(
            f"{given}: the model has {count:,} parameters, which take {needed / 1e9:,.3g} GB"
            f"{' to train (weights, gradients and the moments of AdamW)' if copies > 1 else ''}, but "
            f"{available / 1e9:,.3g} GB are available. Make embedding_dimension smaller."
        )


def system_embedding_of(architecture: type[Any], args: Mapping[str, Any]) -> str:
    """What ``system_embedding: auto`` comes to; any other value stands.

    The spin is embedded if ``spin`` is set, with the total charge if ``charge`` is set too. A charge alone is embedded
    where the architecture has no other use for it.
    """
    asked = args.get("system_embedding") or "auto"
    if asked != "auto":
        return str(asked)
    has_charge, has_spin = bool(args.get("charge")), bool(args.get("spin"))
    if has_charge and not has_spin and architecture.reads_charge(args):
        return "none"
    return "+".join(name for name, has in (("charge", has_charge), ("spin", has_spin)) if has) or "none"


def precision_of(args: Mapping[str, Any]) -> torch.dtype:
    """The dtype of ``precision: 32 | 64``."""
    precision = args.get("precision", 32)
    if precision == 16:
        raise ConfigError(
            "precision: 16 is not available: distances, and the derivatives behind forces, need at least 32 bits. "
            "Choose from 32, 64."
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: {precision!r} is not available. Choose from 32, 64.")
    return PRECISIONS[precision]


def _required(args: Mapping[str, Any], key: str) -> Any:
    if key not in args:
        raise ConfigError(f"{key}: missing from the model configuration.")
    return args[key]


def representation_arguments(architecture: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The configuration keys an architecture reads, with the constructor parameter behind each."""
    parameters = inspect.signature(architecture).parameters
    return {KEY_OF_PARAMETER.get(name, name): parameter for name, parameter in parameters.items() if name != "dtype"}


def _arguments(architecture: type[nn.Module], args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of an architecture, taken from the configuration by name."""
    chosen: dict[str, Any] = {}
    for name, parameter in inspect.signature(architecture).parameters.items():
        key = KEY_OF_PARAMETER.get(name, name)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if key == "dtype":
            chosen[name] = dtype
        elif key == "output_charges":
            chosen[name] = "Coul" in str(args.get("output_model", ""))
        elif key in args or key in WHEN_MISSING:
            chosen[name] = _converted(key, args.get(key, WHEN_MISSING.get(key)), dtype)
    return chosen


#: Kinds of values by the annotation of a parameter, and what to call them.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((numbers.Integral,), "a whole number"),
    "float": ((numbers.Real,), "a finite number"),
    "str": ((str,), "text"),
    "bool": ((bool, numbers.Integral), "true or false"),
}


def _check_kinds(architecture: type[nn.Module], args: Mapping[str, Any]) -> None:
    """Refuse values that are of another kind than the annotation of their parameter says.

    Raises:
        ConfigError: Naming the key.
    """
    if "embedding_dimension" not in args:
        raise ConfigError("embedding_dimension: missing from the model configuration.")
    for key, parameter in representation_arguments(architecture).items():
        is_many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        is_known = key in args or key in WHEN_MISSING or key == "output_charges"
        if not is_many and not is_known and parameter.default is parameter.empty:
            raise ConfigError(f"{key}: missing from the model configuration.")
        annotation = getattr(parameter.annotation, "__name__", parameter.annotation)
        names = [name.strip() for name in str(annotation).split("|")]
        if key not in args or not all(name in _KINDS or name == "None" for name in names):
            continue
        value = args[key]
        if value is None and ("None" in names or key in WHEN_MISSING):
            continue
        kinds = tuple(kind for name in names if name in _KINDS for kind in _KINDS[name][0])
        is_float = isinstance(value, float)
        whole = is_float and value.is_integer() and "int" in names
        fits = (isinstance(value, kinds) and (not is_float or math.isfinite(value))) or whole
        if isinstance(value, bool) and "bool" not in names:
            fits = False
        if not fits:
            what = " or ".join(_KINDS[name][1] for name in names if name in _KINDS)
            raise ConfigError(f"{key}: {str(value)[:60]!r} is not valid. It takes {what}.")


def _converted(key: str, value: Any, dtype: torch.dtype) -> Any:
    """A value as constructors take it: files may hold an integer for a number, nested lists for a box."""
    if key == "box_vecs":
        return box_from_config(value, dtype)
    if key.startswith("cutoff_"):
        return float(value)
    return int(value) if key == "q_dim" else bool(value) if key == "static_shapes" else value


def default_of(key: str, parameter: inspect.Parameter) -> Any:
    """What a representation takes for a key that its configuration lacks; ``parameter`` as from the constructor."""
    return WHEN_MISSING.get(key, parameter.default)


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


def _create_property_heads(
    architecture: type[Any], args: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, OutputModel]:
    heads = {}
    for spec in property_specs(args).values():
        key = f"properties: {spec.name}"
        if getattr(HEADS[spec.head], "needs_charges", False):
            raise ConfigError(f"{key}: {spec.head!r} can only be the output_model.")
        head = _create_head(architecture, spec.head, args, dtype, spec.keywords, key)
        if head.per_atom_output and int(args.get("atom_filter", -1)) > -1:
            raise ConfigError(f"{key} is a value of each atom, but atom_filter hides atoms. Set one of them.")
        heads[spec.name] = head
    return heads


def _create_head(
    architecture: type[Any],
    name: str,
    args: Mapping[str, Any],
    dtype: torch.dtype,
    keywords: Mapping[str, Any] | None = None,
    key: str = "output_model",
) -> OutputModel:
    prefix = getattr(architecture, "head_prefix", "")
    if prefix and name in HEADS and prefix + name in HEADS:
        name = prefix + name
    head = HEADS[name]
    has_vectors = bool(prefix) or getattr(architecture, "has_vectors", False)
    if getattr(head, "needs_vectors", False) and not has_vectors:
        raise ConfigError(
            f"{key}: {name!r} needs vector features, which model {args['model']!r} does not have. "
            "Use model: tensornet, tensornet2 or equivariant-transformer."
        )
    if getattr(head, "needs_charges", False) and "output_charges" not in inspect.signature(architecture).parameters:
        raise ConfigError(
            f"{key}: {name!r} needs charges, which model {args['model']!r} does not predict. Use model: tensornet2."
        )
    options = {
        "activation": args.get("activation", "silu"),
        "reduce_op": args.get("reduce_op", "sum"),
        "dtype": dtype,
        "static_shapes": bool(args.get("static_shapes", False)),
        "num_layers": args.get("output_mlp_num_layers", 0),
        "q_dim": args.get("q_dim", WHEN_MISSING["q_dim"]),
        "q_weights": args.get("q_weights", []),
        "coulomb_cutoff": args.get("coulomb_cutoff"),
        "coulomb_epsilon_solvent": args.get("coulomb_epsilon_solvent", 78.3),
        "coulomb_max_num_neighbors": args.get("coulomb_max_num_neighbors"),
        "coulomb_neighbor_strategy": args.get("coulomb_neighbor_strategy", "brute"),
        "box_vecs": box_from_config(args.get("box_vecs"), dtype),
        "has_vectors": has_vectors,
        "has_tensors": getattr(architecture, "has_tensors", False),
    }
    accepted = inspect.signature(head).parameters
    if "q_weights" in accepted:  # a head that reads the charges of every layer, and its depth under another name
        options |= {"num_layers": args.get("num_layers", 0), "num_hidden_layers": options["num_layers"]}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        options = {option: value for option, value in options.items() if option in accepted}
    return head(args["embedding_dimension"], **{**options, **(keywords or {})})


def create_prior_models(args: Mapping[str, Any], dataset: Any = None) -> list[BasePrior]:
    """Build the priors a configuration names.

    Args:
        args: ``prior_model`` is a name, ``{name: keywords}``, or a list of either; ``prior_args``, one dictionary for
            each prior as a checkpoint stores them, takes the place of the keywords.
        dataset: Asked by priors for what was not given, such as reference energies.

    Raises:
        ConfigError: For an unknown prior or keyword, or if ``prior_args`` does not match.
    """
    named = _named_priors(args.get("prior_model"))
    stored = args.get("prior_args")
    if stored is not None:
        stored = [stored] if isinstance(stored, Mapping) else list(stored)
        if len(stored) != len(named):
            raise ConfigError(
                f"prior_args: {len(stored)} given for {len(named)} priors ({', '.join(name for name, _ in named)}). "
                "Give one dictionary for each prior, in the same order."
            )
        named = [(name, dict(keywords or {})) for (name, _), keywords in zip(named, stored, strict=True)]
    priors = []
    for name, keywords in named:
        prior = PRIORS[name]
        _check_keywords(name, prior, keywords)
        try:
            priors.append(prior(dataset=dataset, **keywords))
        except ConfigError as error:
            raise type(error)(f"prior_model: {error}") from error
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise ConfigError(
                f"prior_model: {name} cannot be built from {keywords or 'no arguments'}: {str(error).splitlines()[0]}"
            ) from error
    return priors


class _AnyData:
    """Stands for data that are not read yet: they state a unit of length and of energy, and energies of elements."""

    distance_scale = energy_scale = 1.0

    def get_atomref(self, max_z: int = 100) -> Tensor:
        """Energy of each element."""
        return torch.zeros(max_z, 1)


def check_priors(prior_model: Any) -> None:
    """Refuse arguments that no data make right, before any are read.

    Args:
        prior_model: As in a configuration.

    Raises:
        ConfigError: For an unknown prior, a keyword it does not take, or a value that is not valid.
    """
    for name, keywords in _named_priors(prior_model):
        _check_keywords(name, PRIORS[name], keywords)
        if name in PRIORS:  # what others do with data that are none is not known
            create_prior_models({"prior_model": {name: keywords}}, _AnyData())


def _check_keywords(name: str, prior: type[BasePrior], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that a prior does not take, and ask for those that it needs."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(prior).parameters.items()
        if key != "dataset" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(prior).parameters.values())
    for key in keywords:
        if key not in parameters and (key == "dataset" or not takes_any):
            raise ConfigError(
                f"prior_model: {name} has no argument {key!r}.{did_you_mean(key, parameters)} It takes "
                f"{', '.join(parameters) or 'none'}."
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in keywords]
    if missing:
        example = ", ".join(f'"{key}": ...' for key in missing)
        raise ConfigError(f'prior_model: {name} needs {" and ".join(missing)}: {{"{name}": {{{example}}}}}.')


def _named_priors(prior_model: Any) -> list[tuple[str, dict[str, Any]]]:
    """All forms of ``prior_model`` as a list of names with keywords."""
    if not prior_model:
        return []
    if isinstance(prior_model, str):
        return [(prior_model, {})]
    if isinstance(prior_model, Mapping):
        return [(name, dict(keywords or {})) for name, keywords in prior_model.items()]
    if isinstance(prior_model, Sequence):
        return [pair for entry in prior_model for pair in _named_priors(entry)]
    raise ConfigError(
        f"prior_model: {prior_model!r} is neither a name, a mapping of names to keywords, nor a list of these."
    )
