"""A scalar of each atom."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.nn.mlp import MLP

__all__ = ["AtomScalar"]


class AtomScalar(OutputModel):
    r"""Any scalar of each atom, :math:`y_i = \mathrm{MLP}(x_i)`, (N, 1): chemical shifts, volumes, spin populations.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        dtype: Precision of the weights.
        num_layers: Hidden layers of the MLP beyond the first.
    """

    per_atom_output = True
    can_standardize = False
    needs_positions = False

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        dtype: torch.dtype = torch.float32,
        num_layers: int = 0,
    ) -> None:
        super().__init__(allow_prior_model=False)
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
        """Value of each atom, (N, 1)."""
        return self.output_network(features.x)
