"""The compiled twins equal the definitions, to third derivatives."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import Graph, build_graph
from torchmdnet.ops import kernels, messages
from torchmdnet.ops.messages import EdgeRows, RadialFilter, RadialPoints
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


def assert_agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal, measured by the largest number: each order takes the sine of what may be thousands."""
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * (1 + scale))


ROWS = {"pairs": messages.rows_of_pairs, "edges": messages.rows_of_edges}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def filter_parts(graph: Graph, rows: str, reads: int, parts: int, channels: int) -> tuple[EdgeRows, list, torch.Tensor]:
    """Rows of edges, [coefficients, table], and cells."""
    assert graph.pairs is not None
    count = graph.pairs.dist.shape[0] if rows == "pairs" else graph.edge_index.shape[1]
    cell = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(5))
    coef, table = random(count, reads, seed=3), random(10 + reads, parts, channels, seed=2)
    return ROWS[rows](graph), [coef, table], cell


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("reads", "components", "channels"), [(1, 9, 16), (6, 9, 5), (6, 1, 16), (2, 3, 8)])
def test_gather_weight_sum_and_its_twin_agree(kind: str, rows: str, reads: int, components: int, channels: int) -> None:
    graph = graph_of(kind)
    edges, parts, cell = filter_parts(graph, rows, reads, 3 if components == 9 else 1, channels)
    X = random(graph.num_atoms, components, channels, seed=1)
    assert kernels.has_kernel(X)

    def of(function):
        return lambda X, coef, table: function(X, RadialFilter(table, RadialPoints(coef, cell)), edges)

    found = derivatives(of(messages.gather_weight_sum), [X, *parts], 3)
    expected = derivatives(of(messages.gather_weight_sum_plain), [X, *parts], 3)
    assert_agree(found, expected)


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("reads", "components", "channels"), [(1, 9, 16), (6, 9, 5), (6, 3, 16)])
def test_embed_edges_and_its_twin_agree(kind: str, rows: str, reads: int, components: int, channels: int) -> None:
    graph = graph_of(kind)
    edges, parts, cell = filter_parts(graph, rows, reads, 3 if components == 9 else 1, channels)
    Y = random(graph.edge_index.shape[1], components, seed=1)
    Z = random(graph.num_atoms, 2, channels, seed=4)

    def of(function):
        return lambda Y, coef, table, Z: function(Y, RadialFilter(table, RadialPoints(coef, cell)), Z, edges)

    found = derivatives(of(messages.embed_edges), [Y, *parts, Z], 2)
    expected = derivatives(of(messages.embed_edges_plain), [Y, *parts, Z], 2)
    assert_agree(found, expected)


def test_first_derivatives_share_one_pass() -> None:
    """Without ``create_graph`` several gradients come from one loop; they are the ones of the definition."""
    graph = graph_of("cell with loops")
    edges, parts, cell = filter_parts(graph, "pairs", 6, 3, 16)
    X, Y, Z = (
        random(*shape, seed=k)
        for k, shape in enumerate([(graph.num_atoms, 9, 16), (graph.edge_index.shape[1], 9), (graph.num_atoms, 2, 16)])
    )
    weigh = random(graph.num_atoms, 9, 16, seed=9).detach()
    for inputs, ours, theirs in (
        ([X, *parts], messages.gather_weight_sum, messages.gather_weight_sum_plain),
        ([Y, *parts, Z], messages.embed_edges, messages.embed_edges_plain),
    ):
        gradients = []
        for function in (ours, theirs):
            first, coef, table, *rest = inputs
            out = function(first, RadialFilter(table, RadialPoints(coef, cell)), *rest, edges)  # type: ignore[call-arg]
            gradients.append(torch.autograd.grad((out * weigh).sum(), inputs))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces do not pay for gradients of weights, although the weights could have one."""
    from torchmdnet.ops.kernels.loops import message_form

    graph = graph_of("cell with loops")
    edges, (coef, table), cell = filter_parts(graph, "pairs", 6, 3, 16)
    X = random(graph.num_atoms, 9, 16, seed=1)
    monkeypatch.setattr(message_form, "message_table", lambda *args: pytest.fail("the table's gradient was computed"))
    points = RadialPoints(2 * coef, cell)
    out = messages.gather_weight_sum(2 * X, RadialFilter(2 * table, points), edges)
    torch.autograd.grad(out.sum(), [X, coef])


def test_tensors_need_not_be_contiguous() -> None:
    graph = graph_of("cell with loops")
    X = random(8, 9, graph.num_atoms, seed=1).detach().permute(2, 1, 0)
    edges, (coef, _), cell = filter_parts(graph, "pairs", 6, 3, 8)
    table = random(3, 16, 8, seed=2).detach().transpose(0, 1)
    filter = RadialFilter(table, RadialPoints(coef.detach(), cell))
    torch.testing.assert_close(
        messages.gather_weight_sum(X, filter, edges), messages.gather_weight_sum_plain(X, filter, edges)
    )


def test_single_precision_stays_single() -> None:
    graph = graph_of("cell with loops")
    edges, (coef, table), cell = filter_parts(graph, "pairs", 6, 3, 8)
    X = random(graph.num_atoms, 9, 8, seed=1, dtype=torch.float32)
    filter = RadialFilter(table.float(), RadialPoints(coef.float(), cell))
    ours = messages.gather_weight_sum(X, filter, edges)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, messages.gather_weight_sum_plain(X, filter, edges), rtol=1e-4, atol=1e-4)


def test_what_the_loops_cannot_take_goes_the_plain_way() -> None:
    assert not kernels.has_kernel(torch.zeros(1, 16, dtype=torch.bfloat16))
    assert not kernels.has_kernel(torch.zeros(1, 7))
    assert kernels.has_kernel(torch.zeros(1, 8))
    assert (
        torch.func.vmap(lambda x: torch.tensor(float(kernels.has_kernel(x))) + 0 * x.sum())(torch.zeros(2, 8)).sum()
        == 0
    )


def test_several_threads_give_the_numbers_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pos = 14 * torch.rand(400, 3, generator=generator, dtype=torch.float64)
    graph = build_graph(torch.ones(400, dtype=torch.long), pos, cutoff_upper=4.0, loop=True)
    edges, parts, cell = filter_parts(graph, "pairs", 6, 3, 64)
    X = random(400, 9, 64, seed=1)
    before = torch.get_num_threads()

    def run(X: torch.Tensor, coef: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return messages.gather_weight_sum(X, RadialFilter(table, RadialPoints(coef, cell)), edges)

    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(derivatives(run, [X, *parts], 1))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
