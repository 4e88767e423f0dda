"""The transformer: attention over neighbours, on scalar features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.models.base import Features
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.attention import DistanceInfluence, check_attention, radial_filters
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all, xavier_all
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.tape.attention import Attention, has_known_heads, projections
from torchmdnet.tape.steps import Add, Plain, linear, norm
from torchmdnet.typing import PairFeatures

__all__ = ["MultiHeadAttention", "TorchMD_T"]


class TorchMD_T(TapedRepresentation):
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
            cutoff_lower=cutoff_lower,
            cutoff_upper=cutoff_upper,
            max_z=max_z,
            loop=True,
            box_vecs=box_vecs,
            max_num_neighbors=max_num_neighbors,
        )
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.num_rbf = num_rbf
        self.rbf_type = rbf_type
        self.trainable_rbf = trainable_rbf
        self.activation = activation
        self.attn_activation = attn_activation
        self.num_heads = num_heads
        self.distance_influence = distance_influence
        self.embedding = nn.Embedding(max_z, hidden_channels, dtype=dtype)
        self.distance_expansion = make_radial_basis(
            rbf_type, cutoff_lower, cutoff_upper, num_rbf, trainable_rbf, dtype=dtype
        )
        self.envelope = CosineCutoff(cutoff_lower, cutoff_upper)
        self.neighbor_embedding = (
            NeighborEmbedding(hidden_channels, num_rbf, cutoff_lower, cutoff_upper, max_z, dtype)
            if neighbor_embedding
            else None
        )
        self.attention_layers = nn.ModuleList(
            MultiHeadAttention(
                hidden_channels=hidden_channels,
                num_rbf=num_rbf,
                distance_influence=distance_influence,
                num_heads=num_heads,
                activation=activation,
                attn_activation=attn_activation,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.out_norm = nn.LayerNorm(hidden_channels, dtype=dtype)
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(self.embedding, self.distance_expansion)
        if self.neighbor_embedding is not None:
            self.neighbor_embedding.reset_parameters()
        reset_all(*self.attention_layers, self.out_norm, self.system_embedding)

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        functions = [RadialFunction(layer, "radial", fades=False) for layer in self.attention_layers]
        around = self.neighbor_embedding
        return functions if around is None else [*functions, RadialFunction(around, "radial")]

    def fits_loops(self, weight: Tensor) -> bool:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return super().fits_loops(weight) and has_known_heads(self.attention_layers, weight)

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        functions, around = self.radial_functions, self.neighbor_embedding
        x = tape(Plain(lambda: self.first_features(graph), self.embedding, self.system_embedding))  # (N, F)
        if around is not None:
            x = self.with_neighbors(tape, x, around, functions.pop(), graph)
        for layer, function in zip(self.attention_layers, functions, strict=True):
            x = self.refine(tape, layer, function, x)
        return Features(tape(norm(self.out_norm), x))

    def refine(self, tape: Any, layer: Any, function: RadialFunction, x: Any) -> Any:
        """One layer: the features (N, F) behind it, of those before it."""
        sent = tape(projections(layer), tape(norm(layer.layernorm), x))  # (N, 3 F)
        m = tape(Attention(layer, function), sent)  # (N, F)
        return tape(Add(), x, tape(linear(layer.o_proj), m))


class MultiHeadAttention(nn.Module):
    r"""One layer of attention over neighbours, with distances in keys and values.

    .. math::
        \Delta x_i = W_o \sum_j w_{ij}\, p_j \odot P(r_{ij}) + b_o, \qquad
        w_{ij} = \tau(\sum_d q_i \odot k_j \odot K(r_{ij}))\, C(r_{ij})

    Args:
        hidden_channels: Feature channels per atom (F).
        num_rbf: Radial basis functions per edge (K).
        distance_influence: Where distances enter: ``keys``, ``values``, ``both`` or ``none``.
        num_heads: Attention heads (H) of width D = F / H.
        activation: Activation of the radial filters K and P.
        attn_activation: Activation :math:`\tau` of the attention weights.
        dtype: Precision of the weights.
    """

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
        channels = hidden_channels
        self.num_heads = num_heads
        self.head_dim = channels // num_heads
        self.layernorm = nn.LayerNorm(channels, dtype=dtype)
        self.act = make_activation(activation)
        self.attn_activation = make_activation(attn_activation, "attn_activation")
        self.q_proj = nn.Linear(channels, channels, dtype=dtype)
        self.k_proj = nn.Linear(channels, channels, dtype=dtype)
        self.v_proj = nn.Linear(channels, channels, dtype=dtype)
        self.o_proj = nn.Linear(channels, channels, dtype=dtype)
        on_keys, on_values = distance_influence in ("keys", "both"), distance_influence in ("values", "both")
        self.dk_proj = nn.Linear(num_rbf, channels, dtype=dtype) if on_keys else None
        self.dv_proj = nn.Linear(num_rbf, channels, dtype=dtype) if on_values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        self.layernorm.reset_parameters()
        xavier_all(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        xavier_all(*(linear for linear in (self.dk_proj, self.dv_proj) if linear is not None))

    def radial(self, rbf: PairFeatures) -> Tensor:
        """Filters of keys and values, functions of distance alone: (P, K) -> (P, 2, F)."""
        return radial_filters(rbf, self.dk_proj, self.dv_proj, self.act, self.num_heads, self.head_dim, num_values=1)
