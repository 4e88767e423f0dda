"""The operators PyTorch sees, with their meta implementations and derivatives.

Each is a partial derivative of one of the forms in :mod:`torchmdnet.ops.messages`, named after the tensor the form is
differentiated in. Gradients are the same operators with one argument replaced, so they can be differentiated again.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Pairs

__all__ = ["can_run", "embed", "message", "product"]

_HAS_NUMBA = importlib.util.find_spec("numba") is not None and not os.environ.get("TORCHMDNET_PLAIN_OPS")


def can_run(x: Tensor) -> bool:
    """Whether a compiled kernel takes this tensor; ``TORCHMDNET_PLAIN_OPS=1`` turns them all off."""
    return (
        _HAS_NUMBA
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_exporting()
    )


def _loops() -> ModuleType:
    from torchmdnet.ops.kernels import loops

    return loops


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def message(X: Tensor, weight: Tensor, edge_index: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`torchmdnet.ops.messages.gather_weight_sum`."""
    return message_sum(weight, X, edge_index[1], pairs.of_edge, pairs.row_start, pairs.atoms)


def embed(Y: Tensor, weight: Tensor, Z: Tensor, edge_index: Tensor, pairs: Pairs) -> Tensor:
    """See :func:`torchmdnet.ops.messages.embed_edges`."""
    return embed_sum(Y, weight, Z, edge_index[1], pairs.of_edge, pairs.row_start, pairs.reverse)


def product(X: Tensor, Y: Tensor, *, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.matrix_product` and, with ``both``, ``anticommutator``."""
    return matrix_product(X, Y, False, False, both)


# <O, X Y> and <O, X Y + Y X>: the gradient of a product is a product with the other argument transposed


@torch.library.custom_op("torchmdnet::matrix_product", mutates_args=(), device_types="cpu")
def matrix_product(X: Tensor, Y: Tensor, transpose_X: bool, transpose_Y: bool, both: bool) -> Tensor:
    """X Y, or X Y + Y X with ``both``, of matrices that may be transposed first: (N, 9, F) × 2 -> (N, 9, F)."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    signs = [-1.0 if transposed else 1.0 for transposed in (transpose_X, transpose_Y)]
    _loops().matrix_product(*_arrays(X, Y), *signs, both, out.numpy())
    return out


@matrix_product.register_fake
def _(X: Tensor, Y: Tensor, transpose_X: bool, transpose_Y: bool, both: bool) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


def _matrix_product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    X, Y, *ctx.flags = inputs
    ctx.save_for_backward(X, Y)


def _matrix_product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    X, Y = ctx.saved_tensors
    tX, tY, both = ctx.flags
    of_X = of_Y = None
    if ctx.needs_input_grad[0]:
        of_X = matrix_product(Y, grad, tY, True, both) if tX else matrix_product(grad, Y, False, not tY, both)
    if ctx.needs_input_grad[1]:
        of_Y = matrix_product(grad, X, True, tX, both) if tY else matrix_product(X, grad, not tX, False, both)
    return of_X, of_Y, None, None, None


matrix_product.register_autograd(_matrix_product_backward, setup_context=_matrix_product_setup)


# M(O, w, X)


@torch.library.custom_op("torchmdnet::message_sum", mutates_args=(), device_types="cpu")
def message_sum(
    weight: Tensor, X: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, pair_index: Tensor
) -> Tensor:
    """∂M/∂O, and by symmetry ∂M/∂X: (P, 3, F), (N, 9, F) -> (N, 9, F)."""
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    _loops().message_sum(*_arrays(weight, X, sender, pair_of, row_start), out.numpy())
    return out


@message_sum.register_fake
def _(weight: Tensor, X: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, pair_index: Tensor) -> Tensor:
    return torch.empty_like(X, memory_format=torch.contiguous_format)


@torch.library.custom_op("torchmdnet::message_weight", mutates_args=(), device_types="cpu")
def message_weight(
    O: Tensor, X: Tensor, num_weights: int, sender: Tensor, pair_of: Tensor, row_start: Tensor, pair_index: Tensor
) -> Tensor:
    """∂M/∂w: (N, 9, F) × 2 -> (num_weights, 3, F)."""
    out = X.new_empty(num_weights, 3, X.shape[2])
    _loops().message_weight(*_arrays(O, X, pair_index), out.numpy())
    return out


@message_weight.register_fake
def _(
    O: Tensor, X: Tensor, num_weights: int, sender: Tensor, pair_of: Tensor, row_start: Tensor, pair_index: Tensor
) -> Tensor:
    return X.new_empty(num_weights, 3, X.shape[2])


def _message_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _message_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, X, *graph = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_weight = message_weight(grad, X, weight.shape[0], *graph) if needs[0] else None
    of_X = message_sum(weight, grad, *graph) if needs[1] else None
    return of_weight, of_X, None, None, None, None


def _message_weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    O, X, _, *graph = inputs
    ctx.save_for_backward(O, X, *graph)


def _message_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    O, X, *graph = ctx.saved_tensors
    needs = ctx.needs_input_grad
    of_O = message_sum(grad, X, *graph) if needs[0] else None
    of_X = message_sum(grad, O, *graph) if needs[1] else None
    return of_O, of_X, None, None, None, None, None


message_sum.register_autograd(_message_sum_backward, setup_context=_message_sum_setup)
message_weight.register_autograd(_message_weight_backward, setup_context=_message_weight_setup)


# D(O, Y, w, Z)


@torch.library.custom_op("torchmdnet::embed_sum", mutates_args=(), device_types="cpu")
def embed_sum(
    Y: Tensor, weight: Tensor, Z: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    """∂D/∂O: (E, 9), (P, 3, F), (N, 2, F) -> (N, 9, F)."""
    out = Z.new_empty(Z.shape[0], 9, Z.shape[2])
    _loops().embed_sum(*_arrays(Y, weight, Z, sender, pair_of, row_start), out.numpy())
    return out


@embed_sum.register_fake
def _(
    Y: Tensor, weight: Tensor, Z: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    return Z.new_empty(Z.shape[0], 9, Z.shape[2])


@torch.library.custom_op("torchmdnet::embed_direction", mutates_args=(), device_types="cpu")
def embed_direction(
    O: Tensor, weight: Tensor, Z: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    """∂D/∂Y: (N, 9, F), (P, 3, F), (N, 2, F) -> (E, 9)."""
    out = Z.new_empty(sender.shape[0], 9)
    _loops().embed_direction(*_arrays(O, weight, Z, sender, pair_of, row_start), out.numpy())
    return out


@embed_direction.register_fake
def _(
    O: Tensor, weight: Tensor, Z: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    return Z.new_empty(sender.shape[0], 9)


@torch.library.custom_op("torchmdnet::embed_weight", mutates_args=(), device_types="cpu")
def embed_weight(
    O: Tensor,
    Y: Tensor,
    Z: Tensor,
    num_weights: int,
    sender: Tensor,
    pair_of: Tensor,
    row_start: Tensor,
    reverse: Tensor,
) -> Tensor:
    """∂D/∂w: (N, 9, F), (E, 9), (N, 2, F) -> (num_weights, 3, F)."""
    out = Z.new_empty(num_weights, 3, Z.shape[2])
    _loops().embed_weight(*_arrays(O, Y, Z, sender, pair_of, row_start, reverse), out.numpy())
    return out


@embed_weight.register_fake
def _(
    O: Tensor,
    Y: Tensor,
    Z: Tensor,
    num_weights: int,
    sender: Tensor,
    pair_of: Tensor,
    row_start: Tensor,
    reverse: Tensor,
) -> Tensor:
    return Z.new_empty(num_weights, 3, Z.shape[2])


@torch.library.custom_op("torchmdnet::embed_factor", mutates_args=(), device_types="cpu")
def embed_factor(
    O: Tensor, Y: Tensor, weight: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    """∂D/∂Z: (N, 9, F), (E, 9), (P, 3, F) -> (N, 2, F)."""
    out = O.new_empty(O.shape[0], 2, O.shape[2])
    _loops().embed_factor(*_arrays(O, Y, weight, sender, pair_of, row_start, reverse), out.numpy())
    return out


@embed_factor.register_fake
def _(
    O: Tensor, Y: Tensor, weight: Tensor, sender: Tensor, pair_of: Tensor, row_start: Tensor, reverse: Tensor
) -> Tensor:
    return O.new_empty(O.shape[0], 2, O.shape[2])


_SLOTS = ("O", "Y", "w", "Z")


def _derivative_of_D(slot: str, tensors: dict[str, Tensor], num_weights: int, graph: list[Tensor]) -> Tensor:
    """∂D/∂slot at the other three tensors."""
    if slot == "O":
        return embed_sum(tensors["Y"], tensors["w"], tensors["Z"], *graph)
    if slot == "Y":
        return embed_direction(tensors["O"], tensors["w"], tensors["Z"], *graph)
    if slot == "w":
        return embed_weight(tensors["O"], tensors["Y"], tensors["Z"], num_weights, *graph)
    return embed_factor(tensors["O"], tensors["Y"], tensors["w"], *graph)


def _register_derivatives(operator: Any, slot: str) -> None:
    """Differentiate ∂D/∂slot: the gradient in another tensor is ∂D/∂(that one) with the incoming gradient in slot."""
    others = [name for name in _SLOTS if name != slot]
    takes_count = slot == "w"

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, rest = inputs[:3], inputs[3:]
        ctx.num_weights = rest[0] if takes_count else tensors[others.index("w")].shape[0]
        ctx.save_for_backward(*tensors, *(rest[1:] if takes_count else rest))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sender, pair_of, row_start, reverse = ctx.saved_tensors
        graph = [sender, pair_of, row_start, reverse]
        known = {**dict(zip(others, tensors, strict=True)), slot: grad}
        wanted = [
            _derivative_of_D(name, known, ctx.num_weights, graph) if ctx.needs_input_grad[position] else None
            for position, name in enumerate(others)
        ]
        return (*wanted, *([None] * (5 if takes_count else 4)))

    operator.register_autograd(backward, setup_context=setup)


for _operator, _slot in ((embed_sum, "O"), (embed_direction, "Y"), (embed_weight, "w"), (embed_factor, "Z")):
    _register_derivatives(_operator, _slot)
