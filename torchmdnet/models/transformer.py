"""What the transformers share: what they consist of, and which loops take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchmdnet.models.embedded import EmbeddedRepresentation
from torchmdnet.nn.attention import DistanceInfluence
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.tape.attention import has_known_heads

__all__ = ["TransformerRepresentation"]


class TransformerRepresentation(EmbeddedRepresentation):
    """An embedding of atoms, layers of attention over neighbours, and a layer normalisation of the scalars.

    Args:
        layer: Makes a layer of the options that :class:`torchmdnet.nn.attention.AttentionLayer` takes.
        attn_activation: Activation of the attention weights.
        num_heads: Attention heads; they share the channels evenly.
        distance_influence: Where distances enter the attention: ``keys``, ``values``, ``both`` or ``none``.
        system_embedding: See :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.
        **options: For :class:`torchmdnet.models.embedded.EmbeddedRepresentation`; atoms are neighbours of themselves.
    """

    def __init__(
        self,
        layer: Any,
        *,
        attn_activation: str,
        num_heads: int,
        distance_influence: DistanceInfluence,
        system_embedding: str,
        **options: Any,
    ) -> None:
        super().__init__(loop=True, **options)
        hidden_channels, dtype = options["hidden_channels"], options["dtype"]
        self.attn_activation = attn_activation
        self.num_heads = num_heads
        self.distance_influence = distance_influence
        self.attention_layers = nn.ModuleList(
            layer(
                hidden_channels=hidden_channels,
                num_rbf=self.num_rbf,
                distance_influence=distance_influence,
                num_heads=num_heads,
                activation=self.activation,
                attn_activation=attn_activation,
                dtype=dtype,
            )
            for _ in range(self.num_layers)
        )
        self.out_norm = nn.LayerNorm(hidden_channels, dtype=dtype)
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        reset_all(self.out_norm, self.system_embedding)

    @property
    def layers_with_functions(self) -> list[tuple[Any, RadialFunction]]:
        """See :class:`torchmdnet.models.embedded.EmbeddedRepresentation`."""
        return [(layer, RadialFunction(layer, "radial", fades=False)) for layer in self.attention_layers]

    def fits_loops(self, weight: Tensor) -> bool:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return super().fits_loops(weight) and has_known_heads(self.attention_layers, weight)
