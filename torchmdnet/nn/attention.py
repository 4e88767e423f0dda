"""What the attention layers share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.typing import PairFeatures

__all__ = ["INFLUENCES", "DistanceInfluence", "check_attention", "radial_filters"]

DistanceInfluence = Literal["keys", "values", "both", "none"]
INFLUENCES = ("keys", "values", "both", "none")


def check_attention(hidden_channels: int, num_heads: int, distance_influence: str) -> None:
    """Refuse options an attention layer cannot work with.

    Raises:
        ConfigError: If the channels cannot be shared evenly by the heads, or for an unknown ``distance_influence``.
    """
    if hidden_channels % num_heads:
        raise ConfigError(
            f"embedding_dimension={hidden_channels} cannot be shared evenly by num_heads={num_heads}. "
            "Make it a multiple."
        )
    if distance_influence not in INFLUENCES:
        raise ConfigError(
            f"distance_influence: {distance_influence!r} is not available."
            f"{did_you_mean(distance_influence, INFLUENCES)} Choose from {', '.join(INFLUENCES)}."
        )


def radial_filters(
    rbf: PairFeatures, keys: nn.Linear | None, values: nn.Linear | None, act: nn.Module
) -> tuple[Tensor | None, Tensor | None]:
    """Filters of keys and values, functions of distance alone: (P, K) -> (P, keys) and (P, values), None without one.

    Both come from one matrix product.
    """
    linears = [linear for linear in (keys, values) if linear is not None]
    if not linears:
        return None, None
    weight = torch.cat([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    filters = iter(act(F.linear(rbf, weight, bias)).split([linear.out_features for linear in linears], dim=1))
    return (None if keys is None else next(filters)), (None if values is None else next(filters))
