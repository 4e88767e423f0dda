"""The four passes of every step are those of its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph, build_graph
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.nn.radial import ExpNormalSmearing
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.kernels import loops
from torchmdnet.tape.steps import Add, Concatenate, Message, Plain, activation, linear, norm
from torchmdnet.testing import cell_of_atoms, check_step

CUTOFF = 4.0
GRIDS = {"grid": Spline(0.0, CUTOFF, 64), "pairs": None}


class Filter(nn.Module):
    """A radial function of one part or several."""

    def __init__(self, channels: int, parts: int = 1) -> None:
        super().__init__()
        self.parts, self.net = parts, nn.Linear(6, parts * channels)

    def weights(self, rbf: Tensor) -> Tensor:
        return self.net(rbf).tanh().unflatten(1, (self.parts, -1))


def graph_of(loop: bool) -> Graph:
    z, pos, batch, box, _ = cell_of_atoms()
    return build_graph(z, pos, batch, box, cutoff_upper=CUTOFF, loop=loop)


def radial_of(graph: Graph, spline: Spline | None) -> tuple[Radial, list[Tensor]]:
    assert graph.pairs is not None
    basis = ExpNormalSmearing(0.0, CUTOFF, 6, trainable=True, dtype=torch.float64)
    return Radial(graph.pairs.dist, basis, CosineCutoff(0.0, CUTOFF), spline), list(basis.parameters())


def atoms(graph: Graph, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(graph.num_atoms, *shape, generator=generator, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("spline", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("channels", [4, 8, 12, 20])
@pytest.mark.parametrize("constant", [(), (0,)])
def test_messages(spline: Spline | None, loop: bool, channels: int, constant: tuple[int, ...]) -> None:
    graph, filter = graph_of(loop), Filter(channels).double()
    radial, of_basis = radial_of(graph, spline)
    step = Message(RadialFunction(filter, "weights"), without_loops=loop)
    weights = [*filter.parameters(), *of_basis]
    check_step(step, [atoms(graph, channels)], graph, radial, weights, constant=constant)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_messages(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(loops.blocks, "PAIRS_PER_CHUNK", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    graph, filter = graph_of(True), Filter(24).double()
    radial, _ = radial_of(graph, GRIDS["grid"])
    step = Message(RadialFunction(filter, "weights"))
    check_step(step, [atoms(graph, 24)], graph, radial, [*filter.parameters()])


class Doubled(nn.Linear):
    """A layer of another class."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input.square())


@pytest.mark.parametrize("constant", [(), (0,)])
@pytest.mark.parametrize(
    "module",
    [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.SiLU(), nn.Tanh(), nn.LayerNorm(5), Doubled(5, 2)],
    ids=lambda module: type(module).__name__,
)
def test_layers(module: nn.Module, constant: tuple[int, ...]) -> None:
    module, graph = module.double(), graph_of(False)
    for weight in module.parameters():
        nn.init.normal_(weight)
    make = {nn.Linear: linear, nn.LayerNorm: norm}.get(type(module), activation)
    radial, _ = radial_of(graph, None)
    check_step(make(module), [atoms(graph, 5)], graph, radial, [*module.parameters()], constant=constant)


@pytest.mark.parametrize("constant", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("step", [Add(), Concatenate(), Plain(lambda a, b: a * b.sin()), Plain(lambda a, b: a.exp())])
def test_steps_of_two_inputs(step: object, constant: tuple[int, ...]) -> None:
    graph = graph_of(False)
    radial, _ = radial_of(graph, None)
    inputs = [atoms(graph, 4), atoms(graph, 4, seed=1)]
    check_step(step, inputs, graph, radial, constant=constant)  # type: ignore[arg-type]


def test_what_differs_is_named() -> None:
    class Wrong(Plain):
        def tangent(self, run, *changes):
            return None

    graph = graph_of(False)
    radial, _ = radial_of(graph, None)
    with pytest.raises(AssertionError, match="tangent: output 0 is missing"):
        check_step(Wrong(torch.sin), [atoms(graph, 4)], graph, radial)
