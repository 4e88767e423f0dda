"""Clean data to plant faults in: molecules and crystals that come with the package, as ASE's frames."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from torchmdnet.data.doctor import Diagnosis, Finding, examine, open_files
from torchmdnet.datasets import TinyQM


@functools.cache
def _molecules() -> tuple[Atoms, ...]:
    data = TinyQM(level="wb97x")
    chosen = [name for name in dict.fromkeys(data.names.tolist()) if "+" not in name][:12]
    rows = np.flatnonzero(np.isin(data.names, chosen) & (data.frames.counts > 3))[:140]
    return tuple(_atoms(data, int(row)) for row in rows)


@functools.cache
def _crystals() -> tuple[Atoms, ...]:
    data = TinyQM(level="gfn1")
    rows = [np.flatnonzero(data.names == name)[:24] for name in dict.fromkeys(data.names.tolist())]
    return tuple(_atoms(data, int(row)) for row in np.concatenate(rows))


def _atoms(data: TinyQM, row: int) -> Atoms:
    sample = data.frames.sample(row)
    box = sample["box"][0].numpy() if "box" in sample else None
    atoms = Atoms(sample["z"].numpy(), sample["pos"].numpy(), cell=box, pbc=box is not None)
    results = {"energy": float(sample["y"]), "forces": sample["neg_dy"].double().numpy()}
    if "stress" in sample:
        full = sample["stress"][0].double().numpy()
        results["stress"] = full[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    if "dp" in sample:
        results["dipole"] = sample["dp"][0].double().numpy()
    if "partial_charges" in sample:
        results["charges"] = sample["partial_charges"].double().numpy()
    atoms.info = {"total_charge": int(sample["q"]), "n_unpaired": int(sample["s"])}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def copies(frames: Sequence[Atoms]) -> list[Atoms]:
    """Copies with their labels."""
    out = []
    for atoms in frames:
        twin = atoms.copy()
        twin.calc = SinglePointCalculator(twin, **{k: np.copy(v) for k, v in atoms.calc.results.items()})
        out.append(twin)
    return out


def molecules() -> list[Atoms]:
    """140 molecules of several kinds, density functional labels."""
    return copies(_molecules())


def crystals() -> list[Atoms]:
    """Strained cells, tight-binding labels with stress."""
    return copies(_crystals())


def diagnose(folder: Path, frames: Sequence[Atoms], plant: Callable[[list[Atoms]], None] | None = None) -> Diagnosis:
    """Examine frames, after a fault was planted in them."""
    frames = copies(frames)
    if plant is not None:
        plant(frames)
    path = folder / "frames.extxyz"
    write(path, frames, format="extxyz")
    return examine(open_files([str(path)]))


def faults(diagnosis: Diagnosis) -> dict[str, Finding]:
    """Errors and warnings by the name of their check."""
    return {finding.check: finding for finding in diagnosis.findings if finding.severity != "note"}
