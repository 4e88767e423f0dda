"""Heads for architectures with vector features: a scalar or a vector from gated equivariant blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.nn.gated import GatedEquivariantBlock
from torchmdnet.nn.modules import reset_all

__all__ = ["EquivariantOutput", "EquivariantScalar", "EquivariantVectorOutput"]


class EquivariantOutput(OutputModel):
    """Base of heads that reduce scalar and vector features to one channel each, through two gated blocks.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        allow_prior_model: Whether priors may be added.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
    """

    needs_vectors = True

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        *,
        allow_prior_model: bool,
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
    ) -> None:
        super().__init__(allow_prior_model=allow_prior_model, reduce_op=reduce_op, static_shapes=static_shapes)
        half = max(hidden_channels // 2, 1)
        self.output_network = nn.ModuleList(
            [
                GatedEquivariantBlock(
                    hidden_channels, half, activation=activation, scalar_activation=True, dtype=dtype
                ),
                GatedEquivariantBlock(half, 1, activation=activation, dtype=dtype),
            ]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(*self.output_network)

    def scalar_and_vector(self, features: Features) -> tuple[Tensor, Tensor]:
        """A scalar (N, 1) and a vector (N, 3) of each atom.

        Raises:
            ValueError: If the architecture has no vector features.
        """
        x, v = features.x, features.v
        if v is None:
            raise ValueError(
                f"{type(self).__name__} needs vector features, and the architecture has none. "
                "Use model: tensornet, tensornet2 or equivariant-transformer."
            )
        for block in self.output_network:
            x, v = block(x, v)
        return x, v.squeeze(-1)


class EquivariantScalar(EquivariantOutput):
    r"""Sum of a scalar from each atom, :math:`y = \sum_i x_i`, where vectors gate scalars on the way (PaiNN).

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        allow_prior_model: Whether priors may be added.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_channels,
            activation,
            allow_prior_model=allow_prior_model,
            reduce_op=reduce_op,
            dtype=dtype,
            static_shapes=static_shapes,
        )

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Energy of each atom, (N, 1)."""
        x, v = self.scalar_and_vector(features)
        return x + 0.0 * v.sum(dim=-1, keepdim=True)  # every weight gets a gradient, as distributed training wants


class EquivariantVectorOutput(EquivariantOutput):
    r"""Sum of a vector from each atom, :math:`y = \sum_i v_i`, (S, 3). It is equivariant under rotations.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        reduce_op: Kept for compatibility; atoms are summed.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
    """

    can_standardize = False
    needs_positions = False
    output_shape = (3,)

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_channels,
            activation,
            allow_prior_model=False,
            reduce_op="sum",
            dtype=dtype,
            static_shapes=static_shapes,
        )

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Vector of each atom, (N, 3)."""
        return self.scalar_and_vector(features)[1]
