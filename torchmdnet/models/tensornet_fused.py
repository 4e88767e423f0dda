"""TensorNet's tensors and their derivatives in the geometry as one operation, for inference on the CPU.

The layers are those of :mod:`torchmdnet.models.tensornet`; here they call the compiled loops one after another on
arrays that are kept between calls, and their gradient in the edges is written out, so that a small molecule does not
wait for the bookkeeping of a hundred operations. Whoever asks for anything else than first derivatives in the geometry
(gradients of weights, second derivatives) is answered by the ordinary layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from torchmdnet.graph import Graph
from torchmdnet.nn.modules import weights_of
from torchmdnet.nn.spline import BASIS, Spline
from torchmdnet.ops import kernels

if TYPE_CHECKING:
    from torchmdnet.models.tensornet import TensorNet

__all__ = ["FusedTensorNet"]

#: Atoms from which PyTorch's matrix products beat the loop that mixes channels.
MANY_ATOMS = 96


class FusedTensorNet:
    """Weights of a TensorNet, as the loops want them.

    Args:
        model: Where the weights come from; it answers what this cannot.
        spline: The grid its radial filters are read from.
        tables: Spline coefficients of the embedding's and each layer's filter, (R, 3, F).
    """

    def __init__(self, model: TensorNet, spline: Spline, tables: list[Tensor]) -> None:
        self.spline = spline
        self.tables = [_array(table.flatten(1)) for table in tables]
        embedding = model.tensor_embedding
        self.handedness = -1.0 if embedding.handedness == "mirror" else 1.0
        self.is_symmetric = model.equivariance_invariance_group == "O(3)"
        dtype = tables[0].dtype
        self.basis = np.asarray(BASIS, dtype=np.float64) / 120
        self.starts = np.array([0, 1, 4, 9])
        gates = [linear.get_parameter for linear in embedding.linears_scalar]
        self.gates = [(get("weight").detach(), get("bias").detach()) for get in gates]
        self.norm = (embedding.init_norm.weight.detach(), embedding.init_norm.bias.detach(), embedding.init_norm.eps)
        every = torch.arange(model.max_z, device=tables[0].device)
        with torch.no_grad():
            self.factors = embedding.element_factors(every).to(dtype)  # (max_z, 2, F)
            mixing = [weights_of(embedding.linears_tensor)]
            for layer in model.layers:
                weights = weights_of(cast(nn.ModuleList, layer.linears_tensor))
                mixing += [weights[:3], weights[3:]]
            self.mixers = [_Mixer(torch.stack(weights)) for weights in mixing]
        modules = (model.distance_expansion, embedding, *model.layers)
        self.parameters = [weight for module in modules for weight in module.parameters()]
        self._spare: list[_Arrays] = []

    def __call__(self, graph: Graph, charge: Tensor, plain: Callable[[Graph], Tensor]) -> Tensor:
        """Tensors X of all atoms, (N, 9, F).

        Args:
            graph: Differentiated in its edges' vectors and pairs' distances.
            charge: The factor κ of each atom, (N,).
            plain: The same by ordinary layers, from which weights receive gradients if somebody waits for them.
        """
        assert graph.pairs is not None
        weights = [weight for weight in self.parameters if weight.requires_grad]
        return _Encode.apply(self, graph, charge, plain, graph.edge_vec, graph.pairs.dist, *weights)  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------ forward and back

    def forward(self, graph: Graph, vec: Tensor, dist: Tensor, charge: Tensor) -> tuple[Tensor, _Notes]:
        """Tensors (N, 9, F), and what the way back needs to know."""
        loops, nodes, network = kernels.edge_loops(), kernels.node_loops(), kernels.network_loops()
        assert graph.pairs is not None
        N, channels, dtype = graph.num_atoms, self.factors.shape[2], vec.dtype
        E, P = vec.shape[0], dist.shape[0]
        notes = _Notes(self._spare, (N, 9, channels), dtype)
        pairs, at = graph.pairs, notes
        at.work = E * channels * 27
        at.sender, at.row, at.row_start = graph.edge_index[1].numpy(), pairs.of_edge.numpy(), pairs.row_start.numpy()
        at.dist, at.charge = _array(dist), _array(charge)
        at.both = charge if self.is_symmetric else torch.ones_like(charge)
        get, take = notes.get, notes.take
        at.u, at.Y = get("u", (E, 3), dtype), get("Y", (E, 9), dtype)
        at.coef, at.slope = get("coef", (P, 6), dtype), get("slope", (P, 6), dtype)
        at.cell = get("cell", (P,), torch.int64)
        grid = (self.spline.start, self.spline.stop, self.spline.num_cells, self.basis, self.handedness)
        network.geometry(40 * E, _array(vec), at.dist, at.row, *grid, at.Y, at.u, at.coef, at.slope, at.cell)
        indices = (at.sender, at.row, at.row_start, self.starts)

        at.Z = _array(self.factors.index_select(0, graph.z))
        at.X0, flat = take(), (N, 9 * channels)
        arrays = (at.coef, at.cell, self.tables[0], at.Y, at.Z)
        loops.embed_sum(at.work, *arrays, *indices, at.X0.reshape(flat))

        size = N * 9 * channels
        norms = get("norms", (N, channels), dtype)
        network.squared_norms(size, at.X0, norms)
        at.norms = torch.from_numpy(norms)
        hidden, *at.moments = torch.native_layer_norm(at.norms, (channels,), *self.norm)
        at.before = []
        for weight, bias in self.gates:
            before = F.linear(hidden, weight, bias)
            at.before.append(before)
            hidden = F.silu(before)
        at.gate = _array(hidden)
        at.mixed = take()
        self.mixers[0].forward(at.X0, at.mixed)
        last = len(self.tables) - 2
        out = torch.empty(N, 9, channels, dtype=dtype)
        X = take() if last >= 0 else out.numpy()
        network.scale(size, at.mixed, at.gate, X)

        normed, P_ = take(), take()
        at.layers = []
        for k, table in enumerate(self.tables[1:]):
            Y, M, D = take(), take(), take()
            nodes.normalize(8 * size, X, normed)
            self.mixers[2 * k + 1].forward(normed, Y)
            arrays = (at.coef, at.cell, table, Y.reshape(flat))
            loops.message_sum(at.work, *arrays, *indices, M.reshape(flat))
            nodes.interact(16 * size, Y, M, at.both.numpy(), self.is_symmetric, P_)
            self.mixers[2 * k + 2].forward(P_, D)
            at.layers.append((X, Y, M, D))
            X = out.numpy() if k == last else take()
            nodes.refine(16 * size, normed, D, at.charge, X)
        notes.give(normed, P_)
        return out, notes

    def backward(self, notes: _Notes, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors of the edges (E, 3) and the distances of the pairs (P,)."""
        loops, nodes, network = kernels.edge_loops(), kernels.node_loops(), kernels.network_loops()
        at, get, take, dtype = notes, notes.get, notes.take, grad.dtype
        N, _, channels = grad.shape
        size, flat, E = grad.numel(), (N, 9 * channels), at.u.shape[0]
        indices = (at.sender, at.row, at.row_start, self.starts)
        g = _array(grad)
        per_edge = get("per_edge", (len(self.tables), E, 6), dtype)
        for k in reversed(range(len(at.layers))):  # a gradient takes the place of what nobody reads any more
            X, Y, M, D = at.layers[k]
            of_D = take()
            nodes.refine_backward(16 * size, D, at.charge, g, of_D)
            of_P = D
            self.mixers[2 * k + 2].backward(of_D, of_P)
            of_Y, of_M = of_D, take()
            nodes.interact_backward(48 * size, Y, M, at.both.numpy(), self.is_symmetric, of_P, of_Y, of_M)
            more, of_normed = M, of_P
            arrays = (at.coef, at.cell, self.tables[k + 1], of_M.reshape(flat), Y.reshape(flat))
            where = (at.sender, at.row, at.row, at.row_start, self.starts)
            loops.message_both(2 * at.work, *arrays, *where, more.reshape(flat), per_edge[k + 1])
            np.add(of_Y, more, out=of_Y)
            self.mixers[2 * k + 1].backward(of_Y, of_normed)
            np.add(of_normed, g, out=of_normed)
            g = more
            nodes.normalize_backward(8 * size, X, of_normed, g)
            notes.give(of_Y, of_M, of_normed, X, Y)

        of_gate = get("of_gate", (N, 3 * channels), dtype)
        of_mixed, of_X0 = take(), take()
        network.scale_backward(size, at.mixed, at.gate, g, of_mixed, of_gate)
        hidden = torch.from_numpy(of_gate)
        for (weight, _), before in zip(reversed(self.gates), reversed(at.before), strict=True):
            hidden = torch.ops.aten.silu_backward(hidden, before) @ weight
        weight, bias, _ = self.norm
        norms = torch.ops.aten.native_layer_norm_backward(
            hidden, at.norms, (channels,), *at.moments, weight, bias, [True, False, False]
        )[0]
        self.mixers[0].backward(of_mixed, of_X0)
        network.add_norms_backward(size, at.X0, norms.numpy(), of_X0)
        of_Y_ = get("of_directions", (E, 9), dtype)
        arrays = (at.coef, at.cell, self.tables[0], of_X0.reshape(flat), at.Y, at.Z)
        loops.embed_both(2 * at.work, *arrays, *indices, of_Y_, per_edge[0])
        of_vec, of_dist = grad.new_empty(E, 3), grad.new_empty(at.dist.shape)
        edges = (at.u, at.dist, at.row, self.handedness, at.slope, of_Y_, per_edge)
        network.geometry_backward(40 * E, *edges, of_vec.numpy(), of_dist.numpy())
        return of_vec, of_dist


class _Mixer:
    """Channel mixing of the three parts and its adjoint, (3, F, F)."""

    def __init__(self, weights: Tensor) -> None:
        network = kernels.network_loops()
        self.weights = weights  # (3, out, in)
        self.ahead, self.back = network.pack(_array(weights.transpose(1, 2))), network.pack(_array(weights))

    def forward(self, X: np.ndarray, out: np.ndarray) -> None:
        self._run(X, self.ahead, self.weights.transpose(1, 2), out)

    def backward(self, grad: np.ndarray, out: np.ndarray) -> None:
        self._run(grad, self.back, self.weights, out)

    def _run(self, X: np.ndarray, packed: np.ndarray, weights: Tensor, out: np.ndarray) -> None:
        if X.shape[0] < MANY_ATOMS:
            kernels.network_loops().mix(X.size * X.shape[2], X, packed, out)
            return
        values, target = torch.from_numpy(X).transpose(0, 1), torch.from_numpy(out).transpose(0, 1)
        for part, (first, last) in enumerate(((0, 1), (1, 4), (4, 9))):
            matrix = weights[part].expand(last - first, *weights.shape[1:])
            torch.bmm(values[first:last], matrix, out=target[first:last])


class _Arrays(NamedTuple):
    """Memory that evaluations lend one another."""

    named: dict[str, np.ndarray]
    tensors: list[np.ndarray]  # each (N, 9, F)


class _Notes:
    """Arrays of one evaluation; they go back to where they came from when nobody needs them.

    Tensors of all atoms are what memory goes to, so they have no names: one that is not read any more is given back,
    and taken for something else. An evaluation with L layers needs 4 + 4 L of them.

    Args:
        spare: Where memory comes from and goes to.
        shape: Of a tensor of all atoms, (N, 9, F).
        dtype: Of the tensors.
    """

    work: int
    sender: Any
    row: Any
    row_start: Any
    dist: Any
    charge: Any
    both: Any
    u: Any
    Y: Any
    coef: Any
    slope: Any
    cell: Any
    Z: Any
    X0: Any
    norms: Any
    moments: list[Tensor]
    before: list[Tensor]
    gate: Any
    mixed: Any
    layers: list[tuple[Any, Any, Any, Any]]

    def __init__(self, spare: list[_Arrays], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._home, self._shape, self._dtype = spare, shape, dtype
        self._named, self._tensors = spare.pop() if spare else _Arrays({}, [])
        if self._tensors and self._tensors[0].shape != shape:
            self._tensors = []
        self._free = self._tensors[:]

    def take(self) -> np.ndarray:
        """A tensor of all atoms, with anything in it."""
        if not self._free:
            self._tensors.append(torch.empty(self._shape, dtype=self._dtype).numpy())
            return self._tensors[-1]
        return self._free.pop()

    def give(self, *tensors: np.ndarray) -> None:
        """Let others have tensors of all atoms that nobody reads any more."""
        self._free += tensors

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """An array of the given shape, with anything in it."""
        array = self._named.get(name)
        if array is None or array.shape != shape:
            size = math.prod(shape)
            if array is None or array.size != size:
                array = torch.empty(size, dtype=dtype).numpy()
            array = self._named[name] = array.reshape(shape)
        return array

    def __del__(self) -> None:
        if len(self._home) < 2:
            self._home.append(_Arrays(self._named, self._tensors))


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: FusedTensorNet,
        graph: Graph,
        charge: Tensor,
        plain: Callable[[Graph], Tensor],
        vec: Tensor,
        dist: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        out, notes = fused.forward(graph, vec, dist, charge)
        ctx.fused, ctx.plain, ctx.notes, ctx.graph = fused, plain, notes, graph
        ctx.save_for_backward(vec, dist, charge, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        vec, dist, charge, *weights = ctx.saved_tensors
        needed = kernels.needed(ctx)[-2 - len(weights) :]
        if not torch.is_grad_enabled() and not any(needed[2:]):
            notes, ctx.notes = ctx.notes, None  # energies may outlive their derivatives, the arrays need not
            if notes is None:
                _, notes = ctx.fused.forward(ctx.graph, vec, dist, charge)
            of_vec, of_dist = ctx.fused.backward(notes, grads[0])
            return None, None, None, None, of_vec, of_dist, *(None for _ in weights)
        keep, pairs = torch.is_grad_enabled(), ctx.graph.pairs
        with torch.enable_grad():
            vec, dist = vec.view_as(vec), dist.view_as(dist)
            if not keep:
                vec, dist = vec.detach().requires_grad_(), dist.detach().requires_grad_()
            edge_dist = dist.index_select(0, pairs.of_edge)
            graph = ctx.graph._replace(edge_vec=vec, edge_dist=edge_dist, pairs=pairs._replace(dist=dist))
            found = torch.autograd.grad(
                ctx.plain(graph), [vec, dist, *weights], grads[0], create_graph=keep, allow_unused=True
            )
        return None, None, None, None, *found


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
