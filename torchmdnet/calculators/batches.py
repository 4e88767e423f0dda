"""Potentials for batches of systems in eV and Å, which engines of their own kind stand on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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
from torchmdnet.calculators.predict import Answer
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Inputs
from torchmdnet.neighbors import Home, VerletList
from torchmdnet.potential import TorchMD_Net

__all__ = ["BatchPotential", "Results"]

log = logging.getLogger(__name__)


class Results(NamedTuple):
    """What a potential says of a batch, in eV and Å, without history; means over the members of an ensemble."""

    energy: Tensor  # (S,) eV, float64
    forces: Tensor  # (N, 3) eV/Å
    virial: Tensor | None  # (S, 3, 3) derivative of the energy in a strain, eV, float64
    atomic: Tensor | None  # (N,) eV, contributions that add up to the energy
    properties: dict[str, Tensor]  # in units of the model, dipoles in e·Å
    energy_std: Tensor | None = None  # (S,) eV, spread over the members of an ensemble
    forces_std: Tensor | None = None  # (N, 3) eV/Å


class BatchPotential:
    """A potential that is asked for batches of systems, whatever they are, in eV and Å.

    Energies are summed over atoms in float64 where the model is a sum over atoms. Positions in float64 are brought near
    the origin before they are rounded, by whole lattice vectors along periodic directions.

    Args:
        source: A checkpoint; several, or a zip of them, for an ensemble; or a model, which is copied.
        device: Where the model runs.
        dtype: Precision of the calculation, a torch type or its name.
        units: Units of the model, ``"kcal/mol"`` or ``"Hartree/Bohr"``, where its file does not state them.
        skin: On the CPU, and where a calculation is captured, neighbours are looked for this much beyond the cutoff, in
            Å, and again when an atom has moved half of it. Results do not depend on it. 0 turns it off.
        cuda_graph: Whether to capture a calculation as a CUDA graph and replay it, from the third on of batches of one
            kind in a row: as many atoms and systems, with or without cells, charges and spins. None does so on CUDA.
        **kwargs: Options for :func:`torchmdnet.checkpoint.load_model`. With ``remove_ref_energy``, True unless given,
            a delta-learned model gives energies relative to its reference, with False total energies.

    Raises:
        ValueError: If an option does not fit; the message names it.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        units: str | Sequence[str] | Mapping[str, str] | None = None,
        skin: float = 1.0,
        cuda_graph: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.device, self.dtype = torch.device(device), as_dtype(dtype)
        if cuda_graph:
            check_cuda(device, "cuda_graph")
        self.model = for_energies(source, device, self.dtype, **kwargs)
        self.units = units_or_default(stated_units(self.model, units), source)
        self.members = members_of(self.model)
        #: Whether results hold the contributions of the atoms.
        self.by_atom = are_sums_of_atoms(self.members)
        self.search = VerletList(skin / self.units.in_angstrom) if skin else None
        self.home = Home() if self.dtype != torch.float64 and can_be_moved(self.model) else None
        self.captured = Captured(self.model, cuda_graph, skin / self.units.in_angstrom)
        self._is_read = {option: trained_with(self.model, option) for option in ("charge", "spin")}
        self._checked: Tensor | None = None  # atomic numbers, on the CPU
        self._tell = Notices(log)

    @property
    def cutoff(self) -> float:
        """The largest cutoff of the networks, in Å."""
        cutoffs = [float(getattr(part.representation_model, "cutoff_upper", 0.0)) for part in self._potentials()]
        return max(cutoffs, default=0.0) * self.units.in_angstrom

    def reads(self, option: Literal["charge", "spin"]) -> bool:
        """Whether the file says that the model was trained with charges or spins."""
        return self._is_read[option] is True

    def __call__(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        box: Tensor | None = None,
        q: Tensor | None = None,
        s: Tensor | None = None,
        *,
        num_systems: int,
        with_virial: bool = False,
        with_properties: bool = False,
    ) -> Results:
        """Energies, forces and what else is asked for. Nothing that is passed is changed.

        Args:
            z: Atomic numbers, (N,).
            pos: Positions, (N, 3) Å.
            batch: System of each atom, (N,), ascending.
            box: Lattice vectors as rows, (3, 3) or (S, 3, 3) Å; a zero row is an open direction, all zeros is no box.
            q: Total charges, (S,) e; None is 0, which is logged where the model reads charges.
            s: Spins, (S,), in the convention of the training data.
            num_systems: Number of systems S.
            with_virial: Whether to differentiate in a strain of each system.
            with_properties: Whether to ask for what else the model predicts.

        Raises:
            ConfigError: If the model reads spins and none are given.
            ValueError: If positions are not finite, or an element lies outside the embedding.
        """
        inputs = self._inputs(z, pos, batch, box, q, s, num_systems)
        options = {"with_virial": with_virial, "with_properties": with_properties, "by_atom": self.by_atom}
        return self._results(self.captured(inputs, **options))

    def _potentials(self) -> list[TorchMD_Net]:
        return [member for member in self.members if isinstance(member, TorchMD_Net)]

    def _inputs(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        box: Tensor | None,
        q: Tensor | None,
        s: Tensor | None,
        num_systems: int,
    ) -> Inputs:
        z, pos, batch = z.detach(), pos.detach().to(self.device), batch.detach().to(self.device, torch.long)
        self._check(z)
        box = None if box is None else box.detach().to(self.device)
        if box is not None and not bool(box.any()):
            box = None
        if self.home is not None and pos.dtype == torch.float64:
            pos = self.home(pos, batch, box, num_systems)
        return Inputs(
            z=z.to(self.device, torch.long),
            pos=self._in_units_of_the_model(pos),
            batch=batch,
            box=None if box is None else self._in_units_of_the_model(box),
            q=self._of_systems("charge", q, num_systems),
            s=self._of_systems("spin", s, num_systems),
            num_systems=num_systems,
            search=self.search,
        )

    def _in_units_of_the_model(self, length: Tensor) -> Tensor:
        return (length / self.units.in_angstrom).to(self.dtype)

    def _check(self, z: Tensor) -> None:
        here = z.cpu()
        if self._checked is None or not torch.equal(here, self._checked):
            check_elements(self.model, here)
            self._tell(unseen_elements(self.model, here))
            self._checked = here.clone()

    def _of_systems(self, option: Literal["charge", "spin"], value: Tensor | None, num_systems: int) -> Tensor | None:
        """Charges or spins as (S,), or None where there are none."""
        is_read = self._is_read[option]
        if value is None:
            if not is_read:
                return None
            if option == "spin":
                raise ConfigError(f"spin: the model was trained with spin. Pass {spin_wanted(self.model)}.")
            self._tell("charge: the model was trained with charges and none is given; 0 is assumed.")
            return torch.zeros(num_systems, device=self.device, dtype=self.dtype)
        value = value.detach().reshape(-1)
        if is_read is False:
            if bool(value.any()):
                self._tell(f"{option}: the model was trained without {option}; what it makes of it is not learned.")
        elif is_read:
            self._tell(unseen_states(self.model, option, value.double().cpu()))
        return value.to(device=self.device, dtype=self.dtype).expand(num_systems)

    def _results(self, answers: list[Answer]) -> Results:
        per_length = self.units.in_ev / self.units.in_angstrom
        energy = self.units.in_ev * torch.stack([answer.energy[:, 0].double() for answer in answers])  # (M, S)
        forces = per_length * torch.stack([answer.forces for answer in answers])  # (M, N, 3)
        virials = [answer.virial.double() for answer in answers if answer.virial is not None]
        atomics = [answer.atomic for answer in answers if answer.atomic is not None]
        shared = set.intersection(*[set(answer.properties) for answer in answers])
        several = len(answers) > 1
        return Results(
            energy.mean(dim=0),
            forces.mean(dim=0) if several else forces[0].clone(),
            self.units.in_ev * torch.stack(virials).mean(dim=0) if virials else None,
            self.units.in_ev * torch.stack(atomics).mean(dim=0) if atomics else None,
            {name: self._property(name, answers) for name in answers[0].properties if name in shared},
            energy.std(dim=0) if several else None,
            forces.std(dim=0) if several else None,
        )

    def _property(self, name: str, answers: list[Answer]) -> Tensor:
        value = torch.stack([answer.properties[name] for answer in answers]).mean(dim=0)
        return self.units.in_angstrom * value if name == "dipole" else value
