"""TorchMD-GN: continuous-filter convolutions on invariant features, SchNet with a wider choice of parts."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.graph import Graph
from torchmdnet.models.base import Features
from torchmdnet.models.embedded import EmbeddedRepresentation
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all, xavier_all
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.ops import kernels
from torchmdnet.ops.kernels.work import lanes_of
from torchmdnet.ops.scatter import scatter
from torchmdnet.tape.steps import Add, Message, activation, linear
from torchmdnet.tape.tape import Definitions, Step
from torchmdnet.typing import PairFeatures

__all__ = ["CFConv", "InteractionBlock", "TorchMD_GN"]

Aggregation = Literal["add", "mean", "max", "average", "maximum"]
AGGREGATIONS = ("add", "mean", "max", "average", "maximum")


class TorchMD_GN(EmbeddedRepresentation):
    r"""Graph network (TorchMD, Doerr et al., JCTC 2021; after SchNet, Schütt et al., NeurIPS 2017).

    Atoms start from an embedding of their element, optionally mixed with those around it, and are refined by
    interaction blocks,

    .. math:: x_i \leftarrow x_i + W \sigma(W_2 \sum_j w(r_{ij}) \odot W_1 x_j + b_2) + b.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_filters: Channels of the messages.
        num_layers: Interaction blocks.
        num_rbf: Radial basis functions per edge (K).
        rbf_type: Kind of radial basis.
        trainable_rbf: Whether the radial basis is trained.
        activation: Activation function.
        neighbor_embedding: Whether the first features know the elements around the atom.
        cutoff_lower: Edges are at least this long, in Å.
        cutoff_upper: Edges are shorter than this, in Å.
        max_z: Rows of the element embedding; atomic numbers are below this.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        aggr: How messages are gathered. The established ``mean`` divides by one more than their number and ``max`` is
            at least zero; ``average`` and ``maximum`` are exact. See :func:`torchmdnet.ops.scatter.scatter`.
        dtype: Precision of the weights.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        system_embedding: What each atom is told of its system beside its element: ``none``, ``charge``, ``spin`` or
            ``charge+spin``; see :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.

    Raises:
        ConfigError: For an unknown ``rbf_type``, ``activation`` or ``aggr``.
    """

    can_be_repeated = True

    def __init__(
        self,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_layers: int = 6,
        num_rbf: int = 50,
        rbf_type: str = "expnorm",
        trainable_rbf: bool = True,
        activation: str = "silu",
        neighbor_embedding: bool = True,
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 5.0,
        max_z: int = 100,
        max_num_neighbors: int = 32,
        aggr: Aggregation = "add",
        dtype: torch.dtype = torch.float32,
        box_vecs: Tensor | None = None,
        system_embedding: str = "none",
    ) -> None:
        super().__init__(
            hidden_channels=hidden_channels,
            num_layers=num_layers,
            num_rbf=num_rbf,
            rbf_type=rbf_type,
            trainable_rbf=trainable_rbf,
            activation=activation,
            neighbor_embedding=neighbor_embedding,
            cutoff_lower=cutoff_lower,
            cutoff_upper=cutoff_upper,
            max_z=max_z,
            max_num_neighbors=max_num_neighbors,
            loop=False,
            box_vecs=box_vecs,
            dtype=dtype,
            basis_dtype=dtype,
        )
        if aggr not in AGGREGATIONS:
            raise ConfigError(
                f"aggr: {aggr!r} is not available.{did_you_mean(aggr, AGGREGATIONS)} "
                f"Choose from {', '.join(AGGREGATIONS)}."
            )
        self.num_filters = num_filters
        self.aggr = aggr
        self.interactions = nn.ModuleList(
            InteractionBlock(
                hidden_channels=hidden_channels,
                num_rbf=num_rbf,
                num_filters=num_filters,
                activation=activation,
                aggr=aggr,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_all(self.system_embedding)

    @property
    def layers_with_functions(self) -> list[tuple[Any, RadialFunction]]:
        """See :class:`torchmdnet.models.embedded.EmbeddedRepresentation`."""
        return [(block, RadialFunction(block.conv, "radial")) for block in cast(Any, self.interactions)]

    def fits_loops(self, weight: Tensor) -> bool:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        lanes, widths = lanes_of(weight.element_size()), (self.hidden_channels, self.num_filters)
        return self.aggr == "add" and kernels.has_cpu_loops(weight, *widths) and all(F % lanes == 0 for F in widths)

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        x = self.embedded(tape, graph)  # (N, F)
        for block, function in self.layers_with_functions:
            conv = block.conv
            y = tape(linear(conv.lin1), x)  # (N, num_filters)
            y = tape(Message(function) if self.aggr == "add" else _Gather(function, self.aggr), y)
            y = tape(activation(block.act), tape(linear(conv.lin2), y))  # (N, F)
            x = tape(Add(), x, tape(linear(block.lin), y))
        return Features(x)


class InteractionBlock(nn.Module):
    r"""One refinement of the features, :math:`\Delta x = W \sigma(\mathrm{CFConv}(x)) + b`.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_rbf: Radial basis functions per edge (K).
        num_filters: Channels of the messages.
        activation: Activation function.
        aggr: How messages are gathered.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        *,
        hidden_channels: int,
        num_rbf: int,
        num_filters: int,
        activation: str,
        aggr: Aggregation = "add",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        # the filter network is stored under the block and under the convolution: files hold its weights twice
        self.mlp = nn.Sequential(
            nn.Linear(num_rbf, num_filters, dtype=dtype),
            make_activation(activation),
            nn.Linear(num_filters, num_filters, dtype=dtype),
        )
        self.conv = CFConv(
            in_channels=hidden_channels,
            out_channels=hidden_channels,
            num_filters=num_filters,
            net=self.mlp,
            aggr=aggr,
            dtype=dtype,
        )
        self.act = make_activation(activation)
        self.lin = nn.Linear(hidden_channels, hidden_channels, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        xavier_all(self.mlp[0], self.mlp[2])
        self.conv.reset_parameters()
        xavier_all(self.lin)


class CFConv(nn.Module):
    r"""Continuous-filter convolution (SchNet, Schütt et al. 2017).

    .. math:: y_i = W_2 \operatorname{agg}_j C(r_{ij})\, \mathrm{net}(\phi(r_{ij})) \odot W_1 x_j + b_2

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        num_filters: Channels of the messages.
        net: Network from the radial basis to the filter.
        aggr: How messages are gathered.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        num_filters: int,
        net: nn.Sequential,
        aggr: Aggregation = "add",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.lin1 = nn.Linear(in_channels, num_filters, bias=False, dtype=dtype)
        self.lin2 = nn.Linear(num_filters, out_channels, dtype=dtype)
        self.net = net
        self.aggr = aggr
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases; the filter network belongs to the block."""
        xavier_all(self.lin1, self.lin2)

    def radial(self, rbf: PairFeatures) -> Tensor:
        """The filter, a function of distance alone: (P, K) -> (P, 1, num_filters)."""
        return self.net(rbf)[:, None]


class _Gather(Step):
    """Messages that are reduced in another way than added up.

    Args:
        function: Their radial filter.
        aggr: See :func:`torchmdnet.ops.scatter.scatter`.
    """

    reads_geometry = True

    def __init__(self, function: RadialFunction, aggr: str) -> None:
        self.function, self.aggr = function, aggr

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        i, j = at.graph.edge_index
        weight = at.radial(self.function).rows()[:, 0].index_select(0, at.edges.row)  # (E, num_filters)
        message = weight * inputs[0].index_select(0, j)
        return scatter(message, i, dim=0, dim_size=at.graph.num_atoms, reduce=self.aggr)
