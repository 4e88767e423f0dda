r"""Architectures written as one program of steps, and its derivatives for autograd.

:meth:`TapedRepresentation.program` is the only description of a network. On a :class:`torchmdnet.tape.tape.Tape` it
runs in compiled loops, in evaluation and in training on forces; on
:class:`torchmdnet.tape.tape.Definitions` it is what everything else sees: ``torch.compile``, ``torch.export``, the
transforms of ``torch.func``, other devices, and derivatives that the tape has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchmdnet.graph import Graph, in_pairs
from torchmdnet.models.base import Features, Pullback, Representation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.nn.filters import Tables as StoredTables
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.batched import is_within_batch, one_by_one
from torchmdnet.ops.kernels.work import lanes_of
from torchmdnet.ops.workspace import Buffer, Workspace
from torchmdnet.tape.geometry import Geometry
from torchmdnet.tape.replay import SMALL, Recording, Recordings
from torchmdnet.tape.tape import Definitions, Tables, Tape, unhooked
from torchmdnet.tracing import device_kind
from torchmdnet.typing import AtomFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TapedRepresentation"]


class TapedRepresentation(Representation):
    """An architecture that is a program of steps.

    A subclass has ``hidden_channels``, ``distance_expansion`` and ``envelope``, and writes :attr:`radial_functions` and
    :meth:`program`.
    """

    #: Whether loops take edges that stand alone, without one of opposite direction.
    takes_single_edges = False
    #: Whether every step that reads the geometry has passes in :mod:`torchmdnet.tape.device`.
    has_device_passes = False
    #: Whether the program reads of a graph only its atoms, systems, charges and spins, and its edges by steps. Then
    #: evaluations of small systems are recorded and repeated, see :mod:`torchmdnet.tape.replay`. The class that writes
    #: :meth:`program` states it.
    can_be_repeated = False

    distance_expansion: nn.Module
    embedding: nn.Embedding
    envelope: CosineCutoff
    hidden_channels: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._workspace = Workspace()
        self._recordings = Recordings()
        self._tables: Tables | None = None
        self._tables_of: StoredTables | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tables": None, "_tables_of": None}

    def train(self, mode: bool = True) -> Self:
        """See :class:`torchmdnet.models.base.Representation`."""
        self._tables = self._tables_of = None
        self._workspace, self._recordings = Workspace(), Recordings()
        return super().train(mode)

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance.

        In evaluation a tape keeps what it made of the weights of their owners until one of these changes.
        """
        raise NotImplementedError

    def program(self, tape: Any, graph: Graph) -> Features:
        """The network: calls of steps on a tape, of whose values the features are."""
        raise NotImplementedError

    def fits_loops(self, weight: Tensor) -> bool:
        """Whether compiled loops take features of this network's widths, in the precision of a weight.

        As it is, whole vectors of ``hidden_channels``: a multiple of 8 in single precision, of 4 in double.
        """
        channels: Any = self.hidden_channels
        return kernels.has_cpu_loops(weight, channels) and channels % lanes_of(weight.element_size()) == 0

    @property
    def handedness_of_edges(self) -> float:
        """Sign of the antisymmetric components of directions, for networks of tensors."""
        return 1.0

    def added_energy(self, graph: Graph) -> Tensor | None:
        """Known physics beside the features, the energy of each atom (N, 1); None for nothing."""
        return None

    def geometry(self, spline: Spline | None, graph: Graph, vec: Tensor, dist: Tensor, workspace: Workspace) -> Any:
        """The edges as the loops of this network read them; see :mod:`torchmdnet.tape.geometry`."""
        return Geometry(spline, self.envelope, graph, vec, dist, workspace)

    def encode(self, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.base.Representation`."""
        radial = self._radial(graph)
        call, energy = self._call(graph, radial), self.added_energy(graph)
        if call is None:
            return self.program(Definitions(graph, radial), graph)._replace(energy=energy)
        assert graph.pairs is not None
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        outputs = _Encode.apply(call, graph.edge_vec, graph.pairs.dist, *weights)  # type: ignore[misc]
        return call.features(outputs)._replace(energy=energy)

    def direct(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :class:`torchmdnet.models.base.Representation`."""
        is_usual = type(self).encode is TapedRepresentation.encode and type(self).select is Representation.select
        on_device = self._runs_on_device(like)
        if self.training or not is_usual or self.adds_energy or not (on_device or self._has_loops):
            return None
        can_be_repeated = not on_device and self._can_be_repeated
        repeats = can_be_repeated and self._recordings.are_of(self, self._recorded_for(like))
        spline = self.radial.spline if repeats else self.radial.ready(like, *self._of_radial)
        if spline is None:
            return None
        if on_device:
            return lambda graph: self._on_device(graph, spline)
        repeats = repeats or (can_be_repeated and self._recordings.start(self, self._recorded_for(like)))

        def encode(graph: Graph) -> tuple[Features, Pullback]:
            if repeats:
                found = self._repeated(graph, spline)
                if found is not None:
                    return found
            return in_loops(graph)

        def in_loops(graph: Graph) -> tuple[Features, Pullback]:
            assert graph.pairs is not None
            radial = Radial(graph.pairs.dist, self.distance_expansion, self.envelope, spline, self.radial.tables)
            call = _Call(self, graph, radial, self._kept_tables(radial), keeps=False)
            features = call.features(call.forward(graph.edge_vec, graph.pairs.dist))

            def pull_back(
                of_x: Tensor, of_v: Tensor | None = None, of_S: Tensor | None = None
            ) -> tuple[Tensor, Tensor]:
                known = {"x": of_x, "v": of_v, "S": of_S}
                return call.backward([known.get(name) for name in call.names])

            return features, pull_back

        return encode

    @property
    def _can_be_repeated(self) -> bool:
        """As the class says whose program it is: a subclass with a program of its own has to say so again."""
        owner = next(kind for kind in type(self).__mro__ if "program" in vars(kind))
        return bool(vars(owner).get("can_be_repeated", False))

    def _recorded_for(self, like: Tensor) -> tuple[Any, ...]:
        """What recordings depend on beside weights and modules, where it is the same object."""
        return self.radial.tables, self.radial.spline, self.radial.mode, like.dtype

    def _repeated(self, graph: Graph, spline: Spline) -> tuple[Features, Pullback] | None:
        """:meth:`direct` of a small system by a recording; None where there is none for it."""
        assert graph.pairs is not None
        is_large = graph.edge_index.shape[1] * self.hidden_channels > SMALL
        if is_large or graph.domain is not None or graph.extra:
            return None

        def geometry(graph: Graph, workspace: Workspace) -> Any:
            assert graph.pairs is not None
            return self.geometry(spline, graph, graph.edge_vec, graph.pairs.dist, workspace)

        def made(key: Any) -> Recording:
            assert graph.pairs is not None
            radial = Radial(graph.pairs.dist, self.distance_expansion, self.envelope, spline, self.radial.tables)
            return Recording(key, graph, geometry, self._kept_tables(radial), self.program)

        recording = self._recordings.take(graph, made)
        features = None if recording is None else recording.forward(graph)
        if recording is None or features is None:
            return None
        self._workspace.begin(graph.edge_vec.dtype)  # whose memory this evaluation did not need

        def pull_back(of_x: Tensor, of_v: Tensor | None = None, of_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
            known = {"x": of_x, "v": of_v, "S": of_S}
            slopes = recording.backward([known.get(name) for name in features])
            assert slopes is not None
            self._recordings.put(recording)
            return slopes

        return Features(**features), pull_back

    def _runs_on_device(self, like: Tensor) -> bool:
        """Whether the program runs on a tape of :mod:`torchmdnet.tape.device`."""
        return self.has_device_passes and device_kind(like) in kernels.TWINS and kernels.has_kernel(like)

    def _on_device(self, graph: Graph, spline: Spline) -> tuple[Features, Pullback]:
        """:meth:`direct` of a graph on a GPU."""
        from torchmdnet.tape.device import DeviceGeometry, DeviceTape

        assert graph.pairs is not None
        radial = Radial(graph.pairs.dist, self.distance_expansion, self.envelope, spline, self.radial.tables)
        tape = DeviceTape(
            DeviceGeometry(spline, self.envelope, graph, self.handedness_of_edges), self._kept_tables(radial)
        )
        made: Any = self.program(tape, graph)
        values = {name: value for name, value in made._asdict().items() if value is not None}

        def pull_back(of_x: Tensor, of_v: Tensor | None = None, of_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
            known = {"x": of_x, "v": of_v, "S": of_S}
            return tape.backward([(value, known.get(name)) for name, value in values.items()], self.hidden_channels)

        return Features(**{name: value.tensor for name, value in values.items()}), pull_back

    def first_features(self, graph: Graph) -> AtomFeatures:
        """What atoms start from: the embedding of their element and, if there is one, that of their system, (N, F)."""
        x, of_systems = self.embedding(graph.z), self.system_features(graph)
        return x if of_systems is None else x + of_systems.index_select(0, graph.batch)

    @property
    def _of_radial(self) -> tuple[nn.Module, CosineCutoff, list[RadialFunction]]:
        return self.distance_expansion, self.envelope, self.radial_functions

    def _radial(self, graph: Graph) -> Radial:
        return self.radial(graph, *self._of_radial, self.training)

    @property
    def adds_energy(self) -> bool:
        """Whether :meth:`added_energy` returns something."""
        return False

    @property
    def _has_loops(self) -> bool:
        return not kernels.is_traced() and self.fits_loops(next(self.parameters()))

    def _call(self, graph: Graph, radial: Radial) -> _Call | None:
        """The program in loops; None where it runs by definitions."""
        if (
            not (in_pairs(graph) or self.takes_single_edges)
            or graph.num_atoms == 0
            or graph.differentiates_systems
            or not self._has_loops
        ):
            return None
        if radial.tables is not None:
            records = graph.edge_vec.requires_grad and torch.is_grad_enabled()
            return _Call(self, graph, radial, self._kept_tables(radial), keeps=False, records=records)
        is_about_forces = self.training and graph.edge_vec.requires_grad and torch.is_grad_enabled()
        return _Call(self, graph, radial, Tables(radial, trains=True), keeps=True) if is_about_forces else None

    def _kept_tables(self, radial: Radial) -> Tables:
        if self._tables is None or self._tables_of is not radial.tables:
            self._tables, self._tables_of = Tables(radial, trains=False), radial.tables
        return self._tables


class _Call:
    """One evaluation of a program on a graph, with the passes of its tape.

    Args:
        model: The network.
        graph: The atoms and edges.
        radial: Radial functions of the pairs.
        tables: The same as loops read them.
        keeps: Whether gradients of weights may be asked for.
        records: Whether gradients in the geometry may be.
    """

    def __init__(
        self,
        model: TapedRepresentation,
        graph: Graph,
        radial: Radial,
        tables: Tables,
        *,
        keeps: bool,
        records: bool = True,
    ) -> None:
        self.model, self.graph, self.radial, self.tables = model, graph, radial, tables
        self.keeps, self.records = keeps, records
        self.tape: Tape | None = None
        self.stamp: Any = None  # the run of autograd in which the tangent was taken
        self.is_followed = False  # whether derivatives of a loss are differentiated again, for which definitions answer
        self.names: list[str] = []

    def forward(self, vec: Tensor, dist: Tensor) -> tuple[Tensor, ...]:
        """The features that the network has, from vectors of edges (E, 3) and distances of pairs (P,)."""
        model = self.model
        self.tape = Tape(
            model.geometry(self.radial.spline, self.graph, vec, dist, model._workspace),
            self.tables,
            keeps=self.keeps,
            records=self.records,
            domain=self.graph.domain,
        )
        with torch.set_grad_enabled(self.keeps):
            made: Any = model.program(self.tape, self.graph)
        self.names = [name for name in Features._fields if getattr(made, name) is not None]
        outputs: list[Buffer] = [getattr(made, name) for name in self.names]
        self.keys = [output.key for output in outputs]
        return tuple(output.owned() for output in outputs)

    def features(self, outputs: Sequence[Tensor]) -> Features:
        """The outputs of :meth:`forward` by name."""
        return Features(**dict(zip(self.names, outputs, strict=True)))

    def by_definition(self, vec: Tensor, dist: Tensor) -> list[Tensor]:
        """The same tracked by autograd."""
        pairs = self.graph.pairs
        assert pairs is not None
        moved = self.graph._replace(
            edge_vec=vec, edge_dist=dist.index_select(0, pairs.of_edge), pairs=pairs._replace(dist=dist)
        )
        features = self.model.program(Definitions(moved, self.model._radial(moved)), moved)
        return [getattr(features, name) for name in self.names]

    def backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Slopes in the vectors (E, 3) and the distances (P,), given those in the outputs."""
        assert self.tape is not None
        tape = self.tape
        if not self.keeps:
            self.tape = None  # energies may outlive their derivatives, the arrays need not
        tape.backward(self._by_key(grads))
        return tape.geometry.backward()

    def tangent(self, dvec: Tensor, ddist: Tensor) -> list[Tensor | None]:
        """Changes of the outputs as vectors and distances change."""
        assert self.tape is not None
        self.tape.geometry.move(dvec, ddist)
        changes = self.tape.tangent()
        return [changes[key].owned() if key in changes else None for key in self.keys]

    def reverse(self, grads: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients in weights of ⟨grads, outputs⟩ and of the change that :meth:`tangent` took, together."""
        assert self.tape is not None
        return self.tape.reverse(self._by_key(grads), wanted)

    def __del__(self) -> None:
        if self.tape is not None:
            self.tape.forget()

    def _by_key(self, grads: Sequence[Tensor | None]) -> dict[int, Buffer]:
        return {
            key: Buffer(grad.detach().contiguous())
            for key, grad in zip(self.keys, grads, strict=True)
            if grad is not None
        }


class _Encode(Function):
    """Features of a program, as vectors of edges, distances of pairs and weights make them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, vec: Tensor, dist: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = call.forward(vec, dist)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(vec, dist, *outputs, *weights)
        return outputs

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        vec, dist, *rest = ctx.saved_tensors
        outputs, weights = rest[: len(grads)], rest[len(grads) :]
        needs = kernels.needed(ctx)[-2 - len(weights) :]
        of_geometry, of_weights = any(needs[:2]), any(needs[2:])
        again = torch.is_grad_enabled()
        if again and call.keeps and not of_weights:
            found = _Slopes.apply(call, *grads, *outputs, vec, dist, *weights)
            return None, *cast(Any, found), *(None for _ in weights)
        call.is_followed |= again and of_weights
        is_prepared = call.stamp == _current_run() and not call.is_followed
        if not again and of_weights and is_prepared and (call.graph.inner or not of_geometry):
            each = zip(weights, call.reverse(grads, weights), strict=True)
            # hooks are called for weights that nothing depends on too, and know no None
            of_each = (torch.zeros_like(w) if g is None and w._backward_hooks else g for w, g in each)
            return None, None, None, *of_each
        if not again and not of_weights:
            if call.tape is None or not call.tape.records:
                call.records = True
                call.forward(vec, dist)
            return None, *call.backward(grads), *(None for _ in weights)
        with torch.enable_grad(), unhooked(weights):
            vec, dist = vec.view_as(vec), dist.view_as(dist)
            if not again:
                vec, dist = vec.detach().requires_grad_(), dist.detach().requires_grad_()
            terms = [(y, g) for y, g in zip(call.by_definition(vec, dist), grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [y for y, _ in terms],
                [vec, dist, *weights],
                [g for _, g in terms],
                create_graph=again,
                allow_unused=True,
            )
        return None, *found


class _Slopes(Function):
    """The gradient of :class:`_Encode` in the geometry, which training on forces differentiates again.

    The outputs are inputs here, so that gradients found here are there before :class:`_Encode` goes back once more.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> tuple[Tensor, Tensor]:
        num = len(call.names)
        grads, (vec, dist, *weights) = tensors[:num], tensors[2 * num :]
        ctx.call, ctx.known = call, [grad is not None for grad in grads]
        ctx.save_for_backward(*(grad for grad in grads if grad is not None), vec, dist, *weights)
        found = call.backward(grads)
        assert call.tape is not None
        ctx.number = call.tape.num_gradients
        return found

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        num = sum(ctx.known)
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives them once
        given, (vec, dist, *weights) = saved[:num], saved[num:]
        needs = kernels.needed(ctx)
        of_geometry = any(needs[-2 - len(weights) : len(needs) - len(weights)]) and not call.graph.inner
        tape = call.tape
        is_last = tape is not None and ctx.number == tape.num_gradients  # runs may keep another gradient since
        call.is_followed |= torch.is_grad_enabled()
        if not call.is_followed and is_last and not of_geometry and not is_within_batch():
            changes = call.tangent(*(x.contiguous() for x in grads))
            call.stamp = _current_run()
            changes = [change if known else None for change, known in zip(changes, ctx.known, strict=True)]
            return None, *changes, *(None for _ in range(len(changes) + 2 + len(weights)))
        again = torch.is_grad_enabled()
        gate = _Gate()
        with torch.enable_grad(), unhooked(weights):
            if again:  # given slopes depend on weights too, by gradients that others find
                inputs = [*(_Barrier.apply(gate, x) for x in given), vec.view_as(vec), dist.view_as(dist)]
            else:
                inputs = [x.detach().requires_grad_() for x in (*given, vec, dist)]
            *slopes, vec, dist = inputs
            outputs = [y for y, known in zip(call.by_definition(vec, dist), ctx.known, strict=True) if known]
            made = torch.autograd.grad(outputs, [vec, dist], slopes, create_graph=True, allow_unused=True)
            terms = [(slope, grad) for slope, grad in zip(made, grads, strict=True) if slope is not None]
            found = torch.autograd.grad(
                [slope for slope, _ in terms],
                [*inputs, *weights],
                [grad for _, grad in terms],
                create_graph=again,
                allow_unused=True,
            )
        gate.is_open = True
        of_given = iter(found[:num])
        of_grads = [next(of_given) if known else None for known in ctx.known]
        return None, *of_grads, *(None for _ in of_grads), *found[num:]


class _Gate:
    is_open = False


class _Barrier(Function):
    """The same tensor, through which no gradient goes back before its gate is open."""

    @staticmethod
    def forward(ctx: Any, gate: _Gate, x: Tensor) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0] if ctx.gate.is_open else None


def _current_run() -> int:
    """Which run of the autograd engine this is: what was prepared in another must not be used."""
    return torch._C._current_graph_task_id()
