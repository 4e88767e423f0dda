"""Positions near the origin, so that single precision can hold them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from torchmdnet.neighbors.lattice import completed
from torchmdnet.typing import Boxes, Positions, SystemIndex

__all__ = ["Home"]

#: Coordinates up to this, in Å, are left alone: single precision holds them to 1e-6 Å.
NEAR = 20.0
#: How many cells an atom may be outside its own before it is brought back.
CELLS_OUTSIDE = 1


class Home:
    """Brings double-precision positions near the origin before they are rounded to single precision.

    Atoms move by whole lattice vectors along periodic directions, and all atoms of a system together along open ones,
    so energies, forces and stresses are those of the positions given. What an atom has moved by is kept from call to
    call, and changed only when it has left its cell by more than another one (or a system its place by 20 Å):
    neighbour lists that compare positions with earlier ones stay of use. Positions that are near are not changed.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # (N, 3) lattice vectors, or Å along open directions
        self._is_open: Tensor | None = None

    def state(self) -> dict[str, np.ndarray]:
        """What later calls depend on, as arrays by name; empty before anything was moved."""
        if self._counts is None or self._is_open is None:
            return {}
        return {"counts": self._counts.cpu().numpy().copy(), "is_open": self._is_open.cpu().numpy().copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`state` returned."""
        self._counts = torch.from_numpy(state["counts"].copy()) if state else None
        self._is_open = torch.from_numpy(state["is_open"].copy()) if state else None

    @torch.no_grad()
    def __call__(self, pos: Positions, batch: SystemIndex, box: Boxes | None, num_systems: int) -> Positions:
        """Positions (N, 3) in float64, moved.

        Args:
            pos: Positions in Å, (N, 3) float64.
            batch: System of each atom, (N,).
            box: Lattice vectors as rows, (3, 3), (1, 3, 3) or (S, 3, 3) float64; a zero row is an open direction.
            num_systems: Number of systems S.
        """
        if pos.shape[0] == 0 or (self._counts is None and float(pos.abs().max()) < NEAR):
            return pos
        cells = pos.new_zeros(1, 3, 3) if box is None else box.to(pos).reshape(-1, 3, 3)
        is_open = (cells == 0).all(dim=-1)
        cells = completed(cells, is_open)
        if not bool((torch.linalg.det(cells).abs() > 0).all()):
            return pos  # the search for neighbours says which box spans no volume
        cells, is_open = cells.expand(num_systems, 3, 3), is_open.expand(num_systems, 3)
        counts, was_open = self._counts, self._is_open
        is_kept = counts is not None and was_open is not None and counts.shape == pos.shape
        if counts is None or was_open is None or not is_kept or not torch.equal(was_open, is_open):
            counts = torch.zeros_like(pos)
        along = torch.einsum("nk,nkl->nl", pos, torch.linalg.inv(cells)[batch]) - counts  # (N, 3)
        is_known = along.isfinite()  # the model says which position is not
        is_outside = is_known & ((along - 0.5).abs() > CELLS_OUTSIDE + 0.5) & ~is_open[batch]
        atoms = torch.bincount(batch, minlength=num_systems).clamp(min=1)[:, None]
        centre = pos.new_zeros(num_systems, 3).index_add(0, batch, along) / atoms  # (S, 3)
        centre = torch.where(is_open & (centre.abs() > NEAR) & centre.isfinite(), centre, 0.0)
        counts = counts + torch.where(is_outside, along.floor(), 0.0) + centre[batch]
        self._counts, self._is_open = counts, is_open
        return pos - torch.einsum("nk,nkl->nl", counts, cells[batch])
