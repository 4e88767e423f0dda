"""Sums over the atoms of each system, and which systems have inputs that no model can answer for.

Nothing is added atomically: the order of a sum does not depend on which program comes first, so results are the same
from call to call.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchmdnet.ops.triton.launching import launch as _launch

__all__ = ["guard", "sum_by_index", "sum_by_row"]

#: Rows that a program adds at once, and columns; atoms of a program that only looks at them.
ROWS, COLUMNS, BLOCK = 512, 4, 128


@triton.jit(do_not_specialize=["N"])
def by_index(x, index, out, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out_s = Σ_n x_n of the rows n with index s, one program for each s and some columns."""
    s = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], x.dtype.element_ty)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        own = tl.load(index + n, n < N, -1) == s
        at = n.to(tl.int64)[:, None] * K + c[None, :]
        total += tl.load(x + at, own[:, None] & (c < K)[None, :], 0)
    tl.store(out + s.to(tl.int64) * K + c, tl.sum(total, 0), c < K)


@triton.jit(do_not_specialize=["N", "S"])
def mark(
    z, pos, batch, box, q, s, flags, N, S, MAX_Z, STRIDE, FARTHEST: tl.constexpr,
    HAS_BOX: tl.constexpr, HAS_Q: tl.constexpr, HAS_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Flag systems with a number that is not finite, an element beyond the embedding or an atom of no system."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = a < N
    x = tl.load(pos + 3 * a, m, 0)
    y = tl.load(pos + 3 * a + 1, m, 0)
    w = tl.load(pos + 3 * a + 2, m, 0)
    number, system = tl.load(z + a, m, 0), tl.load(batch + a, m, 0)
    known = tl.minimum(tl.maximum(system, 0), S - 1)
    far = tl.maximum(tl.abs(x), tl.maximum(tl.abs(y), tl.abs(w)))
    is_bad = ((far <= FARTHEST) == 0) | ((((x - x) + (y - y) + (w - w)) == 0) == 0)
    is_bad = is_bad | (number < 0) | (number >= MAX_Z) | (system != known)
    one = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_max(flags + known, one, m & is_bad)
    own = a < S
    rest = tl.zeros([BLOCK], tl.float64)
    if HAS_BOX:
        for k in tl.static_range(9):
            value = tl.load(box + a * STRIDE + k, own, 0).to(tl.float64)
            rest += value - value
    if HAS_Q:
        value = tl.load(q + a, own, 0).to(tl.float64)
        rest += value - value
    if HAS_S:
        value = tl.load(s + a, own, 0).to(tl.float64)
        rest += value - value
    tl.atomic_max(flags + a, one, own & ((rest == 0) == 0))


@triton.jit(do_not_specialize=["N", "S"])
def spread(z, batch, flags, elements, systems, guard, N, S, MAX_Z, BLOCK: tl.constexpr):
    """NaN for the atoms of flagged systems, 0 for others, and numbers of elements and systems that are in bounds."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = a < N
    number, system = tl.load(z + a, m, 0), tl.load(batch + a, m, 0)
    known = tl.minimum(tl.maximum(system, 0), S - 1)
    flag = tl.load(flags + known, m, 0)
    tl.store(guard + a, tl.where(flag != 0, float("nan"), 0.0), m)
    tl.store(elements + a, tl.minimum(tl.maximum(number, 0), MAX_Z - 1), m)
    tl.store(systems + a, known, m)


@triton.jit(do_not_specialize=["E"])
def by_row(x, order, start, out, E, NUM: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out_p = Σ_b Σ_e x_be of the edges e of row p, one program for each row; x is (NUM, E, K)."""
    p = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    first, last = tl.load(start + p), tl.load(start + p + 1)
    total = tl.zeros([ROWS, COLUMNS], x.dtype.element_ty)
    for t in range(first, last, ROWS):
        n = t + tl.arange(0, ROWS)
        e = tl.load(order + n, n < last, 0)
        m = (n < last)[:, None] & (k < K)[None, :]
        for b in tl.static_range(NUM):
            total += tl.load(x + (b * E.to(tl.int64) + e)[:, None] * K + k[None, :], m, 0)
    tl.store(out + p * K + k, tl.sum(total, 0), k < K)


#: Edges in the order of the rows they belong to, and where those of each row begin, of the last lists of rows.
_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sum_by_row(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum what several programs found for an edge, and edges into the rows they use: (B, E, K) -> (num_rows, K).

    Edges are sorted once for all sums over the same rows.
    """
    B, E, K = x.shape
    out = x.new_empty(num_rows, K)
    if num_rows and K:
        kept = _orders.get(rows)
        if kept is None or kept[0] != (num_rows, rows._version):
            ordered, order = torch.sort(rows, stable=True)
            start = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=rows.device))
            kept = _orders[rows] = ((num_rows, rows._version), order, start)
        sizes = {"ROWS": 16, "COLUMNS": triton.next_power_of_2(K), "num_warps": 1}
        _launch(by_row, (num_rows,), x.contiguous(), kept[1], kept[2], out, E, NUM=B, K=K, **sizes)
    return out


def sum_by_index(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The rows of x (N, ...) that share an index (N,), added in their order: (num_rows, ...)."""
    flat = x.detach().contiguous().reshape(x.shape[0], math.prod(x.shape[1:]))
    N, K = flat.shape
    out = flat.new_empty(num_rows, K)
    if num_rows and K:
        grid = (num_rows, triton.cdiv(K, COLUMNS))
        _launch(by_index, grid, flat, index.contiguous(), out, N, K, ROWS=ROWS, COLUMNS=COLUMNS)
    return out.reshape(num_rows, *x.shape[1:])


def guard(
    z: Tensor,
    pos: Tensor,
    batch: Tensor,
    num_systems: int,
    max_z: int,
    farthest: float,
    box: Tensor | None,
    q: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`torchmdnet.neighbors.sound.in_bounds`."""
    N, S = z.shape[0], num_systems
    flags = torch.zeros(S, dtype=torch.int32, device=pos.device)
    found = torch.empty_like(z), torch.empty_like(batch), pos.new_empty(N)
    if N and S:
        stride = 9 if box is not None and box.shape[0] > 1 else 0
        values = [pos if x is None else x.detach().contiguous() for x in (box, q, s)]
        has = {"HAS_BOX": box is not None, "HAS_Q": q is not None, "HAS_S": s is not None}
        z, pos, batch = z.contiguous(), pos.detach().contiguous(), batch.contiguous()
        bounds = {"FARTHEST": farthest, **has, "BLOCK": BLOCK}
        _launch(mark, (triton.cdiv(max(N, S), BLOCK),), z, pos, batch, *values, flags, N, S, max_z, stride, **bounds)
        _launch(spread, (triton.cdiv(N, BLOCK),), z, batch, flags, *found, N, S, max_z, BLOCK=BLOCK)
    return found
