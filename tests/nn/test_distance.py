"""OptimizedDistance keeps its documented arguments, and the pairs the reference package found."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import shared

from torchmdnet.nn.distance import OptimizedDistance


def random_atoms(n: int = 100, edge: float = 1.0) -> torch.Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * edge


@pytest.mark.parametrize("strategy", ["brute", "cell"])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("include_transpose", [False, True])
def test_all_pairs_of_a_dense_cube_are_found(strategy: str, loop: bool, include_transpose: bool) -> None:
    n = 100
    distance = OptimizedDistance(
        0.0,
        5.0,
        max_num_pairs=n * n,
        strategy=strategy,
        loop=loop,
        include_transpose=include_transpose,
        return_vecs=True,
    )
    edge_index, edge_weight, edge_vec = distance(random_atoms(n))
    pairs = n * (n - 1) // (1 if include_transpose else 2)
    assert edge_index.shape == (2, pairs + n * loop)
    assert edge_vec is not None
    torch.testing.assert_close(edge_vec.norm(dim=1), edge_weight)
    if not include_transpose:
        assert (edge_index[0] >= edge_index[1]).all()


def test_a_lower_cutoff_leaves_self_pairs() -> None:
    edge_index, edge_weight, _ = OptimizedDistance(2.0, 5.0, loop=True)(random_atoms())
    assert (edge_index[0] == edge_index[1]).all()
    assert edge_index.shape[1] == 100
    assert (edge_weight == 0).all()


def test_too_many_pairs_are_an_error_that_names_the_numbers() -> None:
    with pytest.raises(RuntimeError, match=r"Found num_pairs > max_num_pairs.*9900 pairs.*room for 400"):
        OptimizedDistance(0.0, 5.0, max_num_pairs=-4)(random_atoms())


def test_without_resizing_arrays_are_padded_to_the_capacity() -> None:
    edge_index, edge_weight, edge_vec = OptimizedDistance(
        0.0, 0.2, max_num_pairs=-10, resize_to_fit=False, return_vecs=True
    )(random_atoms())
    assert edge_vec is not None
    assert edge_index.shape == (2, 1000)
    spare = edge_index[0] == -1
    assert 0 < spare.sum() < 1000
    assert (edge_index[:, spare] == -1).all()
    assert (edge_weight[spare] == 0).all()
    assert (edge_vec[spare] == 0).all()


def test_an_unknown_strategy_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="strategy: 'shared'"):
        OptimizedDistance(strategy="shared")


def test_half_precision_is_refused() -> None:
    with pytest.raises(RuntimeError, match="float16"):
        OptimizedDistance()(torch.zeros(2, 3, dtype=torch.float16))


def test_any_integer_batch_gives_the_same_pairs() -> None:
    batch = torch.arange(100) // 10
    long, _, _ = OptimizedDistance(0, 5)(random_atoms(), batch)
    short, _, _ = OptimizedDistance(0, 5)(random_atoms(), batch.int())
    assert torch.equal(long, short)


def test_too_few_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 systems"):
        OptimizedDistance()(random_atoms(3), torch.tensor([0, 1, 2]), torch.eye(3).expand(2, 3, 3) * 20)


def test_coincident_atoms_have_finite_gradients() -> None:
    pos = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    _, weight, vec = OptimizedDistance(return_vecs=True)(pos)
    assert vec is not None
    (weight.sum() + vec[0].sum()).backward()
    assert pos.grad is not None
    torch.testing.assert_close(pos.grad.abs(), torch.ones_like(pos))  # the vector's own derivative is kept


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("box", [None, torch.eye(3, dtype=torch.float64) * 3])
def test_derivatives_are_exact_to_second_order(loop: bool, box: torch.Tensor | None) -> None:
    pos = random_atoms(5, edge=2.5).requires_grad_()
    distance = OptimizedDistance(0.0, 1.4, max_num_pairs=-200, loop=loop, return_vecs=True, box=box)

    def sums(pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, weight, vec = distance(pos)
        assert vec is not None
        return weight.cos().sum(), vec.sin().sum(dim=0)

    assert torch.autograd.gradcheck(sums, pos)
    assert torch.autograd.gradgradcheck(sums, pos)


def test_stored_lists_of_the_reference_are_reproduced() -> None:
    arrays = np.load(shared("interop/neighbors.npz"))
    cases = sorted({name.split("/")[0] for name in arrays.files if "/" in name})
    options = json.loads(str(arrays["options_json"]))
    assert cases
    for case in cases:
        if case == "coincident":
            continue  # the reference's zero gradient there is a known defect
        dtype = getattr(torch, options[case]["dtype"])
        pos = torch.tensor(arrays[f"{case}/pos"], dtype=dtype).requires_grad_()
        batch = torch.tensor(arrays[f"{case}/batch"])
        box = torch.tensor(arrays[f"{case}/box"]) if f"{case}/box" in arrays.files else None
        keywords = {key: value for key, value in options[case].items() if key not in ("dtype", "box")}
        keywords["max_num_pairs"] = 100_000
        distance = OptimizedDistance(**{**keywords, "return_vecs": True, "resize_to_fit": True})
        edge_index, weight, vec = distance(pos, batch, box)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        stored_index, stored_vec = arrays[f"{case}/edge_index"], arrays[f"{case}/edge_vec"]
        order = np.lexsort((vec.detach()[:, 0].numpy().round(6), edge_index[1].numpy(), edge_index[0].numpy()))
        stored_order = np.lexsort((stored_vec[:, 0].round(6), stored_index[1], stored_index[0]))
        np.testing.assert_array_equal(edge_index.numpy()[:, order], stored_index[:, stored_order], err_msg=case)
        np.testing.assert_allclose(
            weight.detach().numpy()[order], arrays[f"{case}/edge_weight"][stored_order], atol=tolerance * 10
        )
        sines = torch.sin(torch.arange(3, dtype=pos.dtype))
        loss = weight.cos().sum() + 0.01 * vec.square().sum() + (vec * sines).sum()
        (gradient,) = torch.autograd.grad(loss, pos, create_graph=True)
        reference = arrays[f"{case}/grad"]
        np.testing.assert_allclose(
            gradient.detach().numpy(), reference, atol=tolerance * 10 * (1 + np.abs(reference).max()), err_msg=case
        )
        (second,) = torch.autograd.grad(gradient.square().sum(), pos)
        reference = arrays[f"{case}/gradgrad"]
        np.testing.assert_allclose(
            second.numpy(), reference, atol=tolerance * 100 * (1 + np.abs(reference).max()), err_msg=case
        )
