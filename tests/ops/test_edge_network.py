"""Sums with a network on every edge, block by block, are those of all edges at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchmdnet.graph import Graph, build_graph
from torchmdnet.ops import edge_network
from torchmdnet.ops.edge_network import EdgeInputs, EdgeNetwork, EdgeRun, edge_network_sum, edge_network_sum_plain
from torchmdnet.ops.kernels import loops, sharing
from torchmdnet.ops.kernels.activation import silu
from torchmdnet.ops.workspace import Workspace


def arguments(num_atoms: int, hidden: int = 5, channels: int = 9) -> tuple[list[torch.Tensor], Graph]:
    generator = torch.Generator().manual_seed(num_atoms)
    pos = num_atoms ** (1 / 3) * torch.rand(num_atoms, 3, generator=generator, dtype=torch.float64)
    graph = build_graph(torch.ones(num_atoms, dtype=torch.long), pos, cutoff_upper=1.6, loop=True)
    assert graph.pairs is not None
    num_pairs = graph.pairs.dist.shape[0]
    shapes = [(num_atoms, 9, channels), (num_pairs, hidden), (num_atoms, hidden), (num_atoms, hidden), (num_pairs,)]
    shapes += [(7, hidden), (7,), (3 * channels, 7), (3 * channels,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return tensors, graph


def ask(method, tensors: list[torch.Tensor], graph: Graph, activation=torch.nn.functional.silu) -> torch.Tensor:
    X, radial, receiving, sending, envelope, *layers = tensors
    network = EdgeNetwork(activation, [(layers[0], layers[1]), (layers[2], layers[3])])
    return method(X, radial, receiving, sending, envelope, network, graph)


@pytest.mark.parametrize("num_atoms", [1, 2, 23])
@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.tanh])
def test_values_and_gradients_are_those_of_the_definition(
    num_atoms: int, block: int, kept: int, activation, monkeypatch
) -> None:
    monkeypatch.setattr(edge_network, "BLOCK", block)
    monkeypatch.setattr(edge_network, "SHARED", block)
    monkeypatch.setattr(edge_network, "KEPT", kept)
    tensors, graph = arguments(num_atoms)
    ours, theirs = (ask(method, tensors, graph, activation) for method in (edge_network_sum, edge_network_sum_plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(ours)
    for found, expected in zip(
        torch.autograd.grad(ours, tensors, cotangent), torch.autograd.grad(theirs, tensors, cotangent), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow  # copies of the loops for several threads take longest to compile
@pytest.mark.parametrize("kept", [0, 10**6])
def test_two_threads_find_what_one_finds(kept: int, monkeypatch) -> None:
    monkeypatch.setattr(edge_network, "KEPT", kept)
    monkeypatch.setattr(sharing, "WORTH_THREADS", 0)
    tensors, graph = arguments(40, hidden=24, channels=33)
    results, before = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            out = ask(edge_network_sum, tensors, graph)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_all_memory_returns_when_a_run_ends() -> None:
    (X, radial, receiving, sending, envelope, *layers), graph = arguments(7)
    network = EdgeNetwork(torch.nn.SiLU(), [(layers[0], layers[1]), (layers[2], layers[3])])
    inputs = EdgeInputs(*(x.detach() for x in (X, radial, receiving, sending, envelope)))
    workspace = Workspace()
    for _ in range(2):  # the second time everything is there
        run = EdgeRun(network, graph, workspace.begin(torch.float64))
        run.backward(inputs, run.forward(inputs, keeps=True), of_weights=False)
        waiting = sum(len(shelf.free) for shelf in workspace.shelves.values())
        del run
        now = sum(len(shelf.free) for shelf in workspace.shelves.values())
        assert now == waiting + len(layers) // 2 + 1  # slopes and what goes into the last activation


def test_memory_from_an_inference_mode_serves_without() -> None:
    (X, radial, receiving, sending, envelope, *layers), graph = arguments(7)
    network = EdgeNetwork(torch.nn.functional.silu, [(layers[0], layers[1]), (layers[2], layers[3])])
    with torch.inference_mode():
        inside = edge_network_sum(X, radial, receiving, sending, envelope, network, graph)
    outside = edge_network_sum(X, radial, receiving, sending, envelope, network, graph)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_and_its_slope_are_accurate_to_the_last_bits(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001, dtype=dtype), torch.tensor([-1e4, -700, -90, -0.0, 90, 1e4])])
    x = x.to(dtype)[None]
    value, slope = torch.empty_like(x), torch.empty_like(x)
    arrays = (x.numpy(), torch.zeros_like(x[0]).numpy(), value.numpy(), slope.numpy())
    loops.activation.silu_both(0, *arrays)
    exact = x.numpy().astype(np.longdouble)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-exact))
    last = 16 * torch.finfo(dtype).eps
    expected = exact * sigmoid, sigmoid * (1 + exact * (1 - sigmoid))
    for found, right in zip((value, slope), expected, strict=True):
        right = torch.from_numpy(right.astype(np.float64)).to(dtype)
        torch.testing.assert_close(found, right, rtol=last, atol=last)


@pytest.mark.parametrize("shape", [(3, 4), (5, 7), (0, 8)])
def test_silu_can_be_differentiated_as_often_as_one_likes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    results = []
    for function in (silu, torch.nn.functional.silu):
        value, found = function(x), []
        for _ in range(4):
            found.append(value)
            (value,) = torch.autograd.grad(value.sin().sum(), x, create_graph=True)
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_gradients_can_be_asked_for_twice() -> None:
    tensors, graph = arguments(5)
    total = ask(edge_network_sum, tensors, graph).sum()
    first, second = (torch.autograd.grad(total, tensors, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_some_gradients_can_be_asked_for_alone() -> None:
    tensors, graph = arguments(8)
    wanted = [tensors[1], tensors[7]]
    ours, theirs = (
        torch.autograd.grad(ask(method, tensors, graph).square().sum(), wanted)
        for method in (edge_network_sum, edge_network_sum_plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_second_derivatives_come_from_the_definition() -> None:
    tensors, graph = arguments(6, hidden=3, channels=8)
    results = []
    for method in (edge_network_sum, edge_network_sum_plain):
        slopes = torch.autograd.grad(ask(method, tensors, graph).sin().sum(), tensors, create_graph=True)
        total = torch.stack([slope.square().sum() for slope in slopes])
        results.append(torch.autograd.grad(total.sum(), tensors))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
