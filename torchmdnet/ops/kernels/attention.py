"""Attention over neighbours, with derivatives of every order."""

from __future__ import annotations

from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Form
from torchmdnet.ops.kernels.layout import EdgeLayout, array, flat, fold_edges

__all__ = ["CONTRACTION", "ContractionForm", "contract_edges", "contract_receivers"]


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
