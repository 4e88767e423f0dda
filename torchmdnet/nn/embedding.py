"""Embeddings of an atom by what surrounds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.modules import xavier_all
from torchmdnet.typing import AtomFeatures, AtomicNumbers, EdgeFeatures, EdgeIndex, EdgeScalars, PairFeatures

__all__ = ["NeighborEmbedding"]


class NeighborEmbedding(nn.Module):
    r"""Mix the elements around an atom into its features (TorchMD-NET, Thölke and De Fabritiis, ICLR 2022).

    .. math::
        n_i = \sum_{j \ne i} C(r_{ij})\, (W_d\, \phi(r_{ij}) + b_d) \odot e(z_j), \qquad
        x_i \leftarrow W_c [x_i \| n_i] + b_c

    with an element embedding e of its own. Self loops are skipped; periodic images of the atom itself are not.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_rbf: Radial basis functions per edge (K).
        cutoff_lower: Lower end of the envelope C, in Å.
        cutoff_upper: Upper end of the envelope C, in Å.
        max_z: Rows of the element embedding.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        hidden_channels: int,
        num_rbf: int,
        cutoff_lower: float,
        cutoff_upper: float,
        max_z: int = 100,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_z, hidden_channels, dtype=dtype)
        self.distance_proj = nn.Linear(num_rbf, hidden_channels, dtype=dtype)
        self.combine = nn.Linear(2 * hidden_channels, hidden_channels, dtype=dtype)
        self.cutoff = CosineCutoff(cutoff_lower, cutoff_upper)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal embeddings, Xavier-uniform weights, zero biases."""
        self.embedding.reset_parameters()
        xavier_all(self.distance_proj, self.combine)

    def radial(self, rbf: PairFeatures) -> Tensor:
        """Weights of the neighbours, a function of distance alone: (P, K) -> (P, 1, F)."""
        return self.distance_proj(rbf)[:, None]

    def forward(
        self,
        z: AtomicNumbers,
        x: AtomFeatures,
        edge_index: EdgeIndex,
        edge_weight: EdgeScalars,
        edge_attr: EdgeFeatures,
    ) -> AtomFeatures:
        """The established call, on edges.

        Args:
            z: Atomic numbers, (N,).
            x: Features so far, (N, F).
            edge_index: (2, E), row 0 receives.
            edge_weight: Distances in Å, (E,).
            edge_attr: Radial basis of the distances, (E, K).

        Returns:
            (N, F).
        """
        is_loop = (edge_index[0] == edge_index[1]) & (edge_weight == 0)
        envelope = self.cutoff(edge_weight).masked_fill(is_loop, 0.0)  # (E,)
        i, j = edge_index
        message = envelope[:, None] * self.distance_proj(edge_attr) * self.embedding(z).index_select(0, j)  # (E, F)
        around = torch.zeros_like(x).index_add(0, i, message)  # (N, F)
        return self.combine(torch.cat([x, around], dim=1))
