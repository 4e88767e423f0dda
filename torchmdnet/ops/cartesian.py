"""Tensor features as plain 3×3 matrices, the layout (N, 3, 3, F) of the established helper functions."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose_tensor", "decompose_tensor", "tensor_matmul_o3", "tensor_matmul_so3"]


def compose_tensor(I: Tensor, A: Tensor, S: Tensor) -> Tensor:
    """Add a trace (N, 1, F), and packed antisymmetric (N, 3, F) and symmetric (N, 5, F) parts, to (N, 3, 3, F).

    A holds the entries 01, 02, 12; S the entries 00, 01, 02, 11, 12 of a symmetric traceless matrix.
    """
    i = I[:, 0]
    a01, a02, a12 = A.unbind(dim=1)
    s00, s01, s02, s11, s12 = S.unbind(dim=1)
    rows = [
        [i + s00, s01 + a01, s02 + a02],
        [s01 - a01, i + s11, s12 + a12],
        [s02 - a02, s12 - a12, i - s00 - s11],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def decompose_tensor(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`compose_tensor`."""
    i = (X[:, 0, 0] + X[:, 1, 1] + X[:, 2, 2]) / 3
    A = torch.stack([(X[:, a, b] - X[:, b, a]) / 2 for a, b in ((0, 1), (0, 2), (1, 2))], dim=1)
    s01, s02, s12 = ((X[:, a, b] + X[:, b, a]) / 2 for a, b in ((0, 1), (0, 2), (1, 2)))
    S = torch.stack([X[:, 0, 0] - i, s01, s02, X[:, 1, 1] - i, s12], dim=1)
    return i[:, None], A, S


def tensor_matmul_so3(Y: Tensor, M: Tensor) -> Tensor:
    """Twice the channelwise matrix product Y M: (N, 3, 3, F) × 2 -> (N, 3, 3, F)."""
    return 2 * torch.einsum("nijf,njkf->nikf", Y, M)


def tensor_matmul_o3(Y: Tensor, M: Tensor) -> Tensor:
    """Channelwise Y M + M Y: (N, 3, 3, F) × 2 -> (N, 3, 3, F)."""
    return torch.einsum("nijf,njkf->nikf", Y, M) + torch.einsum("nijf,njkf->nikf", M, Y)
