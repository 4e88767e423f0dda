"""Potentials for ASE, and for everything that drives an ASE calculator."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor, nn

from torchmdnet.calculators.captured import Captured
from torchmdnet.calculators.cuda_graph import check_cuda
from torchmdnet.calculators.loading import (
    ModelSource,
    Notices,
    are_sums_of_atoms,
    as_dtype,
    can_be_moved,
    check_elements,
    for_energies,
    members_of,
    spin_wanted,
    stated_units,
    trained_with,
    units_or_default,
    unseen_elements,
    unseen_states,
)
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.compiled import compiled
from torchmdnet.datasets.labels import USUAL_NAMES
from torchmdnet.datasets.structure_labels import SPIN_MEANING
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.graph import Inputs
from torchmdnet.neighbors import Home, VerletList
from torchmdnet.options import keys_read_by
from torchmdnet.potential import TorchMD_Net

__all__ = ["TMDNETCalculator", "stated"]

log = logging.getLogger(__name__)


class TMDNETCalculator(Calculator):
    """A potential as an ASE calculator, in eV and Å.

    Any cell will do: in any orientation, periodic along any of its vectors, smaller than the cutoff. The total charge
    is ``atoms.info["charge"]`` or else the sum of the initial charges; the spin is ``atoms.info["spin"]`` in the
    convention of the training data, which for data read through ASE is the number of unpaired electrons.
    ``total_charge``, ``spin_multiplicity`` and the other names that data sets use are understood too.

    Results are ``energy``, ``free_energy`` (the same), ``forces``, ``stress`` where the cell has a volume, and
    ``energies`` of the atoms where the model is a sum over them, and the model's properties under their names, such as
    ``dipole`` in e·Å and ``charges``. An ensemble gives means and adds ``energy_std``, ``forces_std``, ``stress_std``
    and the like for properties.

    Args:
        model_file: A checkpoint; several, or a zip of them, for an ensemble; or a model, which is copied.
        device: Where the model runs.
        dtype: Precision of the calculation, a torch type or its name. Energies are summed over atoms in float64.
        compile: Compile the model on first use, which takes minutes and needs a C++ compiler; see
            :mod:`torchmdnet.compiled`. If it fails, or gives other numbers, the calculator goes on without and says so.
        units: Units of the model, ``"kcal/mol"`` or ``"Hartree/Bohr"``, where its file does not state them.
        skin: On the CPU, and where a calculation is captured, neighbours are looked for this much beyond the cutoff, in
            Å, and again when an atom has moved half of it; see :class:`torchmdnet.neighbors.VerletList`. Results do not
            depend on it. 0 turns it off.
        cuda_graph: Whether to capture a calculation as a CUDA graph and replay it, from the third on of systems of one
            kind in a row: as many atoms, with or without a cell, charge and spin. Other structures are calculated
            plainly meanwhile. None does so on CUDA without ``compile``.
        **kwargs: Options for :func:`torchmdnet.checkpoint.load_model`. With ``remove_ref_energy``, True unless given,
            a delta-learned model gives energies relative to its reference, with False total energies.

    Raises:
        ValueError: If an option does not fit; the message names it.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]

    def __init__(
        self,
        model_file: ModelSource,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        compile: bool = False,
        *,
        units: str | Sequence[str] | Mapping[str, str] | None = None,
        skin: float = 1.0,
        cuda_graph: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.device = device
        for name in kwargs:  # an option of a file is passed on, a misspelt one of the calculator would do nothing
            near = did_you_mean(name, ("units", "skin", "cuda_graph", "device", "dtype", "compile", "model_file"))
            if near and name not in keys_read_by("model"):
                raise ConfigError(f"{name}: there is no such argument.{near}")
        if cuda_graph:
            check_cuda(device, "cuda_graph")
            if compile:
                raise ConfigError("cuda_graph: compile=True is another way to the same end. Pass one of them.")
        self.dtype = as_dtype(dtype)
        self.model = for_energies(model_file, device, self.dtype, **kwargs)
        self.model_file = model_file
        self.units = units_or_default(stated_units(self.model, units), model_file)
        self.members = members_of(self.model)
        self.by_atom = are_sums_of_atoms(self.members)
        self.properties = _properties_of(self.members)
        self.implemented_properties = [
            name for name in type(self).implemented_properties if self.by_atom or name != "energies"
        ] + list(self.properties)
        if len(self.members) > 1:
            self.implemented_properties += [f"{name}_std" for name in ("energy", "forces", "stress", *self.properties)]
        self.skin = skin / self.units.in_angstrom
        self.search = VerletList(self.skin) if skin else None
        self.captured = Captured(self.model, False if compile else cuda_graph, self.skin)
        #: Brings positions near the origin before they are rounded.
        self.home = Home() if self.dtype != torch.float64 and can_be_moved(self.model) else None
        self._is_read = {option: trained_with(self.model, option) for option in ("charge", "spin")}
        self._carries_a_box = any(map(_has_a_box, self.members))
        self._numbers: np.ndarray | None = None
        self._z = self._batch = torch.empty(0, dtype=torch.long)
        self.compile = compile
        self.compiled: list[nn.Module] | None = None
        #: Number of calculations so far; asking again about unchanged atoms does not add to it.
        self.evals = 0
        self._tell = Notices(log)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation; total charge and spin count as ``info``."""
        is_same = self.atoms is not None and _is_same(self.atoms, atoms)  # at two of three questions in a step
        changes = [] if is_same else super().check_state(atoms, tol=tol)
        if self.atoms is not None and any(
            stated(name, self.atoms) != stated(name, atoms) for name in ("charge", "spin")
        ):
            changes.append("info")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = None,
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Calculate everything the model can say of the atoms; called by ASE.

        Raises:
            PropertyNotImplementedError: If stress is asked for and the cell has no volume.
            ValueError: If positions are not finite, or an element lies outside the embedding.
        """
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        assert isinstance(atoms, Atoms)
        has_volume = atoms.cell.rank == 3
        is_asked = not {"stress", "stress_std"}.isdisjoint(properties or ())
        if is_asked and not has_volume:
            raise PropertyNotImplementedError(
                "stress: the cell has no volume. Give three lattice vectors; pbc tells which of them repeat."
            )
        answers = self._ask(self._inputs(atoms), with_virial=has_volume and (is_asked or bool(atoms.pbc.any())))
        self.results = self._results(answers, atoms)
        self.evals += 1

    def _inputs(self, atoms: Atoms) -> Inputs:
        positions = atoms.positions
        if not np.isfinite(positions).all():
            atom = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
            raise ValueError(f"The position of atom {atom} is {positions[atom]}; the structure has fallen apart.")
        if self._numbers is None or not np.array_equal(atoms.numbers, self._numbers):
            z = torch.from_numpy(atoms.get_atomic_numbers().astype(np.int64))
            if (z == 0).any():
                atom = int((z == 0).nonzero()[0, 0])
                raise ValueError(
                    f"Atom {atom} has atomic number 0 (X, a dummy atom), for which no model has an energy. Remove it, "
                    "or give it an element."
                )
            check_elements(self.model, z)
            self._tell(unseen_elements(self.model, z))
            self._numbers, self._z = atoms.get_atomic_numbers(), z.to(self.device)
            self._batch = torch.zeros_like(self._z)
        cell = np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)  # a zero row is an open direction
        has_cell = bool(cell.any())
        if not has_cell and self._carries_a_box:
            self._tell(
                "The atoms are not periodic, but the model carries a box of its own (box_vecs), which it uses. "
                "Set cell and pbc of the atoms, or load the model with box_vecs=None."
            )
        box = torch.from_numpy(cell / self.units.in_angstrom) if has_cell else None
        places = torch.from_numpy(positions / self.units.in_angstrom)
        if self.home is not None:
            places = self.home(places, torch.zeros(len(places), dtype=torch.long), box, 1)
        return Inputs(
            z=self._z,
            pos=places.to(device=self.device, dtype=self.dtype),
            batch=self._batch,
            box=None if box is None else box.to(device=self.device, dtype=self.dtype),
            q=self._charge(atoms),
            s=self._spin(atoms),
            num_systems=1,
            search=self.search,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device=self.device, dtype=self.dtype)

    def _charge(self, atoms: Atoms) -> Tensor | None:
        charge = stated("charge", atoms)
        is_read = self._is_read["charge"]
        if charge is None and is_read:
            charge = float(atoms.get_initial_charges().sum())
            if not atoms.has("initial_charges"):
                self._tell(
                    "The model was trained with charges and the atoms state none; 0 is assumed. "
                    'Set atoms.info["charge"].'
                )
        if charge and is_read is False:
            self._tell(
                f"The atoms have charge {charge:g}, but the model was trained without charges; its effect on energies "
                'was not learned. Remove atoms.info["charge"] to use the model as it was trained.'
            )
        return None if charge is None else self._state("charge", charge)

    def _spin(self, atoms: Atoms) -> Tensor | None:
        spin = stated("spin", atoms)
        is_read = self._is_read["spin"]
        if spin is None and is_read:
            raise ConfigError(
                f'The model was trained with spin. Set atoms.info["spin"], {spin_wanted(self.model)}; or '
                'atoms.info["spin_multiplicity"].'
            )
        return None if spin is None else self._state("spin", spin)

    def _state(self, option: Literal["charge", "spin"], value: float) -> Tensor:
        """The charge or spin for the model; told where training had none like it."""
        self._tell(unseen_states(self.model, option, torch.tensor([value], dtype=torch.float64)))
        return self._tensor(np.array([value]))

    def _ask(self, inputs: Inputs, *, with_virial: bool) -> list[Answer]:
        def ask(*models: nn.Module) -> list[Answer]:
            return [answer for model in models for answer in predict_members(model, inputs, **options)]

        options = {"with_virial": with_virial, "with_properties": bool(self.properties), "by_atom": self.by_atom}
        if not self.compile:
            return self.captured(inputs, **options)
        if self.compiled is not None:
            return ask(*self.compiled)
        plain = ask(self.model)
        try:
            log.info("Compiling the model; this takes a minute.")
            quick = [compiled(member) for member in self.members]
            _expect_agreement(ask(*quick), plain)
        except Exception as error:  # whatever the compiler raises, the plain model is there
            log.warning(
                "compile: failed (%s: %s); going on without.", type(error).__name__, str(error).partition("\n")[0]
            )
            self.compile = False
        else:
            self.compiled = quick
        return plain

    def _results(self, answers: list[Answer], atoms: Atoms) -> dict[str, Any]:
        energies = [self.units.in_ev * answer.energy.item() for answer in answers]
        energy = sum(energies) / len(energies)
        forces = _stack([answer.forces for answer in answers])
        forces *= self.units.in_ev / self.units.in_angstrom
        results: dict[str, Any] = {"energy": energy, "free_energy": energy, "forces": _mean(forces)}
        if answers[0].virial is not None:
            virial = self.units.in_ev * _stack([answer.virial[0] for answer in answers if answer.virial is not None])
            stress = np.stack([full_3x3_to_voigt_6_stress(one / atoms.get_volume()) for one in virial])
            results["stress"] = _mean(stress)
            if len(answers) > 1:
                results["stress_std"] = stress.std(axis=0, ddof=1)
        if self.by_atom:
            atomic = _stack([answer.atomic for answer in answers if answer.atomic is not None])
            results["energies"] = self.units.in_ev * _mean(atomic)
        if len(answers) > 1:
            results["energy_std"] = float(np.std(energies, ddof=1))
            results["forces_std"] = forces.std(axis=0, ddof=1)
        for name, is_of_atoms in self.properties.items():
            values = _stack([answer.properties[name] for answer in answers])  # (members, 1 | N, ...)
            values = values[..., 0] if values.shape[2:] == (1,) else values
            values = values if is_of_atoms else values[:, 0]
            if name == "dipole":
                values = self.units.in_angstrom * values
            results[name] = _plain(_mean(values))
            if len(answers) > 1:
                results[f"{name}_std"] = _plain(values.std(axis=0, ddof=1))
        return results


def _is_same(before: Atoms, now: Atoms) -> bool:
    """Whether nothing that ASE compares has changed in any digit; a quick answer to what takes ASE's tolerance long."""
    there, here = before.arrays, now.arrays
    held = [(there.get(name), here.get(name)) for name in all_changes if name not in ("cell", "pbc")]
    held += [(before.cell.array, now.cell.array), (before.pbc, now.pbc)]
    return all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in held)


def _mean(members: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    return members[0] if len(members) == 1 else members.mean(axis=0)


def _properties_of(members: list[nn.Module]) -> dict[str, bool]:
    """Names of the properties that all members predict, and whether each is a value of the atoms."""
    heads = [dict(member.property_heads) if isinstance(member, TorchMD_Net) else {} for member in members]
    shared = [name for name in heads[0] if all(name in others for others in heads)]
    return {name: bool(getattr(heads[0][name], "per_atom_output", False)) for name in shared}


def _plain(values: np.ndarray) -> np.ndarray | float:
    """An array, or a number where there is only one."""
    return float(values) if values.ndim == 0 else values


def _has_a_box(model: nn.Module) -> bool:
    distance = getattr(getattr(model, "representation_model", None), "distance", None)
    return getattr(distance, "stored_box", None) is not None


def stated(kind: Literal["charge", "spin"], atoms: Atoms) -> float | None:
    """Total charge or spin in ``atoms.info``, under its own name or one that data sets use; None if there is none."""
    for name in (kind, *USUAL_NAMES[kind]):
        value = atoms.info.get(name)
        if value is None:
            continue
        try:
            number = float(np.asarray(value).reshape(()))
        except (TypeError, ValueError):
            if name == kind:
                raise ValueError(f'atoms.info["{name}"] is {value!r}. Set one number.') from None
            continue
        return number - 1 if SPIN_MEANING.get(name) == "multiplicity" else number
    return None


def _stack(tensors: list[Tensor]) -> np.ndarray:
    stacked = tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
    return stacked.to("cpu", torch.float64, copy=True).numpy()


def _expect_agreement(quick: list[Answer], plain: list[Answer]) -> None:
    """Raise unless two ways of asking the same models give the same numbers."""
    for a, b in zip(quick, plain, strict=True):
        tolerance = 1e-9 if b.forces.dtype == torch.float64 else 1e-4
        for name, x, y in (("energy", a.energy, b.energy), ("forces", a.forces, b.forces)):
            if not torch.allclose(x, y, rtol=tolerance, atol=tolerance):
                raise RuntimeError(f"{name} differs by {float((x - y).abs().max()):.1e} from the plain model")
