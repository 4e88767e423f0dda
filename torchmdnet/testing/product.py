"""Every architecture with every head and every prior: what there is to combine, and which statements then hold."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

from torchmdnet.errors import ConfigError
from torchmdnet.heads import HEADS
from torchmdnet.models import ARCHITECTURES
from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing.contract import QUICK
from torchmdnet.testing.systems import Systems, mixed_boxes, small_molecules
from torchmdnet.testing.tiny import tiny_model

__all__ = [
    "ARCHITECTURES_TRIED",
    "FEATURES",
    "PRIORS_TRIED",
    "features_of",
    "options_of",
    "priors_available",
    "refusal_of",
    "takes_priors",
    "untrue_of",
]

#: Options of each architecture, and of the one that is not blind to reflections.
ARCHITECTURES_TRIED: dict[str, dict[str, Any]] = {name: {"model": name} for name in ARCHITECTURES} | {
    "tensornet, SO(3)": {"model": "tensornet", "equivariance_invariance_group": "SO(3)"}
}

_HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "ScalarPlusWeightedCoulomb": {"q_weights": [1.0, 0.5, 2.0], "coulomb_cutoff": 5.0}
}

_UNITS = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
_ATOMREF = {"max_z": 20, "trainable": True}
_ZBL = {"cutoff_distance": 3.0, **_UNITS}
_D2 = {"cutoff_distance": 6.0, **_UNITS}
_COULOMB = {"lower_switch_distance": 0.05, "upper_switch_distance": 0.25, **_UNITS}

#: Settings of ``prior_model``, by what a table calls them.
PRIORS_TRIED: dict[str, Any] = {
    "none": None,
    "Atomref": {"Atomref": _ATOMREF},
    "LearnableAtomref": {"LearnableAtomref": {"max_z": 20}},
    "ZBL": {"ZBL": _ZBL},
    "D2": {"D2": _D2},
    "D3": {"D3": {"functional": "pbe", "cutoff_distance": 7.0, **_UNITS}},
    "Coulomb": {"Coulomb": _COULOMB},
    "Coulomb, damped and shifted": {"Coulomb": {**_COULOMB, "lattice_sum": "damped-shifted", "cutoff_distance": 6.0}},
    "four at once": [{"Atomref": _ATOMREF}, {"ZBL": _ZBL}, {"D2": _D2}, {"Coulomb": _COULOMB}],
}

#: Optional packages that priors stand on.
_NEEDED = {"D3": "tad_dftd3"}

#: Statements that cost most; they are looked at in boxes alone.
_COSTLY = frozenset({"forces_can_be_trained", "hessians_by_torch_func"})


def priors_available() -> list[str]:
    """Names in :data:`PRIORS_TRIED` whose packages are installed."""

    def is_there(name: str) -> bool:
        try:
            importlib.import_module(_NEEDED[name])
        except ImportError:
            return False
        return True

    return [name for name in PRIORS_TRIED if name not in _NEEDED or is_there(name)]


def options_of(architecture: str, head: str, prior: str = "none") -> dict[str, Any]:
    """Configuration of a combination; a head for atoms stands beside a scalar."""
    options = {**ARCHITECTURES_TRIED[architecture], **_HEAD_OPTIONS.get(head, {}), "prior_model": PRIORS_TRIED[prior]}
    if getattr(HEADS[head], "per_atom_output", False):
        return {**options, "output_model": "Scalar", "properties": {"beside": head}}
    return {**options, "output_model": head}


def refusal_of(architecture: str, head: str) -> str | None:
    """The words with which a combination is refused, or None."""
    try:
        tiny_model(**options_of(architecture, head))
    except ConfigError as error:
        return str(error)
    return None


def takes_priors(head: str) -> bool:
    """Whether priors are added to what a head predicts."""
    if getattr(HEADS[head], "per_atom_output", False):
        return False
    return tiny_model(**options_of("tensornet2", head)).output_model.allow_prior_model


def untrue_of(options: dict[str, Any], checks: Iterable[str] = QUICK) -> dict[str, str]:
    """Statements that do not hold for a potential, with what was found instead.

    Args:
        options: As for :func:`torchmdnet.testing.tiny_model`.
        checks: Names in :data:`torchmdnet.testing.QUICK`.
    """
    model = tiny_model(**options)
    found = {}
    for systems in (mixed_boxes(), small_molecules(charges=True)):
        for name in checks:
            if name in _COSTLY and systems.box is None:
                continue
            try:
                QUICK[name](model, systems)
            except (AssertionError, RuntimeError, NotImplementedError) as error:
                found.setdefault(name, f"{type(error).__name__}: {error}")
    return found


def _energies(model: TorchMD_Net, systems: Systems) -> torch.Tensor:
    return model(systems.z, systems.pos, systems.batch, box=systems.box, q=systems.q)[0].detach()


def _feels(model: TorchMD_Net, changed: Systems) -> bool:
    return not torch.allclose(_energies(model, small_molecules()), _energies(model, changed), rtol=1e-9, atol=1e-9)


#: What tables say of an architecture, and the statement behind it where it is one of the contract.
FEATURES = {
    "forces": "forces_are_slopes_of_the_energy",
    "stress, in cells of any shape and size": "stress_is_the_slope_in_the_strain",
    "energies invariant, vectors and tensors equivariant under rotation": "energy_ignores_the_frame_of_reference",
    "one box for each system, open directions": "a_batch_equals_its_systems_one_by_one",
    "smooth through the cutoff": "energy_is_smooth_through_the_cutoff",
    "training on energy, forces, stress and properties": "forces_can_be_trained",
    "Hessians by `torch.func`": "hessians_by_torch_func",
    "single and double precision": "single_precision_agrees_with_double",
    "vector features": "has_vectors",
    "tensor features": "has_tensors",
    "total charge changes the energy": "charge",
    "mirror images differ": "handedness",
}


def features_of(architecture: str, *, try_all: bool = True) -> dict[str, bool]:
    """Which of :data:`FEATURES` an architecture has, with a scalar and, beside it, every head that fits.

    Args:
        architecture: Name in :data:`ARCHITECTURES_TRIED`.
        try_all: Whether to try the statements of the contract; otherwise they are taken to hold.
    """
    beside = {
        f"p{n}": head
        for n, head in enumerate(("Dipole", "PartialCharges", "AtomScalar", "Polarizability", "VectorOutput"))
        if refusal_of(architecture, head) is None
    }
    options = {**options_of(architecture, "Scalar"), "properties": beside}
    model, systems = tiny_model(**options), small_molecules()
    known = {
        "has_vectors": model.representation_model.has_vectors,
        "has_tensors": model.representation_model.has_tensors,
        "charge": _feels(model, small_molecules(charges=True)),
        "handedness": _feels(model, systems._replace(pos=-systems.pos)),
    }
    untrue = untrue_of(options, [check for check in FEATURES.values() if check in QUICK]) if try_all else {}
    return {name: known.get(check, check not in untrue) for name, check in FEATURES.items()}
