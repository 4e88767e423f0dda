"""The whole potential: representation, head and priors, and the derivatives of their energy."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.energy import EnergyModel
from torchmdnet.forces import (
    Slopes,
    derivatives_of,
    detached,
    forces_of,
    slope_of_guard,
    slopes_of_edges,
    stress_of,
    with_leaves,
)
from torchmdnet.graph import Graph, Inputs, as_boxes, graph_of_edges, in_pairs
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features, Pullback, Representation, guarded
from torchmdnet.nn.modules import reset_all
from torchmdnet.ops.inference import outside_modes
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.predictions import EdgePrediction, Evaluation, Outputs, Prediction, Values
from torchmdnet.priors.base import BasePrior
from torchmdnet.tracing import is_abstract, is_traced
from torchmdnet.typing import AtomicNumbers, Boxes, EdgeIndex, EdgeVectors, Positions, SystemIndex, SystemScalars
from torchmdnet.whole_calls import evaluate_abstractly, evaluate_without_graph

__all__ = ["EdgePrediction", "Evaluation", "Outputs", "Prediction", "TorchMD_Net"]

log = logging.getLogger(__name__)


class TorchMD_Net(EnergyModel):
    """A representation, an output head and priors.

    Args:
        representation_model: Architecture, see :class:`torchmdnet.models.base.Representation`.
        output_model: Head, see :class:`torchmdnet.heads.base.OutputModel`.
        prior_model: One prior or several, see :class:`torchmdnet.priors.base.BasePrior`.
        mean: Added to each system after the reduction over atoms; 0 by default.
        std: Multiplies the per-atom output of the head, before priors; 1 by default.
        derivative: Whether calls return forces, the negative gradient of the output, too.
        dtype: Precision of the parameters.
        property_heads: Heads of what is predicted beside the output, by name. They read the same features.
    """

    def __init__(
        self,
        representation_model: nn.Module,
        output_model: OutputModel,
        prior_model: BasePrior | Iterable[BasePrior] | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        derivative: bool = False,
        dtype: torch.dtype = torch.float32,
        property_heads: Mapping[str, OutputModel] | None = None,
    ) -> None:
        super().__init__()
        self.representation_model = representation_model.to(dtype=dtype)
        self.output_model = output_model.to(dtype=dtype)
        priors = [prior_model] if isinstance(prior_model, nn.Module) else list(prior_model or [])
        if priors and not self.output_model.allow_prior_model:
            log.warning(
                "The output model %s does not allow prior models; dropping %s.",
                type(self.output_model).__name__,
                ", ".join(type(prior).__name__ for prior in priors),
            )
            priors = []
        self.prior_model = nn.ModuleList(priors).to(dtype=dtype) if priors else None
        self.property_heads = nn.ModuleDict(property_heads or {}).to(dtype=dtype)
        self.derivative = derivative
        #: What the file this model was loaded from says of it: options, and facts about the data such as units.
        self.hyper_parameters: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {}
        self.register_buffer("mean", torch.scalar_tensor(0) if mean is None else mean)
        self.register_buffer("std", torch.scalar_tensor(1) if std is None else std)
        self.mean, self.std = self.mean.to(dtype), self.std.to(dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all weights."""
        reset_all(
            self.representation_model, self.output_model, *(self.prior_model or ()), *self.property_heads.values()
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` reads; see :func:`torchmdnet.scripting.scriptable_potential`."""
        from torchmdnet.scripting import scriptable_potential

        return scriptable_potential(self)

    @outside_modes
    def forward(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
        *,
        stress: bool = False,
        properties: bool = False,
    ) -> Prediction | Outputs:
        r"""Energies, and forces if ``derivative`` is set, of a batch of systems.

        Args:
            z: Atomic numbers, (N,).
            pos: Positions, (N, 3) Å, in the precision of the model.
            batch: System of each atom, (N,); None is one system.
            box: Lattice vectors as rows, (3, 3) shared or (S, 3, 3) Å; a zero row is an open direction.
            q: Total charge of each system, (S,) e.
            s: Spin of each system, (S,).
            extra_args: Per-atom or per-system tensors for heads and priors, by name.
            num_systems: Number of systems S; None reads it from ``batch``.
            stress: Whether to return the stress too, :math:`\frac1V \partial E / \partial \varepsilon` of a
                homogeneous strain, symmetrised; positive under tension, as in ASE.
            properties: Whether to return the values of the property heads too.

        Returns:
            Energy (S, 1) and forces (N, 3), or (0,) without derivative. If ``stress`` or ``properties`` is set they
            are followed by both, see :class:`Outputs`. In training mode forces and stress can be differentiated again.

        Raises:
            ValueError: If a shape or precision does not fit, an element lies outside the embedding, a number is not
                finite or two atoms are less than 1e-5 of the cutoff apart (on a GPU, and where the call is recorded or
                compiled, the results of that system are NaN), or the stress is asked for and no system has three
                lattice vectors.
        """
        if pos.dtype != self.dtype and not is_abstract():
            raise ValueError(
                f"pos is {pos.dtype}, but the model computes in {self.dtype}. Pass pos.to(model.dtype), or load the "
                "model with precision=64 or 32."
            )
        inputs = Inputs(z, pos, batch, box, q, s, extra_args, num_systems)
        if not (self.derivative or stress or properties):
            return Prediction(self._system_energy(*self._features(inputs)), pos.new_empty(0))
        found = self.evaluate(inputs, forces=self.derivative, virial=stress, properties=properties)
        forces = pos.new_empty(0) if found.forces is None else found.forces
        if not (stress or properties):
            return Prediction(found.energy, forces)
        tensor = None if found.virial is None else stress_of(found.virial, self._box(box))
        return Outputs(found.energy, forces, tensor, found.properties)

    @outside_modes
    def evaluate(
        self,
        inputs: Inputs,
        *,
        forces: bool = True,
        virial: bool = False,
        properties: bool = False,
        by_atom: bool = False,
    ) -> Evaluation:
        """The core of :meth:`forward`: the energy, its derivatives and all else, from one pass over the atoms.

        Args:
            inputs: The arguments of :meth:`forward`.
            forces: Whether to differentiate in the positions.
            virial: Whether to differentiate in a strain of positions and lattice vectors.
            properties: Whether to ask the property heads.
            by_atom: Sum the energy in float64 from the contributions of the atoms, and return these; for potentials
                whose :attr:`is_sum_of_atoms` holds.
        """
        if not (forces or virial):
            features, graph = self._features(inputs)
            values = self._values_of(features, graph, properties=properties, by_atom=by_atom)
            return Evaluation(values.energy, None, None, values.properties, values.atomic)
        if is_abstract():
            return evaluate_abstractly(self, inputs, forces=forces, virial=virial, properties=properties)
        options = {"properties": properties, "by_atom": by_atom}
        keep, threads = torch.is_grad_enabled(), contextlib.nullcontext() if self.training else cores.for_all()
        with torch.inference_mode(False), torch.set_grad_enabled(keep), threads:
            if not hasattr(self.representation_model, "encode"):
                return evaluate_without_graph(self, inputs, forces=forces, virial=virial, **options)
            if not keep:
                box = None if inputs.box is None else inputs.box.detach()
                inputs = inputs._replace(pos=inputs.pos.detach(), box=box)
            found = self.evaluate_graph(self._graph(inputs), virial=virial, **options)
        return found if forces else found._replace(forces=None)

    def evaluate_graph(
        self, graph: Graph, *, virial: bool = False, properties: bool = False, by_atom: bool = False
    ) -> Evaluation:
        """:meth:`evaluate` with forces, of a graph. The other arguments are those of that method."""
        values, slopes = self.energy_and_slopes(graph, strained=virial, properties=properties, by_atom=by_atom)
        forces, strain = forces_of(graph, slopes, strained=virial)
        return Evaluation(values.energy, forces, strain, values.properties, values.atomic)

    def energy_and_slopes(
        self,
        graph: Graph,
        *,
        strained: bool = False,
        properties: bool = False,
        by_atom: bool = False,
        has_positions: bool = True,
    ) -> tuple[Values, Slopes]:
        """Energies of a graph and their derivatives in its edges, for :func:`torchmdnet.forces.forces_of`.

        Where the architecture has a hand-written derivative, see
        :meth:`torchmdnet.models.base.Representation.direct`, only the head and the priors are differentiated by
        autograd. In training the slopes can be differentiated again.

        Args:
            graph: What ``representation_model.graph`` makes. Nothing in it is changed.
            strained: Whether the slopes are to hold all that a virial needs.
            properties: Whether to ask the property heads.
            by_atom: See :meth:`evaluate`.
            has_positions: Whether there are positions; a graph that was made of a list of edges has none.
        """
        keep = torch.is_grad_enabled()
        encode = self._direct_encoder(graph, keep)
        if encode is not None:
            with torch.no_grad():
                return self._energy_and_slopes_of(encode, graph, strained, properties=properties, by_atom=by_atom)
        with torch.enable_grad():
            moved, leaves = with_leaves(graph, has_positions=has_positions, strained=strained)
            values = self._values_of(*self._encoded(moved), properties=properties, by_atom=by_atom)
            slopes = derivatives_of(values.energy, leaves, differentiable=self.training and keep)
        return values if keep else values.detached(), Slopes(*slopes)

    def _direct_encoder(self, graph: Graph, keep: bool) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :meth:`torchmdnet.models.base.Representation.direct`; None also where more than slopes are wanted."""
        given = (graph.pos, graph.edge_vec, graph.box, graph.q, graph.s, *graph.extra.values())
        is_followed = keep and any(x is not None and x.requires_grad for x in given)
        is_known = isinstance(self.representation_model, Representation) and graph.num_atoms > 0 and in_pairs(graph)
        if self.training or is_followed or not is_known or is_traced():
            return None
        return self.representation_model.direct(graph.pos)

    def _energy_and_slopes_of(
        self, encode: Callable[[Graph], tuple[Features, Pullback]], graph: Graph, strained: bool, **options: bool
    ) -> tuple[Values, Slopes]:
        """:meth:`energy_and_slopes` where the architecture goes back from its features by itself."""
        features, pull_back = encode(graph)
        features = guarded(features, graph)
        head = self.output_model
        known = slope = None
        if getattr(head, "has_slope", False):
            known, slope = head.value_and_slope(features.x)  # (N, 1), (N, F)
            if self.prior_model is None and head.reduce_op in ("add", "sum"):
                values = self._values_of(features, graph, contributions=known, **options)
                return values, Slopes(*pull_back(slope * self.std), pos=slope_of_guard(graph))
        with torch.enable_grad():
            moved, leaves = with_leaves(graph, strained=strained)
            known = None if known is None else known.requires_grad_()
            x, v, S = (None if y is None else y.detach().requires_grad_() for y in (features.x, features.v, features.S))
            assert x is not None
            values = self._values_of(features._replace(x=x, v=v, S=S), moved, contributions=known, **options)
            of_known, of_x, of_v, of_S, *others = derivatives_of(values.energy, (known, x, v, S, *leaves))
        if slope is not None and of_known is not None:
            of_x = slope * of_known
        of_x = torch.zeros_like(x) if of_x is None else of_x
        return values.detached(), Slopes(*pull_back(of_x, of_v, of_S), pos=slope_of_guard(graph)).plus(Slopes(*others))

    @outside_modes
    def from_edges(
        self,
        z: AtomicNumbers,
        edge_index: EdgeIndex,
        edge_vec: EdgeVectors,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
        *,
        derivative: bool | None = None,
        properties: bool = False,
    ) -> EdgePrediction:
        r"""Energies, forces, virials and contributions of atoms, from edges that an engine found.

        Simulation engines bring their own neighbour lists, over domains and periodic images. Forces and virials follow
        from the derivative in each edge vector,

        .. math::
            F_i = \sum_{e: j \to i} -g_e + \sum_{e: i \to j} g_e, \qquad
            \partial E / \partial \varepsilon = \sum_e d_e \otimes g_e, \qquad g_e = \partial E / \partial d_e .

        Args:
            z: Atomic numbers, (N,).
            edge_index: (2, E) in any order; row 0 receives (i), row 1 sends (j). What a list is usually made of, every
                pair in both directions, gives what :meth:`forward` gives; an edge without partner counts in its own
                direction only, as for atoms of a neighbouring domain that are looked at but not computed.
            edge_vec: ``pos[i] - pos[j]``, image shift included, (E, 3) Å. Edges beyond the cutoff are left out, those
                within it have to be complete. If it requires a gradient, the energy can be differentiated in it.
            batch: System of each atom, (N,); None is one system.
            box: Lattice vectors, (3, 3) or (S, 3, 3) Å, for the stress alone.
            q: See :meth:`forward`.
            s: See :meth:`forward`.
            extra_args: See :meth:`forward`.
            num_systems: See :meth:`forward`.
            derivative: Whether to differentiate; None does as the model is set to.
            properties: Whether to return the values of the property heads too.

        Raises:
            ValueError: If a shape does not fit, or a part of the model needs positions, or pairs beyond the cutoff.
        """
        architecture = self._check_edges_suffice(properties)
        architecture.check_elements(z)
        derivative = self.derivative if derivative is None else derivative
        keep = torch.is_grad_enabled()
        is_followed, differentiable = keep and edge_vec.requires_grad, keep and self.training
        with torch.inference_mode(False), torch.set_grad_enabled(keep or derivative):
            if derivative and not is_followed:
                edge_vec = (edge_vec.clone() if edge_vec.is_inference() else edge_vec.detach()).requires_grad_()
            graph = graph_of_edges(
                z,
                edge_index,
                edge_vec,
                batch,
                q,
                s,
                cutoff_upper=architecture.cutoff_upper,
                cutoff_lower=architecture.cutoff_lower,
                loop=architecture.distance.loop,
                num_systems=num_systems,
                extra=extra_args,
                max_z=architecture.max_z,
            )
        asked: dict[str, Any] = {"properties": properties, "by_atom": self.is_sum_of_atoms}
        with torch.inference_mode(False), torch.set_grad_enabled(keep):
            if derivative:
                known = graph if is_followed else detached(graph)
                values, slopes = self.energy_and_slopes(known, has_positions=False, **asked)
                gradient = slopes_of_edges(edge_vec, graph, slopes)  # (E, 3)
                forces, virial = forces_of(known, slopes, strained=True)
                assert virial is not None
                values = values if differentiable else values.detached()
            else:
                values = self._values_of(*self._encoded(graph), **asked)
                gradient = forces = virial = edge_vec.new_empty(0)
            box = as_boxes(box, graph.num_systems, virial.dtype, virial.device)
            stress = stress_of(virial, box) if derivative and box is not None else None
        atomic = None if values.atomic is None else values.atomic[:, None]
        return EdgePrediction(
            values.energy.to(self.dtype),
            forces if differentiable else forces.detach(),
            gradient if differentiable else gradient.detach(),
            virial if differentiable else virial.detach(),
            stress if stress is None or differentiable else stress.detach(),
            None if atomic is None or atomic.shape[0] != graph.num_atoms else atomic,
            values.properties,
        )

    def _check_edges_suffice(self, properties: bool) -> Any:
        """The architecture inside its wrappers, if it and all other parts can do without positions.

        Raises:
            ValueError: Naming the part that cannot.
        """
        parts = [self.output_model, *(self.prior_model or ()), *(self.property_heads.values() if properties else ())]
        for part in parts:
            if getattr(part, "needs_positions", True) or getattr(part, "depends_on_images", False):
                raise ValueError(
                    f"from_edges: {type(part).__name__} needs the positions of the atoms, or pairs further apart than "
                    "the edges of the network. Call the model with positions."
                )
        architecture = self.representation_model
        while not hasattr(architecture, "check_elements") and hasattr(architecture, "model"):
            architecture = architecture.model
        if not hasattr(architecture, "encode"):
            raise ValueError(
                f"from_edges: {type(architecture).__name__} has no encode(graph), so it finds its edges itself. Call "
                "the model with positions."
            )
        return architecture

    @outside_modes
    def per_atom(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
    ) -> Tensor:
        """Contribution of each atom, per-atom priors included, (N, 1); takes the arguments of :meth:`forward`.

        The contributions add up to the output where :attr:`is_sum_of_atoms` holds.
        """
        inputs = Inputs(z, pos, batch, box, q, s, extra_args, num_systems)
        return self._atomic(*self._features(inputs)).to(self.dtype)
