"""Reductions by index, with the conventions stored models were trained with."""

from __future__ import annotations

from torch import Tensor

__all__ = ["REDUCTIONS", "scatter", "widened"]

_FROM_ZERO = {"mean": "mean", "max": "amax", "min": "amin", "mul": "prod"}
_PLAIN = {"average": "mean", "maximum": "amax", "minimum": "amin", "product": "prod"}
REDUCTIONS = ("add", "sum", *_FROM_ZERO, *_PLAIN)


def scatter(src: Tensor, index: Tensor, dim: int = 0, dim_size: int | None = None, reduce: str = "sum") -> Tensor:
    """Reduce the rows of ``src`` that share an index.

    The established short words reduce **onto a zero that takes part itself**: mean is the sum over count + 1, max and
    min compare with 0, mul is 0. Models trained with ``reduce_op: mean`` or ``aggr: mean | max`` depend on it. The long
    words average, maximum, minimum and product mean what they say. Rows nothing is reduced to are 0.

    Args:
        src: Values, any shape.
        index: Target row of each entry along ``dim``, (src.shape[dim],).
        dim: Axis to reduce.
        dim_size: Number of rows in the result; None is ``index.max() + 1``.
        reduce: ``add`` (= ``sum``), one of ``mean``, ``max``, ``min``, ``mul``, or one of ``average``, ``maximum``,
            ``minimum``, ``product``.

    Raises:
        ValueError: For an unknown ``reduce``.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: {reduce!r} is not available. Choose from {', '.join(REDUCTIONS)}.")
    if dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    shape = list(src.shape)
    shape[dim] = dim_size
    result = src.new_zeros(shape)
    if reduce in ("add", "sum"):
        return result.index_add(dim, index, src)
    column = index.reshape([-1 if axis == dim % src.dim() else 1 for axis in range(src.dim())]).expand_as(src)
    name = _FROM_ZERO.get(reduce) or _PLAIN[reduce]
    return result.scatter_reduce(dim, column, src, reduce=name, include_self=reduce in _FROM_ZERO)


def widened(x: Tensor) -> Tensor:
    """The same numbers in float64, where the device has it, for sums whose last digits matter."""
    return x if x.device.type == "mps" else x.double()
