"""The molecules and boxes that are timed: the same coordinates in every interpreter, from no file.

Only the standard library is used, whose random numbers are the same in every release.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["SYSTEMS", "System", "benzenes", "water"]

Point: TypeAlias = tuple[float, float, float]

#: Edge of a cube that holds 64 water molecules at the density of the liquid, in Å.
WATER_BOX = 12.42


@dataclass(frozen=True)
class System:
    """Atoms to compute.

    Args:
        z: Atomic numbers (N).
        pos: Positions in Å (N, 3).
        batch: The molecule each atom belongs to (N); None for a single system.
        box: Lattice vectors in Å (3, 3); None for open boundaries.
    """

    z: list[int]
    pos: list[Point]
    batch: list[int] | None = None
    box: list[Point] | None = None

    @property
    def num_systems(self) -> int:
        return 1 if self.batch is None else self.batch[-1] + 1

    def frame(self, seed: int, amplitude: float = 0.02) -> list[Point]:
        """The positions as they might be some time steps later: each coordinate moves by at most ``amplitude`` Å."""
        rng = random.Random(seed)
        return [_add(point, tuple(amplitude * (2 * rng.random() - 1) for _ in range(3))) for point in self.pos]


def benzenes(count: int) -> System:
    """A batch of benzene molecules, each a little distorted; a single one is the perfect ring, without a batch."""
    ring = [
        (radius * math.cos(k * math.pi / 3), radius * math.sin(k * math.pi / 3), 0.0)
        for radius in (1.397, 2.481)  # C and H, Å
        for k in range(6)
    ]
    z = [6] * 6 + [1] * 6
    if count == 1:
        return System(z, ring)
    rng = random.Random(count)
    pos = [_add(atom, tuple(0.1 * (rng.random() - 0.5) for _ in range(3))) for _ in range(count) for atom in ring]
    return System(z * count, pos, [molecule for molecule in range(count) for _ in z])


def water(copies: int = 1) -> System:
    """A periodic cube of ``64 copies³`` water molecules on a grid, each turned at random."""
    rng = random.Random(copies)
    length, half_angle = 0.9572, math.radians(104.52 / 2)
    molecule = [
        (0.0, 0.0, 0.0),
        (length * math.sin(half_angle), length * math.cos(half_angle), 0.0),
        (-length * math.sin(half_angle), length * math.cos(half_angle), 0.0),
    ]
    edge, sites = WATER_BOX * copies, 4 * copies
    pos: list[Point] = []
    for n in range(sites**3):
        centre = tuple(edge / sites * index for index in (n // sites**2, n // sites % sites, n % sites))
        rotation = _random_rotation(rng)
        pos += [_add(centre, tuple(_dot(row, atom) for row in rotation)) for atom in molecule]
    return System([8, 1, 1] * sites**3, pos, box=[(edge, 0.0, 0.0), (0.0, edge, 0.0), (0.0, 0.0, edge)])


def _random_rotation(rng: random.Random) -> tuple[Point, Point, Point]:
    """A rotation matrix from a uniform unit quaternion (Shoemake, Graphics Gems III, 1992)."""
    u, a, b = rng.random(), 2 * math.pi * rng.random(), 2 * math.pi * rng.random()
    x, y = math.sqrt(1 - u) * math.sin(a), math.sqrt(1 - u) * math.cos(a)
    z, w = math.sqrt(u) * math.sin(b), math.sqrt(u) * math.cos(b)
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )


def _add(a: tuple[float, ...], b: tuple[float, ...]) -> Point:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _dot(a: Point, b: Point) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


#: What a workload calls its atoms.
SYSTEMS = {
    "benzene": lambda: benzenes(1),
    "32-benzenes": lambda: benzenes(32),
    "192-water": lambda: water(1),
    "1536-water": lambda: water(2),
    "12288-water": lambda: water(4),
}
