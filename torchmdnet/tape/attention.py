"""Steps of transformers: attention over neighbours, and what makes its inputs and takes its outputs.

Layers are those of :mod:`torchmdnet.models.torchmd_t` and, with vectors, :mod:`torchmdnet.models.torchmd_et`: they have
``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and perhaps ``vec_proj``, ``num_heads``, ``head_dim`` and
``attn_activation``.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from torchmdnet.nn.attention import by_part
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import is_plain
from torchmdnet.ops.attention import attend
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.work import lanes_of
from torchmdnet.ops.workspace import Buffer
from torchmdnet.tape.steps import Linear, Plain, pack, packed, unpacked
from torchmdnet.tape.tape import Definitions, Run, Step

__all__ = ["Attention", "Receive", "has_known_heads", "projections", "scalars_of_first"]

#: The parts of a layer's filters that values read, behind that of the keys, by components sent.
_PARTS = {1: [1], 2: [1, 3], 5: [1, 3, 2]}


def has_known_heads(layers: Any, weight: Tensor) -> bool:
    """Whether loops take the heads, of one vector of channels each or of whole blocks, and their activations."""
    lanes = lanes_of(weight.element_size())
    return all(
        (layer.head_dim == lanes or layer.head_dim % (2 * lanes) == 0) and is_plain(layer.attn_activation, nn.SiLU)
        for layer in layers
    )


# ----------------------------------------------------------------------------------------------- what attention reads


class _Projections(Linear):
    """[queries | keys | values | factors of vectors | along directions] of scalars, by one matrix product."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return _projected(self.layer, inputs[0])

    def weights(self, run: Run) -> tuple[Tensor, Tensor]:
        return run.tape.tables.made((self.layer, "projections"), self._stacked)

    def _stacked(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        values = by_part(layer.v_proj.weight.t(), layer.num_heads, layer.head_dim)  # (F, L, F)
        bias = by_part(layer.v_proj.bias[None], layer.num_heads, layer.head_dim)  # (1, L, F)
        weight = torch.cat([layer.q_proj.weight, layer.k_proj.weight, values.flatten(1).t()])
        return weight, torch.cat([layer.q_proj.bias, layer.k_proj.bias, bias.flatten()])


def _projected(layer: Any, h: Tensor) -> Tensor:
    values = by_part(layer.v_proj(h), layer.num_heads, layer.head_dim)
    return torch.cat([layer.q_proj(h), layer.k_proj(h), values.flatten(1)], dim=1)


def projections(layer: Any) -> Step:
    """Queries, keys and values of a layer, one row for each atom, (N, F) -> (N, 3 F) or with vectors (N, 5 F)."""
    linears = (layer.q_proj, layer.k_proj, layer.v_proj)
    if all(is_plain(linear, nn.Linear) for linear in linears):
        return _Projections(layer)
    return Plain(lambda h: _projected(layer, h), *linears)


# ---------------------------------------------------------------------------------------------------------- attention


class Attention(Step):
    r"""What atoms receive: m (N, F), and with directions μ (N, 3, F); see :mod:`torchmdnet.ops.attention`.

    Inputs are what :func:`projections` makes and, if atoms send them, vectors (N, 3, F).

    Args:
        layer: Whose heads and activation.
        function: Filters of keys and values, 2 parts or with directions 4.
        values_fade: Whether the filters of values fade at the cutoff, rather than attention.
    """

    reads_geometry = True
    is_repeatable = True

    def __init__(self, layer: Any, function: RadialFunction, *, values_fade: bool = False) -> None:
        self.layer, self.function, self.values_fade = layer, function, values_fade
        self.num_channels = layer.num_heads * layer.head_dim

    def definition(self, at: Definitions, *inputs: Tensor) -> Any:
        projected, *vectors = inputs
        parts = projected.unflatten(1, (-1, self.num_channels))  # (N, 3 or 5, F)
        sent, directions = parts[:, 2:], None
        if parts.shape[1] == 5:
            v = vectors[0] if vectors else projected.new_zeros(projected.shape[0], 3, self.num_channels)
            sent, directions = torch.cat([parts[:, 2::2], parts[:, 3:4] * v], dim=1), at.directions
        gathered = attend(
            parts[:, 0],
            parts[:, 1],
            sent,
            directions,
            at.radial(self.function),
            at.radial.envelope,
            at.edges,
            num_heads=self.layer.num_heads,
            activation=self.layer.attn_activation,
            vectors_fade=self.values_fade,
        )
        return gathered[:, 0] if directions is None else (gathered[:, 0], gathered[:, 1:])

    def value(self, run: Run, *inputs: Buffer) -> Any:
        tape, at = run.tape, run.tape.geometry
        run.projected, run.v = inputs if len(inputs) == 2 else (inputs[0], None)
        N, F = run.projected.shape[0], self.num_channels
        run.C = 1 if run.projected.shape[1] == 3 * F else 2 if run.v is None else 5
        run.keys, run.filters = tape.tables.kept((self.function, run.C), lambda: self._packed(run))
        run.values_at, (run.fade, run.steep) = at.fading if self.values_fade else at.bare, at.fades(self.values_fade)
        B, *_, block = run.keys.shape
        run.Q, run.K, run.V = tape.empty(B, N, 1, block), tape.empty(B, N, 1, block), tape.empty(B, N, run.C, block)
        packs = (run.Q.array, run.K.array, run.V.array)
        loops.attention_atoms.send(8 * N * F, run.projected.array, self._vectors(run, run.v), *packs)
        run.pieces, work, width, (sender, *where) = self._pieces(run), at.work(F), self._width(run), at.where(run.keys)
        arrays = (at.bare.coef, at.place, run.keys, run.Q.array, run.K.array, sender)
        loops.attention_keys.key_products(work, *arrays, *where, width, run.pieces.array)
        weight, value, rise = (tape.empty(self.layer.num_heads, at.stride) for _ in range(3))
        pieces, found = self._of_heads(run, run.pieces), (weight.array, value.array, rise.array)
        loops.attention_keys.attention(20 * pieces.size, pieces, run.fade, *found)
        out = self._received(run)
        arrays = (run.values_at.coef, at.place, run.filters, weight.array, run.V.array, at.u, sender)
        results = (x.array for x in out)
        loops.attention_values.value_sum(3 * run.filters.shape[2] * work // 2, *arrays, *where, width, *results)
        return out[0] if run.C == 1 else out

    def _packed(self, run: Run) -> tuple[Any, Any]:
        """Filters of keys and values as loops read them."""
        table = run.tape.tables.table(self.function)
        return packed(table[:, :1]), packed(table[:, _PARTS[run.C]])

    def _vectors(self, run: Run, v: Buffer | None) -> np.ndarray:
        return np.empty((0, 3, self.num_channels), run.projected.array.dtype) if v is None else v.array

    def _width(self, run: Run) -> int:
        """Vectors of channels in a head."""
        return self.layer.head_dim // (run.keys.shape[3] // 2)

    def _pieces(self, run: Run) -> Buffer:
        """For products of keys, or gradients in them: of vectors of channels where those are heads, else of blocks."""
        num_blocks = run.keys.shape[0]
        return run.tape.empty(2 * num_blocks if self._width(run) == 1 else num_blocks, run.tape.geometry.stride)

    def _of_heads(self, run: Run, pieces: Buffer) -> np.ndarray:
        """Without those beyond the last channel, of which no head has one."""
        return pieces.array[: self.layer.num_heads] if self._width(run) == 1 else pieces.array

    def _received(self, run: Run) -> tuple[Buffer, Buffer]:
        N, F = run.projected.shape[0], self.num_channels
        return run.tape.empty(N, F), run.tape.empty(0 if run.C == 1 else N, 3, F)

    def _given(self, run: Run, grads: tuple[Buffer, ...]) -> Buffer:
        """Gradients in the outputs, packed."""
        if run.C == 1:
            return pack(run, grads[0])
        (B, *_, block), N = run.keys.shape, run.projected.shape[0]
        out = run.tape.empty(B, N, 4, block)
        loops.blocks.pack_both(out.array.size, grads[0].array, grads[1].array, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        tape, at = run.tape, run.tape.geometry
        (N, L), F, H = run.projected.shape, self.num_channels, self.layer.num_heads
        weight, value, rise = (tape.empty(H, at.stride) for _ in range(3))
        pieces = self._of_heads(run, run.pieces)
        loops.attention_keys.attention(20 * pieces.size, pieces, run.fade, weight.array, value.array, rise.array)
        run.given = self._given(run, grads)
        work, (sender, *where), width, sides = at.work(F), at.where(run.keys), self._width(run), at.shares(run.keys)[0]
        run.of_V, of_projected, of_pieces = tape.empty(N, run.C, F), tape.empty(N, L), self._pieces(run)
        arrays = (*run.values_at, at.place, run.filters, weight.array, run.V.array, at.u, run.given.array)
        results = (run.of_V.array, of_pieces.array, at.gradient(sides, 1 if run.C == 1 else 4))
        blends = 3 * run.filters.shape[2] * work
        loops.attention_values.value_backward(blends, *arrays, sender, at.reverse, *where, width, *results)
        of_products, of_edge, of_heads = weight, at.gradient(sides)[:, :, 0], self._of_heads(run, of_pieces)
        arrays = (of_heads, at.reverse, run.fade, run.steep, value.array, rise.array)
        loops.attention_keys.attention_backward(8 * of_heads.size, *arrays, of_products.array, of_edge[0])
        arrays = (*at.bare, at.place, run.keys, of_products.array, run.Q.array, run.K.array, sender, at.reverse)
        loops.attention_keys.key_backward(3 * work, *arrays, *where, width, of_projected.array, of_edge)
        of_v = None if run.v is None else tape.empty(*run.v.shape)
        arrays = (run.projected.array, self._vectors(run, run.v), run.of_V.array, of_projected.array)
        loops.attention_atoms.send_backward(8 * N * F, *arrays, self._vectors(run, of_v))
        return (of_projected,) if of_v is None else (of_projected, of_v)

    def tangent(self, run: Run, *changes: Buffer | None) -> Any:
        tape, at, F = run.tape, run.tape.geometry, self.num_channels
        run.dprojected = changes[0] or tape.zeros(*run.projected.shape)
        run.dQ, run.dK, run.dV = (tape.empty(*x.shape) for x in (run.Q, run.K, run.V))
        packs, size = (run.dQ.array, run.dK.array, run.dV.array), 8 * run.projected.shape[0] * F
        if run.v is None:
            loops.attention_atoms.send(size, run.dprojected.array, self._vectors(run, None), *packs)
        else:
            run.dv = changes[1] or tape.zeros(*run.v.shape)
            arrays = (run.projected.array, run.dprojected.array, run.v.array, run.dv.array)
            loops.attention_atoms.send_tangent(size, *arrays, *packs)
        run.dcoef, run.dvalues = at.change(at.bare), at.change(run.values_at)
        run.dfade, du = at.change_of_fades(self.values_fade), at.change_of_directions()
        run.dpieces, (sender, *where), width = self._pieces(run), at.where(run.keys), self._width(run)
        arrays = (at.bare.coef, run.dcoef, at.place, run.keys, run.Q.array, run.dQ.array, run.K.array, run.dK.array)
        work = at.work(F)
        loops.attention_keys.key_tangent(2 * work, *arrays, sender, *where, width, run.dpieces.array)
        run.weight, run.dweight = (tape.empty(self.layer.num_heads, at.stride) for _ in range(2))
        pieces, dpieces = self._of_heads(run, run.pieces), self._of_heads(run, run.dpieces)
        found = (run.weight.array, run.dweight.array)
        loops.attention_keys.attention_tangent(30 * pieces.size, pieces, dpieces, run.fade, run.dfade, *found)
        out = self._received(run)
        arrays = (run.values_at.coef, run.dvalues, at.place, run.filters, *found, run.V.array, run.dV.array, at.u, du)
        results = (x.array for x in out)
        loops.attention_values.value_tangent(3 * run.filters.shape[2] * work, *arrays, sender, *where, width, *results)
        return out[0] if run.C == 1 else out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        tape, at, H = run.tape, run.tape.geometry, self.layer.num_heads
        (N, L), F = run.projected.shape, self.num_channels
        work, (sender, *where), width = at.work(F), at.where(run.keys, sums=True), self._width(run)
        ranges, O = at.shares(run.keys, sums=True)[1], self._given(run, grads)
        of_V, of_pieces, of_dpieces = tape.empty(N, run.C, F), self._pieces(run), self._pieces(run)
        of_keys, of_filters = (tape.empty(ranges, *table.shape) for table in (run.keys, run.filters))
        arrays = (run.values_at.coef, run.dvalues, at.place, run.filters, run.weight.array, run.dweight.array)
        arrays = (*arrays, run.V.array, run.dV.array, at.u, at.change_of_directions(), O.array, run.given.array)
        results = (of_V.array, of_pieces.array, of_dpieces.array, of_filters.array)
        blends = 6 * run.filters.shape[2] * work
        loops.attention_values.value_reverse(blends, *arrays, sender, at.reverse, *where, width, *results)
        of_p, of_dp, of_projected = tape.empty(H, at.stride), tape.empty(H, at.stride), tape.empty(N, L)
        arrays = [self._of_heads(run, x) for x in (run.pieces, run.dpieces, of_pieces, of_dpieces)]
        results = (of_p.array, of_dp.array)
        loops.attention_keys.attention_reverse(40 * arrays[0].size, *arrays, at.reverse, run.fade, run.dfade, *results)
        arrays = (at.bare.coef, run.dcoef, at.place, run.keys, *results, run.Q.array, run.dQ.array)
        arrays = (*arrays, run.K.array, run.dK.array, sender, at.reverse)
        loops.attention_keys.key_reverse(6 * work, *arrays, *where, width, of_projected.array, of_keys.array)
        of_v, v = None, run.v
        if v is None:
            arrays = (run.projected.array, self._vectors(run, None), of_V.array, of_projected.array)
            loops.attention_atoms.send_backward(8 * N * F, *arrays, self._vectors(run, None))
        else:
            of_v = tape.empty(*v.shape)
            arrays = (run.projected.array, run.dprojected.array, v.array, run.dv.array, of_V.array)
            loops.attention_atoms.send_reverse(16 * N * F, *arrays, run.of_V.array, of_projected.array, of_v.array)
        table = tape.tables.table(self.function)
        of_table = torch.zeros_like(table)
        of_table[:, :1] = unpacked(of_keys, (*table.shape[:1], 1, F))
        of_table[:, _PARTS[run.C]] = unpacked(of_filters, (*table.shape[:1], run.filters.shape[2], F))
        tape.add(table, of_table)
        return (of_projected,) if of_v is None else (of_projected, of_v)


# ------------------------------------------------------------------------------------------- what becomes of its sums


class Receive(Step):
    """x + (v1 · v2) o2 + o3 and v + v3 o1 + μ, from x, v, μ, [o1 | o2 | o3] (N, 3 F) and [v1 | v2 | v3] (N, 3, 3 F)."""

    is_repeatable = True

    def definition(self, at: Definitions, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, v, mu, o, projected = inputs
        o1, o2, o3 = o.split(x.shape[1], dim=-1)  # (N, F) each
        v1, v2, v3 = projected.split(x.shape[1], dim=-1)  # (N, 3, F) each
        return x + ((v1 * v2).sum(dim=1) * o2 + o3), v + (v3 * o1[:, None] + mu)

    def value(self, run: Run, *inputs: Buffer) -> tuple[Buffer, Buffer]:
        x, v, _, run.o, run.projected = inputs
        out = run.tape.empty(*x.shape), run.tape.empty(*v.shape)
        arrays = [y.array for y in (*inputs, *out)]
        loops.attention_atoms.receive(24 * x.array.size, *arrays)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        (of_x, of_v), o, projected = grads, run.o, run.projected
        of_o, of_projected = run.tape.empty(*o.shape), run.tape.empty(*projected.shape)
        arrays = [y.array for y in (of_x, of_v, o, projected, of_o, of_projected)]
        loops.attention_atoms.receive_backward(40 * of_x.array.size, *arrays)
        return of_x, of_v, of_v, of_o, of_projected

    def tangent(self, run: Run, *changes: Buffer | None) -> tuple[Buffer, Buffer]:
        (N, L), tape = run.o.shape, run.tape
        shapes = ((N, L // 3), (N, 3, L // 3), (N, 3, L // 3), run.o.shape, run.projected.shape)
        dx, dv, dmu, run.do, run.dprojected = (
            x or tape.zeros(*shape) for x, shape in zip(changes, shapes, strict=True)
        )
        out = tape.empty(*dx.shape), tape.empty(*dv.shape)
        arrays = [y.array for y in (dx, dv, dmu, run.o, run.do, run.projected, run.dprojected, *out)]
        loops.attention_atoms.receive_tangent(40 * dx.array.size, *arrays)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        (of_x, of_v), tape = grads, run.tape
        of_o, of_projected = tape.empty(*run.o.shape), tape.empty(*run.projected.shape)
        given = (*grads, *run.slopes, run.o, run.do, run.projected, run.dprojected, of_o, of_projected)
        loops.attention_atoms.receive_reverse(80 * of_x.array.size, *(y.array for y in given))
        return of_x, of_v, of_v, of_o, of_projected


class _ScalarsOfFirst(Linear):
    """See :func:`scalars_of_first`."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return _first(self.layer, inputs[0])

    def weights(self, run: Run) -> tuple[Tensor, Tensor]:
        return run.tape.tables.made((self.layer, "scalars"), self._rows)

    def _rows(self) -> tuple[Tensor, Tensor]:
        o_proj = self.layer.o_proj
        first = 2 * o_proj.in_features
        return o_proj.weight[first:], o_proj.bias[first:]

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        weight = self.layer.vec_proj.weight
        run.tape.add(weight, torch.zeros_like(weight))  # of vectors that are zero
        return super().reverse(run, *grads)


def _first(layer: Any, m: Tensor) -> Tensor:
    v1, v2, _ = layer.vec_proj(m.new_zeros(m.shape[0], 3, m.shape[1])).split(m.shape[1], dim=-1)
    _, o2, o3 = layer.o_proj(m).split(m.shape[1], dim=-1)
    return (v1 * v2).sum(dim=1) * o2 + o3


def scalars_of_first(layer: Any) -> Step:
    """The change of the scalars by a layer into which no vectors come, (N, F), of what it gathers, m."""
    linears = (layer.o_proj, layer.vec_proj)
    if all(is_plain(linear, nn.Linear) for linear in linears):
        return _ScalarsOfFirst(layer)
    return Plain(lambda m: _first(cast(Any, layer), m), *linears)
