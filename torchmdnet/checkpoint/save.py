"""From a potential to a model file."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmdnet._version import __version__
from torchmdnet.build import create_model, default_of, representation_arguments
from torchmdnet.checkpoint.card import count_parameters, make_card, model_options
from torchmdnet.checkpoint.golden import Example, default_examples, deviation_from, golden_numbers
from torchmdnet.checkpoint.native import write_native
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.files import draft_of, expanded
from torchmdnet.heads import named_head
from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS, value_of
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors import PRIORS

__all__ = ["save_model"]

log = logging.getLogger(__name__)


def save_model(
    model: TorchMD_Net | Ensemble,
    path: str | Path,
    *,
    hyper_parameters: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    examples: Iterable[Example] | None = None,
) -> dict[str, Any]:
    """Write a potential to a file, in the format its name asks for.

    ``.safetensors`` is the native format, see :mod:`torchmdnet.checkpoint.native`; ``.zip`` holds the members of an
    ensemble in it; ``.ckpt`` has the layout of release 3, for programs that read that. The file is complete or, if
    writing fails, as it was before, and is read back once to see that it gives the same numbers.

    Args:
        model: The potential.
        path: The file.
        hyper_parameters: Options the model was built from; None takes the ones it carries.
        provenance: Facts about the data: ``units``, ``elements``, ``level_of_theory``, ``citation``, ``training``. They
            are added to what the model carries.
        examples: Systems whose energies and forces go into the file; None makes up a molecule and, for models trained
            on periodic systems, a cell.

    Returns:
        The card of the file; of an ensemble, ``{"members": cards}``.

    Raises:
        ConfigError: If the name does not say the format, or the options of the model are not known.
        CheckpointError: If what was written does not give the model back.
    """
    path = expanded(path)
    if path.suffix not in (".safetensors", ".zip", ".ckpt"):
        raise ConfigError(f"{path}: the name of a model file ends in .safetensors, .zip (an ensemble) or .ckpt.")
    if isinstance(model, Ensemble) != (path.suffix == ".zip"):
        what = "An ensemble is" if isinstance(model, Ensemble) else "A single model is not"
        raise ConfigError(f"{path}: {what} written to a .zip file.")
    if isinstance(model, Ensemble):
        return _save_ensemble(model, path, provenance=provenance, examples=examples)
    options = options_of(model, hyper_parameters)
    facts = {**model.provenance, **(provenance or {})}
    state = model.state_dict()
    if path.suffix == ".ckpt":
        return _save_checkpoint(model, path, options, facts)
    golden = _golden(model, options, facts, examples)
    card = make_card(
        options,
        facts,
        num_parameters=count_parameters(model),
        priors=[_prior_name(prior) for prior in model.prior_model or ()],
        golden=golden,
    )
    _rebuild(card, state)
    return write_native(path, state, card)


def options_of(model: TorchMD_Net, hyper_parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that rebuild a model as it is now, its priors from their own arguments.

    Raises:
        ConfigError: If they are not known.
    """
    known = dict(hyper_parameters if hyper_parameters is not None else model.hyper_parameters)
    if "model" not in known:
        raise ConfigError(
            "hyper_parameters: the model does not carry the options it was built from. Pass the mapping that "
            "create_model was given, save_model(model, path, hyper_parameters=args)."
        )
    priors = list(model.prior_model or ())
    known["prior_model"] = [_prior_name(prior) for prior in priors] or None
    known["prior_args"] = [prior.get_init_args() for prior in priors]
    known["derivative"] = model.derivative
    known["precision"] = 64 if model.dtype == torch.float64 else 32
    arguments = representation_arguments(ARCHITECTURES[known["model"]])
    if "system_embedding" in arguments:  # auto is settled when a model is made
        known["system_embedding"] = getattr(model.representation_model, "system_embedding_kind", "none")
    for key, parameter in arguments.items():
        default = default_of(key, parameter)
        if key not in known and isinstance(default, (bool, int, float, str)) and key != "static_shapes":
            known[key] = default  # a default may change, a model may not
    return known


def _prior_name(prior: torch.nn.Module) -> str:
    return PRIORS.name_of(type(prior))


def _golden(
    model: TorchMD_Net, options: Mapping[str, Any], facts: Mapping[str, Any], examples: Iterable[Example] | None
) -> dict[str, Any] | None:
    """Golden numbers, or None and a warning where the model cannot be asked about made-up systems."""
    if examples is not None:
        return golden_numbers(model, examples)
    is_periodic = bool((facts.get("training") or {}).get("periodic")) or bool(options.get("box_vecs"))
    made_up = default_examples(
        model,
        elements=facts.get("elements"),
        is_periodic=is_periodic,
        has_charges=bool(options.get("charge")),
        has_spins=bool(options.get("spin")),
    )
    try:
        return golden_numbers(model, made_up)
    except Exception as error:  # a head or prior of the user's own may ask for what we cannot make up
        log.warning(
            "The file will hold no golden numbers, because the model cannot be asked about a made-up molecule (%s). "
            "Pass systems it can be asked about, save_model(..., examples=[...]).",
            error,
        )
        return None


def _rebuild(card: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """See that card and weights give the model back.

    Raises:
        CheckpointError: If they do not, which an option that cannot be written, or a prior whose ``get_init_args`` is
            incomplete, can cause.
    """
    rebuilt = create_model(card["hyper_parameters"])
    expected, found = rebuilt.state_dict().keys(), state.keys()
    if expected != found:
        names = ", ".join(sorted(expected ^ found)[:4])
        raise CheckpointError(f"The options do not rebuild the model: {names} is in one of them only.")
    for name, buffer in rebuilt.named_buffers():
        if name.endswith(".box") and buffer.shape != state[name].shape:
            rebuilt.get_submodule(name.rpartition(".")[0]).box = torch.zeros_like(state[name])
    rebuilt.load_state_dict(dict(state))
    if card.get("golden"):
        deviation = deviation_from(card["golden"], rebuilt.to(torch.float64).eval())
        if not deviation <= 1e-10:
            raise CheckpointError(
                f"The options do not rebuild the model: its answers change by {deviation:.1e} of their size. Pass all "
                "of the options it was built from as hyper_parameters, and let get_init_args of its priors return "
                "every argument that matters."
            )


def _save_checkpoint(
    model: TorchMD_Net, path: Path, options: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """A checkpoint with the layout of release 3: tensors and plain values, loadable by it."""
    if options.get("handedness") == "legacy" and options.get("equivariance_invariance_group") == "SO(3)":
        log.warning("%s: release 3 reads SO(3) models trained before 3.0 as their mirror image.", path)
    if named_head(value_of(options, "output_model"))[1]:
        log.warning("%s: release 3 reads no arguments of a head, output_model: %s.", path, options["output_model"])
    stored = {**_RELEASE_3, **model_options(options)}
    stored["prior_model"] = options["prior_model"]
    content = {
        "state_dict": {f"model.{name}": value.detach().cpu().clone() for name, value in model.state_dict().items()},
        "hyper_parameters": stored,
        "torchmdnet": {"version": __version__, **facts},
        "pytorch-lightning_version": importlib.metadata.version("lightning"),
        "epoch": 0,
        "global_step": 0,
    }
    with draft_of(path) as draft:
        torch.save(content, draft)
    return make_card(
        options,
        facts,
        num_parameters=count_parameters(model),
        priors=options["prior_model"] or [],
    )


#: What release 3 wants to find in every file, whether or not the architecture reads it.
_RELEASE_3 = {
    key: option.default
    for key, option in OPTIONS.items()
    if option.established and (option.group == "Architecture" or "model" in option.read_by.split())
}


def _save_ensemble(
    ensemble: Ensemble, path: Path, *, provenance: Mapping[str, Any] | None, examples: Iterable[Example] | None
) -> dict[str, Any]:
    examples = None if examples is None else list(examples)
    with tempfile.TemporaryDirectory() as folder, draft_of(path) as draft:
        cards = []
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            for number, member in enumerate(ensemble):
                assert isinstance(member, TorchMD_Net)
                name = f"member{number}.safetensors"
                cards.append(save_model(member, Path(folder, name), provenance=provenance, examples=examples))
                archive.write(Path(folder, name), name)
    return {"members": cards}
