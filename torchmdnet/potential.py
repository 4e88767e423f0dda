"""The whole potential: representation, head and priors, and ensembles of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError
from torchmdnet.graph import (
    Graph,
    Inputs,
    as_boxes,
    bare_graph,
    count_systems,
    forces_of,
    graph_of_edges,
    sum_to_systems,
)
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features, Pullback, Representation
from torchmdnet.neighbors import can_check, check_finite
from torchmdnet.nn.modules import reset_all
from torchmdnet.ops.inference import outside_modes
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.ops.scatter import widened
from torchmdnet.priors.base import BasePrior
from torchmdnet.stacking import Stack, find_same_edges, moved_copies
from torchmdnet.tracing import is_abstract
from torchmdnet.typing import AtomicNumbers, Boxes, EdgeIndex, EdgeVectors, Positions, SystemIndex, SystemScalars

__all__ = [
    "EdgePrediction",
    "Ensemble",
    "EnsembleOutputs",
    "EnsemblePrediction",
    "Evaluation",
    "Outputs",
    "Prediction",
    "TorchMD_Net",
    "derivatives_of",
    "strained",
    "stress_of",
]

log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What a potential says of a batch; unpacks as ``energy, forces``."""

    energy: Tensor  # (S, 1) in the unit of the training data
    forces: Tensor  # (N, 3) per Å, or empty, (0,), without derivative


class Outputs(NamedTuple):
    """All that a potential was asked for."""

    energy: Tensor  # (S, 1) in the unit of the training data
    forces: Tensor  # (N, 3) per Å, or empty, (0,), without derivative
    stress: Tensor | None  # (S, 3, 3) per Å³; NaN for systems that are not periodic; None unless asked for
    properties: dict[str, Tensor]  # by name, (S, ...) or for values of atoms (N, ...); empty unless asked for


class Evaluation(NamedTuple):
    """What :meth:`TorchMD_Net.evaluate` finds."""

    energy: Tensor  # (S, 1)
    forces: Tensor | None  # (N, 3)
    virial: Tensor | None  # (S, 3, 3) derivative of the energy in the strain
    properties: dict[str, Tensor]
    atomic: Tensor | None  # (N,) contributions that add up to the energy, in float64


class EnsemblePrediction(NamedTuple):
    """Mean and standard deviation over the members of an ensemble."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3) or (0,)
    energy_std: Tensor  # (S, 1)
    forces_std: Tensor  # (N, 3) or (0,)


class EnsembleOutputs(NamedTuple):
    """:class:`Outputs` over the members of an ensemble, means and standard deviations."""

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    properties: dict[str, Tensor]
    energy_std: Tensor
    forces_std: Tensor
    stress_std: Tensor | None
    properties_std: dict[str, Tensor]


class EdgePrediction(NamedTuple):
    """What a potential says of atoms and the edges between them; see :meth:`TorchMD_Net.from_edges`."""

    energy: Tensor  # (S, 1)
    forces: Tensor  # (N, 3), or empty, (0,), without derivative, like the next two
    edge_gradient: Tensor  # (E, 3) derivative of the energy in each edge vector, in the order given
    virial: Tensor  # (S, 3, 3) derivative of the energy in a strain, symmetrised
    stress: Tensor | None  # (S, 3, 3) the virial divided by the volume; None without box
    atomic: Tensor | None  # (N, 1) contributions that add up to the energy; None where it is no sum over atoms
    properties: dict[str, Tensor]  # by name; empty unless asked for


class TorchMD_Net(nn.Module):
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

    mean: Tensor
    std: Tensor
    representation_model: Any  # a Representation, or a module of older releases that returns five results
    output_model: OutputModel
    prior_model: Any  # priors in a ModuleList, or None

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

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters; positions and boxes are expected in it."""
        return self.mean.dtype

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
            energy, values, atomic = self._values(inputs, properties=properties, by_atom=by_atom)
            return Evaluation(energy, None, None, values, atomic)
        if is_abstract():
            return self._evaluate_abstractly(inputs, forces=forces, virial=virial, properties=properties)
        with contextlib.nullcontext() if self.training else cores.for_all():
            return self._evaluate_eagerly(inputs, forces=forces, virial=virial, properties=properties, by_atom=by_atom)

    def _evaluate_eagerly(
        self, inputs: Inputs, *, forces: bool, virial: bool, properties: bool, by_atom: bool
    ) -> Evaluation:
        """:meth:`evaluate` with forces or a virial, where nothing is recorded for later."""
        keep = torch.is_grad_enabled()
        found = self._evaluate_directly(inputs, virial=virial, properties=properties, by_atom=by_atom)
        if found is not None:
            return found if forces else found._replace(forces=None)
        with torch.inference_mode(False), torch.enable_grad():
            pos = inputs.pos
            inner = not pos.requires_grad and (inputs.box is None or not inputs.box.requires_grad)
            if forces and not pos.requires_grad:
                pos = (pos.clone() if pos.is_inference() else pos.detach()).requires_grad_()
            place, box, wanted = pos, inputs.box, [pos] if forces else []
            if virial:
                place, box, strain = strained(pos, inputs.batch, self._box(box), inputs.num_systems)
                wanted.append(strain)
            moved = inputs._replace(pos=place, box=box, inner=inner)
            energy, values, atomic = self._values(moved, properties=properties, by_atom=by_atom)
            slopes = derivatives_of(energy, wanted, differentiable=self.training and keep)
        if not keep:
            energy, values = energy.detach(), {name: value.detach() for name, value in values.items()}
        return Evaluation(
            energy,
            -slopes[0] if forces else None,
            (slopes[-1] + slopes[-1].mT) / 2 if virial else None,
            values,
            None if atomic is None else atomic.detach(),
        )

    def _evaluate_abstractly(self, inputs: Inputs, *, forces: bool, virial: bool, properties: bool) -> Evaluation:
        """:meth:`evaluate` under ``torch.compile`` and ``torch.export``, which follow this form of differentiation."""
        if torch.compiler.is_exporting():
            raise ConfigError(
                "torch.export does not follow derivatives inside a model. Export it with derivative=False and "
                "differentiate the energies of the program, or write a package with forces: torchmd-net export."
            )
        box = self._box(inputs.box)
        num_systems = inputs.num_systems
        if num_systems is None:
            num_systems = 1 if inputs.batch is None else count_systems(inputs.batch, box, inputs.q, inputs.s)
        inputs = inputs._replace(box=box, num_systems=num_systems)

        def energy_of(pos: Tensor, strain: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            place, lattice = (pos, box)
            if virial:
                place, lattice = deformed(pos, inputs.batch, box, strain)
            energy, values, _ = self._values(
                inputs._replace(pos=place, box=lattice), properties=properties, by_atom=False
            )
            return energy.sum(), (energy, values)

        strain = inputs.pos.new_zeros(num_systems, 3, 3)
        (of_pos, of_strain), (energy, values) = torch.func.grad(energy_of, argnums=(0, 1), has_aux=True)(
            inputs.pos, strain
        )
        return Evaluation(
            energy,
            -of_pos if forces else None,
            (of_strain + of_strain.mT) / 2 if virial else None,
            values,
            None,
        )

    def _evaluate_directly(self, inputs: Inputs, *, virial: bool, properties: bool, by_atom: bool) -> Evaluation | None:
        """:meth:`evaluate` with hand-written derivatives, where only forces are needed; None elsewhere."""
        with torch.inference_mode(False), torch.no_grad():
            given = (inputs.pos, inputs.box, inputs.q, inputs.s, *(inputs.extra or {}).values())
            if any(getattr(x, "requires_grad", False) for x in given):
                return None
            encode = self._direct_encoder(inputs.pos)
            if encode is None:
                return None
            return self._evaluate_graph(
                encode, self._graph(inputs), virial=virial, properties=properties, by_atom=by_atom
            )

    def _direct_encoder(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :meth:`torchmdnet.models.base.Representation.direct`; None also where another part has no such thing."""
        head = self.output_model
        is_plain = not self.training and getattr(head, "has_slope", False) and head.reduce_op in ("add", "sum")
        if not is_plain or not isinstance(self.representation_model, Representation):
            return None
        if any(getattr(prior, "needs_positions", True) for prior in self.prior_model or ()):
            return None
        return self.representation_model.direct(like) if can_check(like) and like.shape[0] else None

    def _evaluate_graph(
        self,
        encode: Callable[[Graph], tuple[Features, Pullback]],
        graph: Graph,
        *,
        virial: bool,
        properties: bool,
        by_atom: bool,
    ) -> Evaluation:
        """Energy, derivatives and all else of a graph without history, from an architecture that goes back itself."""
        features, pull_back = encode(graph)
        contributions, slope = self.output_model.value_and_slope(features.x)  # (N, 1), (N, F)
        options: dict[str, Any] = {"properties": properties, "by_atom": by_atom, "contributions": contributions}
        if self.prior_model is None:
            value = self._values_of(features, graph, **options)
            grads = pull_back(slope * self.std)
        else:  # priors may read the edges, and change what the head says
            with torch.enable_grad():
                seen, edges = _with_leaves(graph)
                leaves = [contributions.requires_grad_(), *edges]
                value = self._values_of(features, seen, **options)
                weight, *more = derivatives_of(value[0], leaves, differentiable=False)
            grads = tuple(x + y for x, y in zip(pull_back(slope * weight), more, strict=True))
        return _evaluation(value, *forces_of(graph, *grads, strained=virial))

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
        with torch.inference_mode(False), torch.set_grad_enabled(keep or derivative):
            if derivative and not edge_vec.requires_grad:
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
            )
            features, seen = self.representation_model.select(self.representation_model.encode(graph), graph)
            energy = self._system_energy(features, seen)
            atomic = (
                self._atomic(features, seen) if self.is_sum_of_atoms and seen.num_atoms == graph.num_atoms else None
            )
            values = self._properties(features, seen) if properties else {}
            if not derivative:
                nothing = edge_vec.new_empty(0)
                return EdgePrediction(energy, nothing, nothing, nothing, None, atomic, values)
            differentiable = self.training and keep
            (slope,) = derivatives_of(energy, [edge_vec], differentiable=differentiable)  # (E, 3)
            i, j = edge_index.long()
            forces = slope.new_zeros(graph.num_atoms, 3).index_add(0, i, -slope).index_add(0, j, slope)
            virial = edge_vec[:, :, None] * slope[:, None, :]  # (E, 3, 3)
            virial = slope.new_zeros(graph.num_systems, 3, 3).index_add(0, graph.batch[i], (virial + virial.mT) / 2)
            box = as_boxes(box, graph.num_systems, slope.dtype, slope.device)
            stress = None if box is None else stress_of(virial, box)
        if not differentiable:
            energy, forces, virial = energy.detach(), forces.detach(), virial.detach()
            stress = None if stress is None else stress.detach()
            atomic = None if atomic is None else atomic.detach()
            values = {name: value.detach() for name, value in values.items()}
        return EdgePrediction(energy, forces, slope, virial, stress, atomic, values)

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

    def _box(self, box: Boxes | None) -> Boxes | None:
        """The box of a call, or the one the model carries."""
        if box is None:
            distance = getattr(self.representation_model, "distance", None)
            return getattr(distance, "stored_box", None)
        return box

    def _values(
        self, inputs: Inputs, *, properties: bool, by_atom: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Energy (S, 1), properties by name, and with ``by_atom`` the contributions of the atoms (N,)."""
        return self._values_of(*self._features(inputs), properties=properties, by_atom=by_atom)

    def _values_of(
        self,
        features: Features,
        graph: Graph,
        *,
        properties: bool,
        by_atom: bool,
        contributions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        values = self._properties(features, graph) if properties else {}
        if not by_atom:
            return self._system_energy(features, graph, contributions), values, None
        atomic = self._atomic(features, graph, contributions)[:, 0]  # (N,)
        return sum_to_systems(atomic, graph)[:, None], values, atomic

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

    @property
    def is_sum_of_atoms(self) -> bool:
        """Whether the output is the plain sum of :meth:`per_atom`, with nothing added to a system as a whole."""
        head = self.output_model
        parts = [(head, OutputModel, ("reduce", "per_system", "post_reduce"))]
        parts += [(prior, BasePrior, ("per_system", "post_reduce")) for prior in self.prior_model or ()]
        is_plain = all(
            getattr(type(part), name, None) is getattr(base, name) for part, base, names in parts for name in names
        )
        return is_plain and head.reduce_op in ("add", "sum") and not bool(self.mean)

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

    def _graph(self, inputs: Inputs) -> Graph:
        """The edges that the architecture works on."""
        z, pos, batch, box, q, s, extra, num_systems, search, inner = inputs
        found_by = {} if search is None else {"search": search}
        graph = self.representation_model.graph(
            z, pos, batch, box, q, s, num_systems=num_systems, extra=extra, **found_by
        )
        return graph._replace(inner=inner)

    def _features(self, inputs: Inputs) -> tuple[Features, Graph]:
        model = self.representation_model
        if hasattr(model, "encode"):
            graph = self._graph(inputs)
            return model.select(model.encode(graph), graph)
        z, pos, batch, box, q, s, extra, num_systems, *_ = inputs
        # an architecture written for older releases: no graph, five results
        check_finite("pos", pos, "atom")
        batch = torch.zeros_like(z) if batch is None else batch
        x, v, z, pos, system = model(z, pos, batch, box=box, q=q, s=s)
        energy = getattr(model, "extra_energy", None)
        graph = bare_graph(z, pos, system, box, extra, num_systems)
        return Features(x, v, energy), graph._replace(q=None if q is None else q.reshape(-1).to(pos.dtype))


def strained(
    pos: Positions, batch: SystemIndex | None, box: Boxes | None, num_systems: int | None
) -> tuple[Positions, Boxes | None, Tensor]:
    r"""Positions and lattice vectors under a strain of each system, :math:`r \to r (1 + \varepsilon)`.

    Returns:
        Positions, box, and the strain :math:`\varepsilon` (S, 3, 3), zero, to differentiate in.
    """
    if num_systems is None:
        num_systems = 1 if batch is None else int(batch.max()) + 1 if batch.numel() else 0
    strain = pos.new_zeros(num_systems, 3, 3).requires_grad_()
    return *deformed(pos, batch, box, strain), strain


def deformed(
    pos: Positions, batch: SystemIndex | None, box: Boxes | None, strain: Tensor
) -> tuple[Positions, Boxes | None]:
    """Positions and lattice vectors under a strain of each system, (S, 3, 3)."""
    deformation = torch.eye(3, dtype=pos.dtype, device=pos.device) + strain  # (S, 3, 3)
    of_atom = deformation.expand(pos.shape[0], 3, 3) if batch is None else deformation.index_select(0, batch.long())
    box = as_boxes(box, strain.shape[0], pos.dtype, pos.device)
    return torch.einsum("nk,nkl->nl", pos, of_atom), None if box is None else box @ deformation


def stress_of(virial: Tensor, box: Boxes | None) -> Tensor:
    """Divide derivatives in the strain (S, 3, 3) by the volumes; NaN for systems without three lattice vectors.

    Raises:
        ValueError: If no system has three lattice vectors.
    """
    volume = virial.new_zeros(1) if box is None else torch.linalg.det(box.to(virial.dtype)).abs().reshape(-1)
    has_volume = (volume > 0).expand(virial.shape[0])[:, None, None]  # (S, 1, 1)
    if not is_abstract() and virial.shape[0] and not bool(has_volume.any()):
        raise ValueError(
            "stress: no system of the batch has three lattice vectors, so there is no volume to refer to. Pass box, or "
            "ask without stress."
        )
    return torch.where(has_volume, virial / torch.where(volume > 0, volume, 1.0)[:, None, None], torch.nan)


def derivatives_of(energy: Tensor, wanted: list[Tensor], *, differentiable: bool) -> list[Tensor]:
    """Gradients of the summed energies; zero in what they do not depend on."""
    if not energy.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    found = torch.autograd.grad(
        [energy.sum()], wanted, create_graph=differentiable, retain_graph=differentiable, allow_unused=True
    )
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(wanted, found, strict=True)]


def _with_leaves(graph: Graph) -> tuple[Graph, list[Tensor]]:
    """The same graph as a function of the vectors of its edges and the distances of its pairs."""
    assert graph.pairs is not None
    vec, dist = graph.edge_vec.detach().requires_grad_(), graph.pairs.dist.detach().requires_grad_()
    edge_dist = dist.index_select(0, graph.pairs.of_edge)
    return graph._replace(edge_vec=vec, edge_dist=edge_dist, pairs=graph.pairs._replace(dist=dist)), [vec, dist]


def _evaluation(
    value: tuple[Tensor, dict[str, Tensor], Tensor | None], forces: Tensor, virial: Tensor | None
) -> Evaluation:
    """Results without history."""
    energy, values, atomic = value
    return Evaluation(
        energy.detach(),
        forces,
        None if virial is None else (virial + virial.mT) / 2,
        {name: value.detach() for name, value in values.items()},
        None if atomic is None else atomic.detach(),
    )


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
        first = self.members[0].representation_model
        with torch.inference_mode(False), torch.enable_grad():
            if self._stack is None:
                self._stack = Stack([model.representation_model for model in self.members])
            z, pos, batch, box, q, s, extra, num_systems, search, _ = inputs
            pos = pos.clone() if pos.is_inference() else pos.detach()
            box = self.members[0]._box(box)
            graph = first.graph(z, pos, batch, box, q, s, num_systems=num_systems, extra=extra, search=search)
            goes_back = self.members[0]._direct_encoder(graph.pos) is not None  # which is quicker still
            if self._stack.wants(graph) and not goes_back:
                found = self._batched(graph, self._stack, virial=virial, properties=properties, by_atom=by_atom)
            else:
                found = self._in_turn(graph, virial=virial, properties=properties, by_atom=by_atom)
        return [one if forces else one._replace(forces=None) for one in found]

    def _share_edges(self) -> bool:
        models = [model.representation_model for model in self.members]
        return len(models) > 1 and not any(model.training for model in self.members) and find_same_edges(models)

    def _batched(
        self, graph: Graph, stack: Stack, *, virial: bool, properties: bool, by_atom: bool
    ) -> list[Evaluation]:
        """All members at once; each has positions of its own, so that one differentiation serves all."""
        copies = moved_copies(graph, len(self), strained=virial)
        values = [
            model._values_of(
                *model.representation_model.select(features, moved), properties=properties, by_atom=by_atom
            )
            for model, features, moved in zip(self.members, stack.encode(graph, copies), copies.graphs, strict=True)
        ]
        total = torch.stack([energy.sum() for energy, _, _ in values])
        wanted = [copies.pos] + ([] if copies.strain is None else [copies.strain])
        slopes = derivatives_of(total, wanted, differentiable=False)
        return [_evaluation(value, -slopes[0][m], slopes[1][m] if virial else None) for m, value in enumerate(values)]

    def _in_turn(self, graph: Graph, *, virial: bool, properties: bool, by_atom: bool) -> list[Evaluation]:
        """One member after the other, on copies of one graph that are differentiated and dropped."""
        found = []
        for model in self.members:
            encode = model._direct_encoder(graph.pos)
            if encode is not None:
                with torch.no_grad():
                    options = {"virial": virial, "properties": properties, "by_atom": by_atom}
                    found.append(model._evaluate_graph(encode, graph, **options))
                continue
            copies = moved_copies(graph, 1, strained=virial)
            (moved,) = copies.graphs
            features, seen = model.representation_model.select(model.representation_model.encode(moved), moved)
            value = model._values_of(features, seen, properties=properties, by_atom=by_atom)
            wanted = [copies.pos] + ([] if copies.strain is None else [copies.strain])
            slopes = derivatives_of(value[0], wanted, differentiable=False)
            found.append(_evaluation(value, -slopes[0][0], slopes[1][0] if virial else None))
        return found

    def check_properties(self) -> None:
        """Refuse to average properties that not all members predict."""
        names = [set(model.property_heads) for model in self.members]
        if any(others != names[0] for others in names):
            told = "; ".join(", ".join(sorted(others)) or "none" for others in names)
            raise ValueError(f"properties: the members of the ensemble predict different ones ({told}).")
