"""The nine components are coordinates in an orthonormal basis of 3×3 matrices."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.ops import irreps, kernels
from torchmdnet.ops.cartesian import compose_tensor, decompose_tensor, tensor_matmul_o3, tensor_matmul_so3
from torchmdnet.testing import derivatives


def features(n: int = 5, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 9, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matrices_and_components_are_two_ways_to_write_the_same() -> None:
    X = features()
    torch.testing.assert_close(irreps.from_matrix(irreps.to_matrix(X)), X)
    torch.testing.assert_close(irreps.squared_norm(X), irreps.to_matrix(X).square().sum(dim=(1, 2)))


def test_parts_are_trace_antisymmetric_and_symmetric_traceless() -> None:
    I, A, S = (
        irreps.to_matrix(
            torch.cat(
                [X if k == part else torch.zeros_like(X) for k, X in enumerate(features().split(irreps.PARTS, 1))], 1
            )
        )
        for part in range(3)
    )
    torch.testing.assert_close(I, torch.einsum("nkkf,ij->nijf", I, torch.eye(3, dtype=I.dtype)) / 3)
    torch.testing.assert_close(A, -A.transpose(1, 2))
    torch.testing.assert_close(S, S.transpose(1, 2))
    torch.testing.assert_close(torch.einsum("nkkf->nf", S), torch.zeros_like(S[:, 0, 0]), atol=1e-14, rtol=0)


def test_harmonics_are_the_identity_the_cross_product_and_the_traceless_square() -> None:
    u = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
    other = torch.randn(4, 3, dtype=torch.float64)
    Y = irreps.harmonics(u)[:, :, None]
    parts = [
        torch.cat([y if k == part else torch.zeros_like(y) for k, y in enumerate(Y.split(irreps.PARTS, 1))], 1)
        for part in range(3)
    ]
    one, cross, square = (irreps.to_matrix(part)[..., 0] for part in parts)
    torch.testing.assert_close(one, torch.eye(3, dtype=u.dtype).expand(4, 3, 3))
    torch.testing.assert_close(torch.einsum("eij,ej->ei", cross, other), torch.linalg.cross(u, other))
    torch.testing.assert_close(square, u[:, :, None] * u[:, None] - torch.eye(3, dtype=u.dtype) / 3)


def test_products_are_products_of_matrices() -> None:
    X, Y = features(seed=1), features(seed=2)
    A, B = irreps.to_matrix(X), irreps.to_matrix(Y)
    torch.testing.assert_close(irreps.to_matrix(irreps.matrix_product(X, Y)), tensor_matmul_so3(A, B) / 2)
    torch.testing.assert_close(irreps.to_matrix(irreps.anticommutator(X, Y)), tensor_matmul_o3(A, B))


def test_norms_of_the_parts_add_up() -> None:
    X = features()
    torch.testing.assert_close(irreps.norms_by_part(X).unflatten(1, (3, -1)).sum(1), irreps.squared_norm(X))


def test_channels_mix_within_each_part() -> None:
    X = features()
    weights = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    mixed = irreps.mix_channels(X, weights)
    assert mixed.shape == (5, 9, 4)
    torch.testing.assert_close(mixed[:, 5], X[:, 5] @ weights[2].T)
    torch.testing.assert_close(mixed[:, 0], X[:, 0] @ weights[0].T)


def test_packed_cartesian_parts_round_trip() -> None:
    X = irreps.to_matrix(features())
    torch.testing.assert_close(compose_tensor(*decompose_tensor(X)), X)


def assert_twins_agree(twin, plain, arguments: list[torch.Tensor], order: int) -> None:
    for argument in arguments:
        argument.requires_grad_()
    assert kernels.has_kernel(arguments[0])
    for ours, theirs in zip(derivatives(twin, arguments, order), derivatives(plain, arguments, order), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("channels", [4, 5, 16])
def test_stages_of_a_layer_and_their_definitions_agree(n: int, channels: int) -> None:
    X, Y = features(n, channels, 1), features(n, channels, 2)
    factor = 1 + 0.1 * torch.arange(n, dtype=torch.float64)
    k = factor[:, None, None]
    assert_twins_agree(irreps.normalize, irreps.normalize_plain, [X], 3)
    assert_twins_agree(irreps.norms_by_part, irreps.norms_by_part_plain, [X], 2)
    for both, product in (
        (True, irreps.anticommutator_plain),
        (False, lambda X, Y: 2 * irreps.matrix_product_plain(X, Y)),
    ):
        assert_twins_agree(
            lambda X, Y, both=both: irreps.interact(X, Y, factor, both=both),
            lambda X, Y, product=product: irreps.normalize_plain(k * product(X, Y)),
            [X, Y],
            2,
        )
    assert_twins_agree(
        lambda X, D: irreps.refine(X, D, factor), lambda X, D: X + D + k * irreps.matrix_product_plain(D, D), [X, Y], 2
    )


@pytest.mark.parametrize("n", [0, 1, 7])
def test_mixing_and_its_definition_agree(n: int) -> None:
    weights = [torch.randn(6, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)]
    assert_twins_agree(
        lambda X, *W: irreps.mix_channels(X, W),
        lambda X, *W: irreps.mix_channels_plain(X, W),
        [features(n, 5), *weights],
        3,
    )


def test_a_stage_counts_an_argument_made_from_another_once() -> None:
    X = features(3, 4).requires_grad_()
    factor = torch.ones(3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda X: irreps.refine(X, 2 * irreps.normalize(X), factor), X)


def test_the_factor_of_a_stage_can_be_differentiated() -> None:
    X, factor = features(3, 4), torch.rand(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: irreps.interact(X, X, k, both=True), factor)
    assert torch.autograd.gradcheck(lambda k: irreps.refine(X, X, k), factor)


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("name", ["matrix_product", "anticommutator"])
def test_products_and_their_twins_agree_to_third_derivatives(name: str, n: int) -> None:
    twin, plain = getattr(irreps, name), getattr(irreps, f"{name}_plain")
    arguments = [features(n, 5, seed).requires_grad_() for seed in (1, 2)]
    assert kernels.has_kernel(arguments[0])
    for ours, theirs in zip(derivatives(twin, arguments, 3), derivatives(plain, arguments, 3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_a_product_with_itself_has_the_right_gradient() -> None:
    X = features(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: irreps.matrix_product(X, X), X)
    assert torch.autograd.gradgradcheck(lambda X: irreps.matrix_product(X, X), X)
