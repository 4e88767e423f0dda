"""What a model file says of its model: the card of a native file, and the same facts gathered from a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmdnet._version import __version__
from torchmdnet.build import representation_arguments
from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.heads import named_head
from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS, keys_read_by, value_of
from torchmdnet.units import normalise_unit

__all__ = ["count_parameters", "make_card", "model_options", "plain", "provenance_of"]


def plain(value: Any, what: str = "value") -> Any:
    """The same in lists, dictionaries with text keys, text, numbers, booleans and None.

    Raises:
        ConfigError: If something cannot be written so.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, argparse.Namespace):
        return plain(vars(value), what)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, what) for item in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return plain(value.tolist(), what)
    if isinstance(value, np.generic):
        return plain(value.item(), what)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(f"{what}: {value!r} cannot be written to a model file, which holds text and finite numbers.")


def model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options among all of a run's that shape the model, or say how it is to be asked, as plain values."""
    known = keys_read_by("model") | representation_arguments(ARCHITECTURES[options["model"]]).keys()
    return {
        key: plain(value, key)
        for key, value in options.items()
        if key in known and not (key in OPTIONS and OPTIONS[key].transient)
    }


def _training_settings(options: Mapping[str, Any], has_counts: bool) -> dict[str, Any]:
    """What a card tells of the settings of a run, as plain values.

    Args:
        options: Settings of the run.
        has_counts: Whether the numbers of systems are known, so that the sizes asked for say nothing; nor do they
            where a file or the data divide.
    """
    kept = [key for key, option in OPTIONS.items() if option.in_card and options.get(key) is not None]
    if has_counts or options.get("splits") not in (None, "random"):
        kept = [key for key in kept if OPTIONS[key].type != "size"]
    return {key: plain(options[key], key) for key in kept}


def count_parameters(model: torch.nn.Module) -> int:
    """Numbers that training changes; of a model that is frozen as a whole, all."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad) or sum(p.numel() for p in parameters)


def make_card(
    options: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    num_parameters: int,
    priors: list[str],
    golden: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The card of a model; what is not known is None, never guessed.

    Args:
        options: Hyper-parameters.
        provenance: What is known of the data, see :func:`provenance_of`.
        num_parameters: Trained numbers in the model.
        priors: Names of its priors.
        golden: See :func:`torchmdnet.checkpoint.golden.golden_numbers`.

    Raises:
        ConfigError: If a value cannot be written.
    """
    units = provenance.get("units") or {}
    elements = [int(z) for z in provenance.get("elements") or ()]
    training = dict(plain(provenance.get("training") or {}, "training"))
    settings = _training_settings(options, has_counts="systems" in training)
    if settings and "settings" not in training and training:
        training["settings"] = settings
    card: dict[str, Any] = {
        "written_by": f"torchmd-net {__version__}, PyTorch {torch.__version__}",
        "trained_by": provenance.get("trained_by"),
        "architecture": str(options["model"]),
        "head": named_head(value_of(options, "output_model"))[0],
        "priors": priors,
        "num_parameters": num_parameters,
        "precision": int(value_of(options, "precision")),
        "cutoff": float(options["cutoff_upper"]) if "cutoff_upper" in options else None,
        "elements": [SYMBOLS[z] if 0 < z < len(SYMBOLS) else str(z) for z in elements] or None,
        "units": {kind: _unit(units.get(kind), kind) for kind in ("energy", "length")},
        "level_of_theory": plain(provenance.get("level_of_theory")),
        "citation": plain(provenance.get("citation")),
        **({"references": plain(provenance["references"])} if provenance.get("references") else {}),
        "hyper_parameters": model_options(options),
        "training": training,
    }
    return card if golden is None else {**card, "golden": plain(golden, "golden")}


def _unit(unit: str | None, kind: str) -> str | None:
    """The house spelling of a unit where there is one: labels may be in others, such as Debye."""
    try:
        return normalise_unit(unit, kind) if unit else None
    except ConfigError:
        return str(unit)


def provenance_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of the data, in the form in which models and checkpoints carry it."""
    numbers = {symbol: z for z, symbol in enumerate(SYMBOLS)}
    elements = [numbers[name] if name in numbers else int(name) for name in card.get("elements") or ()]
    return {
        "trained_by": card.get("trained_by"),
        "units": dict(card["units"]),
        "level_of_theory": card.get("level_of_theory"),
        "citation": card.get("citation"),
        "elements": elements,
        **({"references": card["references"]} if card.get("references") else {}),
        "training": dict(card.get("training") or {}),
    }
