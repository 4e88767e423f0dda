"""A graph network whose convolutions run in NNPOps, for the dynamics of one molecule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph, bare_graph
from torchmdnet.models.base import Features, guarded
from torchmdnet.models.torchmd_gn import TorchMD_GN
from torchmdnet.neighbors import can_check, check_finite, not_a_number
from torchmdnet.nn.activation import ShiftedSoftplus
from torchmdnet.potential import TorchMD_Net
from torchmdnet.typing import AtomFeatures, AtomicNumbers, AtomVectors, Boxes, Positions, SystemIndex, SystemScalars

__all__ = ["TorchMD_GN_optimized", "optimize"]


def optimize(model: TorchMD_Net) -> TorchMD_Net:
    """Put an NNPOps implementation in the place of a potential's graph network.

    Args:
        model: A potential with a graph network; it is changed and returned.

    Raises:
        TypeError: If ``model`` is no potential.
        ValueError: If the architecture, or one of its options, is not supported.
        ImportError: If NNPOps is not installed.
    """
    if not isinstance(model, TorchMD_Net):
        raise TypeError(f"optimize takes a TorchMD_Net, not {type(model).__name__}.")
    if not isinstance(model.representation_model, TorchMD_GN):
        raise ValueError(
            f"optimize supports model: graph-network, not {type(model.representation_model).__name__}. "
            "Other architectures need no such step."
        )
    model.representation_model = TorchMD_GN_optimized(model.representation_model)
    return model


class TorchMD_GN_optimized(nn.Module):
    """A :class:`torchmdnet.models.torchmd_gn.TorchMD_GN` with convolutions from NNPOps (Eastman et al.).

    It takes one system without a box at a time.

    Args:
        model: The graph network; Gaussian basis that is not trained, ``ssp`` activation, summed messages, no neighbour
            embedding, no lower cutoff.

    Raises:
        ValueError: If an option of the graph network is not supported.
        ImportError: If NNPOps is not installed.
    """

    head_prefix = ""

    def __init__(self, model: TorchMD_GN) -> None:
        super().__init__()
        _check_options(model)
        try:
            from NNPOps.CFConv import CFConv  # pyright: ignore[reportMissingImports]
            from NNPOps.CFConvNeighbors import CFConvNeighbors  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "optimize needs NNPOps, which is not installed. Run 'conda install -c conda-forge nnpops'."
            ) from error
        self.model = model
        self.cutoff_upper = model.cutoff_upper
        self.neighbors = CFConvNeighbors(model.cutoff_upper)
        offset: Tensor = model.distance_expansion.get_buffer("offset")
        self.convs = nn.ModuleList(
            CFConv(
                gaussianWidth=float(offset[1] - offset[0]),
                activation="ssp",
                weights1=block.get_parameter("mlp.0.weight").detach().T,
                biases1=block.get_parameter("mlp.0.bias").detach(),
                weights2=block.get_parameter("mlp.2.weight").detach().T,
                biases2=block.get_parameter("mlp.2.bias").detach(),
            )
            for block in model.interactions
        )

    def __repr__(self) -> str:
        return f"Optimized: {self.model!r}"

    def reset_parameters(self) -> None:
        """Initialize all weights; the convolutions keep the filters they were made with."""
        self.model.reset_parameters()

    def graph(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        *,
        num_systems: int | None = None,
        extra: dict[str, Tensor] | None = None,
    ) -> Graph:
        """Atoms without edges: NNPOps finds its own.

        Raises:
            ValueError: If there is a box or more than one system, or a position is not finite.
        """
        self.model.check_elements(z)
        if box is not None and bool(box.any()):
            raise ValueError("The optimized graph network takes no box. Use the model as it was before optimize().")
        if batch is not None and bool((batch != 0).any()):
            raise ValueError("The optimized graph network takes one system at a time. Pass batch of zeros, or none.")
        check_finite("pos", pos, "atom")
        graph = bare_graph(z, pos, torch.zeros_like(z), extra=extra, num_systems=1)
        return graph._replace(guard=None if can_check(pos) else not_a_number(pos, graph.batch, 1))

    def encode(self, graph: Graph) -> Features:
        """Features of every atom."""
        self.neighbors.build(graph.pos)
        x = self.model.embedding(graph.z)  # (N, F)
        block: Any
        for block, conv in zip(self.model.interactions, self.convs, strict=True):
            message = conv(self.neighbors, graph.pos, block.conv.lin1(x))  # (N, num_filters)
            x = x + block.lin(block.act(block.conv.lin2(message)))
        return Features(x)

    def select(self, features: Features, graph: Graph) -> tuple[Features, Graph]:
        """All atoms."""
        return guarded(features, graph), graph

    def forward(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
    ) -> tuple[AtomFeatures, AtomVectors | None, AtomicNumbers, Positions, SystemIndex]:
        """The established call; see :meth:`torchmdnet.models.base.Representation.forward`."""
        graph = self.graph(z, pos, batch, box, q, s)
        features, graph = self.select(self.encode(graph), graph)
        return features.x, None, graph.z, graph.pos, graph.batch


def _check_options(model: TorchMD_GN) -> None:
    offset: Any = getattr(model.distance_expansion, "offset", None)
    wanted = {
        "rbf_type: gauss": model.rbf_type == "gauss",
        "trainable_rbf: false": not isinstance(offset, nn.Parameter),
        "activation: ssp": all(isinstance(block.act, ShiftedSoftplus) for block in model.interactions),
        "neighbor_embedding: false": model.neighbor_embedding is None,
        "cutoff_lower: 0": model.cutoff_lower == 0,
        "aggr: add": model.aggr == "add",
    }
    unmet = [option for option, is_met in wanted.items() if not is_met]
    if unmet:
        raise ValueError(f"NNPOps supports only graph networks with {', '.join(wanted)}; this one differs in {unmet}.")
