"""A list that is kept finds what a fresh search finds, and is made anew in time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_neighbors import CELLS, as_counter
from torch import Tensor

from torchmdnet.errors import DataError
from torchmdnet.neighbors import VerletList, pairs_within

CUTOFF, SKIN = 3.3, 0.6
GAS = np.random.default_rng(4).uniform(0, 7, size=(60, 3))


def moved(pos: Tensor, distance: float, seed: int = 0) -> Tensor:
    """Every atom displaced by so much, in any direction."""
    step = torch.randn(pos.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pos + (distance * step / step.norm(dim=1, keepdim=True)).to(pos.dtype)


def expect_fresh_pairs(known: VerletList, pos: Tensor, batch: Tensor, box: Tensor | None, systems: int, **options):
    found = known(pos, batch, box, systems, CUTOFF, **options)
    assert as_counter(found) == as_counter(pairs_within(pos, batch, box, systems, CUTOFF, **options))
    i, j, shifts = found
    assert (i <= j).all()
    keys = torch.stack([i, j], dim=1).tolist()
    rows = keys if shifts is None else [(*key, *s) for key, s in zip(keys, shifts.tolist(), strict=True)]
    assert rows == sorted(rows)


@pytest.fixture(autouse=True)
def no_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmdnet.neighbors.search.LOOP_LIMIT", 0)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_walk_meets_the_same_neighbours(cell: np.ndarray, dtype: torch.dtype) -> None:
    count = 8 if "smaller" in next(name for name, value in CELLS.items() if value is cell) else 25
    pos = torch.tensor(GAS[:count]).to(dtype)
    batch, box = torch.zeros(count, dtype=torch.long), torch.tensor(cell)[None].to(dtype) if cell.any() else None
    known = VerletList(SKIN)
    for step in range(25):
        expect_fresh_pairs(known, pos, batch, box, 1)
        pos = moved(pos, 0.06, step)
    assert 3 <= known.num_searches <= 12


def test_a_list_lasts_until_an_atom_has_moved_by_half_the_skin() -> None:
    pos, batch, box = torch.tensor(GAS), torch.zeros(60, dtype=torch.long), 7 * torch.eye(3).double()[None]
    known = VerletList(SKIN)
    expected = [1, 2, 2, 2, 3, 3]  # the first call is not known to be of a simulation
    for distance, searches in zip((0.0, 0.0, 0.2, 0.29, 0.31, 0.35), expected, strict=True):
        expect_fresh_pairs(known, moved(pos, distance), batch, box, 1)
        assert known.num_searches == searches


@pytest.mark.parametrize("row", [[7.0, 0, 0], [0, 0, math.nan], [0, 1e-9, 0]])
def test_a_box_that_collapses_is_refused_as_in_a_fresh_search(row: list[float]) -> None:
    pos, batch, box = torch.tensor(GAS), torch.zeros(60, dtype=torch.long), 7 * torch.eye(3).double()[None]
    known = VerletList(SKIN)
    known(pos, batch, box, 1, CUTOFF)
    flat = box.clone()
    flat[0, 1] = torch.tensor(row, dtype=torch.float64)
    with pytest.raises(DataError) as fresh:
        pairs_within(pos, batch, flat, 1, CUTOFF)
    with pytest.raises(DataError) as found:
        known(pos, batch, flat, 1, CUTOFF)
    assert str(found.value) == str(fresh.value)


def test_a_jump_of_one_atom_is_noticed() -> None:
    pos, batch = torch.tensor(GAS), torch.zeros(60, dtype=torch.long)
    known = VerletList(SKIN)
    for _ in range(3):
        expect_fresh_pairs(known, pos, batch, None, 1)
    pos = pos.clone()
    pos[7] = pos[3] + 0.5
    expect_fresh_pairs(known, pos, batch, None, 1)
    assert known.num_searches == 3


@pytest.mark.parametrize("name", ["cube", "triclinic", "slab", "wire", "smaller than the cutoff"])
def test_boxes_may_breathe(name: str) -> None:
    count = 8
    first, batch = torch.tensor(GAS[:count]), torch.zeros(count, dtype=torch.long)
    known = VerletList(SKIN)
    for step in range(20):
        strain = 1 + 0.002 * step * torch.tensor([[1.0, 0.3, 0.0], [0.0, -0.5, 0.2], [0.1, 0.0, 0.7]]).double()
        deformation = torch.eye(3).double() + (strain - 1)
        box = torch.tensor(CELLS[name])[None] @ deformation
        expect_fresh_pairs(known, moved(first @ deformation, 0.01 * step, step), batch, box, 1)
    assert known.num_searches < 15


def test_an_affine_change_of_a_large_box_is_no_movement() -> None:
    pos, batch = torch.tensor(GAS) * 20, torch.zeros(60, dtype=torch.long)
    known = VerletList(SKIN)
    for scale in (1.0, 1.0, 1.01, 0.99, 1.03):  # atoms move by up to 4 Å
        box = 140 * scale * torch.eye(3).double()[None]
        expect_fresh_pairs(known, scale * pos, batch, box, 1)
    assert known.num_searches == 2
    expect_fresh_pairs(known, 0.7 * pos, batch, 98 * torch.eye(3).double()[None], 1)
    assert known.num_searches == 3


def test_a_direction_that_opens_is_noticed() -> None:
    pos, batch = torch.tensor(GAS), torch.zeros(60, dtype=torch.long)
    box = 7 * torch.eye(3).double()[None]
    slab = box * torch.tensor([1.0, 1.0, 0.0])[:, None]
    known = VerletList(SKIN)
    for one in (box, box, slab, slab, None, box):
        expect_fresh_pairs(known, pos, batch, one, 1)


def test_systems_of_a_batch_have_boxes_of_their_own() -> None:
    batch = torch.arange(3).repeat_interleave(20)
    pos = torch.tensor(GAS)
    boxes = torch.stack([torch.tensor(CELLS[name]) for name in ("cube", "slab", "triclinic")])
    known = VerletList(SKIN)
    for step in range(6):
        expect_fresh_pairs(known, moved(pos, 0.05 * step, step), batch, boxes * (1 + 0.001 * step), 3)
    assert known.num_searches <= 4
    expect_fresh_pairs(known, pos, torch.arange(3).repeat(20), boxes, 3)


def test_cutoffs_have_lists_of_their_own_and_lower_ones_count() -> None:
    pos, batch = torch.tensor(GAS), torch.zeros(60, dtype=torch.long)
    known = VerletList(SKIN)
    for _ in range(2):
        expect_fresh_pairs(known, pos, batch, None, 1, lower=1.5)
        known(pos, batch, None, 1, 2.0)
    assert known.num_searches == 4


def test_structures_that_have_nothing_in_common_are_searched_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(pos, batch, box, num_systems, cutoff, lower=0.0):
        asked.append(cutoff)
        return pairs_within(pos, batch, box, num_systems, cutoff, lower)

    monkeypatch.setattr("torchmdnet.neighbors.verlet.pairs_within", watched)
    known = VerletList(SKIN)
    for seed in range(3):
        known(
            torch.rand(30, 3, generator=torch.Generator().manual_seed(seed)) * 9, torch.zeros(30).long(), None, 1, 2.0
        )
    assert asked == [2.0, 2.0, 2.0]


def test_results_do_not_depend_on_when_the_list_was_made() -> None:
    pos, batch, box = torch.tensor(GAS), torch.zeros(60, dtype=torch.long), torch.tensor(CELLS["triclinic"])[None]
    known = VerletList(SKIN)
    for step in range(4):
        known(moved(pos, 0.05 * step), batch, box, 1, CUTOFF)
    for ours, fresh in zip(
        known(pos, batch, box, 1, CUTOFF), VerletList(SKIN)(pos, batch, box, 1, CUTOFF), strict=True
    ):
        assert ours is not None
        assert fresh is not None
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("skin", [0.0, -1.0, float("inf")])
def test_a_skin_is_a_distance(skin: float) -> None:
    with pytest.raises(ValueError, match="is no distance"):
        VerletList(skin)
