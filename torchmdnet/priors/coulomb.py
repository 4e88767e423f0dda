"""Electrostatics of given partial charges."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.neighbors.distance import OptimizedDistance
from torchmdnet.neighbors.nearest import nearest_pairs
from torchmdnet.ops.norms import length
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.scales import joules_per_energy, metres_per_length

__all__ = ["Coulomb"]

COULOMB_CONSTANT = 2.30707e-28  # e²/(4πε₀), J m


class Coulomb(BasePrior):
    r"""Coulomb energy of partial charges that come with the data, switched off at short distances.

    .. math::
        E = \sum_{i < j} \frac{1}{4 \pi \epsilon_0} \frac{q_i q_j}{r_{ij}}\, \tfrac12 (1 - \cos \pi t), \qquad
        t = \frac{r_{ij} - r_\mathrm{lower}}{r_\mathrm{upper} - r_\mathrm{lower}} \text{ within } [0, 1]

    Charges are the per-atom tensor ``partial_charges`` (N,) in e of ``extra_args``. Every pair of a system counts; in a
    box, in its nearest image. That is no substitute for a lattice sum: use it for cells large beside the charges'
    distances.

    Args:
        lower_switch_distance: Pairs nearer than this have no energy, **in nm**.
        upper_switch_distance: Pairs farther than this have their full energy, **in nm**.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        distance_scale: Metres in one unit of length; None asks the data set.
        energy_scale: Joules in one unit of energy; None asks the data set.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3), in the data set's unit of length.
        dataset: Asked for what is not given.
        initial_box: The name of ``box_vecs`` in older files.

    Raises:
        ConfigError: If a scale is neither given nor known to the data set, or the switch distances are out of order.
    """

    def __init__(
        self,
        lower_switch_distance: float,
        upper_switch_distance: float,
        max_num_neighbors: int = 128,
        distance_scale: float | None = None,
        energy_scale: float | None = None,
        box_vecs: Any = None,
        dataset: Any = None,
        initial_box: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= lower_switch_distance < upper_switch_distance:
            raise ConfigError(
                f"Coulomb: lower_switch_distance={lower_switch_distance} and "
                f"upper_switch_distance={upper_switch_distance} nm are not in order. Give 0 <= lower < upper."
            )
        box = initial_box if box_vecs is None else box_vecs
        self.distance = OptimizedDistance(
            0.0,
            math.inf,
            max_num_pairs=-max_num_neighbors,
            box=None if box is None else torch.as_tensor(box, dtype=torch.get_default_dtype()),
        )
        self.lower_switch_distance = lower_switch_distance
        self.upper_switch_distance = upper_switch_distance
        self.max_num_neighbors = max_num_neighbors
        self.distance_scale = metres_per_length(distance_scale, dataset, "Coulomb")
        self.energy_scale = joules_per_energy(energy_scale, dataset, "Coulomb")

    def get_init_args(self) -> dict[str, Any]:
        box = self.distance.stored_box
        return {
            "lower_switch_distance": self.lower_switch_distance,
            "upper_switch_distance": self.upper_switch_distance,
            "max_num_neighbors": self.max_num_neighbors,
            "distance_scale": self.distance_scale,
            "energy_scale": self.energy_scale,
            "box_vecs": None if box is None else box.tolist(),
        }

    def per_system(self, graph: Graph) -> Tensor:
        """Coulomb energy of each system, (S, 1).

        Raises:
            ValueError: If there are no charges, or not one for each atom.
        """
        charges = _charges(graph)
        box = self._box(graph)
        i, j, shifts = nearest_pairs(graph.pos, graph.batch, box, graph.num_systems)
        vec = graph.pos.index_select(0, i) - graph.pos.index_select(0, j)
        if shifts is not None:
            assert box is not None
            cell = box.expand(graph.num_systems, 3, 3).index_select(0, graph.batch.index_select(0, i))
            vec = vec + torch.einsum("pk,pkl->pl", shifts, cell)
        r = length(vec)  # (P,)
        nm = r * (self.distance_scale * 1e9)
        lower, upper = self.lower_switch_distance, self.upper_switch_distance
        phase = (nm.clamp(lower, upper) - lower) / (upper - lower)
        switch = 0.5 - 0.5 * torch.cos(math.pi * phase)
        pair = switch * charges.index_select(0, i) * charges.index_select(0, j) / torch.where(r == 0, 1.0, r)
        energy = pair.new_zeros(graph.num_systems).index_add(0, graph.batch.index_select(0, i), pair)
        return energy[:, None] * (COULOMB_CONSTANT / self.energy_scale / self.distance_scale)

    def _box(self, graph: Graph) -> Tensor | None:
        if graph.box is not None:
            return graph.box
        box = self.distance.stored_box
        return None if box is None else box.reshape(-1, 3, 3).to(graph.pos.dtype)


def _charges(graph: Graph) -> Tensor:
    charges = graph.extra.get("partial_charges")
    if charges is None:
        raise ValueError(
            "The Coulomb prior needs the partial charges of the atoms. Pass extra_args={'partial_charges': tensor of "
            "shape (N,)}, or train on data that has partial_charges."
        )
    if charges.numel() != graph.num_atoms:
        raise ValueError(
            f"partial_charges has shape {tuple(charges.shape)} but there are {graph.num_atoms} atoms. "
            f"Pass ({graph.num_atoms},)."
        )
    return charges.reshape(-1).to(graph.pos.dtype)
