"""The search by a GPU's kernels finds what the exact search finds, whatever the lattice, and says what it needed.

Without a GPU Triton's interpreter runs the kernels, on tensors of the CPU that take the code for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from daily import daily, rarely
from test_neighbors import CELLS, as_counter
from torch import Tensor

from torchmdnet.graph import Edges, build_graph, edges_within
from torchmdnet.neighbors import FixedSearch, VerletList, device, pairs_within
from torchmdnet.neighbors.device import edges_on_device
from torchmdnet.testing.launches import counting
from torchmdnet.tracing import as_if_on

pytest.importorskip("triton.language")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy's of masked lanes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_search(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In few programs in the interpreter, whose time they are."""
    if DEVICE == "cpu":
        monkeypatch.setattr(device, "TILES", {"atoms": 32, "candidates": 16, "edges": 512, "others": 16, "block": 128})
    monkeypatch.setattr(device, "_rooms", {})
    with as_if_on("cuda"):
        yield


def gas(count: int, edge: float = 7.0, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * edge - edge / 3


def random_cell(generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Atoms in some lattice, skewed or small, with any directions open."""

    def number() -> float:
        return float(torch.rand((), generator=generator))

    count, edge = int(1 + 30 * number()), 2.5 + 8 * number()
    cell = edge * (torch.eye(3).double() + 0.6 * (torch.rand(3, 3, generator=generator).double() - 0.5))
    cell *= (0.4 + 1.2 * torch.rand(3, generator=generator).double())[:, None]
    cell *= (torch.rand(3, generator=generator) < 0.75)[:, None]
    pos = 1.5 * edge * (torch.rand(count, 3, generator=generator).double() - 0.3)
    return pos, cell[None] if cell.any() else None


def exact(*args: Any, **options: Any) -> Any:
    with as_if_on("cpu"):
        return pairs_within(*args, **options)


def here(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.to(DEVICE) for x in tensors]


def expect_the_pairs(pos: Tensor, batch: Tensor, box: Tensor | None, num_systems: int, cutoff: float, **rest) -> None:
    found = pairs_within(*here(pos, batch, box), num_systems, cutoff, **rest)
    expected = exact(pos, batch, box, num_systems, cutoff, **rest)
    i, j, shifts = (None if x is None else x.cpu() for x in found)
    if shifts is None and expected[2] is not None:
        shifts = torch.zeros(len(i), 3)
    assert as_counter((i, j, shifts)) == as_counter(expected)


@pytest.mark.parametrize("seed", daily(range(12), 0, 3, 7))
def test_random_lattices_have_the_pairs_of_the_exact_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pos, box = random_cell(generator)
    cutoff = 1.5 + 2.0 * float(torch.rand((), generator=generator))
    expect_the_pairs(pos, torch.zeros(len(pos), dtype=torch.long), box, 1, cutoff)


@pytest.mark.parametrize("name", rarely(CELLS, "cube", "rotated cube", "wire"))
def test_cells_of_every_shape_have_the_pairs_of_the_exact_search(name: str) -> None:
    cell = CELLS[name]
    for scale, count in ((1.0, 14), (3.1, 70)):
        pos, batch = gas(count, 7 * scale), torch.zeros(count, dtype=torch.long)
        box = scale * torch.tensor(cell)[None] if cell.any() else None
        expect_the_pairs(pos, batch, box, 1, 3.3, lower=1.7 if scale == 1.0 else 0.0)


def test_systems_of_a_batch_stay_apart_whatever_their_order() -> None:
    batch = torch.arange(5).repeat_interleave(torch.tensor([20, 1, 30, 9, 25]))
    boxes = torch.stack([torch.tensor(CELLS[name]) for name in ("cube", "open", "slab", "triclinic", "wire")]) * 2.3
    order = torch.randperm(85, generator=torch.Generator().manual_seed(2))
    expect_the_pairs(gas(85, 12.0)[order], batch[order], boxes, 5, 3.3)
    expect_the_pairs(gas(85, 12.0)[order], batch[order], None, 5, 3.3)
    expect_the_pairs(gas(85, 12.0), batch, boxes[:1], 5, 3.3)  # one for all


@pytest.mark.parametrize("count", [0, 1])
def test_few_atoms_are_found_too(count: int) -> None:
    batch = torch.zeros(count, dtype=torch.long)
    expect_the_pairs(gas(count), batch, None, max(count, 1), 3.0)
    expect_the_pairs(gas(count), batch, 2.0 * torch.eye(3).double()[None], max(count, 1), 2.9)


def test_a_cutoff_without_end_finds_every_pair_of_a_system() -> None:
    batch = torch.tensor([0] * 90 + [1] * 3)
    expect_the_pairs(gas(93, 50.0), batch, None, 2, math.inf)


def test_positions_far_from_the_origin_and_cells_far_from_theirs_are_found() -> None:
    pos, batch = gas(40, 11.0), torch.zeros(40, dtype=torch.long)
    expect_the_pairs(pos + 3e5, batch, None, 1, 3.3)
    box = torch.tensor(CELLS["triclinic"])[None]
    away = torch.randint(-9, 9, (40, 3), generator=torch.Generator().manual_seed(1)).double()
    expect_the_pairs(pos + away @ box[0], batch, box, 1, 3.3)


def test_more_neighbours_than_expected_are_all_found() -> None:
    expect_the_pairs(gas(90, 2.0), torch.zeros(90, dtype=torch.long), None, 1, 9.0)
    (room,) = device._rooms.values()
    assert room >= 89


def test_boxes_without_volume_are_refused() -> None:
    pos, batch = here(gas(5), torch.zeros(5, dtype=torch.long))
    box = torch.tensor([[[3.0, 0, 0], [6.0, 0, 0], [0, 0, 3.0]]], dtype=torch.float64).to(DEVICE)
    with pytest.raises(ValueError, match="spans no volume"):
        pairs_within(pos, batch, box, 1, 3.0)
    with pytest.raises(ValueError, match="periodic images"):
        pairs_within(pos, batch, 1e-3 * torch.eye(3, dtype=torch.float64, device=DEVICE)[None], 1, 3.0)


def test_an_atom_that_is_nowhere_has_no_neighbours_and_disturbs_no_other() -> None:
    pos, batch = gas(30), torch.zeros(30, dtype=torch.long)
    without = exact(pos[:29], batch[:29], None, 1, 3.3)
    for nowhere in (math.nan, math.inf, -1e300):
        pos[29] = nowhere
        i, j, _ = pairs_within(*here(pos, batch, None), 1, 3.3)
        assert as_counter((i.cpu(), j.cpu(), None)) == as_counter(without)


# ---------------------------------------------------------------------------------------------------------- edges


def expect_one_structure(found: Edges, num_atoms: int) -> None:
    """What loops rely on: rows of receivers, opposite edges, and the pair of each."""
    (i, j), vec, dist, pairs = found
    assert (i.diff() >= 0).all()
    assert torch.equal(torch.bincount(i, minlength=num_atoms).cumsum(0), pairs.row_start[1:])
    assert torch.equal(pairs.reverse[pairs.reverse], torch.arange(len(i), device=i.device))
    assert torch.equal(i[pairs.reverse], j)
    assert torch.equal(vec[pairs.reverse], -vec)
    assert torch.equal(pairs.of_edge[pairs.reverse], pairs.of_edge)
    assert torch.equal(pairs.dist[pairs.of_edge], dist)
    of_pairs = torch.bincount(pairs.of_edge, minlength=pairs.atoms.shape[1])[: pairs.atoms.shape[1]]
    assert (of_pairs == 2).all()
    torch.testing.assert_close(vec.norm(dim=1), dist)


def as_rows(edges: Edges) -> list[tuple[float, ...]]:
    return sorted(
        (*ij, *(round(x, 9) + 0.0 for x in vec))
        for ij, vec in zip(edges[0].t().tolist(), edges[1].tolist(), strict=True)
    )


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("cell", ["open", "triclinic", "slab"])
def test_edges_are_those_of_the_cpu(cell: str, loop: bool) -> None:
    lattice = torch.tensor(CELLS[cell])
    box = lattice[None] if lattice.any() else None
    pos, batch = gas(17), torch.zeros(17, dtype=torch.long)
    found = edges_within(*here(pos, batch, box), 1, cutoff_upper=3.4, cutoff_lower=0.5, loop=loop)
    expect_one_structure(found, 17)
    with as_if_on("cpu"):
        expected = edges_within(pos, batch, box, 1, cutoff_upper=3.4, cutoff_lower=0.5, loop=loop)
    assert as_rows(found) == as_rows(expected)


@pytest.mark.parametrize("is_periodic", [True, False])
def test_edges_are_differentiable_in_positions_and_boxes(is_periodic: bool) -> None:
    pos, batch = gas(9), torch.zeros(9, dtype=torch.long)
    box = torch.tensor(CELLS["triclinic"])[None] if is_periodic else None

    def slopes(*inputs: Tensor | None) -> list[Tensor]:
        pos, batch, box = inputs
        wanted = [x.requires_grad_() for x in (pos, box) if x is not None]
        _, vec, dist, pairs = edges_within(pos, batch, box, 1, cutoff_upper=3.4, loop=True)
        value = (vec.sin().sum(dim=1) * dist).sum() + pairs.dist.square().sum()
        return [x.cpu() for x in torch.autograd.grad(value, wanted)]

    found = slopes(*here(pos.clone(), batch, None if box is None else box.clone()))
    with as_if_on("cpu"):
        expected = slopes(pos, batch, box)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_single_precision_and_atoms_at_one_place_are_as_on_the_cpu() -> None:
    pos = gas(12).float()
    pos[3], pos[7] = pos[2], pos[6] + 1e-5
    z = torch.ones(12, dtype=torch.long)
    graph = build_graph(*here(z, pos), cutoff_upper=3.3, loop=True)
    assert graph.edge_vec.dtype == graph.edge_dist.dtype == torch.float32
    is_close = (graph.edge_index[0] != graph.edge_index[1]) & ~(graph.edge_dist > 1e-4)
    assert graph.edge_dist[is_close].tolist().count(0.0) == 2
    assert int(graph.edge_dist[is_close].isnan().sum()) == 2


def test_a_search_waits_once_and_an_atom_more_allocates_a_row() -> None:
    pos, batch, box = gas(40, 9.0), torch.zeros(40, dtype=torch.long), 9 * torch.eye(3).double()[None]
    with counting() as counts:
        edges_on_device(pos, batch, box, 1, 3.3, loop=True)
    assert counts.num_waits == 1
    assert counts.num_launches <= 9
    assert counts.largest <= 41 * 64 * 24


def test_a_list_that_is_kept_on_the_cpu_leaves_the_search_to_the_device() -> None:
    pos, batch = gas(30), torch.zeros(30, dtype=torch.long)
    found = edges_within(*here(pos, batch, None), 1, cutoff_upper=3.3, search=VerletList(1.0))
    expect_one_structure(found, 30)


# ---------------------------------------------------------------------------------------------------- fixed shapes


class Padded:
    """Calls a search with two ghosts behind the atoms."""

    def __init__(self, skin: float = 0.0) -> None:
        self.search = FixedSearch(2, skin)

    def inputs(self, pos: Tensor, box: Tensor | None) -> list[Any]:
        ghosts = torch.tensor([[0.0, 0, 0], [3.3, 0, 0]], dtype=pos.dtype)
        if box is not None:
            box = torch.cat([box, torch.zeros_like(box[:1])])
        batch = torch.cat([torch.zeros(len(pos), dtype=torch.long), torch.ones(2, dtype=torch.long)])
        return here(torch.cat([pos, ghosts]), batch, box)

    def __call__(self, pos: Tensor, box: Tensor | None, loop: bool = True) -> Edges:
        return edges_within(*self.inputs(pos, box), 2, cutoff_upper=3.3, loop=loop, search=self.search)

    def expect(self, pos: Tensor, box: Tensor | None, loop: bool = True) -> Edges:
        found = self(pos, box, loop)
        N, count = len(pos), int(found.pairs.row_start[-1])
        real = found.edge_index[:, : count - 2 * loop], found.vec[: count - 2 * loop]
        with as_if_on("cpu"):
            batch = torch.zeros(N, dtype=torch.long)
            expected = edges_within(pos, batch, box, 1, cutoff_upper=3.3, loop=loop)
        assert as_rows((real[0].cpu(), real[1].cpu())) == as_rows(expected)  # type: ignore[arg-type]
        i, j = found.edge_index
        spare = torch.stack([i, j])[:, count:]
        assert (spare.sum(dim=0) == 2 * N + 1).all()  # between the two ghosts
        assert found.pairs.row_start[N:].tolist() == [count - 2 * loop, count - loop, count]  # in no row
        assert torch.equal(i[found.pairs.reverse], j)
        assert torch.equal(found.vec[found.pairs.reverse], -found.vec)
        assert torch.equal(found.pairs.dist[found.pairs.of_edge], found.dist)
        assert found.dist[count:].tolist() == [3.3] * (len(i) - count)
        return found


@pytest.mark.parametrize("skin", daily([0.0, 0.8], 0.8))
@pytest.mark.parametrize("is_periodic", [True, False])
def test_shapes_stay_while_atoms_move_and_nothing_waits(skin: float, is_periodic: bool) -> None:
    box = torch.tensor([[[9.0, 0, 0], [1.0, 8.0, 0], [0, 2.0, 9.5]]]).double() if is_periodic else None
    padded, start, shapes = Padded(skin), gas(50, 9.0), set()
    for step in range(4):
        pos = start + 0.15 * step * torch.sin(torch.arange(150.0)).view(50, 3)
        if step == 2 and box is not None:
            box = 1.01 * box
        shapes.add(padded.expect(pos, box).vec.shape)
        assert not padded.search.outgrown()
    assert len(shapes) == 1
    inputs = padded.inputs(start, box)
    with counting() as counts:
        edges_within(*inputs, 2, cutoff_upper=3.3, loop=True, search=padded.search)
    assert counts.num_waits == 0


@pytest.mark.slow
def test_the_device_makes_its_list_again_only_when_an_atom_has_moved_far() -> None:
    padded, pos, box = Padded(skin=1.0), gas(50, 9.0), 9 * torch.eye(3).double()[None]
    made = []
    for shift in (0.0, 0.2, 0.45, 0.55, 0.9):
        moved = pos.clone()
        moved[7, 0] += shift
        padded.expect(moved, box)
        (search,) = padded.search.lists.values()
        made.append(float(search.then[7, 0]) - float(pos[7, 0]))
    assert made == pytest.approx([0.0, 0.0, 0.0, 0.55, 0.55])
    padded.expect(pos, 0.98 * box)
    (search,) = padded.search.lists.values()
    assert float(search.then[7, 0]) == float(pos[7, 0])


@pytest.mark.slow
@pytest.mark.parametrize("skin", [0.0, 0.5])
def test_it_says_when_the_room_was_too_small_and_then_takes_more(skin: float) -> None:
    padded, pos, box = Padded(skin), gas(80, 14.0), 14 * torch.eye(3).double()[None]
    before = padded.expect(pos, box)
    assert not padded.search.outgrown()
    dense = 0.35 * pos
    found = padded(dense, box)
    assert found.vec.shape == before.vec.shape
    assert int(found.pairs.row_start[-1]) <= len(found.vec)  # nothing reads beyond the arrays
    assert int(found.pairs.of_edge.max()) < len(found.pairs.dist)
    assert padded.search.outgrown()
    assert padded.expect(dense, box).vec.shape > before.vec.shape
    assert not padded.search.outgrown()


def test_a_box_that_turns_flat_is_refused_when_sizes_are_chosen_again() -> None:
    padded, pos, box = Padded(), gas(20), 9 * torch.eye(3).double()[None]
    padded(pos, box)
    flat = box * torch.tensor([1.0, 1.0, 1e-6]).double()[:, None]
    padded(pos, flat)
    assert padded.search.outgrown()
    with pytest.raises(ValueError, match="periodic images"):
        padded(pos, flat)
