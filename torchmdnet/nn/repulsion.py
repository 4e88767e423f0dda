"""Screened repulsion of nuclei."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.typing import AtomicNumbers, EdgeIndex, EdgeScalars

__all__ = ["RepulsionZBL", "zbl_screening"]


def zbl_screening(x: Tensor) -> Tensor:
    r"""Universal screening function of a reduced distance (Ziegler, Biersack and Littmark 1985).

    .. math:: \phi(x) = 0.1818 e^{-3.2 x} + 0.5099 e^{-0.9423 x} + 0.2802 e^{-0.4029 x} + 0.02817 e^{-0.2016 x}
    """
    decay = x.new_tensor([-3.2, -0.9423, -0.4029, -0.2016])
    return torch.exp(x[..., None] * decay) @ x.new_tensor([0.1818, 0.5099, 0.2802, 0.02817])


class RepulsionZBL(nn.Module):
    r"""Nuclear repulsion inside a covalent bond's length (Ziegler, Biersack and Littmark 1985), eV and Å.

    .. math::
        E_i = \tfrac12 \sum_j k \frac{Z_i Z_j}{r_{ij}}\, \phi(r_{ij} / a_{ij})\, w(r_{ij} / R_{ij}), \qquad
        a_{ij} = \frac{0.4543\ \mathrm{Bohr}}{Z_i^{0.3} + Z_j^{0.3}}

    where :math:`w(t) = 1 - 28 t^6 + 48 t^7 - 21 t^8` ends it smoothly at the sum R of the covalent radii (Cordero et
    al. 2008), and :math:`k = 14.399645` eV Å.

    Args:
        max_z: Number of elements with a row of their own; larger atomic numbers take the last one.
        dtype: Precision of the tables; PyTorch's default by default.
    """

    z_pow: Tensor  # (M,)
    z_outer: Tensor  # (M, M)
    cutoff_ab: Tensor  # (M, M) Å

    def __init__(self, max_z: int = 87, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        from ase.data import covalent_radii

        number = min(max_z, len(covalent_radii))
        dtype = dtype or torch.get_default_dtype()
        z = torch.arange(number, dtype=torch.float64).clamp(min=1)
        radius = torch.as_tensor(covalent_radii[:number]).to(dtype)
        self.register_buffer("z_pow", (z**0.3).to(dtype))
        self.register_buffer("z_outer", (z[:, None] * z[None]).to(dtype))
        self.register_buffer("cutoff_ab", radius[:, None] + radius[None])

    def forward(self, z: AtomicNumbers, edge_index: EdgeIndex, edge_dist: EdgeScalars) -> Tensor:
        """Energy of each atom.

        Args:
            z: Atomic numbers, (N,).
            edge_index: (2, E), both directions of each pair; self loops are skipped.
            edge_dist: Distances in Å, (E,).

        Returns:
            (N, 1) eV.
        """
        element = z.clamp(max=self.z_pow.shape[0] - 1)
        i, j = edge_index
        z_i, z_j = element.index_select(0, i), element.index_select(0, j)
        r = torch.where(edge_dist == 0, 1.0, edge_dist)
        reach = self.cutoff_ab[z_i, z_j]
        bohr = 1 / 1.8897261258369282  # Å
        a = 0.4543 * bohr / (self.z_pow[z_i] + self.z_pow[z_j])
        t = (r / reach).clamp(max=1.0)
        switch = 1 - 28 * t**6 + 48 * t**7 - 21 * t**8
        pair = 14.399645 * self.z_outer[z_i, z_j] / r * zbl_screening(r / a) * switch
        pair = torch.where((edge_dist < reach) & (edge_dist > 0), pair, 0.0)  # (E,)
        return 0.5 * pair.new_zeros(z.shape[0]).index_add(0, i, pair)[:, None]
