"""The equivariant transformer: attention over neighbours, on scalar and vector features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.models.base import Features
from torchmdnet.models.transformer import TransformerRepresentation
from torchmdnet.nn.attention import AttentionLayer, DistanceInfluence
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.tape.attention import Attention, Receive, projections, scalars_of_first
from torchmdnet.tape.steps import Add, Plain, linear, norm

__all__ = ["EquivariantMultiHeadAttention", "TorchMD_ET"]


class TorchMD_ET(TransformerRepresentation):
    r"""Equivariant transformer (TorchMD-NET, Thölke and De Fabritiis, ICLR 2022).

    Each atom carries F scalars, first an embedding of its element and optionally of those around it, and F vectors,
    first zero. Layers of attention refine both; the scalars leave through a layer normalisation.

    With ``vector_cutoff=False``, the established default, only the attention weights fade at the cutoff, not the
    vector messages: the energy jumps slightly when a neighbour crosses it. Set ``vector_cutoff=True`` for dynamics.

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
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        vector_cutoff: Whether vector messages fade at the cutoff too, so that the energy is continuous.
        dtype: Precision of the weights.
        system_embedding: What each atom is told of its system beside its element: ``none``, ``charge``, ``spin`` or
            ``charge+spin``; see :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.

    Raises:
        ConfigError: For an unknown ``rbf_type``, activation or ``distance_influence``, or if ``num_heads`` does not
            divide ``hidden_channels``.
    """

    head_prefix = "Equivariant"
    has_vectors = True
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
        box_vecs: Tensor | None = None,
        vector_cutoff: bool = False,
        dtype: torch.dtype = torch.float32,
        system_embedding: str = "none",
    ) -> None:
        super().__init__(
            partial(EquivariantMultiHeadAttention, vector_cutoff=vector_cutoff),
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
            basis_dtype=torch.float32,
            system_embedding=system_embedding,
        )
        self.vector_cutoff = vector_cutoff

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        x = self.embedded(tape, graph)  # (N, F)
        v = None  # zero
        for layer, function in self.layers_with_functions:
            x, v = self.refine(tape, layer, function, x, v)
        if v is None:
            v = tape(Plain(lambda: self.embedding.weight.new_zeros(graph.num_atoms, 3, self.hidden_channels)))
        return Features(tape(norm(self.out_norm), x), v)

    def refine(self, tape: Any, layer: Any, function: RadialFunction, x: Any, v: Any) -> tuple[Any, Any]:
        """One layer: the scalars (N, F) and vectors (N, 3, F) behind it, of those before it; None for no vectors."""
        attention = Attention(layer, function, values_fade=self.vector_cutoff)
        sent = tape(projections(layer), tape(norm(layer.layernorm), x))  # (N, 5 F)
        if v is None:
            m, v = tape(attention, sent)  # (N, F), (N, 3, F)
            return tape(Add(), x, tape(scalars_of_first(layer), m)), v
        m, mu = tape(attention, sent, v)
        o, projected = tape(linear(layer.o_proj), m), tape(linear(layer.vec_proj), v)  # (N, 3 F), (N, 3, 3 F)
        return tape(Receive(), x, v, mu, o, projected)


class EquivariantMultiHeadAttention(AttentionLayer):
    r"""One layer of the equivariant transformer.

    With queries, keys and values from the normalised scalars, for each head

    .. math::
        w_{ij} &= \tau(\sum_d q_i \odot k_j \odot K(r_{ij}))\, C(r_{ij}), \qquad
        [\alpha \| \beta \| \gamma]_{ij} = p_j \odot P(r_{ij}) \\
        m_i &= \sum_j w_{ij}\, \alpha_{ij}, \qquad \mu_i = \sum_j v_j \odot \beta_{ij} + \gamma_{ij} u_{ij} \\
        \Delta x &= (U_1 v \cdot U_2 v) \odot o_2 + o_3, \qquad \Delta v = o_1 \odot U_3 v + \mu, \qquad
        [o_1 \| o_2 \| o_3] = W_o m + b_o

    where K and P are learned functions of distance and u is the direction to the neighbour. With ``vector_cutoff`` the
    envelope C multiplies p instead of w.

    Args:
        vector_cutoff: Whether the envelope multiplies all messages.
        **options: Those of :class:`torchmdnet.nn.attention.AttentionLayer`.
    """

    has_vectors = True

    def __init__(self, *, vector_cutoff: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.vector_cutoff = vector_cutoff
