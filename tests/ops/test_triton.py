"""Triton's twins equal the definitions: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes a millisecond for each line of a kernel, so molecules are tiny.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchmdnet.graph import Graph, build_graph, graph_of_edges
from torchmdnet.ops import irreps, kernels, messages
from torchmdnet.ops.attention import attend, attend_plain
from torchmdnet.ops.kernels import algebra, forms, support, triton_found
from torchmdnet.ops.messages import EdgeRows, RadialFilter, RadialPoints
from torchmdnet.testing import derivatives
from torchmdnet.testing.tiny import tiny_model

pytest.importorskip("triton.language")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors to Triton, those of the CPU to its interpreter."""
    monkeypatch.setitem(forms.TWINS, DEVICE, "torchmdnet.ops.triton")


def random(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE).requires_grad_()


def graph_of(kind: str) -> Graph:
    """Three atoms of a small cell that see each other and their own images, or a part of that."""
    pos = torch.tensor([[0.0, 0.1, 0.2], [1.3, 0.2, -0.1], [0.2, 1.4, 0.3]], dtype=torch.float64, device=DEVICE)
    z, box = torch.ones(3, dtype=torch.long, device=DEVICE), 2.9 * torch.eye(3, dtype=torch.float64, device=DEVICE)
    if kind == "no atoms":
        return build_graph(z[:0], pos[:0], cutoff_upper=3.0, loop=True)
    if kind == "no edges":
        return build_graph(z, 50 * pos, cutoff_upper=3.0)
    return build_graph(z, pos, None, box, cutoff_upper=1.7, loop=True)


def setup(graph: Graph, rows: str, reads: int, parts: int, channels: int) -> tuple[EdgeRows, dict[str, Tensor], Tensor]:
    """Rows of edges, coefficients and table by name, and cells."""
    assert graph.pairs is not None
    edges = messages.rows_of_pairs(graph) if rows == "pairs" else messages.rows_of_edges(graph)
    count = graph.pairs.dist.shape[0] if rows == "pairs" else graph.edge_index.shape[1]
    cell = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    return edges, {"coef": random(count, reads, seed=3), "table": random(4 + reads, parts, channels, seed=2)}, cell


def assert_derivatives_agree(name: str, tensors: dict[str, Tensor], where: object, definition: Tensor) -> None:
    """Every slot by its kernel, alone and with others, against the gradients of the definition."""
    expected = dict(zip(tensors, torch.autograd.grad(definition, list(tensors.values())), strict=True))
    twin = getattr(importlib.import_module("torchmdnet.ops.triton"), name)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for slot in twin.slots:
        rest = {name: tensor.detach() for name, tensor in tensors.items() if name != slot}
        found = twin.derivative(slot, rest, shapes[slot], where)
        torch.testing.assert_close(
            found, expected[slot], rtol=1e-10, atol=1e-10, msg=lambda m, slot=slot: f"{slot}: {m}"
        )
    known = {name: tensor.detach() for name, tensor in tensors.items()}
    found = twin.gradients(list(twin.slots[1:]), known, shapes, where)
    for slot, ours in found.items():
        torch.testing.assert_close(
            ours, expected[slot], rtol=1e-10, atol=1e-10, msg=lambda m, slot=slot: f"{slot}: {m}"
        )


CASES = [
    ("cell with loops", "pairs", 6, 9, 5),
    ("cell with loops", "edges", 1, 9, 16),
    ("cell with loops", "pairs", 2, 2, 7),
    ("no edges", "pairs", 2, 9, 4),
    ("no atoms", "pairs", 2, 9, 4),
]


@pytest.mark.parametrize(("kind", "rows", "reads", "components", "channels"), CASES)
def test_messages(kind: str, rows: str, reads: int, components: int, channels: int) -> None:
    graph = graph_of(kind)
    edges, parts, cell = setup(graph, rows, reads, 3 if components == 9 else 1, channels)
    O, X = (random(graph.num_atoms, components, channels, seed=seed) for seed in (0, 1))
    filter = RadialFilter(parts["table"], RadialPoints(parts["coef"], cell))
    definition = (O * messages.gather_weight_sum_plain(X, filter, edges)).sum()
    where = edges.layout(filter.points, components)
    assert_derivatives_agree("message", {"O": O, **parts, "X": X}, where, definition)


@pytest.mark.parametrize(("kind", "rows", "reads", "components", "channels"), CASES)
def test_embedding(kind: str, rows: str, reads: int, components: int, channels: int) -> None:
    graph = graph_of(kind)
    edges, parts, cell = setup(graph, rows, reads, 3 if components == 9 else 1, channels)
    O, Z = random(graph.num_atoms, components, channels, seed=0), random(graph.num_atoms, 2, channels, seed=4)
    Y = random(graph.edge_index.shape[1], components, seed=1)
    filter = RadialFilter(parts["table"], RadialPoints(parts["coef"], cell))
    definition = (O * messages.embed_edges_plain(Y, filter, Z, edges)).sum()
    where = edges.layout(filter.points, components)
    assert_derivatives_agree("embedding", {"O": O, "Y": Y, **parts, "Z": Z}, where, definition)


@pytest.mark.parametrize(
    ("kind", "rows", "reads", "num_heads", "channels"),
    [("cell with loops", "pairs", 6, 3, 15), ("cell with loops", "edges", 1, 2, 16), ("no edges", "pairs", 2, 2, 4)],
)
def test_contractions(kind: str, rows: str, reads: int, num_heads: int, channels: int) -> None:
    graph = graph_of(kind)
    edges, parts, cell = setup(graph, rows, reads, 1, channels)
    (i, j), E = edges.edge_index, graph.edge_index.shape[1]
    S = random(E, num_heads, seed=0)
    q, k = (random(graph.num_atoms, channels, seed=seed) for seed in (1, 4))
    points = RadialPoints(parts["coef"], cell)
    weight = RadialFilter(parts["table"], points).rows().index_select(0, edges.row)[:, 0]
    definition = (S.repeat_interleave(channels // num_heads, dim=1) * q[i] * k[j] * weight).sum()
    where = edges.layout(points, 1)
    assert_derivatives_agree("contraction", {"S": S, "q": q, "k": k, **parts}, where, definition)


def test_channels_in_several_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """More channels than a program takes, and a last block that is not full."""
    from torchmdnet.ops.triton import operators as twins

    monkeypatch.setattr(twins, "WIDTH", 64)
    test_messages("cell with loops", "edges", 1, 9, 5)
    test_embedding("cell with loops", "edges", 1, 9, 5)


def test_the_tables_gradient_is_summed_in_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """More edges of a cell than one item takes; the order is fixed, so the numbers are the same every time."""
    from torchmdnet.ops.triton import operators as twins

    monkeypatch.setattr(twins, "ITEM_SIZE", 2)
    graph = graph_of("cell with loops")
    edges, parts, cell = setup(graph, "pairs", 2, 3, 4)
    O, X = (random(graph.num_atoms, 9, 4, seed=seed) for seed in (0, 1))
    filter = RadialFilter(parts["table"], RadialPoints(parts["coef"], cell))
    (expected,) = torch.autograd.grad((O * messages.gather_weight_sum_plain(X, filter, edges)).sum(), parts["table"])
    where = edges.layout(filter.points, 9)
    once, again = (
        twins.message.derivative("table", {"O": O, "coef": parts["coef"], "X": X}, tuple(expected.shape), where)
        for _ in range(2)
    )
    torch.testing.assert_close(once, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(once, again)


def test_edges_that_stand_alone_can_be_summed() -> None:
    """Nothing but the derivatives in what a sender has needs the edge of opposite direction."""
    from torchmdnet.ops.triton import operators as twins

    z = torch.ones(3, dtype=torch.long, device=DEVICE)
    index = torch.tensor([[2, 0, 0, 1], [0, 1, 2, 2]], device=DEVICE)
    graph = graph_of_edges(z, index, random(4, 3, seed=6).detach(), cutoff_upper=9.0)
    assert graph.pairs is not None
    edges = messages.rows_of_pairs(graph)
    cell = torch.tensor([0, 3, 1, 1], device=DEVICE)
    coef, table, X, O = random(4, 2, seed=1), random(6, 3, 5, seed=2), random(3, 9, 5, seed=3), random(3, 9, 5, seed=4)
    filter = RadialFilter(table, RadialPoints(coef, cell))
    out = messages.gather_weight_sum_plain(X, filter, edges)
    of_coef, of_table = torch.autograd.grad((out * O).sum(), [coef, table])
    twin, where = twins.message, edges.layout(filter.points, 9)
    known = {"O": O, "coef": coef, "table": table, "X": X}
    for slot, expected in {"O": out, "coef": of_coef, "table": of_table}.items():
        rest = {name: tensor for name, tensor in known.items() if name != slot}
        torch.testing.assert_close(twin.derivative(slot, rest, tuple(expected.shape), where), expected.detach())


def test_messages_to_second_derivatives_of_tensors_that_are_not_contiguous() -> None:
    graph = graph_of("cell with loops")
    edges, parts, cell = setup(graph, "pairs", 2, 3, 4)
    X, table = random(4, 9, graph.num_atoms, seed=1), random(3, 6, 4, seed=2)

    def of(function):
        return lambda X, coef, table: function(
            X.permute(2, 1, 0), RadialFilter(table.transpose(0, 1), RadialPoints(coef, cell)), edges
        )

    arguments = [X, parts["coef"], table]
    assert kernels.has_kernel(X)
    for ours, theirs in zip(
        derivatives(of(messages.gather_weight_sum), arguments, 2),
        derivatives(of(messages.gather_weight_sum_plain), arguments, 2),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-7)


def test_single_precision_stays_single() -> None:
    graph = graph_of("cell with loops")
    edges, parts, cell = setup(graph, "pairs", 6, 3, 8)
    X = random(graph.num_atoms, 9, 8, seed=1).detach().float()
    filter = RadialFilter(parts["table"].detach().float(), RadialPoints(parts["coef"].detach().float(), cell))
    ours = messages.gather_weight_sum(X, filter, edges)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, messages.gather_weight_sum_plain(X, filter, edges), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 3])
def test_algebra_of_matrices(n: int) -> None:
    X, Y = random(n, 9, 5, seed=1), random(n, 9, 5, seed=2)
    factor = 1 + 0.1 * torch.arange(n, dtype=torch.float64, device=DEVICE)
    twins = [
        (irreps.matrix_product, irreps.matrix_product_plain, [X, Y]),
        (irreps.anticommutator, irreps.anticommutator_plain, [X, Y]),
        (irreps.normalize, irreps.normalize_plain, [X]),
        (irreps.norms_by_part, algebra.norms_definition, [X]),
        *(
            (
                lambda Y, M, both=both: irreps.interact(Y, M, factor, both=both),
                lambda Y, M, both=both: irreps.normalize_plain(
                    factor[:, None, None]
                    * (irreps.anticommutator_plain(Y, M) if both else 2 * irreps.matrix_product_plain(Y, M))
                ),
                [X, Y],
            )
            for both in (False, True)
        ),
        (lambda X, D: irreps.refine(X, D, factor), lambda X, D: irreps.refine_plain(X, D, factor), [X, Y]),
    ]
    for ours, plain, arguments in twins:
        for found, expected in zip(derivatives(ours, arguments, 2), derivatives(plain, arguments, 2), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_channels_of_all_parts_are_mixed_in_one_product() -> None:
    X, weights = random(3, 9, 5, seed=1), [random(4, 5, seed=seed) for seed in (2, 3, 4)]

    def of(function):
        return lambda X, *weights: function(X, weights)

    tensors = [X, *weights]
    for ours, theirs in zip(
        derivatives(of(irreps.mix_channels), tensors, 2),
        derivatives(of(irreps.mix_channels_plain), tensors, 2),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_edges_are_sorted_by_cell_once_for_all_tables_that_pairs_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmdnet.ops.triton import operators as twins

    sorts, sort = [], torch.sort
    monkeypatch.setattr(twins.torch, "sort", lambda *args, **options: (sorts.append(args), sort(*args, **options))[1])
    graph = graph_of("cell with loops")
    edges, parts, cell = setup(graph, "pairs", 2, 3, 4)
    O, X = (random(graph.num_atoms, 9, 4, seed=seed).detach() for seed in (0, 1))
    coef, shape = parts["coef"].detach(), tuple(parts["table"].shape)

    def of_table(cell: Tensor) -> Tensor:
        where = edges.layout(RadialPoints(coef, cell), 9)
        return twins.message.derivative("table", {"O": O, "coef": coef, "X": X}, shape, where)

    assert torch.equal(of_table(cell), of_table(cell))
    assert len(sorts) == 1
    before = of_table(cell.clone())
    assert len(sorts) == 2
    cell.zero_()
    assert not torch.equal(of_table(cell), before)
    assert len(sorts) == 3


def test_attention_and_its_twin_agree() -> None:
    graph = graph_of("cell with loops")
    edges, parts, cell = setup(graph, "pairs", 2, 4, 6)
    N, E, P = graph.num_atoms, graph.edge_index.shape[1], parts["coef"].shape[0]
    tensors = [random(N, 6, seed=0), random(N, 6, seed=1), random(N, 5, 6, seed=2), random(E, 3, seed=3)]
    tensors += [parts["coef"], random(P, seed=6), parts["table"]]

    def of(function):
        def run(q, k, X, u, coef, envelope, table):
            filter = RadialFilter(table, RadialPoints(coef, cell))
            options = {"num_heads": 2, "activation": nn.SiLU(), "vectors_fade": True}
            return function(q, k, X, u, filter, envelope, edges, **options)

        return run

    for ours, theirs in zip(
        derivatives(of(attend), tensors, 1), derivatives(of(attend_plain), tensors, 1), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------------- whole networks


class Answers(NamedTuple):
    """What a network says of a molecule, and how its weights would change in training."""

    energy: Tensor
    forces: Tensor
    gradients: list[Tensor]


def answers(model: torch.nn.Module) -> Answers:
    graph = graph_of("cell with loops")
    energy, forces = model(graph.z, graph.pos)
    assert forces is not None
    loss = energy.square().sum() + forces.square().sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return Answers(energy, forces, list(torch.autograd.grad(loss, weights, materialize_grads=True)))


@pytest.mark.parametrize(
    ("architecture", "options", "kernels"),
    [
        ("tensornet", {}, "embed interact message normalize part_norms refine table_items"),
        ("equivariant-transformer", {"num_heads": 2}, "contract_edges embed message table_items"),
    ],
)
def test_networks_train_on_forces(
    architecture: str, options: dict[str, int], kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energy, forces and the gradient of a loss in both equal those of the definitions."""
    from torchmdnet.ops.triton import operators as twins

    launched, launch = set(), twins._launch
    monkeypatch.setattr(
        twins,
        "_launch",
        lambda kernel, *args, **options: (launched.add(kernel.__name__), launch(kernel, *args, **options)),
    )
    shape = {"embedding_dimension": 4, "num_layers": 1, "num_rbf": 4, "radial": "exact"}
    model = tiny_model(architecture, derivative=True, **shape, **options).to(DEVICE).train()
    ours = answers(model)
    assert launched >= set(kernels.split())
    monkeypatch.setattr(support, "has_triton", lambda device: False)
    theirs = answers(model)
    torch.testing.assert_close(ours.energy, theirs.energy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.forces, theirs.forces, rtol=1e-10, atol=1e-10)
    for found, expected in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------------------------- what runs where


def test_without_triton_the_definitions_run_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("triton.__version__", "3.1.0")
    triton_found.forget()
    with caplog.at_level("WARNING"):
        assert not kernels.has_kernel(torch.zeros(1, 16, device=DEVICE))
        assert not kernels.has_kernel(torch.zeros(1, 16, device=DEVICE))
    assert [record.message for record in caplog.records] == [
        "Triton 3.2 or later is needed on the GPU, found: 3.1.0. Plain PyTorch runs, slower."
    ]
    triton_found.forget()


def test_the_loops_of_the_cpu_leave_tensors_of_triton_alone() -> None:
    x = torch.zeros(1, 3, device=DEVICE)
    assert kernels.has_kernel(x)
    assert not kernels.has_cpu_loops(x, 16)
    assert not kernels.has_kernel(x.bfloat16())
    assert kernels.has_cpu_loops(torch.zeros(1, 16), 16) == (DEVICE == "cuda")


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values are enough for every derivative, so all of them can be captured in CUDA graphs."""
    from torchmdnet.ops.triton import operators as twins
    from torchmdnet.ops.triton import sums

    launched = set()
    for module in (twins, sums):
        monkeypatch.setattr(module, "_launch", lambda kernel, *args, **options: launched.add(kernel.__name__))
    N, E, P, F, H, R = 5, 12, 6, 16, 2, 20
    with FakeTensorMode():
        sender, reverse = torch.zeros(E, dtype=torch.long), torch.zeros(E, dtype=torch.long)
        row, cell = torch.zeros(E, dtype=torch.long), torch.zeros(P, dtype=torch.long)
        row_start = torch.zeros(N + 1, dtype=torch.long)
        coef, O, Z = torch.zeros(P, 6), torch.zeros(N, 9, F), torch.zeros(N, 2, F)
        table, Y, q, S = torch.zeros(R, 3, F), torch.zeros(E, 9), torch.zeros(N, F), torch.zeros(E, H)
        for form, tensors, starts in (
            (twins.message, (O, coef, table, O), (0, 1, 4, 9)),
            (twins.embedding, (O, Y, coef, table, Z), (0, 1, 4, 9)),
            (twins.contraction, (S, q, q, coef, table[:, :1]), (0, 1)),
        ):
            where = kernels.EdgeLayout(sender, row, row, reverse, row_start, cell, starts)
            known = dict(zip(form.slots, tensors, strict=True))
            for slot, tensor in known.items():
                rest = {name: other for name, other in known.items() if name != slot}
                assert form.derivative(slot, rest, tuple(tensor.shape), where).shape == tensor.shape
    assert launched == {"by_row", "contract_edges", "embed", "embed_factor", "message", "table_items", "table_sum"}


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_training_replays_from_a_cuda_graph() -> None:
    """Hundreds of atoms and channels in single precision: value and gradients of new features on replay."""
    pos = 14 * torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    graph = build_graph(torch.ones(300, dtype=torch.long).cuda(), pos.cuda(), cutoff_upper=4.0, loop=True)
    edges, parts, cell = setup(graph, "pairs", 6, 3, 160)
    X = random(300, 9, 160, seed=1).detach().float().requires_grad_()
    coef, table = (parts[name].detach().float().requires_grad_() for name in ("coef", "table"))

    def step(function) -> list[Tensor]:
        out = function(X, RadialFilter(table, RadialPoints(coef, cell)), edges)
        return [out, *torch.autograd.grad(out.square().sum(), [X, coef, table])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(messages.gather_weight_sum)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = step(messages.gather_weight_sum)
    with torch.no_grad():
        X.mul_(-0.5).add_(0.1)
    recorded.replay()
    for ours, theirs in zip(found, step(messages.gather_weight_sum_plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
