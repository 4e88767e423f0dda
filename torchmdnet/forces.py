r"""From the energy of a graph to forces and virials.

An energy is a function of the vectors of edges and of the distances of pairs, and where a part of the model looks
further, such as a prior with a cutoff of its own, of positions and lattice vectors. :func:`with_leaves` makes these
independent of each other, :class:`Slopes` are the derivatives in each of them, from autograd or written out by an
architecture, and :func:`forces_of` adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.graph import Graph, as_boxes, in_pairs, sum_to_atoms
from torchmdnet.neighbors import can_check, length, not_a_number, pull_back
from torchmdnet.neighbors.vectors import has_loops
from torchmdnet.ops import kernels
from torchmdnet.ops.sums import sum_by_index
from torchmdnet.tracing import device_kind, is_abstract
from torchmdnet.typing import Boxes, EdgeVectors, PairScalars, Positions, SystemIndex

__all__ = [
    "Leaves",
    "Slopes",
    "deformed",
    "derivatives_of",
    "detached",
    "forces_of",
    "slope_of_guard",
    "slopes_of_edges",
    "strained",
    "stress_of",
    "symmetrised",
    "with_leaves",
]


class Slopes(NamedTuple):
    """Derivatives of the summed energies; None is zero."""

    vec: EdgeVectors | None = None  # (E, 3) in the vectors of edges
    dist: PairScalars | None = None  # (P,) in the distances of pairs, as far as they enter beside the vectors
    pos: Positions | None = None  # (N, 3) in the positions, of parts that read them
    strain: Tensor | None = None  # (S, 3, 3) in a strain of these and of the lattice vectors they read

    def plus(self, other: Slopes) -> Slopes:
        """The derivatives of a sum."""
        pairs = zip(self, other, strict=True)
        return Slopes(*(y if x is None else x if y is None else x + y for x, y in pairs))


class Leaves(NamedTuple):
    """What the energy of a graph is differentiated in, see :class:`Slopes`; None for what is not looked at."""

    vec: Tensor
    dist: Tensor | None
    pos: Tensor | None
    strain: Tensor | None


def with_leaves(graph: Graph, *, has_positions: bool = True, strained: bool = False) -> tuple[Graph, Leaves]:
    """The same graph as a function of independent variables.

    They are detached from the graph, unless that depends on tensors of the caller that require a gradient.

    Args:
        graph: Any graph.
        has_positions: Whether positions and lattice vectors are among the variables, not the edges alone.
        strained: Whether a strain of positions and lattice vectors is one, too.
    """
    vec, pairs = _leaf(graph.edge_vec), graph.pairs
    if pairs is None:
        dist, edge_dist = None, length(vec)
    else:
        dist = _leaf(pairs.dist)
        edge_dist, pairs = dist.index_select(0, pairs.of_edge), pairs._replace(dist=dist)
    inner = not (graph.edge_vec.requires_grad or graph.pos.requires_grad)
    moved = graph._replace(edge_vec=vec, edge_dist=edge_dist, pairs=pairs, inner=inner)
    if not has_positions:
        return moved, Leaves(vec, dist, None, None)
    pos = _leaf(graph.pos)
    place, box, strain, guard = pos, graph.box, None, graph.guard
    if strained:
        strain = pos.new_zeros(graph.num_systems, 3, 3).requires_grad_()
        place, box = deformed(pos, graph.batch, graph.box, strain)
    if guard is not None:
        guard = guard.detach() + not_a_number(place, graph.batch, graph.num_systems)
    return moved._replace(pos=place, box=box, guard=guard), Leaves(vec, dist, pos, strain)


def detached(graph: Graph) -> Graph:
    """The same graph without a history of its edges."""
    pairs = graph.pairs
    return graph._replace(
        edge_vec=graph.edge_vec.detach(),
        edge_dist=graph.edge_dist.detach(),
        pairs=None if pairs is None else pairs._replace(dist=pairs.dist.detach()),
        guard=None if graph.guard is None else graph.guard.detach(),
    )


def _leaf(x: Tensor) -> Tensor:
    if x.requires_grad:
        return x.view_as(x)
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def slope_of_guard(graph: Graph) -> Positions | None:
    """Slopes in the positions, (N, 3), that are NaN in systems that are not finite, also of atoms without an edge."""
    return None if graph.guard is None else graph.guard[:, None].expand(-1, 3)


def derivatives_of(
    energy: Tensor, wanted: Sequence[Tensor | None], *, differentiable: bool = False
) -> list[Tensor | None]:
    """Gradients of the summed energies; None in what they do not depend on, and for None."""
    asked = [x for x in wanted if x is not None]
    if not energy.requires_grad or not asked:
        return [None for _ in wanted]
    found = torch.autograd.grad(
        [energy.sum()], asked, create_graph=differentiable, retain_graph=differentiable, allow_unused=True
    )
    slopes = iter(found)
    return [None if x is None else next(slopes) for x in wanted]


def slopes_of_edges(edge_vec: EdgeVectors, graph: Graph, slopes: Slopes) -> EdgeVectors:
    """The whole derivative in the vectors (E, 3) that a graph was made of, in their order.

    Args:
        edge_vec: Given to :func:`torchmdnet.graph.graph_of_edges`; requires a gradient.
        graph: Made by it.
        slopes: Derivatives of the energy, in which the result is differentiable.
    """
    assert graph.pairs is not None
    terms = [(y, g) for y, g in ((graph.edge_vec, slopes.vec), (graph.pairs.dist, slopes.dist)) if g is not None]
    if not terms:
        return torch.zeros_like(edge_vec)
    keep = torch.is_grad_enabled() and any(g.requires_grad for _, g in terms)
    (found,) = torch.autograd.grad(
        [y for y, _ in terms], [edge_vec], [g for _, g in terms], create_graph=keep, retain_graph=True
    )
    return found


def forces_of(graph: Graph, slopes: Slopes, *, strained: bool) -> tuple[Tensor, Tensor | None]:
    r"""Forces (N, 3) and, if wanted, the derivative in a strain of each system (S, 3, 3), symmetrised.

    With the whole derivative :math:`g_e` in the vector :math:`d_e` of each edge from j to i,

    .. math::
        F_i = \sum_{e: j \to i} -g_e + \sum_{e: i \to j} g_e, \qquad
        \partial E / \partial \varepsilon = \sum_e d_e \otimes g_e .

    Args:
        graph: Its edges may come in both directions, as pairs, or stand alone.
        slopes: Derivatives of the energy. Forces and virial are differentiable in them and in the graph.
        strained: Whether to differentiate in strains.
    """
    forces, virial = _of_edges(graph, slopes, strained)
    if slopes.pos is not None:
        forces = forces - slopes.pos
    if virial is not None and slopes.strain is not None:
        virial = virial + symmetrised(slopes.strain)
    return forces, virial


def _of_edges(graph: Graph, slopes: Slopes, strained: bool) -> tuple[Tensor, Tensor | None]:
    of_vec, of_dist, pairs = slopes.vec, slopes.dist, graph.pairs
    if of_vec is None and of_dist is None:
        nothing = graph.edge_vec.new_zeros(graph.num_systems, 3, 3) if strained else None
        return torch.zeros_like(graph.pos), nothing
    is_paired = in_pairs(graph)
    if pairs is not None and is_paired and _is_final(graph, of_vec, of_dist):
        kind = device_kind(graph.edge_vec)
        has_loops_here = can_check(graph.edge_vec) and has_loops(graph.edge_vec)
        if has_loops_here or (kind in kernels.TWINS and kernels.has_kernel(graph.edge_vec)):
            both = (
                torch.zeros_like(graph.edge_vec) if of_vec is None else of_vec,
                torch.zeros_like(pairs.dist) if of_dist is None else of_dist,
            )
            edges = (pairs.row_start, pairs.of_edge, pairs.reverse, (graph.edge_vec, pairs.dist), both)
            if has_loops_here:
                return pull_back(*edges, (graph.batch, graph.num_systems) if strained else None)
            return _by_kernel(graph, edges, strained)
    (i, j), vec = graph.edge_index, graph.edge_vec
    slope = torch.zeros_like(vec) if of_vec is None else of_vec  # (E, 3)
    if of_dist is not None:
        assert pairs is not None
        share = 0.5 if is_paired else 1.0  # each direction of a pair counts half of its distance
        is_zero = pairs.dist == 0  # self loops share one distance, also those of systems that are not finite
        ratio = share * torch.where(is_zero, 0.0, of_dist) / torch.where(is_zero, 1.0, pairs.dist)
        slope = slope + ratio.index_select(0, pairs.of_edge)[:, None] * vec
    if pairs is not None and is_paired:  # nothing is left of self loops
        forces = -sum_to_atoms(slope - slope.index_select(0, pairs.reverse), graph)
    else:
        forces = slope.new_zeros(graph.num_atoms, 3).index_add(0, i, -slope).index_add(0, j, slope)
    if not strained:
        return forces, None
    virial = vec[:, :, None] * slope[:, None, :]  # (E, 3, 3)
    systems = graph.batch.index_select(0, i)
    return forces, slope.new_zeros(graph.num_systems, 3, 3).index_add(0, systems, symmetrised(virial))


def _is_final(graph: Graph, *slopes: Tensor | None) -> bool:
    """Whether the result will not be differentiated, which it cannot be where a loop or a kernel makes it."""
    tensors = (graph.edge_vec, graph.pairs.dist if graph.pairs else None, *slopes)
    is_followed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return graph.edge_vec.dtype in (torch.float32, torch.float64) and not is_followed


def _by_kernel(graph: Graph, edges: tuple[Any, ...], strained: bool) -> tuple[Tensor, Tensor | None]:
    from torchmdnet.ops.triton import passes

    forces, of_atoms = passes.forces_of_slopes(*edges, strained=strained)
    if of_atoms is None:
        return forces, None
    return forces, sum_by_index(symmetrised(of_atoms), graph.batch, graph.num_systems)


def symmetrised(tensor: Tensor) -> Tensor:
    """The symmetric part of matrices, (..., 3, 3)."""
    return (tensor + tensor.mT) / 2


def strained(
    pos: Positions, batch: SystemIndex | None, box: Boxes | None, num_systems: int | None
) -> tuple[Positions, Boxes | None, Tensor]:
    r"""Positions and lattice vectors under a strain of each system, :math:`r \to r (1 + \varepsilon)`.

    Returns:
        Positions, box, and the strain :math:`\varepsilon` (S, 3, 3), zero, to differentiate in.
    """
    if num_systems is None:
        num_systems = 1 if batch is None else int(batch.max()) + 1 if batch.numel() else 0
    strain = pos.new_zeros(num_systems, 3, 3).requires_grad_()
    return *deformed(pos, batch, box, strain), strain


def deformed(
    pos: Positions, batch: SystemIndex | None, box: Boxes | None, strain: Tensor
) -> tuple[Positions, Boxes | None]:
    """Positions and lattice vectors under a strain of each system, (S, 3, 3)."""
    deformation = torch.eye(3, dtype=pos.dtype, device=pos.device) + strain  # (S, 3, 3)
    of_atom = deformation.expand(pos.shape[0], 3, 3) if batch is None else deformation.index_select(0, batch.long())
    box = as_boxes(box, strain.shape[0], pos.dtype, pos.device)
    return torch.einsum("nk,nkl->nl", pos, of_atom), None if box is None else box @ deformation


def stress_of(virial: Tensor, box: Boxes | None) -> Tensor:
    """Divide derivatives in the strain (S, 3, 3) by the volumes; NaN for systems without three lattice vectors.

    Raises:
        ValueError: If no system has three lattice vectors.
    """
    volume = virial.new_zeros(1) if box is None else torch.linalg.det(box.to(virial.dtype)).abs().reshape(-1)
    has_volume = (volume > 0).expand(virial.shape[0])[:, None, None]  # (S, 1, 1)
    if not is_abstract() and virial.shape[0] and not bool(has_volume.any()):
        raise ValueError(
            "stress: no system of the batch has three lattice vectors, so there is no volume to refer to. Pass box, or "
            "ask without stress."
        )
    return torch.where(has_volume, virial / torch.where(volume > 0, volume, 1.0)[:, None, None], torch.nan)
