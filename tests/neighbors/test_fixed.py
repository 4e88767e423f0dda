"""A search of fixed shape finds what the others find, says when its room was too small, and never looks at a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_neighbors import CELLS, as_counter
from torch import Tensor

from torchmdnet.neighbors import FixedSearch, pairs_within

CUTOFF, GHOSTS = 3.3, 4


def gas(count: int, edge: float = 7.0, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * edge - edge / 3


class Padded:
    """Calls a search with ghosts behind the atoms, and takes them out again."""

    def __init__(self) -> None:
        self.search = FixedSearch(GHOSTS)

    def __call__(self, pos: Tensor, batch: Tensor, box: Tensor | None, num_systems: int, **options):
        apart = torch.zeros(GHOSTS, 3, dtype=pos.dtype)
        apart[1::2, 0] = CUTOFF
        if box is not None:
            box = torch.cat([box.expand(num_systems, 3, 3), torch.zeros(1, 3, 3, dtype=box.dtype)])
        systems = torch.cat([batch, torch.full((GHOSTS,), num_systems)])
        options = {"cutoff": CUTOFF, **options}
        return self.search(torch.cat([pos, apart]), systems, box, num_systems + 1, **options)

    def real(self, pos: Tensor, *args, **options):
        i, j, shifts = self(pos, *args, **options)
        is_real = i < len(pos)
        spare = torch.stack([i, j])[:, ~is_real]
        assert (spare[1] == spare[0] + 1).all()
        assert ((spare[0] - len(pos)) % 2 == 0).all()
        assert (is_real.long().diff() <= 0).all()
        return i[is_real], j[is_real], None if shifts is None else shifts[is_real]


@pytest.fixture(params=["every pair", "cells"])
def kind(request, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cells":
        monkeypatch.setattr("torchmdnet.neighbors.fixed.FEW_CANDIDATES", 0)
    return request.param


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("scale", [1.0, 3.1])
def test_pairs_equal_those_of_the_other_searches(cell: np.ndarray, scale: float, kind: str) -> None:
    count = 60 if scale > 1 else 14
    pos, batch = gas(count, 7 * scale), torch.zeros(count, dtype=torch.long)
    box = scale * torch.tensor(cell)[None] if cell.any() else None
    found = Padded()
    for lower in (0.0, 1.7):
        expected = pairs_within(pos, batch, box, 1, CUTOFF, lower)
        assert as_counter(found.real(pos, batch, box, 1, lower=lower)) == as_counter(expected)
    plans = [plan.num_cells for plan in found.search.plans.values()]
    assert all(cells == 1 for cells in plans) or kind == "cells"
    assert all(cells > 1 for cells in plans) or kind == "every pair" or scale == 1


def test_systems_of_a_batch_have_cells_of_their_own(kind: str) -> None:
    batch = torch.arange(4).repeat_interleave(torch.tensor([20, 1, 30, 9]))
    boxes = torch.stack([torch.tensor(CELLS[name]) for name in ("cube", "open", "slab", "triclinic")]) * 2.3
    for order in (torch.arange(60), torch.randperm(60, generator=torch.Generator().manual_seed(2))):
        pos = gas(60, 12.0)[order]
        expected = pairs_within(pos, batch[order], boxes, 4, CUTOFF)
        assert as_counter(Padded().real(pos, batch[order], boxes, 4)) == as_counter(expected)


def test_shapes_stay_while_atoms_move(kind: str) -> None:
    batch, box, found = torch.zeros(50, dtype=torch.long), 9 * torch.eye(3).double()[None], Padded()
    shapes = set()
    for seed in range(5):
        pos = gas(50, 9.0) + 0.05 * gas(50, 9.0, seed)
        shapes.add(found(pos, batch, box, 1)[0].shape)
        assert not found.search.outgrown()
        assert as_counter(found.real(pos, batch, box, 1)) == as_counter(pairs_within(pos, batch, box, 1, CUTOFF))
    assert len(shapes) == 1


def test_atoms_may_leave_the_cells_of_an_open_system(kind: str) -> None:
    batch, found = torch.zeros(40, dtype=torch.long), Padded()
    found(gas(40, 12.0), batch, None, 1)
    pos = 1.8 * gas(40, 12.0) + 3
    assert as_counter(found.real(pos, batch, None, 1)) == as_counter(pairs_within(pos, batch, None, 1, CUTOFF))
    assert not found.search.outgrown()


@pytest.mark.parametrize("change", ["pairs", "cells", "box", "direction"])
def test_it_says_when_the_room_was_too_small_and_then_takes_more(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "cells":
        monkeypatch.setattr("torchmdnet.neighbors.fixed.FEW_CANDIDATES", 0)
    pos, batch, found = gas(80, 14.0), torch.zeros(80, dtype=torch.long), Padded()
    box = 14 * torch.eye(3).double()[None]
    found(pos, batch, box, 1)
    assert not found.search.outgrown()
    if change in ("pairs", "cells"):
        pos = 0.35 * pos
    elif change == "box":
        pos, box = 0.2 * pos, 0.2 * box
    else:
        box = box * torch.tensor([1.0, 1.0, 0.0]).double()[:, None]
    before = found(pos, batch, box, 1)[0].shape
    assert found.search.outgrown()
    after = found(pos, batch, box, 1)[0].shape
    assert not found.search.outgrown()
    if change != "direction":
        assert after > before
    assert as_counter(found.real(pos, batch, box, 1)) == as_counter(pairs_within(pos, batch, box, 1, CUTOFF))


def test_without_a_cutoff_every_pair_of_a_system_is_found() -> None:
    batch = torch.tensor([0] * 5 + [1] * 3)
    pos = gas(8, 50.0)
    found = Padded().real(pos, batch, None, 2, cutoff=float("inf"))
    assert as_counter(found) == as_counter(pairs_within(pos, batch, None, 2, float("inf")))


@pytest.mark.parametrize("is_periodic", [True, False])
def test_no_value_is_looked_at(kind: str, is_periodic: bool) -> None:
    """On the meta device there are none."""
    pos, batch = gas(50, 14.0), torch.zeros(50, dtype=torch.long)
    box, found = 14 * torch.eye(3).double()[None] if is_periodic else None, Padded()
    expected = found(pos, batch, box, 1)
    for key, plan in found.search.plans.items():
        tensors = {name: value.to("meta") for name, value in plan._asdict().items() if isinstance(value, Tensor)}
        found.search.plans[key] = plan._replace(**tensors)
    pos = torch.cat([pos, torch.zeros(GHOSTS, 3)]).to("meta")
    boxes = None if box is None else torch.cat([box, box]).to("meta")
    systems = torch.cat([batch, torch.ones(GHOSTS).long()]).to("meta")
    for ours, theirs in zip(found.search(pos, systems, boxes, 2, CUTOFF), expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or ours.shape == theirs.shape
