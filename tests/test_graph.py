"""The graph says what the call meant, and refuses what it cannot mean."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import build_graph, count_systems, sum_to_atoms, sum_to_systems
from torchmdnet.testing import tiny_model


def atoms(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    pos = torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    return torch.ones(n, dtype=torch.long), pos


def test_edges_point_from_sender_to_receiver() -> None:
    z, pos = atoms()
    graph = build_graph(z, pos, cutoff_upper=2.0)
    i, j = graph.edge_index
    torch.testing.assert_close(graph.edge_vec, pos[i] - pos[j])
    torch.testing.assert_close(graph.edge_dist, (pos[i] - pos[j]).norm(dim=1))


def test_self_loops_stand_in_front_of_each_atom_s_edges() -> None:
    z, pos = atoms()
    plain = build_graph(z, pos, cutoff_upper=2.0)
    looped = build_graph(z, pos, cutoff_upper=2.0, loop=True)
    i, j = looped.edge_index
    assert (i[1:] >= i[:-1]).all()
    loops = i == j
    assert i[loops].tolist() == list(range(6))
    assert (looped.edge_dist[loops] == 0).all()
    assert torch.equal(looped.edge_index[:, ~loops], plain.edge_index)
    torch.testing.assert_close(looped.edge_vec[~loops], plain.edge_vec)


def test_edges_come_in_pairs_of_opposite_direction() -> None:
    z, pos = atoms()
    graph = build_graph(z, pos, box=torch.eye(3, dtype=torch.float64) * 3.1, cutoff_upper=3.5, loop=True)
    pairs = graph.pairs
    assert pairs is not None
    torch.testing.assert_close(graph.edge_vec[pairs.reverse], -graph.edge_vec)
    assert torch.equal(graph.edge_index[:, pairs.reverse], graph.edge_index.flip(0))
    assert torch.equal(pairs.of_edge[pairs.reverse], pairs.of_edge)
    torch.testing.assert_close(pairs.dist[pairs.of_edge], graph.edge_dist)
    rows = torch.bincount(graph.edge_index[0], minlength=6)
    assert torch.equal(pairs.row_start.diff(), rows)


def test_lower_cutoffs_spare_self_loops() -> None:
    z, pos = atoms()
    graph = build_graph(z, pos, cutoff_lower=1.2, cutoff_upper=2.0, loop=True)
    loops = graph.edge_index[0] == graph.edge_index[1]
    assert loops.sum() == 6
    assert (graph.edge_dist[~loops] >= 1.2).all()


def test_sums_collect_what_belongs_together() -> None:
    z, pos = atoms()
    graph = build_graph(z, pos, torch.tensor([0, 0, 2, 2, 2, 0]), cutoff_upper=9.0)
    degree = sum_to_atoms(torch.ones(graph.edge_index.shape[1], 1), graph)
    assert degree[:, 0].tolist() == [2.0] * 6
    assert sum_to_systems(torch.ones(6, 1), graph)[:, 0].tolist() == [3.0, 0.0, 3.0]


def test_the_number_of_systems_may_exceed_the_batch() -> None:
    z, pos = atoms()
    assert build_graph(z, pos, cutoff_upper=1.0, num_systems=4).num_systems == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.ones(6)}, "z must hold one integer per atom"),
        ({"pos": torch.zeros(5, 3)}, r"pos has shape \(5, 3\) but z holds 6 atoms"),
        ({"batch": torch.zeros(5, dtype=torch.long)}, r"batch must hold one integer per atom"),
        ({"box": torch.eye(2)}, r"box has shape \(2, 2\)"),
        ({"box": torch.eye(3).expand(2, 3, 3)}, r"box has shape \(2, 3, 3\) but batch holds 1 systems"),
        ({"q": torch.zeros(6)}, r"q has shape \(6,\) but batch holds 1 systems"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    z, pos = atoms()
    arguments = {"z": z, "pos": pos, "batch": None, "box": None, "q": None, **changes}
    with pytest.raises(ValueError, match=message):
        build_graph(**arguments, cutoff_upper=3.0)


def test_charges_take_the_precision_of_the_positions() -> None:
    z, pos = atoms()
    graph = build_graph(z, pos, q=torch.tensor([[1]]), cutoff_upper=1.0)
    assert graph.q is not None
    assert graph.q.dtype == torch.float64
    assert graph.q.shape == (1,)


def test_a_call_that_is_compiled_for_no_atoms_has_no_systems():
    from torchmdnet.tracing import recording

    with recording():
        assert count_systems(torch.zeros(0, dtype=torch.long)) == 0


@pytest.mark.slow
def test_a_compiled_model_answers_for_no_atoms():
    model = tiny_model("tensornet", derivative=False)
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, dtype=model.dtype), torch.zeros(0, dtype=torch.long)
    energy, _ = torch.compile(model, backend="eager")(*nothing)
    assert energy.shape == model(*nothing)[0].shape
