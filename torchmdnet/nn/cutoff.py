"""Smooth cutoffs of distance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["CosineCutoff"]


class CosineCutoff(nn.Module):
    r"""Cosine switching function.

    Without a lower cutoff it falls from one to zero,

    .. math:: C(r) = \tfrac12 (\cos(\pi r / r_c) + 1) \quad (r < r_c),

    and with one it is a bump that vanishes at both ends,

    .. math:: C(r) = \tfrac12 (\cos(\pi (2 (r - r_l)/(r_c - r_l) + 1)) + 1) \quad (r_l < r < r_c).

    Args:
        cutoff_lower: :math:`r_l` in Å.
        cutoff_upper: :math:`r_c` in Å.
    """

    def __init__(self, cutoff_lower: float = 0.0, cutoff_upper: float = 5.0) -> None:
        super().__init__()
        self.cutoff_lower = cutoff_lower
        self.cutoff_upper = cutoff_upper

    def forward(self, distances: Tensor) -> Tensor:
        """Switching value of each distance, same shape."""
        inside = distances < self.cutoff_upper
        if self.cutoff_lower > 0:
            inside = inside & (distances > self.cutoff_lower)
        return torch.where(inside, self.continued(distances), 0.0)

    def continued(self, distances: Tensor) -> Tensor:
        """The same cosine everywhere, inside the cutoffs and out."""
        lower, upper = self.cutoff_lower, self.cutoff_upper
        if lower > 0:
            phase = math.pi * (2 * (distances - lower) / (upper - lower) + 1.0)
        else:
            phase = distances * (math.pi / upper)
        return 0.5 * (torch.cos(phase) + 1.0)
