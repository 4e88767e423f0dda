"""Embedding of atoms in their neighbourhood, as a form with derivatives of every order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.forms import Form
from torchmdnet.ops.kernels.layout import EdgeLayout, array, as_rows, as_tables, flat, fold_edges

__all__ = ["EMBEDDING", "EmbeddingForm", "embed"]


class EmbeddingForm(Form):
    r"""The form D of :mod:`torchmdnet.ops.messages`.

    .. math:: \sum_{ij} \sum_{kcf} O_{icf} Y_{ijc}\, c_{ijk} T_{g(ij)+k,l(c),f} (Z_{i0f} + Z_{j1f})
    """

    name = "embedding"
    slots = ("O", "Y", "coef", "table", "Z")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: EdgeLayout) -> Tensor:
        at, loops_of = where, loops.embedding_form
        some = known["O"] if slot == "Z" else known["Z"]
        work = at.work(some.shape[-1])
        get = {
            "O": lambda: flat(known["O"]),
            "Y": lambda: array(known["Y"]),
            "coef": lambda: array(known["coef"]),
            "table": lambda: flat(known["table"]),
            "Z": lambda: array(known["Z"]),
        }
        values = [get[name]() for name in ("coef", "table", "O", "Y", "Z") if name != slot]
        values.insert(1 if slot != "coef" else 0, at.cell)
        indices = (at.sender, at.row, at.row_start, at.starts)
        if slot == "coef":
            per_edge = some.new_empty(at.sender.shape[0], shape[1])
            loops_of.embed_coef(work, *values, *indices, per_edge.numpy())
            return fold_edges(per_edge, at.row, shape)
        if slot == "table":
            tables = some.new_empty(at.groups(shape, work), *shape)
            indices = (at.sender, at.row, at.reverse, at.row_start, at.starts)
            loops_of.embed_table(work, *values, *indices, as_tables(tables))
            return tables.sum(dim=0) if len(tables) > 1 else tables[0]
        out = some.new_empty(shape)
        if slot == "O":
            loops_of.embed_features(work, *values, *indices, as_rows(out))
        elif slot == "Y":
            loops_of.embed_direction(work, *values, *indices, out.numpy())
        else:
            indices = (at.sender, at.row, at.back, at.reverse, at.row_start, at.starts)
            loops_of.embed_factor(2 * work, *values, *indices, out.numpy())
        return out

    def gradients(
        self, wanted: list[str], known: dict[str, Tensor], shapes: Any, where: EdgeLayout
    ) -> dict[str, Tensor]:
        if not {"Y", "coef"} <= set(wanted):
            return super().gradients(wanted, known, shapes, where)
        at, O = where, known["O"]
        of_Y, per_edge = O.new_empty(shapes["Y"]), O.new_empty(at.sender.shape[0], shapes["coef"][1])
        arrays = (array(known["coef"]), at.cell, flat(known["table"]), flat(O), array(known["Y"]))
        indices = (array(known["Z"]), at.sender, at.row, at.row_start, at.starts)
        loops.embedding_form.embed_direction_and_coef(
            2 * at.work(O.shape[-1]), *arrays, *indices, of_Y.numpy(), per_edge.numpy()
        )
        found = {"Y": of_Y, "coef": fold_edges(per_edge, at.row, shapes["coef"])}
        rest = [slot for slot in wanted if slot not in found]
        return found | super().gradients(rest, known, shapes, where)


EMBEDDING = EmbeddingForm()


def embed(Y: Tensor, coef: Tensor, table: Tensor, Z: Tensor, layout: EdgeLayout) -> Tensor:
    """See :func:`torchmdnet.ops.messages.embed_edges`."""
    return EMBEDDING("O", (Z.shape[0], Y.shape[1], Z.shape[2]), layout, Y, coef, table, Z)
