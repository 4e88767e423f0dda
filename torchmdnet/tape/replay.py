"""Evaluations of small systems that are recorded and then repeated, without running the program again.

The steps of a program make the same calls on a system with the same atoms and as many edges. A :class:`Recording` is
an evaluation, with its backward pass, whose calls were entered in a list while they were made, see
:mod:`torchmdnet.ops.calls`. It owns all memory that they read and write; another evaluation fills in its own edges and
repeats the calls. Steps that do more than call loops, such as functions of the user, are themselves called again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.nn.modules import Weights
from torchmdnet.ops.calls import Calls, paused, recording
from torchmdnet.ops.kernels import cores, loops
from torchmdnet.ops.workspace import Buffer, Places, Workspace
from torchmdnet.tape.tape import Run, Step, Tables, Tape

__all__ = ["Recording", "Recordings"]

#: Edges times channels up to which evaluations are recorded: beyond, loops take much longer than what is between them.
SMALL = 1 << 18
#: Recordings that a network keeps, of the systems it was evaluated for last.
MOST = 2


class RecordingTape(Tape):
    """A tape whose steps enter in a list what they call.

    Args:
        geometry: Has memory of its own, which no value on the tape uses.
        tables: Radial functions.
        places: Memory of the values.
    """

    def __init__(self, geometry: Any, tables: Tables, places: Places) -> None:
        super().__init__(geometry, tables, keeps=False)
        self.empty, self.zeros = places.empty, places.zeros
        self.calls: Calls | None = None

    def record(self, calls: Calls, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns that calls steps of this tape, or their derivatives."""
        self.calls = calls
        with recording(calls):
            made = function(*args)
        calls.close()
        return made

    def value_of(self, step: Step, run: Run, inputs: Sequence[Buffer]) -> Any:
        """See :class:`torchmdnet.tape.tape.Tape`."""
        if not (step.reads_geometry or any(x.moves for x in inputs)):  # the same each time
            with paused():
                made = step.value(run, *inputs)
            one = type(made) is not tuple
            kept = tuple(Buffer(x.tensor.clone(memory_format=torch.contiguous_format)) for x in _several(made))
            return kept[0] if one else kept
        inputs = [self._contiguous(x) for x in inputs]
        run.repeats = step.repeats(run, *inputs)
        if run.repeats:
            return step.value(run, *inputs)
        return self._again(lambda: step.value(run, *inputs), inputs)

    def backward_of(self, step: Step, run: Run, grads: list[Buffer]) -> Sequence[Buffer | None]:
        """See :class:`torchmdnet.tape.tape.Tape`."""
        if run.repeats:
            return step.backward(run, *grads)
        return self._again(lambda: step.backward(run, *grads), grads)

    def _contiguous(self, x: Buffer) -> Buffer:
        """The same numbers where an array of them is no copy, which repetitions would not make again."""
        if "array" in vars(x) or x.tensor.is_contiguous():
            return x
        copy = self._again(lambda: Buffer(x.tensor), ())
        copy.key, copy.moves = x.key, x.moves
        return copy

    def add_up(self, a: Buffer, b: Buffer, out: Buffer) -> None:
        """See :class:`torchmdnet.tape.tape.Tape`."""
        loops.dense.add(out.array.size, *(x.array.reshape(-1) for x in (a, b, out)))

    def _again(self, function: Callable[[], Any], given: Sequence[Buffer]) -> Any:
        """What a function returns, in memory into which every repetition copies what it returns then."""
        with paused():
            made = function()
        outputs = [x if x is None or x in given else self.empty(*x.tensor.shape) for x in _several(made)]

        def copy(found: Any) -> None:
            for x, y in zip(outputs, _several(found), strict=True):
                if x is not None and x is not y:
                    x.tensor.copy_(y.tensor)

        copy(made)
        assert self.calls is not None
        self.calls.add(lambda: copy(function()))
        return tuple(outputs) if type(made) is tuple else outputs[0]


def _several(made: Any) -> tuple[Any, ...]:
    return made if type(made) is tuple else (made,)


class Recording:
    """An evaluation of a program and its backward pass, on memory of its own.

    Args:
        key: Of the graph, see :class:`Recordings`.
        graph: The atoms and edges; copied.
        geometry: Makes the edges as loops read them, of a graph and a workspace.
        tables: Radial functions.
        program: The network, see :class:`torchmdnet.models.taped.TapedRepresentation`.
    """

    def __init__(
        self,
        key: Any,
        graph: Graph,
        geometry: Callable[[Graph, Workspace], Any],
        tables: Tables,
        program: Callable[[Any, Graph], Any],
    ) -> None:
        self.key, self._program = key, program
        self.graph = _copied(graph)
        self._edges, self._forward, self._backward = Calls(), Calls(), Calls()
        with recording(self._edges):
            edges = geometry(self.graph, Workspace())
        self._edges.close()
        self.tape = RecordingTape(edges, tables, Workspace().begin(edges.dtype))
        self.outputs: dict[str, Buffer] = {}
        self.grads: list[Buffer | None] | None = None
        self.slopes: tuple[Tensor, Tensor] | None = None

    def is_of(self, graph: Graph) -> bool:
        """Whether a graph has the same atoms."""
        ours = self.graph
        pairs = ((ours.z, graph.z), (ours.batch, graph.batch), (ours.q, graph.q), (ours.s, graph.s))
        return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

    def forward(self, graph: Graph) -> dict[str, Tensor] | None:
        """The features by name; None if the edges do not fit.

        Args:
            graph: One with the same key and atoms.
        """
        if not self.outputs:
            made: Any = self.tape.record(self._forward, self._program, self.tape, self.graph)
            self.outputs = {name: value for name, value in made._asdict().items() if value is not None}
        else:
            _fill(self.graph, graph)
            self._edges.repeat()
            if not self.tape.geometry.fits:
                return None
            self._forward.repeat()
        return {name: value.tensor.clone() for name, value in self.outputs.items()}

    def backward(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Slopes in vectors and distances, given those in the features."""
        if self.grads is None:
            self.grads = [None if x is None else Buffer(x.clone(memory_format=torch.contiguous_format)) for x in grads]
            self.slopes = self.tape.record(self._backward, self._slopes, self.grads)
            # what steps need that are called again must not be the memory of recorded values
            places = self.tape.geometry.places
            self.tape.empty, self.tape.zeros = places.empty, places.zeros
        else:
            for x, y in zip(self.grads, grads, strict=True):
                assert (x is None) == (y is None), "gradients are wanted of what they were wanted of at first"
                if x is not None and y is not None:
                    x.tensor.copy_(y)
            self._backward.repeat()
        assert self.slopes is not None
        of_vec, of_dist = self.slopes
        return of_vec.clone(), of_dist.clone()

    def _slopes(self, grads: Sequence[Buffer | None]) -> tuple[Tensor, Tensor]:
        known = zip(self.outputs.values(), grads, strict=True)
        self.tape.backward({x.key: grad for x, grad in known if grad is not None})
        return self.tape.geometry.backward()


def _edges_of(graph: Graph) -> tuple[Tensor, ...]:
    assert graph.pairs is not None
    return graph.edge_index, graph.edge_vec, graph.edge_dist, *graph.pairs


def _fill(ours: Graph, other: Graph) -> None:
    """Copy the edges of another graph."""
    for x, y in zip(_edges_of(ours), _edges_of(other), strict=True):
        x.copy_(y)


def _copied(graph: Graph) -> Graph:
    """The same graph in memory of its own, without what no step reads."""
    assert graph.pairs is not None
    atoms = {name: getattr(graph, name) for name in ("z", "batch", "q", "s")}
    atoms = {name: None if x is None else x.detach().clone() for name, x in atoms.items()}
    index, vec, dist, *pairs = (x.detach().contiguous().clone() for x in _edges_of(graph))
    edges = {"edge_index": index, "edge_vec": vec, "edge_dist": dist, "pairs": type(graph.pairs)(*pairs)}
    return graph._replace(**atoms, **edges, search=None)


class Recordings:
    """The recordings of a network, for the systems it was evaluated for last.

    One is taken out while it is in use, so that threads that share a network never share one. They are dropped when a
    weight or a module of the network changes, and never copied with it.
    """

    def __init__(self) -> None:
        self._free: list[Recording] = []
        self._last: Any = None
        self._state: Any = None
        self._weights: Weights | None = None
        self._hooks: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, ()

    def take(self, graph: Graph, make: Callable[[Any], Recording]) -> Recording | None:
        """A recording for a graph; None where there is none, and none is worth making.

        Args:
            graph: The atoms and edges.
            make: Makes one, given its key.
        """
        assert graph.pairs is not None
        sizes = (graph.num_atoms, graph.num_systems, graph.edge_index.shape[1], graph.pairs.atoms.shape[1])
        key = (*sizes, graph.pairs.dist.dtype, cores.count(), torch.get_num_threads(), self._state)
        for _ in range(len(self._free)):
            try:
                found = self._free.pop(0)
            except IndexError:  # another thread has it
                break
            if found.key == key and found.is_of(graph):
                return found
            self._free.append(found)
        is_again, self._last = key == self._last, key
        return make(key) if is_again else None

    def put(self, recording: Recording) -> None:
        """Give back one that is complete."""
        if recording.key[-1] is self._state:
            self._free.append(recording)
        del self._free[:-MOST]

    def are_of(self, network: nn.Module, others: tuple[Any, ...]) -> bool:
        """Whether recordings are of the network as it is.

        Args:
            network: Whose weights, modules and hooks are looked at.
            others: What else a recording depends on.
        """
        weights, state = self._weights, self._state
        if weights is None or state is None or weights.owners[0] is not network or any(self._hooks):
            return False
        return all(map(operator.is_, state.others, others)) and weights.state() == state.weights

    def start(self, network: nn.Module, others: tuple[Any, ...]) -> bool:
        """Drop all recordings, and make them of the network as it is now; False if it must not be recorded."""
        self._free, self._last, self._state = [], None, None
        self._weights = Weights([network])
        self._weights.keep()
        modules = self._weights.modules
        self._hooks = [x for m in modules for x in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
        known = self._weights.state()
        if known is None or any(self._hooks):
            return False
        self._state = _State(known, others)
        return True


class _State(NamedTuple):
    """What recordings depend on."""

    weights: Any
    others: tuple[Any, ...]
