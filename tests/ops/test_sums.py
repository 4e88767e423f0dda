"""Sums whose order is always the same equal the definition, and inputs out of range become NaN without a look."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from torchmdnet.graph import Inputs, graph_of_edges
from torchmdnet.neighbors import in_bounds
from torchmdnet.ops.sums import sum_by_index
from torchmdnet.testing import tiny_model
from torchmdnet.testing.launches import counting
from torchmdnet.tracing import as_if_on

pytest.importorskip("triton.language")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # numpy's of masked lanes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    with as_if_on("cuda"):
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)


@pytest.mark.parametrize("shape", [(700, 1), (5, 3, 3), (40,), (0, 2)])
def test_rows_of_an_index_are_added(shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    index = torch.arange(shape[0], device=DEVICE).mul(7) % 3
    expected = x.new_zeros(4, *shape[1:]).index_add(0, index, x)
    found = sum_by_index(x, index, 4)
    torch.testing.assert_close(found, expected)
    weights = random(*expected.shape)
    (ours,), (theirs,) = (torch.autograd.grad((y * weights).sin().sum(), x) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_sum_is_one_launch_and_has_a_second_derivative() -> None:
    x, index = random(9, 1).requires_grad_(), torch.arange(9, device=DEVICE) // 4
    with counting() as counts:
        sum_by_index(x, index, 3)
    assert counts.num_launches == 1
    assert torch.autograd.gradgradcheck(lambda x: sum_by_index(x.sin(), index, 3), (x,))


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_edges_are_added_to_their_rows_and_sorted_once(num_blocks: int) -> None:
    from torchmdnet.ops.triton.sums import sum_by_row

    x, rows = random(num_blocks, 40, 6), (torch.arange(40, device=DEVICE) * 11) % 15
    rows[5:25] = 14  # that of self loops
    expected = x.new_zeros(16, 6).index_add(0, rows, x.sum(dim=0))
    torch.testing.assert_close(sum_by_row(x, rows, 16), expected)
    with counting() as counts:
        sum_by_row(x, rows, 16)
    assert counts.num_launches == 1
    rows[:] = 3
    torch.testing.assert_close(sum_by_row(x, rows, 16)[3], x.sum(dim=(0, 1)))


def systems() -> tuple[Tensor, ...]:
    """Eight atoms of seven systems, of which only one has nothing wrong with it, and another only a charge."""
    z = torch.tensor([1, 8, 200, 6, -1, 1, 1, 1])
    batch = torch.tensor([0, 0, 1, 2, 3, 4, 5, 9])
    pos, box = torch.randn(8, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(7, 1, 1)
    pos[1, 2], pos[7, 0], box[4, 1, 1] = math.nan, 1e20, math.inf
    q = torch.tensor([0.0, 0, 0, 0, 0, math.nan, 0], dtype=torch.float64)
    return tuple(x.to(DEVICE) for x in (z, pos, batch, box, q))


@pytest.mark.parametrize("is_followed", [False, True])
def test_what_is_out_of_bounds_is_brought_back_and_its_system_is_nan(is_followed: bool) -> None:
    z, pos, batch, box, q = systems()
    pos.requires_grad_(is_followed)
    elements, members, guard = in_bounds(z, pos, batch, 7, 100, box, q)
    assert elements.tolist() == [1, 8, 99, 6, 0, 1, 1, 1]
    assert members.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert guard.isnan().tolist() == [True, True, True, False, True, True, True, True]
    assert guard[3] == 0
    if is_followed:
        (slope,) = torch.autograd.grad(guard.sum(), pos)
        assert slope.isnan().any(dim=1).tolist() == guard.isnan().tolist()


def test_looking_takes_three_launches_and_no_wait() -> None:
    z, pos, batch, box, q = systems()
    with counting() as counts:
        in_bounds(z, pos, batch, 7, 100, box, q)
    assert counts.num_launches == 3
    assert counts.num_waits == 0


def test_an_element_that_no_embedding_has_makes_the_energy_of_its_system_nan() -> None:
    """Without kernels, as on a GPU where Triton does not run; on the CPU it is refused."""
    model = tiny_model("tensornet", max_z=10).eval()
    z, batch = torch.tensor([1, 8, 1, 11, 1]), torch.tensor([0, 0, 0, 1, 1])
    pos = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with as_if_on("other"):
        found = model.evaluate(Inputs(z, pos, batch, num_systems=2))
    assert found.energy.isnan()[:, 0].tolist() == [False, True]
    assert found.forces is not None
    assert found.forces.isnan().any(dim=1).tolist() == [False, False, False, True, True]
    with as_if_on("cpu"), pytest.raises(ValueError, match="embedding of this model ends at 9"):
        model.evaluate(Inputs(z, pos, batch, num_systems=2))


def test_edges_to_atoms_that_are_not_there_make_nan_of_their_system() -> None:
    z, batch = torch.tensor([1, 1, 1, 99]), torch.tensor([0, 0, 1, 2])
    index, vec = torch.tensor([[0, 1, 2, 3], [1, 0, 7, 2]]), random(4, 3).cpu()
    with as_if_on("other"):
        graph = graph_of_edges(z, index, vec, batch, cutoff_upper=9.0, num_systems=3, max_z=10)
    assert graph.guard is not None
    assert graph.guard.isnan().tolist() == [False, False, True, True]
    assert int(graph.edge_index.max()) == 3
    assert int(graph.z.max()) == 9
