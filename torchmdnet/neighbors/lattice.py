"""What the neighbour searches need to know of the lattices of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Lattice", "completed", "lattice_of"]


class Lattice(NamedTuple):
    """The lattices of S systems, in float64, made invertible where directions are open."""

    cell: Tensor  # (S, 3, 3) Å, open rows replaced by unit vectors orthogonal to the others
    is_open: Tensor  # (S, 3) bool
    reach: Tensor  # (S, 3) int64, images to visit on either side so that no pair within the cutoff is missed


def lattice_of(box: Tensor, num_systems: int, cutoff: float) -> Lattice:
    """Prepare lattices for a search.

    Args:
        box: Lattice vectors as rows, (1, 3, 3) shared or (S, 3, 3) Å; a zero row is an open direction.
        num_systems: Number of systems S.
        cutoff: Search radius in Å.

    Raises:
        ValueError: If the periodic vectors of a box are not finite or linearly dependent.
    """
    cell = box.detach().to(torch.float64)
    is_open = (cell == 0).all(dim=-1)
    if bool(is_open.any()):
        cell = completed(cell, is_open)
    volume = torch.linalg.det(cell).abs()
    is_flat = ~(volume > 1e-9 * cell.norm(dim=-1).prod(dim=-1))
    if bool(is_flat.any()):
        which = int(is_flat.nonzero()[0, 0])
        raise ValueError(
            f"box {which} spans no volume: its lattice vectors are {box[which].tolist()}. "
            "Give three independent, finite vectors; use a zero vector for an open direction."
        )
    heights = 1.0 / torch.linalg.inv(cell).norm(dim=-2)  # distance between opposite faces
    reach = (cutoff / heights).floor().long() + 1
    reach = torch.where(is_open, torch.zeros_like(reach), reach)
    return Lattice(cell.expand(num_systems, 3, 3), is_open.expand(num_systems, 3), reach.expand(num_systems, 3))


def completed(cell: Tensor, is_open: Tensor) -> Tensor:
    """Replace open rows of lattices (S, 3, 3) by unit vectors orthogonal to the others, whatever the device."""
    axes = torch.eye(3, dtype=cell.dtype, device=cell.device)
    rows, known = list(cell.unbind(dim=1)), list((~is_open).unbind(dim=1))
    for k in range(3):
        (u, has_u), (v, has_v) = ((rows[n % 3], known[n % 3][:, None]) for n in (k + 1, k + 2))
        one = torch.where(has_u, u, v)  # the known one, where there is one
        across = torch.where(has_u & has_v, v, axes.index_select(0, one.abs().argmin(dim=1)))
        normal = torch.linalg.cross(one, across)
        normal = torch.where(has_u | has_v, normal, axes[k])
        rows[k] = torch.where(known[k][:, None], rows[k], normal / normal.norm(dim=1, keepdim=True))
        known[k] = torch.ones_like(known[k])
    return torch.stack(rows, dim=1)
