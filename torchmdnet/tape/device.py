"""Programs of networks on a GPU: the passes that energies and forces need, in Triton and without autograd.

These are the first two of a tape, value and backward. Every kernel that is started takes microseconds, whatever it
computes, so that a molecule of twenty atoms costs what its launches cost: written out they are a fifth of autograd's.

A step has a function here that returns its value and, as a function, its backward pass; :func:`passes` finds it by the
class of the step, and has for any other that does not read the geometry its definition, differentiated by autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.spline import Spline
from torchmdnet.ops.messages import RadialPoints, rows_of_pairs
from torchmdnet.tape.steps import Add, LayerNorm, Linear, Plain, Silu
from torchmdnet.tape.tape import Step, Tables
from torchmdnet.tape.tensors import (
    EmbedEdges,
    Interact,
    Mix,
    Normalize,
    Part,
    PartNorms,
    Refine,
    ScaleParts,
    SquaredNorm,
    TensorMessage,
)

__all__ = ["DeviceGeometry", "DeviceTape", "Value", "passes"]

#: From the slope in the output of a step to those in its inputs; None where the energy does not depend on one.
Backward = Callable[[Tensor], tuple["Tensor | None", ...]]


class Value:
    """A value on the tape, and the slope of the energy in it once there is one."""

    __slots__ = ("moves", "slope", "tensor")

    def __init__(self, tensor: Tensor, moves: bool) -> None:
        self.tensor, self.moves = tensor, moves
        self.slope: Tensor | None = None


class DeviceGeometry:
    """What messages read of the edges of a graph, and the slopes that they leave.

    Args:
        spline: The grid of the radial functions.
        envelope: The cosine that fades at the cutoff.
        graph: Its edges come in both directions.
        handedness: Sign of the antisymmetric components of directions.
    """

    def __init__(self, spline: Spline, envelope: CosineCutoff, graph: Graph, handedness: float) -> None:
        from torchmdnet.ops.triton import passes as kernels

        assert graph.pairs is not None
        self.kernels = kernels
        self.graph, self.handedness, self.pairs = graph, handedness, graph.pairs
        self.vec, self.dist = graph.edge_vec.detach().contiguous(), graph.pairs.dist.detach().contiguous()
        grid = float(spline.start), float(spline.stop), spline.num_cells
        cutoffs = float(envelope.cutoff_lower), float(envelope.cutoff_upper)
        self.coef, self.slope, cell = kernels.read_grid(self.dist, grid, cutoffs)  # (P, 6), (P, 6), (P,)
        self.Y = kernels.directions(self.vec, self.dist, self.pairs.of_edge, handedness)  # (E, 9)
        self.where = rows_of_pairs(graph).layout(RadialPoints(self.coef, cell), 9)
        self.num_reading = 0
        self._of_Y = self.vec.new_empty(0)
        self._of_coef = self.vec.new_empty(0)
        self._next = 0

    def begin_backward(self, num_channels: int) -> None:
        """Make room for what the steps that read the geometry will find of each edge."""
        self.blocks = self.kernels.blocks_of(self.vec, num_channels)
        E = self.vec.shape[0]
        self._of_coef = self.vec.new_empty(self.num_reading * self.blocks, E, 6)
        self._next = 0

    def room(self) -> Tensor:
        """Where the next step writes slopes in the coefficients of each edge, (B, E, 6)."""
        first = self._next
        self._next = first + self.blocks
        return self._of_coef[first : self._next]

    def add_directions(self, of_Y: Tensor) -> None:
        """Slopes in the components of directions, (B, E, 9)."""
        self._of_Y = of_Y

    def backward(self) -> tuple[Tensor, Tensor]:
        """Slopes in vectors (E, 3) and distances (P,), of all that was found."""
        pairs, found = self.pairs, (self._of_Y, self._of_coef[: self._next])
        geometry = (self.vec, self.dist, pairs.of_edge, pairs.reverse)
        return self.kernels.slopes_of_geometry(*geometry, self.slope, *found, self.handedness)


class DeviceTape:
    """Runs the steps of a program, and once its backward pass.

    Args:
        geometry: Of the edges.
        tables: Radial functions, and what else is kept of weights.
    """

    def __init__(self, geometry: DeviceGeometry, tables: Tables) -> None:
        self.geometry, self.tables = geometry, tables
        self.steps: list[tuple[Backward, tuple[Value, ...], Value]] = []

    def __call__(self, step: Step, *inputs: Value) -> Value:
        """Run a step."""
        made, back = passes(step, self, *(x.tensor for x in inputs))
        moves = step.reads_geometry or any(x.moves for x in inputs)
        output = Value(made, moves)
        if moves:
            self.geometry.num_reading += step.reads_geometry
            self.steps.append((back, inputs, output))
        return output

    def backward(self, grads: Sequence[tuple[Value, Tensor | None]], num_channels: int) -> tuple[Tensor, Tensor]:
        """Slopes in the vectors (E, 3) and distances (P,), given those in outputs."""
        self.geometry.begin_backward(num_channels)
        for value, grad in grads:
            if grad is not None:
                value.slope = grad.contiguous() if value.slope is None else value.slope + grad
        while self.steps:
            back, inputs, output = self.steps.pop()
            if output.slope is None:
                continue
            found = back(output.slope)
            output.slope = None
            for x, more in zip(inputs, found, strict=False):
                if more is not None and x.moves:
                    x.slope = more if x.slope is None else x.slope + more
        return self.geometry.backward()


# --------------------------------------------------------------------------------------------------- steps, one by one


@functools.singledispatch
def passes(step: Any, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    """The value of a step and its backward pass.

    Args:
        step: Of any class; one that reads the geometry needs a function of its own here.
        tape: Where it runs.
        inputs: Without history.
    """
    assert not step.reads_geometry, f"{type(step).__name__} has no passes on a GPU"
    return by_definition(step, tape, *inputs)


def by_definition(step: Step, tape: Any, *inputs: Tensor) -> tuple[Tensor, Backward]:
    """The passes of a step from its definition, by autograd."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = step.definition(tape, *leaves)
    if not y.requires_grad:
        return y.detach(), lambda grad: ()
    return y.detach(), lambda grad: torch.autograd.grad(y, leaves, grad, allow_unused=True)


@passes.register
def _(step: Plain, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    if not inputs:
        return step.evaluated(tape.tables).detach(), lambda grad: ()
    return by_definition(step, tape, *inputs)


@passes.register
def _(step: Linear, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    weight, bias = step.layer.weight, step.layer.bias
    return F.linear(inputs[0], weight, bias), lambda grad: (grad @ weight,)


@passes.register
def _(step: Silu, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    (x,) = inputs
    return F.silu(x), lambda grad: (torch.ops.aten.silu_backward(grad, x),)


@passes.register
def _(step: LayerNorm, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    (x,), norm = inputs, step.module
    shape, weight, bias = norm.normalized_shape, norm.weight, norm.bias
    y, mean, share = torch.native_layer_norm(x, shape, weight, bias, norm.eps)

    def back(grad: Tensor) -> tuple[Tensor]:
        arrays = (grad, x, shape, mean, share, weight, bias)
        return (torch.ops.aten.native_layer_norm_backward(*arrays, [True, False, False])[0],)

    return y, back


@passes.register
def _(step: Add, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    return inputs[0] + inputs[1], lambda grad: (grad, grad)


@passes.register
def _(step: EmbedEdges, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    at, (Z,), table = tape.geometry, inputs, tape.tables.table(step.function)
    kernels = at.kernels

    def back(grad: Tensor) -> tuple[None]:
        at.add_directions(kernels.embed_backward(at.where, at.coef, table, grad, at.Y, Z, at.room()))
        return (None,)  # factors of elements do not depend on the geometry

    return kernels.embed(at.where, at.coef, table, at.Y, Z), back


@passes.register
def _(step: TensorMessage, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    at, (Y,), table = tape.geometry, inputs, tape.tables.table(step.function)
    kernels = at.kernels

    def back(grad: Tensor) -> tuple[Tensor]:
        return (kernels.message_backward(at.where, at.coef, table, grad, Y, at.room()),)

    return kernels.message(at.where, at.coef, table, Y), back


@passes.register
def _(step: Mix, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels = tape.geometry.kernels
    weights = tape.tables.kept(step.owner, lambda: kernels.by_component(step.weights))  # (9, G, F)
    return kernels.mix(inputs[0], weights.mT), lambda grad: (kernels.mix(grad, weights),)


@passes.register
def _(step: Normalize, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (X,) = tape.geometry.kernels, inputs
    return kernels.normalize(X), lambda grad: (kernels.normalize_backward(X, grad),)


@passes.register
def _(step: Interact, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (Y, M), both = tape.geometry.kernels, inputs, step.both
    factor = step.factor if both else torch.ones_like(step.factor)
    return kernels.interact(Y, M, factor, both), lambda grad: kernels.interact_backward(Y, M, factor, grad, both)


@passes.register
def _(step: Refine, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (X, D), factor = tape.geometry.kernels, inputs, step.factor
    return kernels.refine(X, D, factor), lambda grad: (grad, kernels.refine_backward(D, factor, grad))


@passes.register
def _(step: ScaleParts, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (X, gate) = tape.geometry.kernels, inputs
    return kernels.scale(X, gate), lambda grad: kernels.scale_backward(X, gate, grad)


@passes.register
def _(step: SquaredNorm, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (X,) = tape.geometry.kernels, inputs
    return kernels.square_norm(X), lambda grad: (kernels.square_norm_backward(X, grad),)


@passes.register
def _(step: PartNorms, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    kernels, (X,) = tape.geometry.kernels, inputs
    return kernels.part_norms(X), lambda grad: (kernels.part_norms_backward(X, grad),)


@passes.register
def _(step: Part, tape: DeviceTape, *inputs: Tensor) -> tuple[Tensor, Backward]:
    (X,), first, last = inputs, step.first, step.last

    def back(grad: Tensor) -> tuple[Tensor]:
        out = torch.zeros_like(X)
        out[:, first:last] = grad
        return (out,)

    return X[:, first:last], back
