"""What the transformers share: what they consist of, and which loops take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.nn.attention import DistanceInfluence
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.tape.attention import has_known_heads
from torchmdnet.tape.steps import Plain

__all__ = ["TransformerRepresentation"]


class TransformerRepresentation(TapedRepresentation):
    """An embedding of atoms, layers of attention over neighbours, and a layer normalisation of the scalars.

    Args:
        layer: Makes a layer of the options that :class:`torchmdnet.nn.attention.AttentionLayer` takes.
        basis_dtype: Precision in which the radial basis keeps its parameters.

    The others are those of :class:`torchmdnet.models.torchmd_et.TorchMD_ET`.
    """

    def __init__(
        self,
        layer: Any,
        *,
        hidden_channels: int,
        num_layers: int,
        num_rbf: int,
        rbf_type: str,
        trainable_rbf: bool,
        activation: str,
        attn_activation: str,
        neighbor_embedding: bool,
        num_heads: int,
        distance_influence: DistanceInfluence,
        cutoff_lower: float,
        cutoff_upper: float,
        max_z: int,
        max_num_neighbors: int,
        box_vecs: Tensor | None,
        dtype: torch.dtype,
        basis_dtype: torch.dtype,
        system_embedding: str,
    ) -> None:
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
            rbf_type, cutoff_lower, cutoff_upper, num_rbf, trainable_rbf, dtype=basis_dtype
        )
        self.envelope = CosineCutoff(cutoff_lower, cutoff_upper)
        self.neighbor_embedding = (
            NeighborEmbedding(hidden_channels, num_rbf, cutoff_lower, cutoff_upper, max_z, dtype)
            if neighbor_embedding
            else None
        )
        self.attention_layers = nn.ModuleList(
            layer(
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

    def embedded(self, tape: Any, graph: Graph) -> tuple[Any, zip[tuple[Any, RadialFunction]]]:
        """What atoms start from, (N, F), and the layers with their functions of distance."""
        functions, around = self.radial_functions, self.neighbor_embedding
        x = tape(Plain(lambda: self.first_features(graph), self.embedding, self.system_embedding))
        if around is not None:
            x = self.with_neighbors(tape, x, around, functions.pop(), graph)
        return x, zip(self.attention_layers, functions, strict=True)
