r"""A tape of the steps of a network, with the four passes that energies, forces and training on forces need.

A program is a function that calls steps on a tape, ``y = tape(step, x)``. On a :class:`Tape` every step runs in its
own loops and the tape passes derivatives on from step to step:

- *value*: what the step makes of its inputs;
- *backward*: the gradient of the energy E in its inputs, given that in its output (the *slopes*);
- *tangent*: the derivative of its output along a direction v in which the geometry changes;
- *reverse*: gradients of :math:`c E + v \cdot \nabla E`, with whatever c and v depend on, in its inputs and its
  weights. Training on forces asks for no more than these: the gradient of a loss of energies and forces in the weights
  has this form, with c and v made from the derivatives of the loss.

With x for a step's inputs, y(x) for its output, dy = J(x) dx for its tangent, g for the slope in y, which is the
gradient in dy as well, and h for the gradient in y, reverse returns the gradient in x of
:math:`h \cdot y + g \cdot J(x) dx`. The gradient in dx is the slope in x, known from the backward pass.

On :class:`Definitions` a step calls its PyTorch definition instead: the same program is then an ordinary function of
tensors, which autograd, ``torch.compile``, ``torch.export`` and ``torch.func`` follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchmdnet.domains import Domain, exchanged
from torchmdnet.graph import Graph
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.ops.messages import EdgeRows, rows_of_pairs
from torchmdnet.ops.workspace import Buffer

__all__ = ["Definitions", "Exchange", "Run", "Step", "Tables", "Tape", "unhooked"]


class Run:
    """One call of a step: what its passes keep for one another, as attributes of the step's own names."""

    #: Slopes in the outputs, in a reverse pass; None if the energy does not depend on them.
    slopes: Any = None
    #: Changes of the inputs, for steps that keep them.
    dx: Any = None
    #: Whether the outputs depend on the geometry.
    moves: bool
    #: Of the outputs, if there are several.
    shapes: Any = None

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...


class Step:
    """One operation of a network; see :mod:`torchmdnet.tape.tape` for its passes.

    A step holds no state of a call: what a pass leaves for a later one goes to its :class:`Run`. Inputs and outputs
    are buffers; a step with several outputs returns a tuple. A change of None is zero.
    """

    #: Whether outputs depend on the geometry even where no input does.
    reads_geometry = False
    #: Whether value and backward change numbers by compiled loops and :func:`torchmdnet.ops.calls.repeatable` alone,
    #: which can then be repeated without the step.
    is_repeatable = False

    def repeats(self, run: Run, *inputs: Buffer) -> bool:
        """:attr:`is_repeatable` for these inputs."""
        return self.is_repeatable

    def definition(self, at: Definitions, *inputs: Any) -> Any:
        """The step in PyTorch, tracked by autograd."""
        raise NotImplementedError

    def value(self, run: Run, *inputs: Buffer) -> Any:
        """The outputs."""
        raise NotImplementedError

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer | None, ...]:
        """Slopes in the inputs, given those in the outputs; None where the energy does not depend on one."""
        raise NotImplementedError

    def tangent(self, run: Run, *changes: Buffer | None) -> Any:
        """Changes of the outputs, given those of the inputs; None for no change."""
        raise NotImplementedError

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer | None, ...]:
        """Gradients in the inputs, given those in the outputs; the slopes in the outputs are ``run.slopes``.

        Gradients in weights go to :meth:`Tape.add`.
        """
        raise NotImplementedError


class Exchange(Step):
    """The features of copies become those of their owners in other domains, see :mod:`torchmdnet.domains`.

    A tape adds this step before every one that reads the neighbours of atoms.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return exchanged(inputs[0], self.domain)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        return Buffer(self.domain.to_copies(inputs[0].tensor))

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return (Buffer(self.domain.to_owners(grads[0].tensor)),)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        return None if changes[0] is None else Buffer(self.domain.to_copies(changes[0].tensor))

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return self.backward(run, *grads)


class Tables:
    """Radial functions as the loops read them, and what else is made of weights and can be kept until these change.

    Args:
        radial: Makes the tables.
        trains: Whether gradients of weights will be asked for; tables then have a history.
    """

    def __init__(self, radial: Radial, trains: bool) -> None:
        self.radial, self.trains = radial, trains
        self._kept: dict[Any, Any] = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was first called for a key."""
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
        return found

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is made of weights, :meth:`kept`; it has a history where gradients of weights will be asked for."""

        def tracked() -> Any:
            with torch.set_grad_enabled(self.trains):
                return make()

        return self.kept(key, tracked)

    def table(self, function: RadialFunction) -> Tensor:
        """Spline coefficients of a function or, without a grid, value and slope of each pair, (R, L, F)."""
        return self.kept(function, lambda: self._table(function))

    def _table(self, function: RadialFunction) -> Tensor:
        radial = self.radial
        if radial.tables is not None and not self.trains:
            return radial.tables[function].values.detach()
        with torch.set_grad_enabled(self.trains):
            if radial.spline is not None:
                return radial.spline.coefficients(function(radial.rows))
            return _value_and_slope(radial, function)


def _value_and_slope(radial: Radial, function: RadialFunction) -> Tensor:
    """Value and slope of each pair at its distance, one after the other, and four rows more, (2 P + 4, L, F).

    Next to the distance of its pair a function is value plus slope times the change, so this is a table in itself. The
    last rows are there for loops that always read six.
    """
    dist = radial.dist.detach().requires_grad_()
    with torch.enable_grad():
        value = function(radial.basis(dist))
        any_way = torch.zeros_like(value, requires_grad=True)
        (along,) = torch.autograd.grad(value, dist, any_way, create_graph=True)  # linear in any_way: its slope is ours
        (slope,) = torch.autograd.grad(along, any_way, torch.ones_like(along), create_graph=True)
        rows = torch.stack([value, slope], dim=1).flatten(0, 1)
        return torch.cat([rows, rows.new_zeros(4, *rows.shape[1:])])


class Tape:
    """Runs the steps of a program in loops, and its derivatives.

    Args:
        geometry: Edges of the graph, which messages read, and where their gradients in it are summed; a
            :class:`torchmdnet.tape.geometry.Geometry` or, for tensors, a ``TensorGeometry``.
        tables: Radial functions.
        keeps: Whether tangent and reverse may be asked for. Otherwise :meth:`backward` can be called once, and
            releases what it has read.
        records: Whether :meth:`backward` may be asked for at all.
        domain: Where atoms are a part of their system.
    """

    def __init__(
        self, geometry: Any, tables: Tables, *, keeps: bool, records: bool = True, domain: Domain | None = None
    ) -> None:
        self.geometry, self.tables, self.keeps, self.records = geometry, tables, keeps, records
        self.exchange = None if domain is None else Exchange(domain)
        #: Buffers of the tape's precision, with arbitrary values or zeros, by their shape.
        self.empty, self.zeros = geometry.places.empty, geometry.places.zeros
        self.steps: list[tuple[Step, Run, list[int], list[int]]] = []
        self.num_values = 0
        self.num_gradients = 0  # backward passes so far; runs keep the slopes of the last one
        self._gradients: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: Step, *inputs: Buffer) -> Any:
        """Run a step; its outputs are inputs of others."""
        if self.exchange is not None and step.reads_geometry:
            inputs = tuple(self(self.exchange, x) if x.moves else x for x in inputs)
        run = Run(self)
        made = self.value_of(step, run, inputs)
        keys, moves, key = [], step.reads_geometry, self.num_values
        for x in inputs:
            keys.append(x.key)
            moves = moves or x.moves
        run.moves = moves
        if type(made) is tuple:
            run.shapes = [output.shape for output in made]
            outputs = [*range(key, key + len(made))]
            for output in made:
                output.key, output.moves = key, moves
                key += 1
        else:
            outputs = [key]
            made.key, made.moves = key, moves
            key += 1
        self.num_values = key
        self.steps.append((step, run, keys, outputs))
        return made

    def value_of(self, step: Step, run: Run, inputs: Sequence[Buffer]) -> Any:
        """The outputs of a step."""
        if not self.keeps:
            return step.value(run, *inputs)
        with torch.no_grad():  # weights are read with their history, but no step leaves one
            return step.value(run, *inputs)

    def backward_of(self, step: Step, run: Run, grads: list[Buffer]) -> Sequence[Buffer | None]:
        """Slopes in the inputs of a step."""
        return step.backward(run, *grads)

    def forget(self) -> None:
        """Release everything; runs refer to their tape, which would keep it alive."""
        self.steps.clear()

    def backward(self, grads: dict[int, Buffer]) -> None:
        """Slopes of everything, given those in outputs by their keys; those in the geometry are summed there."""
        self.num_gradients += 1
        self.geometry.clear()
        steps = self.steps
        number = len(steps)
        while number:
            number -= 1
            step, run, inputs, outputs = steps[number]
            if not self.keeps:
                steps.pop()
            run.slopes = given = self._given(run, outputs, grads)
            if given is not None and run.moves:
                self._accumulate(grads, inputs, given, self.backward_of(step, run, given))

    def tangent(self) -> dict[int, Buffer]:
        """Changes of all values along the direction that :meth:`Geometry.move` was given."""
        changes: dict[int, Buffer] = {}
        for step, run, inputs, outputs in self.steps:
            if not run.moves:
                continue
            made = step.tangent(run, *(changes.get(key) for key in inputs))
            for key, change in zip(outputs, made if type(made) is tuple else (made,), strict=True):
                if change is not None:
                    changes[key] = change
        return changes

    def reverse(self, grads: dict[int, Buffer], wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients in weights, given those in outputs by their keys; None where nothing depends on one."""
        self._gradients = []
        for step, run, inputs, outputs in reversed(self.steps):
            given = self._given(run, outputs, grads, always=run.slopes is not None)
            if given is not None:
                self._accumulate(grads, inputs, given, step.reverse(run, *given))
        found: dict[int, Tensor] = {}
        made = [(tensor, grad) for tensor, grad in self._gradients if not tensor.is_leaf]
        of_weights = [(tensor, grad) for tensor, grad in self._gradients if tensor.is_leaf]
        if made:
            tensors, given = [tensor for tensor, _ in made], [grad for _, grad in made]
            with unhooked(wanted):
                more = torch.autograd.grad(tensors, wanted, given, retain_graph=True, allow_unused=True)
            of_weights += [(weight, grad) for weight, grad in zip(wanted, more, strict=True) if grad is not None]
        for weight, grad in of_weights:
            before = found.get(id(weight))
            found[id(weight)] = grad if before is None else before + grad
        return [found.get(id(weight)) for weight in wanted]

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Enter a gradient in a weight, or in a tensor that was made of weights."""
        if tensor.requires_grad:
            self._gradients.append((tensor, gradient))

    def _given(
        self, run: Run, outputs: Sequence[int], grads: dict[int, Buffer], always: bool = False
    ) -> list[Buffer] | None:
        """Gradients in the outputs of a step; None if there are none, zeros for some of several."""
        if len(outputs) == 1:
            grad = grads.pop(outputs[0], None)
            if grad is not None:
                return [grad]
            return [self.zeros(*run.slopes[0].shape)] if always else None
        found = [grads.pop(key, None) for key in outputs]
        if None not in found:
            return found  # type: ignore[return-value]
        if not always and all(grad is None for grad in found):
            return None
        return [self.zeros(*s) if g is None else g for g, s in zip(found, run.shapes, strict=True)]

    def _accumulate(
        self, grads: dict[int, Buffer], inputs: Sequence[int], given: list[Buffer], found: Sequence[Buffer | None]
    ) -> None:
        """Add what a step found for its inputs, in place unless the numbers are those of other gradients too."""
        for key, more in zip(inputs, found, strict=True):
            if more is None:
                continue
            if more in given:
                more.is_shared = True
            if key not in grads:
                grads[key] = more
                continue
            before = grads[key]
            kept = more if before.is_shared else before
            total = self.empty(*before.shape) if kept.is_shared else kept
            self.add_up(before, more, total)
            grads[key] = total

    def add_up(self, a: Buffer, b: Buffer, out: Buffer) -> None:
        """The sum of two buffers."""
        torch.add(a.tensor, b.tensor, out=out.tensor)


@contextlib.contextmanager
def unhooked(weights: Sequence[Tensor]) -> Iterator[None]:
    """Without the hooks of weights: autograd calls these once, on the gradient that the tape returns to it."""
    hooks = [weight._backward_hooks for weight in weights if weight._backward_hooks]
    held = [dict(some) for some in hooks]
    for some in hooks:
        some.clear()
    try:
        yield
    finally:
        for some, before in zip(hooks, held, strict=True):
            some.update(before)


class Definitions:
    """Runs the steps of a program by their PyTorch definitions.

    Args:
        graph: The atoms and edges.
        radial: Radial functions of the pairs.
    """

    def __init__(self, graph: Graph, radial: Radial) -> None:
        self.graph, self.radial = graph, radial
        self.edges: EdgeRows = rows_of_pairs(graph)

    @cached_property
    def directions(self) -> Tensor:
        """Unit vectors from receivers to senders, (E, 3); zero for self loops."""
        r = self.graph.edge_dist[:, None]
        return -self.graph.edge_vec / torch.where(r == 0, 1.0, r)

    def __call__(self, step: Step, *inputs: Any) -> Any:
        """The definition of a step."""
        domain = self.graph.domain
        if domain is not None and step.reads_geometry:  # what does not depend on the geometry is known of copies too
            inputs = tuple(exchanged(x, domain) if x.requires_grad else x for x in inputs)
        return step.definition(self, *inputs)
