"""From the features of atoms to energies and properties, without derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph, Inputs, bare_graph, sum_to_systems
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.neighbors import check_finite
from torchmdnet.ops.scatter import widened
from torchmdnet.predictions import Values
from torchmdnet.priors.base import BasePrior
from torchmdnet.typing import Boxes

__all__ = ["EnergyModel"]


class EnergyModel(nn.Module):
    """How a potential makes energies of its parts; :class:`torchmdnet.potential.TorchMD_Net` adds their derivatives."""

    mean: Tensor
    std: Tensor
    representation_model: Any  # a Representation, or a module of older releases that returns five results
    output_model: OutputModel
    prior_model: Any  # priors in a ModuleList, or None
    property_heads: nn.ModuleDict

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters; positions and boxes are expected in it."""
        return self.mean.dtype

    @property
    def is_sum_of_atoms(self) -> bool:
        """Whether the output is the plain sum of ``per_atom``, with nothing added to a system as a whole."""
        head = self.output_model
        parts = [(head, OutputModel, ("reduce", "per_system", "post_reduce"))]
        parts += [(prior, BasePrior, ("per_system", "post_reduce")) for prior in self.prior_model or ()]
        is_plain = all(
            getattr(type(part), name, None) is getattr(base, name) for part, base, names in parts for name in names
        )
        return is_plain and head.reduce_op in ("add", "sum") and not bool(self.mean)

    def _box(self, box: Boxes | None) -> Boxes | None:
        """The box of a call, or the one the model carries."""
        if box is None:
            distance = getattr(self.representation_model, "distance", None)
            return getattr(distance, "stored_box", None)
        return box

    def _graph(self, inputs: Inputs) -> Graph:
        """The edges that the architecture works on."""
        found_by = {} if inputs.search is None else {"search": inputs.search}
        return self.representation_model.graph(
            inputs.z,
            inputs.pos,
            inputs.batch,
            inputs.box,
            inputs.q,
            inputs.s,
            num_systems=inputs.num_systems,
            extra=inputs.extra,
            **found_by,
        )

    def _features(self, inputs: Inputs) -> tuple[Features, Graph]:
        """Features of the atoms that the head receives, and their graph."""
        model = self.representation_model
        if hasattr(model, "encode"):
            return self._encoded(self._graph(inputs))
        # an architecture written for older releases: no graph, five results
        check_finite("pos", inputs.pos, "atom")
        batch = torch.zeros_like(inputs.z) if inputs.batch is None else inputs.batch
        x, v, z, pos, system = model(inputs.z, inputs.pos, batch, box=inputs.box, q=inputs.q, s=inputs.s)
        energy = getattr(model, "extra_energy", None)
        graph = bare_graph(z, pos, system, inputs.box, inputs.extra, inputs.num_systems)
        q = None if inputs.q is None else inputs.q.reshape(-1).to(pos.dtype)
        return Features(x, v, energy), graph._replace(q=q)

    def _encoded(self, graph: Graph) -> tuple[Features, Graph]:
        """:meth:`_features` of a graph."""
        return self.representation_model.select(self.representation_model.encode(graph), graph)

    def _values_of(
        self,
        features: Features,
        graph: Graph,
        *,
        properties: bool = False,
        by_atom: bool = False,
        contributions: Tensor | None = None,
    ) -> Values:
        """Energies and all else.

        Args:
            features: Of the atoms that the head receives.
            graph: Of the same atoms.
            properties: Whether to ask the property heads.
            by_atom: Whether to sum the energy from the contributions of atoms, and return these.
            contributions: What the head makes of each atom, (N, 1), if that has been found already.
        """
        values = self._properties(features, graph) if properties else {}
        if not by_atom:
            return Values(self._system_energy(features, graph, contributions), values, None)
        atomic = self._atomic(features, graph, contributions)[:, 0]  # (N,)
        return Values(sum_to_systems(atomic, graph)[:, None], values, atomic)

    def _properties(self, features: Features, graph: Graph) -> dict[str, Tensor]:
        num_charges = getattr(self.representation_model, "num_charges", 0)
        if num_charges:
            features = features._replace(x=features.x[:, :-num_charges])
        values = {}
        for name, head in self.property_heads.items():
            assert isinstance(head, OutputModel)
            value = head.per_atom(features, graph)
            if not head.per_atom_output:
                value = head.per_system(head.reduce(value, graph.batch, graph.num_systems), graph)
            values[name] = value
        return values

    def _system_energy(self, features: Features, graph: Graph, contributions: Tensor | None = None) -> Tensor:
        """Summed in float64 and rounded once: totals of many atoms, or of large reference energies, need it."""
        atomic = self._atomic(features, graph, contributions)
        energy = self.output_model.reduce(atomic, graph.batch, graph.num_systems) + self.mean  # (S, 1)
        energy = self.output_model.per_system(energy, graph)
        for prior in self.prior_model or ():
            energy = prior.add_to_systems(energy, graph)
        return energy.to(self.dtype)

    def _atomic(self, features: Features, graph: Graph, contributions: Tensor | None = None) -> Tensor:
        """Contribution of each atom, priors included, (N, 1) in float64 where the device has it.

        Those of the head may have been found already.
        """
        atomic = self.output_model.per_atom(features, graph) if contributions is None else contributions  # (N, 1)
        if features.energy is not None and atomic.shape == features.energy.shape:
            atomic = atomic + features.energy
        atomic = widened(atomic * self.std)
        for prior in self.prior_model or ():
            atomic = prior.add_to_atoms(atomic, graph)
        return atomic
