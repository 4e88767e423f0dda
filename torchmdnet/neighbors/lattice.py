"""What the neighbour searches need to know of the lattices of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchmdnet.errors import DataError

__all__ = ["MOST_ALONG", "MOST_IMAGES", "Lattice", "check_images", "completed", "is_too_flat", "lattice_of"]

#: Periodic images of an atom within reach of the cutoff, at most; a cube of 2 Å has 133,000 in 50 Å.
MOST_IMAGES = 1_000_000
#: And those to either side along one lattice vector.
MOST_ALONG = 500


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
        ValueError: If the periodic vectors of a box are not finite or linearly dependent, or a box is so flat that more
            than :data:`MOST_IMAGES` are within reach, or :data:`MOST_ALONG` along a lattice vector.
    """
    cell = box.detach().to(torch.float64)
    is_open = (cell == 0).all(dim=-1)
    if bool(is_open.any()):
        cell = completed(cell, is_open)
    volume = torch.linalg.det(cell).abs()
    is_flat = ~(volume > 1e-9 * cell.norm(dim=-1).prod(dim=-1))
    if bool(is_flat.any()):
        which = int(is_flat.nonzero()[0, 0])
        raise DataError(
            f"box {which} spans no volume: its lattice vectors are {box[which].tolist()}. "
            "Give three independent, finite vectors; use a zero vector for an open direction."
        )
    heights = 1.0 / torch.linalg.inv(cell).norm(dim=-2)  # distance between opposite faces
    check_images(box, torch.where(is_open, torch.inf, heights), cutoff)
    reach = (cutoff / heights).floor().long() + 1
    reach = torch.where(is_open, torch.zeros_like(reach), reach)
    return Lattice(cell.expand(num_systems, 3, 3), is_open.expand(num_systems, 3), reach.expand(num_systems, 3))


def check_images(box: Tensor, heights: Tensor, cutoff: float) -> None:
    """Refuse boxes with more images in reach than :data:`MOST_IMAGES`.

    Args:
        box: Lattice vectors as rows, (S, 3, 3) Å.
        heights: Distances between opposite faces, (S, 3) Å, infinite along open directions.
        cutoff: Search radius in Å; where it is infinite, images are not looked at.

    Raises:
        ValueError: Naming the first box, its flattest height and the number of images.
    """
    if cutoff == float("inf"):
        return
    along = (cutoff / heights).floor()  # (S, 3)
    images = (2 * along + 1).prod(dim=1)
    is_flat = (images > MOST_IMAGES) | (along > MOST_ALONG).any(dim=1)
    if bool(is_flat.any()):
        which = int(is_flat.nonzero()[0, 0])
        raise DataError(
            f"box {which} is only {float(heights[which].min()):.3g} Å high: {float(images[which]):.2g} periodic "
            f"images of each atom would lie within {cutoff:g} Å; {MOST_IMAGES:,} are the most, and {MOST_ALONG} to "
            "either side along a lattice vector. Its lattice vectors are "
            f"{box[which].tolist()}: check the unit of the cell, and use a zero vector for an open direction."
        )


def is_too_flat(box: Tensor, cutoff: float) -> Tensor:
    """Boxes (S, 3, 3) that :func:`lattice_of` would refuse, (S,), without looking at values."""
    cell = box.detach().double()
    is_open = (cell == 0).all(dim=-1)
    cell = completed(cell, is_open)
    a, b, c = cell.unbind(dim=1)
    normals = torch.stack([torch.linalg.cross(*rows) for rows in ((b, c), (c, a), (a, b))], dim=1)  # (S, 3, 3)
    heights = (a * normals[:, 0]).sum(dim=1).abs()[:, None] / normals.norm(dim=2)
    along = (cutoff / torch.where(is_open, torch.inf, heights)).floor()
    images = (2 * along + 1).prod(dim=1)
    return ~((images <= MOST_IMAGES) & (along <= MOST_ALONG).all(dim=1))  # also where a number is not finite


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
