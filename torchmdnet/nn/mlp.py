"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.modules import is_plain
from torchmdnet.ops import kernels
from torchmdnet.ops.kernels import loops

__all__ = ["MLP", "SiluLayers"]


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

    @property
    def has_slope(self) -> bool:
        """Whether :meth:`value_and_slope` can be asked."""
        layers: list[Any] = [*self.layers]
        kinds = [nn.SiLU if k % 2 else nn.Linear for k in range(len(layers))]
        return layers[-1].out_features == 1 and all(map(is_plain, [self.layers, *layers], [nn.Sequential, *kinds]))

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The one output and its derivative, without history: (N, F) -> (N, 1), (N, F)."""
        linears: list[Any] = [*self.layers][::2]
        if _few(x, linears):
            return _value_and_slope_of_few(x, linears)
        *hidden, (weight, bias) = [(linear.weight, linear.bias) for linear in linears]
        layers = SiluLayers(hidden)
        with torch.no_grad():
            y = F.linear(layers.forward(x), weight, bias)  # (N, 1)
            return y, layers.backward(weight.expand(x.shape[0], -1))


def _few(x: Tensor, linears: Sequence[Any]) -> bool:
    """Whether compiled loops take rows and layers, and are quicker than PyTorch."""
    widths = [linear.in_features for linear in linears]
    return kernels.has_cpu_loops(x, *widths) and loops.dense.takes(x.shape[0], x.element_size(), *widths)


def _value_and_slope_of_few(x: Tensor, linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """:meth:`MLP.value_and_slope` in compiled loops."""
    num, dense = x.shape[0], loops.dense
    y, before = x.detach().contiguous().numpy(), []
    *hidden, (last, shift) = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linears]
    none = np.zeros(max(len(weight) for weight, _ in hidden), y.dtype)
    for weight, bias in hidden:
        made = np.empty((num, len(weight)), y.dtype)
        dense.linear(y.size * len(weight), y, np.ascontiguousarray(weight.T), bias, made)
        before.append(made)
        y = np.empty_like(made)
        loops.activation.silu(20 * y.size, made, none[: y.shape[1]], y)
    out, grad = y @ last.T + shift, np.repeat(last, num, axis=0)
    for (weight, _), made in zip(hidden[::-1], before[::-1], strict=True):
        of_silu, below = np.empty_like(grad), np.empty((num, weight.shape[1]), grad.dtype)
        loops.activation.silu_backward(20 * grad.size, made, none[: grad.shape[1]], grad, of_silu)
        dense.linear(below.size * len(weight), of_silu, weight, none[:0], below)
        grad = below
    return torch.from_numpy(out), torch.from_numpy(grad)


class SiluLayers:
    """Linear layers, each followed by SiLU, with a hand-written gradient; call under ``no_grad``.

    Args:
        layers: Weight and bias of each layer.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """What the layers make of x."""
        self.before = []
        for weight, bias in self.layers:
            self.before.append(F.linear(x, weight, bias))
            x = F.silu(self.before[-1])
        return x

    def backward(self, grad: Tensor) -> Tensor:
        """The gradient in x, given that in the result of the last :meth:`forward`."""
        for (weight, _), before in zip(reversed(self.layers), reversed(self.before), strict=True):
            grad = torch.ops.aten.silu_backward(grad, before) @ weight
        return grad
