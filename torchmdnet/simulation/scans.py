"""Energies along a distance, an angle or a torsion, and of pairs of atoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.page import BLUE, COLOURS, GREY, ORANGE, STYLE, new_figure, png

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Curve", "dimer_curve", "draw_curves", "draw_dimers", "moved_part", "pairs_of", "scan"]

#: Å between two points at the cutoff, and how far to either side these lie.
FINE, AROUND = 0.002, 0.02


@dataclass
class Curve:
    """Energies along one coordinate.

    Args:
        name: ``H-O``, or what is turned.
        unit: Of the coordinate: Å or degrees.
        places: (P,).
        energies: (P,) eV.
        slopes: Derivative of the energy by the forces, (P,) eV/Å; None where it is not known.
        frames: The structures.
        jumps: At the cutoff: change of the energy in meV and of the force in meV/Å over :data:`AROUND` beyond what
            their slopes explain.
        mismatch: Largest difference of the slope by the forces and by the energies, in meV/Å.
    """

    name: str
    unit: str
    places: np.ndarray
    energies: np.ndarray
    slopes: np.ndarray | None
    frames: list[Atoms]
    jumps: tuple[float, float] | None = None
    mismatch: float | None = None

    def summary(self) -> dict[str, Any]:
        """The numbers."""
        lowest = int(np.argmin(self.energies))
        found: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "lowest_at": float(self.places[lowest]),
            "lowest_energy_eV": float(self.energies[lowest]),
            "highest_at": float(self.places[int(np.argmax(self.energies))]),
            "barrier_eV": float(self.energies.max() - self.energies.min()),
            "places": self.places,
            "energies_eV": self.energies,
        }
        if self.slopes is not None:
            found["slopes_eV_A"] = self.slopes
        if self.jumps is not None:
            found["energy_jump_at_cutoff_meV"], found["force_jump_at_cutoff_meV_A"] = self.jumps
        if self.mismatch is not None:
            found["largest_mismatch_of_forces_meV_A"] = self.mismatch
        return found


def pairs_of(words: Sequence[str], known: Sequence[int], most: int = 15) -> list[tuple[str, str]]:
    """Pairs of elements: those named as ``H-O``, or all that the model knows, as far as they are few.

    Raises:
        ConfigError: If a pair is not understood, or there are too many.
    """
    from ase.data import atomic_numbers, chemical_symbols

    if not words:
        symbols = [chemical_symbols[z] for z in sorted(known)]
        pairs = list(combinations_with_replacement(symbols, 2))
        if len(pairs) > most:
            raise ConfigError(
                f"--dimer: the model knows {len(symbols)} elements, which are {len(pairs)} pairs. Name some: --dimer "
                f"{symbols[0]}-{symbols[1]}."
            )
        return pairs
    found = []
    for word in ",".join(words).split(","):
        first, dash, second = word.strip().partition("-")
        if not dash or first not in atomic_numbers or second not in atomic_numbers:
            raise ConfigError(f"--dimer: {word!r} is no pair of elements. Write H-O.")
        found.append((first, second))
    return found


def dimer_curve(
    pair: tuple[str, str],
    calculator: Any,
    *,
    first: float,
    last: float,
    points: int,
    cutoff: float | None,
    info: dict[str, Any],
    tell: Callable[[int], None] = lambda done: None,
) -> Curve:
    """Energy and force of two atoms over their distance, and how smooth both are at the cutoff.

    Args:
        pair: Symbols.
        calculator: The potential.
        first: Shortest distance, in Å.
        last: Longest distance, in Å.
        points: Number of distances.
        cutoff: Of the model, in Å; None if it has none.
        info: Charge and spin.
        tell: Called with the number of distances done.
    """
    from ase import Atoms

    def at(distance: float) -> tuple[float, float]:
        dimer = Atoms(list(pair), [[0, 0, 0], [0, 0, distance]], info=dict(info), calculator=calculator)
        energy = float(dimer.get_potential_energy())
        return energy, float(-dimer.get_forces()[1, 2])

    places = np.linspace(first, last, points)
    rows = []
    for number, place in enumerate(places):
        rows.append(at(float(place)))
        tell(number + 1)
    energies, slopes = np.array(rows).T
    frames = [Atoms(list(pair), [[0, 0, 0], [0, 0, place]], info=dict(info)) for place in places]
    curve = Curve("-".join(pair), "Å", places, energies, slopes, frames)
    middle = np.linspace(first, last, 7)[1:-1]
    step = 1e-3
    numeric = [(at(place + step)[0] - at(place - step)[0]) / (2 * step) for place in middle]
    curve.mismatch = 1000 * max(abs(n - at(place)[1]) for n, place in zip(numeric, middle, strict=True))
    if cutoff is not None and first + AROUND < cutoff < last - AROUND:
        near = np.array([at(cutoff + side * AROUND / 2) for side in (-1, 1)])
        beside = np.array([at(cutoff + side * (AROUND / 2 + FINE)) for side in (-1, 1)])
        left, right = near[0], near[1]
        explained = 0.5 * AROUND * (left[1] + right[1])
        force = (
            abs(right[1] - left[1]) - 0.5 * AROUND * (abs(left[1] - beside[0][1]) + abs(beside[1][1] - right[1])) / FINE
        )
        curve.jumps = (1000 * abs(right[0] - left[0] - explained), 1000 * max(force, 0.0))
    return curve


def moved_part(atoms: Atoms, indices: Sequence[int]) -> list[int]:
    """The atoms that move with the last of those that define a coordinate: its side of the bond.

    Raises:
        DataError: If the bond is in a ring, or there is none, so that there are no two sides.
    """
    from ase.neighborlist import build_neighbor_list, natural_cutoffs

    lists = build_neighbor_list(
        atoms, [1.15 * radius for radius in natural_cutoffs(atoms)], self_interaction=False, bothways=True
    )
    fixed, free = (indices[1], indices[2]) if len(indices) == 4 else (indices[-2], indices[-1])
    found, queue = {free}, [free]
    while queue:
        here = queue.pop()
        for there in lists.get_neighbors(here)[0].tolist():
            if {here, there} == {fixed, free}:
                continue
            if there not in found:
                found.add(there)
                queue.append(there)
    if fixed in found:
        is_bonded = fixed in lists.get_neighbors(free)[0]
        why = "are in a ring, which has no two sides" if is_bonded else "belong together without being bonded"
        raise DataError(f"atoms {fixed} and {free} {why}, so no part can move alone. Choose atoms of a bond between.")
    return sorted(found)


def scan(
    atoms: Atoms,
    indices: Sequence[int],
    places: np.ndarray,
    *,
    relaxed: bool,
    fmax: float,
    tell: Callable[[int], None] = lambda done: None,
) -> Curve:
    """Energies of a structure over a distance of two atoms, an angle of three, or a torsion of four.

    Args:
        atoms: With its calculator.
        indices: The two, three or four atoms.
        places: Values (P,) in Å or degrees.
        relaxed: Whether everything else is relaxed at each value (``FixInternals``).
        fmax: Largest force at the end of each relaxation, in eV/Å.
        tell: Called with the number of values done.

    Raises:
        DataError: If a relaxation does not come to its end.
    """
    from ase.constraints import FixInternals
    from ase.optimize import BFGS

    part = moved_part(atoms, indices)
    kind = {2: "distance", 3: "angle", 4: "torsion"}[len(indices)]
    words = "-".join(f"{atoms.symbols[index]}{index}" for index in indices)
    copy = atoms.copy()
    copy.calc = atoms.calc
    energies, frames = [], []
    for number, place in enumerate(places):
        copy.set_constraint()
        if kind == "distance":
            _set_distance(copy, indices, place, part)
        elif kind == "angle":
            copy.set_angle(*indices, angle=place, indices=part)
        else:
            copy.set_dihedral(*indices, angle=place, indices=part)
        if relaxed:
            name = {"distance": "bonds", "angle": "angles_deg", "torsion": "dihedrals_deg"}[kind]
            held: dict[str, Any] = {name: [[float(place), list(indices)]], "epsilon": 1e-7}
            copy.set_constraint(FixInternals(**held))
            if not BFGS(copy, logfile=None).run(fmax=fmax, steps=500):  # pyright: ignore[reportArgumentType]
                raise DataError(
                    f"{words}: the relaxation at {place:g} does not come to its end in 500 steps. Take a larger "
                    "--fmax, or no --relax."
                )
        energies.append(float(copy.get_potential_energy()))
        frame = copy.copy()
        frame.set_constraint()
        frame.calc = None
        frames.append(frame)
        tell(number + 1)
    unit = "Å" if kind == "distance" else "°"
    return Curve(f"{kind} {words}", unit, places, np.array(energies), None, frames)


def _set_distance(atoms: Atoms, indices: Sequence[int], distance: float, part: Sequence[int]) -> None:
    first, second = indices
    along = atoms.positions[second] - atoms.positions[first]
    length = float(np.linalg.norm(along))
    atoms.positions[list(part)] += along / length * (distance - length)


def draw_dimers(curves: Sequence[Curve], cutoff: float | None) -> bytes:
    """Energies and forces of pairs over their distance, and both near the cutoff, as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        panels = 3 if cutoff is not None else 2
        figure, axes = new_figure(panels, width=4.8, height=3.8)
        for curve, colour in zip(curves, _colours(len(curves)), strict=True):
            energies = curve.energies - curve.energies[-1]
            axes[0].plot(curve.places, energies, color=colour, linewidth=1.4, label=curve.name)
            if curve.slopes is not None:
                axes[1].plot(curve.places, curve.slopes, color=colour, linewidth=1.4)
            if cutoff is not None:
                near = np.abs(curve.places - cutoff) < 1.0
                axes[2].plot(curve.places[near], 1000 * energies[near], color=colour, linewidth=1.4)
        depth = min(float((curve.energies - curve.energies[-1]).min()) for curve in curves)
        axes[0].set_ylim(1.15 * depth - 0.2, max(2.0, -1.2 * depth))
        known = [curve.slopes for curve in curves if curve.slopes is not None]
        steep = np.concatenate([slopes[len(slopes) // 6 :] for slopes in known])
        limit = 1.2 * float(np.percentile(np.abs(steep), 97)) or 1.0
        axes[1].set_ylim(-limit, limit)
        for axis, title, unit in zip(
            axes,
            ("Energy, last point zero", "Derivative of the energy", "Energy near the cutoff"),
            ("eV", "eV/Å", "meV"),
            strict=False,
        ):
            axis.set_title(title)
            axis.set_ylabel(unit)
            axis.set_xlabel("distance [Å]")
            if cutoff is not None:
                axis.axvline(cutoff, color=GREY, linewidth=1.0, linestyle=":")
        axes[0].legend(fontsize=8, ncols=2)
        return png(figure)


def draw_curves(curves: Sequence[Curve]) -> bytes:
    """Energies along coordinates, one panel each, as PNG."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, axes = new_figure(len(curves), width=5.6, height=3.8)
        for axis, curve in zip(axes, curves, strict=False):
            energies = 1000 * (curve.energies - curve.energies.min())
            axis.plot(curve.places, energies, color=BLUE, marker="o", markersize=3, linewidth=1.4)
            lowest = int(np.argmin(energies))
            axis.plot(curve.places[lowest], energies[lowest], color=ORANGE, marker="o", markersize=7)
            axis.set_title(curve.name)
            axis.set_xlabel(f"{curve.name.partition(' ')[0]} [{curve.unit}]")
            axis.set_ylabel("energy above the lowest [meV]")
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        return png(figure)


def _colours(number: int) -> list[Any]:
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    import matplotlib as mpl

    return [mpl.colormaps["turbo"](0.05 + 0.9 * each / (number - 1)) for each in range(number)]
