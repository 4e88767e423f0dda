"""Several architectures of one kind, evaluated in one batched call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from torchmdnet.graph import Graph, Pairs
from torchmdnet.models.base import Features, Representation
from torchmdnet.tracing import device_kind

__all__ = ["Stack", "find_same_edges"]

#: Edges of all members together up to which one batched call beats one call for each. Small systems cost calls, larger
#: ones arithmetic, and the compiled loops of single calls do that better (benchmarks/ensembles.py, on a CPU).
BATCHED_EDGES = {"cpu": 250}


def find_same_edges(models: Sequence[nn.Module]) -> bool:
    """Whether the graph of one of these architectures is the graph of all."""
    first, *others = models
    return isinstance(first, Representation) and all(
        isinstance(other, Representation)
        and (first.cutoff_lower, first.cutoff_upper, first.distance.loop, first.max_z)
        == (other.cutoff_lower, other.cutoff_upper, other.distance.loop, other.max_z)
        and first.distance.box.shape == other.distance.box.shape
        and torch.equal(first.distance.box, other.distance.box)
        for other in others
    )


def _kind(model: nn.Module) -> list[Any]:
    """Everything about a model but the values of its weights."""
    plain = (int, float, str, bool, type(None))
    return [
        (type(part), {k: v for k, v in vars(part).items() if isinstance(v, plain) and k != "training"})
        for part in model.modules()
    ] + [(name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in model.state_dict().items()]


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, graph: Graph) -> Features:
        return self.model.encode(graph)  # type: ignore[operator]


class Stack:
    """The weights of several architectures, stacked, for as long as they do not change.

    Args:
        models: At least two architectures.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self.models = models
        kinds = [_kind(model) for model in models]
        self.can_run = all(kind == kinds[0] for kind in kinds)
        self.stamp: Any = None

    def wants(self, graph: Graph) -> bool:
        """Whether this graph is small enough for a batched call to be quicker."""
        edges = len(self.models) * graph.edge_index.shape[1]
        return self.can_run and 0 < edges <= BATCHED_EDGES.get(device_kind(graph.pos), 0)

    def encode(self, graph: Graph, copies: Sequence[Graph]) -> list[Features]:
        """Features of every member on its copy of the graph, whose edges it may have moved."""
        self._refresh()
        pairs = graph.pairs
        assert pairs is not None

        def features(weights: Any, buffers: Any, vec: Tensor, dist: Tensor, pair_dist: Tensor) -> Any:
            moved = graph._replace(edge_vec=vec, edge_dist=dist, pairs=pairs._replace(dist=pair_dist))
            found = functional_call(self.base, (weights, buffers), (moved,))
            return {name: value for name, value in found._asdict().items() if value is not None}

        geometry = [(moved.edge_vec, moved.edge_dist, cast(Pairs, moved.pairs).dist) for moved in copies]
        stacked = (torch.stack(values) for values in zip(*geometry, strict=True))
        found = vmap(features)(self.weights, self.buffers, *stacked)
        return [Features(**{name: value[m] for name, value in found.items()}) for m in range(len(self.models))]

    def _refresh(self) -> None:
        tensors = [tensor for model in self.models for tensor in (*model.parameters(), *model.buffers())]
        stamp = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if stamp == self.stamp:
            return
        self.kept = [tensor.detach() for tensor in tensors]  # so that no other comes to have its address
        weights, self.buffers = stack_module_state([_Encoder(model) for model in self.models])  # type: ignore[arg-type]
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.base = copy.deepcopy(_Encoder(self.models[0])).to("meta").eval()
        self.stamp = stamp
