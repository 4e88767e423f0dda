"""Activation functions by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean

__all__ = ["ACTIVATIONS", "GLU", "ShiftedSoftplus", "SwiGLU", "Swish", "make_activation"]


class ShiftedSoftplus(nn.Module):
    r"""Softplus that vanishes at zero, :math:`\ln(1 + e^x) - \ln 2` (SchNet, Schütt et al. 2018).

    The shift is ln 2 rounded to single precision in every precision: trained models depend on it.
    """

    shift = 0.6931471824645996

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x) - self.shift


class Swish(nn.Module):
    r""":math:`x \sigma(\beta x)` (Ramachandran et al. 2017).

    Args:
        beta: Slope :math:`\beta`.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class GLU(nn.Module):
    r"""Gated linear unit, :math:`W x \odot a(V x)` (Dauphin et al. 2017).

    Args:
        in_channels: Width of the input and the output.
        hidden_channels: Width of the output; ``in_channels`` by default.
        activation: Gate :math:`a`; sigmoid by default.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        hidden_channels = hidden_channels or in_channels
        self.W = nn.Linear(in_channels, hidden_channels)
        self.V = nn.Linear(in_channels, hidden_channels)
        self.activation = nn.Sigmoid() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.W(x) * self.activation(self.V(x))


class SwiGLU(nn.Module):
    """:class:`GLU` gated by :class:`Swish` (Shazeer 2020)."""

    def __init__(self, in_channels: int, hidden_channels: int | None = None, beta: float = 1.0) -> None:
        super().__init__()
        self.glu = GLU(in_channels, hidden_channels, Swish(beta))

    def forward(self, x: Tensor) -> Tensor:
        return self.glu(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "ssp": ShiftedSoftplus,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "swish": Swish,
    "mish": nn.Mish,
}


def make_activation(name: str, key: str = "activation") -> nn.Module:
    """Build an activation from its name.

    Raises:
        ConfigError: For an unknown name; ``key`` is the configuration key blamed.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"{key}: {name!r} is not available.{did_you_mean(name, ACTIVATIONS)} Choose from {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]()
