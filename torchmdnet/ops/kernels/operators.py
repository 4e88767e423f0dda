"""The operators of :mod:`torchmdnet.ops` in compiled loops, with derivatives of every order."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.ops.kernels.forms import TWINS, Form, Stage
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.ops.kernels.work import WORTH_THREADS, lanes_of
from torchmdnet.tracing import device_kind, is_traced, records_operators

__all__ = [
    "EMBEDDING",
    "MESSAGE",
    "WORTH_THREADS",
    "EdgeLayout",
    "attention_pass_loops",
    "can_loop",
    "can_pass",
    "can_run",
    "edge_loops",
    "edge_network_loops",
    "embed",
    "interact",
    "is_traced",
    "message",
    "mix",
    "network_loops",
    "node_loops",
    "normalize",
    "norms_by_part",
    "product",
    "refine",
    "tensor_edge_loops",
    "vector_edge_loops",
]

#: The release that comes with the oldest PyTorch we run on.
OLDEST_TRITON = (3, 2)

_log = logging.getLogger(__name__)
_HAS_NUMBA = importlib.util.find_spec("numba") is not None and not os.environ.get("TORCHMDNET_PLAIN_OPS")


def can_run(x: Tensor) -> bool:
    """Whether a compiled twin takes these features, channels last; ``TORCHMDNET_PLAIN_OPS=1`` turns them all off.

    Under ``torch.compile``, ``torch.export`` and the transforms of ``torch.func`` the definitions run.
    """
    if device_kind(x) not in TWINS:
        return can_loop(x, x.shape[-1])
    return x.dtype in (torch.float32, torch.float64) and not is_traced() and has_triton()


def can_pass(x: Tensor) -> bool:
    """Whether a compiled twin of an operator along edges takes this tensor, also while operators are recorded."""
    if not records_operators():
        return can_run(x)
    if device_kind(x) in TWINS:
        return x.dtype in (torch.float32, torch.float64) and has_triton()
    return _fits_loops(x, x.shape[-1])


def can_loop(x: Tensor, channels: int, *others: int) -> bool:
    """Whether it is the loops of the CPU that take tensors like this one.

    Args:
        x: Of their precision and on their device.
        channels: Channels of a row, which have to fill a vector.
        others: The same of other rows, such as the hidden layers of a network.
    """
    return _fits_loops(x, channels, *others) and not is_traced()


def _fits_loops(x: Tensor, *channels: int) -> bool:
    return (
        _HAS_NUMBA
        and device_kind(x) == "cpu"
        and "cpu" not in TWINS
        and x.dtype in (torch.float32, torch.float64)
        and min(channels) >= lanes_of(x.element_size())
    )


@functools.cache
def has_triton() -> bool:
    """Whether the twins of other devices can be used; it is said once if they cannot."""
    if os.environ.get("TORCHMDNET_PLAIN_OPS"):
        return False
    try:
        found = importlib.import_module("triton").__version__
    except (ImportError, AttributeError):  # a folder of that name on the path has no version
        found = "none"
    is_recent = found != "none" and tuple(int(number) for number in found.split(".")[:2]) >= OLDEST_TRITON
    if not is_recent:
        oldest = ".".join(map(str, OLDEST_TRITON))
        _log.warning("Triton %s or later is needed on the GPU, found: %s. Plain PyTorch runs, slower.", oldest, found)
    return is_recent


@functools.cache
def edge_loops() -> ModuleType:
    """Loops over edges; Numba is imported when they are first used."""
    from torchmdnet.ops.kernels import edges

    return edges


@functools.cache
def tensor_edge_loops() -> ModuleType:
    """Loops over edges of whole networks of tensors."""
    from torchmdnet.ops.kernels import tensor_edges

    return tensor_edges


@functools.cache
def vector_edge_loops() -> ModuleType:
    """Loops over edges of whole networks of scalars and vectors."""
    from torchmdnet.ops.kernels import vector_edges

    return vector_edges


@functools.cache
def attention_pass_loops() -> ModuleType:
    """Loops of attention along a direction, and of its gradients in weights."""
    from torchmdnet.ops.kernels import attention_passes

    return attention_passes


@functools.cache
def edge_network_loops() -> ModuleType:
    """Loops of networks on edges."""
    from torchmdnet.ops.kernels import edge_network

    return edge_network


@functools.cache
def node_loops() -> ModuleType:
    """Loops over atoms."""
    from torchmdnet.ops.kernels import nodes

    return nodes


@functools.cache
def network_loops() -> ModuleType:
    """Loops that only a whole network needs."""
    from torchmdnet.ops.kernels import network

    return network


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _flat(tensor: Tensor) -> Any:
    """(N, C, F) as an array (N, C F)."""
    return _rows(tensor.detach().contiguous())


def _rows(out: Tensor) -> Any:
    """A contiguous tensor (N, C, F), to be written as an array (N, C F)."""
    return out.view(out.shape[0], out.shape[1] * out.shape[2]).numpy()


def _tables(out: Tensor) -> Any:
    """Contiguous tables (T, R, L, F), to be written as an array (T, R, L F)."""
    return out.view(*out.shape[:2], out.shape[2] * out.shape[3]).numpy()


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


def _fold(per_edge: Tensor, rows: Any, shape: tuple[int, ...]) -> Tensor:
    """Sum edges into the filter rows they use: (E, K) -> (P, K)."""
    out = per_edge.new_zeros(shape)
    edge_loops().fold(_array(per_edge), rows, out.numpy())
    return out


class _Message(Form):
    r""":math:`M(O, c, T, X) = \sum_{ij} \sum_{kcf} O_{icf}\, c_{ijk} T_{g(ij)+k,l(c),f}\, X_{jcf}`."""

    name = "message"
    slots = ("O", "coef", "table", "X")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at, loops = where, edge_loops()
        some = known["X"] if slot == "O" else known["O"]
        work = at.work(some.shape[-1])
        if slot in ("O", "X"):
            out = some.new_empty(shape)
            rows, values = (at.row, known["X"]) if slot == "O" else (at.back, known["O"])
            arrays = (_array(known["coef"]), at.cell, _flat(known["table"]), _flat(values))
            loops.message_sum(work, *arrays, at.sender, rows, at.row_start, at.starts, _rows(out))
            return out
        O, X = _flat(known["O"]), _flat(known["X"])
        if slot == "coef":
            per_edge = some.new_empty(at.sender.shape[0], shape[1])
            arrays = (at.cell, _flat(known["table"]), O, X, at.sender, at.row, at.row_start, at.starts)
            loops.message_coef(work, *arrays, per_edge.numpy())
            return _fold(per_edge, at.row, shape)
        out = some.new_empty(at.groups(shape, work), *shape)
        indices = (at.sender, at.row, at.reverse, at.row_start, at.starts)
        loops.message_table(work, _array(known["coef"]), at.cell, O, X, *indices, _tables(out))
        return out.sum(dim=0) if len(out) > 1 else out[0]

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        if not {"X", "coef"} <= set(wanted):
            return super().gradients(wanted, known, shapes, where)
        at, O, X = where, known["O"], known["X"]
        of_X, per_edge = torch.empty_like(O), O.new_empty(at.sender.shape[0], shapes["coef"][1])
        arrays = (_array(known["coef"]), at.cell, _flat(known["table"]), _flat(O), _flat(X))
        indices = (at.sender, at.row, at.back, at.row_start, at.starts)
        out = (_rows(of_X), per_edge.numpy())
        edge_loops().message_both(2 * at.work(X.shape[-1]), *arrays, *indices, *out)
        found = {"X": of_X, "coef": _fold(per_edge, at.back, shapes["coef"])}
        rest = [slot for slot in wanted if slot not in found]
        return found | super().gradients(rest, known, shapes, where)


class _Embedding(Form):
    r"""The form D of :mod:`torchmdnet.ops.messages`.

    .. math:: \sum_{ij} \sum_{kcf} O_{icf} Y_{ijc}\, c_{ijk} T_{g(ij)+k,l(c),f} (Z_{i0f} + Z_{j1f})
    """

    name = "embedding"
    slots = ("O", "Y", "coef", "table", "Z")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at, loops = where, edge_loops()
        some = known["O"] if slot == "Z" else known["Z"]
        work = at.work(some.shape[-1])
        get = {
            "O": lambda: _flat(known["O"]),
            "Y": lambda: _array(known["Y"]),
            "coef": lambda: _array(known["coef"]),
            "table": lambda: _flat(known["table"]),
            "Z": lambda: _array(known["Z"]),
        }
        values = [get[name]() for name in ("coef", "table", "O", "Y", "Z") if name != slot]
        values.insert(1 if slot != "coef" else 0, at.cell)
        indices = (at.sender, at.row, at.row_start, at.starts)
        if slot == "coef":
            per_edge = some.new_empty(at.sender.shape[0], shape[1])
            loops.embed_coef(work, *values, *indices, per_edge.numpy())
            return _fold(per_edge, at.row, shape)
        if slot == "table":
            tables = some.new_empty(at.groups(shape, work), *shape)
            indices = (at.sender, at.row, at.reverse, at.row_start, at.starts)
            loops.embed_table(work, *values, *indices, _tables(tables))
            return tables.sum(dim=0) if len(tables) > 1 else tables[0]
        out = some.new_empty(shape)
        if slot == "O":
            loops.embed_sum(work, *values, *indices, _rows(out))
        elif slot == "Y":
            loops.embed_direction(work, *values, *indices, out.numpy())
        else:
            indices = (at.sender, at.row, at.back, at.reverse, at.row_start, at.starts)
            loops.embed_factor(2 * work, *values, *indices, out.numpy())
        return out

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        if not {"Y", "coef"} <= set(wanted):
            return super().gradients(wanted, known, shapes, where)
        at, O = where, known["O"]
        of_Y, per_edge = O.new_empty(shapes["Y"]), O.new_empty(at.sender.shape[0], shapes["coef"][1])
        arrays = (_array(known["coef"]), at.cell, _flat(known["table"]), _flat(O), _array(known["Y"]))
        indices = (_array(known["Z"]), at.sender, at.row, at.row_start, at.starts)
        edge_loops().embed_both(2 * at.work(O.shape[-1]), *arrays, *indices, of_Y.numpy(), per_edge.numpy())
        found = {"Y": of_Y, "coef": _fold(per_edge, at.row, shapes["coef"])}
        rest = [slot for slot in wanted if slot not in found]
        return found | super().gradients(rest, known, shapes, where)


class _Mixing(Form):
    r""":math:`B(O, W, X) = \sum_{n c f g} O_{ncf} W_{l(c) f g} X_{ncg}`, one matrix for each part.

    ``where`` holds the ends of the parts.
    """

    name = "mixing"
    slots = ("O", "W", "X")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: Any) -> Tensor:
        some = known["X"] if slot == "O" else known["O"]
        out = some.new_empty(shape)
        first = 0
        for part, last in enumerate(where):
            size = last - first
            if slot == "W":
                left, right = (known[name][:, first:last].transpose(0, 1) for name in ("O", "X"))
                torch.sum(torch.bmm(left.transpose(1, 2), right), dim=0, out=out[part])
            else:
                W = known["W"][part]
                matrix = W.t() if slot == "O" else W
                values = known["X" if slot == "O" else "O"][:, first:last].transpose(0, 1)  # (C, N, F)
                target = out[:, first:last].transpose(0, 1)
                torch.bmm(values, matrix.expand(size, *matrix.shape), out=target)
            first = last
        return out


MESSAGE, EMBEDDING, MIXING = _Message(), _Embedding(), _Mixing()


def message(X: Tensor, coef: Tensor, table: Tensor, layout: EdgeLayout) -> Tensor:
    """See :func:`torchmdnet.ops.messages.gather_weight_sum`."""
    return MESSAGE("O", tuple(X.shape), layout, coef, table, X)


def embed(Y: Tensor, coef: Tensor, table: Tensor, Z: Tensor, layout: EdgeLayout) -> Tensor:
    """See :func:`torchmdnet.ops.messages.embed_edges`."""
    return EMBEDDING("O", (Z.shape[0], Y.shape[1], Z.shape[2]), layout, Y, coef, table, Z)


def mix(X: Tensor, W: Tensor, ends: tuple[int, ...]) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.mix_channels`."""
    return MIXING("O", (X.shape[0], X.shape[1], W.shape[1]), ends, W, X)


class _Product(Form):
    """⟨O, X Y⟩, or ⟨O, X Y + Y X⟩ where ``both``: the gradient of a product has the other argument transposed."""

    name = "matrix_product"
    slots = ("O", "X", "Y")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: bool) -> Tensor:
        left, right, turned_left, turned_right = {
            "O": ("X", "Y", False, False),
            "X": ("O", "Y", False, True),
            "Y": ("X", "O", True, False),
        }[slot]
        out = known[left].new_empty(shape)
        signs = [-1.0 if turned else 1.0 for turned in (turned_left, turned_right)]
        arrays = (_array(known[left]), _array(known[right]))
        node_loops().matrix_product(16 * out.numel(), *arrays, *signs, where, out.numpy())
        return out


_PRODUCT = _Product()


def product(X: Tensor, Y: Tensor, *, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.matrix_product` and, with ``both``, ``anticommutator``."""
    return _PRODUCT("O", tuple(X.shape), both, X, Y)


def _normalize_definition(X: Tensor) -> Tensor:
    return X / (X.square().sum(dim=1, keepdim=True) + 1)


def _normalize_value(X: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    node_loops().normalize(8 * X.numel(), _array(X), out.numpy())
    return out


def _normalize_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor) -> tuple[Tensor | None, ...]:
    return (_normalize_slope(X, grad),)


#: See :func:`torchmdnet.ops.irreps.normalize`.
normalize = Stage("normalize", _normalize_definition, _normalize_value, _normalize_gradients, is_differentiable=True)


def _slope_definition(X: Tensor, grad: Tensor) -> Tensor:
    share = 1 / (X.square().sum(dim=1, keepdim=True) + 1)
    return share * grad - 2 * share.square() * (grad * X).sum(dim=1, keepdim=True) * X


def _slope_value(X: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    node_loops().normalize_backward(8 * X.numel(), _array(X), _array(grad), out.numpy())
    return out


def _slope_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor, inner: Tensor) -> tuple[Tensor | None, ...]:
    of_X, of_inner = torch.empty_like(grad), torch.empty_like(grad)
    arrays = (_array(X), _array(inner), _array(grad))
    node_loops().normalize_twice(16 * X.numel(), *arrays, of_X.numpy(), of_inner.numpy())
    return of_X, of_inner


#: The gradient of :data:`normalize`, which training with forces differentiates again.
_normalize_slope = Stage("normalize_slope", _slope_definition, _slope_value, _slope_gradients)


def _norms_definition(X: Tensor) -> Tensor:
    square = X.square()
    return torch.cat([square[:, 0], square[:, 1:4].sum(dim=1), square[:, 4:9].sum(dim=1)], dim=-1)


def _norms_value(X: Tensor) -> Tensor:
    out = X.new_empty(X.shape[0], 3 * X.shape[2])
    node_loops().part_norms(2 * X.numel(), _array(X), out.numpy())
    return out


def _norms_gradients(grad: Tensor, needed: tuple[bool, ...], X: Tensor) -> tuple[Tensor | None, ...]:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    node_loops().part_norms_backward(2 * X.numel(), _array(X), _array(grad), out.numpy())
    return (out,)


#: See :func:`torchmdnet.ops.irreps.norms_by_part`.
norms_by_part = Stage("norms_by_part", _norms_definition, _norms_value, _norms_gradients)


def _interact_definition(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    P = product(Y, M, both=both)
    return normalize((factor if both else 2 * factor)[:, None, None] * P)


def _interact_value(Y: Tensor, M: Tensor, factor: Tensor, both: bool) -> Tensor:
    out = torch.empty_like(Y, memory_format=torch.contiguous_format)
    node_loops().interact(16 * Y.numel(), _array(Y), _array(M), _array(factor), both, out.numpy())
    return out


def _interact_gradients(
    grad: Tensor, needed: tuple[bool, ...], Y: Tensor, M: Tensor, factor: Tensor, both: bool
) -> tuple[Tensor | None, ...]:
    of_Y, of_M = torch.empty_like(grad), torch.empty_like(grad)
    arrays = (_array(Y), _array(M), _array(factor), both, _array(grad))
    node_loops().interact_backward(48 * Y.numel(), *arrays, of_Y.numpy(), of_M.numpy())
    return of_Y, of_M, None, None


_interact = Stage("interact", _interact_definition, _interact_value, _interact_gradients)


def interact(Y: Tensor, M: Tensor, factor: Tensor, *, both: bool) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.interact`."""
    return _interact(Y, M, factor, both)


def _refine_definition(X: Tensor, D: Tensor, factor: Tensor) -> Tensor:
    return X + D + factor[:, None, None] * product(D, D, both=False)


def _refine_value(X: Tensor, D: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(X, memory_format=torch.contiguous_format)
    node_loops().refine(16 * X.numel(), _array(X), _array(D), _array(factor), out.numpy())
    return out


def _refine_gradients(
    grad: Tensor, needed: tuple[bool, ...], X: Tensor, D: Tensor, factor: Tensor
) -> tuple[Tensor | None, ...]:
    of_D = torch.empty_like(grad)
    node_loops().refine_backward(16 * X.numel(), _array(D), _array(factor), _array(grad), of_D.numpy())
    return grad, of_D, None


#: See :func:`torchmdnet.ops.irreps.refine`.
refine = Stage("refine", _refine_definition, _refine_value, _refine_gradients)
