"""Gated equivariant blocks turn with the frame, and atoms without vectors do them no harm."""

from __future__ import annotations

import warnings

import torch

from torchmdnet.nn.gated import GatedEquivariantBlock


def block(scalar_activation: bool = True) -> GatedEquivariantBlock:
    torch.manual_seed(0)
    made = GatedEquivariantBlock(6, 4, activation="silu", scalar_activation=scalar_activation, dtype=torch.float64)
    made.reset_parameters()
    return made


def test_scalars_stay_and_vectors_turn_with_the_frame() -> None:
    gated = block()
    x, v = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    x_here, v_here = gated(x, v)
    x_there, v_there = gated(x, torch.einsum("ab,nbf->naf", rotation, v))
    torch.testing.assert_close(x_there, x_here, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v_there, torch.einsum("ab,nbf->naf", rotation, v_here), rtol=1e-12, atol=1e-12)


def test_zero_vectors_have_finite_second_derivatives_and_no_warning() -> None:
    gated = block()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 3, 6, dtype=torch.float64)
    v[1] = 0
    v.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_out, v_out = gated(x, v)
        first = torch.autograd.grad(x_out.sum() + v_out.square().sum(), [x, v], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, v, *gated.parameters()])
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    assert not first[1][1].any()


def test_scalars_leave_without_activation_unless_asked() -> None:
    x, v = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    plain, gated = block(scalar_activation=False)(x, v)[0], block()(x, v)[0]
    torch.testing.assert_close(gated, torch.nn.functional.silu(plain))
