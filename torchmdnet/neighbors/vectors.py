"""Vectors and distances of edges: one compiled loop on the CPU and one for its gradient, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from torchmdnet.neighbors.sound import apart
from torchmdnet.ops.batched import one_by_one
from torchmdnet.switches import is_on
from torchmdnet.tracing import device_kind, is_abstract

__all__ = ["Listed", "Measured", "edge_geometry", "has_loops", "length", "measured_edges", "pull_back"]


def has_loops(x: Tensor) -> bool:
    """Whether compiled loops take this tensor; ``TORCHMDNET_PLAIN_OPS=1`` turns them off."""
    is_plain = is_on("TORCHMDNET_PLAIN_OPS") or is_abstract()
    return device_kind(x) == "cpu" and not is_plain


def _can_record(x: Tensor) -> bool:
    transforms = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return has_loops(x) and x.dtype in (torch.float32, torch.float64) and transforms is None


class Listed(NamedTuple):
    """Which atoms and lattice vectors the P pairs and E edges of a graph join."""

    edge_index: Tensor  # (2, E)
    of_edge: Tensor  # (E,) pair of each edge; P for self loops
    sign: Tensor  # (E,) of the pair's vector along the edge; 0 for self loops
    i: Tensor  # (P,)
    j: Tensor  # (P,)
    shifts: Tensor | None  # (P, 3) lattice vectors from j to i; None without a box
    batch: Tensor  # (N,)
    closest: float = 0.0  # distances below it that are not zero are NaN in the definition, Å


def edge_geometry(pos: Tensor, box: Tensor | None, listed: Listed, loop: bool) -> tuple[Tensor, Tensor]:
    """Vectors of edges and distances of pairs, differentiable in positions (N, 3) and boxes (1 or S, 3, 3).

    Returns:
        Vectors (E, 3), and distances (P,), or with self loops (P + 1,) that end in a zero.
    """
    if _can_record(pos):
        return _EdgeGeometry.apply(pos, None if listed.shifts is None else box, listed, loop)  # type: ignore[return-value]
    return _edge_geometry(pos, box, listed, loop)


class Measured(NamedTuple):
    """What :func:`torchmdnet.neighbors.edges_of_pairs` and :func:`edge_geometry` find, without signs."""

    edge_index: Tensor  # (2, E)
    of_edge: Tensor  # (E,)
    reverse: Tensor  # (E,)
    row_start: Tensor  # (N + 1,)
    vec: Tensor  # (E, 3)
    dist: Tensor  # (P,), or with self loops (P + 1,)
    edge_dist: Tensor  # (E,)
    atoms: Tensor  # (2, P)


def measured_edges(
    pos: Tensor,
    batch: Tensor,
    box: Tensor | None,
    pairs: tuple[Tensor, Tensor, Tensor | None],
    loop: bool,
) -> Measured | None:
    """The edges of a list of pairs in one compiled loop, where the geometry is not differentiated; None elsewhere.

    Args:
        pos: Positions, (N, 3).
        batch: System of each atom, (N,).
        box: Lattice vectors, (1 or S, 3, 3); None if there are no shifts.
        pairs: First and second atom (P,), and shifts (P, 3) or None.
        loop: Whether to add the edge (a, a) of every atom.
    """
    is_followed = torch.is_grad_enabled() and (pos.requires_grad or (box is not None and box.requires_grad))
    if is_followed or not _can_record(pos):
        return None
    i, j, shifts = pairs
    if box is None or shifts is None:
        box, shifts = pos.new_empty(0, 3, 3), pos.new_empty(0, 3)
    found = _loops().measured_edges(*map(_array, (pos, box, batch, i, j, shifts)), loop)
    return Measured(*map(torch.from_numpy, found))


def _edge_geometry(pos: Tensor, box: Tensor | None, listed: Listed, loop: bool) -> tuple[Tensor, Tensor]:
    """The definition of :func:`edge_geometry`."""
    vec = pos.index_select(0, listed.i) - pos.index_select(0, listed.j)
    if listed.shifts is not None:
        assert box is not None
        if box.shape[0] == 1:
            vec = vec + listed.shifts @ box[0]
        else:
            boxes = box.index_select(0, listed.batch.index_select(0, listed.i))
            vec = vec + torch.einsum("pk,pkl->pl", listed.shifts, boxes)
    dist = length(vec)
    if listed.closest:
        dist = apart(vec, dist, listed.closest)
    if loop:
        vec, dist = torch.cat([vec, vec.new_zeros(1, 3)]), torch.cat([dist, dist.new_zeros(1)])
    return vec.index_select(0, listed.of_edge) * listed.sign[:, None].to(vec.dtype), dist


def length(vec: Tensor) -> Tensor:
    """Euclidean length with zero, not undefined, derivative where the vector vanishes: (..., 3) -> (...)."""
    square = vec.square().sum(dim=-1)
    is_zero = square == 0
    return torch.where(is_zero, square, torch.where(is_zero, 1.0, square).sqrt())


def _array(x: Tensor) -> Any:
    x = x.detach() if x.requires_grad else x
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()


def _loops() -> Any:
    from torchmdnet.neighbors import loops

    return loops


class _EdgeGeometry(Function):
    @staticmethod
    def forward(ctx: Any, pos: Tensor, box: Tensor | None, listed: Listed, loop: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pos, box)
        ctx.listed, ctx.loop = listed, loop
        vec = pos.new_empty(listed.of_edge.shape[0], 3)
        dist = pos.new_zeros(listed.i.shape[0] + loop)
        _loops().edge_geometry(_array(pos), *_arrays(pos, box, listed), vec.numpy(), dist.numpy())
        return vec, dist

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        pos, box = ctx.saved_tensors
        listed, (of_vec, of_dist) = ctx.listed, grads
        if torch.is_grad_enabled():
            wanted = [x for x in (pos, box) if x is not None and x.requires_grad]
            found = iter(
                torch.autograd.grad(_edge_geometry(pos, box, listed, ctx.loop), wanted, grads, create_graph=True)
            )
            return *(next(found) if x is not None and x.requires_grad else None for x in (pos, box)), None, None
        of_pos, of_box = torch.zeros_like(pos), None if box is None else torch.zeros_like(box)
        boxes = pos.new_empty(0, 3, 3) if of_box is None else of_box
        _loops().edge_geometry_backward(
            _array(pos), *_arrays(pos, box, listed), _array(of_vec), _array(of_dist), of_pos.numpy(), boxes.numpy()
        )
        return of_pos, of_box, None, None


def pull_back(
    row_start: Tensor,
    of_edge: Tensor,
    reverse: Tensor,
    geometry: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    systems: tuple[Tensor, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """From gradients in the geometry of edges to those in positions and strains; compiled, for the CPU.

    Args:
        row_start: Where the edges of each atom begin, (N + 1,).
        of_edge: The pair of each edge, (E,).
        reverse: The edge of opposite direction, (E,).
        geometry: Vectors of edges (E, 3) and distances of pairs (P,).
        grads: In these.
        systems: System of each atom (N,) and their number S; None if strains are of no interest.

    Returns:
        Minus the gradient in positions (N, 3), and that in the strain of each system (S, 3, 3), symmetrised.
    """
    vec = geometry[0]
    batch, num_systems = (row_start, 0) if systems is None else systems
    forces = vec.new_empty(row_start.shape[0] - 1, 3)
    virial = vec.new_zeros(num_systems, 3, 3, dtype=torch.float64)
    arrays = (row_start, of_edge, reverse, *geometry, *grads, batch, forces, virial)
    _loops().pull_back(*map(_array, arrays))
    return forces, None if systems is None else virial.to(vec.dtype)


def _arrays(pos: Tensor, box: Tensor | None, listed: Listed) -> tuple[Any, ...]:
    """What the loops read beside the positions."""
    boxes = pos.new_empty(0, 3, 3) if box is None else box
    shifts = pos.new_empty(0, 3) if listed.shifts is None else listed.shifts
    return tuple(map(_array, (boxes, listed.edge_index, listed.of_edge, listed.sign, shifts, listed.batch)))
