"""Forces and virials follow from slopes in edges, and parts beside the network do not slow the network down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchmdnet.priors.pairs
from torchmdnet.forces import Slopes, forces_of, with_leaves
from torchmdnet.graph import Graph, build_graph
from torchmdnet.priors.base import BasePrior
from torchmdnet.testing import cell_of_atoms, mixed_boxes, tiny_model

CELL, MIXED = cell_of_atoms(), mixed_boxes()
SCALES = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}


class Spring(BasePrior):
    """Reads everything a prior can: positions, lattice vectors, edges and their distances."""

    def per_atom(self, graph: Graph) -> Tensor:
        x = graph.edge_vec[:, 0] ** 2 + graph.edge_dist**3
        return 0.01 * graph.pos.new_zeros(graph.num_atoms).index_add(0, graph.edge_index[0], x)[:, None]

    def per_system(self, graph: Graph) -> Tensor:
        assert graph.box is not None
        height = (graph.pos[:, 2] ** 2)[:, None]
        energy = height.new_zeros(graph.num_systems, 1).index_add(0, graph.batch, height)
        return energy + 0.1 * graph.box.square().sum(dim=(1, 2))[:, None]


class Scaling(BasePrior):
    """Does not add but multiply, through the established hooks."""

    def pre_reduce(self, x: Tensor, z: Tensor, pos: Tensor, batch: Tensor, extra_args: Any = None) -> Tensor:
        return x * (1 + pos[:, :1] ** 2)

    def post_reduce(self, y: Tensor, z: Tensor, pos: Tensor, batch: Tensor, box=None, extra_args=None) -> Tensor:
        return y * y


def priors() -> dict[str, Any]:
    names = {"zbl": {"ZBL": {"cutoff_distance": 3.0, **SCALES}}, "d2": {"D2": {"cutoff_distance": 7.0, **SCALES}}}
    models = {name: {"prior_model": prior} for name, prior in names.items()}
    both = {"prior_model": {**names["zbl"], **names["d2"], "Atomref": {"max_z": 20}}}
    return {**models, "three": both, "spring": {}, "scaling": {}, "mean": {"reduce_op": "mean"}}


def model_with(architecture: str, name: str) -> Any:
    model = tiny_model(architecture, embedding_dimension=16, **priors()[name])
    own = {"spring": Spring, "scaling": Scaling}.get(name)
    if own is not None:
        model.prior_model = torch.nn.ModuleList([own()])
    return model


def expect_written_out(model: Any) -> None:
    """Evaluate with forces, through the hand-written derivative of the architecture, and compare with autograd."""
    pos = MIXED.pos.clone().requires_grad_()
    box = MIXED.box.clone().requires_grad_()
    model.derivative = False
    energy, _ = model(MIXED.z, pos, MIXED.batch, box, MIXED.q)
    of_pos, of_box = torch.autograd.grad(energy.sum(), [pos, box], allow_unused=True)
    virial = torch.zeros(3, 3, 3, dtype=pos.dtype).index_add(0, MIXED.batch, pos[:, :, None] * of_pos[:, None, :])
    if of_box is not None:
        virial = virial + box.mT @ of_box
    model.derivative = True
    model.representation_model.encode = lambda graph: pytest.fail("autograd goes through the network")
    found = model(MIXED.z, MIXED.pos, MIXED.batch, MIXED.box, MIXED.q, stress=True)
    torch.testing.assert_close(found.energy, energy.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.forces, -of_pos, rtol=1e-9, atol=1e-9)
    stress = ((virial + virial.mT) / 2)[0] / MIXED.box[0].det().abs()
    torch.testing.assert_close(found.stress[0], stress.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", priors())
def test_priors_leave_the_derivative_of_the_network_written_out(name: str) -> None:
    expect_written_out(model_with("tensornet", name))


@pytest.mark.parametrize("architecture", ["tensornet", "tensornet2", "equivariant-transformer"])
def test_heads_that_read_vectors_do_so_too(architecture: str) -> None:
    expect_written_out(tiny_model(architecture, embedding_dimension=16, output_model="EquivariantScalar"))


@pytest.mark.parametrize("head", ["DipoleMoment", "ElectronicSpatialExtent"])
def test_heads_that_read_positions_keep_their_own_share_of_the_forces(head: str) -> None:
    expect_written_out(tiny_model("graph-network", embedding_dimension=16, output_model=head))


def test_a_prior_within_the_cutoff_of_the_network_searches_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = (
        tiny_model("graph-network", prior_model={"ZBL": {"cutoff_distance": cutoff, **SCALES}}) for cutoff in (4.0, 4.1)
    )
    monkeypatch.setattr(torchmdnet.priors.pairs, "pairs_within", lambda *_: pytest.fail("it searches"))
    near(CELL.z, CELL.pos, box=CELL.box)
    with pytest.raises(pytest.fail.Exception, match="it searches"):
        far(CELL.z, CELL.pos, box=CELL.box)


def test_edges_found_and_edges_of_the_network_give_the_same_repulsion() -> None:
    prior = tiny_model("graph-network", prior_model={"ZBL": {"cutoff_distance": 3.0, **SCALES}}).prior_model[0]
    graph = build_graph(CELL.z, CELL.pos, box=CELL.box, cutoff_upper=4.0, loop=True)
    torch.testing.assert_close(prior.per_system(graph), prior.per_system(graph._replace(pairs=None)))


def test_compiled_loops_and_the_definition_sum_the_same_forces_of_pairs_and_of_edges_alone() -> None:
    graph = build_graph(CELL.z, CELL.pos, box=CELL.box, cutoff_upper=4.0, loop=True)
    assert graph.pairs is not None
    generator = torch.Generator().manual_seed(1)
    slopes = Slopes(
        *(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (graph.edge_vec, graph.pairs.dist))
    )
    expected = forces_of(graph, slopes, strained=True)
    for x in slopes:
        if x is not None:
            x.requires_grad_()
    found = forces_of(graph, slopes, strained=True)
    assert found[0].requires_grad
    whole = torch.where(graph.pairs.dist == 0, 0, slopes.dist / graph.pairs.dist) / 2
    alone = Slopes(vec=slopes.vec + whole[graph.pairs.of_edge][:, None] * graph.edge_vec)
    for other in (found, forces_of(graph._replace(pairs=None), alone, strained=True)):
        for x, y in zip(other, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_leaves_keep_the_tensors_of_a_caller_apart_from_what_is_read_beside_edges() -> None:
    pos = CELL.pos.clone().requires_grad_()
    graph = build_graph(CELL.z, pos, box=CELL.box, cutoff_upper=4.0)
    moved, leaves = with_leaves(graph)
    energy = moved.edge_dist.sum() + 2 * moved.pos.sum()
    of_pos, of_dist = torch.autograd.grad(energy, [leaves.pos, leaves.dist], retain_graph=True)
    torch.testing.assert_close(of_pos, torch.full_like(pos, 2.0))
    torch.testing.assert_close(of_dist, torch.full_like(leaves.dist, 2.0))
    (whole,) = torch.autograd.grad(energy, [pos])
    assert not torch.allclose(whole, of_pos)
