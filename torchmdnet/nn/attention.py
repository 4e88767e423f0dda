"""What the attention layers share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.modules import xavier_all
from torchmdnet.typing import PairFeatures

__all__ = ["INFLUENCES", "AttentionLayer", "DistanceInfluence", "by_part", "check_attention", "radial_filters"]

DistanceInfluence = Literal["keys", "values", "both", "none"]
INFLUENCES = ("keys", "values", "both", "none")


class AttentionLayer(nn.Module):
    r"""The weights of one layer of attention over neighbours; a subclass says what it makes of them.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_rbf: Radial basis functions per edge (K).
        distance_influence: Where distances enter: ``keys``, ``values``, ``both`` or ``none``.
        num_heads: Attention heads (H) of width D = F / H.
        activation: Activation of the radial filters.
        attn_activation: Activation of the attention weights.
        dtype: Precision of the weights.

    Raises:
        ConfigError: If the heads cannot share the channels evenly, or for an unknown name.
    """

    #: Whether the layer refines vectors (N, 3, F) beside scalars; values then have three parts.
    has_vectors = False

    vec_proj: nn.Linear

    def __init__(
        self,
        *,
        hidden_channels: int,
        num_rbf: int,
        distance_influence: DistanceInfluence,
        num_heads: int,
        activation: str,
        attn_activation: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_attention(hidden_channels, num_heads, distance_influence)
        channels, parts = hidden_channels, self.num_values
        self.hidden_channels = channels
        self.num_heads = num_heads
        self.head_dim = channels // num_heads
        self.layernorm = nn.LayerNorm(channels, dtype=dtype)
        self.act = make_activation(activation)
        self.attn_activation = make_activation(attn_activation, "attn_activation")
        self.q_proj = nn.Linear(channels, channels, dtype=dtype)
        self.k_proj = nn.Linear(channels, channels, dtype=dtype)
        self.v_proj = nn.Linear(channels, parts * channels, dtype=dtype)
        self.o_proj = nn.Linear(channels, parts * channels, dtype=dtype)
        if self.has_vectors:
            self.vec_proj = nn.Linear(channels, parts * channels, bias=False, dtype=dtype)
        on_keys, on_values = distance_influence in ("keys", "both"), distance_influence in ("values", "both")
        self.dk_proj = nn.Linear(num_rbf, channels, dtype=dtype) if on_keys else None
        self.dv_proj = nn.Linear(num_rbf, parts * channels, dtype=dtype) if on_values else None
        self.reset_parameters()

    @property
    def num_values(self) -> int:
        """Parts of the values (L)."""
        return 3 if self.has_vectors else 1

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        self.layernorm.reset_parameters()
        xavier_all(self.q_proj, self.k_proj, self.v_proj, self.o_proj, *([self.vec_proj] if self.has_vectors else []))
        xavier_all(*(linear for linear in (self.dk_proj, self.dv_proj) if linear is not None))

    def radial(self, rbf: PairFeatures) -> Tensor:
        """Filters of keys and of each part of values, functions of distance alone: (P, K) -> (P, 1 + L, F)."""
        return radial_filters(rbf, self.dk_proj, self.dv_proj, self.act, self.num_heads, self.head_dim, self.num_values)


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
