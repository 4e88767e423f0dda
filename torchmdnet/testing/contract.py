"""What must hold for every potential, whatever it is made of.

Each check takes a potential in float64 with ``derivative`` and a batch, and raises ``AssertionError`` with the numbers
when the statement in its name is false.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from torchmdnet.potential import TorchMD_Net
from torchmdnet.testing.systems import Systems

__all__ = ["CHECKS"]

Check = Callable[[TorchMD_Net, Systems], None]


def _ask(model: TorchMD_Net, systems: Systems, **changes: Tensor | None) -> tuple[Tensor, Tensor]:
    z, pos, batch, box, q = systems._replace(**changes)
    energy, forces = model(z, pos, batch, box=box, q=q)
    return energy.detach(), forces.detach()


def _rotation(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return matrix * torch.linalg.det(matrix)


def forces_are_the_negative_gradient(model: TorchMD_Net, systems: Systems) -> None:
    """Central differences of the energy, along every coordinate."""
    _, forces = _ask(model, systems)
    step = 1e-4
    numeric = torch.zeros_like(forces)
    for atom in range(systems.z.shape[0]):
        for axis in range(3):
            ahead, behind = systems.pos.clone(), systems.pos.clone()
            ahead[atom, axis] += step
            behind[atom, axis] -= step
            difference = _ask(model, systems, pos=ahead)[0].sum() - _ask(model, systems, pos=behind)[0].sum()
            numeric[atom, axis] = -difference / (2 * step)
    torch.testing.assert_close(forces, numeric, rtol=1e-6, atol=1e-7)


def energy_ignores_the_frame_of_reference(model: TorchMD_Net, systems: Systems) -> None:
    """Rotating and shifting everything, lattice included, changes no energy and turns the forces."""
    rotation = _rotation()
    energy, forces = _ask(model, systems)
    box = None if systems.box is None else systems.box @ rotation.T
    turned_energy, turned_forces = _ask(model, systems, pos=systems.pos @ rotation.T + 1.7, box=box)
    torch.testing.assert_close(turned_energy, energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(turned_forces, forces @ rotation.T, rtol=1e-10, atol=1e-10)


def order_of_atoms_does_not_matter(model: TorchMD_Net, systems: Systems) -> None:
    """Shuffled atoms, their system numbers no longer ascending, have the same energies and forces."""
    order = torch.randperm(systems.z.shape[0], generator=torch.Generator().manual_seed(2))
    energy, forces = _ask(model, systems)
    z, pos, batch = systems.z[order], systems.pos[order], systems.batch[order]
    shuffled_energy, shuffled_forces = _ask(model, systems, z=z, pos=pos, batch=batch)
    torch.testing.assert_close(shuffled_energy, energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shuffled_forces, forces[order], rtol=1e-10, atol=1e-10)


def a_batch_equals_its_systems_one_by_one(model: TorchMD_Net, systems: Systems) -> None:
    """No system feels the others in the batch."""
    energy, forces = _ask(model, systems)
    for number in range(systems.num_systems):
        alone_energy, alone_forces = _ask(model, systems.system(number))
        torch.testing.assert_close(alone_energy[0], energy[number], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(alone_forces, forces[systems.batch == number], rtol=1e-10, atol=1e-10)


def lattice_translations_do_not_matter(model: TorchMD_Net, systems: Systems) -> None:
    """Atoms moved by lattice vectors have the same energy and forces."""
    if systems.box is None or systems.box.dim() != 2:
        return
    counts = torch.randint(-2, 3, systems.pos.shape, generator=torch.Generator().manual_seed(4)).double()
    energy, forces = _ask(model, systems)
    moved_energy, moved_forces = _ask(model, systems, pos=systems.pos + counts @ systems.box)
    torch.testing.assert_close(moved_energy, energy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved_forces, forces, rtol=1e-9, atol=1e-9)


def energy_is_smooth_through_the_cutoff(model: TorchMD_Net, systems: Systems) -> None:
    """A pair pulled apart through the cutoff: neither energy nor force jumps."""
    cutoff = float(model.representation_model.cutoff_upper)
    z = systems.z[:2]
    rows = []
    for distance in (cutoff - 1e-5, cutoff + 1e-5):
        pos = torch.zeros(2, 3, dtype=torch.float64)
        pos[1, 0] = distance
        rows.append(_ask(model, Systems(z, pos, torch.zeros(2, dtype=torch.long), None, None)))
    (inside, force_inside), (outside, force_outside) = rows
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-8)
    torch.testing.assert_close(force_inside, force_outside, rtol=0, atol=1e-4)


def isolated_atoms_are_fine(model: TorchMD_Net, systems: Systems) -> None:
    """Atoms out of reach of each other have finite energies, no forces, and usable gradients in training."""
    pos = 100.0 * torch.arange(4, dtype=torch.float64)[:, None].expand(4, 3)
    lone = Systems(systems.z[:4], pos.contiguous(), torch.tensor([0, 0, 1, 2]), None, None)
    energy, forces = _ask(model, lone)
    assert torch.isfinite(energy).all(), energy
    torch.testing.assert_close(forces, torch.zeros_like(forces), rtol=0, atol=1e-12)
    training = copy.deepcopy(model).train()
    energy, forces = training(lone.z, lone.pos, lone.batch)
    (energy.square().sum() + forces.square().sum()).backward()
    for name, parameter in training.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def single_precision_agrees_with_double(model: TorchMD_Net, systems: Systems) -> None:
    """The same weights in float32, to float32 accuracy."""
    energy, forces = _ask(model, systems)
    single = copy.deepcopy(model).to(torch.float32)
    single_energy, single_forces = _ask(single, systems.to(torch.float32))
    assert single_energy.dtype == single_forces.dtype == torch.float32
    torch.testing.assert_close(single_energy.double(), energy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single_forces.double(), forces, rtol=1e-3, atol=1e-3)


def forces_can_be_trained(model: TorchMD_Net, systems: Systems) -> None:
    """The gradient of a force loss with respect to the parameters, along a random direction, by central differences."""
    model = copy.deepcopy(model).train()
    z, pos, batch, box, q = systems

    def loss() -> Tensor:
        energy, forces = model(z, pos, batch, box=box, q=q)
        return energy.square().sum() + forces.square().sum()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(6)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * d)
        values.append(float(loss().detach()))
        with torch.no_grad():
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(-sign * step * d)
    numeric = (values[0] - values[1]) / (2 * step)
    assert abs(slope - numeric) <= 1e-5 * (1 + abs(numeric)), (slope, numeric)


def strain_moves_atoms_and_lattice(model: TorchMD_Net, systems: Systems) -> None:
    """The derivative of the energy in a strain of positions and box, by central differences."""
    if systems.box is None:
        return
    z, pos, batch, _, q = systems
    box = systems.box

    def energy(strain: Tensor) -> Tensor:
        deform = torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2
        return model._energy(z, pos @ deform, batch, box @ deform, q, None, None, None).sum()

    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    (virial,) = torch.autograd.grad(energy(strain), strain)
    step = 1e-5
    numeric = torch.zeros(3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            change = torch.zeros(3, 3, dtype=torch.float64)
            change[a, b] = step
            numeric[a, b] = (energy(change) - energy(-change)).detach() / (2 * step)
    torch.testing.assert_close(virial, numeric, rtol=1e-6, atol=1e-7)


def the_callers_tensors_stay_as_they_are(model: TorchMD_Net, systems: Systems) -> None:
    """A call neither marks nor changes its arguments, and works without gradient tracking."""
    before = systems.pos.clone()
    energy, forces = _ask(model, systems)
    assert not systems.pos.requires_grad
    assert torch.equal(systems.pos, before)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            quiet_energy, quiet_forces = model(systems.z, systems.pos, systems.batch, box=systems.box, q=systems.q)
        assert not quiet_energy.requires_grad
        assert not quiet_forces.requires_grad
        torch.testing.assert_close(quiet_energy.clone(), energy, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quiet_forces.clone(), forces, rtol=1e-12, atol=1e-12)


#: Every statement, by name.
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        forces_are_the_negative_gradient,
        energy_ignores_the_frame_of_reference,
        order_of_atoms_does_not_matter,
        a_batch_equals_its_systems_one_by_one,
        lattice_translations_do_not_matter,
        energy_is_smooth_through_the_cutoff,
        isolated_atoms_are_fine,
        single_precision_agrees_with_double,
        forces_can_be_trained,
        strain_moves_atoms_and_lattice,
        the_callers_tensors_stay_as_they_are,
    )
}
