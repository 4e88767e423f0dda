"""The one value that travels through a model: a batch of systems and the edges within the cutoff."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.domains import Domain, totalled
from torchmdnet.neighbors import (
    CLOSEST,
    DeviceEdges,
    FixedSearch,
    Listed,
    Search,
    VerletList,
    apart,
    by_receiver,
    can_check,
    check_apart,
    check_finite,
    edge_geometry,
    edges_of_pairs,
    edges_on_device,
    in_bounds,
    length,
    measured_edges,
    not_a_number,
    pairs_within,
    searches_on_device,
)
from torchmdnet.neighbors.lattice import is_too_flat
from torchmdnet.ops.sums import sum_by_index
from torchmdnet.tracing import device_kind, is_abstract
from torchmdnet.typing import (
    AtomicNumbers,
    AtomScalars,
    Boxes,
    EdgeIndex,
    EdgeScalars,
    EdgeVectors,
    PairScalars,
    Positions,
    SystemIndex,
    SystemScalars,
)

__all__ = [
    "Edges",
    "Graph",
    "Inputs",
    "Pairs",
    "as_boxes",
    "bare_graph",
    "build_graph",
    "count_systems",
    "edges_within",
    "graph_of_edges",
    "guard_of_edges",
    "in_pairs",
    "sum_to_atoms",
    "sum_to_systems",
]


#: More than there are rows in any embedding.
MOST_ELEMENTS = 1 << 30


class Inputs(NamedTuple):
    """S systems with N atoms in the order of the established call, before anybody has looked for neighbours."""

    z: AtomicNumbers  # (N,)
    pos: Positions  # (N, 3) Å
    batch: SystemIndex | None = None  # (N,); None is one system
    box: Boxes | None = None  # (3, 3) shared or (S, 3, 3) Å; a zero row is an open direction
    q: SystemScalars | None = None  # (S,) total charge, e
    s: SystemScalars | None = None  # (S,) spin
    extra: dict[str, Tensor] | None = None  # for heads and priors, by name
    num_systems: int | None = None  # None reads it from batch
    search: Search | None = None  # who finds neighbours; None starts afresh


class Pairs(NamedTuple):
    """The edges seen as P pairs, each of which is two edges of opposite direction.

    Anything that depends on distance alone is the same for both directions, so it is computed on pairs. Where there
    are self loops, they all share one more pair, the last, at distance 0.

    In a graph made from a list of edges, :func:`graph_of_edges`, each edge stands alone: P is E, and ``reverse`` is
    empty.
    """

    atoms: EdgeIndex  # (2, P) without the pair of the self loops
    dist: PairScalars  # (P,) or (P + 1,) Å
    of_edge: Tensor  # (E,) the pair each edge belongs to
    reverse: Tensor  # (E,) the edge of opposite direction; a self loop is its own
    row_start: Tensor  # (N + 1,) where the edges of each receiver begin


class Graph(NamedTuple):
    """A batch of S systems with N atoms and the E directed edges within the cutoff.

    Row 0 of ``edge_index`` receives (i), row 1 sends (j); edges are sorted by receiver. ``edge_vec`` points from
    j to i, image shift included, and like ``edge_dist`` it is differentiable in ``pos`` and ``box``. A self loop has
    a zero vector and distance 0.
    """

    z: AtomicNumbers  # (N,)
    pos: Positions  # (N, 3) Å
    batch: SystemIndex  # (N,)
    num_systems: int
    edge_index: EdgeIndex  # (2, E)
    edge_vec: EdgeVectors  # (E, 3) Å
    edge_dist: EdgeScalars  # (E,) Å
    box: Boxes | None  # (1, 3, 3) or (S, 3, 3) Å; a zero row is an open direction
    q: SystemScalars | None  # (S,) total charge, e
    s: SystemScalars | None  # (S,) spin
    extra: dict[str, Tensor]  # whatever else the data set brought, by name
    pairs: Pairs | None = None  # the same edges, as pairs
    inner: bool = False  # no second derivatives in the geometry are possible: its leaves are the model's own
    search: Search | None = None  # who found them, for parts that look further; None starts afresh
    guard: AtomScalars | None = None  # (N,) 0, or NaN for all atoms of a system that is not finite; None is checked
    cutoff: float = 0.0  # Å; all pairs that are closer than this are there, 0 if it is not known
    domain: Domain | None = None  # where atoms are a part of their system; None is all of it

    @property
    def num_atoms(self) -> int:
        """Number of atoms N in the batch."""
        return self.z.shape[0]

    @property
    def differentiates_systems(self) -> bool:
        """Whether a gradient in the total charges or spins may be asked for."""
        return any(value is not None and value.requires_grad for value in (self.q, self.s))


def as_boxes(box: Tensor | None, num_systems: int, dtype: torch.dtype, device: torch.device) -> Boxes | None:
    """Bring a box argument into the shape (1, 3, 3) or (S, 3, 3).

    Raises:
        ValueError: If the shape fits neither one shared box nor one box per system.
    """
    if box is None:
        return None
    if box.dim() == 2 and box.shape == (3, 3):
        box = box[None]
    if box.dim() != 3 or box.shape[1:] != (3, 3) or box.shape[0] not in (1, num_systems):
        raise ValueError(
            f'Expected "box_vectors" to have shape (n_batch, 3, 3): box has shape {tuple(box.shape)} but batch holds '
            f"{num_systems} systems. Pass (3, 3) to share one box, or ({num_systems}, 3, 3)."
        )
    return box.to(device=device, dtype=dtype)


def count_systems(
    batch: SystemIndex, box: Boxes | None = None, q: SystemScalars | None = None, s: SystemScalars | None = None
) -> int:
    """Number of systems S of a batch.

    Where tensors have no values (:func:`torchmdnet.tracing.is_abstract`) it is the length of what has one row for each
    system, if that was given.
    """
    if not is_abstract():
        return int(batch.max()) + 1 if batch.numel() else 0
    for value in (q, s):
        if value is not None:
            return value.numel()
    if box is not None and box.dim() == 3 and box.shape[0] != 1:
        return box.shape[0]
    if isinstance(batch.shape[0], int) and batch.shape[0] == 0:  # compiled for no atoms; symbols are not asked
        return 0
    last: Any = batch.max().item()  # int() would fix the number where a call is exported
    torch._check(last >= 0)
    return last + 1


class Edges(NamedTuple):
    """Directed edges sorted by receiver."""

    edge_index: EdgeIndex  # (2, E)
    vec: EdgeVectors  # (E, 3) Å
    dist: EdgeScalars  # (E,) Å
    pairs: Pairs


def edges_within(
    pos: Positions,
    batch: SystemIndex,
    box: Boxes | None,
    num_systems: int,
    *,
    cutoff_upper: float,
    cutoff_lower: float = 0.0,
    loop: bool = False,
    search: Search | None = None,
    closest: float = 0.0,
) -> Edges:
    """Directed edges with cutoff_lower <= distance < cutoff_upper, sorted by receiver, differentiable in pos and box.

    Args:
        pos: Positions in Å, (N, 3).
        batch: System of each atom, (N,) int64.
        box: Lattice vectors, (1, 3, 3) or (S, 3, 3) Å, or None; see :func:`as_boxes`.
        num_systems: Number of systems S.
        cutoff_upper: In Å.
        cutoff_lower: In Å.
        loop: Add the edge (i, i) of every atom, with zero vector, whatever the lower cutoff.
        search: Finds the pairs; None is :func:`torchmdnet.neighbors.pairs_within`.
        closest: Pairs nearer than this, in Å, but not at the same place are refused; where values cannot be looked at,
            their distance is NaN.

    Raises:
        ValueError: Naming the first pair that is too close.
    """
    found = _on_device(pos, batch, box, num_systems, cutoff_upper, cutoff_lower, loop, search, closest)
    if found is not None:
        return found
    i, j, shifts = (search or pairs_within)(pos, batch, box, num_systems, cutoff_upper, cutoff_lower)
    measured = measured_edges(pos, batch, box, (i, j, shifts), loop)
    if measured is not None:
        index, of_edge, reverse, row_start, vec, dist, edge_dist, atoms = measured
        check_apart(index, vec, edge_dist, closest, dist[: i.shape[0]])
        return Edges(index, vec, edge_dist, Pairs(atoms, dist, of_edge, reverse, row_start))
    index, of_edge, reverse, row_start, sign = edges_of_pairs(i, j, pos.shape[0], loop)
    vec, dist = edge_geometry(pos, box, Listed(index, of_edge, sign, i, j, shifts, batch, closest), loop)
    edge_dist = dist.index_select(0, of_edge)
    check_apart(index, vec, edge_dist, closest, dist[: i.shape[0]])
    return Edges(index, vec, edge_dist, Pairs(torch.stack([i, j]), dist, of_edge, reverse, row_start))


def _on_device(
    pos: Positions,
    batch: SystemIndex,
    box: Boxes | None,
    num_systems: int,
    cutoff: float,
    lower: float,
    loop: bool,
    search: Search | None,
    closest: float,
) -> Edges | None:
    """:func:`edges_within` by the kernels of a GPU; None where these do not search."""
    if isinstance(search, FixedSearch):
        find: Any = search.edges
    elif search is None or isinstance(search, VerletList):  # which keeps lists on the CPU
        find = edges_on_device
    else:
        return None
    if pos.shape[0] == 0 or not searches_on_device(pos):
        return None
    is_followed = torch.is_grad_enabled() and (pos.requires_grad or (box is not None and box.requires_grad))
    options = {"loop": loop, "closest": closest, "lists": is_followed}
    found: DeviceEdges = find(pos, batch, box, num_systems, cutoff, lower, **options)
    vec, dist, edge_dist = found.vec, found.dist, found.edge_dist
    if is_followed:
        i, j = found.atoms
        listed = Listed(
            found.edge_index, found.of_edge, found.sign, i, j, None if box is None else found.shifts, batch, closest
        )
        vec, dist = edge_geometry(pos, box, listed, loop)
        edge_dist = dist.index_select(0, found.of_edge)
    pairs = Pairs(found.atoms, dist, found.of_edge, found.reverse, found.row_start)
    return Edges(found.edge_index, vec, edge_dist, pairs)


def in_pairs(graph: Graph) -> bool:
    """Whether the edges come in both directions; those of a list that an engine brought may stand alone."""
    return graph.pairs is not None and graph.pairs.reverse.shape == graph.pairs.of_edge.shape


def build_graph(
    z: AtomicNumbers,
    pos: Positions,
    batch: SystemIndex | None = None,
    box: Boxes | None = None,
    q: SystemScalars | None = None,
    s: SystemScalars | None = None,
    *,
    cutoff_upper: float,
    cutoff_lower: float = 0.0,
    loop: bool = False,
    num_systems: int | None = None,
    extra: dict[str, Tensor] | None = None,
    search: Search | None = None,
    max_z: int = MOST_ELEMENTS,
) -> Graph:
    """Turn the established call ``z, pos, batch, box, q, s`` into a graph.

    Args:
        z: Atomic numbers, (N,), any integer type.
        pos: Positions in Å, (N, 3).
        batch: System of each atom, (N,), any integer type; None is one system.
        box: (3, 3) to share one box or (S, 3, 3), rows are lattice vectors in Å; a zero row is an open direction.
        q: Total charge of each system in e, (S,), (S, 1) or a scalar for a single system.
        s: Spin of each system, shapes as ``q``.
        cutoff_upper: Edges are shorter than this, in Å.
        cutoff_lower: Edges are at least this long, in Å; self loops are exempt.
        loop: Whether atoms receive from themselves.
        num_systems: Number of systems S; None reads it from ``batch``.
        extra: Per-atom or per-system tensors for heads and priors, by name.
        search: Who finds neighbours, here and for parts that look further; None starts afresh.
        max_z: Atomic numbers are below this. On a GPU, where looking would wait for the device, one that is not, like a
            system that is none of S, makes the results of a system NaN.

    Raises:
        ValueError: If a shape does not fit the others, a number is not finite, or two atoms all but coincide; the
            message names the argument.
    """
    if z.dim() != 1 or z.is_floating_point():
        raise ValueError(f"z must hold one integer per atom, shape (N,); it has shape {tuple(z.shape)}, {z.dtype}.")
    num_atoms = z.shape[0]
    if pos.shape != (num_atoms, 3):
        raise ValueError(f"pos has shape {tuple(pos.shape)} but z holds {num_atoms} atoms. Pass ({num_atoms}, 3).")
    if batch is None:
        batch = torch.zeros(num_atoms, dtype=torch.long, device=z.device)
        num_systems = 1 if num_systems is None else num_systems
    elif batch.shape != (num_atoms,) or batch.is_floating_point():
        raise ValueError(
            f"batch must hold one integer per atom, ({num_atoms},); it has shape {tuple(batch.shape)}, {batch.dtype}."
        )
    else:
        batch = batch.long()
    if num_systems is None:
        num_systems = count_systems(batch, box, q, s)
    box = as_boxes(box, num_systems, pos.dtype, pos.device)
    q, s = _per_system(q, "q", num_systems, pos), _per_system(s, "s", num_systems, pos)
    check_finite("pos", pos, "atom")
    z, guard = z.long(), None
    if not can_check(pos):
        if is_abstract() or device_kind(pos) == "cpu":
            guard = _guard(pos, batch, num_systems, box, cutoff_upper, (q, s))
        else:
            z, batch, guard = in_bounds(z, pos, batch, num_systems, max_z, box, q, s)
    edges = edges_within(
        pos,
        batch,
        box,
        num_systems,
        cutoff_upper=cutoff_upper,
        cutoff_lower=cutoff_lower,
        loop=loop,
        search=search,
        closest=CLOSEST * cutoff_upper,
    )
    return Graph(
        z=z,
        pos=pos,
        batch=batch,
        num_systems=num_systems,
        edge_index=edges.edge_index,
        edge_vec=edges.vec,
        edge_dist=edges.dist,
        box=box,
        q=q,
        s=s,
        extra=extra or {},
        pairs=edges.pairs,
        search=search,
        guard=guard,
        cutoff=float(cutoff_upper) if cutoff_lower <= 0 else 0.0,
    )


def graph_of_edges(
    z: AtomicNumbers,
    edge_index: EdgeIndex,
    edge_vec: EdgeVectors,
    batch: SystemIndex | None = None,
    q: SystemScalars | None = None,
    s: SystemScalars | None = None,
    *,
    cutoff_upper: float,
    cutoff_lower: float = 0.0,
    loop: bool = False,
    num_systems: int | None = None,
    extra: dict[str, Tensor] | None = None,
    max_z: int = MOST_ELEMENTS,
) -> Graph:
    """A graph of edges that somebody else found; it has no positions, so ``pos`` is not a number.

    Args:
        z: Atomic numbers, (N,), any integer type.
        edge_index: (2, E) in any order; row 0 receives, row 1 sends. An edge counts in its own direction only, and need
            not have a partner of opposite direction.
        edge_vec: From sender to receiver, image shift included, (E, 3) Å. The graph is differentiable in it.
        batch: See :func:`build_graph`.
        q: See :func:`build_graph`.
        s: See :func:`build_graph`.
        cutoff_upper: Edges of this length, in Å, or longer are left out.
        cutoff_lower: Shorter edges are left out.
        loop: Whether atoms receive from themselves; such edges are added, and edges (i, i) of no length left out.
        num_systems: See :func:`build_graph`.
        extra: See :func:`build_graph`.
        max_z: See :func:`build_graph`.

    Raises:
        ValueError: If a shape does not fit the others, an edge joins an atom that is not there, or two systems, a
            vector is not finite, or two atoms all but coincide.
    """
    num_atoms, device = z.shape[0], z.device
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        raise ValueError(
            f"edge_index must hold two integers for each edge, (2, E); it has shape {tuple(edge_index.shape)}, "
            f"{edge_index.dtype}."
        )
    if edge_vec.shape != (edge_index.shape[1], 3):
        raise ValueError(
            f"edge_vec has shape {tuple(edge_vec.shape)} but edge_index holds {edge_index.shape[1]} edges. "
            f"Pass ({edge_index.shape[1]}, 3)."
        )
    edge_index = edge_index.long()
    graph = bare_graph(
        z.long(),
        edge_vec.new_full((num_atoms, 3), torch.nan),
        torch.zeros(num_atoms, dtype=torch.long, device=device) if batch is None else batch.long(),
        extra=extra,
        num_systems=1 if batch is None and num_systems is None else num_systems,
    )
    if not is_abstract() and device_kind(device) == "cpu" and edge_index.numel():
        if int(edge_index.min()) < 0 or int(edge_index.max()) >= num_atoms:
            found = int(edge_index.max()) if int(edge_index.min()) >= 0 else int(edge_index.min())
            raise ValueError(f"edge_index names atom {found}, but z holds {num_atoms} atoms, 0 to {num_atoms - 1}.")
        if not torch.equal(graph.batch[edge_index[0]], graph.batch[edge_index[1]]):
            raise ValueError("edge_index holds an edge between atoms of two systems. Leave such edges out.")
    check_finite("edge_vec", edge_vec, "edge")
    q, s = _per_system(q, "q", graph.num_systems, graph.pos), _per_system(s, "s", graph.num_systems, graph.pos)
    closest, dist = CLOSEST * cutoff_upper, length(edge_vec)  # (E,)
    check_apart(edge_index, edge_vec, dist, closest)
    guard = None
    if not can_check(edge_vec):
        if not is_abstract() and device_kind(device) != "cpu":  # as in build_graph
            known, elements = edge_index.clamp(0, max(num_atoms - 1, 0)), graph.z.clamp(0, max_z - 1)
            is_out = (known != edge_index).any(dim=0) | (elements != graph.z).index_select(0, known[0])
            edge_vec = torch.where(is_out[:, None], torch.nan, edge_vec)
            edge_index, graph = known, graph._replace(z=elements)
        guard = guard_of_edges(edge_index, edge_vec, graph.batch, graph.num_systems, q, s)
    is_within = (dist < cutoff_upper) & (dist >= cutoff_lower) & ((edge_index[0] != edge_index[1]) | (dist > 0))
    kept = is_within.nonzero()[:, 0]
    atoms = torch.arange(num_atoms if loop else 0, device=device)
    receiver = torch.cat([atoms, edge_index[0, kept]])
    order, row_start = by_receiver(receiver, num_atoms)
    sender = torch.cat([atoms, edge_index[1, kept]]).index_select(0, order)

    place = torch.cat([torch.full_like(atoms, kept.shape[0]), torch.arange(kept.shape[0], device=device)])
    of_edge = place.index_select(0, order)  # the self loops share the last row
    vec = torch.cat([edge_vec.index_select(0, kept), edge_vec.new_zeros(int(loop), 3)])
    dist = dist.index_select(0, kept)
    if guard is not None:
        dist = apart(edge_vec.index_select(0, kept), dist, closest)
    dist = torch.cat([dist, dist.new_zeros(int(loop))])
    return graph._replace(
        edge_index=torch.stack([receiver.index_select(0, order), sender]),
        edge_vec=vec.index_select(0, of_edge),
        edge_dist=dist.index_select(0, of_edge),
        q=q,
        s=s,
        pairs=Pairs(edge_index[:, kept], dist, of_edge, atoms.new_empty(0), row_start),
        guard=guard,
    )


def _guard(
    pos: Positions,
    batch: SystemIndex,
    num_systems: int,
    box: Boxes | None,
    cutoff: float,
    others: tuple[SystemScalars | None, ...],
) -> AtomScalars:
    """See :func:`torchmdnet.neighbors.not_a_number`; boxes count that a search by values would have refused."""
    flat = None
    if box is not None and is_abstract():
        flat = torch.where(is_too_flat(box, cutoff), torch.nan, 0.0).to(pos.dtype)
    return not_a_number(pos, batch, num_systems, box, flat, *others)


def guard_of_edges(
    edge_index: EdgeIndex, edge_vec: EdgeVectors, batch: SystemIndex, num_systems: int, *others: Tensor | None
) -> AtomScalars:
    """The guard of a graph, (N,), whose edges somebody else found; see :func:`torchmdnet.neighbors.not_a_number`."""
    receiver = edge_index[0]
    of_edge = not_a_number(edge_vec, batch.index_select(0, receiver), num_systems, *others)  # (E,)
    return of_edge.new_zeros(batch.shape[0]).index_add(0, receiver, of_edge)


def bare_graph(
    z: AtomicNumbers,
    pos: Positions,
    batch: SystemIndex,
    box: Boxes | None = None,
    extra: dict[str, Tensor] | None = None,
    num_systems: int | None = None,
) -> Graph:
    """A graph without edges, for parts that only look at atoms or search neighbours of their own."""
    if num_systems is None:
        num_systems = count_systems(batch, box)
    return Graph(
        z=z,
        pos=pos,
        batch=batch,
        num_systems=num_systems,
        edge_index=torch.empty(2, 0, dtype=torch.long, device=z.device),
        edge_vec=pos.new_empty(0, 3),
        edge_dist=pos.new_empty(0),
        box=as_boxes(box, num_systems, pos.dtype, pos.device),
        q=None,
        s=None,
        extra=extra or {},
    )


def _per_system(value: Tensor | None, name: str, num_systems: int, pos: Positions) -> SystemScalars | None:
    """One number per system, in the precision of the positions."""
    if value is None:
        return None
    value = torch.as_tensor(value)
    if value.numel() != num_systems or value.dim() > 2:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but batch holds {num_systems} systems. "
            f"Pass one value per system, shape ({num_systems},)."
        )
    check_finite(name, value.reshape(num_systems), "system")
    return value.reshape(num_systems).to(device=pos.device, dtype=pos.dtype)


def sum_to_atoms(x: Tensor, graph: Graph) -> Tensor:
    """Sum edges to the atoms that receive them: (E, ...) -> (N, ...)."""
    return x.new_zeros(graph.z.shape[0], *x.shape[1:]).index_add(0, graph.edge_index[0], x)


def sum_to_systems(x: Tensor, graph: Graph) -> Tensor:
    """Sum atoms to the systems they belong to, over all domains: (N, ...) -> (S, ...)."""
    total = sum_by_index(x, graph.batch, graph.num_systems)
    return total if graph.domain is None else totalled(total, graph.domain)
