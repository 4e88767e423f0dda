"""Small systems to try a potential on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Systems", "cell_of_atoms", "mixed_boxes", "small_molecules"]


class Systems(NamedTuple):
    """A batch in the order of the established call, with the number of its systems."""

    z: Tensor  # (N,)
    pos: Tensor  # (N, 3) Å
    batch: Tensor  # (N,)
    box: Tensor | None  # (3, 3) or (S, 3, 3) Å
    q: Tensor | None  # (S,) e

    @property
    def num_systems(self) -> int:
        """Number of systems in the batch."""
        return int(self.batch.max()) + 1

    @property
    def is_periodic(self) -> Tensor:
        """Which of the systems have three lattice vectors, (S,)."""
        if self.box is None:
            return torch.zeros(self.num_systems, dtype=torch.bool)
        return torch.linalg.det(self.box).ne(0).reshape(-1).expand(self.num_systems)

    def to(self, dtype: torch.dtype) -> Systems:
        """The same systems in another precision."""
        box, q = (None if value is None else value.to(dtype) for value in (self.box, self.q))
        return self._replace(pos=self.pos.to(dtype), box=box, q=q)

    def system(self, number: int) -> Systems:
        """One of the systems alone."""
        members = self.batch == number
        box = self.box if self.box is None or self.box.dim() == 2 else self.box[number]
        q = None if self.q is None else self.q[number : number + 1]
        return Systems(self.z[members], self.pos[members], torch.zeros_like(self.batch[members]), box, q)


_WATER = ((8, (0.0, 0.0, 0.119)), (1, (0.0, 0.763, -0.477)), (1, (0.0, -0.763, -0.477)))
_METHANOL = (
    (6, (-0.047, 0.664, 0.0)),
    (8, (-0.047, -0.758, 0.0)),
    (1, (-1.093, 0.970, 0.0)),
    (1, (0.878, -1.046, 0.0)),
    (1, (0.438, 1.072, 0.889)),
    (1, (0.438, 1.072, -0.889)),
)


def small_molecules(*, charges: bool = False) -> Systems:
    """A distorted water, a distorted methanol and a lone nitrogen atom, in float64.

    Args:
        charges: Whether the systems have total charges.
    """
    generator = torch.Generator().manual_seed(3)
    atoms = [*_WATER, *_METHANOL, (7, (0.3, -0.2, 0.1))]
    z = torch.tensor([number for number, _ in atoms])
    pos = torch.tensor([place for _, place in atoms], dtype=torch.float64)
    pos = pos + 0.08 * torch.randn(pos.shape, generator=generator, dtype=torch.float64)
    batch = torch.tensor([0] * 3 + [1] * 6 + [2])
    q = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) if charges else None
    return Systems(z, pos, batch, None, q)


def cell_of_atoms(num_atoms: int = 8, edge: float = 4.6) -> Systems:
    """Atoms apart from each other in a triclinic cell in general orientation, smaller than twice usual cutoffs.

    Args:
        num_atoms: Number of atoms.
        edge: Typical length of a lattice vector, in Å.
    """
    generator = torch.Generator().manual_seed(5)
    box = edge * torch.eye(3, dtype=torch.float64) + 0.5 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    kept: list[Tensor] = []
    images = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3) @ box
    while len(kept) < num_atoms:
        place = torch.rand(3, generator=generator, dtype=torch.float64) @ box
        if all(((place - other + images).norm(dim=1) > 1.1).all() for other in kept):
            kept.append(place)
    z = torch.tensor([1, 6, 7, 8])[torch.arange(num_atoms) % 4]
    return Systems(z, torch.stack(kept), torch.zeros(num_atoms, dtype=torch.long), box, None)


def mixed_boxes() -> Systems:
    """A small triclinic cell, a molecule in the open and a slab, open along its third direction, in one batch."""
    cell, molecules = cell_of_atoms(4, 3.9), small_molecules()
    slab = cell_of_atoms(3, 4.3)
    assert cell.box is not None
    assert slab.box is not None
    box = torch.stack([cell.box, torch.zeros_like(cell.box), slab.box])
    box[2, 2] = 0
    water = molecules.batch == 0
    return Systems(
        torch.cat([cell.z, molecules.z[water], slab.z]),
        torch.cat([cell.pos, molecules.pos[water], slab.pos]),
        torch.tensor([0] * 4 + [1] * 3 + [2] * 3),
        box,
        torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64),
    )
