"""Comparing two implementations of an operation through their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["derivatives"]


def derivatives(function: Callable[..., Tensor], arguments: list[Tensor], order: int) -> list[Tensor]:
    """The result and its derivatives with respect to every argument, order by order.

    Each order is the gradient of a sum of sines of the one before, with fixed random weights.

    Args:
        function: The function to differentiate.
        arguments: Its arguments; tensors that require a gradient.
        order: Highest order of derivatives.

    Returns:
        The result, then for each order one tensor per argument, detached.
    """
    generator = torch.Generator().manual_seed(9)
    level = [function(*arguments)]
    collected = list(level)
    for _ in range(order):
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in level]
        total = torch.stack([(x * weight).sin().sum() for x, weight in zip(level, weights, strict=True)]).sum()
        level = list(torch.autograd.grad(total, arguments, create_graph=True, materialize_grads=True))
        collected += level
    return [x.detach() for x in collected]
