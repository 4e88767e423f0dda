"""A quintic spline reads back what was sampled, smoothly."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.nn.spline import Spline
from torchmdnet.ops.messages import RadialFilter


def read(spline: Spline, function, r: torch.Tensor) -> torch.Tensor:
    table = spline.coefficients(function(spline.nodes(r.dtype, r.device))[:, None, None])
    return RadialFilter(table, spline.locate(r)).rows()[:, 0, 0]


def test_polynomials_up_to_the_fifth_degree_are_exact() -> None:
    spline = Spline(0.5, 4.0, 10)
    r = torch.linspace(0.5, 4.0, 57, dtype=torch.float64)
    for degree in range(6):
        torch.testing.assert_close(read(spline, lambda x, n=degree: x**n, r), r**degree, rtol=1e-12, atol=1e-9)


def test_the_error_falls_with_the_sixth_power_of_the_cell() -> None:
    r = torch.linspace(0.0, 5.0, 997, dtype=torch.float64)
    errors = [float((read(Spline(0.0, 5.0, n), torch.sin, r) - torch.sin(r)).abs().max()) for n in (16, 32)]
    assert 50 < errors[0] / errors[1] < 80, errors


@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_are_those_of_the_function(order: int) -> None:
    r = torch.linspace(0.1, 4.9, 40, dtype=torch.float64, requires_grad=True)
    found, expected = read(Spline(0.0, 5.0, 256), torch.sin, r), torch.sin(r)
    for _ in range(order):
        (found,) = torch.autograd.grad(found.sum(), r, create_graph=True)
        (expected,) = torch.autograd.grad(expected.sum(), r, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=10.0 ** (3 * order - 13))


def test_neighbouring_cells_join_smoothly() -> None:
    spline = Spline(0.0, 5.0, 20)
    values = torch.randn(spline.num_rows, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = spline.coefficients(values)

    def derivatives_at(r: float) -> list[float]:
        x = torch.tensor([r], dtype=torch.float64, requires_grad=True)
        y = RadialFilter(table, spline.locate(x)).rows().sum()
        found = [float(y.detach())]
        for _ in range(4):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = y.sum()
            found.append(float(y.detach()))
        return found

    for below, above in zip(derivatives_at(2.0 - 1e-9), derivatives_at(2.0 + 1e-9), strict=True):
        assert above == pytest.approx(below, rel=1e-5, abs=1e-5)


def test_coefficients_are_linear_in_the_samples() -> None:
    spline = Spline(0.0, 5.0, 12)
    a, b = torch.randn(2, spline.num_rows, 3, dtype=torch.float64)
    torch.testing.assert_close(spline.coefficients(a - 2 * b), spline.coefficients(a) - 2 * spline.coefficients(b))


def test_distances_beyond_the_ends_read_the_end() -> None:
    spline = Spline(1.0, 5.0, 32)
    r = torch.tensor([0.0, 1.0, 5.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(read(spline, torch.cos, r), torch.cos(r.clamp(1.0, 5.0)), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_distance_reads_inside_the_table(dtype: torch.dtype) -> None:
    spline = Spline(0.5, 4.0, 10)
    r = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 4.0, 5.0, 2.0], dtype=dtype)
    coef, cell = spline.locate(r)
    assert cell.tolist() == [0, 9, 0, 0, 9, 9, 4]
    assert coef.isfinite().all(dim=1).tolist() == [False, *[True] * 6]
    found = read(spline, torch.sin, r)
    assert found.isfinite().tolist() == [False, *[True] * 6]
