"""The table of the page on engines: the same structures through every door agree as closely as it says."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from doc_pages import DOCS

from torchmdnet.calculators import External, TMDNETCalculator
from torchmdnet.calculators.batches import BatchPotential
from torchmdnet.calculators.lammps import MLIAPModel
from torchmdnet.models.base import set_radial_mode
from torchmdnet.potential import TorchMD_Net
from torchmdnet.scripting import export_torchscript
from torchmdnet.testing import tiny_model

EV = {"units": {"energy": "eV", "length": "Å"}}
CHARGE = 1.0
DOUBLE, SINGLE = torch.float64, torch.float32


class Found(NamedTuple):
    """In eV and Å."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def structures() -> list[Atoms]:
    """A molecule, and a triclinic cell that is smaller than the cutoff along one vector."""
    crystal = molecule("CH3OH", cell=[[6.0, 0, 0], [1.0, 3.6, 0], [-0.6, 0.9, 7.0]], pbc=True)
    crystal.rattle(0.05, seed=1)
    return [molecule("CH3CH2OH"), crystal]


def model_in(dtype: torch.dtype, mode: str = "exact") -> TorchMD_Net:
    model = tiny_model("tensornet", charge=True).to(dtype)
    model.provenance = dict(EV)
    set_radial_mode(model, mode)
    return model


def arguments(atoms: Atoms, dtype: torch.dtype) -> tuple[Any, ...]:
    """z, pos, box and q."""
    box = torch.tensor(atoms.cell.array, dtype=dtype) if atoms.pbc.any() else None
    pos, q = torch.tensor(atoms.positions, dtype=dtype), torch.full((1,), CHARGE, dtype=dtype)
    return torch.tensor(atoms.numbers), pos, box, q


def reference(atoms: Atoms) -> Found:
    """The model itself, in double precision."""
    z, pos, box, q = arguments(atoms, DOUBLE)
    found = model_in(DOUBLE)(z, pos, box=box, q=q, stress=box is not None)
    stress = found[2][0].numpy() if box is not None else None
    return Found(found[0].item(), found[1].detach().numpy(), stress)


def sizes(atoms: Atoms) -> Found:
    """What rounding is relative to: sums of the sizes of the terms, which cancel in energies and stresses."""
    z, _, box, q = arguments(atoms, DOUBLE)
    model, (index, vec) = model_in(DOUBLE), listed(atoms, DOUBLE)
    found = model.from_edges(z, index, vec, box=box, q=q)
    virial = (vec[:, :, None] * found.edge_gradient[:, None, :]).abs().sum(dim=0)
    stress = None if box is None else (virial / torch.linalg.det(box).abs()).numpy()
    assert found.atomic is not None
    return Found(found.atomic.abs().sum().item(), found.forces.numpy(), stress)


def by_ase(atoms: Atoms, dtype: torch.dtype, mode: str = "exact", **options: Any) -> Found:
    calculator = TMDNETCalculator(model_in(dtype, mode), dtype=dtype, **options)
    set_radial_mode(calculator.model, mode)
    atoms = atoms.copy()
    atoms.info["charge"], atoms.calc = CHARGE, calculator
    stress = atoms.get_stress(voigt=False) if atoms.pbc.any() else None
    return Found(atoms.get_potential_energy(), atoms.get_forces(), stress)


def by_ase_as_usual(atoms: Atoms, dtype: torch.dtype) -> Found:
    return by_ase(atoms, dtype, "auto")


def by_external(atoms: Atoms, dtype: torch.dtype) -> Found:
    model = model_in(dtype)
    energy, forces = External(model, atoms.numbers, dtype=dtype, q=CHARGE).calculate(
        torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    )
    return Found(energy.item(), forces[0].double().numpy(), None)


def by_batches(atoms: Atoms, dtype: torch.dtype) -> Found:
    potential, (z, pos, box, q) = BatchPotential(model_in(dtype), dtype=dtype), arguments(atoms, DOUBLE)
    set_radial_mode(potential.model, "exact")
    found = potential(z, pos, torch.zeros_like(z), box, q, num_systems=1, with_virial=True)
    stress = None if box is None else found.virial[0].numpy() / atoms.get_volume()
    return Found(found.energy.item(), found.forces.double().numpy(), stress)


def by_edges(atoms: Atoms, dtype: torch.dtype) -> Found:
    z, _, box, q = arguments(atoms, dtype)
    found = model_in(dtype).from_edges(z, *listed(atoms, dtype), box=box, q=q)
    stress = None if found.stress is None else found.stress[0].double().numpy()
    return Found(found.energy.item(), found.forces.double().numpy(), stress)


def listed(atoms: Atoms, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges that ASE finds, with a skin."""
    from ase.neighborlist import neighbor_list

    i, j, D = neighbor_list("ijD", atoms, 4.5)
    return torch.tensor(np.stack([i, j])), torch.tensor(-D.reshape(-1, 3), dtype=dtype)


def by_lammps(atoms: Atoms, dtype: torch.dtype) -> Found:
    ours = pickle.loads(pickle.dumps(MLIAPModel(model_in(dtype), charge=CHARGE)))
    set_radial_mode(ours.model, "exact")
    index, vec = listed(atoms, DOUBLE)
    atomic, slope = ours.evaluate(torch.tensor(atoms.numbers), index, vec, len(atoms))
    slope = slope.double()
    forces = torch.zeros(len(atoms), 3, dtype=DOUBLE).index_add(0, index[0], -slope).index_add(0, index[1], slope)
    stress = (vec.T @ slope).numpy() / atoms.get_volume() if atoms.pbc.any() else None
    return Found(atomic.sum().item(), forces.numpy(), stress)


class Scripts(dict[torch.dtype, Any]):
    folder: Any

    def __missing__(self, dtype: torch.dtype) -> Any:
        self[dtype] = export_torchscript(model_in(dtype), self.folder / f"{len(self)}.pt")
        return self[dtype]


SCRIPTS = Scripts()


def by_torchscript(atoms: Atoms, dtype: torch.dtype) -> Found:
    z, pos, box, q = arguments(atoms, dtype)
    energy, forces = SCRIPTS[dtype](z, pos, box=box, q=q)
    return Found(energy.item(), forces.detach().double().numpy(), None)


#: Rows of the table -> what computes them; doors that need other programs have tests of their own beside these.
DOORS: dict[str, Callable[[Atoms, torch.dtype], Found]] = {
    "`TMDNETCalculator` (ASE)": by_ase,
    "the same, radial functions in mode `auto`": by_ase_as_usual,
    "`External` (TorchMD)": by_external,
    "OpenMM-ML and torch-sim": by_batches,
    "`from_edges`": by_edges,
    "TorchScript": by_torchscript,
    "LAMMPS (`mliap unified`)": by_lammps,
}


def limits() -> dict[str, dict[torch.dtype, float]]:
    """How closely the page says that each door agrees, in either precision."""
    section = (DOCS / "engines.md").read_text(encoding="utf-8").partition("## How closely they agree")[2]
    found = {}
    for name, double, single in re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \|$", section, re.MULTILINE):
        if re.fullmatch(r"[\de.-]+", double) and "e" in double:
            found[name] = {DOUBLE: float(double), SINGLE: float(single)}
    return found


def test_the_table_has_the_doors_that_are_tried():
    assert list(limits()) == list(DOORS)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE], ids=["float64", "float32"])
def test_a_door_agrees_as_closely_as_the_table_says(door, dtype, tmp_path):
    SCRIPTS.folder, limit = tmp_path, limits()[door][dtype]
    for atoms in structures():
        found, expected, size = DOORS[door](atoms, dtype), reference(atoms), sizes(atoms)
        for name, value in expected._asdict().items():
            ours = getattr(found, name)
            if ours is not None:
                error = np.abs(np.asarray(ours) - value).max() / np.abs(getattr(size, name)).max()
                assert error <= limit, f"{name}: {error:.1e}"


def test_the_limits_are_those_of_the_package():
    assert all(limit[DOUBLE] <= 1e-9 and limit[SINGLE] <= 1e-5 for limit in limits().values())
