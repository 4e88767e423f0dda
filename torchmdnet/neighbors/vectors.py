"""Vectors of pairs and of edges, linear in what they are made from and quick to differentiate on the CPU.

Each map and its adjoint are one another's gradient, so derivatives of every order take the same few loops.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["along_edges", "differences", "has_loops"]


def has_loops(x: Tensor) -> bool:
    """Whether compiled loops take this tensor; ``TORCHMDNET_PLAIN_OPS=1`` turns them off."""
    is_plain = bool(os.environ.get("TORCHMDNET_PLAIN_OPS")) or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not is_plain


def _can_record(x: Tensor) -> bool:
    transforms = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return has_loops(x) and x.dtype in (torch.float32, torch.float64) and transforms is None


def differences(pos: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """``pos[i] - pos[j]``: (N, 3), (P,) × 2 -> (P, 3)."""
    if _can_record(pos):
        return _Differences.apply(pos, i, j)  # type: ignore[return-value]
    return pos.index_select(0, i) - pos.index_select(0, j)


def along_edges(vec: Tensor, pair: Tensor, sign: Tensor) -> Tensor:
    """The vectors of pairs along each of their edges, ``sign * vec[pair]``: (P, 3), (E,) × 2 -> (E, 3)."""
    if _can_record(vec):
        return _Along.apply(vec, pair, sign)  # type: ignore[return-value]
    return vec.index_select(0, pair) * sign[:, None].to(vec.dtype)


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _loops() -> Any:
    from torchmdnet.neighbors import loops

    return loops


class _Differences(Function):
    @staticmethod
    def forward(ctx: Any, pos: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ctx.save_for_backward(i, j)
        ctx.num_atoms = pos.shape[0]
        out = pos.new_empty(i.shape[0], 3)
        _loops().differences(_array(pos), i.numpy(), j.numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        i, j = ctx.saved_tensors
        return _SumOfDifferences.apply(grads[0], i, j, ctx.num_atoms), None, None


class _SumOfDifferences(Function):
    @staticmethod
    def forward(ctx: Any, vec: Tensor, i: Tensor, j: Tensor, num_atoms: int) -> Tensor:
        ctx.save_for_backward(i, j)
        out = vec.new_zeros(num_atoms, 3)
        _loops().add_differences(_array(vec), i.numpy(), j.numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        i, j = ctx.saved_tensors
        return _Differences.apply(grads[0], i, j), None, None, None


class _Along(Function):
    @staticmethod
    def forward(ctx: Any, vec: Tensor, pair: Tensor, sign: Tensor) -> Tensor:
        ctx.save_for_backward(pair, sign)
        ctx.num_pairs = vec.shape[0]
        out = vec.new_empty(pair.shape[0], 3)
        _loops().along(_array(vec), pair.numpy(), sign.numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pair, sign = ctx.saved_tensors
        return _SumAlong.apply(grads[0], pair, sign, ctx.num_pairs), None, None


class _SumAlong(Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, pair: Tensor, sign: Tensor, num_pairs: int) -> Tensor:
        ctx.save_for_backward(pair, sign)
        out = edge.new_zeros(num_pairs, 3)
        _loops().add_along(_array(edge), pair.numpy(), sign.numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pair, sign = ctx.saved_tensors
        return _Along.apply(grads[0], pair, sign), None, None, None
