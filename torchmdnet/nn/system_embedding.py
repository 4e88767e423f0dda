"""Embedding of what is known of a system as a whole: its total charge and its spin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.graph import Graph
from torchmdnet.nn.modules import xavier_all

__all__ = ["SYSTEM_EMBEDDINGS", "SystemEmbedding", "make_system_embedding"]

#: What each value of ``system_embedding`` embeds.
SYSTEM_EMBEDDINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "charge": ("charge",),
    "spin": ("spin",),
    "charge+spin": ("charge", "spin"),
}


class SystemEmbedding(nn.Module):
    r"""Features that every atom of a system gains from its total charge q and its spin s.

    .. math:: e(q, s) = W_2\, \sigma(W_1 [q \| s]), \qquad x_i \leftarrow x_i + e(q, s)

    with the embedding :math:`x_i` of the atom's element and :math:`\sigma` = SiLU. There are no biases: a neutral
    system without unpaired electrons is what it is without this embedding. The layers of the network tell from it what
    each element makes of charge and spin; SpookyNet (Unke et al., Nat. Commun. 2021) embeds both likewise, by element.

    Args:
        hidden_channels: Feature channels per atom (F).
        quantities: What is embedded, ``charge``, ``spin`` or both.
        dtype: Precision of the weights.
    """

    def __init__(self, hidden_channels: int, quantities: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.quantities = quantities
        self.layers = nn.Sequential(
            nn.Linear(len(quantities), hidden_channels, bias=False, dtype=dtype),
            nn.SiLU(),
            nn.Linear(hidden_channels, hidden_channels, bias=False, dtype=dtype),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights."""
        xavier_all(self.layers[0], self.layers[2])

    def forward(self, graph: Graph) -> Tensor:
        """The embedding of each system, (S, F).

        Raises:
            ValueError: If the spin is embedded and the graph has none. A charge that is not given is 0.
        """
        columns = []
        for quantity in self.quantities:
            value = graph.q if quantity == "charge" else graph.s
            if value is None:
                if quantity == "spin":
                    raise ValueError(
                        "s: this model was trained with the spin of each system. Pass s, one value per system: the "
                        "number of unpaired electrons (multiplicity - 1) where the data were read through ASE."
                    )
                value = graph.pos.new_zeros(graph.num_systems)
            columns.append(value)
        weight = self.layers[0].get_parameter("weight")
        return self.layers(torch.stack(columns, dim=1).to(weight.dtype))  # (S, F)


def make_system_embedding(kind: str, hidden_channels: int, dtype: torch.dtype) -> SystemEmbedding | None:
    """The embedding that ``system_embedding`` names; None for ``none``.

    Raises:
        ConfigError: For an unknown name.
    """
    if kind not in SYSTEM_EMBEDDINGS:
        raise ConfigError(
            f"system_embedding: {kind!r} is not available.{did_you_mean(str(kind), SYSTEM_EMBEDDINGS)} "
            f"Choose from auto, {', '.join(SYSTEM_EMBEDDINGS)}."
        )
    quantities = SYSTEM_EMBEDDINGS[kind]
    return SystemEmbedding(hidden_channels, quantities, dtype) if quantities else None
