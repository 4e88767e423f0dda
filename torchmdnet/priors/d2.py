"""Dispersion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.elements import SYMBOLS
from torchmdnet.graph import Graph
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.pairs import near_pairs, sum_pairs
from torchmdnet.priors.scales import FARTHEST, elements_of_types, joules_per_energy, metres_per_length, number_of
from torchmdnet.tracing import device_kind, is_abstract

__all__ = ["D2"]

AVOGADRO = 6.02214076e23  # 1/mol

# C₆ in J nm⁶/mol and van der Waals radius in Å of H to Xe; the transition metals of a row share one value
_C6_AND_RADIUS = (
    *((0.14, 1.001), (0.08, 1.012)),
    *((1.61, 0.825), (1.61, 1.408), (3.13, 1.485), (1.75, 1.452), (1.23, 1.397), (0.70, 1.342), (0.75, 1.287)),
    *((0.63, 1.243),),
    *((5.71, 1.144), (5.71, 1.364), (10.79, 1.639), (9.23, 1.716), (7.84, 1.705), (5.57, 1.683), (5.07, 1.639)),
    *((4.61, 1.595),),
    *((10.80, 1.485), (10.80, 1.474)),
    *(10 * ((10.80, 1.562),)),
    *((16.99, 1.650), (17.10, 1.727), (16.37, 1.760), (12.64, 1.771), (12.47, 1.749), (12.01, 1.727)),
    *((24.67, 1.628), (24.67, 1.606)),
    *(10 * ((24.67, 1.639),)),
    *((37.32, 1.672), (38.71, 1.804), (38.44, 1.881), (31.74, 1.892), (31.50, 1.892), (29.99, 1.881)),
)
_LAST = len(_C6_AND_RADIUS)


class D2(BasePrior):
    r"""Dispersion correction D2 (Grimme 2006, with :math:`s_6 = 1` and :math:`d = 20`).

    .. math::
        E = -\sum_{i < j} \frac{\sqrt{C_6^i C_6^j}}{r_{ij}^6}
        \frac{1}{1 + \exp(-20 (r_{ij} / (R_i + R_j) - 1))}

    Args:
        cutoff_distance: Pairs further apart are left out, in the data set's unit of length.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        atomic_number: Atomic number of each type of atom; None asks the data set, or takes types for atomic numbers.
        distance_scale: Metres in one unit of length; None asks the data set.
        energy_scale: Joules in one unit of energy; None asks the data set.
        dataset: Asked for what is not given.
        dtype: Precision of the tables of :math:`C_6` and R.
        periodic: Whether boxes count. Releases before 4 looked at the atoms of one cell alone, and models trained with
            them are rebuilt that way.

    Raises:
        ConfigError: If a scale is neither given nor known to the data set.
    """

    Z_map: Tensor  # (types,)
    C_6: Tensor  # (55,) J nm⁶/mol
    R_r: Tensor  # (55,) nm

    def __init__(
        self,
        cutoff_distance: float,
        max_num_neighbors: int = 128,
        atomic_number: Sequence[int] | Tensor | None = None,
        distance_scale: float | None = None,
        energy_scale: float | None = None,
        dataset: Any = None,
        dtype: torch.dtype = torch.float32,
        periodic: bool = True,
    ) -> None:
        super().__init__()
        number_of(cutoff_distance, "cutoff_distance", "D2", most=FARTHEST)
        self.register_buffer("Z_map", elements_of_types(atomic_number, dataset))
        table = torch.tensor(((float("nan"), float("nan")), *_C6_AND_RADIUS), dtype=torch.float64)
        self.register_buffer("C_6", table[:, 0].to(dtype))
        self.register_buffer("R_r", (0.1 * table[:, 1]).to(dtype))
        self.distances = OptimizedDistance(0.0, cutoff_distance, max_num_pairs=-max_num_neighbors)
        self.cutoff_distance = cutoff_distance
        self.max_num_neighbors = max_num_neighbors
        self.periodic = periodic
        self.distance_scale = metres_per_length(distance_scale, dataset, "D2")
        self.energy_scale = joules_per_energy(energy_scale, dataset, "D2")

    def get_init_args(self) -> dict[str, Any]:
        return {
            "cutoff_distance": self.cutoff_distance,
            "max_num_neighbors": self.max_num_neighbors,
            "atomic_number": self.Z_map.tolist(),
            "distance_scale": self.distance_scale,
            "energy_scale": self.energy_scale,
            "periodic": self.periodic,
        }

    def per_system(self, graph: Graph) -> Tensor:
        """Dispersion energy of each system, (S, 1).

        Raises:
            ValueError: If there are no parameters for an element.
        """
        Z = self.Z_map.index_select(0, graph.z)  # (N,)
        _check(Z)
        box = graph.box if self.periodic else None
        i, j, r = near_pairs(graph, box, float(self.cutoff_distance))  # (P,) each
        r = r * (self.distance_scale * 1e9)  # nm
        C_6, R = self.C_6.index_select(0, Z), self.R_r.index_select(0, Z)  # (N,)
        c = (C_6.index_select(0, i) * C_6.index_select(0, j)).sqrt()
        damping = torch.sigmoid(20 * (r / (R.index_select(0, i) + R.index_select(0, j)) - 1))
        pair = -c / r**6 * damping  # (P,) J/mol
        energy = sum_pairs(pair, i, graph.batch, graph.num_systems)
        return (energy / (self.energy_scale * AVOGADRO)).to(pair.dtype)


def _check(Z: Tensor) -> None:
    """Refuse elements the tables do not cover (on CPU, where looking costs nothing)."""
    if is_abstract() or device_kind(Z) != "cpu" or Z.numel() == 0:
        return
    for number in (int(Z.min()), int(Z.max())):
        if not 1 <= number <= _LAST:
            name = SYMBOLS[number] if 0 < number < len(SYMBOLS) else "not an element"
            raise ValueError(
                f"D2 has parameters for the elements 1 (H) to {_LAST} ({SYMBOLS[_LAST]}), but there is an atom of "
                f"{number} ({name}). Leave D2 out, or check atomic_number."
            )
