"""From a model file to a potential."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchmdnet.build import box_from_config, create_model, precision_of, representation_arguments
from torchmdnet.checkpoint.golden import check_golden
from torchmdnet.checkpoint.migrations import RETIRED_KEYS, fill_boxes, migrate, representation_prefix
from torchmdnet.checkpoint.read import as_model_file, check_sizes, hyper_parameters_of, read_checkpoint
from torchmdnet.checkpoint.sound import check_finite, check_kinds, check_weights
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import CheckpointError, ConfigError, did_you_mean
from torchmdnet.files import expanded
from torchmdnet.heads.named import without_options
from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS, keys_read_by
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.atomref import Atomref

__all__ = ["check_start", "load_ensemble", "load_model", "load_weights", "usable_device"]

log = logging.getLogger(__name__)

#: Options that may differ from the file without changing the physics.
_FREE_TO_CHANGE = frozenset(key for key, option in OPTIONS.items() if option.free)
#: Options whose value is chosen whenever a model is made.
_TRANSIENT = frozenset(key for key, option in OPTIONS.items() if option.transient)


@torch.inference_mode(False)
def load_model(
    filepath: str | Path | Sequence[str | Path],
    args: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    return_std: bool = False,
    *,
    weights_only: bool = True,
    check: bool = True,
    **kwargs: Any,
) -> TorchMD_Net | Ensemble:
    """Load a potential, or an ensemble from several files or a zip of them.

    Args:
        filepath: A checkpoint or a native file, ``.safetensors``; a list of them or a ``.zip`` gives an
            :class:`Ensemble`.
        args: Hyper-parameters to use in place of the ones in the file; not modified.
        device: Where the model goes.
        return_std: Whether an ensemble returns standard deviations too.
        weights_only: See :func:`torchmdnet.checkpoint.read.read_checkpoint`.
        check: Whether a model from a native file has to repeat the golden numbers of its file, which takes some
            milliseconds; it is not asked to where an option changes what it computes.
        **kwargs: Hyper-parameters to change. ``remove_ref_energy=False`` makes a delta-learned model predict total
            energies. ``box_vecs`` replaces the stored box. ``compatibility_load`` says whether a TensorNet file has
            the tensor layout of releases before 3.0, where the file does not say. ``radial="exact"`` evaluates
            radial filters pair by pair, see :class:`torchmdnet.nn.filters.RadialEngine`. Unknown names warn.

    Returns:
        The model, in evaluation mode; call ``.train()`` to train it further.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, untrusted, does not fit its configuration, or the model does not give
            the golden numbers of its file.
    """
    if isinstance(filepath, (list, tuple)) or str(filepath).endswith(".zip"):
        return load_ensemble(
            filepath, args=args, device=device, return_std=return_std, weights_only=weights_only, check=check, **kwargs
        )
    assert isinstance(filepath, (str, Path))
    device = usable_device(device)
    checkpoint = read_checkpoint(filepath, weights_only=weights_only)
    with as_model_file(filepath):
        stored = hyper_parameters_of(checkpoint, filepath) if args is None else dict(args)
        if "check_errors" in (checkpoint.get("hyper_parameters") or ()):
            stored["check_errors"] = True  # how the file was written is a fact about the file, also when args are given
        card = checkpoint.get("card")
        stored = {key: value for key, value in stored.items() if key not in _TRANSIENT}
        overrides = _overrides(stored, kwargs)
        if card is not None:
            overrides["compatibility_load"] = False  # a native file has one layout, whatever a caller says
        check_kinds({**stored, **overrides}, filepath)
        state, chosen = migrate(checkpoint["state_dict"], {**stored, **overrides})
        if "box_vecs" in kwargs:
            box = box_from_config(kwargs["box_vecs"], precision_of(chosen))
            state[f"{representation_prefix(state)}distance.box"] = torch.zeros(3, 3) if box is None else box
        check_sizes(chosen, state, filepath)
        model = create_model(chosen)
        _load_state(model, state, filepath)
        if stored.get("remove_ref_energy") and kwargs.get("remove_ref_energy") is False:
            _add_reference_energies(model, filepath)
        if "system_embedding" in model.hyper_parameters:  # its ``auto`` is settled when a model is made
            chosen["system_embedding"] = model.hyper_parameters["system_embedding"]
        model.hyper_parameters = chosen
        if chosen.get("spin") and "spin" not in getattr(model.representation_model, "reads", {"spin"}):
            log.warning(
                "spin: %s was trained with spin: true by a release that made no use of it; the spin has no effect.",
                filepath,
            )
        model.provenance = {k: v for k, v in (checkpoint.get("torchmdnet") or {}).items() if k != "state"}
        model.eval()
        if check and card is not None and card.get("golden") and args is None and not _changes(stored, kwargs):
            check_golden(model, card["golden"], filepath)
    return model.to(device)


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name, found out to be there before anything is read or computed.

    Raises:
        ConfigError: If there is no such device.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {str(device)[:60]!r} is not available.{did_you_mean(str(device)[:60], ('cpu', 'cuda'))} "
            "Choose from cpu, cuda, cuda:0, ..."
        ) from error
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {found} is not available: PyTorch finds no CUDA device here. Choose cpu.")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: {found} is not available: PyTorch finds {torch.cuda.device_count()} devices, from cuda:0 on."
            )
    elif found.type not in ("cpu", "meta"):
        module = getattr(torch, found.type, None)
        if module is None or not getattr(module, "is_available", lambda: False)():
            raise ConfigError(f"device: {found} is not available here. Choose cpu.")
    return found


def load_weights(
    model: TorchMD_Net, filepath: str | Path, *, weights_only: bool = True, network_only: bool = False
) -> None:
    """Copy the weights of a checkpoint of any release into a model of the same architecture.

    A model that embeds total charge or spin may start from one that did not: the embedding keeps its fresh weights,
    and adds nothing to neutral systems without unpaired electrons.

    Args:
        model: Changed in place.
        filepath: A checkpoint or native file.
        weights_only: See :func:`torchmdnet.checkpoint.read.read_checkpoint`.
        network_only: Copy representation, heads, mean and standard deviation alone; the model keeps the tables of its
            own priors, and its own box.

    Raises:
        CheckpointError: If the file is damaged, untrusted, or holds another architecture.
    """
    checkpoint = read_checkpoint(filepath, weights_only=weights_only)
    with as_model_file(filepath):
        args = hyper_parameters_of(checkpoint, filepath) if checkpoint.get("hyper_parameters") else {}
        state, args = migrate(checkpoint["state_dict"], args)
        own = model.state_dict()
        if network_only:
            described = {name: value for name, value in own.items() if not _is_of_network(name)}
            state = {name: value for name, value in state.items() if _is_of_network(name)} | described
        prefix = f"{representation_prefix(own)}system_embedding."
        fresh = {key: value for key, value in own.items() if key.startswith(prefix) and key not in state}
        if fresh:
            log.info("load_weights: %s has no embedding of total charge or spin; that of the model is new.", filepath)
        _load_state(model, {**fresh, **state}, filepath)
        if "handedness" in args:  # an SO(3) model of an old layout, or trained on from one
            model.representation_model.tensor_embedding.handedness = args["handedness"]
            model.hyper_parameters["handedness"] = args["handedness"]


def check_start(filepath: str | Path) -> None:
    """Refuse a file from whose weights no training can start, before data are read and a model is made.

    Args:
        filepath: A checkpoint or native file.

    Raises:
        CheckpointError: If it is damaged, has no hyper-parameters, or weights of its network are not finite.
    """
    checkpoint = read_checkpoint(filepath)
    hyper_parameters_of(checkpoint, filepath)
    state = checkpoint["state_dict"]
    check_finite({k: v for k, v in state.items() if _is_of_network(k.removeprefix("model."))}, "state_dict", filepath)


def _is_of_network(name: str) -> bool:
    """Whether a weight was learned by the network, and does not describe the data it was trained on."""
    return not (name.startswith("prior_model.") or name.endswith(".box"))


def _overrides(stored: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Check keywords against what there is, and warn of those that change what the weights mean."""
    name = kwargs.get("model", stored.get("model"))
    shaping = set(representation_arguments(ARCHITECTURES[name])) if name in ARCHITECTURES else set()
    known = shaping | keys_read_by("model") | stored.keys() | RETIRED_KEYS
    for key in sorted(kwargs.keys() - known):
        warnings.warn(f"Unknown hyperparameter: {key}.{did_you_mean(key, known)}", stacklevel=4)
    for key in sorted(shaping & kwargs.keys() & stored.keys() - _FREE_TO_CHANGE):
        if kwargs[key] != stored[key]:
            log.warning(
                "%s: the model was trained with %r and is loaded with %r; it computes something else.",
                key,
                stored[key],
                kwargs[key],
            )
    overrides = {key: value for key, value in kwargs.items() if key != "check_errors"}
    if isinstance(stored.get("output_model"), Mapping) and "output_model" not in kwargs:
        overrides["output_model"] = without_options(ARCHITECTURES[name], stored["output_model"], kwargs.keys())
    return overrides


def _changes(stored: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether keywords ask for another result than the file describes."""
    free = _FREE_TO_CHANGE - {"box_vecs"} | RETIRED_KEYS | {"derivative"}
    if not stored.get("remove_ref_energy"):
        free |= {"remove_ref_energy"}  # there is nothing to add
    return any(stored.get(key) != value for key, value in kwargs.items() if key not in free)


def _load_state(model: TorchMD_Net, state: dict[str, torch.Tensor], filepath: str | Path) -> None:
    state = fill_boxes(state, model)
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    changed = [key for key, value in expected.items() if key in state and state[key].shape != value.shape]
    misshapen = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in changed]
    if missing or unexpected or misshapen:
        tables = [key for key in changed if key.endswith(("emb.weight", "embedding.weight"))]
        sizes = {len(state[key]) for key in tables if state[key].shape[1:] == expected[key].shape[1:]}
        hint = f" Its table of elements has {min(sizes)} rows; set max_z: {min(sizes)}." if sizes else ""
        told = [
            f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("not expected", unexpected), ("other shape", misshapen))
            if names
        ]
        raise CheckpointError(
            f"The weights in {filepath} do not fit the model its options describe; {'; '.join(told)}.{hint}"
        )
    check_weights(state, expected, filepath)
    model.load_state_dict(state)


def _add_reference_energies(model: TorchMD_Net, filepath: str | Path) -> None:
    """Let the reference energies a delta-learned model was trained without count again."""
    priors = list(model.prior_model or [])
    if not priors or not isinstance(priors[-1], Atomref):
        raise CheckpointError(
            f"remove_ref_energy=False: {filepath} has no Atomref as its last prior, so it cannot give total energies."
        )
    priors[-1].enable = True


@torch.inference_mode(False)
def load_ensemble(
    filepath: str | Path | Sequence[str | Path],
    args: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    return_std: bool = False,
    *,
    weights_only: bool = True,
    check: bool = True,
    **kwargs: Any,
) -> Ensemble:
    """Load several potentials as one.

    Args:
        filepath: A list of checkpoints or native files, or a zip file with such members; members of a zip file in a
            list are members like the others.
        args: See :func:`load_model`.
        device: See :func:`load_model`.
        return_std: Whether calls return standard deviations too.
        weights_only: See :func:`load_model`.
        check: See :func:`load_model`.
        **kwargs: See :func:`load_model`.

    Raises:
        CheckpointError: If the zip is damaged or holds no checkpoint.
        ValueError: If ``filepath`` is neither a list nor a zip file.
    """

    def members(paths: Sequence[str | Path]) -> Ensemble:
        options = {"args": args, "device": device, "weights_only": weights_only, "check": check, **kwargs}
        models = [load_model(path, **options) for path in paths]
        parts = [list(model) if isinstance(model, Ensemble) else [model] for model in models]
        return Ensemble([member for part in parts for member in part], return_std=return_std)

    if isinstance(filepath, (list, tuple)):
        return members(filepath)
    if not isinstance(filepath, (str, Path)) or not str(filepath).endswith(".zip"):
        raise ValueError(f"An ensemble is a list of checkpoints or a .zip of them, not {filepath!r}.")
    with tempfile.TemporaryDirectory() as folder:
        return members(unpack_ensemble(filepath, folder))


def unpack_ensemble(filepath: str | Path, folder: str | Path) -> list[Path]:
    """Copy the members of an ensemble file into a folder, under names of our own.

    Raises:
        CheckpointError: If the zip is damaged or holds no model.
    """
    path = expanded(filepath)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is missing or no zip file.")
    copies = []
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith((".ckpt", ".safetensors")))
            for number, name in enumerate(names):  # the member's own path is never used to write
                copies.append(Path(folder, f"{number}{Path(name).suffix}"))
                with archive.open(name) as member, copies[-1].open("wb") as file:
                    shutil.copyfileobj(member, file)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as a zip file; it may be damaged ({error}).") from error
    if not copies:
        raise CheckpointError(f"{path} holds no .ckpt member, nor a .safetensors one.")
    return copies
