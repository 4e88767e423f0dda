"""Samples of any data set, read a block at a time, and the numbers that every check looks at.

One pass over the whole set measures each sample: a few numbers per sample stay in memory, whatever the size of the set.
What costs more (neighbours to 10 Å, stiffness of bonds) looks at a seeded draw.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from torchmdnet.data.doctor.survey import Survey
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.frames import Indices
from torchmdnet.datasets.labels import LARGEST_LABEL, LabelKind
from torchmdnet.neighbors import pairs_within
from torchmdnet.neighbors.lattice import is_too_flat
from torchmdnet.units import energy_factor, force_factor, length_factor

__all__ = ["HISTOGRAM", "REACH", "Block", "Measured", "Samples", "Stated", "covalent_radii", "draw"]

BLOCK = 50_000  # atoms looked at together
REACH = 5.0  # Å; pairs within it make the fingerprint of a sample
CENTERS = np.arange(0.8, REACH, 0.6)  # Å
HISTOGRAM = np.arange(0.0, REACH + 1e-9, 0.02)  # Å, edges of the bins
LARGEST_Z = 118
APART = 100.0  # Å; parts of an open sample further from each other have nothing to do with each other


@dataclass(frozen=True)
class Stated:
    """Units that settings or a file state, from which stored samples were converted to eV and Å.

    Args:
        energy: Unit of energies; None where none is stated.
        length: Of lengths.
        forces: Of forces, where it is not that of energies over that of lengths.
    """

    energy: str | None = None
    length: str | None = None
    forces: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether any is stated."""
        return any((self.energy, self.length, self.forces))

    @property
    def energy_scale(self) -> float:
        """What energies were multiplied by."""
        return energy_factor(self.energy or "eV")

    @property
    def length_scale(self) -> float:
        """What lengths were multiplied by."""
        return length_factor(self.length or "Å")

    @property
    def force_scale(self) -> float:
        """What forces were multiplied by."""
        return force_factor(self.force_unit)

    @property
    def force_unit(self) -> str:
        """Unit in which forces were taken to be."""
        return self.forces or f"{self.energy or 'eV'}/{self.length or 'Å'}"

    @property
    def words(self) -> str:
        """``energy_unit: Hartree, forces_unit: eV/Å``."""
        named = {"energy_unit": self.energy, "length_unit": self.length, "forces_unit": self.forces}
        return ", ".join(f"{name}: {unit}" for name, unit in named.items() if unit)


@dataclass
class Samples:
    """A data set, where it comes from, and where each sample lies.

    Args:
        name: What to call it.
        kind: Name of the data set class.
        frames: Stored systems, as :class:`~torchmdnet.datasets.frames.Frames` offers them.
        energy_unit: Unit the set states; None where it states none.
        length_unit: Likewise.
        survey: What was met on the way into structure files.
        splits: Samples of each part, where known.
        reference_energies: Energy of each element that the source states.
        provenance: Level of theory, citation and licence, as far as stated.
        place: Names the place of a sample.
        keys: Name in the source of each label.
        isolated: Energies of isolated atoms beside the samples.
        dataset: The data set itself.
        stated: Units that the samples were converted from, where all have the same; those above are of what is stored.
        learnt: Labels that training asks for; by default the one it asks for unless told otherwise.
    """

    name: str
    kind: str
    frames: Any
    energy_unit: str | None = None
    length_unit: str | None = None
    survey: Survey | None = None
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference_energies: Mapping[int, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    place: Callable[[int], str] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    isolated: Mapping[int, float] = field(default_factory=dict)
    dataset: Any = None
    stated: Stated = Stated()
    learnt: frozenset[LabelKind] = frozenset({"energy"})

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def stated_energy_unit(self) -> str | None:
        """The unit that energies had in the source, as far as it is stated or is the default."""
        return self.stated.energy or self.energy_unit

    @property
    def stated_length_unit(self) -> str | None:
        """The unit that lengths had in the source, likewise."""
        return self.stated.length or self.length_unit

    @property
    def stated_force_unit(self) -> str | None:
        """The unit that forces had in the source, likewise."""
        if self.energy_unit is None or self.length_unit is None:
            return None
        return self.stated.forces or f"{self.stated_energy_unit}/{self.stated_length_unit}"

    def where(self, sample: int) -> str:
        """``water.extxyz, frame 12``, or ``sample 12`` where the source is not known."""
        return f"sample {sample}" if self.place is None else self.place(sample)

    def take(self, rows: Indices) -> Block:
        """Samples as arrays."""
        found = {name: tensor.numpy() for name, tensor in self.frames.gather(rows).items()}
        return Block(np.asarray(rows, dtype=np.int64), found)

    def blocks(self, rows: np.ndarray | None = None, atoms: int = BLOCK) -> Iterator[Block]:
        """All samples, or some, in blocks of about ``atoms`` atoms."""
        rows = np.arange(len(self)) if rows is None else rows
        counts = self.frames.counts[rows]
        number = np.cumsum(counts) // atoms
        edges = [*np.flatnonzero(np.diff(number, prepend=-1)).tolist(), len(rows)]
        for first, last in itertools.pairwise(edges):
            yield self.take(rows[first:last])


#: Coordinates beyond this belong to no structure.
FARTHEST = 1e12


def _believable(values: Any) -> np.ndarray:
    """In float64, with NaN for what is infinite or larger than any label, whose squares would overflow."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(values) <= LARGEST_LABEL, values, np.nan)


class Block:
    """Some samples as arrays.

    Args:
        rows: Their numbers, (B,).
        arrays: Their quantities, (atoms, ...) and (B, ...), with ``ptr`` and ``batch``.
    """

    def __init__(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        self.rows = rows
        self.arrays = arrays
        self.ptr, self.batch = arrays["ptr"], arrays["batch"]
        self.z = np.asarray(arrays["z"], dtype=np.int64).reshape(-1)
        self.pos = _believable(arrays["pos"])
        self.counts = np.diff(self.ptr)

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, name: str) -> np.ndarray | None:
        """A quantity in float64, None where there is none; numbers that cannot be meant are NaN."""
        found = self.arrays.get(name)
        return None if found is None else _believable(found)

    @property
    def box(self) -> np.ndarray:
        """Lattice vectors as rows, (B, 3, 3), zero for open directions."""
        box = self.get("box")
        return np.zeros((len(self), 3, 3)) if box is None else box.reshape(-1, 3, 3)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sums over the atoms of each sample: (atoms,) or (atoms, 3) -> (B,) or (B, 3)."""
        columns = values.reshape(len(values), -1).T
        sums = [np.bincount(self.batch, weights=column, minlength=len(self)) for column in columns]
        return np.stack(sums, axis=1).reshape(len(self), *values.shape[1:])

    def is_flat(self, cutoff: float, scale: float = 1.0) -> np.ndarray:
        """Samples (B,) in a cell without volume, or with more images in reach than a search will look at.

        Args:
            cutoff: In Å.
            scale: Å per unit of length of the data.
        """
        box = torch.from_numpy(self.box * scale)
        fine = box.isfinite().flatten(1).all(dim=1)
        box[~fine] = 0.0
        return (~fine | (is_too_flat(box, cutoff) & box.ne(0).flatten(1).any(dim=1))).numpy()

    def pairs(self, cutoff: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs within a cutoff, each once: i, j (P,) and the vectors from i to j (P, 3) in Å.

        Samples without a place for every atom, and those in cells that are too flat, have none.

        Args:
            cutoff: In Å.
            scale: Å per unit of length of the data.
        """
        usable = np.asarray((np.abs(self.pos) < FARTHEST).all(axis=1))  # NaN is not below either
        box = torch.from_numpy(self.box * scale)
        fine = ~self.is_flat(cutoff, scale)
        fine[self.batch[~usable]] = False
        pos = np.where(usable[:, None], self.pos, 0.0) * scale
        atoms = np.flatnonzero(fine[self.batch])
        box[torch.from_numpy(~fine)] = 0.0
        i, j, shifts = pairs_within(
            torch.from_numpy(pos[atoms]), torch.from_numpy(self.batch[atoms]), box, len(self), cutoff
        )
        first, second = i.numpy(), j.numpy()
        vectors = pos[atoms][second] - pos[atoms][first]
        if shifts is not None:
            where = self.batch[atoms][first]
            vectors -= np.einsum("pa,pab->pb", shifts.numpy().astype(np.float64), self.box[where] * scale)
        return atoms[first], atoms[second], vectors


def draw(count: int, size: int, seed: int = 0) -> np.ndarray:
    """At most ``size`` of the numbers below ``count``, ascending, the same each time."""
    if count <= size:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False))


def covalent_radii() -> np.ndarray:
    """Covalent radius of each element in Å, index = Z (Cordero et al. 2008, as ASE keeps them)."""
    from ase.data import covalent_radii as radii

    return np.where(radii > 0.21, radii, 1.5)[: LARGEST_Z + 1]


class Measured:
    """A few numbers of every sample, from one pass over the set.

    Args:
        samples: The data set.
        scale: Å per unit of length of the data, so that distances mean what they should.
    """

    def __init__(self, samples: Samples, scale: float = 1.0) -> None:
        self.samples, self.scale = samples, scale
        size = len(samples)
        self.counts: np.ndarray = np.asarray(samples.frames.counts)
        self.force_square = np.full(size, np.nan)  # sum over atoms of |F|²
        self.force_max = np.full(size, np.nan)  # largest |F|
        self.net_force = np.full(size, np.nan)  # |sum of F|
        self.torque = np.full(size, np.nan)  # relative to the size of its terms; NaN for periodic samples
        self.contact = np.full(size, np.inf)  # closest pair in units of the sum of covalent radii
        self.contact_pair = np.zeros((size, 2), dtype=np.int32)  # its atoms
        self.contact_distance = np.full(size, np.inf)  # and their distance in Å
        self.fingerprint = np.zeros((size, len(CENTERS)))
        self.sequence = np.zeros(size, dtype=np.uint64)  # of the atomic numbers, in their order
        self.is_periodic = np.zeros(size, dtype=bool)
        self.is_flat = np.zeros(size, dtype=bool)
        self.charge_sum = np.full(size, np.nan)
        self.farthest = np.zeros(size)  # largest coordinate in Å
        self.gap = np.zeros(size)  # in Å, along an axis, between two parts of an open sample
        #: Samples in which a quantity is missing (all of it NaN) or partly not finite.
        self.missing: dict[str, list[np.ndarray]] = {}
        self.broken: dict[str, list[np.ndarray]] = {}
        #: Samples with finite numbers that are larger than any label, and the largest, by quantity.
        self.huge: dict[str, list[np.ndarray]] = {}
        self.largest: dict[str, float] = {}
        self.histogram: dict[tuple[int, int], np.ndarray] = {}
        self.has_forces = "neg_dy" in samples.frames
        self._radii = covalent_radii()
        rng = np.random.default_rng(5)
        self._words = rng.integers(1, 2**63, size=4096, dtype=np.uint64) | np.uint64(1)
        self._weights = rng.uniform(0.5, 1.5, size=256)  # of elements in fingerprints
        for block in progress(samples.blocks(), "Looking at samples", None, "block"):
            self._finite(block)
            self._sizes(block)
            self._extents(block)
            if self.has_forces:
                self._forces(block)
            self._distances(block)

    # --------------------------------------------------------------------------------------------- the pass

    def _finite(self, block: Block) -> None:
        for name, values in block.arrays.items():
            if values.dtype.kind != "f" or name in ("ptr", "batch"):
                continue
            fine = np.asarray(np.isfinite(values.reshape(len(values), -1)))
            size = np.where(fine, np.abs(values.reshape(len(values), -1)), 0.0)
            if size.max(initial=0.0) > LARGEST_LABEL:
                where = np.flatnonzero((size > LARGEST_LABEL).any(axis=1))
                rows = where if len(values) == len(block) else np.unique(block.batch[where])
                self.huge.setdefault(name, []).append(block.rows[rows])
                self.largest[name] = max(self.largest.get(name, 0.0), float(size.max()))
            if fine.all():
                continue
            if len(values) == len(block):
                bad, gone = ~fine.all(axis=1), np.isnan(values.reshape(len(values), -1)).all(axis=1)
            else:
                number = np.bincount(block.batch, weights=~fine.all(axis=1), minlength=len(block))
                void = np.isnan(values.reshape(len(values), -1)).all(axis=1)
                bad = number > 0
                gone = np.bincount(block.batch, weights=void, minlength=len(block)) == block.counts
            self.missing.setdefault(name, []).append(block.rows[gone])
            self.broken.setdefault(name, []).append(block.rows[bad & ~gone])

    def _sizes(self, block: Block) -> None:
        self.is_periodic[block.rows] = block.box.any(axis=(1, 2))
        self.is_flat[block.rows] = block.is_flat(REACH, self.scale)
        place = np.arange(len(block.z)) - block.ptr[:-1][block.batch]
        words = self._words[place % 4096] * (block.z.astype(np.uint64) + np.uint64(place.max(initial=0) // 4096 + 1))
        starts = np.minimum(block.ptr[:-1], max(len(words) - 1, 0))
        self.sequence[block.rows] = np.add.reduceat(words, starts) if len(words) else 0
        for name in ("partial_charges", "charges", "pq"):
            charges = block.get(name)
            if charges is not None:
                self.charge_sum[block.rows] = block.sum(charges.reshape(-1))

    def _extents(self, block: Block) -> None:
        filled = block.counts > 0
        starts, rows = block.ptr[:-1][filled], block.rows[filled]
        if not len(starts):
            return
        raw = np.asarray(block.arrays["pos"], dtype=np.float64)
        size = np.where(np.isfinite(raw), np.abs(raw), 0.0).max(axis=1)
        self.farthest[rows] = np.maximum.reduceat(size, starts) * min(self.scale, 1e3)
        pos = np.where(np.isfinite(block.pos), block.pos, 0.0) * self.scale
        extent = np.maximum.reduceat(pos, starts) - np.minimum.reduceat(pos, starts)
        wide = np.zeros(len(block), dtype=bool)
        wide[filled] = (extent > APART).any(axis=1)
        wide &= ~block.box.any(axis=(1, 2))
        atoms = np.flatnonzero(wide[block.batch])
        for axis in range(3) if len(atoms) else ():
            order = atoms[np.lexsort((pos[atoms, axis], block.batch[atoms]))]
            step = np.where(np.diff(block.batch[order]) == 0, np.diff(pos[order, axis]), 0.0)
            np.maximum.at(self.gap, block.rows[block.batch[order[1:]]], step)

    def _forces(self, block: Block) -> None:
        forces = block.get("neg_dy")
        assert forces is not None
        rows, square = block.rows, (forces**2).sum(axis=1)
        self.force_square[rows] = block.sum(square)
        filled = block.counts > 0
        largest = np.full(len(block), np.nan)
        largest[filled] = np.sqrt(np.maximum.reduceat(square, block.ptr[:-1][filled]))
        self.force_max[rows] = largest
        self.net_force[rows] = np.linalg.norm(block.sum(forces), axis=1)
        center = block.sum(block.pos) / np.maximum(block.counts, 1)[:, None]
        arm = block.pos - center[block.batch]
        size = np.sqrt(block.sum((arm**2).sum(axis=1)) * self.force_square[rows])
        # the whole size of |r||F| over all atoms: of independent forces the torque is a fair part of it
        torque = np.linalg.norm(block.sum(np.cross(arm, forces)), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = torque * np.sqrt(np.maximum(block.counts, 1)) / size
        relative[block.box.any(axis=(1, 2)) | (block.counts < 2)] = np.nan
        self.torque[rows] = relative

    def _distances(self, block: Block) -> None:
        i, j, vectors = block.pairs(REACH, self.scale)
        if not len(i):
            return
        distance = np.linalg.norm(vectors, axis=1)
        zi, zj = np.minimum(block.z[i], LARGEST_Z), np.minimum(block.z[j], LARGEST_Z)
        which = block.batch[i]
        ratio = distance / (self._radii[zi] + self._radii[zj])
        order = np.lexsort((ratio, which))
        first = order[np.flatnonzero(np.diff(which[order], prepend=-1))]
        rows = block.rows[which[first]]
        starts = block.ptr[:-1][which[first]]
        self.contact[rows] = ratio[first]
        self.contact_distance[rows] = distance[first]
        self.contact_pair[rows] = np.stack([i[first] - starts, j[first] - starts], axis=1)
        weight = self._weights[zi] * self._weights[zj]
        weight = weight * (0.5 + 0.5 * np.cos(np.pi * distance / REACH))
        for k, center in enumerate(CENTERS):
            term = weight * np.exp(-(((distance - center) / 0.5) ** 2))
            self.fingerprint[block.rows, k] = np.bincount(which, weights=term, minlength=len(block))
        low, high = np.minimum(zi, zj), np.maximum(zi, zj)
        pair = low * 256 + high
        bins = np.minimum((distance / HISTOGRAM[1]).astype(np.int64), len(HISTOGRAM) - 2)
        for kind in np.unique(pair).tolist():
            counts = np.bincount(bins[pair == kind], minlength=len(HISTOGRAM) - 1)
            key = divmod(kind, 256)
            self.histogram[key] = self.histogram.get(key, 0) + counts

    # --------------------------------------------------------------------------------------------- what follows

    @cached_property
    def y(self) -> np.ndarray | None:
        """Energies, (S,), float64."""
        if "y" not in self.samples.frames:
            return None
        return _believable(self.samples.frames["y"]).reshape(len(self.samples), -1)[:, 0]

    def per_system(self, name: str) -> np.ndarray | None:
        """A number of each sample, (S,)."""
        frames = self.samples.frames
        if name not in frames or name in frames.atom_fields:
            return None
        return _believable(frames[name]).reshape(len(self.samples), -1)[:, 0]

    @cached_property
    def composition(self) -> tuple[np.ndarray, np.ndarray]:
        """Atoms of each element in each sample (S, K), and the K atomic numbers."""
        return self.samples.frames.composition()

    @cached_property
    def formula(self) -> np.ndarray:
        """A number for each sample, the same for the same elements, charge, spin and kind of boundary, (S,)."""
        counts, _ = self.composition
        columns = [counts.astype(np.float64), self.is_periodic[:, None].astype(np.float64)]
        for name in ("q", "s"):
            values = self.per_system(name)
            if values is not None:
                columns.append(np.nan_to_num(values)[:, None])
        return np.unique(np.hstack(columns), axis=0, return_inverse=True)[1].reshape(-1)

    @cached_property
    def binding(self) -> np.ndarray | None:
        """Energy beyond the least-squares energies of the elements, (S,); NaN where there is no energy."""
        if self.y is None:
            return None
        from torchmdnet.datasets.reference_energies import fit_energies

        counts, elements = self.composition
        fine = np.isfinite(self.y)
        if not fine.any():
            return None
        table = fit_energies(counts[fine], elements, self.y[fine])
        return self.y - counts @ np.array([table.get(z, 0.0) for z in elements.tolist()])

    @cached_property
    def force_rms(self) -> float:
        """Root mean square of force components over all samples with forces."""
        fine = np.isfinite(self.force_square)
        number = 3 * self.counts[fine].sum()
        return float(np.sqrt(self.force_square[fine].sum() / number)) if number else float("nan")

    def rows_of(self, table: Mapping[str, list[np.ndarray]], name: str) -> np.ndarray:
        """Samples listed in :attr:`missing`, :attr:`broken` or :attr:`huge`."""
        return np.concatenate(table[name]) if name in table else np.zeros(0, dtype=np.int64)

    @cached_property
    def complete(self) -> np.ndarray:
        """Samples with finite positions, energies and forces, as far as the set has these, (S,) bool."""
        fine = np.ones(len(self.samples), dtype=bool)
        for table in (self.missing, self.broken, self.huge):
            for name in ("pos", "y", "neg_dy", "box"):
                fine[self.rows_of(table, name)] = False
        return fine
