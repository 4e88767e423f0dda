"""Batched gradients in hand-written backward passes.

``torch.autograd.grad`` with ``is_grads_batched``, the Jacobians and Hessians of ``torch.autograd.functional`` with
``vectorize``, and ``torch.func.vmap`` over a call of ``torch.autograd.grad`` send many gradients through the backward
pass at once, in tensors whose batch dimension is hidden. Compiled loops read memory and cannot see it, so these
gradients pass one after the other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

__all__ = ["is_within_batch", "one_by_one"]

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_is_legacy: Callable[[Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", lambda _: False)
_is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor

_depth = 0


def one_by_one(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward pass of a ``torch.autograd.Function`` so that it takes batched gradients.

    The backward pass is called once for each gradient of a batch and its results are stacked. It can be
    differentiated again, as the pass itself can.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        global _depth
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        batch = next((_Batch.of(grad) for grad in grads if _has_batch(grad)), None)
        if batch is None:
            return backward(ctx, *grads)
        columns = [None if grad is None else batch.open(grad) for grad in grads]
        size = max(column.shape[0] for column in columns if column is not None)
        columns = [[None] * size if x is None else x.expand(size, *x.shape[1:]).unbind() for x in columns]
        _depth += 1
        try:
            with batch.outside():
                found = [call(ctx, *row) for row in zip(*columns, strict=True)]
        finally:
            _depth -= 1
        return tuple(batch.close(column) for column in zip(*map(_as_tuple, found), strict=True))

    return call


def is_within_batch() -> bool:
    """Whether the current gradient is one of a batch: what it leaves for later in the same run, the next overwrites."""
    return _depth > 0


def _has_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and (_is_legacy(x) or _is_batched(x))


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


class _Batch:
    """A hidden batch dimension, opened and hidden again."""

    def __init__(self, level: int, package: Any) -> None:
        self.level, self.package = level, package

    @classmethod
    def of(cls, x: Tensor) -> _Batch:
        """The innermost batch dimension of a tensor that has one."""
        if _is_legacy(x):
            torch._C._vmapmode_increment_nesting()
            level = torch._C._vmapmode_decrement_nesting()  # pyright: ignore[reportAttributeAccessIssue]
            return cls(max(level, 1), torch)  # threads of the engine do not know the level
        return cls(_functorch.maybe_get_level(x), _functorch)

    def outside(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the transform that made the batch is not active."""
        return contextlib.nullcontext() if self.package is torch else temporarily_pop_interpreter_stack()

    def open(self, x: Tensor) -> Tensor:
        """With the batch dimension in front; of size 1 if the tensor has none."""
        return self.package._remove_batch_dim(x, self.level, 1, 0)

    def close(self, rows: tuple[Any, ...]) -> Any:
        """The results for each gradient as one tensor; what is no tensor is the same in all."""
        return self.package._add_batch_dim(torch.stack(rows), 0, self.level) if isinstance(rows[0], Tensor) else rows[0]
