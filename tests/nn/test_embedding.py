"""The neighbour embedding sums over neighbours, images of the atom included, and never over self loops."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import build_graph
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.nn.radial import ExpNormalSmearing
from torchmdnet.tape.steps import Message
from torchmdnet.tape.tape import Definitions
from torchmdnet.testing import cell_of_atoms, small_molecules

CUTOFF = 3.0


def parts() -> tuple[NeighborEmbedding, ExpNormalSmearing]:
    torch.manual_seed(0)
    block = NeighborEmbedding(8, 6, 0.0, CUTOFF, max_z=10, dtype=torch.float64)
    torch.nn.init.normal_(block.distance_proj.bias)
    return block, ExpNormalSmearing(0.0, CUTOFF, 6, trainable=False, dtype=torch.float64)


def test_it_is_the_sum_of_the_equation() -> None:
    block, basis = parts()
    systems = small_molecules()
    x = torch.randn(len(systems.z), 8, dtype=torch.float64)
    around = torch.zeros_like(x)
    for i in range(len(systems.z)):
        for j in range(len(systems.z)):
            r = (systems.pos[i] - systems.pos[j]).norm()
            if i != j and systems.batch[i] == systems.batch[j] and r < CUTOFF:
                weight = 0.5 * (torch.cos(torch.pi * r / CUTOFF) + 1) * block.distance_proj(basis(r))
                around[i] += weight * block.embedding.weight[systems.z[j]]
    expected = block.combine(torch.cat([x, around], dim=1))
    graph = build_graph(systems.z, systems.pos, systems.batch, cutoff_upper=CUTOFF, loop=True)
    result = block(graph.z, x, graph.edge_index, graph.edge_dist, basis(graph.edge_dist))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loop", [False, True])
def test_pairs_and_edges_agree(loop: bool) -> None:
    block, basis = parts()
    systems = cell_of_atoms()
    graph = build_graph(*systems, cutoff_upper=CUTOFF, loop=loop)
    assert graph.pairs is not None
    x = torch.randn(len(systems.z), 8, dtype=torch.float64)
    by_edge = block(graph.z, x, graph.edge_index, graph.edge_dist, basis(graph.edge_dist))
    at = Definitions(graph, Radial(graph.pairs.dist, basis, CosineCutoff(0.0, CUTOFF), None))
    near = at(Message(RadialFunction(block, "radial"), without_loops=True), block.embedding(graph.z))
    by_pair = block.combine(torch.cat([x, near], dim=1))
    torch.testing.assert_close(by_pair, by_edge, rtol=1e-12, atol=1e-12)


def test_images_of_the_atom_itself_are_neighbours() -> None:
    block, basis = parts()
    z, pos = torch.tensor([6]), torch.zeros(1, 3, dtype=torch.float64)
    x = torch.randn(1, 8, dtype=torch.float64)
    results = []
    for box in (None, 2.0 * torch.eye(3, dtype=torch.float64)):
        graph = build_graph(z, pos, box=box, cutoff_upper=CUTOFF, loop=True)
        results.append(block(z, x, graph.edge_index, graph.edge_dist, basis(graph.edge_dist)))
    alone = block.combine(torch.cat([x, torch.zeros_like(x)], dim=1))
    torch.testing.assert_close(results[0], alone)
    assert not torch.allclose(results[1], alone)
