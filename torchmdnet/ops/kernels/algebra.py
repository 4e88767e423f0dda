"""Products, norms and gates of 3×3 matrices, channel by channel, with derivatives of every order."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Form, Stage
from torchmdnet.ops.kernels.layout import array

__all__ = [
    "INTERACT",
    "PRODUCT",
    "ProductForm",
    "interact",
    "normalize",
    "normalize_slope",
    "norms_by_part",
    "norms_definition",
    "product",
    "refine",
]


class ProductForm(Form):
    """⟨O, X Y⟩, or ⟨O, X Y + Y X⟩ where ``both``: the gradient of a product has the other argument transposed."""

    name = "matrix_product"
    slots = ("O", "X", "Y")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: bool) -> Tensor:
        left, right, turned_left, turned_right = {
            "O": ("X", "Y", False, False),
            "X": ("O", "Y", False, True),
            "Y": ("X", "O", True, False),
        }[slot]
        out = known[left].new_empty(shape)
        signs = [-1.0 if turned else 1.0 for turned in (turned_left, turned_right)]
        arrays = (array(known[left]), array(known[right]))
        loops.algebra.matrix_product(16 * out.numel(), *arrays, *signs, where, out.numpy())
        return out


PRODUCT = ProductForm()


def product(X: Tensor, Y: Tensor, *, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.matrix_product` and, with ``both``, ``anticommutator``."""
    return PRODUCT("O", tuple(X.shape), both, X, Y)


def _normalize_definition(X: Tensor) -> Tensor:
    return X / (X.square().sum(dim=1, keepdim=True) + 1)


def _normalize_value(X: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    loops.algebra.normalize(8 * X.numel(), array(X), out.numpy())
    return out


def _normalize_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor) -> tuple[Tensor | None, ...]:
    return (normalize_slope(X, grad),)


#: See :func:`torchmdnet.ops.irreps.normalize`.
normalize = Stage("normalize", _normalize_definition, _normalize_value, _normalize_gradients, is_differentiable=True)


def _slope_definition(X: Tensor, grad: Tensor) -> Tensor:
    share = 1 / (X.square().sum(dim=1, keepdim=True) + 1)
    return share * grad - 2 * share.square() * (grad * X).sum(dim=1, keepdim=True) * X


def _slope_value(X: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    loops.algebra.normalize_backward(8 * X.numel(), array(X), array(grad), out.numpy())
    return out


def _slope_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor, inner: Tensor) -> tuple[Tensor | None, ...]:
    of_X, of_inner = torch.empty_like(grad), torch.empty_like(grad)
    arrays = (array(X), array(inner), array(grad))
    loops.algebra.normalize_twice(16 * X.numel(), *arrays, of_X.numpy(), of_inner.numpy())
    return of_X, of_inner


#: The gradient of :data:`normalize`, which training with forces differentiates again.
normalize_slope = Stage("normalize_slope", _slope_definition, _slope_value, _slope_gradients)


def norms_definition(X: Tensor) -> Tensor:
    square = X.square()
    return torch.cat([square[:, 0], square[:, 1:4].sum(dim=1), square[:, 4:9].sum(dim=1)], dim=-1)


def _norms_value(X: Tensor) -> Tensor:
    out = X.new_empty(X.shape[0], 3 * X.shape[2])
    loops.algebra.part_norms(2 * X.numel(), array(X), out.numpy())
    return out


def _norms_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor) -> tuple[Tensor | None, ...]:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    loops.algebra.part_norms_backward(2 * X.numel(), array(X), array(grad), out.numpy())
    return (out,)


#: See :func:`torchmdnet.ops.irreps.norms_by_part`.
norms_by_part = Stage("norms_by_part", norms_definition, _norms_value, _norms_gradients)


def _interact_definition(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    P = product(Y, M, both=both)
    return normalize((factor if both else 2 * factor)[:, None, None] * P)


def _interact_value(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    out = torch.empty_like(Y, memory_format=torch.contiguous_format)
    loops.algebra.interact(16 * Y.numel(), array(Y), array(M), array(factor), both, out.numpy())
    return out


def _interact_gradients(
    grad: Tensor, needed: tuple[bool, ...], Y: Tensor, M: Tensor, factor: Tensor, both: bool
) -> tuple[Tensor | None, ...]:
    of_Y, of_M = torch.empty_like(grad), torch.empty_like(grad)
    arrays = (array(Y), array(M), array(factor), both, array(grad))
    loops.algebra.interact_backward(48 * Y.numel(), *arrays, of_Y.numpy(), of_M.numpy())
    return of_Y, of_M, None, None


INTERACT = Stage("interact", _interact_definition, _interact_value, _interact_gradients)


def interact(Y: Tensor, M: Tensor, factor: Tensor, *, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.interact`."""
    return INTERACT(Y, M, factor, both)


def _refine_definition(X: Tensor, D: Tensor, factor: Tensor) -> Tensor:
    return X + D + factor[:, None, None] * product(D, D, both=False)


def _refine_value(X: Tensor, D: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    loops.algebra.refine(16 * X.numel(), array(X), array(D), array(factor), out.numpy())
    return out


def _refine_gradients(
    grad: Tensor, needed: tuple[bool, ...], X: Tensor, D: Tensor, factor: Tensor
) -> tuple[Tensor | None, ...]:
    of_D = torch.empty_like(grad)
    loops.algebra.refine_backward(16 * X.numel(), array(D), array(factor), array(grad), of_D.numpy())
    return grad, of_D, None


#: See :func:`torchmdnet.ops.irreps.refine`.
refine = Stage("refine", _refine_definition, _refine_value, _refine_gradients)
