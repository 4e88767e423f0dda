"""The forms and stages of :mod:`torchmdnet.ops.kernels`, evaluated by Triton's kernels.

Nothing here waits for the device or depends on the values of a tensor, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torchmdnet.ops.constants import Constant
from torchmdnet.ops.kernels import EdgeLayout, algebra
from torchmdnet.ops.kernels.attention import ContractionForm
from torchmdnet.ops.kernels.embedding import EmbeddingForm
from torchmdnet.ops.kernels.message import MessageForm
from torchmdnet.ops.kernels.mixing import MixingForm
from torchmdnet.ops.triton import edges, nodes
from torchmdnet.ops.triton.launching import launch as _launch
from torchmdnet.ops.triton.sums import sum_by_row

__all__ = [
    "contraction",
    "embedding",
    "interact",
    "matrix_product",
    "message",
    "mixing",
    "normalize",
    "normalize_slope",
    "norms_by_part",
    "refine",
]

#: Edges of an atom that a program works on side by side, one for each of its warps.
EDGES = 4
#: Bytes of an edge's channels that a program reads at once, at most: 16 for each lane of a warp. Passes that keep
#: more values in registers than a sum take half, or they would run out of registers.
WIDTH = 512
#: Numbers of a program over atoms and channels: enough to fill a warp, few enough for small molecules to fill a device.
BLOCK = 128
#: Items of the table's gradient, beyond one for each cell, and the least number of edges in one.
ITEMS, ITEM_SIZE = 8192, 64


def _ready(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().contiguous() for tensor in tensors)


# ----------------------------------------------------------------------------------------------------------- edges


def _tile(like: Tensor, *, is_lean: bool) -> tuple[int, dict[str, int]]:
    """Blocks that the channels are cut into, and the size of a program's tile."""
    channels = like.shape[-1]
    size = min(triton.next_power_of_2(channels), WIDTH // like.element_size() // (1 if is_lean else 2))
    return triton.cdiv(channels, size), {"EDGES": EDGES, "CHANNELS": size}


def _num_parts(at: EdgeLayout) -> int:
    return len(at.starts) - 1


def _gather(
    at: EdgeLayout,
    rows: Tensor,
    coef: Tensor,
    table: Tensor,
    there: Tensor,
    here: Tensor | None = None,
    S: Tensor | None = None,
    *,
    sums: bool = True,
    slopes: bool = False,
    num_reads: int = 0,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`torchmdnet.ops.triton.edges.message`: (N, C, F) and (B, E, K), empty where it is not asked for.

    The latter is written ``into`` a tensor that is given.
    """
    N, C, F = there.shape
    L, K, E = _num_parts(at), num_reads or coef.shape[1], at.sender.shape[0]
    blocks, tile = _tile(there, is_lean=not slopes)
    grid = (N, blocks, C if L == 1 else 1)
    out = torch.empty_like(there) if sums else there.new_empty(0)
    out_edge = there.new_empty(grid[1] * grid[2] if slopes else 0, E, K) if into is None else into
    features = (there if here is None else here, there, there if S is None else S)
    heads = {"D": 0 if S is None else F // S.shape[1]}
    arguments = (coef, at.cell, table, *features, at.sender, rows, at.row_start, out, out_edge, E, F, C)
    _launch(edges.message, grid, *arguments, L=L, K=K, SUMS=sums, SLOPES=slopes, **heads, **tile)
    return out, out_edge


class _Items(NamedTuple):
    """Edges sorted by the cell of a table that they read, cut into items of one cell and at most ``size`` edges."""

    order: Tensor  # (E,) edges by cell
    receiver: Tensor  # (E,) of each edge
    edge_start: Tensor  # (G + 1,) where the edges of each cell begin
    item_start: Tensor  # (G + 1,) where its items do
    item_cell: Tensor  # (I,)
    size: int


#: Those of the last graphs, by what they were made of: every table of a training step has its gradient in them.
_items_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _items(at: EdgeLayout, num_cells: int) -> _Items:
    """The edges by cell, sorted once for all tables that the same pairs read."""
    key = (num_cells, ITEM_SIZE, ITEMS)
    kept = _items_of.get(at.cell)
    if kept is not None and kept[0] == key and kept[1] is at.row and kept[2] == at.cell._version:
        return kept[3]
    E, device = at.sender.shape[0], at.cell.device
    size = max(ITEM_SIZE, E // ITEMS)
    ordered, order = torch.sort(at.cell.index_select(0, at.row), stable=True)
    edge_start = torch.searchsorted(ordered, torch.arange(num_cells + 1, device=device))  # (G + 1,)
    num_items = (edge_start.diff() + (size - 1)) // size
    item_start = torch.cat([num_items.new_zeros(1), num_items.cumsum(0)])
    every = torch.arange(num_cells + E // size, device=device)  # an upper bound of the items
    item_cell = torch.searchsorted(item_start, every, right=True).sub_(1).clamp_(max=num_cells - 1)
    receiver = torch.searchsorted(at.row_start, torch.arange(E, device=device), right=True).sub_(1)
    made = _Items(order, receiver, edge_start, item_start, item_cell, size)
    _items_of[at.cell] = (key, at.row, at.cell._version, made)
    return made


def _of_table(
    at: EdgeLayout,
    shape: tuple[int, ...],
    coef: Tensor,
    O: Tensor,
    X: Tensor | None = None,
    Y: Tensor | None = None,
    Z: Tensor | None = None,
    S: Tensor | None = None,
) -> Tensor:
    """The gradient of a table (R, L, F), in the order of its rows and so always the same."""
    E, (_, C, F), K = at.sender.shape[0], O.shape, coef.shape[1]
    R, L = shape[:2]
    if E == 0:
        return O.new_zeros(shape)
    items_of = _items(at, R - K + 1)
    count, size = items_of.item_cell.shape[0], items_of.size
    width = min(triton.next_power_of_2(F), WIDTH // O.element_size() // 2)
    items = O.new_empty(count, K, L, F)
    options = {"D": 0 if S is None else F // S.shape[1], "ROWS": triton.next_power_of_2(K), "CHANNELS": width}
    indices = (items_of.order, items_of.receiver, at.sender, at.row)
    arguments = (*indices, items_of.item_cell, items_of.item_start, items_of.edge_start, items, F, size)
    grid = (count, triton.cdiv(F, width))
    features = (coef, O, X, Y, Z, S)
    _launch(edges.table_items, grid, *features, *arguments, C=C, L=L, K=K, **options, num_warps=1)
    out = O.new_empty(shape)
    _launch(
        edges.table_sum,
        (R, triton.cdiv(L * F, BLOCK)),
        items,
        items_of.item_start,
        out,
        R - K + 1,
        L * F,
        K=K,
        BLOCK=BLOCK,
    )
    return out


class _Message(MessageForm):
    """By kernels that see ``here``, the features of the receiver, and ``there``, those of the sender."""

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at = where
        if slot in ("O", "X"):
            rows, other = (at.row, "X") if slot == "O" else (at.back, "O")
            return _gather(at, rows, *_ready(known["coef"], known["table"], known[other]))[0]
        O, X = _ready(known["O"], known["X"])
        if slot == "table":
            return _of_table(at, shape, _ready(known["coef"])[0], O, X)
        (table,) = _ready(known["table"])
        _, of_edge = _gather(at, at.row, table, table, X, O, sums=False, slopes=True, num_reads=shape[1])
        return sum_by_row(of_edge, at.row, shape[0])

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if {"X", "coef"} <= set(wanted):
            tensors = _ready(known["coef"], known["table"], known["O"], known["X"])
            found["X"], of_edge = _gather(where, where.back, *tensors, slopes=True)
            found["coef"] = sum_by_row(of_edge, where.back, shapes["coef"][0])
        rest = [slot for slot in wanted if slot not in found]
        return found | {slot: self.derivative(slot, known, shapes[slot], where) for slot in rest}


class _Embedding(EmbeddingForm):
    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at = where
        tensors = dict(zip(known, _ready(*known.values()), strict=True))
        if slot == "table":
            return _of_table(at, shape, tensors["coef"], tensors["O"], Y=tensors["Y"], Z=tensors["Z"])
        if slot != "Z":
            return self._per_edge([slot], tensors, {slot: shape}, at)[slot]
        table, (N, C, F) = tensors["table"], tensors["O"].shape
        out, (blocks, tile) = table.new_empty(shape), _tile(table, is_lean=False)
        features = (tensors["coef"], at.cell, table, tensors["O"], tensors["Y"])
        indices = (at.sender, at.row, at.back, at.reverse, at.row_start)
        options = {"C": C, "L": _num_parts(at), "K": tensors["coef"].shape[1], "IS_SHARED": at.row is at.back}
        _launch(edges.embed_factor, (N, blocks), *features, *indices, out, F, **options, **tile)
        return out

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        together = [slot for slot in wanted if slot in ("Y", "coef")]
        found = {}
        if together:
            tensors = dict(zip(known, _ready(*known.values()), strict=True))
            found = self._per_edge(together, tensors, shapes, where)
        rest = [slot for slot in wanted if slot not in found]
        return found | {slot: self.derivative(slot, known, shapes[slot], where) for slot in rest}

    def _per_edge(self, wanted: list[str], known: dict[str, Tensor], shapes: Any, at: EdgeLayout) -> dict[str, Tensor]:
        """The derivative in O, or those in Y and coef, of which several come from one pass."""
        table, Z = known["table"], known["Z"]
        N, _, F = Z.shape
        L, E, C = _num_parts(at), at.sender.shape[0], int(at.starts[-1])
        K = shapes["coef"][1] if "coef" in shapes else known["coef"].shape[1]
        blocks, tile = _tile(Z, is_lean=False)
        grid = (N, blocks, C if L == 1 else 1)
        of_O = table.new_empty((N, C, F) if "O" in wanted else 0)
        of_Y = table.new_empty(blocks if "Y" in wanted else 0, E, C)
        of_edge = table.new_empty(grid[1] * grid[2] if "coef" in wanted else 0, E, K)
        features = (known.get("coef", table), at.cell, table, known.get("O", Z), known.get("Y", Z), Z)
        arguments = (*features, at.sender, at.row, at.row_start, of_O, of_Y, of_edge, E, F, C)
        options = {"SUMS": "O" in wanted, "DIRECTIONS": "Y" in wanted, "SLOPES": "coef" in wanted}
        _launch(edges.embed, grid, *arguments, L=L, K=K, **options, **tile)
        found = {}
        if "O" in wanted:
            found["O"] = of_O
        if "Y" in wanted:
            found["Y"] = of_Y[0] if blocks == 1 else of_Y.sum(dim=0)
        if "coef" in wanted:
            found["coef"] = sum_by_row(of_edge, at.row, shapes["coef"][0])
        return found


class _Contraction(ContractionForm):
    """Messages of one component whose weights have a factor S for each head besides."""

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at = where
        tensors = dict(zip(known, _ready(*known.values()), strict=True))
        if slot == "S":
            coef, table, q, k = (tensors[name] for name in ("coef", "table", "q", "k"))
            H = shape[1]
            N, F = q.shape
            out = q.new_empty(shape)
            tile = {"EDGES": EDGES, "CHANNELS": triton.next_power_of_2(F // H)}
            arguments = (coef, at.cell, table, q, k, at.sender, at.row, at.row_start, out, F, F // H)
            _launch(edges.contract_edges, (N, H), *arguments, K=coef.shape[1], **tile)
            return out
        S = tensors["S"]
        if slot in ("q", "k"):
            rows, other = (at.row, "k") if slot == "q" else (at.back, "q")
            S = S if slot == "q" else S.index_select(0, at.reverse)
            return _gather(at, rows, tensors["coef"], tensors["table"], tensors[other][:, None], S=S)[0][:, 0]
        q, k = tensors["q"][:, None], tensors["k"][:, None]  # (N, 1, F)
        if slot == "table":
            return _of_table(at, shape, tensors["coef"], q, k, S=S)
        table = tensors["table"]
        _, of_edge = _gather(at, at.row, table, table, k, q, S, sums=False, slopes=True, num_reads=shape[1])
        return sum_by_row(of_edge, at.row, shape[0])


message, embedding, contraction = _Message(), _Embedding(), _Contraction()


class _Mixing(MixingForm):
    """One batched product of matrices over all components, with the matrix of its part for each."""

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: Any) -> Tensor:
        X = known["X" if slot == "O" else "O"]
        if slot == "W":
            each = torch.bmm(known["O"].permute(1, 2, 0), known["X"].transpose(0, 1))  # (C, G, F)
            return torch.mm(_parts(where)(each), each.flatten(1)).unflatten(1, each.shape[1:])
        matrices = known["W"].mT if slot == "O" else known["W"]
        parts = zip(matrices, _sizes(where), strict=True)
        matrices = torch.cat([matrix.expand(size, *matrix.shape) for matrix, size in parts])
        out = X.new_empty(shape)
        torch.bmm(X.transpose(0, 1), matrices, out=out.transpose(0, 1))
        return out


def _sizes(ends: tuple[int, ...]) -> list[int]:
    """Components of each part, from where the parts end."""
    return [last - first for first, last in zip((0, *ends[:-1]), ends, strict=True)]


@functools.cache
def _parts(ends: tuple[int, ...]) -> Constant:
    """Ones where a component belongs to a part, (L, C)."""
    sizes = _sizes(ends)
    return Constant(
        [[float(k == part) for k, size in enumerate(sizes) for _ in range(size)] for part in range(len(sizes))]
    )


mixing = _Mixing()


# ----------------------------------------------------------------------------------------------- atoms and channels


def _on_channels(kernel: Any, X: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel over the atoms and channels of X."""
    size, F = X.shape[0] * X.shape[2], X.shape[2]
    _launch(kernel, (triton.cdiv(size, BLOCK),), *args, size, F, BLOCK=BLOCK, **options)


class _Product(algebra.ProductForm):
    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: bool) -> Tensor:
        left, right = {"O": ("X", "Y"), "X": ("O", "Y"), "Y": ("X", "O")}[slot]
        A, B = _ready(known[left], known[right])
        out = torch.empty_like(A)
        turned = {"X_IS_TURNED": slot == "Y", "Y_IS_TURNED": slot == "X"}
        _on_channels(nodes.matrix_product, A, A, B, out, BOTH=where, **turned)
        return out


matrix_product = _Product()


def _map(kernel: Any, num_results: int = 1, **options: Any) -> Any:
    """The kernel as a function of tensors, the first of which has the shape of the results."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = _ready(*tensors)
        out = tuple(torch.empty_like(tensors[0]) for _ in range(num_results))
        _on_channels(kernel, tensors[0], *tensors, *out, **options)
        return out

    return run


def _norms_value(X: Tensor) -> Tensor:
    (X,) = _ready(X)
    out = X.new_empty(X.shape[0], 3 * X.shape[2])
    _on_channels(nodes.part_norms, X, X, out)
    return out


def _interact_value(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    return _map(nodes.interact, BOTH=both)(Y, M, factor)[0]


def _interact_gradients(
    grad: Tensor, needed: Any, Y: Tensor, M: Tensor, factor: Tensor, both: bool
) -> tuple[Tensor | None, ...]:
    return *_map(nodes.interact_backward, 2, BOTH=both)(Y, M, factor, grad), None, None


def _slope_value(X: Tensor, grad: Tensor) -> Tensor:
    return _map(nodes.normalize_backward)(X, grad)[0]


normalize_slope = algebra.normalize_slope._replace(
    value=_slope_value,
    gradients=lambda grad, needed, X, inner: _map(nodes.normalize_twice, 2)(X, inner, grad),
)
normalize = algebra.normalize._replace(value=lambda X: _map(nodes.normalize)(X)[0])
norms_by_part = algebra.norms_by_part._replace(
    value=_norms_value, gradients=lambda grad, needed, X: _map(nodes.part_norms_backward)(X, grad)
)
interact = algebra.INTERACT._replace(value=_interact_value, gradients=_interact_gradients)
refine = algebra.refine._replace(
    value=lambda X, D, factor: _map(nodes.refine)(X, D, factor)[0],
    gradients=lambda grad, needed, X, D, factor: (grad, *_map(nodes.refine_backward)(D, factor, grad), None),
)
