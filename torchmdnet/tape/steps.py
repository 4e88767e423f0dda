"""Steps that most networks consist of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import is_plain, layer_norm
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.messages import RadialPoints, gather_weight_sum
from torchmdnet.ops.workspace import Buffer
from torchmdnet.tape.tape import Definitions, Run, Step, Tables, unhooked

__all__ = ["Add", "Concatenate", "Message", "Plain", "activation", "linear", "norm", "pack", "unpacked"]


class Plain(Step):
    """Any function of tensors that does not read the geometry; its passes are left to autograd.

    Without inputs it is what atoms start from, which depends on weights alone.

    Args:
        function: Tensors to a tensor.
        modules: Where it takes weights from.
    """

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module | None) -> None:
        self.function, self.modules = function, modules

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    def evaluated(self, tables: Tables) -> Tensor:
        """Its value where it has no inputs and nothing is differentiated; a subclass may keep parts of it."""
        return self.function()

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.inputs = inputs  # their memory
        if not run.tape.keeps and not (inputs and run.tape.records):
            return Buffer(self.function(*(x.tensor for x in inputs)))
        with torch.enable_grad():
            run.x = [x.tensor.detach().requires_grad_() for x in inputs]
            run.y = self.function(*run.x)
            if any(_share_memory(run.y, x) for x in run.x):
                run.y = run.y.clone()
        run.changed = []
        return Buffer(run.y.detach())

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer | None, ...]:
        if not run.inputs or not run.y.requires_grad:
            run.of_x = ()
            return tuple(None for _ in run.inputs)
        keeps = run.tape.keeps
        with torch.set_grad_enabled(keeps):
            run.g = grads[0].tensor.detach().requires_grad_(keeps)
            run.of_x = torch.autograd.grad(
                run.y, run.x, run.g, create_graph=keeps, retain_graph=keeps, allow_unused=True
            )
        found = [None if x is None else Buffer(x.detach().contiguous()) for x in run.of_x]
        for x in found:
            if x is not None:
                x.is_shared = True  # its numbers are those of run.of_x
        return tuple(found)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        run.dx = changes  # their memory
        known = [(x, dx) for x, dx in zip(run.of_x, changes, strict=False) if x is not None and dx is not None]
        run.changed = [(x, dx.tensor) for x, dx in known if x.requires_grad]
        if not run.changed:
            return None
        outputs, given = zip(*run.changed, strict=True)
        (dy,) = torch.autograd.grad(outputs, run.g, given, retain_graph=True, allow_unused=True)
        return None if dy is None else Buffer(dy)

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer | None, ...]:
        if not run.y.requires_grad:
            return tuple(None for _ in run.inputs)
        weights = [w for module in self.modules if module for w in module.parameters() if w.requires_grad]
        outputs, given = zip((run.y, grads[0].tensor), *run.changed, strict=True)
        with unhooked(weights):
            found = torch.autograd.grad(outputs, [*run.x, *weights], given, retain_graph=True, allow_unused=True)
        for weight, grad in zip(weights, found[len(run.x) :], strict=True):
            if grad is not None:
                run.tape.add(weight, grad)
        return tuple(None if x is None else Buffer(x.contiguous()) for x in found[: len(run.x)])


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


class _Dense(Step):
    """A layer between the messages, which compiled loops evaluate where rows are few and nothing will be trained."""

    def repeats(self, run: Run, *inputs: Buffer) -> bool:
        """See :class:`torchmdnet.tape.tape.Step`."""
        return self.fits_loops(run, inputs[0])

    def fits_loops(self, run: Run, x: Buffer, *widths: int) -> bool:
        """Whether loops take the rows of x, and rows of other widths."""
        *sizes, width = x.shape
        return not run.tape.keeps and loops.dense.takes(math.prod(sizes), x.array.itemsize, width, *widths)


class Linear(_Dense):
    """y = W x + b over the last axis."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return self.layer(inputs[0])

    def weights(self, run: Run) -> tuple[Tensor, Tensor | None]:
        """W and b, or what is made of others; see :meth:`Tables.made`."""
        return self.layer.weight, self.layer.bias

    def fits_loops(self, run: Run, x: Buffer, *widths: int) -> bool:
        """See :class:`_Dense`."""
        return super().fits_loops(run, x, len(self.weights(run)[0]), *widths)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (x,) = inputs
        run.weight, run.bias = self.weights(run)
        run.is_few = self.fits_loops(run, x)
        if run.is_few:
            matrix = np.ascontiguousarray(_array(run.weight).T)  # not kept: any weight may have changed since
            out = run.tape.empty(*x.shape[:-1], matrix.shape[1])
            bias = matrix[0, :0] if run.bias is None else _array(run.bias)
            loops.dense.linear(x.array.size * matrix.shape[1], _flat(x), matrix, bias, _flat(out))
            return out
        if run.tape.keeps:
            run.x = x
        return Buffer(F.linear(x.tensor, run.weight, run.bias))

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        if run.is_few:
            matrix = _array(run.weight)
            out = run.tape.empty(*grads[0].shape[:-1], matrix.shape[1])
            loops.dense.linear(out.array.size * len(matrix), _flat(grads[0]), matrix, matrix[0, :0], _flat(out))
            return (out,)
        return (Buffer(grads[0].tensor @ run.weight),)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        return None if run.dx is None else Buffer(run.dx.tensor @ run.weight.t())

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        grad, weight = grads[0].tensor, run.weight
        of_weight = _rows(grad).t() @ _rows(run.x.tensor)
        if run.dx is not None:
            of_weight.addmm_(_rows(run.slopes[0].tensor).t(), _rows(run.dx.tensor))
        run.tape.add(weight, of_weight)
        if run.bias is not None:
            run.tape.add(run.bias, _rows(grad).sum(dim=0))
        return (Buffer(grad @ weight),)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _array(weight: Tensor) -> np.ndarray:
    return weight.detach().contiguous().numpy()


def _flat(x: Buffer) -> np.ndarray:
    return x.array.reshape(-1, x.shape[-1])


class Silu(_Dense):
    """y = x σ(x)."""

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return F.silu(inputs[0])

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (run.x,) = inputs
        run.is_few = self.fits_loops(run, run.x)
        if run.is_few:
            out, x = run.tape.empty(*run.x.shape), _flat(run.x)
            run.bias = np.zeros(x.shape[1], x.dtype)
            loops.activation.silu(20 * x.size, x, run.bias, _flat(out))
            return out
        return Buffer(F.silu(run.x.tensor))

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        if run.is_few:
            out, x = run.tape.empty(*run.x.shape), _flat(run.x)
            loops.activation.silu_backward(20 * x.size, x, run.bias, _flat(grads[0]), _flat(out))
            return (out,)
        return (Buffer(torch.ops.aten.silu_backward(grads[0].tensor, run.x.tensor)),)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        return None if run.dx is None else Buffer(torch.ops.aten.silu_backward(run.dx.tensor, run.x.tensor))

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        x = run.x.tensor
        found = torch.ops.aten.silu_backward(grads[0].tensor, x)
        if run.dx is not None:  # y'' = σ (1 - σ) (2 + x (1 - 2 σ))
            share = torch.sigmoid(x)
            bend = torch.addcmul(torch.full_like(x, 2.0), x, share, value=-2).add_(x).mul_(share).mul_(1 - share)
            found.addcmul_(bend.mul_(run.slopes[0].tensor), run.dx.tensor)
        return (Buffer(found),)


class LayerNorm(_Dense):
    r"""y = w x̂ + b with x̂ = (x - m(x)) / s, of the mean m over the last axis and s² = m((x - m(x))²) + ε.

    With P(v) = v - m(v) - x̂ m(v x̂), the Jacobian of x̂ is P / s, which is symmetric.
    """

    def __init__(self, module: nn.LayerNorm) -> None:
        self.module = module

    def fits_loops(self, run: Run, x: Buffer, *widths: int) -> bool:
        """See :class:`_Dense`."""
        return self.module.bias is not None and super().fits_loops(run, x, *widths)

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return layer_norm(self.module, inputs[0])

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        (run.x,), norm = inputs, self.module
        run.is_few = self.fits_loops(run, run.x)
        if run.is_few:
            out, x = run.tape.empty(*run.x.shape), _flat(run.x)
            run.factors, run.moments = _array(norm.weight), run.tape.empty(len(x), 2)
            arrays = (x, run.factors, _array(norm.bias), norm.eps, _flat(out), run.moments.array)
            loops.dense.layer_norm(4 * x.size, *arrays)
            return out
        y, *run.moments = torch.native_layer_norm(run.x.tensor, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return Buffer(y)

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        if run.is_few:
            out, x = run.tape.empty(*run.x.shape), _flat(run.x)
            arrays = (_flat(grads[0]), x, run.factors, run.moments.array, _flat(out))
            loops.dense.layer_norm_backward(8 * x.size, *arrays)
            return (out,)
        return (Buffer(self._backward(run, grads[0].tensor, [True, False, False])[0]),)

    def _backward(self, run: Run, grad: Tensor, mask: list[bool]) -> Any:
        norm = self.module
        arrays = (grad, run.x.tensor, norm.normalized_shape, *run.moments, norm.weight, norm.bias)
        return torch.ops.aten.native_layer_norm_backward(*arrays, mask)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        (run.dx,) = changes
        if run.dx is None:
            return None
        mean, run.rstd = run.moments
        run.x_hat = (run.x.tensor - mean) * run.rstd
        run.along = (run.dx.tensor * run.x_hat).mean(dim=-1, keepdim=True)
        run.change = run.dx.tensor - run.dx.tensor.mean(dim=-1, keepdim=True) - run.x_hat * run.along
        run.change *= run.rstd  # the change of x̂
        return Buffer(run.change * self.module.weight)

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        norm = self.module
        found, of_weight, of_bias = self._backward(run, grads[0].tensor, [True, True, True])
        if run.dx is not None:
            slope = run.slopes[0].tensor
            of_weight = of_weight + _rows(slope * run.change).sum(dim=0)
            # φ = g w · P(dx) / s, of which P and s depend on x; a = g w
            a = slope * norm.weight
            along = (a * run.x_hat).mean(dim=-1, keepdim=True)
            projected = (a - a.mean(dim=-1, keepdim=True) - run.x_hat * along) * run.rstd
            each = (a * run.change).mean(dim=-1, keepdim=True)
            found = found - run.rstd * (each * run.x_hat + run.along * projected + along * run.change)
        run.tape.add(norm.weight, of_weight)
        run.tape.add(norm.bias, of_bias)
        return (Buffer(found),)


class Add(Step):
    """y = a + b."""

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return inputs[0] + inputs[1]

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        return Buffer(inputs[0].tensor + inputs[1].tensor)

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        return grads[0], grads[0]

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        a, b = changes
        if a is None or b is None:
            return b if a is None else a
        return Buffer(a.tensor + b.tensor)

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        return grads[0], grads[0]


class Concatenate(Step):
    """y = [a | b] along the last axis."""

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, dim=-1)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        run.widths = [x.shape[-1] for x in inputs]
        return Buffer(torch.cat([x.tensor for x in inputs], dim=-1))

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        return tuple(Buffer(part.clone()) for part in grads[0].tensor.split(run.widths, dim=-1))

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer | None:
        known = next((change.tensor for change in changes if change is not None), None)
        if known is None:
            return None
        parts = [
            known.new_zeros(*known.shape[:-1], width) if change is None else change.tensor
            for change, width in zip(changes, run.widths, strict=True)
        ]
        return Buffer(torch.cat(parts, dim=-1))

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, ...]:
        return self.backward(run, *grads)


class Message(Step):
    r"""m_i = Σ_j w(r_ij) ⊙ x_j over neighbours, (N, F) -> (N, F), with a learned radial filter w.

    Args:
        function: The filter, one part, (P, 1, F).
        without_loops: Whether self loops send nothing.
    """

    reads_geometry = True
    is_repeatable = True

    def __init__(self, function: RadialFunction, *, without_loops: bool = False) -> None:
        self.function, self.without_loops = function, without_loops

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        filter = at.radial(self.function)
        if self.without_loops:
            assert at.graph.pairs is not None
            coef, cell = filter.points
            is_loop = torch.arange(coef.shape[0], device=coef.device) >= at.graph.pairs.atoms.shape[1]
            filter = filter._replace(points=RadialPoints(coef.masked_fill(is_loop[:, None], 0.0), cell))
        return gather_weight_sum(inputs[0][:, None], filter, at.edges)[:, 0]

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        at, tables = run.tape.geometry, run.tape.tables
        run.table = tables.kept((self.function, "packed"), lambda: packed(tables.table(self.function)))
        run.at = at.among_others if self.without_loops else at.fading
        run.sent = pack(run, inputs[0])
        return self._sum(run, run.at.coef, run.sent)

    def _sum(self, run: Run, coef: np.ndarray, sent: Buffer) -> Buffer:
        at, (_, N, _, _) = run.tape.geometry, sent.array.shape
        F = self._channels(run)
        out = run.tape.empty(N, F)
        arrays = (coef, at.place, run.table, sent.array)
        loops.message.scalar_message_sum(at.work(F), *arrays, *at.where(run.table), out.array)
        return out

    def _channels(self, run: Run) -> int:
        return run.tape.tables.table(self.function).shape[-1]

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        at, (grad,) = run.tape.geometry, grads
        out, sides = run.tape.empty(*grad.shape), at.shares(run.table)[0]
        run.given = pack(run, grad)
        arrays = (*run.at, at.place, run.table, run.given.array, run.sent.array)
        work, out_edge = 2 * at.work(grad.shape[1]), at.gradient(sides)[:, :, 0]
        loops.message.scalar_message_backward(work, *arrays, *at.where(run.table), out.array, out_edge)
        return (out,)

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer:
        at, (change,) = run.tape.geometry, changes
        run.dcoef = at.change(run.at)
        if change is None:
            run.dsent = None
            return self._sum(run, run.dcoef, run.sent)
        run.dsent = pack(run, change)
        return self._changed(run, run.sent, run.dsent)

    def _changed(self, run: Run, X: Buffer, dX: Buffer) -> Buffer:
        """Σ_j w dX_j + dw X_j."""
        at, F = run.tape.geometry, self._channels(run)
        out = run.tape.empty(at.num_atoms, F)
        arrays = (run.at.coef, run.dcoef, at.place, run.table, X.array, dX.array)
        loops.message.scalar_message_tangent(2 * at.work(F), *arrays, *at.where(run.table), out.array)
        return out

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer]:
        at, tape = run.tape.geometry, run.tape
        O, (_, ranges) = pack(run, grads[0]), at.shares(run.table, sums=True)
        dsent = run.dsent
        if dsent is None:
            dsent = tape.zeros(*run.sent.shape)
        out = tape.empty(ranges, *run.table.shape)
        arrays = (run.at.coef, run.dcoef, at.place, O.array, run.given.array, run.sent.array, dsent.array)
        where = at.where(run.table, sums=True)
        loops.message.scalar_message_reverse(2 * at.work(grads[0].shape[1]), *arrays, *where, out.array)
        table = tape.tables.table(self.function)
        tape.add(table, unpacked(out, table.shape))
        return (self._changed(run, run.given, O),)


def packed(table: Tensor) -> Any:
    """A table (R, L, F) in blocks of channels, as loops over edges read it."""
    return loops.blocks.packed(table.detach().contiguous().numpy())


def pack(run: Run, X: Buffer) -> Buffer:
    """Features (N, F) or (N, C, F) in blocks of channels, (B, N, C, 2 lanes)."""
    array = X.array if len(X.shape) == 3 else X.array[:, None]
    size = loops.blocks.block_size(array.itemsize)
    out = run.tape.empty(-(-array.shape[2] // size), *array.shape[:2], size)
    loops.blocks.pack(array.size, array, out.array)
    return out


def unpacked(sums: Buffer, shape: tuple[int, ...]) -> Tensor:
    """The sum over ranges of packed tables, (T, B, R, L, 2 lanes) -> (R, L, F)."""
    total = sums.tensor[0] if sums.shape[0] == 1 else sums.tensor.sum(dim=0)
    return total.permute(1, 2, 0, 3).flatten(2)[:, :, : shape[-1]].clone()


_SILU = Silu()


def linear(module: nn.Module) -> Step:
    """The step of a linear layer."""
    return Linear(module) if is_plain(module, nn.Linear) else Plain(module, module)  # type: ignore[arg-type]


def activation(module: nn.Module) -> Step:
    """The step of an activation."""
    return _SILU if is_plain(module, nn.SiLU) else Plain(module, module)


def norm(module: nn.Module) -> Step:
    """The step of a layer normalisation."""
    return LayerNorm(module) if is_plain(module, nn.LayerNorm) else Plain(module, module)  # type: ignore[arg-type]
