"""Energies of a batch of systems and their derivatives, from any model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.potential import Ensemble, TorchMD_Net

__all__ = ["Answer", "Inputs", "predict"]


class Inputs(NamedTuple):
    """S systems with N atoms, in the order of the established call; lengths in the unit of the model."""

    z: Tensor  # (N,)
    pos: Tensor  # (N, 3)
    batch: Tensor  # (N,)
    box: Tensor | None  # (3, 3) or (S, 3, 3); a zero row is an open direction
    q: Tensor | None  # (S,) e
    s: Tensor | None  # (S,)
    num_systems: int


class Answer(NamedTuple):
    """What a model says of a batch, in its own units, without history."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3)
    virial: Tensor | None  # (S, 3, 3) derivative of the energy in the strain
    atomic: Tensor | None  # (N,) contributions that add up to the energy


def predict(model: nn.Module, inputs: Inputs, *, with_virial: bool = False, by_atom: bool = False) -> Answer:
    r"""Ask a model, and differentiate what it says.

    Forces are :math:`-\partial E / \partial r`, unless the model returns forces itself. The virial is
    :math:`\partial E / \partial \varepsilon` of a homogeneous strain, :math:`r \to r (1 + \varepsilon)` of positions
    and lattice vectors alike, symmetrised.

    Args:
        model: Called with ``z, pos, batch, box`` and, where given, ``q`` and ``s``; returns energies, or energies and
            forces.
        inputs: The systems; nothing in them is marked or changed.
        with_virial: Whether to differentiate in the strain; needs a model that does not differentiate itself.
        by_atom: Sum the energy from the contributions of the atoms, in double precision; needs a potential whose
            ``is_sum_of_atoms`` holds.

    Raises:
        ValueError: If the model does not return one number per system, or nothing to get forces from.
    """
    z, pos, batch, box, q, s, num_systems = inputs
    options: dict[str, Any] = {name: value for name, value in (("q", q), ("s", s)) if value is not None}
    is_ours = isinstance(model, (TorchMD_Net, Ensemble))
    if is_ours:
        options["num_systems"] = num_systems
    with torch.inference_mode(False), torch.enable_grad():
        pos = place = pos.detach().clone().requires_grad_()
        wanted = [place]
        if with_virial:
            strain = pos.new_zeros(num_systems, 3, 3).requires_grad_()
            wanted.append(strain)
            deformation = torch.eye(3, dtype=pos.dtype, device=pos.device) + strain
            pos = torch.einsum("nk,nkl->nl", pos, deformation[batch])
            box = None if box is None else box @ deformation
        forces = atomic = None
        if by_atom:
            assert isinstance(model, TorchMD_Net)
            atomic = model.per_atom(z, pos, batch, box, **options)[:, 0].double()
            energy = atomic.new_zeros(num_systems).index_add(0, batch, atomic)
        else:
            output = model(z, pos, batch, box, **options)
            energy, *others = output if isinstance(output, tuple | list) else (output,)
            if others and others[0] is not None and others[0].shape == pos.shape:
                forces = others[0]
        if energy.numel() != num_systems:
            raise ValueError(
                f"The model returns an array of shape {tuple(energy.shape)} for {num_systems} systems. A calculator "
                "needs one energy per system, from a head such as output_model: Scalar."
            )
        virial = None
        if forces is None or with_virial:
            if not energy.requires_grad and not is_ours:
                raise ValueError(
                    f"{type(model).__name__} returns neither forces, {tuple(pos.shape)}, nor an energy that depends on "
                    "the positions. Return forces as the second result, or an energy that can be differentiated."
                )
            slopes = _gradients(energy, wanted)
            forces = -slopes[0] if forces is None else forces
            if with_virial:
                virial = (slopes[1] + slopes[1].mT) / 2
        return Answer(
            energy.detach().reshape(num_systems, 1),
            forces.detach(),
            virial,
            None if atomic is None else atomic.detach(),
        )


def _gradients(energy: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Derivatives of the summed energies; zero in what they do not depend on."""
    if not energy.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(energy.sum(), wanted, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(wanted, found, strict=True)]
