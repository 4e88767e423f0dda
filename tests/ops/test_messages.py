"""The compiled twins equal the definitions, to third derivatives."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import Graph, build_graph
from torchmdnet.ops import kernels, messages
from torchmdnet.testing import cell_of_atoms, derivatives


def graph_of(kind: str) -> Graph:
    cell = cell_of_atoms(7)
    if kind == "empty":
        return build_graph(cell.z[:0], cell.pos[:0], cutoff_upper=3.0, loop=True)
    if kind == "isolated":
        return build_graph(cell.z, 50 * cell.pos, cutoff_upper=3.0)
    if kind == "molecule":
        return build_graph(cell.z, cell.pos, cutoff_upper=3.0)
    return build_graph(cell.z, cell.pos, None, cell.box, cutoff_upper=3.5, loop=kind == "cell with loops")


GRAPHS = ("cell with loops", "cell", "molecule", "isolated", "empty")


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_gather_weight_sum_and_its_twin_agree(kind: str, channels: int) -> None:
    graph = graph_of(kind)
    assert graph.pairs is not None
    X = random(graph.num_atoms, 9, channels, seed=1)
    weight = random(graph.pairs.dist.shape[0], 3, channels, seed=2)
    assert kernels.can_run(X)
    args = (graph.edge_index, graph.pairs)
    found = derivatives(lambda X, w: messages.gather_weight_sum(X, w, *args), [X, weight], 3)
    expected = derivatives(lambda X, w: messages.gather_weight_sum_plain(X, w, *args), [X, weight], 3)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_embed_edges_and_its_twin_agree(kind: str, channels: int) -> None:
    graph = graph_of(kind)
    assert graph.pairs is not None
    Y = random(graph.edge_index.shape[1], 9, seed=1)
    weight = random(graph.pairs.dist.shape[0], 3, channels, seed=2)
    Z = random(graph.num_atoms, 2, channels, seed=3)
    args = (graph.edge_index, graph.pairs)
    found = derivatives(lambda Y, w, Z: messages.embed_edges(Y, w, Z, *args), [Y, weight, Z], 2)
    expected = derivatives(lambda Y, w, Z: messages.embed_edges_plain(Y, w, Z, *args), [Y, weight, Z], 2)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_tensors_need_not_be_contiguous() -> None:
    graph = graph_of("cell with loops")
    assert graph.pairs is not None
    X = random(4, 9, graph.num_atoms, seed=1).detach().permute(2, 1, 0)
    weight = random(3, graph.pairs.dist.shape[0], 4, seed=2).detach().transpose(0, 1)
    args = (graph.edge_index, graph.pairs)
    torch.testing.assert_close(
        messages.gather_weight_sum(X, weight, *args), messages.gather_weight_sum_plain(X, weight, *args)
    )


def test_single_precision_stays_single() -> None:
    graph = graph_of("cell with loops")
    assert graph.pairs is not None
    X = random(graph.num_atoms, 9, 8, seed=1, dtype=torch.float32)
    weight = random(graph.pairs.dist.shape[0], 3, 8, seed=2, dtype=torch.float32)
    args = (graph.edge_index, graph.pairs)
    ours = messages.gather_weight_sum(X, weight, *args)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, messages.gather_weight_sum_plain(X, weight, *args))


def test_half_precision_takes_the_plain_path() -> None:
    assert not kernels.can_run(torch.zeros(1, dtype=torch.bfloat16))


def test_several_threads_give_the_numbers_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pos = 14 * torch.rand(400, 3, generator=generator, dtype=torch.float64)
    graph = build_graph(torch.ones(400, dtype=torch.long), pos, cutoff_upper=4.0, loop=True)
    pairs = graph.pairs
    assert pairs is not None
    X = random(400, 9, 64, seed=1)
    weight = random(pairs.dist.shape[0], 3, 64, seed=2)
    before = torch.get_num_threads()

    def run(X: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return messages.gather_weight_sum(X, weight, graph.edge_index, pairs)

    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(derivatives(run, [X, weight], 1))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["message_sum", "message_weight", "embed_sum", "embed_weight", "embed_factor"])
def test_operators_pass_pytorch_s_own_checks(name: str) -> None:
    from torchmdnet.ops.kernels import operators

    graph = graph_of("cell with loops")
    pairs = graph.pairs
    assert pairs is not None
    n, p, e, f = graph.num_atoms, pairs.dist.shape[0], graph.edge_index.shape[1], 3
    O, X, w, Y, Z = (
        random(*shape, seed=k) for k, shape in enumerate([(n, 9, f), (n, 9, f), (p, 3, f), (e, 9), (n, 2, f)])
    )
    message = (graph.edge_index[1], pairs.of_edge, pairs.row_start, pairs.atoms)
    embed = (graph.edge_index[1], pairs.of_edge, pairs.row_start, pairs.reverse)
    arguments = {
        "message_sum": (w, X, *message),
        "message_weight": (O, X, p, *message),
        "embed_sum": (Y, w, Z, *embed),
        "embed_weight": (O, Y, Z, p, *embed),
        "embed_factor": (O, Y, w, *embed),
    }[name]
    torch.library.opcheck(getattr(operators, name), arguments)
