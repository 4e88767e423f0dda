"""Multi-layer perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.nn.activation import make_activation

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        hidden_channels: Width of every hidden layer.
        activation: Name of the activation.
        num_hidden_layers: Hidden layers beyond the first.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        activation: str,
        num_hidden_layers: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        act = make_activation(activation)
        layers: list[nn.Module] = [nn.Linear(in_channels, hidden_channels, dtype=dtype), act]
        for _ in range(num_hidden_layers):
            layers += [nn.Linear(hidden_channels, hidden_channels, dtype=dtype), act]
        layers.append(nn.Linear(hidden_channels, out_channels, dtype=dtype))
        self.layers = nn.Sequential(*layers)

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                layer.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
