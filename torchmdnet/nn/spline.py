"""Functions of distance on a uniform grid: quintic splines whose coefficients are linear in sampled values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchmdnet.ops.batched import one_by_one
from torchmdnet.ops.constants import Constant
from torchmdnet.ops.kernels import is_traced
from torchmdnet.ops.messages import RadialPoints

__all__ = ["BASIS", "Spline"]

#: Polynomials of the six B-splines that overlap a cell, in powers of the place t in it, times 120.
BASIS = (
    (1, -5, 10, -10, 5, -1),
    (26, -50, 20, 20, -20, 5),
    (66, 0, -60, 0, 30, -10),
    (26, 50, 20, -20, -20, 10),
    (1, 5, 10, 10, 5, -5),
    (0, 0, 0, 0, 0, 1),
)
#: Inverse of 1 + δ²/4 + δ⁴/120, the values of a quintic B-spline at the nodes, as a series in δ².
_INVERSE = (1.0, -1 / 4, 13 / 240, -11 / 960, 139 / 57600)
#: Nodes sampled beyond each end of the interval.
_BEFORE, _AFTER = 6, 7

#: The polynomials, (6, 6).
_basis = Constant(torch.tensor(BASIS, dtype=torch.float64) / 120)


class Spline(NamedTuple):
    r"""A quintic spline over [start, stop] with cells of equal size, four times continuously differentiable.

    A function f is sampled at :attr:`num_rows` nodes :math:`x_n`; its coefficients are
    :math:`c = (1 - \delta^2/4 + 13\,\delta^4/240 - \dots) f`, the inverse of the B-spline's values as a series in the
    second difference :math:`\delta^2` (Unser, IEEE Signal Process. Mag. 1999). Values, slopes and curvatures are those
    of one smooth function, so forces stay the exact gradient of the energy. The error falls with the sixth power of
    the cell.
    """

    start: float
    stop: float
    num_cells: int

    @property
    def num_rows(self) -> int:
        """Nodes at which a function has to be sampled."""
        return self.num_cells + 1 + _BEFORE + _AFTER

    def nodes(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Distances of the nodes, some of them beyond the ends, (num_rows,)."""
        step = (self.stop - self.start) / self.num_cells
        count = torch.arange(-_BEFORE, self.num_cells + _AFTER + 1, dtype=torch.float64, device=device)
        return (self.start + step * count).to(dtype)

    def coefficients(self, values: Tensor) -> Tensor:
        """Coefficients of a function sampled at the nodes: (num_rows, ...) -> (num_cells + 6, ...)."""
        return _filtered(values) if is_traced() else _Filtered.apply(values)  # type: ignore[return-value]

    def locate(self, r: Tensor) -> RadialPoints:
        """Where distances in Å lie between the rows of the coefficients: (P,) -> coef (P, 6), cell (P,)."""
        place = (r.clamp(self.start, self.stop) - self.start) * (self.num_cells / (self.stop - self.start))
        # A distance that is not a number reads the first cell with coefficients that are none either.
        cell = place.detach().nan_to_num(0.0).floor().clamp(0, self.num_cells - 1)
        t = place - cell
        square = t.square()
        powers = torch.stack([torch.ones_like(t), t, square, t * square, square * square, t * square * square], dim=1)
        return RadialPoints(torch.matmul(powers, _basis(r).t()), cell.long())


def _taps() -> list[float]:
    """What each neighbour, 0 to 4 nodes away, adds to a coefficient."""
    return [
        sum((-1) ** (m - away) * math.comb(2 * m, m - away) * _INVERSE[m] for m in range(away, len(_INVERSE)))
        for away in range(len(_INVERSE))
    ]


_TAPS = _taps()


def _filtered(values: Tensor) -> Tensor:
    """Sum of neighbours times taps, (R, ...) -> (R - 8, ...)."""
    margin = len(_TAPS) - 1
    size = values.shape[0] - 2 * margin
    total = _TAPS[0] * values[margin : margin + size]
    for away in range(1, margin + 1):
        total.add_(values[margin - away : margin - away + size], alpha=_TAPS[away])
        total.add_(values[margin + away : margin + away + size], alpha=_TAPS[away])
    return total


class _Filtered(Function):
    """:func:`_filtered`, whose gradient is the same sum over neighbours, for the taps are symmetric."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _filtered(values)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        margin = 2 * (len(_TAPS) - 1)
        around = [0, 0] * (grads[0].dim() - 1) + [margin, margin]
        return _Filtered.apply(F.pad(grads[0], around))
