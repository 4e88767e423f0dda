"""Neighbours by looking at every pair within each system and every image in reach.

This is the definition the faster searches are tested against, and the quickest way for small systems: a handful of
tensor operations for a whole batch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.neighbors.lattice import Lattice

__all__ = ["all_pairs", "count_candidates", "is_upper", "unravel"]


def count_candidates(batch: Tensor, lattice: Lattice | None, num_systems: int) -> int:
    """Number of pairs and images :func:`all_pairs` would look at."""
    atoms = torch.bincount(batch, minlength=num_systems)
    images = 1 if lattice is None else (2 * lattice.reach + 1).prod(dim=1)
    return int((atoms * atoms * images).sum())


def all_pairs(
    pos: Tensor, batch: Tensor, lattice: Lattice | None, num_systems: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`torchmdnet.neighbors.pairs_within`; memory grows with the square of each system."""
    device = pos.device
    atoms = torch.bincount(batch, minlength=num_systems)  # (S,)
    images = torch.ones_like(atoms) if lattice is None else (2 * lattice.reach + 1).prod(dim=1)  # (S,)
    first = torch.cumsum(atoms, 0) - atoms
    order = torch.argsort(batch, stable=True)  # atoms grouped by system

    candidates = (atoms * images)[batch]  # (N,) partners and images to look at for each atom
    i = torch.repeat_interleave(torch.arange(pos.shape[0], device=device), candidates)
    within = torch.arange(i.shape[0], device=device) - (torch.cumsum(candidates, 0) - candidates)[i]
    system = batch[i]
    if lattice is None:
        j = order[first[system] + within]
        near = (pos[i] - pos[j]).square().sum(-1) < cutoff * cutoff
        near &= i < j
        return i[near], j[near], None

    fractional = torch.einsum("nk,nkl->nl", pos.double(), torch.linalg.inv(lattice.cell)[batch])
    home = fractional.floor().masked_fill(lattice.is_open[batch], 0.0)  # (N, 3) the cell each atom is in
    wrapped = pos.double() - torch.einsum("nk,nkl->nl", home, lattice.cell[batch])

    j = order[first[system] + torch.div(within, images[system], rounding_mode="floor")]
    shift = (unravel(within % images[system], 2 * lattice.reach[system] + 1) - lattice.reach[system]).double()
    vec = wrapped[i] - wrapped[j] + torch.einsum("ek,ekl->el", shift, lattice.cell[system])
    near = vec.square().sum(-1) < cutoff * cutoff
    near &= (i < j) | ((i == j) & is_upper(shift))
    i, j = i[near], j[near]
    return i, j, (shift[near] - home[i] + home[j]).to(pos.dtype)


def is_upper(shift: Tensor) -> Tensor:
    """One of each two opposite lattice vectors, not zero: (E, 3) -> (E,) bool."""
    x, y, z = shift.unbind(dim=1)
    return (x > 0) | ((x == 0) & (y > 0)) | ((x == 0) & (y == 0) & (z > 0))


def unravel(index: Tensor, span: Tensor) -> Tensor:
    """Coordinates of flat indices in boxes of different extents: (E,), (E, 3) -> (E, 3)."""
    rest, z = torch.div(index, span[:, 2], rounding_mode="floor"), index % span[:, 2]
    x, y = torch.div(rest, span[:, 1], rounding_mode="floor"), rest % span[:, 1]
    return torch.stack([x, y, z], dim=1)
