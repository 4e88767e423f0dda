"""Attention over neighbours, with derivatives of every order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Form
from torchmdnet.ops.kernels.layout import EdgeLayout, array, flat, fold_edges
from torchmdnet.ops.kernels.support import has_cpu_loops
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.ops.kernels.work import WORTH_THREADS, lanes_of

__all__ = [
    "CONTRACTION",
    "AttentionLayout",
    "ContractionForm",
    "attend_gradients",
    "attend_value",
    "contract_edges",
    "contract_receivers",
    "is_fused",
]


class ContractionForm(Form):
    r""":math:`\sum_{ij} \sum_h S_{ijh} \sum_{d \in h} q_{id} k_{jd} \sum_n c_{ijn} T_{g(ij)+n,d}`."""

    name = "contraction"
    slots = ("S", "q", "k", "coef", "table")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at, loops_of = where, loops.attention_form
        some = known["k"] if slot != "k" else known["q"]
        work = 8 * at.sender.shape[0] * some.shape[-1]
        out = some.new_empty(at.groups(shape, work), *shape) if slot == "table" else some.new_empty(shape)
        arrays = {name: flat(tensor) if name == "table" else array(tensor) for name, tensor in known.items()}
        if slot == "S":
            values = (arrays["coef"], at.cell, arrays["table"], arrays["q"], arrays["k"])
            loops_of.contract_edges(work, *values, at.sender, at.row, at.row_start, out.numpy())
        elif slot == "q":
            values = (arrays["coef"], at.cell, arrays["table"], arrays["S"], arrays["k"])
            loops_of.contract_receivers(work, *values, at.sender, at.row, at.row_start, out.numpy())
        elif slot == "k":  # the edges of opposite direction
            values = (arrays["coef"], at.cell, arrays["table"], arrays["S"][at.reverse], arrays["q"])
            loops_of.contract_receivers(work, *values, at.sender, at.back, at.row_start, out.numpy())
        elif slot == "coef":
            per_edge = some.new_empty(at.sender.shape[0], shape[1])
            values = (at.cell, arrays["table"], arrays["S"], arrays["q"], arrays["k"])
            loops_of.contract_coef(work, *values, at.sender, at.row, at.row_start, per_edge.numpy())
            return fold_edges(per_edge, at.row, shape)
        else:
            values = (arrays["coef"], at.cell, arrays["S"], arrays["q"], arrays["k"])
            loops_of.contract_table(work, *values, at.sender, at.row, at.row_start, out.flatten(2).numpy())
            return out.sum(dim=0)
        return out


CONTRACTION = ContractionForm()


def contract_edges(q: Tensor, k: Tensor, coef: Tensor, table: Tensor, layout: EdgeLayout, num_heads: int) -> Tensor:
    """See :func:`torchmdnet.ops.attention.contract_edges`."""
    return CONTRACTION("S", (layout.sender.shape[0], num_heads), layout, q, k, coef, table)


def contract_receivers(S: Tensor, k: Tensor, coef: Tensor, table: Tensor, layout: EdgeLayout) -> Tensor:
    """See :func:`torchmdnet.ops.attention.contract_receivers`."""
    return CONTRACTION("q", tuple(k.shape), layout, S, k, coef, table)


def is_fused(q: Tensor, num_heads: int) -> bool:
    """Whether the channels of a head are whole vectors, as :func:`attend_value` wants them on the CPU."""
    return has_cpu_loops(q, q.shape[1]) and q.shape[1] % (lanes_of(q.element_size()) * num_heads) == 0


class AttentionLayout(NamedTuple):
    """What the loops have to know besides tensors."""

    edges: EdgeLayout
    num_heads: int
    vectors_fade: bool


def _tensors(q: Tensor, k: Tensor, X: Tensor, u: Tensor, coef: Tensor, fade: Tensor, table: Tensor) -> tuple[Any, ...]:
    return array(coef), array(fade), flat(table), array(q), array(k), flat(X), array(u)


def _num_ranges(work: int) -> int:
    """Ranges of atoms for threads to share; a few more than threads, as atoms differ."""
    threads = cores.count()
    return 4 * threads if threads > 1 and work >= WORTH_THREADS else 1


def attend_value(
    q: Tensor, k: Tensor, X: Tensor, u: Tensor, coef: Tensor, fade: Tensor, table: Tensor, where: AttentionLayout
) -> Tensor:
    """Scalars and, where there are vectors, their three components: (N, 1, F) or (N, 4, F)."""
    at, num_heads, vectors_fade = where
    out = q.new_empty(q.shape[0], table.shape[1] if table.shape[1] == 4 else 1, q.shape[1])
    c, C, t, *features = _tensors(q, k, X, u, coef, fade, table)
    work = 12 * at.sender.shape[0] * q.shape[1] * table.shape[1]
    indices = (at.sender, at.row, at.reverse, at.row_start, num_heads, vectors_fade, _num_ranges(work))
    loops.attention_form.attend(work, c, at.cell, t, C, *features, *indices, out.flatten(1).numpy())
    return out


def attend_gradients(
    grad: Tensor,
    q: Tensor, k: Tensor, X: Tensor, u: Tensor, coef: Tensor, fade: Tensor, table: Tensor, where: AttentionLayout,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients in q, k, X, u, coef and fade."""
    at, num_heads, vectors_fade = where
    of_q, of_k, of_X = torch.empty_like(grad[:, 0]), torch.empty_like(grad[:, 0]), grad.new_empty(X.shape)
    of_u, of_edge = grad.new_zeros(u.shape), grad.new_empty(at.sender.shape[0], coef.shape[1] + 1)
    c, C, t, *features = _tensors(q, k, X, u, coef, fade, table)
    work = 36 * at.sender.shape[0] * q.shape[1] * table.shape[1]
    indices = (at.sender, at.row, at.reverse, at.row_start, num_heads, vectors_fade, _num_ranges(work))
    out = (of_q.numpy(), of_k.numpy(), of_X.flatten(1).numpy(), of_u.numpy(), of_edge.numpy())
    loops.attention_form.attend_backward(work, c, at.cell, t, C, *features, flat(grad), *indices, *out)
    of_pair = fold_edges(of_edge, at.row, (coef.shape[0], of_edge.shape[1]))
    return of_q, of_k, of_X, of_u, of_pair[:, :-1], of_pair[:, -1]
