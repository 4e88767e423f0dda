"""In which units numbers are, judged by physics: bond lengths, energies of free atoms, stiffness of bonds.

What is judged are the numbers of the source: where samples were converted from units that settings or files state,
that is undone first, so that a wrong statement does not lead to a second wrong name.

========== ============================================================== ==========================================
quantity   evidence                                                       how sure
========== ============================================================== ==========================================
lengths    distance to the nearest atom over the sum of covalent radii    certain with bonds to hydrogen, else likely
energies   total over the sum of non-relativistic energies of free atoms  certain if it fits: no two units are close
forces     how fast the force on hydrogen grows as its bond is stretched  likely (force constants vary by a third)
relation   energy differences over the work of the forces                 certain if it explains the differences
========== ============================================================== ==========================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from torchmdnet.data.doctor.neighbours import nearest
from torchmdnet.data.doctor.samples import FARTHEST, Measured, Samples, covalent_radii, draw
from torchmdnet.elements import SYMBOLS
from torchmdnet.units import energy_factor, length_factor

__all__ = [
    "Guess",
    "Slope",
    "bond_stiffness",
    "energy_unit",
    "force_unit",
    "length_unit",
    "slope_of_fit",
    "slope_of_pairs",
    "unit_of_totals",
    "unit_ratio",
]

Certainty = Literal["certain", "likely", "open"]

#: Energies of free atoms in Hartree, non-relativistic (Chakravorty et al., Phys. Rev. A 47, 3649, 1993).
FREE_ATOMS = dict(
    zip(
        range(1, 19),
        (
            *(-0.5, -2.9037, -7.4781, -14.6674, -24.6539, -37.8450, -54.5892, -75.0673, -99.7339, -128.9376),
            *(-162.2546, -200.053, -242.346, -289.359, -341.259, -398.110, -460.148, -527.540),
        ),
        strict=True,
    )
)
FREE_ATOMS[35] = -2573.0  # bromine, as density functionals have it

#: Force constants of bonds to hydrogen in eV/Å², from stretching frequencies of common molecules.
STIFFNESS = {5: 22.0, 6: 30.5, 7: 41.0, 8: 48.0, 14: 17.0, 15: 20.0, 16: 25.5}

#: Units of energy, and of force in their usual combinations, in eV and Å.
ENERGIES = ("eV", "kcal/mol", "kJ/mol", "Hartree", "meV", "Rydberg")
FORCES = {
    "eV/Å": ("eV", "Å"),
    "kcal/mol/Å": ("kcal/mol", "Å"),
    "kJ/mol/Å": ("kJ/mol", "Å"),
    "kJ/mol/nm": ("kJ/mol", "nm"),
    "Hartree/Bohr": ("Hartree", "Bohr"),
    "Hartree/Å": ("Hartree", "Å"),
    "meV/Å": ("meV", "Å"),
}
NOBLE = (2, 10, 18, 36, 54, 86)


@dataclass
class Guess:
    """What a quantity is probably measured in.

    Args:
        quantity: "lengths", "energies" or "forces".
        unit: The unit; None where nothing can be said.
        certainty: How sure.
        evidence: In words, for people.
        numbers: The same for programs.
    """

    quantity: str
    unit: str | None
    certainty: Certainty
    evidence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def length_unit(samples: Samples, seed: int = 0) -> Guess:
    """The unit of lengths, from how far the nearest atom is."""
    z, other, distance = _nearest(samples, draw(len(samples), 300, seed))
    if not len(z):
        return Guess("lengths", None, "open", "no two atoms to measure between")
    radii = covalent_radii()
    distance = distance / samples.stated.length_scale  # as the source has it
    ratio = distance / (radii[z] + radii[other])
    hydrogen = (z == 1) & np.isin(other, [*STIFFNESS, 9, 17])
    by_hydrogen = hydrogen.sum() >= 5
    chosen = hydrogen if by_hydrogen else ~np.isin(z, NOBLE) & ~np.isin(other, NOBLE)
    if not chosen.any():
        return Guess("lengths", None, "open", "noble gases only, whose distances say nothing about bonds")
    middle = float(np.median(ratio[chosen]))
    misfit = {unit: abs(math.log(middle * length_factor(unit))) for unit in ("Å", "Bohr", "nm", "pm")}
    best, second = sorted(misfit, key=misfit.__getitem__)[:2]
    kinds = {}
    for a, b in {(min(p), max(p)) for p in zip(z[chosen].tolist(), other[chosen].tolist(), strict=True)}:
        mine = chosen & (np.minimum(z, other) == a) & (np.maximum(z, other) == b)
        kinds[a, b] = (int(mine.sum()), float(np.median(distance[mine])))
    common = sorted(kinds, key=lambda pair: -kinds[pair][0])[:3]
    words = ", ".join(f"{SYMBOLS[b]}–{SYMBOLS[a]} {kinds[a, b][1]:.3g}" for a, b in common)
    text = f"nearest atoms: {words}; {middle:.2f} times the sum of covalent radii"
    numbers = {
        "ratio to covalent radii": middle,
        "distances": {f"{SYMBOLS[b]}-{SYMBOLS[a]}": kinds[a, b][1] for a, b in common},
    }
    if by_hydrogen and misfit[best] < 0.15:
        return Guess("lengths", best, "certain", text, numbers)
    if misfit[best] < 0.45 and misfit[second] - misfit[best] > 0.25:
        return Guess("lengths", best, "likely", text, numbers)
    return Guess("lengths", None, "open", f"{text}, which fits no unit well", numbers)


def _nearest(samples: Samples, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each atom, its nearest neighbour and their distance in the unit of the data."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for block in samples.blocks(rows):
        for number in range(len(block)):
            part = slice(block.ptr[number], block.ptr[number + 1])
            pos, z, box = block.pos[part], block.z[part], block.box[number]
            if not (np.abs(pos) < FARTHEST).all() or z.max(initial=0) >= len(SYMBOLS):  # NaN is not below either
                continue
            if box.any():
                edges = box[np.abs(box).sum(axis=1) > 0]
                if len(edges) == 3:  # a neighbour shell of the density that the cell has
                    one = samples.take(block.rows[number : number + 1])
                    reach = 1.8 * (abs(np.linalg.det(box)) / len(z)) ** (1 / 3)
                    i, j, vectors = one.pairs(reach)
                    distance = np.linalg.norm(vectors, axis=1)
                    ends = np.concatenate([i, j])
                    order = np.lexsort((np.tile(distance, 2), ends))
                    first = order[np.flatnonzero(np.diff(ends[order], prepend=-1))]
                    found.append((z[ends[first]], z[np.concatenate([j, i])[first]], np.tile(distance, 2)[first]))
                    continue
            if len(z) > 1:
                distance, index = nearest(pos, 2)
                found.append((z, z[index[:, 1]], distance[:, 1]))
    if not found:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0)
    z, other, distance = (np.concatenate(column) for column in zip(*found, strict=True))
    fine = distance > 0
    return z[fine], other[fine], distance[fine]


def energy_unit(measured: Measured) -> Guess:
    """The unit of energies, from how total energies compare with those of free atoms."""
    if measured.y is None or not np.isfinite(measured.y).any():
        return Guess("energies", None, "open", "no energies")
    counts, elements = measured.composition
    fine = np.isfinite(measured.y)
    energies = measured.y / measured.samples.stated.energy_scale  # as the source has them
    per_atom = float(np.median(energies[fine] / np.maximum(measured.counts[fine], 1)))
    numbers: dict[str, Any] = {"median energy per atom": per_atom}
    unknown = [SYMBOLS[z] for z in elements.tolist() if z not in FREE_ATOMS and z < len(SYMBOLS)]
    text = f"{per_atom:.6g} per atom in the median"
    if not unknown and all(z < len(SYMBOLS) for z in elements.tolist()):
        ratio, unit = unit_of_totals(counts[fine], elements, energies[fine])
        numbers["energy over that of free atoms in Hartree"] = ratio
        if unit is not None:
            relative = ratio / energy_factor("Hartree", unit)
            return Guess(
                "energies", unit, "certain",
                f"total energies are {relative:.4f} times those of the free atoms, all electrons counted",
                numbers,
            )  # fmt: skip
        text += "; not the total energies of all electrons"
    else:
        text += f"; no energies of free atoms are known for {' '.join(unknown[:5])}"
    return Guess("energies", None, "open", text, numbers)


def unit_of_totals(counts: np.ndarray, elements: np.ndarray, energies: np.ndarray) -> tuple[float, str | None]:
    """How total energies compare with those of free atoms, and in which unit they are near them.

    Args:
        counts: Atoms of each element in each sample, (S, K).
        elements: The atomic numbers, (K,).
        energies: Finite energies, (S,), in whatever unit.

    Returns:
        The median of their ratio, free atoms in Hartree, and the unit that makes it about 1. None for the unit where
        there is none, NaN for the ratio where an element's energy is not known.
    """
    if not len(energies) or any(z not in FREE_ATOMS for z in elements.tolist()):
        return math.nan, None
    free = counts @ np.array([FREE_ATOMS[z] for z in elements.tolist()])
    ratio = float(np.median(energies / free))
    fitting = (unit for unit in ENERGIES if 0.975 < ratio / energy_factor("Hartree", unit) < 1.03)
    return ratio, next(fitting, None)


def bond_stiffness(measured: Measured, seed: int = 0) -> tuple[float, int] | None:
    """How stiff bonds to hydrogen are by the forces of the data, relative to what they are in eV/Å².

    Returns:
        The ratio and the number of bonds; negative where the force grows with the bond: it is a gradient. None without
        enough bonds.
    """
    if not measured.has_forces:
        return None
    rows = np.flatnonzero(measured.complete & (measured.counts > 1))
    rows = rows[draw(len(rows), 2000, seed)]
    data: dict[int, list[np.ndarray]] = {z: [] for z in STIFFNESS}
    for block in measured.samples.blocks(rows):
        forces = block.get("neg_dy")
        assert forces is not None
        i, j, vectors = block.pairs(1.9, measured.scale)
        distance = np.linalg.norm(vectors, axis=1)
        heavy = np.concatenate([i, j])
        light = np.concatenate([j, i])
        away = np.concatenate([vectors, -vectors])  # from the heavy atom to the hydrogen
        length = np.tile(distance, 2)
        for z in STIFFNESS:
            limit = 0.31 + covalent_radii()[z]
            mine = (block.z[heavy] == z) & (block.z[light] == 1) & (length > 0.75 * limit) & (length < 1.25 * limit)
            along = (forces[light[mine]] * away[mine]).sum(axis=1) / length[mine]
            data[z].append(np.stack([length[mine], along], axis=1))
    ratios, weights = [], []
    for z, parts in data.items():
        points = np.concatenate(parts) if parts else np.zeros((0, 2))
        if len(points) < 20:
            continue
        length, force = points.T
        spread = length - np.median(length)
        core = np.abs(spread) < 4 * max(1.4826 * np.median(np.abs(spread)), 1e-4)
        x, f = length[core] - length[core].mean(), force[core] - force[core].mean()
        if x.std() < 2e-3:
            continue
        correlation = float((x * f).mean() / (x.std() * f.std() + 1e-300))
        if abs(correlation) < 0.5:
            continue
        ratios.append(-float((x * f).sum() / (x * x).sum()) / STIFFNESS[z])
        weights.append(int(core.sum()))
    if not ratios:
        return None
    order = np.argsort(ratios)
    half = np.cumsum(np.array(weights)[order])
    return float(np.array(ratios)[order][np.searchsorted(half, half[-1] / 2)]), int(half[-1])


def force_unit(measured: Measured, stiffness: tuple[float, int] | None) -> Guess:
    """The unit of forces, from the stiffness of bonds to hydrogen."""
    if not measured.has_forces:
        return Guess("forces", None, "open", "no forces")
    scale = measured.samples.stated.force_scale
    rms = measured.force_rms / scale  # as the source has it
    numbers: dict[str, Any] = {"rms of components": rms}
    if stiffness is None:
        return Guess("forces", None, "open", f"components of {rms:.4g} rms", numbers)
    ratio, count = stiffness[0] / scale, stiffness[1]
    numbers |= {"stiffness relative to eV/Å²": ratio, "bonds": count}
    misfit = {
        name: abs(math.log(abs(ratio) * energy_factor(energy) / length_factor(length)))
        for name, (energy, length) in FORCES.items()
    }
    best, second = sorted(misfit, key=misfit.__getitem__)[:2]
    text = f"the forces of {count:,} bonds to hydrogen are {abs(ratio):.3g} times as stiff as usual, read in eV/Å" + (
        f"; that would be a factor {math.exp(misfit[best]):.2f} from the usual in {best}" if best != "eV/Å" else ""
    )
    if misfit[best] < math.log(1.35) and misfit[second] - misfit[best] > 0.2:
        return Guess("forces", best, "likely", text, numbers)
    return Guess("forces", None, "open", text, numbers)


# ------------------------------------------------------------------------------------------------------ relation


@dataclass
class Slope:
    """How energy differences follow from forces or stress.

    Args:
        value: The slope: 1 where they go together.
        explained: Share of the energy differences that it explains (r²).
        pairs: Number of differences.
        step: Their median displacement in Å; None where they are those of a fit.
        tolerance: How far the slope of labels that do go together may be from 1, as a factor.
    """

    value: float
    explained: float
    pairs: int
    step: float | None
    tolerance: float

    @property
    def is_certain(self) -> bool:
        """Whether it explains enough to judge by."""
        return self.pairs >= 8 and self.explained > (0.8 if self.step is not None else 0.55)

    @property
    def agrees(self) -> bool:
        """Whether the slope is 1 as far as can be told."""
        return self.value > 0 and abs(math.log(self.value)) < math.log(self.tolerance)

    @property
    def source(self) -> str:
        """What it comes from, in words."""
        if self.step is None:
            return f"{self.pairs:,} snapshots, by a fit to their forces"
        return f"{self.pairs:,} pairs of samples {self.step:.2g} Å apart"


def slope_of_pairs(rise: np.ndarray, work: np.ndarray, step: np.ndarray) -> Slope | None:
    """Slope of energy differences over work, by a weighted median, which a few wrong labels do not move."""
    fine = np.isfinite(rise) & np.isfinite(work)
    rise, work, step = rise[fine], work[fine], step[fine]
    size = np.abs(work)
    if len(work) < 4 or not size.any():
        return None
    moved = size > 0.05 * np.median(size)
    ratio, weight = rise[moved] / work[moved], size[moved] / (0.02 + step[moved]) ** 2
    order = np.argsort(ratio)
    total = np.cumsum(weight[order])
    value = float(ratio[order][np.searchsorted(total, total[-1] / 2)])
    scale = np.median(np.abs(rise - np.median(rise)))
    left = np.median(np.abs(rise - value * work))
    explained = 1.0 - float((left / scale) ** 2) if scale > 0 else 0.0
    middle = float(np.median(step))
    return Slope(value, explained, len(work), middle, min(1.1 + 1.5 * middle, 1.4))  # the error grows with the step


def slope_of_fit(given: np.ndarray, fitted: np.ndarray) -> Slope | None:
    """Slope of energies over those that a fit to the forces has, without the outermost of them."""
    core = np.abs(given - np.median(given)) < 6 * 1.4826 * np.median(np.abs(given - np.median(given)))
    x, y = fitted[core], given[core]
    if len(x) < 20 or not x.std() or not y.std():
        return None
    correlation = float(np.corrcoef(x, y)[0, 1])
    return Slope(float(np.sign(correlation) * y.std() / x.std()), correlation**2, len(x), None, 1.5)


def unit_ratio(
    slope: float, tolerance: float, length: str = "Å", energy_unit: str | None = None, force_unit: str | None = None
) -> tuple[float, str, str] | None:
    """Which units of energies and forces have this ratio between them.

    Args:
        slope: Energy differences over work, both in the numbers of the source.
        tolerance: How far it may be off, as a factor.
        length: Unit of its positions.
        energy_unit: Unit of its energies, as far as they show it.
        force_unit: Unit of its forces, likewise.

    Returns:
        The exact ratio, and the units of energies and of forces; None where no usual pair fits.
    """
    found: list[tuple[int, float, float, str, str]] = []
    for energy in ENERGIES:
        for name, (of_force, of_length) in FORCES.items():
            force = energy_factor("eV", of_force) / length_factor("Å", of_length)
            expected = energy_factor("eV", energy) / (force * length_factor("Å", length))
            misfit = abs(math.log(abs(slope) / expected))
            unusual = (
                (energy != "eV") + (name != "eV/Å") + (energy in ("meV", "Rydberg")) + (name in ("meV/Å", "Hartree/Å"))
            )
            unusual += 4 * (energy_unit not in (None, energy)) + 4 * (force_unit not in (None, name))
            if misfit < math.log(tolerance):
                found.append((unusual, misfit, expected, energy, name))
    return min(found)[2:] if found else None


def symbols(elements: np.ndarray) -> list[str]:
    """Symbols of atomic numbers; what is none is shown as its number."""
    return [SYMBOLS[z] if 0 < z < len(SYMBOLS) else str(z) for z in elements.tolist()]
