"""The four passes of the steps of tensors are those of their definitions."""

from __future__ import annotations

import pytest
import torch
from test_steps import GRIDS, Filter, atoms, graph_of, radial_of
from torch import nn

from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.kernels import loops
from torchmdnet.tape.tape import Step
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
from torchmdnet.testing import check_step


@pytest.mark.parametrize("spline", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("channels", [4, 10, 17])
def test_messages(spline: Spline | None, channels: int) -> None:
    torch.manual_seed(0)
    graph, filter = graph_of(True), Filter(channels, parts=3).double()
    radial, of_basis = radial_of(graph, spline)
    function, weights = RadialFunction(filter, "weights"), [*filter.parameters(), *of_basis]
    X, Z, given = atoms(graph, 9, channels), atoms(graph, 2, channels), (graph, radial, weights)
    for constant in ((), (0,)):
        check_step(TensorMessage(function), [X], *given, constant=constant, handedness=-1.0)
    check_step(EmbedEdges(function, -1.0), [Z], *given, constant=(0,), handedness=-1.0)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_messages(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(loops.blocks, "PAIRS_PER_CHUNK", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    test_messages(GRIDS["grid"], 24)


@pytest.mark.parametrize("channels", [4, 10])
def test_mixing(channels: int) -> None:
    torch.manual_seed(0)
    graph = graph_of(False)
    radial, _ = radial_of(graph, None)
    weights = [nn.Parameter(torch.randn(channels, channels, dtype=torch.float64)) for _ in range(3)]
    for constant in ((), (0,)):
        check_step(Mix("mix", weights), [atoms(graph, 9, channels)], graph, radial, weights, constant=constant)


FACTOR = torch.linspace(0.8, 1.3, 8, dtype=torch.float64)
STEPS: dict[str, tuple[Step, list[tuple[int, ...]]]] = {
    "normalize": (Normalize(), [(9, 6)]),
    "interact, O(3)": (Interact(FACTOR, both=True), [(9, 6), (9, 6)]),
    "interact, SO(3)": (Interact(FACTOR, both=False), [(9, 6), (9, 6)]),
    "refine": (Refine(FACTOR), [(9, 6), (9, 6)]),
    "scale": (ScaleParts(), [(9, 6), (18,)]),
    "squared norm": (SquaredNorm(), [(9, 6)]),
    "norms of parts": (PartNorms(), [(9, 6)]),
    "part": (Part(1, 4), [(9, 6)]),
}


@pytest.mark.parametrize(("step", "shapes"), STEPS.values(), ids=STEPS)
def test_algebra(step: Step, shapes: list[tuple[int, ...]]) -> None:
    graph = graph_of(False)
    radial, _ = radial_of(graph, None)
    inputs = [atoms(graph, *shape, seed=k) for k, shape in enumerate(shapes)]
    everything = tuple(range(len(inputs)))
    for constant in {(), (0,), everything[1:], everything}:
        check_step(step, inputs, graph, radial, constant=constant)
