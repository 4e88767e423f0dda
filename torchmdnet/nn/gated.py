"""Scalars and vectors that gate each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.mlp import MLP
from torchmdnet.nn.modules import reset_all, xavier_all
from torchmdnet.ops.norms import length
from torchmdnet.typing import AtomFeatures, AtomVectors

__all__ = ["GatedEquivariantBlock"]


class GatedEquivariantBlock(nn.Module):
    r"""Gated equivariant block (PaiNN, Schütt et al., ICML 2021; after Weiler et al. 2018).

    .. math:: [x' \| g] = \mathrm{MLP}[x \| |W_1 v|], \qquad v' = g \odot W_2 v

    An atom whose projected vectors all vanish, such as an isolated one, has length zero without a gradient.

    Args:
        hidden_channels: Channels coming in (F).
        out_channels: Channels going out (F').
        intermediate_channels: Hidden width of the MLP; ``hidden_channels`` by default.
        activation: Activation function.
        scalar_activation: Whether the scalars going out pass through the activation.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        hidden_channels: int,
        out_channels: int,
        intermediate_channels: int | None = None,
        activation: str = "silu",
        scalar_activation: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.vec1_proj = nn.Linear(hidden_channels, hidden_channels, bias=False, dtype=dtype)
        self.vec2_proj = nn.Linear(hidden_channels, out_channels, bias=False, dtype=dtype)
        self.update_net = MLP(
            in_channels=2 * hidden_channels,
            out_channels=2 * out_channels,
            hidden_channels=hidden_channels if intermediate_channels is None else intermediate_channels,
            activation=activation,
            dtype=dtype,
        )
        self.act = make_activation(activation) if scalar_activation else None

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        xavier_all(self.vec1_proj, self.vec2_proj)
        reset_all(self.update_net)

    def forward(self, x: AtomFeatures, v: AtomVectors) -> tuple[Tensor, Tensor]:
        """(N, F) and (N, 3, F) -> (N, F') and (N, 3, F')."""
        norm = length(self.vec1_proj(v), dim=1)  # (N, F)
        x, gate = self.update_net(torch.cat([x, norm], dim=-1)).split(self.out_channels, dim=-1)
        v = gate[:, None] * self.vec2_proj(v)  # (N, 3, F')
        return x if self.act is None else self.act(x), v
