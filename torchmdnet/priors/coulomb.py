"""Electrostatics of given partial charges."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.neighbors.nearest import nearest_pairs
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.ops.scatter import widened
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.pairs import ImagePairs, find_pairs, sum_pairs
from torchmdnet.priors.scales import FARTHEST, joules_per_energy, metres_per_length, number_of

__all__ = ["Coulomb"]

COULOMB_CONSTANT = 2.30707e-28  # e²/(4πε₀), J m

#: How a lattice is summed, with the damping times the cutoff that each takes by default.
LATTICE_SUMS = {"nearest": 0.0, "damped-shifted": 2.5, "ewald": 4.0}


class Coulomb(BasePrior):
    r"""Coulomb energy of partial charges that come with the data, switched off at short distances.

    .. math::
        E = \sum_{i < j} \frac{1}{4 \pi \epsilon_0} \frac{q_i q_j}{r_{ij}}\, \tfrac12 (1 - \cos \pi t), \qquad
        t = \frac{r_{ij} - r_\mathrm{lower}}{r_\mathrm{upper} - r_\mathrm{lower}} \text{ within } [0, 1]

    Charges are the per-atom tensor ``partial_charges`` (N,) in e of ``extra_args``.

    What a periodic box means is for ``lattice_sum`` to say:

    - ``"nearest"``, as in every earlier release: each pair of atoms of the cell counts once, in its nearest image. It
      is neither the energy of the crystal nor continuous: forces jump where another image becomes the nearest. Use it
      for molecules, for cells large beside the charges' distances, and for models that were trained with it.
    - ``"ewald"``: the energy of the infinite crystal, in a conducting surrounding (Ewald 1921), to about 1e-7. Needs
      three lattice vectors. A net charge is neutralised by a uniform background. Its cost grows faster than the
      number of atoms. Systems without a box are summed directly.
    - ``"damped-shifted"``: pairs up to ``cutoff_distance``, damped so that energy and force end smoothly there
      (Fennell and Gezelter 2006), in any number of open and periodic directions and in molecules alike. It is linear
      in the number of atoms, and close to the energy of the crystal where charges balance within the cutoff.

    Both of these count every image, and leave out of it what the switch takes from near pairs.

    Args:
        lower_switch_distance: Pairs nearer than this have no energy, **in nm**.
        upper_switch_distance: Pairs farther than this have their full energy, **in nm**.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        distance_scale: Metres in one unit of length; None asks the data set.
        energy_scale: Joules in one unit of energy; None asks the data set.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3), in the data set's unit of length.
        dataset: Asked for what is not given.
        initial_box: The name of ``box_vecs`` in older files.
        lattice_sum: ``"nearest"``, ``"ewald"`` or ``"damped-shifted"``.
        cutoff_distance: Range of the sum over pairs of the latter two, in the data set's unit of length.
        alpha: Their damping :math:`\alpha`, per unit of length; None is 4 (Ewald) or 2.5 over the cutoff.

    Raises:
        ConfigError: If a scale is neither given nor known to the data set, distances are out of order, or
            ``lattice_sum`` is unknown or lacks its cutoff.
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
        lattice_sum: str = "nearest",
        cutoff_distance: float | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        number_of(lower_switch_distance, "lower_switch_distance", "Coulomb", above=-math.inf)
        number_of(upper_switch_distance, "upper_switch_distance", "Coulomb", most=FARTHEST)
        if not 0 <= lower_switch_distance < upper_switch_distance:
            raise ConfigError(
                f"Coulomb: lower_switch_distance={lower_switch_distance} and "
                f"upper_switch_distance={upper_switch_distance} nm are not in order. Give 0 <= lower < upper."
            )
        if cutoff_distance is not None:
            number_of(cutoff_distance, "cutoff_distance", "Coulomb", most=FARTHEST)
        if alpha is not None:
            number_of(alpha, "alpha", "Coulomb")
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
        self.lattice_sum = lattice_sum
        self.cutoff_distance = cutoff_distance
        self.alpha = alpha
        self._check_lattice_sum()
        if self.alpha is None and cutoff_distance is not None:
            self.alpha = LATTICE_SUMS[lattice_sum] / cutoff_distance

    def _check_lattice_sum(self) -> None:
        """Refuse a sum without its range, and a range without its sum."""
        name, cutoff = self.lattice_sum, self.cutoff_distance
        if name not in LATTICE_SUMS:
            raise ConfigError(f"Coulomb: lattice_sum={name!r} is not available. Choose from {', '.join(LATTICE_SUMS)}.")
        if name == "nearest":
            if cutoff is not None or self.alpha is not None:
                raise ConfigError(
                    "Coulomb: cutoff_distance and alpha belong to lattice_sum='damped-shifted' or 'ewald'. Name one of "
                    "them, or leave the numbers out."
                )
            return
        upper = self.upper_switch_distance * 1e-9 / self.distance_scale
        if cutoff is None or not upper <= cutoff < math.inf:
            raise ConfigError(
                f"Coulomb: lattice_sum={name!r} needs a cutoff_distance, and one beyond the upper switch distance of "
                f"{upper:g} in the data set's unit of length; it is {cutoff}. Give 10 to 15 Å, say."
            )

    def get_init_args(self) -> dict[str, Any]:
        box = self.distance.stored_box
        kept = {
            "lower_switch_distance": self.lower_switch_distance,
            "upper_switch_distance": self.upper_switch_distance,
            "max_num_neighbors": self.max_num_neighbors,
            "distance_scale": self.distance_scale,
            "energy_scale": self.energy_scale,
            "box_vecs": None if box is None else box.tolist(),
        }
        if self.lattice_sum != "nearest":  # what earlier releases can read stays as they write it
            kept |= {
                "lattice_sum": self.lattice_sum,
                "cutoff_distance": self.cutoff_distance,
                "alpha": self.alpha,
            }
        return kept

    def per_system(self, graph: Graph) -> Tensor:
        """Coulomb energy of each system, (S, 1).

        Raises:
            ValueError: If there are no charges, or not one for each atom; or for an Ewald sum in a box that is open in
                some direction.
        """
        charges, box = _charges(graph), self._box(graph)
        if self.lattice_sum == "nearest":
            energy = self._direct(graph, charges, box)
        elif self.lattice_sum == "damped-shifted":
            energy = self._damped_shifted(graph, charges, box)
        else:
            energy = self._ewald(graph, charges, box)
        return (energy * (COULOMB_CONSTANT / self.energy_scale / self.distance_scale)).to(graph.pos.dtype)

    def _direct(self, graph: Graph, charges: Tensor, box: Tensor | None, systems: Tensor | None = None) -> Tensor:
        """All pairs of each system, or of some, in their nearest image, (S, 1) in e² per length."""
        pairs = ImagePairs(*nearest_pairs(graph.pos, graph.batch, box, graph.num_systems))
        pairs = pairs if systems is None else _of_systems(pairs, systems[graph.batch])
        r = pairs.distances(graph.pos, graph.batch, box)  # (P,)
        pair = self._switch(r) * _products(charges, pairs) / torch.where(r == 0, 1.0, r)
        return sum_pairs(pair, pairs.i, graph.batch, graph.num_systems)

    def _damped_shifted(self, graph: Graph, charges: Tensor, box: Tensor | None) -> Tensor:
        """Damped pairs whose energy and force vanish at the cutoff, and their self energy, (S, 1) in e² per length."""
        alpha, cutoff = self.alpha, self.cutoff_distance
        assert alpha is not None
        assert cutoff is not None
        pairs = find_pairs(graph, box, cutoff)
        r = pairs.distances(graph.pos, graph.batch, box)  # (P,)
        ending = math.erfc(alpha * cutoff) / cutoff
        slope = ending / cutoff + 2 * alpha / math.sqrt(math.pi) * math.exp(-((alpha * cutoff) ** 2)) / cutoff
        pair = _products(charges, pairs) * (self._screened(r, alpha) - ending + slope * (r - cutoff))
        itself = -(ending / 2 + alpha / math.sqrt(math.pi)) * widened(charges).square()
        energy = sum_pairs(pair, pairs.i, graph.batch, graph.num_systems)
        return energy.index_add(0, graph.batch, itself[:, None])

    def _ewald(self, graph: Graph, charges: Tensor, box: Tensor | None) -> Tensor:
        """The crystal's energy, (S, 1) in e² per length; systems without a box directly."""
        if box is None:
            return self._direct(graph, charges, None)
        alpha, cutoff = self.alpha, self.cutoff_distance
        assert alpha is not None
        assert cutoff is not None
        box = box.expand(graph.num_systems, 3, 3)
        num_vectors = (box != 0).any(dim=-1).sum(dim=-1)  # (S,)
        partly = ((num_vectors > 0) & (num_vectors < 3)).nonzero()[:, 0].tolist()
        if partly:
            raise ValueError(
                f"Coulomb: lattice_sum='ewald' needs three lattice vectors, but box {partly[0]} is open in "
                f"{3 - int(num_vectors[partly[0]])} directions. Use lattice_sum='damped-shifted'."
            )
        is_crystal = num_vectors == 3
        pairs = find_pairs(graph, box, cutoff)
        pairs = _of_systems(pairs, is_crystal[graph.batch])
        r = pairs.distances(graph.pos, graph.batch, box)  # (P,)
        energy = sum_pairs(
            _products(charges, pairs) * self._screened(r, alpha), pairs.i, graph.batch, graph.num_systems
        )
        for system in is_crystal.nonzero()[:, 0].tolist():
            members = (graph.batch == system).nonzero()[:, 0]
            waves = _waves(graph.pos.index_select(0, members), charges[members], box[system], alpha)
            energy = energy.index_add(0, torch.tensor([system], device=members.device), widened(waves).reshape(1, 1))
        if bool(is_crystal.all()):
            return energy
        return energy + self._direct(graph, charges, None, ~is_crystal)

    def _switch(self, r: Tensor) -> Tensor:
        """From 0 to 1 between the switch distances, (P,)."""
        nm = r * (self.distance_scale * 1e9)
        lower, upper = self.lower_switch_distance, self.upper_switch_distance
        phase = (nm.clamp(lower, upper) - lower) / (upper - lower)
        return 0.5 - 0.5 * torch.cos(math.pi * phase)

    def _screened(self, r: Tensor, alpha: float) -> Tensor:
        """The inverse distance without its smooth far part, and without what the switch takes, (P,)."""
        inverse = 1 / torch.where(r == 0, 1.0, r)
        smooth = torch.where(r == 0, 2 * alpha / math.sqrt(math.pi), torch.erf(alpha * r) * inverse)
        return self._switch(r) * inverse - smooth

    def _box(self, graph: Graph) -> Tensor | None:
        if graph.box is not None:
            return graph.box
        box = self.distance.stored_box
        return None if box is None else box.reshape(-1, 3, 3).to(graph.pos.dtype)


def _products(charges: Tensor, pairs: ImagePairs) -> Tensor:
    """Of the two charges of each pair, (P,)."""
    return charges.index_select(0, pairs.i) * charges.index_select(0, pairs.j)


def _of_systems(pairs: ImagePairs, is_member: Tensor) -> ImagePairs:
    """The pairs of some of the atoms; both atoms of a pair are of one system."""
    kept = is_member[pairs.i].nonzero()[:, 0]
    return ImagePairs(pairs.i[kept], pairs.j[kept], None if pairs.shifts is None else pairs.shifts[kept])


def _waves(pos: Tensor, charges: Tensor, box: Tensor, alpha: float) -> Tensor:
    """The smooth part of a crystal's energy as a sum over plane waves, less that of each charge with itself."""
    inverse = torch.linalg.inv(box)
    volume = torch.linalg.det(box).abs()
    longest = 2 * alpha * LATTICE_SUMS["ewald"]  # of the waves, as accurate as the sum over pairs
    reach = (longest / (2 * math.pi) * box.detach().norm(dim=-1)).floor().long().tolist()
    counts = torch.cartesian_prod(*(torch.arange(-n, n + 1, dtype=pos.dtype, device=pos.device) for n in reach))
    x, y, z = counts.unbind(dim=1)
    counts = counts[(x > 0) | ((x == 0) & (y > 0)) | ((x == 0) & (y == 0) & (z > 0))]  # k and -k are the same
    counts = counts[2 * math.pi * (counts @ inverse.detach().T).norm(dim=1) < longest]
    k = 2 * math.pi * counts @ inverse.T  # (K, 3)
    square = k.square().sum(dim=1)
    phase = pos @ k.T  # (N, K)
    structure = (charges @ torch.cos(phase)).square() + (charges @ torch.sin(phase)).square()  # (K,)
    waves = 4 * math.pi / volume * (torch.exp(-square / (4 * alpha**2)) / square * structure).sum()
    itself = -alpha / math.sqrt(math.pi) * charges.square().sum()
    background = -math.pi / (2 * volume * alpha**2) * charges.sum().square()
    return waves + itself + background


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
