"""From whatever is passed as a model to a potential ready to be asked."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchmdnet.calculators.units import Units
from torchmdnet.checkpoint import load_model
from torchmdnet.elements import SYMBOLS
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import ConfigError
from torchmdnet.potential import TorchMD_Net

__all__ = [
    "ModelSource",
    "Notices",
    "are_sums_of_atoms",
    "as_dtype",
    "can_be_moved",
    "check_elements",
    "energies_only",
    "for_energies",
    "load",
    "members_of",
    "placed",
    "spin_wanted",
    "stated_units",
    "trained_with",
    "units_or_default",
    "unseen_elements",
    "unseen_states",
]

log = logging.getLogger(__name__)

#: A checkpoint, several of them, a zip of them, or a module.
ModelSource = str | Path | Sequence[str | Path] | nn.Module

_PRECISIONS = {torch.float16: 16, torch.float32: 32, torch.float64: 64}


class Notices:
    """Logs warnings, each of them once.

    Args:
        logger: Where they are logged.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._told: set[str] = set()

    def __call__(self, message: str | None) -> None:
        """Log a warning, unless it is None or was logged before."""
        if message is not None and message not in self._told:
            self._told.add(message)
            self.logger.warning(message)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating point type from itself or its name, ``"float64"``.

    Raises:
        ConfigError: If there is no such type.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype: {dtype!r} is not available. Choose from float32, float64.")
    return found


def load(
    source: str | Path | Sequence[str | Path],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    derivative: bool,
    **options: Any,
) -> nn.Module:
    """Load a potential for inference, its parameters frozen; see :func:`torchmdnet.checkpoint.load_model`.

    Raises:
        ConfigError: If ``precision`` is among the options and is not the one of ``dtype``.
    """
    if options.setdefault("precision", _PRECISIONS.get(dtype, 32)) != _PRECISIONS.get(dtype, 32):
        raise ConfigError(f"precision: {options['precision']} contradicts dtype={dtype}. Pass dtype alone.")
    model = load_model(source, device=device, derivative=derivative, **options)
    return placed(model, device, dtype).requires_grad_(False)


@torch.inference_mode(False)
def placed(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on a device and in a precision: itself where it is so already, a copy otherwise."""
    device = torch.device(device)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    fits = all(
        tensor.dtype == dtype and tensor.device.type == device.type and device.index in (None, tensor.device.index)
        for tensor in tensors
    )
    return model if fits else copy.deepcopy(model).to(device=device, dtype=dtype)


@torch.inference_mode(False)
def energies_only(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a model that leaves the differentiation to the calculator."""
    inner = getattr(model, "model", None)  # a potential in training
    model = copy.deepcopy(inner if isinstance(inner, TorchMD_Net) else model)
    for part in model.modules():
        if isinstance(part, TorchMD_Net):
            part.derivative = False
    return placed(model, device, dtype).eval().requires_grad_(False)


def for_energies(source: ModelSource, device: str | torch.device, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model for a calculator that differentiates its energies itself: loaded, or a copy of the one that is passed.

    Args:
        source: A checkpoint, several, a zip of them, or a model.
        device: Where the model runs.
        dtype: Its precision.
        **options: For :func:`load`; a delta-learned model leaves out its reference unless they say otherwise. A model
            is used as it is, and a warning tells that they have no effect.
    """
    if isinstance(source, nn.Module):
        if options:
            warnings.warn(f"A model is used as it is; {', '.join(options)} would only change how a file is loaded.")
        return energies_only(source, device, dtype)
    options = {"remove_ref_energy": True, **options}
    return load(source, device=device, dtype=dtype, derivative=False, **options)


def are_sums_of_atoms(members: Sequence[nn.Module]) -> bool:
    """Whether the energy of every member is a sum of contributions of the atoms."""
    return all(isinstance(member, TorchMD_Net) and member.is_sum_of_atoms for member in members)


def members_of(model: nn.Module) -> list[nn.Module]:
    """The models of an ensemble, or the model alone."""
    return list(model) if isinstance(model, Ensemble) else [model]


def check_elements(model: nn.Module, z: Tensor) -> None:
    """Refuse atomic numbers (on the CPU) that the model has no embedding for, with the name of the element.

    Number 0, which ASE calls X, is refused where the file of the model lists what it was trained on without it.
    """
    dummies = (z == 0).nonzero().flatten().tolist()
    for member in members_of(model):
        trained_on = set(getattr(member, "provenance", {}).get("elements") or ())
        if dummies and trained_on and 0 not in trained_on:
            raise ValueError(
                f"Atom {dummies[0]} has atomic number 0 (X, a dummy atom; there are {len(dummies)} of them). "
                f"The model was trained on {', '.join(SYMBOLS[number] for number in sorted(trained_on))}. Remove dummy "
                "atoms, or give them an element."
            )
        check = getattr(getattr(member, "representation_model", None), "check_elements", None)
        if check is not None:
            check(z)


def unseen_elements(model: nn.Module, z: Tensor) -> str | None:
    """A sentence about elements the training data did not have, as far as the file lists them; None without any."""
    trained_on = [set(getattr(member, "provenance", {}).get("elements") or ()) for member in members_of(model)]
    seen = set.intersection(*trained_on) if trained_on else set()
    unseen = set(z.tolist()) - seen if seen else set()
    if not unseen:
        return None
    names, known = (", ".join(SYMBOLS[number] for number in sorted(numbers)) for numbers in (unseen, seen))
    return f"The model has never seen {names}: it was trained on {known}. Its answer is not learned."


def range_of_training(model: nn.Module, option: Literal["charge", "spin"]) -> tuple[float, float] | None:
    """Smallest and largest total charge or spin that every member was trained on, as far as their files say."""
    name = {"charge": "total_charge", "spin": "spin"}[option]
    stated = [
        (getattr(member, "provenance", {}).get("training") or {}).get(name)
        for member in members_of(model)
        if trained_with(member, option)
    ]
    ranges = [limits for limits in stated if limits]
    return (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None


def unseen_states(model: nn.Module, option: Literal["charge", "spin"], values: Tensor) -> str | None:
    """A sentence about charges or spins outside of what the model was trained on; None without any."""
    limits = range_of_training(model, option)
    outside = [] if limits is None else [x for x in values.reshape(-1).tolist() if not limits[0] <= x <= limits[1]]
    if limits is None or not outside:
        return None
    found = ", ".join(f"{value:g}" for value in sorted(set(outside)))
    return f"The model has never seen {option} {found}: it was trained on {_range(limits)}. Its answer is not learned."


def spin_wanted(model: nn.Module) -> str:
    """What the spin of a system counts, and where it lay in training, as far as the file says."""
    limits = range_of_training(model, "spin")
    told = f"; it was trained on {_range(limits)}" if limits else ""
    return f"the number of unpaired electrons (multiplicity - 1) where the data were read through ASE{told}"


def _range(limits: tuple[float, float]) -> str:
    low, high = limits
    return f"{low:g} to {high:g}" if low < high else f"{low:g}"


def can_be_moved(model: nn.Module) -> bool:
    """Whether nothing that a potential predicts depends on where its atoms are, or which periodic image they are."""
    members = members_of(model)
    heads = [
        head for m in members if isinstance(m, TorchMD_Net) for head in (m.output_model, *m.property_heads.values())
    ]
    are_potentials = all(isinstance(member, TorchMD_Net) for member in members)
    return are_potentials and not any(getattr(head, "depends_on_images", True) for head in heads)


def trained_with(model: nn.Module, option: str) -> bool | None:
    """Whether the model's file says that it was trained with ``charge`` or ``spin``; None if it does not say.

    Releases that took ``spin: true`` did nothing with it; their models were trained without.
    """

    def answer(member: nn.Module) -> Any:
        reads = getattr(getattr(member, "representation_model", None), "reads", None)
        said = getattr(member, "hyper_parameters", {}).get(option)
        return False if said and option == "spin" and reads is not None and option not in reads else said

    answers = {answer(member) for member in members_of(model)}
    return True if True in answers else False if False in answers else None


def stated_units(model: nn.Module, units: str | Sequence[str] | Mapping[str, str] | None) -> Units | None:
    """The units of a model: the ones given, else the ones in its file, else None.

    Raises:
        ConfigError: If a unit is not known, or the members of an ensemble have different ones.
    """
    stored = {
        Units.parse((energy, length or "Å"))
        for energy, length in (_units_in_file(member) for member in members_of(model))
        if energy
    }
    if units is not None:
        given = Units.parse(units)
        if stored - {given}:
            log.warning("units: the file states %s; %s is used as given.", " and ".join(map(str, stored)), given)
        return given
    if len(stored) > 1:
        raise ConfigError(
            f"The members of the ensemble predict in {' and '.join(sorted(map(str, stored)))}. "
            "An ensemble needs models trained in the same units."
        )
    return stored.pop() if stored else None


def _units_in_file(model: nn.Module) -> tuple[str | None, str | None]:
    """Energy and length unit as the file of a model states them."""
    units = getattr(model, "provenance", {}).get("units") or {}
    return units.get("energy"), units.get("length")


def units_or_default(units: Units | None, what: object) -> Units:
    """The units, or eV and Å with a word about it."""
    if units is not None:
        return units
    log.warning(
        "%s does not state its units; eV and Å are assumed. Pass units='kcal/mol/A', for example, if it was trained "
        "in others (units='eV/A' confirms these).",
        type(what).__name__ if isinstance(what, nn.Module) else what,
    )
    return Units()
