"""The compiled twins of attention equal its definition, to second derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_messages import GRAPHS, assert_agree, graph_of, random
from torch import Tensor, nn

from torchmdnet.graph import Graph, build_graph, graph_of_edges
from torchmdnet.ops import kernels
from torchmdnet.ops.attention import attend, attend_plain
from torchmdnet.ops.messages import RadialFilter, RadialPoints, rows_of_pairs
from torchmdnet.testing import cell_of_atoms, derivatives


def inputs(graph: Graph, reads: int, channels: int, has_vectors: bool) -> tuple[list[Tensor], Tensor]:
    """q, k, X, u, coef, envelope, table, and cells."""
    assert graph.pairs is not None
    num_atoms, count = graph.num_atoms, graph.pairs.dist.shape[0]
    sent, parts = (5, 4) if has_vectors else (1, 2)
    cell = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(5))
    tensors = [
        random(num_atoms, channels, seed=0),
        random(num_atoms, channels, seed=1),
        random(num_atoms, sent, channels, seed=2),
        random(graph.edge_index.shape[1], 3, seed=3),
        random(count, reads, seed=4),
        random(count, seed=6),
        random(10 + reads, parts, channels, seed=7),
    ]
    return tensors, cell


def both(graph: Graph, cell: Tensor, has_vectors: bool, **options) -> list[Callable[..., Tensor]]:
    """The twin and the definition, as functions of the inputs."""

    def ours(q: Tensor, k: Tensor, X: Tensor, u: Tensor, coef: Tensor, envelope: Tensor, table: Tensor) -> Tensor:
        filter, direction = RadialFilter(table, RadialPoints(coef, cell)), u if has_vectors else None
        return attend(q, k, X, direction, filter, envelope, rows_of_pairs(graph), **options)

    def theirs(q: Tensor, k: Tensor, X: Tensor, u: Tensor, coef: Tensor, envelope: Tensor, table: Tensor) -> Tensor:
        filter, direction = RadialFilter(table, RadialPoints(coef, cell)), u if has_vectors else None
        return attend_plain(q, k, X, direction, filter, envelope, rows_of_pairs(graph), **options)

    return [ours, theirs]


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("vectors_fade", [False, True])
@pytest.mark.parametrize(("reads", "num_heads", "channels"), [(1, 2, 16), (6, 3, 15), (6, 4, 16)])
def test_attention_agrees_with_its_definition(
    kind: str, vectors_fade: bool, reads: int, num_heads: int, channels: int
) -> None:
    graph = graph_of(kind)
    tensors, cell = inputs(graph, reads, channels, has_vectors=True)
    assert kernels.has_kernel(tensors[0])
    options = {"num_heads": num_heads, "activation": nn.SiLU(), "vectors_fade": vectors_fade}
    ours, theirs = both(graph, cell, True, **options)
    assert_agree(derivatives(ours, tensors, 2), derivatives(theirs, tensors, 2))


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Tanh()])
def test_scalars_alone_agree(activation: nn.Module) -> None:
    graph = graph_of("cell with loops")
    tensors, cell = inputs(graph, 6, 16, has_vectors=False)
    ours, theirs = both(graph, cell, False, num_heads=2, activation=activation)
    assert_agree(derivatives(ours, tensors, 2), derivatives(theirs, tensors, 2))


@pytest.mark.parametrize("has_vectors", [False, True])
@pytest.mark.parametrize("vectors_fade", [False, True])
@pytest.mark.parametrize("wanted", [range(6), (3, 4), (0,), range(7)])
def test_first_derivatives_share_one_pass(has_vectors: bool, vectors_fade: bool, wanted: tuple[int, ...]) -> None:
    """Any of them may be asked for without the others."""
    graph = graph_of("cell with loops")
    tensors, cell = inputs(graph, 6, 16, has_vectors)
    chosen = [tensors[n] for n in wanted if has_vectors or n != 3]
    gradients = []
    for function in both(graph, cell, has_vectors, num_heads=2, activation=nn.SiLU(), vectors_fade=vectors_fade):
        gradients.append(torch.autograd.grad(function(*tensors).sin().sum(), chosen))
    assert_agree(*gradients)


@pytest.mark.slow  # copies of the loops for several threads take longest to compile
def test_several_threads_give_the_numbers_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pos = 14 * torch.rand(400, 3, generator=generator, dtype=torch.float64)
    graph = build_graph(torch.ones(400, dtype=torch.long), pos, cutoff_upper=4.0, loop=True)
    tensors, cell = inputs(graph, 6, 32, has_vectors=True)
    ours, _ = both(graph, cell, True, num_heads=4, activation=nn.SiLU(), vectors_fade=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = ours(*tensors)
            results.append([out, *torch.autograd.grad(out.sin().sum(), tensors[:6])])
    finally:
        torch.set_num_threads(before)
    assert_agree(*results)


def test_single_precision_stays_single() -> None:
    graph = graph_of("cell with loops")
    tensors, cell = inputs(graph, 6, 32, has_vectors=True)
    tensors = [x.detach().float() for x in tensors]
    ours, theirs = both(graph, cell, True, num_heads=4, activation=nn.SiLU())
    assert ours(*tensors).dtype == torch.float32
    torch.testing.assert_close(ours(*tensors), theirs(*tensors), rtol=1e-4, atol=1e-3)


def test_edges_that_stand_alone_go_the_plain_way() -> None:
    cell = cell_of_atoms(7)
    listed = build_graph(cell.z, cell.pos, cutoff_upper=3.0)
    graph = graph_of_edges(cell.z, listed.edge_index, listed.edge_vec, cutoff_upper=3.0)
    tensors, cells = inputs(graph, 6, 16, has_vectors=True)
    ours, theirs = both(graph, cells, True, num_heads=2, activation=nn.SiLU())
    torch.testing.assert_close(ours(*tensors), theirs(*tensors), rtol=1e-12, atol=1e-12)
