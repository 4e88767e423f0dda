"""Potentials whose arithmetic, derivatives included, goes through ``torch.compile``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.errors import DataError
from torchmdnet.forces import Slopes, derivatives_of, forces_of, with_leaves
from torchmdnet.graph import Graph, Inputs, Pairs, sum_to_systems
from torchmdnet.models.base import Representation
from torchmdnet.neighbors import CLOSEST, apart, length, not_a_number
from torchmdnet.potential import TorchMD_Net
from torchmdnet.predictions import Evaluation
from torchmdnet.priors.base import BasePrior
from torchmdnet.recording import Recorded, needs_compiler, record
from torchmdnet.tracing import device_kind

__all__ = ["CompiledPotential", "compiled"]

log = logging.getLogger(__name__)

#: Deviation from the plain model, relative to the largest number, with which a compiled one is used.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


def compiled(model: nn.Module) -> nn.Module:
    """A model that shares its parts with ``model`` and compiles the work on them, for any number of atoms and edges.

    Neighbours are searched as before. A model other than :class:`torchmdnet.potential.TorchMD_Net` is compiled as a
    whole.
    """
    if isinstance(model, TorchMD_Net):
        return CompiledPotential(model)
    return torch.compile(model, dynamic=True)  # type: ignore[return-value]


class _Kind(NamedTuple):
    """What a program is made for."""

    training: bool
    is_single: bool  # one system
    has_q: bool
    has_s: bool
    properties: bool
    by_atom: bool
    dtype: torch.dtype
    device: torch.device
    radial: tuple[Any, ...]  # grids of the radial filters
    weights: tuple[int, ...]  # where those are that a program for evaluation holds on to


class CompiledPotential(TorchMD_Net):
    """A potential that records the energy and its gradient as one function of the edges, and has that compiled.

    A program is made on the first call of each kind: for training and for evaluation, one system and several, with and
    without charges; one for evaluation is made again when weights or grids are replaced. Each is compared with the
    plain model once, in training with its gradients too. Where none can be made, or it gives other numbers, the
    uncompiled model is used from then on, and a warning is logged. Priors that search for pairs themselves are not
    compiled.

    Args:
        model: The potential; whether it is in training decides what is made.
        operators: Whether programs call the compiled loops along edges, or leave everything to the compiler.
        backend: What ``torch.compile`` makes code with.
    """

    plain: TorchMD_Net

    def __init__(self, model: TorchMD_Net, *, operators: bool = True, backend: str = "inductor") -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._modules = dict(model._modules)
        #: Priors that look for pairs themselves.
        self.beyond = [prior for prior in model.prior_model or () if prior.needs_positions]
        self.operators, self.backend = operators, backend
        self.programs: dict[_Kind, Any] = {}
        #: Weights that programs for evaluation hold on to, whose addresses no other weights may come to have.
        self.kept: list[Tensor] = []
        self.is_given_up = False
        self.__dict__["plain"] = model  # no part, but what this is another form of

    def evaluate(
        self,
        inputs: Inputs,
        *,
        forces: bool = True,
        virial: bool = False,
        properties: bool = False,
        by_atom: bool = False,
    ) -> Evaluation:
        """See :meth:`torchmdnet.potential.TorchMD_Net.evaluate`."""
        options = {"forces": forces, "virial": virial, "properties": properties, "by_atom": by_atom}
        if not self.is_given_up:
            keep = torch.is_grad_enabled() and self.plain.training
            try:
                self._expect_no_obstacle()
                with torch.inference_mode(False), torch.set_grad_enabled(keep):
                    found = self._evaluate(inputs, **options)
            except DataError:  # of the structure, which the plain model refuses too
                raise
            except Exception as error:  # whatever the compiler raises, the plain model is there
                self.is_given_up = True
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                log.warning("compile: failed (%s); going on without.", reason)
            else:
                if found is not None:
                    return found
        return self.plain.evaluate(inputs, **options)

    def _expect_no_obstacle(self) -> None:
        if not hasattr(self.representation_model, "encode"):
            raise ValueError(f"{type(self.representation_model).__name__} has no encode(graph)")
        for prior in self.beyond:
            changes = type(prior).pre_reduce, type(prior).post_reduce
            if changes != (BasePrior.pre_reduce, BasePrior.post_reduce):
                raise ValueError(f"{type(prior).__name__} does more than add a term")
        if self.beyond and self.output_model.reduce_op not in ("add", "sum"):
            raise ValueError(f"priors are reduced by {self.output_model.reduce_op}")

    def _evaluate(
        self, inputs: Inputs, *, forces: bool, virial: bool, properties: bool, by_atom: bool
    ) -> Evaluation | None:
        """The answer of a program; None for systems too small for one."""
        inputs = inputs._replace(pos=inputs.pos.clone() if inputs.pos.is_inference() else inputs.pos.detach())
        inputs = inputs._replace(box=self._box(inputs.box))
        with torch.no_grad():
            graph = self._graph(inputs)
        assert graph.pairs is not None
        if min(graph.num_atoms, graph.pairs.atoms.shape[1], 2 * graph.num_systems) < 2:
            return None
        training = torch.is_grad_enabled()
        kind = _Kind(
            training,
            graph.num_systems == 1,
            graph.q is not None,
            graph.s is not None,
            properties,
            by_atom,
            graph.pos.dtype,
            graph.pos.device,
            self._grids(graph, training),
            () if training else tuple(x.data_ptr() for x in self._weights().values()),
        )
        arguments = _arguments(graph)
        plain = None
        if kind not in self.programs:
            plain = self.plain.evaluate(inputs, virial=virial, properties=properties, by_atom=by_atom)  # makes grids
            kind = kind._replace(radial=self._grids(graph, training))
            log.info("Compiling the model for %s; this takes minutes.", "training" if training else "evaluation")
            if self.backend == "inductor" and kind.device.type == "cpu":
                needs_compiler("compile")
            self.programs[kind] = self._program(kind, arguments, graph)
            self.kept.extend(() if training else [x.detach() for x in self._weights().values()])
        weights = (self._weights(),) if training else ()
        energy, slope, slope_of_pos, values, atomic = self.programs[kind](*weights, *arguments.values())
        names = list(self.property_heads) if properties else []
        found = self._assemble(graph, arguments, energy, slope, slope_of_pos, virial=virial)
        found = found._replace(properties=dict(zip(names, values, strict=True)), atomic=atomic if by_atom else None)
        if self.beyond:
            found = self._with_priors(found, graph, virial=virial)
        if plain is not None:
            _expect_agreement(found, plain)
            if training:  # through another call: a compiled program is differentiated once
                again = self._evaluate(inputs, forces=True, virial=virial, properties=properties, by_atom=by_atom)
                assert again is not None
                _expect_same_gradients(again, plain, [x for x in self.parameters() if x.requires_grad])
        return found if forces else found._replace(forces=None)

    def _grids(self, graph: Graph, training: bool) -> tuple[Any, ...]:
        """Have the grids of radial filters ready that the graph takes."""
        assert graph.pairs is not None
        radial = (module.radial for module in self.modules() if isinstance(module, Representation))
        return tuple(engine.choose_again(graph.pairs.dist, training) for engine in radial)

    def _weights(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _program(self, kind: _Kind, arguments: dict[str, Tensor], graph: Graph) -> Any:
        """Record and compile the function of one kind of call."""
        step = _Step(self, kind, list(arguments))

        def of_weights(weights: dict[str, Tensor], *tensors: Tensor) -> Any:
            with _replaced(self, weights):
                return step(*tensors)

        axes = {name: dict(_AXES[name]) for name in arguments}
        if kind.is_single:
            axes = {
                name: {axis: size for axis, size in sizes.items() if size != "systems"} for name, sizes in axes.items()
            }
        recorded = [Recorded(value, axes[name]) for name, value in arguments.items()]
        if kind.training:
            graph_module = record(of_weights, recorded, self._weights(), operators=self.operators)
        else:
            graph_module = record(step, recorded, operators=self.operators)
        program = torch.compile(graph_module, backend=self.backend)

        def call(*args: Any) -> Any:
            for tensor, sizes in zip(args[-len(axes) :], axes.values(), strict=True):
                for axis in sizes:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
            return program(*args)

        return call

    def _assemble(
        self,
        graph: Graph,
        arguments: dict[str, Tensor],
        energy: Tensor,
        slope: Tensor,
        slope_of_pos: Tensor | None,
        *,
        virial: bool,
    ) -> Evaluation:
        """Forces and virial from the derivatives in the vectors of pairs, (P, 3), and in positions."""
        slopes, pairs = Slopes(vec=slope), graph._replace(edge_index=arguments["atoms"], edge_vec=arguments["vec"])
        if slope_of_pos is not None:
            of_strain = sum_to_systems(graph.pos[:, :, None] * slope_of_pos[:, None, :], graph)
            slopes = slopes._replace(pos=slope_of_pos, strain=of_strain)
        forces, strain = forces_of(pairs._replace(pairs=None), slopes, strained=virial)
        return Evaluation(energy, forces, strain, {}, None)

    def _with_priors(self, found: Evaluation, graph: Graph, *, virial: bool) -> Evaluation:
        """Add the priors that look for pairs themselves."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            moved, leaves = with_leaves(graph, strained=virial)
            of_atoms = moved.pos.new_zeros(graph.num_atoms, 1).double()
            of_systems = moved.pos.new_zeros(graph.num_systems, 1).double()
            for prior in self.beyond:
                of_atoms, of_systems = prior.add_to_atoms(of_atoms, moved), prior.add_to_systems(of_systems, moved)
            energy = of_systems + sum_to_systems(of_atoms, graph)
            slopes = Slopes(*derivatives_of(energy, leaves, differentiable=differentiable))
        if not differentiable:
            energy, of_atoms = energy.detach(), of_atoms.detach()
        forces, strain = forces_of(graph, slopes, strained=virial)
        return found._replace(
            energy=(found.energy + energy).to(found.energy.dtype),
            forces=None if found.forces is None else found.forces + forces,
            virial=None if found.virial is None or strain is None else found.virial + strain,
            atomic=found.atomic + of_atoms[:, 0].to(found.atomic.dtype) if found.atomic is not None else None,
        )


class _Step(nn.Module):
    """What is recorded: from vectors of pairs to the energy and its derivatives."""

    def __init__(self, potential: CompiledPotential, kind: _Kind, names: list[str]) -> None:
        super().__init__()
        self.potential, self.kind, self.names = potential, kind, names

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        potential, kind = self.potential, self.kind
        priors = [prior for prior in potential.plain.prior_model or () if not prior.needs_positions]
        potential._modules["prior_model"] = nn.ModuleList(priors) if priors else None
        try:
            return self._values(potential, kind, tensors)
        finally:
            potential._modules["prior_model"] = potential.plain.prior_model

    def _values(self, potential: CompiledPotential, kind: _Kind, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        pos, vec = given["pos"].detach(), given["vec"].detach()
        loop = bool(potential.representation_model.distance.loop)
        with torch.enable_grad():
            wanted = [vec.requires_grad_(), pos.requires_grad_()]
            rows = torch.cat([vec, vec.new_zeros(1, 3)]) if loop else vec
            dist, guard = length(rows), None
            if device_kind(pos) != "cpu":  # where they were looked at before
                dist = apart(rows, dist, CLOSEST * float(potential.representation_model.distance.cutoff_upper))
                guard = not_a_number(pos, given["batch"], given["systems"].shape[0], given.get("q"), given.get("s"))
            pairs = Pairs(given["atoms"], dist, given["of_edge"], given["reverse"], given["row_start"])
            graph = Graph(
                z=given["z"],
                pos=pos,
                batch=given["batch"],
                num_systems=given["systems"].shape[0],
                edge_index=given["edge_index"],
                edge_vec=rows.index_select(0, pairs.of_edge) * given["sign"][:, None],
                edge_dist=dist.index_select(0, pairs.of_edge),
                box=None,
                q=given.get("q"),
                s=given.get("s"),
                extra={},
                pairs=pairs,
                guard=guard,
            )
            features, seen = potential._encoded(graph)
            found = potential._values_of(features, seen, properties=kind.properties, by_atom=kind.by_atom)
            slope, slope_of_pos = derivatives_of(found.energy, wanted, differentiable=kind.training)
        slope = torch.zeros_like(vec) if slope is None else slope
        return found.energy, slope, slope_of_pos, list(found.properties.values()), found.atomic


@contextlib.contextmanager
def _replaced(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """Put other tensors in the place of weights, also where several modules share one."""
    own = {id(x): weights[name] for name, x in (*module.named_parameters(), *module.named_buffers())}
    holders: list[dict[str, Any]] = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    before = [dict(held) for held in holders]
    try:
        for held in holders:
            held.update({name: own[id(x)] for name, x in held.items() if x is not None})  # type: ignore[misc]
        yield
    finally:
        for held, kept in zip(holders, before, strict=True):
            held.update(kept)


#: Axes that change from call to call.
_AXES: dict[str, dict[int, str]] = {
    "z": {0: "atoms"},
    "pos": {0: "atoms"},
    "batch": {0: "atoms"},
    "atoms": {1: "pairs"},
    "vec": {0: "pairs"},
    "edge_index": {1: "edges"},
    "of_edge": {0: "edges"},
    "reverse": {0: "edges"},
    "sign": {0: "edges"},
    "row_start": {0: "atoms + 1"},
    "systems": {0: "systems"},
    "q": {0: "systems"},
    "s": {0: "systems"},
}


def _arguments(graph: Graph) -> dict[str, Tensor]:
    """What a program reads of a graph: each pair by the vector of one of its edges."""
    assert graph.pairs is not None
    pairs = graph.pairs
    num_pairs = pairs.atoms.shape[1]
    every = torch.arange(pairs.of_edge.shape[0], device=pairs.of_edge.device)
    one = pairs.of_edge.new_empty(pairs.dist.shape[0])  # an edge of each pair
    one[pairs.of_edge] = every
    is_that_one = one.index_select(0, pairs.of_edge) == every
    sign = torch.where(is_that_one, 1.0, -1.0).masked_fill(pairs.of_edge == num_pairs, 0.0)
    one = one[:num_pairs]
    arguments = {
        "z": graph.z,
        "pos": graph.pos,
        "batch": graph.batch,
        "atoms": graph.edge_index.index_select(1, one),
        "vec": graph.edge_vec.index_select(0, one),
        "edge_index": graph.edge_index,
        "of_edge": pairs.of_edge,
        "reverse": pairs.reverse,
        "sign": sign.to(graph.pos.dtype),
        "row_start": pairs.row_start,
        "systems": graph.pos.new_zeros(graph.num_systems),
        "q": graph.q,
        "s": graph.s,
    }
    return {name: value.detach() for name, value in arguments.items() if value is not None}


def _expect_agreement(found: Evaluation, plain: Evaluation) -> None:
    """Raise unless a program gives the numbers of the plain model."""
    for name in ("energy", "forces", "virial"):
        x, y = getattr(found, name), getattr(plain, name)
        if x is None or y is None:
            continue
        tolerance = TOLERANCES.get(y.dtype, 1e-2)
        deviation = float((x - y).detach().abs().max())
        if not deviation <= tolerance * max(1.0, float(y.detach().abs().max())):
            raise RuntimeError(f"{name} differs by {deviation:.1e} from the plain model")


def _expect_same_gradients(found: Evaluation, plain: Evaluation, weights: list[nn.Parameter]) -> None:
    """Raise unless the gradients of weights are those of the plain model."""
    gradients = []
    for answer in (found, plain):
        assert answer.forces is not None
        mixture = torch.linspace(-1, 1, answer.forces.numel(), device=answer.forces.device).view_as(answer.forces)
        mixed = answer.energy.sum() + (mixture * answer.forces).sum()
        made = torch.autograd.grad(mixed, weights, allow_unused=True)
        gradients.append([torch.zeros_like(w) if g is None else g for g, w in zip(made, weights, strict=True)])
    tolerance = 10 * TOLERANCES.get(plain.energy.dtype, 1e-2)
    deviation, largest = (
        max((float(x.abs().max()) for x in values), default=0.0)
        for values in ([x - y for x, y in zip(*gradients, strict=True)], gradients[1])
    )
    if not deviation <= tolerance * max(1.0, largest):
        raise RuntimeError(f"gradients of weights differ by {deviation:.1e} from the plain model")
