"""Whether the passes of a step agree with its definition, for steps here and in other packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.nn.filters import Radial
from torchmdnet.ops.workspace import Buffer, Shelves, Workspace
from torchmdnet.tape.geometry import Geometry, TensorGeometry
from torchmdnet.tape.tape import Definitions, Run, Step, Tables, Tape

__all__ = ["check_step"]


def check_step(
    step: Step,
    inputs: Sequence[Tensor],
    graph: Graph,
    radial: Radial,
    weights: Sequence[Tensor] = (),
    *,
    constant: Sequence[int] = (),
    handedness: float | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Compare value, backward, tangent and reverse of a step with the derivatives of its definition by autograd.

    Args:
        step: What is checked.
        inputs: Its inputs, in double precision.
        graph: The atoms and edges it runs on; see :func:`torchmdnet.graph.build_graph`.
        radial: Radial functions of the pairs of the graph.
        weights: Leaf tensors in which gradients are compared.
        constant: Numbers of inputs that do not depend on the geometry.
        handedness: For steps of tensors, see :class:`torchmdnet.tape.geometry.TensorGeometry`.
        tolerance: Largest deviation, relative to the largest number of each result.

    Raises:
        AssertionError: Naming the pass and the result that differ.
    """
    assert graph.pairs is not None
    generator = torch.Generator().manual_seed(7)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    vec, dist = graph.edge_vec.detach(), graph.pairs.dist.detach()
    moving = [k for k in range(len(inputs)) if k not in constant]
    is_edge = (dist.index_select(0, graph.pairs.of_edge) > 0)[:, None]  # self loops do not move
    dx, dvec, ddist = [random(x) for x in inputs], is_edge * random(vec), random(dist)

    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, vec, dist)]
    moved = graph._replace(
        edge_vec=leaves[-2],
        edge_dist=leaves[-1].index_select(0, graph.pairs.of_edge),
        pairs=graph.pairs._replace(dist=leaves[-1]),
    )
    again = Radial(leaves[-1], radial.basis, radial.fade, radial.spline, None)
    y = _as_tuple(step.definition(Definitions(moved, again), *leaves[:-2]))
    g, h = [random(x).requires_grad_() for x in y], [random(x) for x in y]
    places = [leaves[k] for k in moving] + leaves[-2:]
    of_places = torch.autograd.grad(y, places, g, create_graph=True, allow_unused=True)
    directions = [dx[k] for k in moving] + [dvec, ddist]
    terms = [(slope, d) for slope, d in zip(of_places, directions, strict=True) if slope is not None]
    dy: Any = [None] * len(y)
    objective: Any = sum((a * b).sum() for a, b in zip(h, y, strict=True))
    if terms:
        dy = torch.autograd.grad([s for s, _ in terms], g, [d for _, d in terms], create_graph=True)
        # g · dy, of which PyTorch's third derivatives of layer norms are wrong, in its other form
        objective = objective + sum((slope * d).sum() for slope, d in terms)
    expected = torch.autograd.grad(objective, [*leaves[:-2], *weights], allow_unused=True)

    workspace = Workspace()
    workspace.shelves = _Poisoned()
    edges = (radial.spline, radial.fade, graph, vec, dist, workspace)
    geometry = Geometry(*edges) if handedness is None else TensorGeometry(*edges, handedness)
    tape = Tape(geometry, Tables(radial, trains=True), keeps=True)
    with torch.no_grad():
        given = [_Given(x, change, k in moving) for k, (x, change) in enumerate(zip(inputs, dx, strict=True))]
        made = _as_tuple(tape(step, *(tape(source) for source in given)))
        for k, (ours, theirs) in enumerate(zip(made, y, strict=True)):
            _compare("value", f"output {k}", ours.tensor, theirs, tolerance)
        keys = [output.key for output in made]
        tape.backward({key: Buffer(grad.detach().clone()) for key, grad in zip(keys, g, strict=True)})
        of_vec, of_dist = geometry.backward()
        if step.reads_geometry or moving:
            found = [given[k].slope for k in moving]
            names = [f"input {k}" for k in moving]
            for name, ours, theirs in zip(names, found, of_places, strict=False):
                _compare("backward", name, ours, theirs, tolerance)
            of_edges = None if of_places[-2] is None else is_edge * of_places[-2]
            _compare("backward", "vectors", of_vec, of_edges, tolerance)
            _compare("backward", "distances", of_dist, of_places[-1], tolerance)
        geometry.move(dvec, ddist)
        changes = tape.tangent()
        for k, (key, theirs) in enumerate(zip(keys, dy, strict=True)):
            _compare("tangent", f"output {k}", changes[key].tensor if key in changes else None, theirs, tolerance)
        of_weights = tape.reverse({key: Buffer(grad) for key, grad in zip(keys, h, strict=True)}, weights)
        results = [*(source.gradient for source in given), *of_weights]
    names = [f"input {k}" for k in range(len(inputs))] + [f"weight {k}" for k in range(len(weights))]
    for name, ours, theirs in zip(names, results, expected, strict=True):
        _compare("reverse", name, ours, theirs, tolerance)


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _compare(which: str, name: str, ours: Tensor | None, theirs: Tensor | None, tolerance: float) -> None:
    if ours is None or theirs is None:
        known = theirs if ours is None else ours
        assert known is None or not known.any(), f"{which}: {name} is missing, expected {known}"
        return
    assert ours.shape == theirs.shape, f"{which}: {name} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    scale = float(theirs.abs().max()) if ours.numel() else 0.0
    assert worst <= tolerance * max(scale, 1.0), f"{which}: {name} is off by {worst:.1e}, where {scale:.1e} is largest"


class _Poisoned(Shelves):
    """Memory that is NaN as soon as it is released: a step has to keep the buffers of all that it reads later."""

    def __missing__(self, kind: tuple[int, torch.dtype]) -> Any:
        made = super().__missing__(kind)
        made.free = _NaNs()
        return made


class _NaNs(list[Any]):
    def append(self, flat: Any) -> None:
        flat.fill(float("nan"))
        super().append(flat)


class _Given(Step):
    """An input of the step that is checked."""

    slope: Tensor | None = None
    gradient: Tensor | None = None

    def __init__(self, x: Tensor, change: Tensor, moves: bool) -> None:
        self.x, self.change, self.reads_geometry = x, change, moves

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        return Buffer(self.x.detach().clone())

    def backward(self, run: Run, *grads: Buffer) -> tuple[()]:
        self.slope = grads[0].tensor.clone()
        return ()

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer:
        return Buffer(self.change.clone())

    def reverse(self, run: Run, *grads: Buffer) -> tuple[()]:
        self.gradient = grads[0].tensor.clone()
        return ()
