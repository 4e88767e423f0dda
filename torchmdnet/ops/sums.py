"""Sums over the atoms of each system, whose order on a GPU is always the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from torchmdnet.ops import kernels
from torchmdnet.ops.batched import one_by_one
from torchmdnet.tracing import device_kind

__all__ = ["sum_by_index"]

#: Rows times sums up to which each sum may look at every row.
MOST_LOOKS = 1 << 28


def sum_by_index(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Add the rows of x that share an index: (N, ...), (N,) -> (num_rows, ...).

    On a GPU ``index_add`` adds in an order that changes from call to call, and with it the last digits of a sum. Here
    each sum looks through all rows, which is cheap for the few sums of a batch of systems.
    """
    if device_kind(x) in kernels.TWINS and kernels.has_kernel(x) and x.shape[0] * num_rows <= MOST_LOOKS:
        return _Sum.apply(x, index, num_rows)  # type: ignore[return-value]
    return x.new_zeros(num_rows, *x.shape[1:]).index_add(0, index, x)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, num_rows: int) -> Tensor:
        from torchmdnet.ops.triton import sums

        ctx.save_for_backward(index)
        return sums.sum_by_index(x, index, num_rows)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None
