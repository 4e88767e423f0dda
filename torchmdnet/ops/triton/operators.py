"""The forms and stages of :mod:`torchmdnet.ops.kernels`, evaluated by Triton's kernels.

Nothing here waits for the device or depends on the values of a tensor, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

from torchmdnet.ops.kernels import EdgeLayout, algebra
from torchmdnet.ops.kernels.attention import ContractionForm
from torchmdnet.ops.kernels.embedding import EmbeddingForm
from torchmdnet.ops.kernels.message import MessageForm
from torchmdnet.ops.kernels.mixing import MixingForm
from torchmdnet.ops.triton import edges, nodes

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


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **options: Any) -> None:
    """Run a kernel on the device of its tensors, if there is anything to do."""
    if all(grid):
        some = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(some):
            kernel[grid](*args, num_warps=num_warps, **options)


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


def _fold(per_edge: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sum what several programs found for an edge, and edges into the filter rows they use: (B, E, K) -> (P, K)."""
    of_edge = per_edge[0] if len(per_edge) == 1 else per_edge.sum(dim=0)
    return of_edge.new_zeros(num_rows, of_edge.shape[1]).index_add_(0, rows, of_edge)


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
) -> tuple[Tensor, Tensor]:
    """See :func:`torchmdnet.ops.triton.edges.message`: (N, C, F) and (B, E, K), empty where it is not asked for."""
    N, C, F = there.shape
    L, K, E = _num_parts(at), num_reads or coef.shape[1], at.sender.shape[0]
    blocks, tile = _tile(there, is_lean=not slopes)
    grid = (N, blocks, C if L == 1 else 1)
    out = torch.empty_like(there) if sums else there.new_empty(0)
    out_edge = there.new_empty(grid[1] * grid[2] if slopes else 0, E, K)
    features = (there if here is None else here, there, there if S is None else S)
    heads = {"D": 0 if S is None else F // S.shape[1]}
    arguments = (coef, at.cell, table, *features, at.sender, rows, at.row_start, out, out_edge, E, F, C)
    _launch(edges.message, grid, *arguments, L=L, K=K, SUMS=sums, SLOPES=slopes, **heads, **tile)
    return out, out_edge


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
    G = R - K + 1  # cells
    size = max(ITEM_SIZE, E // ITEMS)
    cells = at.cell.index_select(0, at.row)
    ordered, order = torch.sort(cells, stable=True)
    edge_start = torch.searchsorted(ordered, torch.arange(G + 1, device=ordered.device))  # (G + 1,)
    num_items = (edge_start.diff() + (size - 1)) // size
    item_start = torch.cat([num_items.new_zeros(1), num_items.cumsum(0)])
    count = G + E // size  # at most
    every = torch.arange(count, device=ordered.device)
    item_cell = torch.searchsorted(item_start, every, right=True).sub_(1).clamp_(max=G - 1)

    width = min(triton.next_power_of_2(F), WIDTH // O.element_size() // 2)
    items = O.new_empty(count, K, L, F)
    receiver = torch.searchsorted(at.row_start, torch.arange(E, device=ordered.device), right=True).sub_(1)
    options = {"D": 0 if S is None else F // S.shape[1], "ROWS": triton.next_power_of_2(K), "CHANNELS": width}
    arguments = (order, receiver, at.sender, at.row, item_cell, item_start, edge_start, items, F, size)
    grid = (count, triton.cdiv(F, width))
    features = (coef, O, X, Y, Z, S)
    _launch(edges.table_items, grid, *features, *arguments, C=C, L=L, K=K, **options, num_warps=1)
    out = O.new_empty(shape)
    _launch(edges.table_sum, (R, triton.cdiv(L * F, BLOCK)), items, item_start, out, G, L * F, K=K, BLOCK=BLOCK)
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
        return _fold(of_edge, at.row, shape[0])

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if {"X", "coef"} <= set(wanted):
            tensors = _ready(known["coef"], known["table"], known["O"], known["X"])
            found["X"], of_edge = _gather(where, where.back, *tensors, slopes=True)
            found["coef"] = _fold(of_edge, where.back, shapes["coef"][0])
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
            found["coef"] = _fold(of_edge, at.row, shapes["coef"][0])
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
        return _fold(of_edge, at.row, shape[0])


message, embedding, contraction = _Message(), _Embedding(), _Contraction()
#: Batched matrix products, which PyTorch does on every device.
mixing = MixingForm()


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
