"""The transformer: attention over neighbours, on scalar features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.models.base import Features
from torchmdnet.models.transformer import TransformerRepresentation
from torchmdnet.nn.attention import AttentionLayer, DistanceInfluence
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.tape.attention import Attention, projections
from torchmdnet.tape.steps import Add, linear, norm

__all__ = ["MultiHeadAttention", "TorchMD_T"]


class TorchMD_T(TransformerRepresentation):
    """Transformer with scalar features (TorchMD-NET, Thölke and De Fabritiis, ICLR 2022, without its vectors).

    Deprecated: the equivariant transformer and TensorNet are more accurate at the same cost.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_layers: Attention layers.
        num_rbf: Radial basis functions per edge (K).
        rbf_type: Kind of radial basis.
        trainable_rbf: Whether the radial basis is trained.
        activation: Activation function.
        attn_activation: Activation of the attention weights.
        neighbor_embedding: Whether the first features know the elements around the atom.
        num_heads: Attention heads; they share the channels evenly.
        distance_influence: Where distances enter the attention: ``keys``, ``values``, ``both`` or ``none``.
        cutoff_lower: Edges are at least this long, in Å.
        cutoff_upper: Edges are shorter than this, in Å.
        max_z: Rows of the element embedding; atomic numbers are below this.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        dtype: Precision of the weights.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        system_embedding: What each atom is told of its system beside its element: ``none``, ``charge``, ``spin`` or
            ``charge+spin``; see :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.

    Raises:
        ConfigError: For an unknown ``rbf_type``, activation or ``distance_influence``, or if ``num_heads`` does not
            divide ``hidden_channels``.
    """

    can_be_repeated = True

    def __init__(
        self,
        hidden_channels: int = 128,
        num_layers: int = 6,
        num_rbf: int = 50,
        rbf_type: str = "expnorm",
        trainable_rbf: bool = True,
        activation: str = "silu",
        attn_activation: str = "silu",
        neighbor_embedding: bool = True,
        num_heads: int = 8,
        distance_influence: DistanceInfluence = "both",
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 5.0,
        max_z: int = 100,
        max_num_neighbors: int = 32,
        dtype: torch.dtype = torch.float32,
        box_vecs: Tensor | None = None,
        system_embedding: str = "none",
    ) -> None:
        warnings.warn(
            "The transformer is deprecated; use equivariant-transformer or tensornet.", DeprecationWarning, stacklevel=2
        )
        super().__init__(
            MultiHeadAttention,
            hidden_channels=hidden_channels,
            num_layers=num_layers,
            num_rbf=num_rbf,
            rbf_type=rbf_type,
            trainable_rbf=trainable_rbf,
            activation=activation,
            attn_activation=attn_activation,
            neighbor_embedding=neighbor_embedding,
            num_heads=num_heads,
            distance_influence=distance_influence,
            cutoff_lower=cutoff_lower,
            cutoff_upper=cutoff_upper,
            max_z=max_z,
            max_num_neighbors=max_num_neighbors,
            box_vecs=box_vecs,
            dtype=dtype,
            basis_dtype=dtype,
            system_embedding=system_embedding,
        )

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        x = self.embedded(tape, graph)  # (N, F)
        for layer, function in self.layers_with_functions:
            x = self.refine(tape, layer, function, x)
        return Features(tape(norm(self.out_norm), x))

    def refine(self, tape: Any, layer: Any, function: RadialFunction, x: Any) -> Any:
        """One layer: the features (N, F) behind it, of those before it."""
        sent = tape(projections(layer), tape(norm(layer.layernorm), x))  # (N, 3 F)
        m = tape(Attention(layer, function), sent)  # (N, F)
        return tape(Add(), x, tape(linear(layer.o_proj), m))


class MultiHeadAttention(AttentionLayer):
    r"""One layer of attention over neighbours, with distances in keys and values.

    .. math::
        \Delta x_i = W_o \sum_j w_{ij}\, p_j \odot P(r_{ij}) + b_o, \qquad
        w_{ij} = \tau(\sum_d q_i \odot k_j \odot K(r_{ij}))\, C(r_{ij})

    K and P are the radial filters, :math:`\tau` the activation of attention. The arguments are those of
    :class:`torchmdnet.nn.attention.AttentionLayer`.
    """
