"""A scalar that is a sum over atoms, such as the energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.nn.mlp import MLP
from torchmdnet.nn.modules import is_plain

__all__ = ["Scalar"]


class Scalar(OutputModel):
    r"""Sum of a scalar from each atom, :math:`y = \sum_i \mathrm{MLP}(x_i)`.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        allow_prior_model: Whether priors may be added.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
        num_layers: Hidden layers of the MLP beyond the first.
    """

    needs_positions = False

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        allow_prior_model: bool = True,
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
        num_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(allow_prior_model=allow_prior_model, reduce_op=reduce_op, static_shapes=static_shapes)
        self.output_network = MLP(
            in_channels=hidden_channels,
            out_channels=1,
            hidden_channels=max(hidden_channels // 2, 1),
            activation=activation,
            num_hidden_layers=num_layers,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.output_network.reset_parameters()

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Energy of each atom, (N, 1)."""
        return self.output_network(features.x)

    @property
    def has_slope(self) -> bool:
        """See :class:`torchmdnet.heads.base.OutputModel`."""
        return is_plain(self.output_network, MLP) and type(self) is Scalar and self.output_network.has_slope

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`torchmdnet.heads.base.OutputModel`."""
        return self.output_network.value_and_slope(x)
