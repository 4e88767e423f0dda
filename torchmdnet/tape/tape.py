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

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.ops.messages import EdgeRows, rows_of_pairs
from torchmdnet.tape.geometry import Geometry
from torchmdnet.tape.memory import Buffer, Workspace

__all__ = ["Definitions", "Run", "Step", "Tables", "Tape"]


class Run:
    """One call of a step: what its passes keep for one another, as attributes of the step's own names."""

    #: Slopes in the outputs, in a reverse pass; None if the energy does not depend on them.
    slopes: Any = None
    #: Changes of the inputs, for steps that keep them.
    dx: Any = None
    #: Whether the outputs depend on the geometry.
    moves: bool
    #: Of the outputs.
    shapes: list[tuple[int, ...]]

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
        geometry: Edges of the graph, which messages read, and where their gradients in it are summed.
        tables: Radial functions.
        workspace: Where memory comes from.
        keeps: Whether tangent and reverse may be asked for. Otherwise :meth:`backward` can be called once, and
            releases what it has read.
    """

    def __init__(self, geometry: Geometry, tables: Tables, workspace: Workspace, *, keeps: bool) -> None:
        self.geometry, self.tables, self.workspace, self.keeps = geometry, tables, workspace, keeps
        self.steps: list[tuple[Step, Run, list[int], list[int]]] = []
        self.num_values = 0
        self._moving: set[int] = set()  # values that depend on the geometry
        self.num_gradients = 0  # backward passes so far; runs keep the slopes of the last one
        self._gradients: list[tuple[Tensor, Tensor]] = []
        workspace.begin()

    def __call__(self, step: Step, *inputs: Buffer) -> Any:
        """Run a step; its outputs are inputs of others."""
        run = Run(self)
        made = step.value(run, *inputs)
        outputs = made if type(made) is tuple else (made,)
        run.shapes = [output.shape for output in outputs]
        keys, first = [x.key for x in inputs], self.num_values
        for output in outputs:
            output.key = self.num_values
            self.num_values += 1
        made_keys = [*range(first, self.num_values)]
        run.moves = step.reads_geometry or not self._moving.isdisjoint(keys)
        if run.moves:
            self._moving.update(made_keys)
        self.steps.append((step, run, keys, made_keys))
        return made

    def empty(self, *shape: int) -> Buffer:
        """A buffer of the tape's precision with arbitrary values."""
        return self.workspace.acquire(shape, self.geometry.dtype)

    def backward(self, grads: dict[int, Buffer]) -> None:
        """Slopes of everything, given those in outputs by their keys; those in the geometry are summed there."""
        self.num_gradients += 1
        self.geometry.clear()
        for step, run, inputs, outputs in self._backwards():
            run.slopes = given = self._given(run, outputs, grads)
            if given is not None and run.moves:
                self._accumulate(grads, inputs, step.backward(run, *given))

    def _backwards(self) -> Iterator[tuple[Step, Run, list[int], list[int]]]:
        """The steps, the last one first; without ``keeps`` each is forgotten before the next."""
        if self.keeps:
            yield from reversed(self.steps)
        while not self.keeps and self.steps:
            yield self.steps.pop()

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
                self._accumulate(grads, inputs, step.reverse(run, *given))
        found: dict[int, Tensor] = {}
        made = [(tensor, grad) for tensor, grad in self._gradients if not tensor.is_leaf]
        of_weights = [(tensor, grad) for tensor, grad in self._gradients if tensor.is_leaf]
        if made:
            tensors, given = [tensor for tensor, _ in made], [grad for _, grad in made]
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
        found = [grads.pop(key, None) for key in outputs]
        if not always and all(grad is None for grad in found):
            return None
        if any(grad is None for grad in found):
            found = [self._zeros(s) if g is None else g for g, s in zip(found, run.shapes, strict=True)]
        return found  # type: ignore[return-value]

    def _zeros(self, shape: tuple[int, ...]) -> Buffer:
        zeros = self.empty(*shape)
        zeros.array.fill(0)
        return zeros

    def _accumulate(self, grads: dict[int, Buffer], inputs: Sequence[int], found: Sequence[Buffer | None]) -> None:
        for key, more in zip(inputs, found, strict=True):
            if more is None:
                continue
            before = grads.get(key)
            if before is None:
                grads[key] = more
            else:
                total = self.empty(*before.tensor.shape)
                torch.add(before.tensor, more.tensor, out=total.tensor)
                grads[key] = total


class Definitions:
    """Runs the steps of a program by their PyTorch definitions.

    Args:
        graph: The atoms and edges.
        radial: Radial functions of the pairs.
    """

    def __init__(self, graph: Graph, radial: Radial) -> None:
        self.graph, self.radial = graph, radial
        self.edges: EdgeRows = rows_of_pairs(graph)

    def __call__(self, step: Step, *inputs: Any) -> Any:
        """The definition of a step."""
        return step.definition(self, *inputs)
