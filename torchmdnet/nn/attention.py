"""What the attention layers share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.typing import PairFeatures

__all__ = ["INFLUENCES", "DistanceInfluence", "by_part", "check_attention", "radial_filters"]

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
    rbf: PairFeatures,
    keys: nn.Linear | None,
    values: nn.Linear | None,
    act: nn.Module,
    num_heads: int,
    head_dim: int,
    num_values: int = 3,
) -> Tensor:
    """Filters of keys and of each part of values, functions of distance alone: (P, K) -> (P, 1 + num_values, F).

    Both come from one matrix product. A filter without a layer is one everywhere.
    """
    linears = [linear for linear in (keys, values) if linear is not None]
    filters = iter(())
    if linears:
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        filters = iter(act(F.linear(rbf, weight, bias)).split([linear.out_features for linear in linears], dim=1))
    ones = rbf.new_ones(rbf.shape[0], 1, num_heads * head_dim)
    of_keys = ones if keys is None else next(filters)[:, None]  # (P, 1, F)
    of_values = ones.expand(-1, num_values, -1) if values is None else by_part(next(filters), num_heads, head_dim)
    return torch.cat([of_keys, of_values], dim=1)


def by_part(values: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Values stored head by head, the parts of a head side by side, part by part: (N, H L D) -> (N, L, H D)."""
    return values.unflatten(1, (num_heads, -1, head_dim)).transpose(1, 2).flatten(2)
