r"""Sums over neighbours whose weights come from a network on every edge, block by block.

.. math::
    M_i = \sum_j c(r_{ij})\, w_{ij} \odot X_j, \qquad
    w_{ij} = \sigma(W_n \cdots \sigma(W_2\, \sigma(h_{ij}) + b_2) \cdots + b_n), \qquad
    h_{ij} = R(r_{ij}) + A_i + B_j

Where weights depend on more than a distance they cannot be read from a grid. What is hidden in the network is then by
far the largest part of a calculation. It is made for a block of edges at a time, and unless there are few edges it is
made again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchmdnet.ops import kernels
from torchmdnet.ops.batched import one_by_one
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.kernels.activation import silu
from torchmdnet.ops.messages import RadialFilter, RadialPoints, gather_weight_sum, rows_of_edges
from torchmdnet.ops.workspace import Buffer, Places, Workspace
from torchmdnet.typing import AtomFeatures, AtomTensors, PairFeatures, PairScalars

if TYPE_CHECKING:
    from torchmdnet.graph import Graph

__all__ = ["EdgeInputs", "EdgeNetwork", "EdgeRun", "edge_network_sum", "edge_network_sum_plain"]

#: Edges of a block; a receiver is never divided.
BLOCK = 512
#: The same for each of several threads, which wait for each other after every loop.
SHARED = 2048
#: Edges up to which what is hidden is kept for the way back.
KEPT = 40_000
#: Groups of channels that each thread takes in turn in the backward pass: features in use then stay in the cache.
PORTIONS = 2


class EdgeNetwork(NamedTuple):
    """The network behind the weights of edges.

    Args:
        activation: :math:`\\sigma`.
        layers: Weight and bias of the layers 2 to n.
    """

    activation: Callable[[Tensor], Tensor]
    layers: Sequence[tuple[Tensor, Tensor]]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Weights of edges, (E, 3 F), from what goes into the first activation, (E, K)."""
        for weight, bias in self.layers:
            hidden = F.linear(self.activate(hidden), weight, bias)
        return self.activate(hidden)

    def activate(self, hidden: Tensor) -> Tensor:
        """The activation, by a twin if there is one."""
        if self.is_silu and kernels.has_cpu_loops(hidden, hidden.shape[-1]):
            return silu(hidden)
        return self.activation(hidden)

    @property
    def is_silu(self) -> bool:
        """Whether there are loops for the activation."""
        return isinstance(self.activation, torch.nn.SiLU) or self.activation is F.silu


def edge_network_sum(
    X: AtomTensors,
    radial: PairFeatures,
    receiving: AtomFeatures,
    sending: AtomFeatures,
    envelope: PairScalars,
    network: EdgeNetwork,
    graph: Graph,
) -> AtomTensors:
    """Sum the weighted features of neighbours.

    Args:
        X: Features, (N, 9, F).
        radial: R of each pair, (P, K).
        receiving: A of each atom, (N, K).
        sending: B of each atom, (N, K).
        envelope: c of each pair, (P,).
        network: What makes weights of the sum R + A + B.
        graph: Its edges.

    Returns:
        (N, 9, F). Derivatives higher than the first come from :func:`edge_network_sum_plain`.
    """
    if not kernels.has_cpu_loops(X, *(x.shape[-1] for x in (X, radial, *(bias for _, bias in network.layers)))):
        return edge_network_sum_plain(X, radial, receiving, sending, envelope, network, graph)
    tensors = [X, radial, receiving, sending, envelope, *(tensor for layer in network.layers for tensor in layer)]
    run = EdgeRun(network, graph, Workspace().begin(X.dtype))
    return _Sum.apply(run, network, *tensors)  # type: ignore[return-value]


def edge_network_sum_plain(
    X: AtomTensors,
    radial: PairFeatures,
    receiving: AtomFeatures,
    sending: AtomFeatures,
    envelope: PairScalars,
    network: EdgeNetwork,
    graph: Graph,
) -> AtomTensors:
    """The definition of :func:`edge_network_sum`, with all edges at once."""
    assert graph.pairs is not None
    (i, j), of_edge = graph.edge_index, graph.pairs.of_edge
    hidden = radial.index_select(0, of_edge) + receiving.index_select(0, i) + sending.index_select(0, j)
    weight = network(hidden).unflatten(1, (3, X.shape[2]))
    every = torch.arange(of_edge.shape[0], device=of_edge.device)
    points = RadialPoints(envelope.index_select(0, of_edge)[:, None], every)
    return gather_weight_sum(X, RadialFilter(weight, points), rows_of_edges(graph))


class _Rows(NamedTuple):
    """Some rows of numbers, for PyTorch and for the loops, and the buffer they lie in, which is held with them."""

    tensor: Tensor
    array: Any
    buffer: Buffer

    @classmethod
    def of(cls, buffer: Buffer) -> _Rows:
        return cls(buffer.tensor, buffer.array, buffer)

    def part(self, rows: slice) -> _Rows:
        return _Rows(self.tensor[rows], self.array[rows], self.buffer)

    def first(self, number: int) -> _Rows:
        return self.part(slice(number))

    def halves(self) -> tuple[_Rows, _Rows]:
        middle = self.array.shape[0] // 2
        return self.part(slice(middle)), self.part(slice(middle, None))


class _Silu:
    """SiLU of x + bias in compiled loops."""

    def value(self, x: _Rows, bias: _Rows, out: _Rows) -> None:
        loops.activation.silu(20 * x.array.size, x.array, bias.array, out.array)

    def both(self, x: _Rows, bias: _Rows, out: _Rows, out_slope: _Rows) -> None:
        loops.activation.silu_both(20 * x.array.size, x.array, bias.array, out.array, out_slope.array)

    def backward(self, x: _Rows, bias: _Rows, grad: _Rows, out: _Rows) -> None:
        loops.activation.silu_backward(20 * x.array.size, x.array, bias.array, grad.array, out.array)

    def tangent(self, x: _Rows, bias: _Rows, change: _Rows, *out: _Rows) -> None:
        self._run(loops.activation.silu_tangent, x, bias, change, *out)

    def bend(self, x: _Rows, bias: _Rows, change: _Rows, *out: _Rows) -> None:
        self._run(loops.activation.silu_bend, x, bias, change, *out)

    def reverse(self, x: _Rows, bias: _Rows, change: _Rows, *grads_and_out: _Rows) -> None:
        self._run(loops.activation.silu_reverse, x, bias, change, *grads_and_out)

    def _run(self, loop: Any, *rows: _Rows) -> None:
        loop(20 * rows[0].array.size, *(each.array for each in rows))


class _Activation:
    """Any activation of x + bias, and PyTorch's derivative of it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def value(self, x: _Rows, bias: _Rows, out: _Rows) -> None:
        out.tensor.copy_(self.function(x.tensor + bias.tensor))

    def both(self, x: _Rows, bias: _Rows, out: _Rows, out_slope: _Rows) -> None:
        with torch.enable_grad():
            shifted = (x.tensor + bias.tensor).requires_grad_()
            value = self.function(shifted)
            (slope,) = torch.autograd.grad(value, shifted, torch.ones_like(value))
        out.tensor.copy_(value.detach())
        out_slope.tensor.copy_(slope)

    def backward(self, x: _Rows, bias: _Rows, grad: _Rows, out: _Rows) -> None:
        self.both(x, bias, out, out)
        out.tensor.mul_(grad.tensor)

    def tangent(self, x: _Rows, bias: _Rows, change: _Rows, out: _Rows, out_change: _Rows) -> None:
        self.both(x, bias, out, out_change)
        out_change.tensor.mul_(change.tensor)

    def bend(
        self, x: _Rows, bias: _Rows, change: _Rows, out: _Rows, out_change: _Rows, out_slope: _Rows, out_bend: _Rows
    ) -> None:
        with torch.enable_grad():
            shifted = (x.tensor + bias.tensor).requires_grad_()
            value = self.function(shifted)
            (slope,) = torch.autograd.grad(value, shifted, torch.ones_like(value), create_graph=True)
            bend = torch.zeros_like(slope)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope, shifted, change.tensor)
        out.tensor.copy_(value.detach())
        out_slope.tensor.copy_(slope.detach())
        torch.mul(out_slope.tensor, change.tensor, out=out_change.tensor)
        out_bend.tensor.copy_(bend)

    def reverse(
        self,
        x: _Rows,
        bias: _Rows,
        change: _Rows,
        grad: _Rows,
        slope: _Rows,
        out: _Rows,
        out_change: _Rows,
        out_grad: _Rows,
        out_slope: _Rows,
    ) -> None:
        self.bend(x, bias, change, out, out_change, out_slope, out_grad)
        out_grad.tensor.mul_(slope.tensor).addcmul_(grad.tensor, out_slope.tensor)
        out_slope.tensor.mul_(slope.tensor)


class _Block(NamedTuple):
    """The edges of some receivers."""

    lower: int
    upper: int
    edges: slice

    @property
    def num_edges(self) -> int:
        return self.edges.stop - self.edges.start


class EdgeInputs(NamedTuple):
    """What a network on edges reads, apart from its weights, or gradients in these; tensors or arrays."""

    X: Any
    radial: Any
    receiving: Any
    sending: Any
    envelope: Any

    def arrays(self) -> EdgeInputs:
        return EdgeInputs(*(tensor.numpy() for tensor in self))


class EdgeRun:
    """A network on the edges of a graph, block by block.

    Args:
        network: Its weights are read without history.
        graph: Its edges.
        places: Where memory comes from.
    """

    def __init__(self, network: EdgeNetwork, graph: Graph, places: Places) -> None:
        assert graph.pairs is not None
        self.graph, self.places = graph, places
        self.activation = _Silu() if network.is_silu else _Activation(network.activation)
        self.weights = [weight.detach() for weight, _ in network.layers]
        biases = [torch.zeros_like(self.weights[0][0]), *(bias.detach().contiguous() for _, bias in network.layers)]
        self.biases = [_Rows.of(Buffer(bias)) for bias in biases]
        self.widths = [bias.array.size for bias in self.biases]
        self.pair, self.sender = graph.pairs.of_edge.numpy(), graph.edge_index[1].contiguous().numpy()
        self.row_start = graph.pairs.row_start.numpy()
        self.blocks = list(self._blocks())
        self.longest = max((block.num_edges for block in self.blocks), default=0)
        self.kept: list[_Rows] = []
        #: What goes into the activations, and its changes, if they are kept for training on forces.
        self.known: list[_Rows] = []
        self.changed: list[_Rows] = []

    def _blocks(self) -> Iterator[_Block]:
        """Receivers with about :data:`BLOCK` edges at a time."""
        lower, num_atoms, threads = 0, self.graph.num_atoms, kernels.cores.count()
        size = BLOCK if threads == 1 else SHARED * threads
        while lower < num_atoms:
            upper = int(np.searchsorted(self.row_start, self.row_start[lower] + size, side="right")) - 1
            upper = min(max(upper, lower + 1), num_atoms)
            yield _Block(lower, upper, slice(int(self.row_start[lower]), int(self.row_start[upper])))
            lower = upper

    def _where(self, block: _Block) -> tuple[Any, ...]:
        return self.pair, self.sender, self.row_start, block.lower, block.upper

    def _acquire(self, num_edges: int, widths: Sequence[int]) -> list[_Rows]:
        """Memory for rows of these widths, which returns with the last reference to it."""
        return [_Rows.of(self.places.empty(num_edges, width)) for width in widths]

    def _join(self, block: _Block, inputs: EdgeInputs, out: _Rows) -> None:
        joined = (inputs.radial, inputs.receiving, inputs.sending)
        loops.edge_network.join(3 * out.array.size, *joined, *self._where(block), out.array)

    def _layers(self, before: list[_Rows], after: list[_Rows], slopes: list[_Rows]) -> None:
        """Fill what goes into all activations but the first, and what comes out of all but the last.

        Their slopes too if there is room for them.
        """
        for k, weight in enumerate(self.weights):
            if slopes:
                self.activation.both(before[k], self.biases[k], after[k], slopes[k])
            else:
                self.activation.value(before[k], self.biases[k], after[k])
            torch.mm(after[k].tensor, weight.t(), out=before[k + 1].tensor)

    def _before(self, block: _Block, known: list[_Rows], room: list[_Rows]) -> list[_Rows]:
        """What goes into the activations of a block, where it is known, or where it will be."""
        return [rows.part(block.edges) for rows in known] or [rows.first(block.num_edges) for rows in room]

    def forward(self, inputs: EdgeInputs, keeps: bool, trains: bool = False) -> Tensor:
        """The sums.

        Slopes of the activations and what goes into the last one are kept for :meth:`backward` if there is a use; for
        :meth:`tangent` and :meth:`reverse` what goes into all of them.
        """
        inputs, out = inputs.arrays(), torch.empty_like(inputs.X)
        target = out.numpy()
        self.kept = self._acquire(self.pair.shape[0], self.widths) if keeps and not trains else []
        self.known = self._acquire(self.pair.shape[0], self.widths) if keeps and trains else []
        rooms = [self._acquire(self.longest, self.widths) for _ in range(1 if self.known else 2)]
        for block in self.blocks:
            before, after = self._before(block, self.known, rooms[-1]), [r.first(block.num_edges) for r in rooms[0]]
            *slopes, before[-1] = [rows.part(block.edges) for rows in self.kept] or [before[-1]]
            self._join(block, inputs, before[0])
            self._layers(before, after, slopes)
            weight = after[-1]
            self.activation.value(before[-1], self.biases[-1], weight)
            arrays = (weight.array, inputs.envelope, inputs.X, *self._where(block), target)
            loops.edge_network.message(3 * weight.array.size, *arrays)
        return out

    def backward(self, inputs: EdgeInputs, grad: Tensor, of_weights: bool) -> tuple[EdgeInputs, list[Tensor]]:
        """Gradients in what went in, and if asked for in weights and biases, layer by layer."""
        found = EdgeInputs(*(torch.zeros_like(x) for x in inputs))
        of_network = self._zeros() if of_weights else []
        groups = PORTIONS * kernels.cores.count()
        O, inputs, out = grad.numpy(), inputs.arrays(), found.arrays()
        per_edge = np.empty((groups, self.longest), O.dtype)
        rooms = [self._acquire(self.longest, self.widths) for _ in range(2 if self.known else 3)]
        kept = [] if of_weights else self.kept
        for block in self.blocks:
            after, grads = ([rows.first(block.num_edges) for rows in room] for room in rooms[:2])
            before = self._before(block, self.known, rooms[-1])
            *slopes, before[-1] = [rows.part(block.edges) for rows in kept] or [before[-1]]
            if not (kept or self.known):
                self._join(block, inputs, before[0])
                self._layers(before, after, [])
            weight, g, along = after[-1], grads[-1], per_edge[:, : block.num_edges]
            self.activation.both(before[-1], self.biases[-1], weight, g)
            arrays = (weight.array, g.array, inputs.envelope, O, inputs.X, *self._where(block), out.X, g.array, along)
            loops.edge_network.message_backward(9 * weight.array.size, *arrays)
            loops.edge_network.add_along(along, self.pair, block.edges.start, out.envelope)
            for k in reversed(range(len(self.weights))):
                if of_weights:
                    self.activation.value(before[k], self.biases[k], after[k])
                    of_network[2 * k].addmm_(g.tensor.t(), after[k].tensor)
                    of_network[2 * k + 1] += g.tensor.sum(dim=0)
                torch.mm(g.tensor, self.weights[k], out=after[k].tensor)
                g = grads[k]
                if kept:
                    torch.mul(after[k].tensor, slopes[k].tensor, out=g.tensor)
                else:
                    self.activation.backward(before[k], self.biases[k], after[k], g)
            arrays = (g.array, *self._where(block), groups, out.radial, out.receiving, out.sending)
            loops.edge_network.join_backward(3 * g.array.size, *arrays)
        return found, of_network

    def _zeros(self) -> list[Tensor]:
        """Gradients in weights and biases, to be added to."""
        layers = zip(self.weights, (bias.tensor for bias in self.biases[1:]), strict=True)
        return [torch.zeros_like(x) for layer in layers for x in layer]

    # -------------------------------------------------------------------------- a direction of change, for training

    def tangent(self, inputs: EdgeInputs, changes: EdgeInputs) -> Tensor:
        """How the sums change with what goes in."""
        inputs, moves, out = inputs.arrays(), changes.arrays(), torch.empty_like(inputs.X)
        target = out.numpy()
        self.changed = self._acquire(self.pair.shape[0], self.widths) if self.known else []
        rooms = [self._acquire(self.longest, self.widths) for _ in range(2 if self.known else 4)]
        for block in self.blocks:
            after, after_change = ([rows.first(block.num_edges) for rows in room] for room in rooms[:2])
            before = self._before(block, self.known, rooms[-2])
            change = self._before(block, self.changed, rooms[-1])
            self._ahead(block, inputs, moves, before, change, after, after_change)
            weight, moved = after[-1], after_change[-1]
            self.activation.tangent(before[-1], self.biases[-1], change[-1], weight, moved)
            arrays = (weight.array, moved.array, inputs.envelope, moves.envelope, inputs.X, moves.X)
            work = 6 * weight.array.size
            loops.edge_network.message_tangent(work, *arrays, *self._where(block), target)
        return out

    def _ahead(
        self,
        block: _Block,
        inputs: EdgeInputs,
        moves: EdgeInputs,
        before: list[_Rows],
        change: list[_Rows],
        after: list[_Rows],
        after_change: list[_Rows],
    ) -> None:
        """Fill what goes into the activations of a block, unless it is known, and how that changes."""
        if not self.known:
            self._join(block, inputs, before[0])
        self._join(block, moves, change[0])
        for k, weight in enumerate(self.weights):
            if self.known:
                self.activation.backward(before[k], self.biases[k], change[k], after_change[k])
            else:
                self.activation.tangent(before[k], self.biases[k], change[k], after[k], after_change[k])
                torch.mm(after[k].tensor, weight.t(), out=before[k + 1].tensor)
            torch.mm(after_change[k].tensor, weight.t(), out=change[k + 1].tensor)

    def reverse(
        self, inputs: EdgeInputs, changes: EdgeInputs, grad: Tensor, slope: Tensor
    ) -> tuple[EdgeInputs, list[Tensor]]:
        r"""Gradients of :math:`O \cdot M + dO \cdot dM` in what went in and in weights and biases, layer by layer.

        That in the envelope is none's business and stays zero.

        With z and dz for what goes into an activation, u and du for what comes out of the one before it, and a bar for
        gradients in values, a hat for those in changes,

        .. math::
            \bar z = \sigma'(z)\, \bar u + \sigma''(z)\, dz\, \hat u, \qquad
            \hat z = \sigma'(z)\, \hat u, \qquad
            \bar W = \bar z\, u^T + \hat z\, du^T.

        The rows of gradients in changes stand behind those in values, so that one product serves both.
        """
        found, of_network = EdgeInputs(*(torch.zeros_like(x) for x in inputs)), self._zeros()
        groups = PORTIONS * kernels.cores.count()
        O, dO, inputs, moves, out = grad.numpy(), slope.numpy(), inputs.arrays(), changes.arrays(), found.arrays()
        rooms = [self._acquire(2 * self.longest, self.widths) for _ in range(2)]
        products = self._acquire(2 * self.longest, self.widths[:-1])
        hidden = [] if self.known else [self._acquire(self.longest, self.widths) for _ in range(2)]
        for block in self.blocks:
            after, grads = ([rows.first(2 * block.num_edges) for rows in room] for room in rooms)
            before = self._before(block, self.known, hidden[0] if hidden else [])
            change = self._before(block, self.changed, hidden[1] if hidden else [])
            if hidden:
                values, moved = ([rows.halves()[half] for rows in after] for half in (0, 1))
                self._ahead(block, inputs, moves, before, change, values, moved)
            (weight, moved), (g, along) = after[-1].halves(), grads[-1].halves()
            self.activation.bend(before[-1], self.biases[-1], change[-1], weight, moved, along, g)
            arrays = (weight.array, moved.array, inputs.envelope, moves.envelope, O, dO, inputs.X, moves.X)
            found_here = (along.array, g.array, out.X, g.array, along.array)
            where, work = self._where(block), 18 * weight.array.size
            loops.edge_network.message_reverse(work, *arrays, *where, groups, *found_here)
            for k in reversed(range(len(self.weights))):
                given, product = grads[k + 1].tensor, products[k].first(2 * block.num_edges)
                torch.mm(given, self.weights[k], out=product.tensor)
                parts = [half for rows in (product, after[k], grads[k]) for half in rows.halves()]
                self.activation.reverse(before[k], self.biases[k], change[k], *parts)
                of_network[2 * k].addmm_(given.t(), after[k].tensor)
                of_network[2 * k + 1] += given[: block.num_edges].sum(dim=0)
            g, _ = grads[0].halves()
            arrays = (g.array, *self._where(block), groups, out.radial, out.receiving, out.sending)
            loops.edge_network.join_backward(3 * g.array.size, *arrays)
        return found, of_network


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, run: EdgeRun, network: EdgeNetwork, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.network = run, network._replace(layers=())
        ctx.save_for_backward(*tensors)
        inputs = EdgeInputs(*(tensor.detach().contiguous() for tensor in tensors[:5]))
        return run.forward(inputs, any(ctx.needs_input_grad) and run.pair.shape[0] <= KEPT)

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        run: EdgeRun = ctx.run
        tensors, needs = ctx.saved_tensors, kernels.needed(ctx)
        needs = needs[-len(tensors) :]
        if torch.is_grad_enabled():
            inputs = [tensor.view_as(tensor) for tensor in tensors]
            network = ctx.network._replace(layers=list(zip(inputs[5::2], inputs[6::2], strict=True)))
            made = edge_network_sum_plain(*inputs[:5], network, run.graph)  # type: ignore[arg-type]
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(made, wanted, grads[0], create_graph=True, allow_unused=True))
            return None, None, *(next(found) if need else None for need in needs)
        inputs = EdgeInputs(*(tensor.detach().contiguous() for tensor in tensors[:5]))
        of_inputs, of_network = run.backward(inputs, grads[0].contiguous(), any(needs[5:]))
        return None, None, *of_inputs, *(of_network or [None] * len(tensors[5:]))
