"""Batched gradients (``is_grads_batched``, ``vectorize``, ``vmap``) are those found one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from daily import daily
from torch import Tensor

from torchmdnet.models import ARCHITECTURES
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

UNITS = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
PRIORS = {
    "ZBL": {"ZBL": {"cutoff_distance": 4.0, **UNITS}},
    "D2": {"D2": {"cutoff_distance": 6.0, **UNITS}},
    "D3": {"D3": {"functional": "pbe", "cutoff_distance": 6.0, **UNITS}},
    "Atomref": {"Atomref": {"max_z": 20}},
}
SYSTEMS = {"cell": cell_of_atoms(), "molecules": small_molecules()}


def one_by_one(output: Tensor, inputs: list[Tensor], directions: Tensor, **options) -> list[Tensor | None]:
    rows = [torch.autograd.grad(output, inputs, d, retain_graph=True, **options) for d in directions]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def directions_of(output: Tensor, number: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(number, *output.shape, generator=generator, dtype=output.dtype)


def all_close(found, expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:  # a weight that has no part in it
            assert ours is None
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * (1 + float(theirs.detach().abs().max())))


@pytest.mark.parametrize("is_training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("which", "radial"),
    daily(itertools.product(SYSTEMS, ["exact", "grid"]), ("cell", "grid"), ("molecules", "exact")),
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_every_order(name: str, radial: str, which: str, is_training: bool) -> None:
    systems = SYSTEMS[which]
    model = tiny_model(name, radial=radial, derivative=False).train(is_training)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    pos = systems.pos.clone().requires_grad_()
    energy = model(systems.z, pos, systems.batch, systems.box)[0]
    given = directions_of(energy)
    (found,) = torch.autograd.grad(energy, [pos], given, is_grads_batched=True, retain_graph=True)
    all_close([found], one_by_one(energy, [pos], given))

    (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
    given = directions_of(slope)
    (rows,) = torch.autograd.grad(slope, [pos], given, is_grads_batched=True, create_graph=True)
    (expected,) = one_by_one(slope, [pos], given, create_graph=True)
    all_close([rows], [expected])
    all_close(*(torch.autograd.grad(x.sin().sum(), [pos], retain_graph=True) for x in (rows, expected)))

    found = torch.autograd.grad(slope, weights, given, is_grads_batched=True, retain_graph=True, allow_unused=True)
    all_close(found, one_by_one(slope, weights, given, allow_unused=True))


@pytest.mark.parametrize(
    ("name", "prior"), [(name, None) for name in ARCHITECTURES] + [("tensornet", prior) for prior in PRIORS]
)
def test_hessians(name: str, prior: str | None) -> None:
    systems = SYSTEMS["molecules"].system(0)
    model = tiny_model(name, prior_model=PRIORS[prior] if prior else None, derivative=False)

    def energy(pos: Tensor) -> Tensor:
        return model(systems.z, pos)[0].sum()

    found, expected = (
        torch.autograd.functional.hessian(energy, systems.pos, vectorize=vectorize) for vectorize in (True, False)
    )
    all_close([found], [expected])
    pos = systems.pos.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(pos), pos, create_graph=True)
    rows = torch.eye(slope.numel(), dtype=slope.dtype).view(-1, *slope.shape)
    found = torch.func.vmap(lambda row: torch.autograd.grad(slope, pos, row, retain_graph=True)[0])(rows)
    all_close([found.view_as(expected)], [expected])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forces_of_the_model_itself(name: str) -> None:
    """Hessian vectors from the forces that a model in training gives."""
    systems = SYSTEMS["cell"]
    model = tiny_model(name).train()
    pos = systems.pos.clone().requires_grad_()
    forces = model(systems.z, pos, systems.batch, systems.box)[1]
    given = directions_of(forces)
    found = torch.autograd.grad(forces, [pos], given, is_grads_batched=True, retain_graph=True)
    all_close(found, one_by_one(forces, [pos], given))


@pytest.mark.parametrize("radial", ["exact", "grid"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_several_systems_are_kept_apart(name: str, radial: str) -> None:
    """Derivatives of a gradient do not change when another gradient of the same energies is found after it."""
    systems = SYSTEMS["molecules"]
    model = tiny_model(name, radial=radial, derivative=False).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def losses(*numbers: int) -> list[Tensor]:
        pos = systems.pos.clone().requires_grad_()
        energy = model(systems.z, pos, systems.batch, systems.box)[0]
        slopes = [torch.autograd.grad(energy[k].sum(), pos, create_graph=True)[0] for k in numbers]
        return [slope.square().sum() for slope in slopes]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)

    first, second = (gradients(losses(k)[0]) for k in (0, 1))
    both = losses(0, 1)
    all_close(gradients(both[0]), first)
    all_close(gradients(both[1]), second)
    all_close(gradients(both[0] + both[1]), [a + b for a, b in zip(first, second, strict=True)])
