"""The molecules and boxes that are timed: the same coordinates in every interpreter, from no file.

Only the standard library is used, whose random numbers are the same in every release.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["SYSTEMS", "System", "benzenes", "dipeptide", "water"]

Point: TypeAlias = tuple[float, float, float]

#: Distance of neighbouring molecules on a grid that is as dense as liquid water, in Å.
WATER_SPACING = 3.105

#: Alanine dipeptide: element, the three atoms it is placed from, and in Å and degrees the distance to the first, the
#: angle at the first to the second, and the torsion to the third. The backbone is stretched, φ = -150, ψ = 150.
_DIPEPTIDE: list[tuple[int, tuple[int, int, int], float, float, float]] = [
    (6, (0, 0, 0), 0.0, 0.0, 0.0),  # 0: C of the first methyl group
    (6, (0, 0, 0), 1.522, 180.0, 0.0),
    (8, (1, 0, 0), 1.229, 120.4, 0.0),
    (7, (1, 0, 2), 1.335, 116.6, 180.0),
    (1, (3, 1, 0), 1.010, 119.8, 0.0),
    (6, (3, 1, 0), 1.449, 121.9, 180.0),  # 5: Cα
    (6, (5, 3, 1), 1.522, 110.1, -150.0),
    (1, (5, 3, 1), 1.090, 109.5, -30.0),
    (6, (5, 3, 1), 1.526, 109.7, 90.0),
    (1, (8, 5, 3), 1.090, 109.5, 60.0),
    (1, (8, 5, 3), 1.090, 109.5, 180.0),
    (1, (8, 5, 3), 1.090, 109.5, -60.0),
    (8, (6, 5, 3), 1.229, 120.4, -30.0),
    (7, (6, 5, 3), 1.335, 116.6, 150.0),
    (1, (13, 6, 5), 1.010, 119.8, 0.0),
    (6, (13, 6, 5), 1.449, 121.9, 180.0),  # 15: C of the last methyl group
    (1, (15, 13, 6), 1.090, 109.5, 60.0),
    (1, (15, 13, 6), 1.090, 109.5, 180.0),
    (1, (15, 13, 6), 1.090, 109.5, -60.0),
    (1, (0, 1, 2), 1.090, 109.5, 0.0),
    (1, (0, 1, 2), 1.090, 109.5, 120.0),
    (1, (0, 1, 2), 1.090, 109.5, -120.0),
]


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


def dipeptide() -> System:
    """An alanine dipeptide, N-acetyl-L-alanine-N'-methylamide, stretched."""
    pos: list[Point] = []
    for _, (first, second, third), length, angle, torsion in _DIPEPTIDE:
        if len(pos) < 3:
            bend = math.radians(180 - angle)
            origin = pos[first] if pos else (0.0, 0.0, 0.0)
            pos.append(_add(origin, (length * math.cos(bend), length * math.sin(bend), 0.0)))
        else:
            pos.append(_placed(pos[first], pos[second], pos[third], length, math.radians(angle), math.radians(torsion)))
    return System([element for element, *_ in _DIPEPTIDE], pos)


def water(sites: int = 4) -> System:
    """A periodic cube of ``sites³`` water molecules on a grid, each turned at random."""
    rng = random.Random(sites)
    length, half_angle = 0.9572, math.radians(104.52 / 2)
    molecule = [
        (0.0, 0.0, 0.0),
        (length * math.sin(half_angle), length * math.cos(half_angle), 0.0),
        (-length * math.sin(half_angle), length * math.cos(half_angle), 0.0),
    ]
    edge = WATER_SPACING * sites
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


def _placed(first: Point, second: Point, third: Point, length: float, angle: float, torsion: float) -> Point:
    """An atom at a distance from the first, with an angle first-second and a torsion first-second-third."""
    along = _unit(_subtract(first, second))
    normal = _unit(_cross(_subtract(second, third), along))
    across = _cross(normal, along)
    steps = (-math.cos(angle), math.sin(angle) * math.cos(torsion), math.sin(angle) * math.sin(torsion))
    parts = zip(along, across, normal, strict=True)
    return _add(first, tuple(length * _dot(steps, axes) for axes in parts))


def _unit(a: Point) -> Point:
    norm = math.sqrt(_dot(a, a))
    return (a[0] / norm, a[1] / norm, a[2] / norm)


def _cross(a: Point, b: Point) -> Point:
    return (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])


def _subtract(a: Point, b: Point) -> Point:
    return (a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _add(a: tuple[float, ...], b: tuple[float, ...]) -> Point:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _dot(a: Point, b: Point) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


#: What a workload calls its atoms.
SYSTEMS = {
    "benzene": lambda: benzenes(1),
    "dipeptide": dipeptide,
    "32-benzenes": lambda: benzenes(32),
    "192-water": lambda: water(4),
    "1536-water": lambda: water(8),
    "2187-water": lambda: water(9),
    "12288-water": lambda: water(16),
    "24000-water": lambda: water(20),
    "98304-water": lambda: water(32),
}
