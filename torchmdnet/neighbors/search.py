"""The entry that picks a neighbour search for a batch of systems."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torchmdnet.neighbors.brute import all_pairs, count_candidates
from torchmdnet.neighbors.cells import vesin_pairs
from torchmdnet.neighbors.cells import without_transforms as _array
from torchmdnet.neighbors.device import edges_on_device, searches_on_device
from torchmdnet.neighbors.lattice import MOST_ALONG, MOST_IMAGES, lattice_of
from torchmdnet.neighbors.traceable import traceable_pairs
from torchmdnet.neighbors.vectors import has_loops
from torchmdnet.tracing import device_kind, is_abstract
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["Search", "by_receiver", "edges_of_pairs", "pairs_within"]

#: Atoms per system up to which a compiled loop over all pairs is quickest.
LOOP_LIMIT = 200
#: Atoms per periodic system up to which such a loop, over the images in reach, is quicker than building cells.
IMAGES_LIMIT = 600
#: Candidate pairs per system up to which looking at every one of them beats building cells on the CPU.
BRUTE_LIMIT = 2_000
#: And of all systems together elsewhere, where no kernels search: what looking at them takes is limited too.
DEVICE_LIMIT = 2_000_000


@runtime_checkable
class Search(Protocol):
    """Finds what :func:`pairs_within` finds, in its own way."""

    def __call__(
        self,
        pos: Positions,
        batch: SystemIndex,
        box: Boxes | None,
        num_systems: int,
        cutoff: float,
        lower: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :func:`pairs_within`."""
        ...


@torch.no_grad()
def pairs_within(
    pos: Positions, batch: SystemIndex, box: Boxes | None, num_systems: int, cutoff: float, lower: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every pair of atoms closer than a cutoff, once, counting each periodic image.

    Works for any lattice in any orientation, any mix of open and periodic directions, and cutoffs beyond half
    the box. Positions need not lie inside the box.

    Args:
        pos: Positions in Å, (N, 3).
        batch: System of each atom, (N,); need not be sorted.
        box: Lattice vectors as rows, (1, 3, 3) shared or (S, 3, 3); a zero row is an open direction. None is open.
        num_systems: Number of systems S.
        cutoff: Pairs with distance < cutoff are kept, in Å.
        lower: Pairs with distance >= lower are kept, in Å.

    Returns:
        ``i`` and ``j``, (P,) int64, and the lattice vectors to add, ``shifts`` (P, 3) counts, so that the vector from
        ``j`` to ``i`` is ``pos[i] - pos[j] + shifts @ box``; None without a box. Each pair is listed in one of its two
        directions. An atom is never its own neighbour, but its periodic images are.
    """
    if lower > 0:
        i, j, shifts = pairs_within(pos, batch, box, num_systems, cutoff)
        far = _distances(pos, batch, box, num_systems, i, j, shifts) >= lower
        return i[far], j[far], None if shifts is None else shifts[far]
    if is_abstract():
        i, j, shifts = traceable_pairs(pos, batch, pos.new_zeros(1, 3, 3) if box is None else box, num_systems, cutoff)
        return i, j, None if box is None else shifts
    if pos.shape[0] > 0 and searches_on_device(pos):
        found = edges_on_device(pos, batch, box, num_systems, cutoff, lists=True)
        return found.atoms[0], found.atoms[1], None if box is None else found.shifts
    if box is not None and not bool(box.any()):
        box = None
    if pos.shape[0] == 0:
        empty = batch.new_zeros(0)
        return empty, empty, None if box is None else pos.new_zeros(0, 3)
    if is_few(pos, box, num_systems):
        i, j = _loops().close_pairs(_array(pos), _array(batch), float(cutoff) ** 2)
        return torch.from_numpy(i), torch.from_numpy(j), None
    if box is not None and has_loops(pos) and pos.shape[0] <= IMAGES_LIMIT * num_systems and not math.isinf(cutoff):
        found = pairs_of_images(pos, batch, box, cutoff)
        if found is not None:  # or the next search says which box has no volume, or too little
            return found
    lattice = None if box is None else lattice_of(box, num_systems, cutoff)
    kind = device_kind(pos)
    limit = BRUTE_LIMIT * num_systems if kind == "cpu" else DEVICE_LIMIT
    if math.isinf(cutoff) or count_candidates(batch, lattice, num_systems) <= limit:
        return all_pairs(pos, batch, lattice, num_systems, cutoff)
    if kind in ("cpu", "mps"):  # that has no double precision
        return vesin_pairs(pos, batch, lattice, num_systems, cutoff)
    i, j, shifts = traceable_pairs(pos, batch, pos.new_zeros(1, 3, 3) if box is None else box, num_systems, cutoff)
    return i, j, None if box is None else shifts


def pairs_of_images(pos: Tensor, batch: Tensor, box: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """See :func:`pairs_within`: every pair of a periodic system is looked at, in all images that may be in reach.

    An atom and its partner come in the order i <= j, and pairs in the order of their atoms and lattice vectors. None if
    a box has no volume, or too many images in reach. For the CPU.
    """
    boxes = _array(box).astype(np.float64)
    i, j, shifts, has_volume = _loops().close_images(
        _array(pos.double()), _array(batch), boxes, float(cutoff), float(MOST_IMAGES), float(MOST_ALONG)
    )
    if not has_volume:
        return None
    return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(shifts).to(pos.dtype)


def _distances(
    pos: Tensor, batch: Tensor, box: Tensor | None, num_systems: int, i: Tensor, j: Tensor, shifts: Tensor | None
) -> Tensor:
    vec = pos[i] - pos[j]
    if shifts is not None:
        assert box is not None
        vec = vec + torch.einsum("pk,pkl->pl", shifts, box.expand(num_systems, 3, 3)[batch[i]])
    return vec.square().sum(dim=-1).sqrt()


def is_few(pos: Tensor, box: Tensor | None, num_systems: int) -> bool:
    """Whether a compiled loop looks at every pair of atoms, which are then found in their order."""
    return box is None and has_loops(pos) and pos.shape[0] <= LOOP_LIMIT * num_systems


def edges_of_pairs(i: Tensor, j: Tensor, num_atoms: int, loop: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both directions of every pair, and self loops if wanted, sorted by receiver.

    Args:
        i: First atom of each pair, (P,).
        j: Second atom of each pair, (P,).
        num_atoms: Number of atoms N.
        loop: Whether to add the edge (a, a) of every atom; they share a last pair of their own.

    Returns:
        Edges (2, E), the pair of each edge (E,), the edge of opposite direction (E,), where the edges of each receiver
        begin (N + 1,), and the sign of the pair's vector along each edge, (E,): 1, -1, or 0 for a self loop.
    """
    if has_loops(i):
        found = _loops().edges_of_pairs(_array(i), _array(j), num_atoms, loop)
        index, pair, reverse, row_start, sign = map(torch.from_numpy, found)
        return index, pair, reverse, row_start, sign
    num_pairs, device = i.shape[0], i.device
    atoms = torch.arange(num_atoms if loop else 0, device=device)
    pairs, num_loops = torch.arange(num_pairs, device=device), atoms.shape[0]
    receiver = torch.cat([atoms, i, j])
    order, row_start = by_receiver(receiver, num_atoms)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=device)
    index = torch.stack([receiver, torch.cat([atoms, j, i])]).index_select(1, order)
    pair = torch.cat([torch.full_like(atoms, num_pairs), pairs, pairs]).index_select(0, order)
    opposite = torch.cat([atoms, num_loops + num_pairs + pairs, num_loops + pairs])
    reverse = place.index_select(0, opposite.index_select(0, order))
    one = torch.ones_like(pairs)
    sign = torch.cat([torch.zeros_like(atoms), one, -one]).index_select(0, order)
    return index, pair, reverse, row_start, sign


def by_receiver(receiver: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """The order that sorts edges by their receivers (E,), and where those of each begin in it (N + 1,)."""
    rows, order = torch.sort(receiver, stable=True)
    return order, torch.searchsorted(rows, torch.arange(num_atoms + 1, device=receiver.device))


def _loops() -> ModuleType:
    from torchmdnet.neighbors import loops

    return loops
