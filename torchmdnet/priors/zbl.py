"""Repulsion of nuclei at short distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.nn.repulsion import zbl_screening
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.pairs import near_pairs, sum_pairs
from torchmdnet.priors.scales import FARTHEST, elements_of_types, joules_per_energy, metres_per_length, number_of

__all__ = ["ZBL"]

BOHR_RADIUS = 5.29177210903e-11  # m
COULOMB_CONSTANT = 2.30707755e-28  # e²/(4πε₀), J m


class ZBL(BasePrior):
    r"""Screened nuclear repulsion (Ziegler, Biersack and Littmark 1985), ended by a cosine at a cutoff.

    .. math::
        E = \sum_{i < j} \frac{e^2}{4 \pi \epsilon_0} \frac{Z_i Z_j}{r_{ij}}\, \phi(r_{ij} / a_{ij})\,
        \tfrac12 (\cos(\pi r_{ij} / r_c) + 1), \qquad a_{ij} = \frac{0.8854\, a_0}{Z_i^{0.23} + Z_j^{0.23}}

    It keeps atoms apart where the training data has nothing to say.

    Args:
        cutoff_distance: Range :math:`r_c`, in the data set's unit of length.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        atomic_number: Atomic number of each type of atom; None asks the data set, or takes types for atomic numbers.
        distance_scale: Metres in one unit of length; None asks the data set.
        energy_scale: Joules in one unit of energy; None asks the data set.
        dataset: Asked for what is not given.

    Raises:
        ConfigError: If a scale is neither given nor known to the data set.
    """

    atomic_number: Tensor

    def __init__(
        self,
        cutoff_distance: float,
        max_num_neighbors: int = 32,
        atomic_number: Sequence[int] | Tensor | None = None,
        distance_scale: float | None = None,
        energy_scale: float | None = None,
        dataset: Any = None,
    ) -> None:
        super().__init__()
        number_of(cutoff_distance, "cutoff_distance", "ZBL", most=FARTHEST)
        self.register_buffer("atomic_number", elements_of_types(atomic_number, dataset))
        self.distance = OptimizedDistance(0.0, cutoff_distance, max_num_pairs=-max_num_neighbors)
        self.cutoff_distance = cutoff_distance
        self.max_num_neighbors = max_num_neighbors
        self.distance_scale = metres_per_length(distance_scale, dataset, "ZBL")
        self.energy_scale = joules_per_energy(energy_scale, dataset, "ZBL")

    def get_init_args(self) -> dict[str, Any]:
        return {
            "cutoff_distance": self.cutoff_distance,
            "max_num_neighbors": self.max_num_neighbors,
            "atomic_number": self.atomic_number.tolist(),
            "distance_scale": self.distance_scale,
            "energy_scale": self.energy_scale,
        }

    def per_system(self, graph: Graph) -> Tensor:
        """Repulsion energy of each system, (S, 1)."""
        box = self.distance.stored_box if graph.box is None else graph.box
        box = None if box is None else box.reshape(-1, 3, 3).to(graph.pos.dtype)
        i, j, r = near_pairs(graph, box, float(self.cutoff_distance))  # (P,) each
        Z = self.atomic_number.index_select(0, graph.z)  # (N,)
        Z_i, Z_j = Z.index_select(0, i), Z.index_select(0, j)
        # the screening length is a single-precision number in every precision: trained models depend on it
        width = Z.float() ** 0.23
        a = 0.8854 * BOHR_RADIUS / (width.index_select(0, i) + width.index_select(0, j))  # m
        reduced = r * (self.distance_scale / a.to(r.dtype))  # (P,)
        envelope = torch.cos(r * (math.pi / self.cutoff_distance)) + 1
        pair = zbl_screening(reduced) * envelope * (0.5 * Z_i * Z_j) / r  # (P,)
        constant = COULOMB_CONSTANT / self.energy_scale / self.distance_scale
        return (constant * sum_pairs(pair, i, graph.batch, graph.num_systems)).to(pair.dtype)
