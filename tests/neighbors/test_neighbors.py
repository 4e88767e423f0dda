"""Every search finds the pairs that ASE finds, in any lattice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list

from torchmdnet.neighbors import FixedSearch, VerletList, pairs_within
from torchmdnet.neighbors.brute import all_pairs
from torchmdnet.neighbors.cells import vesin_pairs
from torchmdnet.neighbors.lattice import lattice_of
from torchmdnet.neighbors.search import pairs_of_images
from torchmdnet.neighbors.traceable import traceable_pairs

CUTOFF = 3.3
CELLS = {
    "open": np.zeros((3, 3)),
    "cube": np.eye(3) * 7.0,
    "rotated cube": np.array([[0, 7.0, 0], [7.0, 0, 0], [0, 0, 7.0]]),
    "triclinic": np.array([[5.0, 0.3, -0.4], [1.9, 4.6, 0.2], [-1.1, 2.0, 5.3]]),
    "smaller than the cutoff": np.array([[2.1, 0.2, 0.0], [0.4, 2.4, 0.3], [-0.2, 0.1, 2.2]]),
    "slab": np.array([[4.0, 0.5, 0], [0.3, 4.4, 0.2], [0, 0, 0]]),
    "wire": np.array([[0, 0, 0], [0.6, 0.8, 2.9], [0, 0, 0]]),
}


def loop_over_images(pos, batch, lattice, num_systems, cutoff):
    if lattice is None:
        return pairs_of_images(pos, batch, torch.zeros(1, 3, 3), cutoff)
    return pairs_of_images(pos, batch, lattice.cell.masked_fill(lattice.is_open[:, :, None], 0.0), cutoff)


def tensor_operations(pos, batch, lattice, num_systems, cutoff):
    if lattice is None:
        return traceable_pairs(pos, batch, torch.zeros(1, 3, 3), num_systems, cutoff)
    cell = lattice.cell.masked_fill(lattice.is_open[:, :, None], 0.0)
    return traceable_pairs(pos, batch, cell, num_systems, cutoff)


SEARCHES = [all_pairs, vesin_pairs, loop_over_images, tensor_operations]


def pairs_of_ase(pos: np.ndarray, cell: np.ndarray) -> Counter:
    is_periodic = cell.any(axis=1)
    atoms = Atoms("H" * len(pos), positions=pos, cell=cell, pbc=is_periodic)
    i, j, shift = neighbor_list("ijS", atoms, CUTOFF)
    # ASE's vector is from i to j, ours from j to i
    return Counter((int(a), int(b), *(-s).tolist()) for a, b, s in zip(i, j, shift, strict=True))


def as_counter(found, offset: int = 0) -> Counter:
    i, j, shifts = found
    rows = torch.zeros(len(i), 3) if shifts is None else shifts
    once = [(int(a) - offset, int(b) - offset, *map(round, s.tolist())) for a, b, s in zip(i, j, rows, strict=True)]
    return Counter(once + [(b, a, -x, -y, -z) for a, b, x, y, z in once])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_pairs_equal_those_of_ase(cell: np.ndarray, search) -> None:
    pos = np.random.default_rng(1).uniform(-6, 9, size=(14, 3))  # deliberately outside the cell
    box = torch.tensor(cell)[None]
    lattice = lattice_of(box, 1, CUTOFF) if cell.any() else None
    found = search(torch.tensor(pos), torch.zeros(14, dtype=torch.long), lattice, 1, CUTOFF)
    assert as_counter(found) == pairs_of_ase(pos, cell)


@pytest.mark.parametrize("search", SEARCHES)
def test_systems_of_a_batch_keep_to_themselves(search) -> None:
    generator = np.random.default_rng(2)
    positions = {
        name: generator.uniform(-4, 8, size=(n, 3)) for name, n in zip(CELLS, (1, 5, 9, 7, 3, 6, 4), strict=True)
    }
    batch = torch.cat([torch.full((len(p),), k) for k, p in enumerate(positions.values())])
    pos = torch.tensor(np.concatenate(list(positions.values())))
    boxes = torch.tensor(np.stack(list(CELLS.values())))
    found = search(pos, batch, lattice_of(boxes, len(CELLS), CUTOFF), len(CELLS), CUTOFF)
    total = 0
    for k, (name, cell) in enumerate(CELLS.items()):
        mine = batch[found[0]] == k
        assert (batch[found[1][mine]] == k).all()
        offset = int((batch < k).sum())
        assert as_counter(tuple(x[mine] for x in found), offset) == pairs_of_ase(positions[name], cell), name
        total += int(mine.sum())
    assert total == len(found[0])


@pytest.mark.parametrize("search", SEARCHES)
def test_atoms_need_not_be_grouped_by_system(search) -> None:
    generator = torch.Generator().manual_seed(0)
    pos = torch.rand(12, 3, generator=generator, dtype=torch.float64) * 5
    batch = torch.tensor([0, 1, 2] * 4)
    i, j, _ = search(pos, batch, None, 3, CUTOFF)
    distance = torch.cdist(pos, pos)
    expected = (distance < CUTOFF) & (batch[:, None] == batch[None]) & ~torch.eye(12, dtype=torch.bool)
    both = {frozenset((int(a), int(b))) for a, b in zip(i, j, strict=True)}
    assert both == {frozenset(p) for p in expected.nonzero().tolist()}
    assert len(both) == len(i)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_pairs_of_images_come_in_their_order(cell: np.ndarray) -> None:
    pos = torch.tensor(np.random.default_rng(1).uniform(-6, 9, size=(14, 3)))
    i, j, shifts = pairs_of_images(pos, torch.zeros(14, dtype=torch.long), torch.tensor(cell)[None], CUTOFF)
    rows = list(zip(i.tolist(), j.tolist(), shifts.tolist(), strict=True))
    assert rows == sorted(rows)
    assert (i <= j).all()


def test_an_atom_that_is_nowhere_has_no_neighbours() -> None:
    pos, box = torch.rand(6, 3, dtype=torch.float64), 6 * torch.eye(3, dtype=torch.float64)[None]
    pos[2, 1], pos[4] = torch.nan, torch.inf
    i, j, _ = pairs_within(pos, torch.zeros(6, dtype=torch.long), box, 1, 2.5)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == {(0, 1), (0, 3), (0, 5), (1, 3), (1, 5), (3, 5)}


def test_no_atoms_have_no_neighbours() -> None:
    i, j, shifts = pairs_within(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), None, 0, 5.0)
    assert i.numel() == j.numel() == 0
    assert shifts is None


def test_a_flat_box_is_refused_by_number_and_vectors() -> None:
    box = torch.stack([torch.eye(3), torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]])]) * 5
    with pytest.raises(ValueError, match=r"box 1 spans no volume.*\[10\.0, 0\.0, 0\.0\]"):
        pairs_within(torch.zeros(2, 3), torch.tensor([0, 1]), box, 2, 3.0)


@pytest.mark.parametrize("height", [1e-3, 1e-7, 1e-100])
def test_a_box_with_too_many_images_in_reach_is_refused_by_number(height: float) -> None:
    box = torch.diag(torch.tensor([6.0, 6.0, height], dtype=torch.float64)).expand(2, 3, 3).clone()
    box[1, 2, 2] = 6.0
    pos, batch = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    searches = [pairs_within, VerletList(1.0), FixedSearch(2)]
    for search in searches:
        with pytest.raises(ValueError, match=r"box \d (is only .* Å high: .* periodic images|spans no volume)"):
            search(pos, batch, box, 2, 4.0)
    many = torch.rand(4000, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"periodic images|spans no volume"):
        pairs_within(many, torch.arange(4000) // 2000, box, 2, 4.0)
    box[0, 2] = 0.0  # open
    assert len(pairs_within(pos, batch, box, 2, 4.0)[0])


def test_a_box_with_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="box 0 spans no volume"):
        pairs_within(torch.zeros(1, 3), torch.tensor([0]), torch.full((1, 3, 3), float("nan")), 1, 3.0)
