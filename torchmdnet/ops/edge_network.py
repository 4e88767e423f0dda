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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from torchmdnet.graph import Graph
from torchmdnet.ops import kernels
from torchmdnet.ops.messages import RadialFilter, RadialPoints, gather_weight_sum, rows_of_edges
from torchmdnet.typing import AtomFeatures, AtomTensors, PairFeatures, PairScalars

__all__ = ["EdgeNetwork", "edge_network_sum", "edge_network_sum_plain"]

#: Edges of a block; a receiver is never divided.
BLOCK = 1536
#: Edges up to which what is hidden is kept for the way back.
KEPT = 40_000

_STARTS = np.array([0, 1, 4, 9])


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
            hidden = F.linear(self.activation(hidden), weight, bias)
        return self.activation(hidden)


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
    if not kernels.can_loop(X):
        return edge_network_sum_plain(X, radial, receiving, sending, envelope, network, graph)
    parameters = [tensor for layer in network.layers for tensor in layer]
    call = _Call(network.activation, graph)
    return _Sum.apply(call, X, radial, receiving, sending, envelope, *parameters)  # type: ignore[return-value]


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


class _Call(NamedTuple):
    """What is not differentiated."""

    activation: Callable[[Tensor], Tensor]
    graph: Graph

    def network(self, parameters: Sequence[Tensor]) -> EdgeNetwork:
        return EdgeNetwork(self.activation, list(zip(parameters[::2], parameters[1::2], strict=True)))

    def blocks(self) -> Iterator[_Block]:
        """Receivers with about :data:`BLOCK` edges at a time."""
        pairs = self.graph.pairs
        assert pairs is not None
        row_start, (i, j) = pairs.row_start.numpy(), self.graph.edge_index
        lower, num_atoms = 0, self.graph.num_atoms
        while lower < num_atoms:
            upper = int(np.searchsorted(row_start, row_start[lower] + BLOCK, side="right")) - 1
            upper = min(max(upper, lower + 1), num_atoms)
            edges = slice(int(row_start[lower]), int(row_start[upper]))
            yield _Block(lower, upper, pairs.of_edge[edges], i[edges], j[edges])
            lower = upper


class _Block(NamedTuple):
    """The edges of some receivers."""

    lower: int
    upper: int
    pair: Tensor
    receiver: Tensor
    sender: Tensor

    def hidden(self, radial: Tensor, receiving: Tensor, sending: Tensor) -> Tensor:
        hidden = radial.index_select(0, self.pair)
        hidden += receiving.index_select(0, self.receiver)
        hidden += sending.index_select(0, self.sender)
        return hidden


class _Made(NamedTuple):
    """What the network made of a block of edges."""

    hidden: Tensor  # what went in, (E, K)
    bare: Tensor  # weights without envelope, (E, 3 F)


def _make(
    call: _Call,
    block: _Block,
    radial: Tensor,
    receiving: Tensor,
    sending: Tensor,
    parameters: Sequence[Tensor],
    records: bool,
) -> _Made:
    """Run the network on a block of edges; with a history of its own if the way back will ask for it."""
    with torch.set_grad_enabled(records):
        hidden = block.hidden(radial.detach(), receiving.detach(), sending.detach()).requires_grad_(records)
        return _Made(hidden, call.network(parameters)(hidden))


class _Sum(Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        X: Tensor,
        radial: Tensor,
        receiving: Tensor,
        sending: Tensor,
        envelope: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(X, radial, receiving, sending, envelope, *parameters)
        out = torch.empty_like(X, memory_format=torch.contiguous_format)
        values, target, indices = _flat(X), _flat(out), _indices(call.graph)
        keeps = any(ctx.needs_input_grad) and call.graph.edge_index.shape[1] <= KEPT
        ctx.kept = []
        for block in call.blocks():
            made = _make(call, block, radial, receiving, sending, parameters, keeps)
            weight = made.bare.detach() * envelope.index_select(0, block.pair)[:, None]
            if keeps:
                ctx.kept.append(made)
            work = weight.numel() * 3
            rows = (weight.numpy(), values, *indices, block.lower, block.upper, _STARTS, target)
            kernels.edge_loops().own_rows_sum(work, *rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        X, radial, receiving, sending, envelope, *parameters = tensors = ctx.saved_tensors
        again, needs = torch.is_grad_enabled(), kernels.needed(ctx)
        if again:
            inputs = [tensor.view_as(tensor) for tensor in tensors]
            x, r, a, b, c, *rest = inputs
            made = edge_network_sum_plain(x, r, a, b, c, call.network(rest), call.graph)
            wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
            found = iter(torch.autograd.grad(made, wanted, grads[0], create_graph=True, allow_unused=True))
            return None, *(next(found) if need else None for need in needs)
        weights = [tensor for tensor, need in zip(parameters, needs[5:], strict=True) if need]
        of_X, of_radial, of_receiving, of_sending, of_envelope = (torch.zeros_like(tensor) for tensor in tensors[:5])
        of_weights = [torch.zeros_like(tensor) for tensor in weights]
        values, gradient, target, indices = _flat(X), _flat(grads[0]), _flat(of_X), _indices(call.graph)
        kept = iter(ctx.kept)
        for block in call.blocks():
            fade = envelope.index_select(0, block.pair)[:, None]
            made = next(kept, None)
            if made is None:
                made = _make(call, block, radial, receiving, sending, parameters, True)
            hidden, bare = made
            weight, of_weight = bare.detach() * fade, torch.empty_like(bare)
            rows = (weight.numpy(), gradient, values, *indices, block.lower, block.upper, _STARTS)
            kernels.edge_loops().own_rows_backward(*rows, target, of_weight.numpy())
            of_envelope.index_add_(0, block.pair, (of_weight * bare.detach()).sum(dim=1))
            of_hidden, *found = torch.autograd.grad(
                bare, [hidden, *weights], of_weight.mul_(fade), retain_graph=bool(ctx.kept)
            )
            of_radial.index_add_(0, block.pair, of_hidden)
            of_receiving.index_add_(0, block.receiver, of_hidden)
            of_sending.index_add_(0, block.sender, of_hidden)
            for total, part in zip(of_weights, found, strict=True):
                total += part
        of_parameters = iter(of_weights)
        rest = (next(of_parameters) if need else None for need in needs[5:])
        return None, of_X, of_radial, of_receiving, of_sending, of_envelope, *rest


def _indices(graph: Graph) -> tuple[Any, Any]:
    assert graph.pairs is not None
    return graph.edge_index[1].contiguous().numpy(), graph.pairs.row_start.numpy()


def _flat(X: Tensor) -> Any:
    return X.detach().contiguous().view(X.shape[0], -1).numpy()
