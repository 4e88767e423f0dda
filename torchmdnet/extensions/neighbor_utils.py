"""Established address of helpers for a list of cells in a rectangular box."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["build_cell_list", "get_cell_dimensions"]


def get_cell_dimensions(box_x: Tensor, box_y: Tensor, box_z: Tensor, cutoff_upper: float | Tensor) -> Tensor:
    """Number of cells along each axis, (3,) int64: as many as fit with sides of at least the cutoff, but three."""
    lengths = torch.stack([torch.as_tensor(length) for length in (box_x, box_y, box_z)])
    return torch.floor(lengths / cutoff_upper).long().clamp(min=3)


def build_cell_list(
    positions: Tensor, batch: Tensor, box_sizes: Tensor, use_periodic: bool, cell_dims: Tensor, num_cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort atoms by the cell they are in; cells are numbered with z running fastest.

    Args:
        positions: (N, 3) Å. Periodic ones are wrapped into the box; open ones lie around the origin, and beyond the
            box in its outermost cells.
        batch: System of each atom, (N,).
        box_sizes: Sides of the box, (3,) Å.
        use_periodic: Whether the box is periodic.
        cell_dims: Number of cells along each axis, (3,).
        num_cells: Their product.

    Returns:
        The original places of the sorted atoms (N,) int32, their positions and systems, and where in this order each
        cell begins and ends, (num_cells,) int32 each.
    """
    dims = cell_dims.to(positions.device)
    fraction = positions.detach() / box_sizes.to(positions)
    fraction = fraction - fraction.floor() if use_periodic else fraction + 0.5
    x, y, z = (fraction * dims).floor().long().clamp(min=torch.zeros_like(dims), max=dims - 1).unbind(dim=1)
    cell = (x * dims[1] + y) * dims[2] + z
    order = torch.argsort(cell, stable=True)
    end = torch.cumsum(torch.bincount(cell, minlength=num_cells), 0)
    start = torch.cat([end.new_zeros(1), end[:-1]])
    return order.int(), positions[order], batch[order], start.int(), end.int()
