"""Lengths that can be differentiated where they vanish."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["length"]


def length(v: Tensor, dim: int = -1, keepdim: bool = False) -> Tensor:
    """Euclidean length along an axis, with zero, not undefined, derivatives of every order at the zero vector."""
    square = v.square().sum(dim=dim, keepdim=keepdim)
    is_zero = square == 0
    return torch.where(is_zero, square, torch.where(is_zero, 1.0, square).sqrt())
