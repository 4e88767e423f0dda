"""Potentials for torch-sim, which simulates and relaxes batches of systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from torchmdnet.calculators.batches import BatchPotential, Results
from torchmdnet.calculators.loading import ModelSource, as_dtype
from torchmdnet.datasets.structure_labels import SPIN_MEANING, USUAL_NAMES
from torchmdnet.errors import ConfigError

if TYPE_CHECKING:
    from torch_sim import SimState
    from torch_sim.typing import MemoryScaling

__all__ = ["TorchMDNetModel"]


class TorchMDNetModel(ModelInterface):
    """A potential as a model of torch-sim, in eV and Å, for batches of any systems.

    Any cells will do: in any orientation, periodic along any axis, smaller than the cutoff. Total charges and spins are
    read from the extras of the systems: ``charge``, ``spin`` in the convention of the training data, or
    ``spin_multiplicity``.

    Results beside energy, forces and stress are ``energies`` of the atoms where the model is a sum over them, the
    model's properties under their names, and for an ensemble ``energy_std`` and ``forces_std``. The stress is NaN for
    systems whose cell has no volume.

    Args:
        model: A model file; several, or a zip of them, for an ensemble; or a model, which is copied.
        device: Where the model runs; None is a GPU where there is one.
        dtype: Precision of model and states, a torch type or its name.
        compute_forces: Whether results hold forces.
        compute_stress: Whether results hold stresses.
        units: Units of the model where its file does not state them.
        skin: See :class:`torchmdnet.calculators.batches.BatchPotential`.
        cuda_graph: See :class:`torchmdnet.calculators.batches.BatchPotential`.
        **kwargs: Options for :func:`torchmdnet.checkpoint.load_model`; see
            :class:`torchmdnet.calculators.TMDNETCalculator`.

    Raises:
        ValueError: If an option does not fit; the message names it.
    """

    def __init__(
        self,
        model: ModelSource,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        *,
        compute_forces: bool = True,
        compute_stress: bool = True,
        units: str | Sequence[str] | Mapping[str, str] | None = None,
        skin: float = 1.0,
        cuda_graph: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device, self._dtype = torch.device(device), as_dtype(dtype)
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        #: The edges of a system, and with them the memory, grow with its atoms times their density.
        self._memory_scales_with: MemoryScaling = "n_atoms_x_density"
        self.potential = BatchPotential(
            model, device=device, dtype=self._dtype, units=units, skin=skin, cuda_graph=cuda_graph, **kwargs
        )

    @property
    def compute_forces(self) -> bool:
        """Whether results hold forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    @property
    def compute_stress(self) -> bool:
        """Whether results hold stresses."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    @property
    def cutoff(self) -> float:
        """The cutoff of the network, in Å."""
        return self.potential.cutoff

    def forward(self, state: SimState, **kwargs: Any) -> dict[str, Tensor]:
        """Energies (S,) eV, forces (N, 3) eV/Å, stresses (S, 3, 3) eV/Å³ and more; the state is not changed.

        Raises:
            ConfigError: If the model reads spins and the state has none.
            ValueError: If the state is in another precision, positions are not finite, or an element lies outside the
                embedding.
        """
        if kwargs:
            raise ConfigError(f"{', '.join(kwargs)}: forward takes a state alone. Give options to TorchMDNetModel.")
        if state.positions.dtype != self._dtype:
            raise ConfigError(
                f"The state is {state.positions.dtype}, but the model computes in {self._dtype}. Pass dtype= to "
                "initialize_state, or to TorchMDNetModel."
            )
        with torch.no_grad():
            is_periodic = torch.as_tensor(state.pbc, device=state.cell.device).reshape(-1, 1)  # (3, 1) or (1, 1)
            cell = state.row_vector_cell  # (S, 3, 3)
            found = self.potential(
                state.atomic_numbers,
                state.positions,
                state.system_idx,
                torch.where(is_periodic, cell, torch.zeros_like(cell)),
                _of_systems(state, "charge"),
                _of_systems(state, "spin"),
                num_systems=state.n_systems,
                with_virial=self._compute_stress,
                with_properties=True,
            )
            return self._output(found, cell)

    def _output(self, found: Results, cell: Tensor) -> dict[str, Tensor]:
        output = {"energy": found.energy}
        if self._compute_forces:
            output["forces"] = found.forces
        if found.virial is not None:
            volume = torch.linalg.det(cell.double()).abs()[:, None, None].to(found.virial.device)  # (S, 1, 1)
            output["stress"] = torch.where(volume > 0, found.virial / volume, torch.nan)
        others = {"energies": found.atomic, "energy_std": found.energy_std, "forces_std": found.forces_std}
        others.update(found.properties)
        for name, value in others.items():
            if value is not None:
                output[name] = value
        return {name: value.to(self._dtype) for name, value in output.items()}


def _of_systems(state: SimState, kind: Literal["charge", "spin"]) -> Tensor | None:
    """Charges or spins among the extras of a state, (S,); None if there are none."""
    extras = state.system_extras
    for name in (kind, *USUAL_NAMES[kind]):
        value = extras.get(name)
        if value is not None:
            return value - 1 if SPIN_MEANING.get(name) == "multiplicity" else value
    return None
