"""Several potentials, evaluated together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.forces import Slopes, derivatives_of, forces_of, stress_of, with_leaves
from torchmdnet.graph import Graph, Inputs
from torchmdnet.ops.inference import outside_modes
from torchmdnet.potential import TorchMD_Net
from torchmdnet.predictions import Evaluation, Outputs, Prediction, Values
from torchmdnet.stacking import Stack, find_same_edges

__all__ = ["Ensemble", "EnsembleOutputs", "EnsemblePrediction"]


class EnsemblePrediction(NamedTuple):
    """Mean and standard deviation over the members of an ensemble."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3) or (0,)
    energy_std: Tensor  # (S, 1)
    forces_std: Tensor  # (N, 3) or (0,)


class EnsembleOutputs(NamedTuple):
    """:class:`torchmdnet.predictions.Outputs` over the members of an ensemble, means and standard deviations."""

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    properties: dict[str, Tensor]
    energy_std: Tensor
    forces_std: Tensor
    stress_std: Tensor | None
    properties_std: dict[str, Tensor]


class Ensemble(nn.ModuleList):
    """Several potentials, evaluated together.

    Members that find the same edges, in evaluation mode, share one graph. Where all else but their weights is the same
    too, small systems go through all of them in one batched call.

    Args:
        modules: Potentials with the same outputs.
        return_std: Whether to return standard deviations (over members, N - 1) beside the means.
    """

    def __init__(self, modules: Iterable[nn.Module], return_std: bool = False) -> None:
        modules = list(modules)
        for module in modules:
            if not isinstance(module, TorchMD_Net):
                raise TypeError(f"An ensemble is made of TorchMD_Net models, not {type(module).__name__}.")
        super().__init__(modules)
        self.return_std = return_std
        self._stack: Stack | None = None

    @property
    def members(self) -> list[TorchMD_Net]:
        """The potentials."""
        return list(self)  # type: ignore[arg-type]

    @outside_modes
    def forward(self, *args: Any, **kwargs: Any) -> Prediction | Outputs | EnsemblePrediction | EnsembleOutputs:
        """Evaluate every member; takes the arguments of :meth:`TorchMD_Net.forward`, ``stress`` and ``properties`` too.

        Returns:
            The means of all that a member returns and, with ``return_std``, their standard deviations; NaN for a
            single member.

        Raises:
            ValueError: If ``properties`` is set and the members do not predict the same ones.
        """
        if kwargs.get("properties"):
            self.check_properties()
        predictions = self._predictions(*args, **kwargs)
        energy = torch.stack([prediction.energy for prediction in predictions])
        forces = torch.stack([prediction.forces for prediction in predictions])
        if not isinstance(predictions[0], Outputs):
            if not self.return_std:
                return Prediction(energy.mean(dim=0), forces.mean(dim=0))
            return EnsemblePrediction(energy.mean(dim=0), forces.mean(dim=0), energy.std(dim=0), forces.std(dim=0))
        stress = None
        if predictions[0].stress is not None:
            stress = torch.stack([prediction.stress for prediction in predictions])
        properties = {
            name: torch.stack([prediction.properties[name] for prediction in predictions])
            for name in predictions[0].properties
        }
        means = Outputs(
            energy.mean(dim=0),
            forces.mean(dim=0),
            None if stress is None else stress.mean(dim=0),
            {name: value.mean(dim=0) for name, value in properties.items()},
        )
        if not self.return_std:
            return means
        return EnsembleOutputs(
            *means,
            energy.std(dim=0),
            forces.std(dim=0),
            None if stress is None else stress.std(dim=0),
            {name: value.std(dim=0) for name, value in properties.items()},
        )

    def _predictions(
        self, *args: Any, stress: bool = False, properties: bool = False, extra_args: Any = None, **kwargs: Any
    ) -> list[Any]:
        """What calling each member returns."""
        inputs = Inputs(*args, **kwargs) if extra_args is None else Inputs(*args, extra=extra_args, **kwargs)
        if not (all(model.derivative for model in self.members) or stress) or not self._share_edges():
            return [model(*inputs[:8], stress=stress, properties=properties) for model in self.members]
        forces = self.members[0].derivative
        found = self.evaluate(inputs, forces=forces, virial=stress, properties=properties)
        box = self.members[0]._box(inputs.box)
        rows = []
        for one in found:
            row = Prediction(one.energy, inputs.pos.new_empty(0) if one.forces is None else one.forces)
            if stress or properties:
                tensor = None if one.virial is None else stress_of(one.virial, box)
                row = Outputs(row.energy, row.forces, tensor, one.properties)
            rows.append(row)
        return rows

    @outside_modes
    def evaluate(
        self,
        inputs: Inputs,
        *,
        forces: bool = True,
        virial: bool = False,
        properties: bool = False,
        by_atom: bool = False,
    ) -> list[Evaluation]:
        """What :meth:`TorchMD_Net.evaluate` returns, for each member, with the arguments of that method."""
        if not (forces or virial) or not self._share_edges():
            return [
                model.evaluate(inputs, forces=forces, virial=virial, properties=properties, by_atom=by_atom)
                for model in self.members
            ]
        options = {"virial": virial, "properties": properties, "by_atom": by_atom}
        first = self.members[0]
        with torch.inference_mode(False), torch.no_grad():
            if self._stack is None:
                self._stack = Stack([model.representation_model for model in self.members])
            pos = inputs.pos.clone() if inputs.pos.is_inference() else inputs.pos.detach()
            graph = first._graph(inputs._replace(pos=pos, box=first._box(inputs.box)))
            is_direct = first._direct_encoder(graph, keep=False) is not None  # which is quicker still
            if self._stack.wants(graph) and not is_direct:
                found = self._batched(graph, self._stack, **options)
            else:
                found = [model.evaluate_graph(graph, **options) for model in self.members]
        return [one if forces else one._replace(forces=None) for one in found]

    def _share_edges(self) -> bool:
        models = [model.representation_model for model in self.members]
        return len(models) > 1 and not any(model.training for model in self.members) and find_same_edges(models)

    def _batched(self, graph: Graph, stack: Stack, *, virial: bool, **options: bool) -> list[Evaluation]:
        """All members at once; each has leaves of its own, so that one differentiation serves all."""
        with torch.enable_grad():
            copies = [with_leaves(graph, strained=virial) for _ in self.members]
            graphs = [moved for moved, _ in copies]
            values = [
                model._values_of(*model.representation_model.select(features, moved), **options)
                for model, features, moved in zip(self.members, stack.encode(graph, graphs), graphs, strict=True)
            ]
            total = torch.stack([value.energy.sum() for value in values])
            slopes = iter(derivatives_of(total, [leaf for _, leaves in copies for leaf in leaves]))
        found = []
        for value in map(Values.detached, values):
            of_member = Slopes(*(next(slopes) for _ in Slopes._fields))
            forces, strain = forces_of(graph, of_member, strained=virial)
            found.append(Evaluation(value.energy, forces, strain, value.properties, value.atomic))
        return found

    def check_properties(self) -> None:
        """Refuse to average properties that not all members predict."""
        names = [set(model.property_heads) for model in self.members]
        if any(others != names[0] for others in names):
            told = "; ".join(", ".join(sorted(others)) or "none" for others in names)
            raise ValueError(f"properties: the members of the ensemble predict different ones ({told}).")
