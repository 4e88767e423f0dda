"""Sums of neighbours, weighted by radial filters, as a form with derivatives of every order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Form
from torchmdnet.ops.kernels.layout import EdgeLayout, array, as_rows, as_tables, flat, fold_edges

__all__ = ["MESSAGE", "MessageForm", "message_sum"]


class MessageForm(Form):
    r""":math:`M(O, c, T, X) = \sum_{ij} \sum_{kcf} O_{icf}\, c_{ijk} T_{g(ij)+k,l(c),f}\, X_{jcf}`."""

    name = "message"
    slots = ("O", "coef", "table", "X")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at, loops_of = where, loops.message_form
        some = known["X"] if slot == "O" else known["O"]
        work = at.work(some.shape[-1])
        if slot in ("O", "X"):
            out = some.new_empty(shape)
            rows, values = (at.row, known["X"]) if slot == "O" else (at.back, known["O"])
            arrays = (array(known["coef"]), at.cell, flat(known["table"]), flat(values))
            loops_of.message_features(work, *arrays, at.sender, rows, at.row_start, at.starts, as_rows(out))
            return out
        O, X = flat(known["O"]), flat(known["X"])
        if slot == "coef":
            per_edge = some.new_empty(at.sender.shape[0], shape[1])
            arrays = (at.cell, flat(known["table"]), O, X, at.sender, at.row, at.row_start, at.starts)
            loops_of.message_coef(work, *arrays, per_edge.numpy())
            return fold_edges(per_edge, at.row, shape)
        out = some.new_empty(at.groups(shape, work), *shape)
        indices = (at.sender, at.row, at.reverse, at.row_start, at.starts)
        loops_of.message_table(work, array(known["coef"]), at.cell, O, X, *indices, as_tables(out))
        return out.sum(dim=0) if len(out) > 1 else out[0]

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        if not {"X", "coef"} <= set(wanted):
            return super().gradients(wanted, known, shapes, where)
        at, O, X = where, known["O"], known["X"]
        of_X, per_edge = torch.empty_like(O), O.new_empty(at.sender.shape[0], shapes["coef"][1])
        arrays = (array(known["coef"]), at.cell, flat(known["table"]), flat(O), flat(X))
        indices = (at.sender, at.row, at.back, at.row_start, at.starts)
        out = (as_rows(of_X), per_edge.numpy())
        loops.message_form.message_features_and_coef(2 * at.work(X.shape[-1]), *arrays, *indices, *out)
        found = {"X": of_X, "coef": fold_edges(per_edge, at.back, shapes["coef"])}
        rest = [slot for slot in wanted if slot not in found]
        return found | super().gradients(rest, known, shapes, where)


MESSAGE = MessageForm()


def message_sum(X: Tensor, coef: Tensor, table: Tensor, layout: EdgeLayout) -> Tensor:
    """See :func:`torchmdnet.ops.messages.gather_weight_sum`."""
    return MESSAGE("O", tuple(X.shape), layout, coef, table, X)
