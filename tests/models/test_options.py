"""Every option of every architecture goes with boxes, a box for each system, charges and spins."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from torchmdnet.models import ARCHITECTURES
from torchmdnet.nn.activation import ACTIVATIONS
from torchmdnet.nn.radial import RADIAL_BASES
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model

WIDTH = 8
#: One option at a time, for the architectures whose constructor has it.
OPTIONS: list[dict[str, Any]] = [
    {},
    *({"rbf_type": name, "trainable_rbf": trainable} for name in RADIAL_BASES for trainable in (False, True)),
    *({"activation": name} for name in ACTIVATIONS),
    *({"attn_activation": name} for name in ACTIVATIONS),
    {"cutoff_lower": 0.8},
    {"cutoff_lower": 1.6, "rbf_type": "gauss"},
    {"neighbor_embedding": False},
    {"neighbor_embedding": True, "cutoff_lower": 1.2},
    {"vector_cutoff": False},
    {"vector_cutoff": True, "rbf_type": "gauss"},
    *({"distance_influence": name} for name in ("none", "keys", "values")),
    *({"aggr": name} for name in ("mean", "max", "average", "maximum")),
    {"num_heads": 4},
    {"equivariance_invariance_group": "SO(3)"},
    {"static_shapes": True},
    {"q_dim": 1},
    {"repulsion": True},
    {"num_layers": 0},
    {"atom_filter": 1, "derivative": False},
    {"atom_filter": 6, "derivative": False, "cutoff_lower": 0.8},
]
#: Keys that create_model reads for every architecture.
GENERAL = {"atom_filter", "derivative"}


def reads(model: str, options: dict[str, Any]) -> bool:
    parameters = inspect.signature(ARCHITECTURES[model]).parameters
    return all(key in parameters or key in GENERAL for key in options)


def label(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "usual"


CASES = [
    pytest.param(model, options, id=f"{model} - {label(options)}")
    for model in ARCHITECTURES
    for options in OPTIONS
    if reads(model, options)
]
#: Activations know nothing of boxes and charges; that their slopes are right is tried every day.
RARELY = [
    pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if "activation" in str(case.id) else [])
    for case in CASES
]


def four_systems() -> Systems:
    """A charged molecule in the open, a small triclinic cell, a slab, and a lone atom in a box."""
    molecule, cell = small_molecules().system(1), cell_of_atoms(num_atoms=4)
    assert cell.box is not None
    slab = cell.box * torch.tensor([[1.2], [1.1], [0.0]])
    return Systems(
        torch.cat([molecule.z, cell.z, cell.z, torch.tensor([8])]),
        torch.cat([molecule.pos, cell.pos, cell.pos, torch.tensor([[0.3, 0.2, 0.1]]).double()]),
        torch.tensor([0] * len(molecule.z) + [1] * 4 + [2] * 4 + [3]),
        torch.stack([torch.zeros(3, 3).double(), cell.box, slab, 9.0 * torch.eye(3).double()]),
        torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64),
    )


SYSTEMS = four_systems()
SPINS = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)


def alone(number: int) -> dict[str, Any]:
    system = SYSTEMS.system(number)
    assert system.box is not None
    return {
        "z": system.z,
        "pos": system.pos,
        "box": system.box if bool(system.box.any()) else None,
        "q": system.q,
        "s": SPINS[number : number + 1],
    }


@pytest.mark.parametrize(("name", "options"), RARELY)
def test_boxes_charges_and_spins_are_taken_alike(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(name, **options)
    z, pos, batch, box, q = SYSTEMS
    energy, forces = model(z, pos, batch, box=box, q=q, s=SPINS)
    assert energy.shape == (4, 1)
    assert torch.isfinite(energy).all()
    assert forces.shape == (pos.shape if model.derivative else (0,))
    assert torch.isfinite(forces).all()

    # each system alone, its box without the batch dimension, charge and spin as written by hand
    for number in range(4):
        one_energy, one_forces = model(**alone(number))
        torch.testing.assert_close(one_energy[0], energy[number], rtol=1e-9, atol=1e-9)
        if model.derivative:
            torch.testing.assert_close(one_forces, forces[batch == number], rtol=1e-9, atol=1e-9)

    # a shared box, and the box the model carries
    cell = alone(1)
    twice = {"z": cell["z"].repeat(2), "pos": cell["pos"].repeat(2, 1), "batch": torch.arange(8) // 4}
    shared, _ = model(**twice, box=cell["box"], q=torch.zeros(2), s=torch.zeros(2))
    torch.testing.assert_close(shared, energy[1].expand(2, 1), rtol=1e-9, atol=1e-9)
    carrying = tiny_model(name, box_vecs=cell["box"].tolist(), **options)
    torch.testing.assert_close(carrying(**{**cell, "box": None}).energy[0], energy[1], rtol=1e-9, atol=1e-9)

    # an image of an atom is the atom
    moved = {**cell, "pos": cell["pos"] + torch.tensor([[2.0], [-1.0], [0.0], [3.0]]).double() @ cell["box"][1:2]}
    torch.testing.assert_close(model(**moved).energy[0], energy[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_forces_are_the_slope_of_the_energy(name: str, options: dict[str, Any]) -> None:
    """Along one direction of all atoms, in all four systems at once."""
    model = tiny_model(name, **{**options, "atom_filter": -1, "derivative": True})
    z, pos, batch, box, q = SYSTEMS
    direction = torch.randn(pos.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    step = 1e-5
    ahead, behind = (model(z, pos + f * step * direction, batch, box=box, q=q, s=SPINS).energy for f in (1, -1))
    slope = ((ahead - behind) / (2 * step))[:, 0].detach()
    forces = model(z, pos, batch, box=box, q=q, s=SPINS).forces
    work = torch.zeros(4, dtype=torch.float64).index_add(0, batch, (forces * direction).sum(dim=1))
    torch.testing.assert_close(-work, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_charges_and_spins_come_in_any_type(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = tiny_model(name)
    z, pos, batch, box, q = SYSTEMS
    assert q is not None
    expected = model(z, pos, batch, box=box, q=q, s=SPINS).energy
    found = model(z, pos, batch, box=box, q=q.to(dtype).reshape(shape), s=SPINS.to(dtype).reshape(shape)).energy
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_charges_of_the_wrong_number_are_refused_by_name(name: str) -> None:
    model = tiny_model(name)
    z, pos, batch, box, q = SYSTEMS
    assert q is not None
    with pytest.raises(ValueError, match=r"q has shape \(3,\) but batch holds 4 systems"):
        model(z, pos, batch, box=box, q=q[:3])
    with pytest.raises(ValueError, match=r"s has shape \(5,\) but batch holds 4 systems"):
        model(z, pos, batch, box=box, q=q, s=torch.zeros(5))
    assert box is not None
    with pytest.raises(ValueError, match=r"box has shape \(2, 3, 3\) but batch holds 4"):
        model(z, pos, batch, box=box[:2])
