r"""TensorNet's tensors and their derivatives as one operation, for the CPU.

The layers are those of :mod:`torchmdnet.models.tensornet`; here they call the compiled loops one after another on
arrays that are kept between calls, and their derivatives are written out.

Inference asks for the gradient in the geometry: :meth:`Encoder.forward` and :meth:`Encoder.backward`. Training on
forces asks, for a direction v that depends on the loss, for the gradient of :math:`c E + v \cdot \nabla E` in the
weights. The derivative along v runs ahead through the layers (:meth:`Encoder.tangent`), and one pass back collects the
gradients of values and of their derivatives together (:meth:`Encoder.reverse`); the gradients of the derivatives are
those that made the forces, so they are at hand. Whoever asks for anything else, such as second derivatives in the
geometry, is answered by the ordinary layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchmdnet.graph import Graph
from torchmdnet.models.base import Features, Pullback
from torchmdnet.nn.filters import Radial, RadialFunction
from torchmdnet.nn.mlp import SiluLayers
from torchmdnet.nn.modules import weights_of
from torchmdnet.nn.spline import BASIS, Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.batched import is_within_batch, one_by_one

if TYPE_CHECKING:
    from torchmdnet.models.tensornet import TensorNet

__all__ = ["FrozenTensorNet", "TrainedTensorNet", "encode"]

#: Ordinary layers: the tensors of a graph, (N, 9, F).
Layers = Callable[[Graph], Tensor]


class FrozenTensorNet:
    """What evaluation keeps of a TensorNet between calls.

    Args:
        model: Where the weights come from.
        spline: The grid its radial filters are read from.
        tables: Spline coefficients of the embedding's and each layer's filter, (R, 3, F).
    """

    def __init__(self, model: TensorNet, spline: Spline, tables: list[Tensor]) -> None:
        self.frame = _frame(model, spline)
        self.tables = [kernels.tensor_edge_loops().packed(_array(table)) for table in tables]
        embedding: Any = model.tensor_embedding
        every = torch.arange(model.max_z, device=tables[0].device)
        with torch.no_grad():
            self.factors = embedding.element_factors(every).to(tables[0].dtype)  # (max_z, 2, F)
            self.mixers = [_Mixer(torch.stack(weights)) for weights in _mixing(model)]
        self.embedding, self.system_features = embedding, model.system_features
        norm = embedding.init_norm
        self.gates = [(linear.weight.detach(), linear.bias.detach()) for linear in embedding.linears_scalar]
        self.norm = (norm.weight.detach(), norm.bias.detach(), norm.eps)
        self.parameters = _parameters(model)
        self.spare: list[_Arrays] = []

    def encoder(self, graph: Graph, charge: Tensor) -> Encoder:
        """The network on one graph."""
        Z, gate = self.factors.index_select(0, graph.z), _FrozenGate(self.gates, self.norm)
        with torch.no_grad():
            of_systems = self.system_features(graph)
            if of_systems is not None:
                Z += self.embedding.system_factors(of_systems, graph.batch)
        return Encoder(self.frame, graph, charge, self.tables, Z, self.mixers, gate, self.parameters, self.spare)

    def encode(self, graph: Graph, charge: Tensor, output: SiluLayers) -> tuple[Features, Pullback]:
        """Features of all atoms and the way back to the geometry; for use where nothing is recorded.

        Args:
            graph: The atoms.
            charge: The factor κ of each atom, (N,).
            output: What makes invariant features of norms.
        """
        assert graph.pairs is not None
        nodes, encoder = kernels.node_loops(), self.encoder(graph, charge)
        X = encoder.forward(graph.edge_vec, graph.pairs.dist)
        N, size, channels = X.shape[0], X.numel(), X.shape[2]
        norms = X.new_empty(N, 3 * channels)
        nodes.part_norms(size, X.numpy(), norms.numpy())

        def pull_back(of_x: Tensor) -> tuple[Tensor, Tensor]:
            of_norms, of_X = output.backward(of_x), torch.empty_like(X)
            nodes.part_norms_backward(size, X.numpy(), of_norms.numpy(), of_X.numpy())
            return encoder.backward(of_X)

        return Features(output.forward(norms), v=X[:, 1:4], S=X[:, 4:9]), pull_back


class TrainedTensorNet:
    """What training keeps of a TensorNet between calls: memory."""

    def __init__(self) -> None:
        self.spare: list[_Arrays] = []

    def encoder(self, model: TensorNet, graph: Graph, charge: Tensor, radial: Radial) -> Encoder:
        """The network on one graph, with the weights as they are now."""
        embedding = model.tensor_embedding
        with torch.enable_grad():
            tables = [_rows(radial, function) for function in model.radial_functions]
            Z = embedding.factors(graph, model.system_features(graph))
        mixing = _mixing(model)
        mixers = [_Mixer(torch.stack(weights).detach()) for weights in mixing]
        gate = _TrainedGate(embedding)
        made = _Made([*tables, Z], [weight for weights in mixing for weight in weights], gate)
        arrays = [kernels.tensor_edge_loops().packed(_array(table)) for table in tables]
        frame = _frame(model, radial.spline)
        return Encoder(frame, graph, charge, arrays, Z.detach(), mixers, gate, _parameters(model), self.spare, made)


def encode(encoder: Encoder, graph: Graph, layers: Layers) -> Tensor:
    """Tensors of all atoms, (N, 9, F).

    Args:
        encoder: Does the work.
        graph: Differentiated in its edges' vectors and pairs' distances.
        layers: The same by ordinary layers.
    """
    assert graph.pairs is not None
    weights = [weight for weight in encoder.parameters if weight.requires_grad]
    call = _Call(encoder, graph, layers)
    return _Encode.apply(call, graph.edge_vec, graph.pairs.dist, *weights)  # type: ignore[return-value]


class _Frame(NamedTuple):
    """What an encoder is, apart from its weights."""

    grid: tuple[Any, ...]  # as the loop over the geometry takes it
    num_rows: int  # that a pair reads
    is_symmetric: bool  # O(3) rather than SO(3)
    handedness: float


def _frame(model: TensorNet, spline: Spline | None) -> _Frame:
    handedness = -1.0 if model.tensor_embedding.handedness == "mirror" else 1.0
    basis = np.asarray(BASIS, dtype=np.float64) / 120
    if spline is None:
        grid = (float(model.cutoff_lower), float(model.cutoff_upper), 0, basis, handedness)
    else:
        grid = (spline.start, spline.stop, spline.num_cells, basis, handedness)
    is_symmetric = model.equivariance_invariance_group == "O(3)"
    return _Frame(grid, 2 if spline is None else 6, is_symmetric, handedness)


def _mixing(model: TensorNet) -> list[list[Tensor]]:
    """The matrices that mix channels, one for each part, in the order in which they are applied."""
    mixing = [weights_of(model.tensor_embedding.linears_tensor)]
    for layer in model.layers:
        weights = weights_of(cast(nn.ModuleList, layer.linears_tensor))
        mixing += [weights[:3], weights[3:]]
    return mixing


def _parameters(model: TensorNet) -> list[Tensor]:
    modules = [model.distance_expansion, model.tensor_embedding, *model.layers]
    modules += [] if model.system_embedding is None else [model.system_embedding]
    return [weight for module in modules for weight in module.parameters()]


def _rows(radial: Radial, function: RadialFunction) -> Tensor:
    """What pairs read their weights from, (R, 3, F), as it depends on the weights of the function alone.

    On a grid the coefficients of the spline. Otherwise value and slope of each pair at its distance, which is a table
    in itself: next to that distance the function is value plus slope times the change.
    """
    if radial.spline is not None:
        return radial.spline.coefficients(function(radial.rows))
    dist = radial.dist.detach().requires_grad_()
    value = function(radial.basis(dist))
    any_way = torch.zeros_like(value, requires_grad=True)
    (along,) = torch.autograd.grad(value, dist, any_way, create_graph=True)  # linear in any_way: its slope is ours
    (slope,) = torch.autograd.grad(along, any_way, torch.ones_like(along), create_graph=True)
    return torch.stack([value, slope], dim=1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------ the network


class Encoder:
    """The layers of a TensorNet on one graph, and their derivatives; call them in the order they stand in.

    Args:
        frame: What it is.
        graph: The atoms.
        charge: The factor κ of each atom, (N,).
        tables: What the filters are read from, packed, (B, R, 3, 2 lanes).
        Z: Factors of the elements and systems, (N, 2, F).
        mixers: Matrices that mix channels.
        gate: What scales the parts of the embedding.
        parameters: Weights that may receive gradients.
        spare: Where memory comes from and goes to.
        made: How tables and factors depend on weights; None if no gradient of weights will be asked for.
    """

    def __init__(
        self,
        frame: _Frame,
        graph: Graph,
        charge: Tensor,
        tables: list[Any],
        Z: Tensor,
        mixers: list[_Mixer],
        gate: _FrozenGate | _TrainedGate,
        parameters: list[Tensor],
        spare: list[_Arrays],
        made: _Made | None = None,
    ) -> None:
        assert graph.pairs is not None
        pairs = graph.pairs
        self.frame, self.tables, self.Z, self.mixers, self.gate, self.made = frame, tables, Z, mixers, gate, made
        self.shape = (graph.num_atoms, 9, Z.shape[2])
        (receiver, sender), row = graph.edge_index.numpy(), pairs.of_edge.numpy()
        self.row, self.there = row, _Way(sender, row, pairs.row_start.numpy())
        self.back = self.there
        if pairs.reverse.shape != pairs.of_edge.shape:  # edges of their own, some perhaps without partner
            order = np.argsort(sender, kind="stable")
            starts = np.searchsorted(sender, np.arange(graph.num_atoms + 1), sorter=order)
            self.back = _Way(receiver[order], row[order], starts)
        self.charge = _array(charge)
        self.both = self.charge if frame.is_symmetric else np.ones_like(self.charge)
        self.parameters, self.spare = parameters, spare
        self.notes: _Notes | None = None
        self.taken: list[np.ndarray] = []
        self.tangents: list[_Layer] = []
        self.stamp: Any = None
        self.num_gradients = 0  # passes of backward(); the arrays of the last one are kept

    def _get(self, name: str, *shape: int) -> np.ndarray:
        """An array of one use."""
        assert self.notes is not None
        return self.notes.get(name, shape, self.Z.dtype)

    def _pack(self, name: str, X: np.ndarray) -> np.ndarray:
        """Features (N, C, F) in blocks of channels, as loops over edges read them."""
        out = self._get(name, self.tables[0].shape[0], *X.shape[:2], self.tables[0].shape[3])
        kernels.tensor_edge_loops().pack(X.size, X, out)
        return out

    def _ways(self) -> list[_Way]:
        return [self.there] if self.back is self.there else [self.there, self.back]

    def _visit(self, values: np.ndarray, name: str) -> list[np.ndarray]:
        """Numbers of pairs, (P, K), in the order in which the loops over edges come to them, on every way."""
        found = []
        for k, way in enumerate(self._ways()):
            out = self._get(f"{name} on way {k}", len(way.plan.rows), values.shape[1])
            kernels.tensor_edge_loops().pick(values, way.plan.rows, out)
            found.append(out)
        return found

    def _work(self, blends: int, of_edge: int) -> int:
        """Multiply-adds of a loop: blends of the table for each pair, and others for each channel of an edge."""
        rows, num = self.there.coef.shape
        return self.shape[2] * (3 * num * rows * blends + of_edge * len(self.row))

    def forward(self, vec: Tensor, dist: Tensor) -> Tensor:
        """Tensors of all atoms, (N, 9, F), from the vectors of the edges (E, 3) and distances of the pairs (P,)."""
        loops, nodes, network = kernels.tensor_edge_loops(), kernels.node_loops(), kernels.network_loops()
        N, _, channels = self.shape
        E, P, size, num = vec.shape[0], dist.shape[0], math.prod(self.shape), self.frame.num_rows
        self.notes = _Notes(self.spare, self.shape, self.Z.dtype, keeps=self.made is not None)
        take = self.notes.take
        self.dist = _array(dist)
        self.u, self.Y = self._get("u", E, 3), self._get("Y", E, 9)
        coef, self.slope = self._get("coef", P, num), self._get("slope", P, num)
        cell = self.notes.get("cell", (P,), torch.int64)
        out_geometry = (self.Y, self.u, coef, self.slope, cell)
        network.geometry(40 * E, _array(vec), self.dist, self.row, *self.frame.grid, *out_geometry)
        num_cells = self.tables[0].shape[1] if num == 6 else 0
        for way in self._ways():
            way.plan = loops.schedule(cell, way.row, way.start, num_cells)
            way.place = cell[way.plan.rows]
        for way, values in zip(self._ways(), self._visit(coef, "coef"), strict=True):
            way.coef = values
        threads = kernels.cores.count() if 27 * E * channels >= kernels.WORTH_THREADS else 1
        sizes = threads, self.tables[0].shape[0], len(self.there.plan.chunk) - 1
        self.shares, self.summed = loops.shares(*sizes), loops.shares(*sizes, sums=True)
        there, where = self.there, self.there.where(self.shares)

        self.X0, self.factors = take(), self._pack("Z", self.Z.numpy())
        arrays = (there.coef, there.place, self.tables[0], self.Y, self.factors)
        loops.embed_sum(self._work(1, 15), *arrays, *where, self.X0)
        norms = self._get("norms", N, channels)
        network.squared_norms(size, self.X0, norms)
        self.gated_by = self.gate.forward(torch.from_numpy(norms))
        self.mixed = take()
        self.mixers[0].forward(self.X0, self.mixed)
        last = len(self.tables) - 2
        out = torch.empty(self.shape, dtype=self.Z.dtype)
        X = take() if last >= 0 else out.numpy()
        network.scale(size, self.mixed, self.gated_by, X)

        self.layers: list[_Layer] = []
        for k, table in enumerate(self.tables[1:]):
            normed, Y, M, P_, D = take(), take(), take(), take(), take()
            nodes.normalize(8 * size, X, normed)
            self.mixers[2 * k + 1].forward(normed, Y)
            arrays = (there.coef, there.place, table, self._pack("left", Y))
            loops.message_sum(self._work(1, 9), *arrays, *where, M)
            nodes.interact(16 * size, Y, M, self.both, self.frame.is_symmetric, P_)
            self.mixers[2 * k + 2].forward(P_, D)
            self.layers.append(_Layer(X, normed, Y, M, P_, D))
            X = out.numpy() if k == last else take()
            nodes.refine(16 * size, normed, D, self.charge, X)
            self.notes.give(P_, normed)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors of the edges (E, 3) and the distances of the pairs (P,)."""
        loops, nodes, network = kernels.tensor_edge_loops(), kernels.node_loops(), kernels.network_loops()
        assert self.notes is not None
        N, _, channels = self.shape
        size, E, notes = math.prod(self.shape), self.u.shape[0], self.notes
        g = _array(grad)
        self.num_gradients += 1
        sides, _ = self.shares
        per_edge = self._get("per_edge", len(self.tables), sides, E)
        slopes, (there, back) = self._visit(self.slope, "slope"), (self.there, self.back)
        coefs, where = (back.coef, slopes[-1], back.place), back.where(self.shares)
        self.slopes: list[_Layer] = []
        for k in reversed(range(len(self.layers))):  # a gradient takes the place of what nobody reads any more
            X, _, Y, M, _, D = self.layers[k]
            of_D = notes.take()
            nodes.refine_backward(16 * size, D, self.charge, g, of_D)
            of_P = notes.instead_of(D)
            self.mixers[2 * k + 2].backward(of_D, of_P)
            of_Y, of_M = notes.instead_of(of_D), notes.take()
            nodes.interact_backward(48 * size, Y, M, self.both, self.frame.is_symmetric, of_P, of_Y, of_M)
            more, of_normed = notes.instead_of(M), notes.instead_of(of_P)
            arrays = (self.tables[k + 1], self._pack("left", of_M), self._pack("right", Y))
            loops.message_backward(self._work(2, 21), *coefs, *arrays, *where, more, per_edge[k + 1])
            np.add(of_Y, more, out=of_Y)
            self.mixers[2 * k + 1].backward(of_Y, of_normed)
            np.add(of_normed, g, out=of_normed)
            self.slopes.append(_Layer(g, of_normed, of_Y, of_M, of_P, of_D))
            g = more
            nodes.normalize_backward(8 * size, X, of_normed, g)
            notes.give(of_Y, of_M, of_normed, X, Y)
        self.slopes.reverse()

        of_gate, of_mixed, of_X0 = self._get("of_gate", N, 3 * channels), notes.take(), notes.take()
        network.scale_backward(size, self.mixed, self.gated_by, g, of_mixed, of_gate)
        of_norms = self.gate.backward(torch.from_numpy(of_gate))
        self.mixers[0].backward(of_mixed, of_X0)
        network.add_norms_backward(size, self.X0, of_norms, of_X0)
        self.of_embedding = (g, of_mixed, of_norms, of_X0)
        of_Y_ = self._get("of_directions", sides, E, 8)
        arrays = (self.tables[0], self._pack("left", of_X0), self.Y, self.factors)
        coefs = (there.coef, slopes[0], there.place)
        loops.embed_backward(self._work(2, 24), *coefs, *arrays, *there.where(self.shares), of_Y_, per_edge[0])
        of_vec, of_dist = grad.new_empty(E, 3), grad.new_empty(self.dist.shape)
        edges = (self.u, self.dist, there.row, self.frame.handedness, of_Y_)
        network.vectors_backward(40 * E, *edges, of_vec.numpy())
        edges = (self.u, there.row, back.row, of_vec.numpy(), per_edge[0], per_edge[1:].reshape(-1, E))
        network.distances_backward(*edges, of_dist.numpy())
        return of_vec, of_dist

    def tangent(self, dvec: Tensor, ddist: Tensor) -> Tensor:
        """Derivative of :meth:`forward` as vectors and distances change, (N, 9, F)."""
        loops, nodes, network = kernels.tensor_edge_loops(), kernels.node_loops(), kernels.network_loops()
        assert self.notes is not None
        N, _, channels = self.shape
        size, E, take = math.prod(self.shape), self.u.shape[0], self.notes.take
        self._forget_tangent()
        self.dY, dcoef = self._get("dY", E, 9), self._get("dcoef", *self.slope.shape)
        arrays = (self.u, self.dist, self.row, self.frame.handedness, self.slope, _array(dvec), _array(ddist))
        network.geometry_tangent(40 * E, *arrays, self.dY, dcoef)
        self.dcoef, there = self._visit(dcoef, "dcoef"), self.there
        self.dX0, self.dmixed, dX = take(), take(), take()
        coefs, where = (there.coef, self.dcoef[0], there.place), there.where(self.shares)
        arrays = (self.tables[0], self.Y, self.dY, self.factors)
        loops.embed_tangent(self._work(2, 30), *coefs, *arrays, *where, self.dX0)
        dnorms = self._get("dnorms", N, channels)
        network.squared_norms_tangent(size, self.X0, self.dX0, dnorms)
        self.dnorms = torch.from_numpy(dnorms)
        self.dgate = cast(_TrainedGate, self.gate).tangent(self.dnorms)
        self.mixers[0].forward(self.dX0, self.dmixed)
        network.scale_tangent(size, self.mixed, self.dmixed, self.gated_by, self.dgate, dX)
        self.taken += [self.dX0, self.dmixed, dX]
        for k, (X, _, Y, M, _, D) in enumerate(self.layers):
            dnormed, dY, dM, dP, dD, after = take(), take(), take(), take(), take(), take()
            nodes.normalize_backward(8 * size, X, dX, dnormed)  # its Jacobian is symmetric
            self.mixers[2 * k + 1].forward(dnormed, dY)
            arrays = (self.tables[k + 1], self._pack("left", Y), self._pack("right", dY))
            loops.message_tangent(self._work(2, 18), *coefs, *arrays, *where, dM)
            nodes.interact_tangent(32 * size, Y, M, dY, dM, self.both, self.frame.is_symmetric, dP)
            self.mixers[2 * k + 2].forward(dP, dD)
            nodes.refine_tangent(32 * size, D, dnormed, dD, self.charge, after)
            self.tangents.append(_Layer(dX, dnormed, dY, dM, dP, dD))
            self.taken += [dnormed, dY, dM, dP, dD, after]
            dX = after
        return torch.from_numpy(dX.copy())

    def _forget_tangent(self) -> None:
        assert self.notes is not None
        self.notes.free(*self.taken)
        self.taken, self.tangents = [], []

    def reverse(self, grad: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients in weights of ⟨grad, forward⟩ and of the derivative that :meth:`tangent` took, together."""
        loops, nodes, network = kernels.tensor_edge_loops(), kernels.node_loops(), kernels.network_loops()
        assert self.made is not None
        assert self.notes is not None
        size, channels, take = math.prod(self.shape), self.shape[2], self.notes.take
        there, back = self.there, self.back
        coefs, where = (there.coef, self.dcoef[0], there.place), there.where(self.summed)
        coefs_back = (back.coef, self.dcoef[-1], back.place)
        _, ranges = self.summed
        h = _array(grad)
        of_tables: list[Tensor] = []
        of_mixers: list[Tensor] = []
        scratch = [take() for _ in range(7)]
        of_D, of_P, of_Y, of_M, more, *turns = scratch
        for k in reversed(range(len(self.layers))):
            at, d, g = self.layers[k], self.tangents[k], self.slopes[k]
            nodes.refine_reverse(32 * size, at.D, d.D, self.charge, h, g.X, of_D)
            of_mixers.append(self._outer(of_D, at.P, g.D, d.P))
            self.mixers[2 * k + 2].backward(of_D, of_P)
            arrays = (at.Y, at.M, d.Y, d.M, self.both, self.frame.is_symmetric, of_P, g.P)
            nodes.interact_reverse(96 * size, *arrays, of_Y, of_M)
            O, dO = self._pack("left", of_M), self._pack("right", g.M)
            arrays = (self.tables[k + 1], dO, O)
            loops.message_tangent(self._work(2, 18), *coefs_back, *arrays, *back.where(self.shares), more)
            np.add(of_Y, more, out=of_Y)
            table = self._get("of_table", ranges, *self.tables[k + 1].shape)
            arrays = (O, dO, self._pack("third", at.Y), self._pack("fourth", d.Y))
            loops.message_reverse(self._work(2, 27), *coefs, *arrays, *where, table)
            of_tables.append(_unpacked(table, channels))
            of_mixers.append(self._outer(of_Y, at.normed, g.Y, d.normed))
            self.mixers[2 * k + 1].backward(of_Y, of_D)
            np.add(of_D, h, out=of_D)
            h = turns[k % 2]
            nodes.normalize_reverse(16 * size, at.X, d.X, of_D, g.normed, h)

        g_out, g_mixed, g_norms, g_X0 = self.of_embedding
        of_gate = self._get("of_gate", self.shape[0], 3 * channels)
        arrays = (self.mixed, self.dmixed, self.gated_by, self.dgate, h, g_out)
        network.scale_reverse(2 * size, *arrays, of_P, of_gate)
        of_norms, found = cast(_TrainedGate, self.gate).reverse(torch.from_numpy(of_gate), self.dnorms)
        of_mixers.append(self._outer(of_P, self.X0, g_mixed, self.dX0))
        self.mixers[0].backward(of_P, of_Y)
        network.add_norms_backward(size, self.X0, of_norms, of_Y)
        network.add_norms_backward(size, self.dX0, g_norms, of_Y)
        table = self._get("of_table", ranges, *self.tables[0].shape)
        of_Z = self._get("of_Z", ranges, *self.factors.shape)
        arrays = (self.tables[0], self._pack("left", of_Y), self._pack("right", g_X0), self.Y, self.dY, self.factors)
        loops.embed_reverse(self._work(4, 50), *coefs, *arrays, *where, table, of_Z)
        of_tables.append(_unpacked(table, channels))
        self.notes.free(*scratch)
        return self.made.gradients([*reversed(of_tables), _unpacked(of_Z, channels)], of_mixers[::-1], found, wanted)

    def _outer(self, O: np.ndarray, X: np.ndarray, dO: np.ndarray, dX: np.ndarray) -> Tensor:
        """Gradient of mixing and of its derivative in the matrices, (3, F, F)."""
        left, right, dleft, dright = (torch.from_numpy(x).transpose(0, 1) for x in (O, X, dO, dX))  # (9, N, F)
        each = torch.baddbmm(torch.bmm(left.transpose(1, 2), right), dleft.transpose(1, 2), dright)  # (9, F, F)
        return torch.stack([each[first:last].sum(dim=0) for first, last in _PARTS])


class _Way:
    """Edges in the order of the atoms that sum over them, at the one end or at the other.

    Args:
        far: The atoms at the other end, (E,).
        row: The pair of each edge, (E,).
        start: The first edge of each atom, (N + 1,).
    """

    plan: Any  # the order of the pairs
    place: Any  # their first rows in the table
    coef: Any  # their coefficients

    def __init__(self, far: Any, row: Any, start: Any) -> None:
        self.far, self.row, self.start = far, row, start

    def where(self, shares: tuple[int, int]) -> tuple[Any, ...]:
        """What loops over edges take."""
        _, slot, chunk, first, most = self.plan
        return self.far, slot, chunk, first, self.start, most, *shares


class _Layer(NamedTuple):
    """Features in the order in which a layer makes them, their derivatives, or gradients in these."""

    X: Any  # of what comes in; gradients: in what goes out
    normed: Any
    Y: Any
    M: Any
    P: Any
    D: Any


_PARTS = ((0, 1), (1, 4), (4, 9))


class _Mixer:
    """Channel mixing of the three parts and its adjoint, (3, F, F)."""

    def __init__(self, weights: Tensor) -> None:
        network = kernels.network_loops()
        self.weights = weights  # (3, out, in)
        self.packed = None
        if network.can_pack(weights.shape[1], weights.element_size()):
            array = _array(weights)
            self.packed = network.pack(array, turned=True), network.pack(array, turned=False)

    def forward(self, X: np.ndarray, out: np.ndarray) -> None:
        self._run(X, 0, out)

    def backward(self, grad: np.ndarray, out: np.ndarray) -> None:
        self._run(grad, 1, out)

    def _run(self, X: np.ndarray, way: int, out: np.ndarray) -> None:
        if self.packed is not None:
            kernels.network_loops().mix(X.size * X.shape[2], X, self.packed[way], out)
            return
        weights = self.weights if way else self.weights.transpose(1, 2)
        for part, (first, last) in enumerate(_PARTS):  # few channels
            torch.matmul(torch.from_numpy(X[:, first:last]), weights[part], out=torch.from_numpy(out[:, first:last]))


class _FrozenGate:
    """The network that makes gates of norms, (N, F) -> (N, 3 F), without gradients of its weights."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], norm: tuple[Tensor, Tensor, float]) -> None:
        self.network = SiluLayers(layers, norm)

    def forward(self, norms: Tensor) -> np.ndarray:
        return self.network.forward(norms).numpy()

    def backward(self, grad: Tensor) -> np.ndarray:
        return self.network.backward(grad).numpy()


class _TrainedGate:
    """The same through the layers of the model, which PyTorch differentiates."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding
        modules = (embedding.init_norm, *embedding.linears_scalar)
        self.parameters = [weight for module in modules for weight in module.parameters()]

    def forward(self, norms: Tensor) -> np.ndarray:
        with torch.enable_grad():
            self.norms = norms.requires_grad_()
            gate = self.embedding.init_norm(self.norms)
            for linear in self.embedding.linears_scalar:
                gate = self.embedding.act(linear(gate))
        self.gate = gate
        return gate.detach().numpy()

    def backward(self, grad: Tensor) -> np.ndarray:
        with torch.enable_grad():
            self.grad = grad.clone().requires_grad_()
            (self.of_norms,) = torch.autograd.grad(self.gate, self.norms, self.grad, create_graph=True)
        return _array(self.of_norms)

    def tangent(self, change: Tensor) -> np.ndarray:
        (found,) = torch.autograd.grad(self.of_norms, self.grad, change, retain_graph=True)
        return _array(found)

    def reverse(self, grad: Tensor, change: Tensor) -> tuple[np.ndarray, Sequence[Tensor | None]]:
        """Gradients in the norms, and in the weights, of gates and of their change with the norms."""
        outputs, weights = [self.gate, self.of_norms], [weight for weight in self.parameters if weight.requires_grad]
        of_norms, *found = torch.autograd.grad(
            outputs, [self.norms, *weights], [grad, change], retain_graph=True, allow_unused=True
        )
        return _array(of_norms), found


class _Made(NamedTuple):
    """How what an encoder reads depends on the weights of the model."""

    tensors: list[Tensor]  # tables and factors
    mixing: list[Tensor]  # matrices, three for each mixer
    gate: _TrainedGate

    def gradients(
        self,
        of_tensors: list[Tensor],
        of_mixers: list[Tensor],
        of_gate: Sequence[Tensor | None],
        wanted: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Gradients in the wanted weights."""
        found: dict[int, Tensor | None] = {}
        gated = (weight for weight in self.gate.parameters if weight.requires_grad)
        found.update((id(weight), grad) for weight, grad in zip(gated, of_gate, strict=True))
        matrices = (matrix for mixer in of_mixers for matrix in mixer)
        found.update((id(weight), grad) for weight, grad in zip(self.mixing, matrices, strict=True))
        rest = [weight for weight in wanted if id(weight) not in found]
        pairs = [(x, grad) for x, grad in zip(self.tensors, of_tensors, strict=True) if x.requires_grad]
        if rest and pairs:
            grads = [grad.reshape(x.shape) for x, grad in pairs]
            more = torch.autograd.grad([x for x, _ in pairs], rest, grads, retain_graph=True, allow_unused=True)
            found.update((id(weight), grad) for weight, grad in zip(rest, more, strict=True))
        return [found.get(id(weight)) for weight in wanted]


class _Arrays(NamedTuple):
    """Memory that waits for the next evaluation."""

    named: dict[str, np.ndarray]  # of one use each, flat
    tensors: list[np.ndarray]  # for tensors of all atoms, flat


class _Notes:
    """Arrays of one evaluation; they go back to where they came from when nobody needs them.

    Tensors of all atoms are taken and, unless they are kept for training, given back as soon as they have been read
    and taken for something else. An evaluation of L layers needs 4 + 4 L of them.

    Args:
        spare: Where memory comes from and goes to.
        shape: Of a tensor of all atoms, (N, 9, F).
        dtype: Of the tensors.
        keeps: Whether derivatives of derivatives will read everything again.
    """

    def __init__(self, spare: list[_Arrays], shape: tuple[int, int, int], dtype: torch.dtype, *, keeps: bool) -> None:
        self._home, self._shape, self._dtype, self.keeps = spare, shape, dtype, keeps
        self._named, tensors = spare.pop() if spare else _Arrays({}, [])
        self._size = math.prod(shape)
        self._tensors = [flat for flat in tensors if self._size <= flat.size <= 2 * self._size]
        self._free = [flat[: self._size].reshape(shape) for flat in self._tensors]

    def take(self) -> np.ndarray:
        """A tensor of all atoms, with anything in it."""
        if self._free:
            return self._free.pop()
        self._tensors.append(torch.empty(self._size, dtype=self._dtype).numpy())
        return self._tensors[-1].reshape(self._shape)

    def instead_of(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor to write to, the given one itself unless that is kept."""
        return self.take() if self.keeps else tensor

    def give(self, *tensors: np.ndarray) -> None:
        """Let others have tensors of all atoms, unless they are kept."""
        if not self.keeps:
            self._free += tensors

    def free(self, *tensors: np.ndarray) -> None:
        """Let others have tensors of all atoms that nobody reads any more."""
        self._free += tensors

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """An array of the given shape, with anything in it."""
        size = math.prod(shape)
        flat = self._named.get(name)
        if flat is None or not size <= flat.size <= 2 * size:
            flat = self._named[name] = torch.empty(size, dtype=dtype).numpy()
        return flat[:size].reshape(shape)

    def __del__(self) -> None:
        if len(self._home) < 2:
            self._home.append(_Arrays(self._named, self._tensors))


# --------------------------------------------------------------------------------------------------------- autograd


class _Call(NamedTuple):
    """One evaluation, and how to do it with ordinary layers."""

    encoder: Encoder
    graph: Graph
    layers: Layers

    def by_layers(self, vec: Tensor, dist: Tensor) -> Tensor:
        """The tensors, with a history that can be differentiated again."""
        pairs = self.graph.pairs
        assert pairs is not None
        edge_dist = dist.index_select(0, pairs.of_edge)
        return self.layers(self.graph._replace(edge_vec=vec, edge_dist=edge_dist, pairs=pairs._replace(dist=dist)))


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, vec: Tensor, dist: Tensor, *weights: Tensor) -> Tensor:
        out = call.encoder.forward(vec, dist)
        ctx.call = call
        ctx.save_for_backward(out, vec, dist, *weights)
        return out

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        call, (grad,) = ctx.call, grads
        out, vec, dist, *weights = ctx.saved_tensors
        needs = kernels.needed(ctx)[-2 - len(weights) :]
        of_geometry, of_weights = any(needs[:2]), any(needs[2:])
        again = torch.is_grad_enabled()
        encoder: Encoder = call.encoder
        if again and encoder.made is not None and not of_weights:
            return None, *_Slopes.apply(call, grad, out, vec, dist, *weights), *(None for _ in weights)
        if not again and of_weights and encoder.stamp == _current_run() and (call.graph.inner or not of_geometry):
            return None, None, None, *encoder.reverse(grad, weights)
        if not again and not of_weights:
            if encoder.notes is None:
                encoder.forward(vec, dist)
            found = encoder.backward(grad)
            if encoder.made is None:  # energies may outlive their derivatives, the arrays need not
                encoder.notes = None
            return None, *found, *(None for _ in weights)
        with torch.enable_grad():
            vec, dist = vec.view_as(vec), dist.view_as(dist)
            if not again:
                vec, dist = vec.detach().requires_grad_(), dist.detach().requires_grad_()
            found = torch.autograd.grad(
                call.by_layers(vec, dist), [vec, dist, *weights], grad, create_graph=again, allow_unused=True
            )
        return None, *found


class _Slopes(Function):
    """The gradient of :class:`_Encode` in the geometry, which training on forces differentiates again.

    The tensors are an input, so that the gradients found here are there before :class:`_Encode` goes back once more.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, grad: Tensor, out: Tensor, vec: Tensor, dist: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.save_for_backward(grad, vec, dist, *weights)
        found = call.encoder.backward(grad)
        ctx.number = call.encoder.num_gradients
        return found

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        grad, vec, dist, *weights = ctx.saved_tensors
        needs = kernels.needed(ctx)
        of_geometry = any(needs[2:4]) and not call.graph.inner
        is_last = ctx.number == call.encoder.num_gradients  # the arrays may be those of another gradient since
        if not torch.is_grad_enabled() and is_last and not of_geometry and not is_within_batch():
            change = call.encoder.tangent(*(x.contiguous() for x in grads))
            call.encoder.stamp = _current_run()
            return None, change, None, None, None, *(None for _ in weights)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x.view_as(x) for x in (grad, vec, dist)]
            if not again:
                inputs = [x.detach().requires_grad_() for x in inputs]
            slopes = torch.autograd.grad(
                call.by_layers(*inputs[1:]), inputs[1:], inputs[0], create_graph=True, allow_unused=True
            )
            parts = [(slope, given) for slope, given in zip(slopes, grads, strict=True) if slope is not None]
            of_grad, of_vec, of_dist, *found = torch.autograd.grad(
                [slope for slope, _ in parts],
                [*inputs, *weights],
                [given for _, given in parts],
                create_graph=again,
                allow_unused=True,
            )
        return None, of_grad, None, of_vec, of_dist, *found


def _current_run() -> int:
    """Which run of the autograd engine this is: what was prepared in another must not be used."""
    return torch._C._current_graph_task_id()


def _unpacked(ranges: np.ndarray, channels: int) -> Tensor:
    """The sum over what threads made side by side, (T, B, N, C, 2 lanes) -> (N, C, F)."""
    total = torch.from_numpy(ranges).sum(dim=0).permute(1, 2, 0, 3)
    return total.flatten(2)[:, :, :channels]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
