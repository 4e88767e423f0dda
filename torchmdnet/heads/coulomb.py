"""A scalar plus the electrostatic energy of the charges an architecture predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph, edges_within
from torchmdnet.heads.scalar import Scalar
from torchmdnet.models.base import Features
from torchmdnet.neighbors import pairs_within
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.ops.norms import length
from torchmdnet.tracing import is_abstract

__all__ = ["ScalarPlusWeightedCoulomb", "short_range_damping"]

NEEDS_CUTOFF = (
    "The Coulomb energy of all pairs cannot be used with a box. Set coulomb_cutoff, in Å; an existing model can be "
    "loaded with load_model(path, coulomb_cutoff=10.0)."
)
#: Half of e²/(4πε₀) in eV Å: each of the two atoms of a pair is given its energy.
HALF_COULOMB = 0.5 * 27.211386024367243 * 0.5291772105638411
#: Electrostatics fades in up to here, in Å.
DAMPING_RADIUS = 4.6


def short_range_damping(r: Tensor) -> Tensor:
    r"""Smooth step from 0 at contact to 1 at 4.6 Å, :math:`\eta(r) = 1 - e \cdot \exp(-1/(1 - t^2))`, t = r / 4.6 Å."""
    t = (r / DAMPING_RADIUS).clamp(min=0.0, max=1 - 1e-6)
    return 1 - torch.exp(-1 / (1 - t.square())) / math.exp(-1)


class ScalarPlusWeightedCoulomb(Scalar):
    r"""Sum over atoms of a scalar, and over pairs of the Coulomb energy of the predicted charges.

    .. math::
        y = \sum_i \mathrm{MLP}(x_i) + \tfrac12 \sum_{i \ne j} \frac{e^2}{4 \pi \epsilon_0}\, \eta(r_{ij})\, g(r_{ij})
        \frac{\sum_k w_k c_{ik} c_{jk}}{\sum_k w_k}

    over all channels k of all layers, with :math:`\eta` from :func:`short_range_damping`. Without a cutoff every pair
    of a system counts, :math:`g = 1/r`, and boxes are refused. With one, :math:`g` is that of a reaction field (Tironi
    et al. 1995), zero at the cutoff,

    .. math::
        g(r) = \frac1r + \frac{\epsilon - 1}{2\epsilon + 1} \frac{r^2}{R^3} - \frac{3\epsilon}{2\epsilon + 1}\frac1R.

    Its slope there is :math:`3/(2\epsilon + 1)` of the bare one's. Energies are in eV, distances in Å. Like the scalar
    they are multiplied by the standard deviation of the data.

    Args:
        hidden_channels: Feature channels per atom (F); the charges follow them.
        activation: Activation function.
        allow_prior_model: Whether priors may be added.
        reduce_op: How atoms are reduced to systems.
        dtype: Precision of the weights.
        static_shapes: Kept for compatibility.
        num_layers: Interaction layers (L) of the architecture.
        num_hidden_layers: Hidden layers of the MLP beyond the first.
        q_dim: Charge channels of the architecture.
        q_weights: Weights w: L + 1 numbers, or lists of ``q_dim`` numbers.
        coulomb_cutoff: Cutoff R in Å; None takes all pairs.
        coulomb_max_num_neighbors: Kept for compatibility; pairs are never dropped.
        coulomb_neighbor_strategy: Kept for compatibility.
        coulomb_epsilon_solvent: Relative permittivity :math:`\epsilon` beyond the cutoff.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.

    Raises:
        ConfigError: If ``q_weights`` does not fit the layers and channels, or there is a box but no cutoff.
    """

    needs_charges = True
    needs_positions = True  # pairs within a cutoff of its own
    qweights: Tensor  # ((L + 1) q_dim,)

    def __init__(
        self,
        hidden_channels: int,
        activation: str = "silu",
        allow_prior_model: bool = True,
        reduce_op: str = "sum",
        dtype: torch.dtype = torch.float32,
        static_shapes: bool = False,
        num_layers: int = 0,
        num_hidden_layers: int = 0,
        q_dim: int = 0,
        q_weights: Sequence[float | Sequence[float]] = (),
        coulomb_cutoff: float | None = None,
        coulomb_max_num_neighbors: int | None = None,
        coulomb_neighbor_strategy: str = "brute",
        coulomb_epsilon_solvent: float = 78.3,
        box_vecs: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            hidden_channels,
            activation,
            allow_prior_model=allow_prior_model,
            reduce_op=reduce_op,
            dtype=dtype,
            static_shapes=static_shapes,
            num_layers=num_hidden_layers,
        )
        if box_vecs is not None and coulomb_cutoff is None:
            raise ConfigError(
                "coulomb_cutoff: with box_vecs the Coulomb energy needs a cutoff. Give one in Å, for example 10.0."
            )
        self.hidden_channels = hidden_channels
        self.coulomb_cutoff = coulomb_cutoff
        self.coulomb_epsilon_solvent = coulomb_epsilon_solvent
        self.register_buffer("qweights", _weight_table(q_weights, num_layers, q_dim, dtype))
        self.distance: OptimizedDistance | None = None
        if coulomb_cutoff is not None:
            self.distance = OptimizedDistance(
                0.0,
                coulomb_cutoff,
                max_num_pairs=-(coulomb_max_num_neighbors or 64),
                strategy=coulomb_neighbor_strategy,
                box=box_vecs,
            )

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Energy of each atom, (N, 1).

        Raises:
            ValueError: If the features bring no charges, or there is a box but no cutoff.
        """
        x, charges = features.x[:, : self.hidden_channels], features.x[:, self.hidden_channels :]
        if charges.shape[1] != self.qweights.shape[0]:
            raise ValueError(
                f"ScalarPlusWeightedCoulomb expects {self.qweights.shape[0]} charges of each atom and got "
                f"{charges.shape[1]}. Use model: tensornet2 with the same q_dim and num_layers."
            )
        return self.output_network(x) + self.coulomb(charges, graph)

    def coulomb(self, charges: Tensor, graph: Graph) -> Tensor:
        """Electrostatic energy of each atom in eV: (N, (L + 1) q_dim) -> (N, 1)."""
        i, j, r = self.pairs(graph)
        weighted = charges * (self.qweights / self.qweights.sum())
        product = (weighted.index_select(0, i) * charges.index_select(0, j)).sum(dim=1)  # (P,)
        pair = HALF_COULOMB * short_range_damping(r) * self.radial(r) * product  # (P,)
        return charges.new_zeros(graph.num_atoms).index_add(0, i, pair).index_add(0, j, pair)[:, None]

    def pairs(self, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        """Both atoms and the distance of every pair that interacts, once."""
        if self.distance is not None:
            box = self.distance.stored_box if graph.box is None else graph.box
            options = {"cutoff_upper": self.distance.cutoff_upper, "search": graph.search}
            pairs = edges_within(graph.pos, graph.batch, box, graph.num_systems, **options).pairs
            return pairs.atoms[0], pairs.atoms[1], pairs.dist
        if graph.box is not None and is_abstract():
            torch._assert_async(~graph.box.any(), NEEDS_CUTOFF)
        elif graph.box is not None and bool(graph.box.any()):
            raise ValueError(NEEDS_CUTOFF)
        search = graph.search or pairs_within
        i, j, _ = search(graph.pos.detach(), graph.batch, None, graph.num_systems, math.inf)
        return i, j, length(graph.pos.index_select(0, i) - graph.pos.index_select(0, j))

    def radial(self, r: Tensor) -> Tensor:
        """How the energy of two unit charges falls off, in 1/Å."""
        if self.coulomb_cutoff is None:
            return 1 / r
        R, eps = self.coulomb_cutoff, self.coulomb_epsilon_solvent
        return 1 / r + r.square() * ((eps - 1) / (2 * eps + 1) / R**3) - 3 * eps / (2 * eps + 1) / R


def _weight_table(
    q_weights: Sequence[float | Sequence[float]], num_layers: int, q_dim: int, dtype: torch.dtype
) -> Tensor:
    """Weights of all charge channels, layer by layer, ((L + 1) q_dim,)."""
    if q_dim < 1:
        raise ConfigError(
            "q_dim: output_model ScalarPlusWeightedCoulomb needs charge channels. Set q_dim to 1 or more."
        )
    if len(q_weights) != num_layers + 1:
        raise ConfigError(
            f"q_weights: {len(q_weights)} entries given for num_layers={num_layers}. Give num_layers + 1, a number or "
            f"a list of q_dim={q_dim} numbers each."
        )
    table = torch.empty(num_layers + 1, q_dim, dtype=dtype)
    for layer, weight in enumerate(q_weights):
        row = torch.as_tensor(weight, dtype=dtype)
        if row.shape not in ((), (1,), (q_dim,)):
            raise ConfigError(
                f"q_weights: entry {layer} has shape {tuple(row.shape)}. Give a number or q_dim={q_dim} numbers."
            )
        table[layer] = row
    if not bool(table.sum()):
        raise ConfigError("q_weights: the weights add up to zero, so there is no mean to take. Change one.")
    return table.flatten()
