"""Neighbour lists that serve many steps of a simulation (Verlet, Phys. Rev. 159, 98, 1967)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmdnet.neighbors.cells import without_transforms as _array
from torchmdnet.neighbors.lattice import completed
from torchmdnet.neighbors.search import is_few, pairs_within
from torchmdnet.neighbors.vectors import has_loops
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["VerletList"]

#: What rounding may take from a list's range, in Å: lists are searched in the precision of the positions.
MARGIN = 1e-4
#: Pairs beyond which a list would take more memory than it is worth.
MOST_PAIRS = 1 << 24


class VerletList:
    r"""Finds pairs as :func:`torchmdnet.neighbors.pairs_within` does, from a list of those that may come within reach.

    The list holds every pair closer than cutoff + skin. It is complete as long as

    .. math:: r_c / \sigma_\mathrm{min}(F) + 2 \max_i |r_i F^{-1} - r_i^0| \le r_c + \mathrm{skin}

    where :math:`r^0` are the positions it was made for and F is the deformation of the box since then,
    :math:`h = h^0 F`, with its smallest singular value: without a change of the box, until an atom has moved by half
    the skin. At every call its pairs are measured and those within the cutoff returned, in the order of their atoms,
    so nothing depends on when the list was made.

    Structures that have nothing to do with each other are not charged for it: a list is made when atoms are found near
    where they were at the call before. There is one for each cutoff that is asked for.

    Args:
        skin: In the unit of the positions.

    Raises:
        ValueError: If ``skin`` is not positive.
    """

    def __init__(self, skin: float) -> None:
        if not 0 < skin < math.inf:
            raise ValueError(f"skin={skin} is no distance. Pass a positive number of Å, or use no list.")
        self.skin = float(skin)
        #: Searches so far, of any kind.
        self.num_searches = 0
        self._known: dict[float, _Known] = {}
        self._too_long: set[float] = set()

    @torch.no_grad()
    def __call__(
        self,
        pos: Positions,
        batch: SystemIndex,
        box: Boxes | None,
        num_systems: int,
        cutoff: float,
        lower: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :func:`torchmdnet.neighbors.pairs_within`; an atom and its partner come in the order i <= j."""
        is_quick = is_few(pos, box, num_systems)  # and in order, without a list
        is_odd = math.isinf(cutoff) or cutoff in self._too_long or pos.shape[0] == 0
        if is_quick or is_odd or not has_loops(pos):
            return pairs_within(pos, batch, box, num_systems, cutoff, lower)
        known = self._known.get(cutoff)
        is_near = known is not None and known.serves(pos, batch, box, cutoff, self.skin)
        if known is None or not is_near or known.skin < self.skin:
            skin = self.skin if is_near or (known is not None and known.was_of_use) else 0.0
            self.num_searches += 1
            known = self._known[cutoff] = _Known(pos, batch, box, num_systems, cutoff, skin)
            if len(known.i) > MOST_PAIRS:
                self._too_long.add(cutoff)
                del self._known[cutoff]
        else:
            known.was_of_use = True
        return known.pairs_within(pos, box, cutoff, lower)


class _Known:
    """Pairs closer than cutoff + skin, sorted by their atoms, and where the atoms were."""

    def __init__(
        self, pos: Tensor, batch: Tensor, box: Tensor | None, num_systems: int, cutoff: float, skin: float
    ) -> None:
        i, j, shifts = pairs_within(pos, batch, box, num_systems, cutoff + skin)
        none = np.zeros((0, 3), dtype=np.int32)
        counts = none if shifts is None else _array(shifts).astype(np.int32)
        self.i, self.j, self.counts = _loops().sorted_pairs(_array(i), _array(j), counts, pos.shape[0])
        self.skin, self.was_of_use = skin, False
        self.pos, self.batch = _array(pos).copy(), _array(batch).copy()
        self.box = None if box is None else _array(box).copy()

    def serves(self, pos: Tensor, batch: Tensor, box: Tensor | None, cutoff: float, skin: float) -> bool:
        """Whether nothing has moved so far that a list with this skin has to be rebuilt."""
        here, systems = _array(pos), _array(batch)
        if (here.shape, here.dtype) != (self.pos.shape, self.pos.dtype) or not np.array_equal(systems, self.batch):
            return False
        if box is None or self.box is None:
            if box is not None or self.box is not None:
                return False
            shrunk = 1.0
        elif box.shape != self.box.shape:
            return False
        elif np.array_equal(_array(box), self.box):
            shrunk = 1.0
        else:
            back, shrunk = _deformation(_array(box), self.box)
            if not shrunk > 0:
                return False
            here = np.einsum("nk,nkl->nl", here, np.broadcast_to(back, (systems.max() + 1, 3, 3))[systems])
        moved = math.sqrt(_loops().farthest(here, self.pos))
        return cutoff / shrunk + 2 * moved <= cutoff + skin - MARGIN

    def pairs_within(
        self, pos: Tensor, box: Tensor | None, cutoff: float, lower: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The pairs that are close now."""
        boxes = np.zeros((0, 3, 3)) if box is None else _array(box).astype(np.float64)
        i, j, shifts = _loops().close_of_list(
            _array(pos), self.batch, boxes, self.i, self.j, self.counts, float(cutoff), float(lower)
        )
        return torch.from_numpy(i), torch.from_numpy(j), torch.from_numpy(shifts) if len(self.counts) else None


def _deformation(now: np.ndarray, then: np.ndarray) -> tuple[np.ndarray, float]:
    """The inverse of the deformation F of boxes, (1 or S, 3, 3), and the smallest singular value of F.

    The latter is 0 where a direction was opened or closed, or a box spans no volume any more.
    """
    is_open = [(box == 0).all(axis=-1) for box in (now, then)]
    if not np.array_equal(*is_open):
        return now, 0.0
    full = [
        completed(torch.from_numpy(box).double(), torch.from_numpy(rows)).numpy()
        for box, rows in zip((now, then), is_open, strict=True)
    ]
    with np.errstate(invalid="ignore"):
        volumes = np.linalg.det(full)
    if not (np.isfinite(volumes) & (volumes != 0)).all():
        return now, 0.0
    back = np.linalg.solve(*full)
    return back, 1 / float(np.linalg.norm(back, 2, axis=(1, 2)).max())


def _loops() -> Any:
    from torchmdnet.neighbors import loops

    return loops
