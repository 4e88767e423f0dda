"""Edges as operators read them, and tensors as the arrays that loops read."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.ops.kernels.work import WORTH_THREADS

__all__ = ["EdgeLayout", "array", "as_rows", "as_tables", "flat", "fold_edges"]


class EdgeLayout(NamedTuple):
    """What the loops have to know of the edges, as arrays, or where a twin runs, as tensors."""

    sender: Any  # (E,)
    row: Any  # (E,) filter row of each edge
    back: Any  # (E,) filter row of the edge of opposite direction
    reverse: Any  # (E,) that edge
    row_start: Any  # (N + 1,)
    cell: Any  # (P,) first row of the table for each filter row
    starts: Any  # (L + 1,) first component of each part; always an array

    def groups(self, table: tuple[int, ...], work: int) -> int:
        """Tables that threads fill side by side, to be added up: as many as there are threads, if they are small."""
        is_small = 4 * table[0] <= self.sender.shape[0]
        return cores.count() if is_small and work >= WORTH_THREADS else 1

    def work(self, channels: int) -> int:
        """Multiply-adds of one pass, roughly."""
        return self.sender.shape[0] * channels * int(self.starts[-1]) * 3


def array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def flat(tensor: Tensor) -> Any:
    """(N, C, F) as an array (N, C F)."""
    return as_rows(tensor.detach().contiguous())


def as_rows(out: Tensor) -> Any:
    """A contiguous tensor (N, C, F), to be written as an array (N, C F)."""
    return out.view(out.shape[0], out.shape[1] * out.shape[2]).numpy()


def as_tables(out: Tensor) -> Any:
    """Contiguous tables (T, R, L, F), to be written as an array (T, R, L F)."""
    return out.view(*out.shape[:2], out.shape[2] * out.shape[3]).numpy()


def fold_edges(per_edge: Tensor, rows: Any, shape: tuple[int, ...]) -> Tensor:
    """Sum edges into the filter rows they use: (E, K) -> (P, K)."""
    out = per_edge.new_zeros(shape)
    loops.filters.fold(array(per_edge), rows, out.numpy())
    return out
