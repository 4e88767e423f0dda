"""The low-level functions of earlier releases answer as they did."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.extensions.neighbor_utils import build_cell_list, get_cell_dimensions
from torchmdnet.extensions.ops import get_neighbor_pairs_kernel
from torchmdnet.testing import small_molecules


def pairs(**options):
    systems = small_molecules()
    arguments = {
        "strategy": "brute",
        "positions": systems.pos,
        "batch": systems.batch,
        "box_vectors": torch.zeros(3, 3),
        "use_periodic": False,
        "cutoff_lower": 0.0,
        "cutoff_upper": 1.5,
        "max_num_pairs": 64,
        "loop": False,
        "include_transpose": False,
        "num_cells": 0,
        **options,
    }
    return systems, get_neighbor_pairs_kernel(*arguments.values())


@pytest.mark.parametrize("strategy", ["brute", "cell"])
def test_pairs_come_in_arrays_of_fixed_length(strategy: str) -> None:
    systems, (neighbors, deltas, distances, found) = pairs(strategy=strategy)
    count = int(found)
    assert found.dtype == torch.int32
    assert (neighbors.shape, deltas.shape, distances.shape) == ((2, 64), (64, 3), (64,))
    i, j = neighbors[:, :count]
    assert (i > j).all()
    assert (neighbors[:, count:] == -1).all()
    assert not deltas[count:].any()
    assert not distances[count:].any()
    torch.testing.assert_close(systems.pos[i] - systems.pos[j], deltas[:count])
    close = torch.cdist(systems.pos, systems.pos) < 1.5
    close &= systems.batch[:, None] == systems.batch[None]
    assert count == int(close.triu(1).sum())


def test_both_directions_self_pairs_and_a_box_are_options() -> None:
    _, (*_, once) = pairs()
    _, (*_, both) = pairs(include_transpose=True)
    _, (*_, loops) = pairs(loop=True)
    _, (*_, boxed) = pairs(use_periodic=True, box_vectors=2.5 * torch.eye(3), max_num_pairs=4000)
    assert int(both) == 2 * int(once)
    assert int(loops) == int(once) + 10
    assert int(boxed) > int(once)


def test_too_many_pairs_and_unknown_strategies_are_errors() -> None:
    with pytest.raises(RuntimeError, match="please increase max_num_pairs"):
        pairs(max_num_pairs=2)
    with pytest.raises(ValueError, match="strategy: 'shared'"):
        pairs(strategy="shared")


def test_boxes_have_at_least_three_cells_along_each_axis() -> None:
    box = torch.tensor([10.0, 12.0, 20.0])
    assert get_cell_dimensions(*box, cutoff_upper=3.0).tolist() == [3, 4, 6]
    assert get_cell_dimensions(*box, cutoff_upper=torch.tensor(15.0)).tolist() == [3, 3, 3]


@pytest.mark.parametrize("periodic", [True, False])
def test_atoms_are_sorted_by_cell(periodic: bool) -> None:
    torch.manual_seed(0)
    box, dims = torch.tensor([10.0, 12.0, 20.0]), torch.tensor([3, 4, 6])
    pos, batch = 30 * torch.rand(50, 3) - 15, torch.arange(50) // 10
    order, sorted_pos, sorted_batch, start, end = build_cell_list(pos, batch, box, periodic, dims, 72)
    assert sorted(order.tolist()) == list(range(50))
    assert torch.equal(sorted_pos, pos[order.long()])
    assert torch.equal(sorted_batch, batch[order.long()])
    assert int((end - start).sum()) == 50
    for cell in range(72):
        x, y, z = cell // 24, cell // 6 % 4, cell % 6
        for place in range(int(start[cell]), int(end[cell])):
            fraction = sorted_pos[place] / box
            fraction = fraction - fraction.floor() if periodic else (fraction + 0.5).clamp(0, 1 - 1e-6)
            assert (fraction * dims).floor().tolist() == [x, y, z]
