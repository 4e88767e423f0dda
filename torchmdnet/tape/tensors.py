"""Steps of networks of tensors, features X (N, 9, F) of 1 + 3 + 5 components; see :mod:`torchmdnet.ops.irreps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmdnet.nn.filters import RadialFunction
from torchmdnet.ops.calls import repeatable
from torchmdnet.ops.irreps import (
    PARTS,
    harmonics,
    interact,
    mix_channels,
    normalize,
    norms_by_part,
    refine,
    scale_parts,
    squared_norm,
)
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.messages import embed_edges, gather_weight_sum
from torchmdnet.ops.workspace import Buffer
from torchmdnet.tape.steps import pack, packed, unpacked
from torchmdnet.tape.tape import Definitions, Run, Step

__all__ = [
    "EmbedEdges",
    "Interact",
    "Mix",
    "Normalize",
    "Part",
    "PartNorms",
    "Refine",
    "ScaleParts",
    "SquaredNorm",
    "TensorMessage",
]


class EmbedEdges(Step):
    r"""X_i = Σ_j Y_ij ⊙ w(r_ij) ⊙ (Z_i0 + Z_j1) with the components Y of directions, (N, 2, F) -> (N, 9, F).

    Args:
        function: The radial weights w of the three parts, (P, 3, F).
        handedness: Sign of the antisymmetric components.
    """

    reads_geometry = True
    is_repeatable = True

    def __init__(self, function: RadialFunction, handedness: float) -> None:
        self.function, self.handedness = function, handedness

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        r = at.graph.edge_dist[:, None]
        direction = at.graph.edge_vec / torch.where(r == 0, 1.0, r)  # (E, 3), zero for self loops
        Y = harmonics(direction, handedness=self.handedness)  # (E, 9)
        return embed_edges(Y, at.radial(self.function), inputs[0], at.edges)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        at, tables, (N, _, F) = run.tape.geometry, run.tape.tables, inputs[0].shape
        run.table = tables.kept((self.function, "packed"), lambda: packed(tables.table(self.function)))
        run.Z, run.width, out, there = pack(run, inputs[0]), F, run.tape.empty(N, 9, F), at.by_receiver
        arrays = (there.coef, there.place, run.table, at.Y, run.Z.array)
        where = there.where(at.shares(run.table))
        loops.embedding.embed_sum(at.work(F, 1, 15), *arrays, *where, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[None]:
        at, F = run.tape.geometry, grads[0].shape[2]
        there, shares = at.by_receiver, at.shares(run.table)
        run.given = pack(run, grads[0])
        arrays = (there.coef, there.slope, there.place, run.table, run.given.array, at.Y, run.Z.array)
        out = at.gradient_of_directions(shares[0]), at.gradient_of_edges(shares[0], by_sender=False)
        loops.embedding.embed_backward(at.work(F, 2, 24), *arrays, *there.where(shares), *out)
        return (None,)  # factors do not depend on the geometry

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer:
        assert changes[0] is None, "factors of elements do not depend on the geometry"
        at, F = run.tape.geometry, run.width
        there, out = at.by_receiver, run.tape.empty(at.num_atoms, 9, F)
        arrays = (there.coef, there.dcoef, there.place, run.table, at.Y, at.dY, run.Z.array)
        where = there.where(at.shares(run.table))
        loops.embedding.embed_tangent(at.work(F, 2, 30), *arrays, *where, out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        at, tape, F = run.tape.geometry, run.tape, grads[0].shape[2]
        there, shares = at.by_receiver, at.shares(run.table, sums=True)
        table, Z, O = tape.empty(shares[1], *run.table.shape), tape.empty(shares[1], *run.Z.shape), pack(run, grads[0])
        arrays = (there.coef, there.dcoef, there.place, run.table, O.array, run.given.array, at.Y, at.dY, run.Z.array)
        loops.embedding.embed_reverse(at.work(F, 4, 50), *arrays, *there.where(shares), table.array, Z.array)
        of_table = tape.tables.table(self.function)
        tape.add(of_table, unpacked(table, of_table.shape))
        return (Buffer(unpacked(Z, (0, 2, F))),)


class TensorMessage(Step):
    r"""M_i = Σ_j w(r_ij) ⊙ Y_j with a weight for each part, (N, 9, F) -> (N, 9, F).

    Args:
        function: The radial weights w of the three parts, (P, 3, F).
    """

    reads_geometry = True
    is_repeatable = True

    def __init__(self, function: RadialFunction) -> None:
        self.function = function

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return gather_weight_sum(inputs[0], at.radial(self.function), at.edges)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        at, tables, (N, _, F) = run.tape.geometry, run.tape.tables, inputs[0].shape
        run.table = tables.kept((self.function, "packed"), lambda: packed(tables.table(self.function)))
        (run.Y,), there, out = inputs, at.by_receiver, run.tape.empty(N, 9, F)
        Y = pack(run, run.Y)
        arrays = (there.coef, there.place, run.table, Y.array)
        where = there.where(at.shares(run.table))
        loops.message.message_sum(at.work(F, 1, 9), *arrays, *where, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        at, (run.given,), out = run.tape.geometry, grads, run.tape.empty(*grads[0].shape)
        back, shares = at.by_sender, at.shares(run.table)
        O, Y = pack(run, run.given), pack(run, run.Y)
        arrays = (back.coef, back.slope, back.place, run.table, O.array, Y.array)
        edges, work = at.gradient_of_edges(shares[0], by_sender=True), at.work(grads[0].shape[2], 2, 21)
        loops.message.message_backward(work, *arrays, *back.where(shares), out.array, edges)
        return (out,)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer:
        (run.dx,) = changes
        if run.dx is None:
            run.dx = run.tape.zeros(*run.Y.shape)
        return self._changed(run, run.tape.geometry.by_receiver, pack(run, run.Y), pack(run, run.dx))

    def _changed(self, run: Run, order: Any, X: Buffer, dX: Buffer) -> Buffer:
        """Σ_j w dX_j + dw X_j in an order of the edges."""
        at, out = run.tape.geometry, run.tape.empty(*run.Y.shape)
        arrays = (order.coef, order.dcoef, order.place, run.table, X.array, dX.array)
        work, where = at.work(run.Y.shape[2], 2, 18), order.where(at.shares(run.table))
        loops.message.message_tangent(work, *arrays, *where, out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        at, tape = run.tape.geometry, run.tape
        there, shares = at.by_receiver, at.shares(run.table, sums=True)
        O, dO = pack(run, grads[0]), pack(run, run.given)
        found = self._changed(run, at.by_sender, dO, O)
        table, Y, dY = tape.empty(shares[1], *run.table.shape), pack(run, run.Y), pack(run, run.dx)
        arrays = (there.coef, there.dcoef, there.place, O.array, dO.array, Y.array, dY.array)
        loops.message.message_reverse(at.work(run.Y.shape[2], 2, 27), *arrays, *there.where(shares), table.array)
        of_table = tape.tables.table(self.function)
        tape.add(of_table, unpacked(table, of_table.shape))
        return (found,)


class Mix(Step):
    """Y = W X with a matrix for each part, (N, 9, F) -> (N, 9, G).

    Args:
        owner: Whose weights they are, for what is kept of them.
        weights: Three matrices, (G, F).
    """

    is_repeatable = True

    def __init__(self, owner: Any, weights: Sequence[Tensor]) -> None:
        self.owner, self.weights = owner, weights

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return mix_channels(inputs[0], self.weights)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.matrices = run.tape.tables.kept(self.owner, lambda: _Matrices(torch.stack(list(self.weights)).detach()))
        if run.tape.keeps:
            (run.x,) = inputs
        return self._multiplied(run, inputs[0], 0)

    def _multiplied(self, run: Run, X: Buffer, way: int) -> Buffer:
        out = run.tape.empty(*X.shape[:2], run.matrices.widths[way])
        run.matrices.multiply(X.array, way, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return (self._multiplied(run, grads[0], 1),)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        return None if run.dx is None else self._multiplied(run, run.dx, 0)

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        terms = [(grads[0], run.x)] + ([] if run.dx is None else [(run.slopes[0], run.dx)])
        pairs = [(left.tensor.transpose(0, 1), right.tensor.transpose(0, 1)) for left, right in terms]  # (9, N, F)
        each = torch.bmm(pairs[0][0].transpose(1, 2), pairs[0][1])  # (9, G, F)
        for left, right in pairs[1:]:
            each = torch.baddbmm(each, left.transpose(1, 2), right)
        for weight, part in zip(self.weights, each.split(PARTS), strict=True):
            run.tape.add(weight, part.sum(dim=0))
        return (self._multiplied(run, grads[0], 1),)


class _Matrices:
    """Matrices of the three parts, (3, G, F), as loops read them."""

    def __init__(self, weights: Tensor) -> None:
        self.weights, self.packed = weights, None
        self.widths = weights.shape[1], weights.shape[2]
        if loops.mixing.can_pack(min(self.widths), weights.element_size()):
            array = weights.numpy()
            self.packed = loops.mixing.pack(array, turned=True), loops.mixing.pack(array, turned=False)

    def multiply(self, X: np.ndarray, way: int, out: np.ndarray) -> None:
        """By the matrices, or with way 1 by their transposes."""
        if self.packed is not None:
            loops.mixing.mix(X.size * out.shape[2], X, self.packed[way], out)
            return
        weights = self.weights if way else self.weights.transpose(1, 2)
        parts = (torch.from_numpy(x).split(PARTS, dim=1) for x in (X, out))
        for x, y, weight in zip(*parts, weights, strict=True):  # few channels
            repeatable(torch.matmul, x, weight, out=y)


class Normalize(Step):
    """Y = X / (|X|² + 1), channel by channel. Its Jacobian is symmetric."""

    is_repeatable = True

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return normalize(inputs[0])

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (run.x,), out = inputs, run.tape.empty(*inputs[0].shape)
        loops.algebra.normalize(8 * run.x.array.size, run.x.array, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return (self._along(run, grads[0]),)

    def _along(self, run: Run, change: Buffer) -> Buffer:
        out = run.tape.empty(*run.x.shape)
        loops.algebra.normalize_backward(8 * run.x.array.size, run.x.array, change.array, out.array)
        return out

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        return None if run.dx is None else self._along(run, run.dx)

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        if run.dx is None:
            return (self._along(run, grads[0]),)
        out, x = run.tape.empty(*run.x.shape), run.x.array
        arrays = (x, run.dx.array, grads[0].array, run.slopes[0].array)
        loops.algebra.normalize_reverse(16 * x.size, *arrays, out.array)
        return (out,)


class Interact(Step):
    r"""P / (|P|² + 1) of P = κ (Y M + M Y), or without ``both`` P = 2 Y M, from Y and M.

    Args:
        factor: κ of each atom, (N,).
        both: Whether both orders of the product are added.
    """

    is_repeatable = True

    def __init__(self, factor: Tensor, *, both: bool) -> None:
        self.factor, self.both = factor, both

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        factor = self.factor if self.both else torch.ones_like(self.factor)
        return interact(inputs[0], inputs[1], factor, both=self.both)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.Y, run.M = inputs
        factor = self.factor if self.both else torch.ones_like(self.factor)
        run.factor = factor.detach().contiguous().numpy()
        out, size = run.tape.empty(*run.Y.shape), run.Y.array.size
        loops.algebra.interact(16 * size, run.Y.array, run.M.array, run.factor, self.both, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        of_Y, of_M, size = run.tape.empty(*run.Y.shape), run.tape.empty(*run.Y.shape), run.Y.array.size
        arrays = (run.Y.array, run.M.array, run.factor, self.both, grads[0].array)
        loops.algebra.interact_backward(48 * size, *arrays, of_Y.array, of_M.array)
        return of_Y, of_M

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        run.dx = None
        if all(change is None for change in changes):
            return None
        run.dx = [run.tape.zeros(*run.Y.shape) if change is None else change for change in changes]
        out, size, (dY, dM) = run.tape.empty(*run.Y.shape), run.Y.array.size, run.dx
        arrays = (run.Y.array, run.M.array, dY.array, dM.array, run.factor, self.both)
        loops.algebra.interact_tangent(32 * size, *arrays, out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        if run.dx is None:
            return self.backward(run, *grads)
        of_Y, of_M, size = run.tape.empty(*run.Y.shape), run.tape.empty(*run.Y.shape), run.Y.array.size
        arrays = (run.Y.array, run.M.array, *(x.array for x in run.dx), run.factor, self.both)
        slopes = (grads[0].array, run.slopes[0].array)
        loops.algebra.interact_reverse(96 * size, *arrays, *slopes, of_Y.array, of_M.array)
        return of_Y, of_M


class Refine(Step):
    """X + D + κ D² from X and D.

    Args:
        factor: κ of each atom, (N,).
    """

    is_repeatable = True

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return refine(inputs[0], inputs[1], self.factor)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        X, run.D = inputs
        run.factor = self.factor.detach().contiguous().numpy()
        out, size = run.tape.empty(*X.shape), X.array.size
        loops.algebra.refine(16 * size, X.array, run.D.array, run.factor, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        of_D, size = run.tape.empty(*run.D.shape), run.D.array.size
        loops.algebra.refine_backward(16 * size, run.D.array, run.factor, grads[0].array, of_D.array)
        return grads[0], of_D

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        run.dx = None
        if all(change is None for change in changes):
            return None
        dX, dD = (run.tape.zeros(*run.D.shape) if change is None else change for change in changes)
        run.dx, out, size = dD, run.tape.empty(*run.D.shape), run.D.array.size
        loops.algebra.refine_tangent(32 * size, run.D.array, dX.array, dD.array, run.factor, out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        if run.dx is None:
            return self.backward(run, *grads)
        of_D, size = run.tape.empty(*run.D.shape), run.D.array.size
        arrays = (run.D.array, run.dx.array, run.factor, grads[0].array, run.slopes[0].array)
        loops.algebra.refine_reverse(32 * size, *arrays, of_D.array)
        return grads[0], of_D


class ScaleParts(Step):
    """Each part of X times its own factor for each channel, from X (N, 9, F) and the factors (N, 3 F)."""

    is_repeatable = True

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        X, gate = inputs
        return scale_parts(X, gate.unflatten(1, (3, X.shape[2])))

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.X, run.gate = inputs
        out = run.tape.empty(*run.X.shape)
        loops.algebra.gate(run.X.array.size, run.X.array, run.gate.array, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        of_X, of_gate = run.tape.empty(*run.X.shape), run.tape.empty(*run.gate.shape)
        arrays = (run.X.array, run.gate.array, grads[0].array, of_X.array, of_gate.array)
        loops.algebra.gate_backward(run.X.array.size, *arrays)
        return of_X, of_gate

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        run.dx = None
        if all(change is None for change in changes):
            return None
        given = zip(changes, (run.X, run.gate), strict=True)
        run.dx = [run.tape.zeros(*x.shape) if change is None else change for change, x in given]
        out, (dX, dgate) = run.tape.empty(*run.X.shape), run.dx
        arrays = (run.X.array, dX.array, run.gate.array, dgate.array, out.array)
        loops.algebra.gate_tangent(run.X.array.size, *arrays)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        if run.dx is None:
            return self.backward(run, *grads)
        of_X, of_gate, (dX, dgate) = run.tape.empty(*run.X.shape), run.tape.empty(*run.gate.shape), run.dx
        arrays = (run.X.array, dX.array, run.gate.array, dgate.array, grads[0].array, run.slopes[0].array)
        loops.algebra.gate_reverse(2 * run.X.array.size, *arrays, of_X.array, of_gate.array)
        return of_X, of_gate


class SquaredNorm(Step):
    """|X|² of each channel, (N, 9, F) -> (N, F)."""

    is_repeatable = True

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return squared_norm(inputs[0])

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (run.x,) = inputs
        out = run.tape.empty(run.x.shape[0], run.x.shape[2])
        loops.algebra.squared_norms(run.x.array.size, run.x.array, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        out = run.tape.empty(*run.x.shape)
        loops.algebra.squared_norms_backward(run.x.array.size, run.x.array, grads[0].array, out.array)
        return (out,)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        if run.dx is None:
            return None
        out = run.tape.empty(run.x.shape[0], run.x.shape[2])
        loops.algebra.squared_norms_tangent(run.x.array.size, run.x.array, run.dx.array, out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        (out,) = self.backward(run, *grads)
        if run.dx is not None:
            arrays = (run.dx.array, run.slopes[0].array, out.array)
            loops.algebra.add_norms_backward(run.x.array.size, *arrays)
        return (out,)


class PartNorms(Step):
    """|I|², |A|² and |S|² of each channel, (N, 9, F) -> (N, 3 F)."""

    is_repeatable = True

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return norms_by_part(inputs[0])

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (run.x,) = inputs
        out = run.tape.empty(run.x.shape[0], 3 * run.x.shape[2])
        loops.algebra.part_norms(run.x.array.size, run.x.array, out.array)
        return out

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return (self._scaled(run, run.x, grads[0]),)

    def _scaled(self, run: Run, X: Buffer, grad: Buffer) -> Buffer:
        """2 X with each part times its gradient."""
        out = run.tape.empty(*X.shape)
        loops.algebra.part_norms_backward(X.array.size, X.array, grad.array, out.array)
        return out

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        if run.dx is None:
            return None
        x, dx = run.x.tensor, run.dx.tensor
        parts = [part.sum(dim=1) for part in (x * dx).split(PARTS, dim=1)]
        return Buffer(torch.cat(parts, dim=-1).mul_(2))

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        out = self._scaled(run, run.x, grads[0])
        if run.dx is not None:
            more = self._scaled(run, run.dx, run.slopes[0])
            out.tensor.add_(more.tensor)
        return (out,)


class Part(Step):
    """Some components of the features, X[:, first:last], which share their memory."""

    is_repeatable = True

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return inputs[0][:, self.first : self.last]

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.size = inputs[0].shape[1]
        return Buffer(inputs[0].owned()[:, self.first : self.last])

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        grad = grads[0].tensor
        out = run.tape.zeros(grad.shape[0], run.size, *grad.shape[2:])
        repeatable(out.tensor[:, self.first : self.last].copy_, grad)
        return (out,)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        return None if changes[0] is None else Buffer(changes[0].owned()[:, self.first : self.last])

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        return self.backward(run, *grads)
