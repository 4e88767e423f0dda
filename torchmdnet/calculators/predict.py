"""Energies of a batch of systems and their derivatives, from any model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.ensemble import Ensemble
from torchmdnet.forces import derivatives_of, strained, symmetrised
from torchmdnet.graph import Inputs
from torchmdnet.ops.inference import outside_modes
from torchmdnet.potential import TorchMD_Net
from torchmdnet.predictions import Evaluation

__all__ = ["Answer", "predict", "predict_members"]


class Answer(NamedTuple):
    """What a model says of a batch, in its own units, without history."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3)
    virial: Tensor | None  # (S, 3, 3) derivative of the energy in the strain
    atomic: Tensor | None  # (N,) contributions that add up to the energy
    properties: dict[str, Tensor]  # by name, (S, ...) or (N, ...)


@outside_modes
def predict(
    model: nn.Module,
    inputs: Inputs,
    *,
    with_virial: bool = False,
    with_properties: bool = False,
    by_atom: bool = False,
) -> Answer:
    r"""Ask a model, and differentiate what it says.

    Forces are :math:`-\partial E / \partial r`, unless the model returns forces itself. The virial is
    :math:`\partial E / \partial \varepsilon` of a homogeneous strain, :math:`r \to r (1 + \varepsilon)` of positions
    and lattice vectors alike, symmetrised.

    Args:
        model: A potential, or any module called with ``z, pos, batch, box`` and, where given, ``q`` and ``s`` that
            returns energies, or energies and forces.
        inputs: The systems, in the units of the model, with their number; nothing in them is marked or changed.
        with_virial: Whether to differentiate in the strain; needs a potential, or a module that leaves
            differentiation to others.
        with_properties: Whether to ask a potential for its properties.
        by_atom: Sum the energy from the contributions of the atoms, in double precision; needs a potential whose
            ``is_sum_of_atoms`` holds.

    Raises:
        ValueError: If the model does not return one number per system, or nothing to get forces from.
    """
    if isinstance(model, TorchMD_Net):
        return _ask_potential(model, inputs, with_virial, with_properties, by_atom)
    batch, box, num_systems = inputs.batch, inputs.box, inputs.num_systems
    assert batch is not None
    assert num_systems is not None
    given = (("q", inputs.q), ("s", inputs.s))
    options: dict[str, Any] = {name: value for name, value in given if value is not None}
    if isinstance(model, Ensemble):
        options["num_systems"] = num_systems
    with torch.inference_mode(False), torch.enable_grad():
        pos = place = inputs.pos.detach().clone().requires_grad_()
        strain = None
        if with_virial:
            pos, box, strain = strained(pos, batch, box, num_systems)
        output = model(inputs.z, pos, batch, box, **options)
        energy, *others = output if isinstance(output, tuple | list) else (output,)
        _expect_one_number_per_system(energy, num_systems)
        forces = others[0] if others and others[0] is not None and others[0].shape == pos.shape else None
        virial = None
        if forces is None or with_virial:
            if not energy.requires_grad:
                raise ValueError(
                    f"{type(model).__name__} returns neither forces, {tuple(pos.shape)}, nor an energy that depends on "
                    "the positions. Return forces as the second result, or an energy that can be differentiated."
                )
            of_pos, of_strain = derivatives_of(energy, (place, strain))
            if forces is None:
                forces = torch.zeros_like(place) if of_pos is None else -of_pos
            if strain is not None:
                virial = torch.zeros_like(strain) if of_strain is None else symmetrised(of_strain)
        return Answer(energy.detach().reshape(num_systems, 1), forces.detach(), virial, None, {})


def predict_members(
    model: nn.Module,
    inputs: Inputs,
    *,
    with_virial: bool = False,
    with_properties: bool = False,
    by_atom: bool = False,
) -> list[Answer]:
    """:func:`predict` for each member of an ensemble, or for a model alone; members share what they can."""
    if not isinstance(model, Ensemble):
        options = {"with_virial": with_virial, "with_properties": with_properties, "by_atom": by_atom}
        return [predict(model, inputs, **options)]
    with torch.no_grad():
        found = model.evaluate(inputs, virial=with_virial, properties=with_properties, by_atom=by_atom)
    return [_answer(one, inputs.num_systems) for one in found]


def _ask_potential(
    model: TorchMD_Net, inputs: Inputs, with_virial: bool, with_properties: bool, by_atom: bool
) -> Answer:
    with torch.no_grad():  # the model differentiates, its results need no history
        found = model.evaluate(inputs, virial=with_virial, properties=with_properties, by_atom=by_atom)
    return _answer(found, inputs.num_systems)


def _answer(found: Evaluation, num_systems: int | None) -> Answer:
    assert num_systems is not None
    _expect_one_number_per_system(found.energy, num_systems)
    assert found.forces is not None
    return Answer(found.energy.reshape(num_systems, 1), found.forces, found.virial, found.atomic, found.properties)


def _expect_one_number_per_system(energy: Tensor, num_systems: int) -> None:
    if energy.numel() != num_systems:
        raise ValueError(
            f"The model returns an array of shape {tuple(energy.shape)} for {num_systems} systems. A calculator "
            "needs one energy per system, from a head such as output_model: Scalar."
        )
