"""What is known of a model file, whatever its format."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmdnet.build import create_model
from torchmdnet.checkpoint.card import count_parameters, make_card
from torchmdnet.checkpoint.load import unpack_ensemble
from torchmdnet.checkpoint.migrations import has_old_tensor_layout, migrate, strip_module_prefix
from torchmdnet.checkpoint.read import as_model_file, check_sizes, hyper_parameters_of, read_checkpoint
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.files import expanded
from torchmdnet.potential import TorchMD_Net

__all__ = ["describe"]


def describe(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """The card of a model file; for a checkpoint, the same facts as far as it holds them.

    Args:
        path: A native file, a checkpoint, or a zip of either.
        weights_only: See :func:`torchmdnet.checkpoint.read.read_checkpoint`.

    Returns:
        The card, with ``file`` and ``kind`` (``native``, ``checkpoint`` or ``ensemble``) in front. An ensemble has the
        cards of its ``members``. What a file does not say is None.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, was changed, or is no model file.
    """
    path = expanded(path)
    if path.suffix == ".zip" and path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            members = [_describe_one(copy, weights_only) for copy in unpack_ensemble(path, folder)]
        return {"file": str(path), "kind": "ensemble", "members": members}
    return {"file": str(path), **_describe_one(path, weights_only)}


def _describe_one(path: Path, weights_only: bool) -> dict[str, Any]:
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    if "card" in checkpoint:
        return {"kind": "native", **checkpoint["card"]}
    with as_model_file(path):
        options = hyper_parameters_of(checkpoint, path)
        if "model" not in options:
            raise CheckpointError(
                f"{path}: the hyper_parameters do not name a model, so this is no file of this package."
            )
        facts = {key: value for key, value in (checkpoint.get("torchmdnet") or {}).items() if key != "state"}
        state, _ = strip_module_prefix(checkpoint["state_dict"], {})
        is_old = has_old_tensor_layout(state, options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the layout is told in another way
            _, options = migrate(checkpoint["state_dict"], options)
        check_sizes(options, checkpoint["state_dict"], path)
        model = _build(options)
        card = make_card(
            options,
            facts,
            num_parameters=0 if model is None else count_parameters(model),
            priors=_prior_names(options),
        )
        if model is None:
            card["num_parameters"] = None
        card["written_by"] = _writer(checkpoint, facts)
        card["training"] = {**_progress(checkpoint), **card["training"]}
        if is_old:
            card["layout"] = "of releases before 3.0; brought up to date on loading"
        return {"kind": "checkpoint", **card}


def _build(options: Mapping[str, Any]) -> TorchMD_Net | None:
    """The model, to count what it has; None where a part of it is not installed."""
    try:
        return create_model(options)
    except (ConfigError, ImportError):
        return None


def _prior_names(options: Mapping[str, Any]) -> list[str]:
    stored = options.get("prior_model") or []
    stored = [stored] if isinstance(stored, (str, Mapping)) else stored
    return [name for entry in stored for name in ([entry] if isinstance(entry, str) else entry)]


def _writer(checkpoint: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    if facts.get("version"):
        return f"torchmd-net {facts['version']}"
    lightning = checkpoint.get("pytorch-lightning_version")
    return f"an earlier release, Lightning {lightning}" if lightning else None


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """How far training had come."""
    if not checkpoint.get("global_step"):
        return {}
    return {"epochs": int(checkpoint.get("epoch", 0)) + 1, "steps": int(checkpoint["global_step"])}
