"""Potentials for metatomic, the interface of models to LAMMPS, i-PI, ASE, GROMACS and others.

The file finds no neighbours itself: the engine brings them, and differentiates the energy in positions and cells.
"""

import copy
from pathlib import Path
from typing import Dict, List, Optional  # noqa: UP035

import torch
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
)
from torch import Tensor, nn

from torchmdnet.calculators.loading import spin_wanted, stated_units, trained_with
from torchmdnet.calculators.units import Units
from torchmdnet.errors import ConfigError
from torchmdnet.export import recorded_atoms
from torchmdnet.files import check_target, draft_of
from torchmdnet.models.base import set_radial_mode
from torchmdnet.potential import TorchMD_Net
from torchmdnet.scripting import scriptable_atoms

__all__ = ["MetatomicModel", "export_metatomic"]

#: Our names of lengths -> those of metatomic.
_LENGTHS = {"Å": "angstrom", "Bohr": "bohr", "nm": "nm"}


class MetatomicModel(nn.Module):
    """A potential as metatomic calls it, for TorchScript.

    Args:
        atoms: Contributions of atoms, :func:`torchmdnet.scripting.scriptable_atoms`.
        cutoff: In the unit of length of the model.
        charge: Total charge of every system in e.
        spin: Spin of every system.
        dtype: Of positions and energies.
    """

    def __init__(self, atoms: nn.Module, cutoff: float, charge: float, spin: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.atoms = atoms
        self.options = NeighborListOptions(cutoff=cutoff, full_list=True, strict=True)
        self.charge, self.spin, self.dtype = charge, spin, dtype

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """All pairs within the cutoff, in both directions."""
        return [self.options]

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """Energies of the systems, or of their atoms; of the selected atoms alone, if there is a selection."""
        results: Dict[str, TensorMap] = {}  # noqa: UP006
        if "energy" not in outputs:
            return results
        numbers: List[Tensor] = []  # noqa: UP006
        edges: List[Tensor] = []  # noqa: UP006
        vectors: List[Tensor] = []  # noqa: UP006
        samples: List[Tensor] = []  # noqa: UP006
        first: List[int] = []  # noqa: UP006
        num_atoms = 0
        for k in range(len(systems)):
            system = systems[k]
            device = system.positions.device
            found = system.get_neighbor_list(self.options)
            edges.append(found.samples.values[:, :2].long().t() + num_atoms)
            vectors.append(-found.values.reshape(-1, 3))  # from the second atom to the first, which receives
            numbers.append(system.types.long())
            atoms = torch.arange(len(system), device=device)
            samples.append(torch.stack([torch.full_like(atoms, k), atoms], dim=1))
            first.append(num_atoms)
            num_atoms += len(system)
        sample = torch.cat(samples)  # (N, 2) system and atom
        vector = torch.cat(vectors)
        of_systems = torch.ones(len(systems), dtype=vector.dtype, device=vector.device)
        atomic = self.atoms(
            torch.cat(numbers),
            torch.cat(edges, dim=1),
            vector,
            sample[:, 0],
            self.charge * of_systems,
            self.spin * of_systems,
        )  # (N,) float64
        if selected_atoms is not None:
            chosen = selected_atoms.values.long().to(vector.device)
            place = torch.tensor(first, device=vector.device).index_select(0, chosen[:, 0]) + chosen[:, 1]
            place = torch.sort(place)[0]
            sample, atomic = sample.index_select(0, place), atomic.index_select(0, place)
        if outputs["energy"].sample_kind == "atom":
            labels = Labels(["system", "atom"], sample.to(torch.int32))
            values = atomic
        else:
            every = torch.arange(len(systems), device=vector.device)
            labels = Labels(["system"], every.to(torch.int32)[:, None])
            values = torch.zeros(len(systems), dtype=atomic.dtype, device=atomic.device)
            values = values.index_add(0, sample[:, 0], atomic)
        zero = torch.zeros(1, 1, dtype=torch.int32, device=vector.device)
        block = TensorBlock(
            values=values.to(self.dtype)[:, None],
            samples=labels,
            components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
            properties=Labels(["energy"], zero),
        )
        results["energy"] = TensorMap(Labels(["_"], zero), [block])
        return results


def export_metatomic(
    model: TorchMD_Net,
    path: str | Path,
    *,
    units: tuple[str, str] | None = None,
    dtype: torch.dtype | None = None,
    charge: float = 0.0,
    spin: float | None = None,
    name: str = "TorchMD-Net",
) -> AtomisticModel:
    """Write a model for metatomic.

    Args:
        model: The potential, a sum over atoms without parts that look beyond its edges; it is not changed.
        path: The file to write, ``.pt``.
        units: Units of energy and length of the model, where its file does not state them.
        dtype: Precision, float32 or float64; None is that of the model.
        charge: Total charge of every system in e.
        spin: Spin of every system in the convention of the training data.
        name: For the metadata.

    Returns:
        What was written.

    Raises:
        ConfigError: If an argument does not fit, or the model has a part that does.
    """
    path = check_target(path, "package")
    if path.suffix != ".pt":
        raise ConfigError(f"{path}: a model for metatomic ends in .pt. Name it {path.with_suffix('.pt').name}.")
    known = stated_units(model, units)
    if known is None:
        raise ConfigError("units: the file of the model does not state them. Pass units of the model.")
    if not model.is_sum_of_atoms:
        raise ConfigError("export: the energy of this model is no plain sum over atoms, which metatomic needs.")
    if spin is None and trained_with(model, "spin"):
        raise ConfigError(f"spin: the model was trained with spin. Pass {spin_wanted(model)}.")
    model = copy.deepcopy(model).cpu().to(dtype=dtype or model.dtype).eval().requires_grad_(False)
    set_radial_mode(model, "exact")
    module = scriptable_atoms(model, recorded_atoms(model))
    network = model._check_edges_suffice(False)
    cutoff = float(network.cutoff_upper)
    wrapped = MetatomicModel(module, cutoff, float(charge), float(spin or 0.0), model.dtype).eval()
    written = AtomisticModel(
        wrapped,
        ModelMetadata(name=name, description=str(model.provenance.get("level_of_theory") or "")),
        _capabilities(model, network, known),
    )
    with draft_of(path) as draft:
        written.save(str(draft))
    return written


def _capabilities(model: TorchMD_Net, network: nn.Module, units: Units) -> ModelCapabilities:
    elements = model.provenance.get("elements") or range(1, int(network.max_z))  # type: ignore[arg-type]
    reach = float(network.cutoff_upper) * (int(getattr(network, "num_layers", 1)) + 1)  # type: ignore[arg-type]
    if getattr(network, "q_dim", 0):  # charges are shared among all atoms
        reach = float("inf")
    return ModelCapabilities(
        outputs={"energy": ModelOutput(unit=units.energy, sample_kind="atom", explicit_gradients=[])},
        atomic_types=[int(z) for z in elements],
        interaction_range=reach,
        length_unit=_LENGTHS[units.length],
        supported_devices=["cpu", "cuda"],
        dtype=str(model.dtype).removeprefix("torch."),
    )
