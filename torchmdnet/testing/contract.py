"""What must hold for every potential, whatever it is made of.

Each check takes a potential in float64 with ``derivative`` and a batch, and raises ``AssertionError`` with the numbers
when the statement in its name is false. Properties and, for batches with a box, the stress are looked at where the
potential has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.heads.base import OutputModel
from torchmdnet.potential import Outputs, TorchMD_Net
from torchmdnet.testing.systems import Systems

__all__ = ["CHECKS", "QUICK", "Check"]

Check = Callable[[TorchMD_Net, Systems], None]


class Result(NamedTuple):
    """One of the things a potential says."""

    value: Tensor
    rank: int  # 0 scalar, 1 vector, 2 tensor of two indices
    is_of_atoms: bool


def _options(systems: Systems) -> dict[str, Any]:
    """The call, with charges that a prior may read and spins, the number of atoms modulo 3, for models that do."""
    unpaired = torch.bincount(systems.batch, minlength=systems.num_systems) % 3
    charges = 0.2 * (systems.z % 3).to(systems.pos.dtype) - 0.15
    return {
        "batch": systems.batch,
        "box": systems.box,
        "q": systems.q,
        "s": unpaired.to(systems.pos.dtype),
        "extra_args": {"partial_charges": charges},
        "num_systems": systems.num_systems,
    }


def _ask(model: TorchMD_Net, systems: Systems, **changes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Energy and forces."""
    systems = systems._replace(**changes)
    energy, forces = model(systems.z, systems.pos, **_options(systems))
    return energy.detach(), forces.detach()


def _outputs(model: TorchMD_Net, systems: Systems) -> Outputs:
    """Everything a potential can say of the systems, stress included where one of them is periodic."""
    found = model(systems.z, systems.pos, **_options(systems), stress=bool(systems.is_periodic.any()), properties=True)
    assert isinstance(found, Outputs)
    return found


def _results(model: TorchMD_Net, systems: Systems, **changes: Tensor | None) -> dict[str, Result]:
    """Outputs by name, without history. Derivatives of anything but a scalar are left out: they sum its components."""
    found = _outputs(model, systems._replace(**changes))
    results = {"energy": Result(found.energy, _rank(model.output_model), False)}
    if results["energy"].rank == 0:
        results["forces"] = Result(found.forces, 1, True)
        if found.stress is not None:
            results["stress"] = Result(found.stress, 2, False)
    for name, head in model.property_heads.items():
        assert isinstance(head, OutputModel)
        results[name] = Result(found.properties[name], _rank(head), head.per_atom_output)
    return {name: result._replace(value=result.value.detach()) for name, result in results.items()}


def _rank(head: OutputModel) -> int:
    return 0 if head.output_shape == (1,) else len(head.output_shape)


def _turned(result: Result, rotation: Tensor) -> Tensor:
    """A value in a rotated frame of reference."""
    if result.rank == 0:
        return result.value
    value = result.value @ rotation.T
    return value if result.rank == 1 else rotation @ value


def _agree(found: dict[str, Result], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].value,
            value,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda told, name=name: f"{name}: {told}",
        )


def _rotation(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return matrix * torch.linalg.det(matrix)


def _random(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def forces_are_slopes_of_the_energy(model: TorchMD_Net, systems: Systems) -> None:
    """Central differences of the energy, with all atoms moved along random directions."""
    _, forces = _ask(model, systems)
    step = 1e-4
    for seed in (10, 11):
        direction = _random(systems.pos.shape, seed)
        ahead, behind = (_ask(model, systems, pos=systems.pos + sign * step * direction)[0].sum() for sign in (1, -1))
        slope = -(forces * direction).sum()
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=2e-6)


def energy_ignores_the_frame_of_reference(model: TorchMD_Net, systems: Systems) -> None:
    """Rotating and shifting everything, lattice included, changes no scalar and turns vectors and tensors."""
    rotation = _rotation()
    here = _results(model, systems)
    box = None if systems.box is None else systems.box @ rotation.T
    there = _results(model, systems, pos=systems.pos @ rotation.T + 1.7, box=box)
    _agree(there, {name: _turned(result, rotation) for name, result in here.items()})


def order_of_atoms_does_not_matter(model: TorchMD_Net, systems: Systems) -> None:
    """Shuffled atoms, their system numbers no longer ascending, have the same values."""
    order = torch.randperm(systems.z.shape[0], generator=torch.Generator().manual_seed(2))
    before = _results(model, systems)
    after = _results(model, systems, z=systems.z[order], pos=systems.pos[order], batch=systems.batch[order])
    _agree(after, {name: value[order] if of_atoms else value for name, (value, _, of_atoms) in before.items()})


def a_batch_equals_its_systems_one_by_one(model: TorchMD_Net, systems: Systems) -> None:
    """No system feels the others in the batch, whatever boxes they have."""
    together = _results(model, systems)
    for number in range(systems.num_systems):
        members = systems.batch == number
        alone = _results(model, systems.system(number))
        parts = {
            name: value[members] if of_atoms else value[number : number + 1]
            for name, (value, _, of_atoms) in together.items()
        }
        if "stress" not in alone and "stress" in parts:
            assert parts.pop("stress").isnan().all(), "an open system has a stress"
        _agree(alone, parts)


def lattice_translations_do_not_matter(model: TorchMD_Net, systems: Systems) -> None:
    """Atoms moved by lattice vectors have the same values, but for dipoles and the like."""
    if systems.box is None:
        return
    counts = torch.randint(-2, 3, systems.pos.shape, generator=torch.Generator().manual_seed(4)).double()
    cell = systems.box.expand(systems.num_systems, 3, 3)[systems.batch]
    heads = {"energy": model.output_model, "forces": model.output_model, "stress": model.output_model}
    here = _results(model, systems)
    there = _results(model, systems, pos=systems.pos + torch.einsum("nk,nkl->nl", counts, cell))
    heads |= dict(model.property_heads)
    kept = {name: value for name, (value, _, _) in here.items() if not heads[name].depends_on_images}
    _agree(there, kept, tolerance=1e-9)


def energy_is_smooth_through_the_cutoff(model: TorchMD_Net, systems: Systems) -> None:
    """An atom pulled from two others through the cutoff of one: neither a value nor a force jumps."""
    cutoff = float(model.representation_model.cutoff_upper)
    z = systems.z[:3]
    rows = []
    for distance in (cutoff - 1e-5, cutoff + 1e-5):
        pos = torch.tensor([[0.0, 0.0, 0.0], [distance, 0.0, 0.0], [0.3, 0.9, 0.5]], dtype=torch.float64)
        rows.append(_results(model, Systems(z, pos, torch.zeros(3, dtype=torch.long), None, None)))
    inside, outside = rows
    step = torch.tensor([[0.0, 0.0, 0.0], [2e-5, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for name, (value, rank, _) in inside.items():
        gone = outside[name].value
        if name == "energy" and rank == 0:  # less what the forces account for
            value = value - (inside["forces"].value * step).sum()
            torch.testing.assert_close(value, gone, rtol=0, atol=1e-8, msg=lambda told: f"energy: {told}")
        else:
            torch.testing.assert_close(value, gone, rtol=0, atol=2e-4, msg=lambda told, name=name: f"{name}: {told}")


def isolated_atoms_are_fine(model: TorchMD_Net, systems: Systems) -> None:
    """Atoms out of reach of each other have finite energies, no forces, and usable gradients in training."""
    pos = 1000.0 * torch.arange(4, dtype=torch.float64)[:, None].expand(4, 3)
    lone = Systems(systems.z[:4], pos.contiguous(), torch.tensor([0, 0, 1, 2]), None, None)
    energy, forces = _ask(model, lone)
    assert torch.isfinite(energy).all(), energy
    torch.testing.assert_close(forces, torch.zeros_like(forces), rtol=0, atol=1e-6)
    training = copy.deepcopy(model).train()
    found = _outputs(training, lone)
    (found.energy.square().sum() + found.forces.square().sum()).backward()
    for name, parameter in training.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def single_precision_agrees_with_double(model: TorchMD_Net, systems: Systems) -> None:
    """The same weights in float32, to float32 accuracy."""
    double = _results(model, systems)
    single = _results(copy.deepcopy(model).to(torch.float32), systems.to(torch.float32))
    for name, (value, _, _) in double.items():
        found = single[name].value
        assert found.dtype == torch.float32, name
        tolerance = 1e-4 if name == "energy" else 1e-3
        torch.testing.assert_close(
            found.double(),
            value,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda told, name=name: f"{name}: {told}",
        )


def forces_can_be_trained(model: TorchMD_Net, systems: Systems) -> None:
    """The gradient of a loss of energy, forces, stress and properties with respect to the parameters.

    Along a random direction, by central differences.
    """
    model = copy.deepcopy(model).train()

    def loss() -> Tensor:
        found = _outputs(model, systems)
        terms = [found.energy, found.forces, *found.properties.values()]
        terms += [] if found.stress is None else [30 * found.stress.nan_to_num()]
        return torch.stack([term.square().sum() for term in terms]).sum()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = [_random(p.shape, 6 + n).to(p.dtype) for n, p in enumerate(parameters)]
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
    size = sum(float((g.abs() * d.abs()).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    assert abs(slope - numeric) <= 1e-6 * (10 + size), (slope, numeric)


def second_derivatives_are_right(model: TorchMD_Net, systems: Systems) -> None:
    """``gradgradcheck`` of the energy in the positions, which training with forces needs."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.derivative = False
    systems = systems.system(0)
    options = _options(systems)
    pos = systems.pos.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda pos: model(systems.z, pos, **options)[0],
        (pos,),
        fast_mode=True,
        atol=1e-4,
    )


def hessians_by_torch_func(model: TorchMD_Net, systems: Systems) -> None:
    """Second derivatives by ``vmap`` over the products of ``torch.func``, against central differences of the forces."""
    plain = copy.deepcopy(model).requires_grad_(False)
    plain.derivative = False
    options = _options(systems)
    gradient = torch.func.grad(lambda pos: plain(systems.z, pos, **options)[0].sum())
    product = torch.func.vjp(gradient, systems.pos)[1]
    directions = torch.stack([_random(systems.pos.shape, seed) for seed in (12, 13)])
    (rows,) = torch.func.vmap(product)(directions)
    step = 1e-5
    for direction, row in zip(directions, rows, strict=True):
        ahead, behind = (_ask(model, systems, pos=systems.pos + sign * step * direction)[1] for sign in (1, -1))
        numeric = -(ahead - behind) / (2 * step)
        torch.testing.assert_close(row, numeric, rtol=1e-5, atol=1e-6 * (1 + float(numeric.abs().max())))


def stress_is_the_slope_in_the_strain(model: TorchMD_Net, systems: Systems) -> None:
    """The stress times the volume, against central differences of the energy in strains of positions and lattice."""
    if not systems.is_periodic.any():
        return
    assert systems.box is not None
    found = _outputs(model, systems)
    assert found.stress is not None
    stress = found.stress.detach()
    torch.testing.assert_close(stress, stress.mT, rtol=0, atol=1e-12, equal_nan=True)
    boxes = systems.box.expand(systems.num_systems, 3, 3)
    step = 1e-5
    for seed in (14, 15):
        strain = _random((systems.num_systems, 3, 3), seed)
        strain = (strain + strain.mT) / 2
        values = []
        for sign in (1, -1):
            deformation = torch.eye(3, dtype=torch.float64) + sign * step * strain
            pos = torch.einsum("nk,nkl->nl", systems.pos, deformation[systems.batch])
            values.append(_ask(model, systems, pos=pos, box=boxes @ deformation)[0].flatten(1).sum(dim=1))
        numeric = (values[0] - values[1]) / (2 * step)  # (S,)
        slope = torch.linalg.det(boxes).abs() * (stress * strain).sum(dim=(1, 2))
        periodic = systems.is_periodic
        torch.testing.assert_close(slope[periodic], numeric[periodic], rtol=1e-6, atol=1e-5)
        assert slope[~periodic].isnan().all(), "an open system has a stress"


def the_callers_tensors_stay_as_they_are(model: TorchMD_Net, systems: Systems) -> None:
    """A call neither marks nor changes its arguments, and works without gradient tracking."""
    before = systems.pos.clone()
    energy, forces = _ask(model, systems)
    assert not systems.pos.requires_grad
    assert torch.equal(systems.pos, before)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            quiet_energy, quiet_forces = model(systems.z, systems.pos, **_options(systems))
            outputs = _outputs(model, systems)
        for value in (quiet_energy, quiet_forces, outputs.energy, outputs.forces, *outputs.properties.values()):
            assert not value.requires_grad
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
        second_derivatives_are_right,
        hessians_by_torch_func,
        stress_is_the_slope_in_the_strain,
        the_callers_tensors_stay_as_they_are,
    )
}

#: Those that say most for their price, for looking at every combination of parts.
QUICK: dict[str, Check] = {
    check.__name__: check
    for check in (
        forces_are_slopes_of_the_energy,
        energy_ignores_the_frame_of_reference,
        order_of_atoms_does_not_matter,
        a_batch_equals_its_systems_one_by_one,
        lattice_translations_do_not_matter,
        energy_is_smooth_through_the_cutoff,
        single_precision_agrees_with_double,
        forces_can_be_trained,
        hessians_by_torch_func,
        stress_is_the_slope_in_the_strain,
    )
}
