"""The operators known to PyTorch by name keep its rules and equal their forms, to second derivatives."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import build_graph
from torchmdnet.ops.kernels.attention import CONTRACTION
from torchmdnet.ops.kernels.embedding import EMBEDDING
from torchmdnet.ops.kernels.message import MESSAGE
from torchmdnet.ops.library import OPERATORS
from torchmdnet.ops.messages import RadialPoints, edge_layout, rows_of_pairs
from torchmdnet.testing import small_molecules

F = 8


def arguments(name: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], int]:
    """Tensors of every slot, indices, and the number of components, for a few molecules with self loops."""
    generator = torch.Generator().manual_seed(0)
    systems = small_molecules()
    graph = build_graph(systems.z, systems.pos, systems.batch, cutoff_upper=3.0, loop=True, num_systems=3)
    edges = rows_of_pairs(graph)
    N, E, P = graph.num_atoms, graph.edge_index.shape[1], graph.pairs.dist.shape[0]
    points = RadialPoints(torch.ones(P, 2), torch.randint(4, (P,), generator=generator))
    indices = [edges.edge_index[1], edges.row, edges.back, edges.reverse, edges.row_start, points.cell]
    C, L = (1, 1) if name == "contraction" else (9, 3)
    shapes = {
        "O": (N, C, F), "X": (N, C, F), "Y": (E, C), "Z": (N, 2, F), "coef": (P, 2), "table": (5, L, F),
        "S": (E, 2), "q": (N, F), "k": (N, F),
    }  # fmt: skip
    form = {"message": MESSAGE, "embedding": EMBEDDING, "contraction": CONTRACTION}[name]
    tensors = {
        slot: torch.randn(shapes[slot], generator=generator, dtype=torch.float64, requires_grad=True)
        for slot in form.slots
    }
    return tensors, indices, C


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules(name: str) -> None:
    tensors, indices, components = arguments(name)
    for slot in tensors:
        others = [tensor for other, tensor in tensors.items() if other != slot]
        call = (slot, list(tensors[slot].shape), others, indices, components)
        torch.library.opcheck(OPERATORS[name], call)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_their_forms_to_second_derivatives(name: str) -> None:
    tensors, indices, components = arguments(name)
    form = {"message": MESSAGE, "embedding": EMBEDDING, "contraction": CONTRACTION}[name]
    layout = edge_layout(indices, components, indices[0].device)
    for slot in tensors:
        others = [tensor for other, tensor in tensors.items() if other != slot]
        shape = tuple(tensors[slot].shape)
        results = []
        for value in (
            OPERATORS[name](slot, shape, others, indices, components),
            form(slot, shape, layout, *others),
        ):
            first = torch.autograd.grad(value.square().sum(), others, create_graph=True)
            second = torch.autograd.grad(sum(x.square().sum() for x in first), others)
            results.append([value, *first, *second])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
