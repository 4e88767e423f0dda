"""The polarisability of a molecule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features
from torchmdnet.nn.mlp import MLP
from torchmdnet.nn.modules import reset_all, xavier_all
from torchmdnet.ops.irreps import to_matrix

__all__ = ["Polarizability"]


class Polarizability(OutputModel):
    r"""Sum of a symmetric 3×3 tensor from each atom, (S, 3, 3): a multiple of the identity and a traceless part.

    .. math::
        \alpha = \sum_i a_i 1 + \sum_c g_{ic}\, T_{ic}, \qquad [a_i \| g_i] = \mathrm{MLP}(x_i)

    The traceless tensors T of an atom are mixtures of its tensor features, :math:`T = W S`, where the architecture has
    them, and otherwise made from two mixtures of its vector features, :math:`u = W_1 v` and :math:`w = W_2 v`, as in
    PaiNN (Schütt et al., ICML 2021),

    .. math:: T = \tfrac12 (u w^T + w u^T) - \tfrac13 (u \cdot w) 1.

    The unit is that of the labels, such as Å³ or a.u.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        dtype: Precision of the weights.
        num_layers: Hidden layers of the MLP beyond the first.
        has_tensors: Whether the architecture has tensor features.
    """

    needs_vectors = True
    can_standardize = False
    needs_positions = False
    output_shape = (3, 3)

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        dtype: torch.dtype = torch.float32,
        num_layers: int = 0,
        has_tensors: bool = False,
    ) -> None:
        super().__init__(allow_prior_model=False)
        half = max(hidden_channels // 2, 1)
        self.output_network = MLP(
            in_channels=hidden_channels,
            out_channels=1 + half,
            hidden_channels=half,
            activation=activation,
            num_hidden_layers=num_layers,
            dtype=dtype,
        )
        self.has_tensors = has_tensors
        self.mixtures = nn.ModuleList(
            nn.Linear(hidden_channels, half, bias=False, dtype=dtype) for _ in range(1 if has_tensors else 2)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        reset_all(self.output_network)
        xavier_all(*self.mixtures)

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Polarisability of each atom, (N, 3, 3)."""
        isotropic, gate = self.output_network(features.x).tensor_split((1,), dim=-1)  # (N, 1), (N, F')
        identity = torch.eye(3, dtype=gate.dtype, device=gate.device)
        return isotropic[:, :, None] * identity + (gate[:, None, None] * self.traceless(features)).sum(dim=-1)

    def traceless(self, features: Features) -> Tensor:
        """Symmetric traceless tensors of each atom, (N, 3, 3, F').

        Raises:
            ValueError: If the architecture has neither tensor nor vector features.
        """
        if self.has_tensors and features.S is not None:
            return to_matrix(F.pad(self.mixtures[0](features.S), (0, 0, 4, 0)))
        if self.has_tensors or features.v is None:
            raise ValueError(
                f"Polarizability reads {'tensor' if self.has_tensors else 'vector'} features, and the architecture has "
                "none. Use model: tensornet, tensornet2 or equivariant-transformer."
            )
        u, w = (mix(features.v) for mix in self.mixtures)  # (N, 3, F') each
        product = u[:, :, None] * w[:, None]  # (N, 3, 3, F')
        identity = torch.eye(3, dtype=u.dtype, device=u.device)[:, :, None]
        return (product + product.transpose(1, 2)) / 2 - (u * w).sum(dim=1)[:, None, None] * identity / 3
