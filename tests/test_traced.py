"""What ``torch.export`` and ``torch.compile`` make of a model gives its numbers, for other numbers of atoms too."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.models import ARCHITECTURES
from torchmdnet.models.base import set_radial_mode
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.testing import Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model

NAMES = sorted(set(ARCHITECTURES))
ATOMS, SYSTEMS = torch.export.Dim("atoms", min=2), torch.export.Dim("systems", min=1)


def exact(name: str, **options):
    model = tiny_model(name, num_layers=1, **options)
    set_radial_mode(model, "exact")
    return model


def expect_same_energies_and_forces(program, model, systems: Systems, **given) -> None:
    z, pos = systems.z, systems.pos.clone().requires_grad_()
    found = program(z, pos, batch=systems.batch, **given)[0]
    energy, forces = model(z, systems.pos, systems.batch, **given)
    torch.testing.assert_close(found, energy, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(-torch.autograd.grad(found.sum(), pos)[0], forces, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_takes_other_molecules(name: str) -> None:
    model, systems = exact(name, derivative=False), small_molecules()
    shapes = {"z": {0: ATOMS}, "pos": {0: ATOMS}, "batch": {0: ATOMS}}
    program = torch.export.export(
        model, (systems.z, systems.pos), {"batch": systems.batch}, dynamic_shapes=shapes
    ).module()
    model.derivative = True
    for other in (systems, systems.system(0), systems.system(1)):
        expect_same_energies_and_forces(program, model, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_takes_other_boxes(name: str) -> None:
    model, systems = exact(name, derivative=False), mixed_boxes()
    given = {"box": systems.box, "q": systems.q}
    shapes = {"z": {0: ATOMS}, "pos": {0: ATOMS}, "batch": {0: ATOMS}, "box": {0: SYSTEMS}, "q": {0: SYSTEMS}}
    program = torch.export.export(
        model, (systems.z, systems.pos), {"batch": systems.batch, **given}, dynamic_shapes=shapes
    ).module()
    model.derivative = True
    expect_same_energies_and_forces(program, model, systems, **given)
    cell = cell_of_atoms(7)
    expect_same_energies_and_forces(program, model, cell, box=cell.box[None], q=torch.zeros(1).double())


def test_exporting_forces_is_refused_with_what_to_do() -> None:
    systems = small_molecules()
    with pytest.raises(ConfigError, match="derivative=False"):
        torch.export.export(exact("graph-network"), (systems.z, systems.pos), {"batch": systems.batch}, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_energies_and_forces_are_compiled_as_one_function(name: str) -> None:
    model = exact(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for systems in (small_molecules(), small_molecules().system(1)):
        for found, expected in zip(
            compiled(systems.z, systems.pos, systems.batch), model(systems.z, systems.pos, systems.batch), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_a_neighbour_list_is_exported_for_any_number_of_atoms() -> None:
    distance = OptimizedDistance(cutoff_upper=4.0, return_vecs=True)
    systems = small_molecules()
    program = torch.export.export(
        distance, (systems.pos, systems.batch), dynamic_shapes=({0: ATOMS}, {0: ATOMS}), strict=False
    ).module()
    other = systems.system(1)
    found, expected = program(other.pos, other.batch), distance(other.pos, other.batch)
    assert found[0].shape == expected[0].shape
    torch.testing.assert_close(found[1].sort().values, expected[1].sort().values)
