r"""3×3 tensor features as irreducible parts: one trace, three antisymmetric, five symmetric traceless components.

A feature tensor :math:`X = I + A + S` travels as its nine coordinates in an *orthonormal* basis of 3×3 matrices, laid
out (N, 9, F) = trace | antisymmetric | symmetric traceless. Because the basis is orthonormal, the squared Frobenius
norm is a plain sum of squares, and a map that mixes channels acts on each part by a plain matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchmdnet.ops import kernels
from torchmdnet.ops.constants import Constant
from torchmdnet.typing import AtomFeatures, AtomTensors, EdgeVectors

__all__ = [
    "PARTS",
    "anticommutator",
    "anticommutator_plain",
    "from_matrix",
    "harmonics",
    "interact",
    "interact_plain",
    "matrix_product",
    "matrix_product_plain",
    "mix_channels",
    "mix_channels_plain",
    "normalize",
    "normalize_plain",
    "norms_by_part",
    "norms_by_part_plain",
    "refine",
    "refine_plain",
    "scale_parts",
    "squared_norm",
    "to_matrix",
]

#: Components of the trace, the antisymmetric and the symmetric traceless part.
PARTS = (1, 3, 5)
ENDS = (1, 4, 9)

_R2, _R3, _R6 = 2**-0.5, 3**-0.5, 6**-0.5

#: The basis, (9, 3, 3). Antisymmetric: the matrices of the cross product, v -> e_k × v, over √2.
_BASIS = (
    ((_R3, 0, 0), (0, _R3, 0), (0, 0, _R3)),
    ((0, 0, 0), (0, 0, -_R2), (0, _R2, 0)),
    ((0, 0, _R2), (0, 0, 0), (-_R2, 0, 0)),
    ((0, -_R2, 0), (_R2, 0, 0), (0, 0, 0)),
    ((0, _R2, 0), (_R2, 0, 0), (0, 0, 0)),
    ((0, 0, 0), (0, 0, _R2), (0, _R2, 0)),
    ((0, 0, _R2), (0, 0, 0), (_R2, 0, 0)),
    ((_R2, 0, 0), (0, -_R2, 0), (0, 0, 0)),
    ((-_R6, 0, 0), (0, -_R6, 0), (0, 0, 2 * _R6)),
)
#: The basis as a (9, 9) orthogonal matrix, rows are components, columns matrix entries.
_basis = Constant(torch.tensor(_BASIS, dtype=torch.float64).reshape(9, 9))


def to_matrix(X: AtomTensors) -> Tensor:
    """Components to matrices: (N, 9, F) -> (N, 3, 3, F)."""
    return torch.matmul(_basis(X).t(), X).unflatten(1, (3, 3))


def from_matrix(X: Tensor) -> AtomTensors:
    """Matrices to components: (N, 3, 3, F) -> (N, 9, F)."""
    return torch.matmul(_basis(X), X.flatten(1, 2))


def harmonics(u: EdgeVectors, handedness: float = 1.0) -> Tensor:
    r"""Components of :math:`1`, of :math:`v \mapsto u × v` and of :math:`u u^T - |u|^2/3`: (E, 3) -> (E, 9).

    Args:
        u: Directions; a zero vector has only the first component.
        handedness: Sign of the antisymmetric part.
    """
    square = (u[:, :, None] * u[:, None, :]).flatten(1)  # (E, 9) entries of u uᵀ
    symmetric = torch.matmul(square, _basis(u)[4:].t())  # (E, 5)
    trace = u.new_full((u.shape[0], 1), 3**0.5)
    return torch.cat([trace, handedness * 2**0.5 * u, symmetric], dim=1)


def squared_norm(X: AtomTensors) -> AtomFeatures:
    """Squared Frobenius norm of each channel: (N, 9, F) -> (N, F)."""
    return X.square().sum(dim=1)


def norms_by_part(X: AtomTensors) -> Tensor:
    """Squared Frobenius norms of trace, antisymmetric and symmetric part: (N, 9, F) -> (N, 3 F)."""
    return kernels.norms_by_part(X) if kernels.has_kernel(X) else norms_by_part_plain(X)


def norms_by_part_plain(X: AtomTensors) -> Tensor:
    """The definition of :func:`norms_by_part`."""
    return kernels.norms_by_part.definition(X)


def mix_channels(X: AtomTensors, weights: Sequence[Tensor]) -> AtomTensors:
    """Apply one (F', F) matrix to the channels of each part: (N, 9, F) -> (N, 9, F')."""
    if kernels.has_kernel(X) and X.shape[0]:
        return kernels.mix(X, torch.stack(list(weights)), ENDS)
    return mix_channels_plain(X, weights)


def mix_channels_plain(X: AtomTensors, weights: Sequence[Tensor]) -> AtomTensors:
    """The definition of :func:`mix_channels`."""
    return torch.cat(
        [F.linear(part, weight) for part, weight in zip(X.split(PARTS, dim=1), weights, strict=True)], dim=1
    )


def scale_parts(X: AtomTensors, scale: Tensor) -> AtomTensors:
    """Multiply each part by its own factor per channel: (N, 9, F), (N, 3, F) -> (N, 9, F)."""
    parts = X.split(PARTS, dim=1)
    return torch.cat([part * scale[:, k, None] for k, part in enumerate(parts)], dim=1)


def _channelwise(A: Tensor, B: Tensor) -> Tensor:
    """Product of the 3×3 matrices of each channel: (N, 3, 3, F) × 2 -> (N, 3, 3, F)."""
    return (A.unsqueeze(3) * B.unsqueeze(1)).sum(dim=2)


def matrix_product(X: AtomTensors, Y: AtomTensors) -> AtomTensors:
    """X Y, channel by channel: (N, 9, F) × 2 -> (N, 9, F)."""
    return kernels.product(X, Y, both=False) if kernels.has_kernel(X) else matrix_product_plain(X, Y)


def anticommutator(X: AtomTensors, Y: AtomTensors) -> AtomTensors:
    """X Y + Y X, channel by channel: (N, 9, F) × 2 -> (N, 9, F)."""
    return kernels.product(X, Y, both=True) if kernels.has_kernel(X) else anticommutator_plain(X, Y)


def normalize(X: AtomTensors) -> AtomTensors:
    """X / (|X|² + 1), channel by channel: (N, 9, F) -> (N, 9, F)."""
    return kernels.normalize(X) if kernels.has_kernel(X) else normalize_plain(X)


def normalize_plain(X: AtomTensors) -> AtomTensors:
    """The definition of :func:`normalize`."""
    return kernels.normalize.definition(X)


def interact(Y: AtomTensors, M: AtomTensors, factor: Tensor, *, both: bool) -> AtomTensors:
    r"""Normalised product, :math:`P / (|P|^2 + 1)` of :math:`P = \kappa (Y M + M Y)`, or :math:`2 \kappa Y M`.

    Args:
        Y: (N, 9, F).
        M: (N, 9, F).
        factor: :math:`\kappa` of each atom, (N,).
        both: Whether both orders of the product are added.
    """
    if kernels.has_kernel(Y) and not factor.requires_grad:
        return kernels.interact(Y, M, factor, both=both)
    return interact_plain(Y, M, factor, both=both)


def interact_plain(Y: AtomTensors, M: AtomTensors, factor: Tensor, *, both: bool) -> AtomTensors:
    """The definition of :func:`interact`."""
    P = anticommutator(Y, M) if both else 2 * matrix_product(Y, M)
    return normalize_plain(factor[:, None, None] * P)


def refine(X: AtomTensors, D: AtomTensors, factor: Tensor) -> AtomTensors:
    """X + D + κ D² with one factor for each atom: (N, 9, F) × 2, (N,) -> (N, 9, F)."""
    if kernels.has_kernel(X) and not factor.requires_grad:
        return kernels.refine(X, D, factor)
    return refine_plain(X, D, factor)


def refine_plain(X: AtomTensors, D: AtomTensors, factor: Tensor) -> AtomTensors:
    """The definition of :func:`refine`."""
    return X + D + factor[:, None, None] * matrix_product(D, D)


def matrix_product_plain(X: AtomTensors, Y: AtomTensors) -> AtomTensors:
    """The definition of :func:`matrix_product`."""
    return from_matrix(_channelwise(to_matrix(X), to_matrix(Y)))


def anticommutator_plain(X: AtomTensors, Y: AtomTensors) -> AtomTensors:
    """The definition of :func:`anticommutator`."""
    A, B = to_matrix(X), to_matrix(Y)
    return from_matrix(_channelwise(A, B) + _channelwise(B, A))
