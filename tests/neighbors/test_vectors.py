"""Vectors and distances of edges, and their derivatives, in loops and in tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchmdnet.graph import Edges, edges_within
from torchmdnet.testing import derivatives, mixed_boxes, small_molecules

CELLS = mixed_boxes()


def edges(pos: Tensor, box: Tensor | None, *, loop: bool = True) -> Edges:
    systems = small_molecules() if box is None else CELLS
    return edges_within(pos, systems.batch, box, systems.num_systems, cutoff_upper=3.0, loop=loop)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kind", ["open", "shared box", "boxes"])
@pytest.mark.parametrize("loop", [True, False])
def test_loops_and_tensors_agree(kind: str, loop: bool, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    systems = small_molecules() if kind == "open" else CELLS
    inputs = [systems.pos.clone().requires_grad_()]
    if kind != "open":
        assert CELLS.box is not None
        box = CELLS.box if kind == "boxes" else 3.5 * torch.eye(3, dtype=torch.float64)[None]
        inputs.append(box.clone().requires_grad_())

    def measured(pos: Tensor, box: Tensor | None = None) -> Tensor:
        found = edges(pos, box, loop=loop)
        rows = torch.cat([found.vec, found.dist[:, None]], dim=1)
        i, j = found.edge_index
        key = (i + 100 * j)[:, None] + rows.detach()[:, :1] + 0.1 * rows.detach()[:, 1:2]
        weights = torch.cos(key * torch.arange(1, 5))  # whatever the order of the edges
        summed = (weights * rows * rows).sum() + (found.pairs.dist**3).sum()
        return summed[None]

    found = derivatives(measured, inputs, order)
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")
    for ours, theirs in zip(found, derivatives(measured, inputs, order), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_an_edge_points_from_its_sender_to_its_receiver() -> None:
    systems = small_molecules()
    found = edges(systems.pos, None)
    i, j = found.edge_index
    torch.testing.assert_close(found.vec, systems.pos[i] - systems.pos[j])
    torch.testing.assert_close(found.dist, (systems.pos[i] - systems.pos[j]).norm(dim=1))
    torch.testing.assert_close(found.pairs.dist[found.pairs.of_edge], found.dist)
    assert found.pairs.dist[-1] == 0


def test_atoms_at_one_place_have_no_slope() -> None:
    pos = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    found = edges_within(pos, torch.zeros(2, dtype=torch.long), None, 1, cutoff_upper=2.0)
    assert found.dist.tolist() == [0.0, 0.0]
    (slope,) = torch.autograd.grad(found.pairs.dist.sum(), pos)
    assert not slope.any()


def test_nothing_makes_nothing() -> None:
    pos = torch.randn(3, 3, requires_grad=True) * 100
    found = edges_within(pos, torch.zeros(3, dtype=torch.long), None, 1, cutoff_upper=1e-3)
    assert found.vec.shape == (0, 3)
    (gradient,) = torch.autograd.grad(found.vec.sum() + found.pairs.dist.sum(), pos)
    assert not gradient.any()
