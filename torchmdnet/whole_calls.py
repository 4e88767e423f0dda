"""Forces by differentiating a whole call, the search for neighbours included.

Everything else differentiates the energy of a graph, :meth:`torchmdnet.potential.TorchMD_Net.energy_and_slopes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.energy import EnergyModel
from torchmdnet.errors import ConfigError
from torchmdnet.forces import deformed, derivatives_of, strained, symmetrised
from torchmdnet.graph import Inputs, count_systems
from torchmdnet.predictions import Evaluation, Values

__all__ = ["evaluate_abstractly", "evaluate_without_graph"]


def evaluate_without_graph(
    model: EnergyModel, inputs: Inputs, *, forces: bool, virial: bool, properties: bool, by_atom: bool
) -> Evaluation:
    """Energies and forces of an architecture that was written for older releases and finds its edges itself."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        pos = inputs.pos
        if not (pos.requires_grad and keep):
            pos = pos.detach().requires_grad_()
        place, box, strain = pos, inputs.box, None
        if virial:
            place, box, strain = strained(pos, inputs.batch, model._box(box), inputs.num_systems)
        features, graph = model._features(inputs._replace(pos=place, box=box))
        values = model._values_of(features, graph, properties=properties, by_atom=by_atom)
        of_pos, of_strain = derivatives_of(values.energy, (pos, strain), differentiable=model.training and keep)
        if forces and of_pos is None:
            of_pos = torch.zeros_like(pos)
        if strain is not None and of_strain is None:
            of_strain = torch.zeros_like(strain)
    values = values if keep else values.detached()
    return Evaluation(
        values.energy,
        -of_pos if forces and of_pos is not None else None,
        None if of_strain is None else symmetrised(of_strain),
        values.properties,
        None if values.atomic is None else values.atomic.detach(),
    )


def evaluate_abstractly(
    model: EnergyModel, inputs: Inputs, *, forces: bool, virial: bool, properties: bool
) -> Evaluation:
    """Energies and forces under ``torch.compile``, which follows this form of differentiation alone."""
    if torch.compiler.is_exporting():
        raise ConfigError(
            "torch.export does not follow derivatives inside a model. Export it with derivative=False and "
            "differentiate the energies of the program, or write a package with forces: torchmd-net export."
        )
    box = model._box(inputs.box)
    num_systems = inputs.num_systems
    if num_systems is None:
        num_systems = 1 if inputs.batch is None else count_systems(inputs.batch, box, inputs.q, inputs.s)
    inputs = inputs._replace(box=box, num_systems=num_systems)

    def energy_of(pos: Tensor, strain: Tensor) -> tuple[Tensor, Values]:
        place, lattice = (pos, box)
        if virial:
            place, lattice = deformed(pos, inputs.batch, box, strain)
        features, graph = model._features(inputs._replace(pos=place, box=lattice))
        values = model._values_of(features, graph, properties=properties)
        return values.energy.sum(), values

    strain = inputs.pos.new_zeros(num_systems, 3, 3)
    (of_pos, of_strain), values = torch.func.grad(energy_of, argnums=(0, 1), has_aux=True)(inputs.pos, strain)
    return Evaluation(
        values.energy,
        -of_pos if forces else None,
        symmetrised(of_strain) if virial else None,
        values.properties,
        None,
    )
