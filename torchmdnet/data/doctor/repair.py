"""Writing a cleaned copy; the original is never touched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target, draft_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Plan", "check_copy", "plan_repair", "write_cleaned"]

SUFFIXES = (".extxyz", ".xyz", ".h5", ".hdf5")
#: Fields of a sample in a structure file: name, and whether ASE keeps it among results.
PER_SYSTEM = {"q": "total_charge", "s": "n_unpaired", "dipole": "dipole", "dp": "dipole"}
PER_ATOM = {"charges": "charges", "partial_charges": "charges", "pq": "charges"}


class Plan(NamedTuple):
    """What is done: samples left out with the reasons, factors with theirs, and errors and warnings that are left."""

    keep: np.ndarray
    dropped: dict[str, int]
    scale: dict[str, float]
    reasons: dict[str, str]
    left: tuple[Finding, ...] = ()

    def words(self) -> list[str]:
        """What is done, one line each."""
        lines = [f"{count:,} sample{'s' if count != 1 else ''} left out: {why}" for why, count in self.dropped.items()]
        return lines + [
            f"{name} multiplied by {factor:.6g}: {self.reasons[name]}" for name, factor in self.scale.items()
        ]


def check_copy(target: str | os.PathLike[str], sources: list[Path]) -> Path:
    """The file to write, if it can be.

    Raises:
        ConfigError: If it exists, is one of the sources, or has a suffix that is not known.
    """
    path = check_target(target, "--fix")
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--fix: {target} does not end in {', '.join(SUFFIXES)}, the formats a cleaned copy can have."
        )
    if os.path.lexists(path):
        own = any(os.path.realpath(path) == os.path.realpath(source) for source in sources)
        what = "is the original, which is never changed" if own else "exists"
        raise ConfigError(f"--fix: {target} {what}. Give the copy a new name.")
    if not path.parent.is_dir():
        raise ConfigError(f"--fix: there is no folder {path.parent}.")
    return path


def plan_repair(diagnosis: Diagnosis) -> Plan:
    """What the findings ask for that can be done without guessing."""
    keep = np.ones(len(diagnosis.samples), dtype=bool)
    dropped: dict[str, int] = {}
    scale: dict[str, float] = {}
    reasons: dict[str, str] = {}
    fields = {*diagnosis.samples.frames.fields}
    left: list[Finding] = []
    survey = diagnosis.samples.survey
    if survey is not None and survey.num_dropped:
        dropped["unreadable"] = survey.num_dropped
    for finding in diagnosis.findings:
        if finding.repair is None or not (finding.repair.drop or {*finding.repair.scale} & fields):
            left += [finding] if finding.severity != "note" else []
            continue
        if finding.repair.drop:
            fresh = [i for i in finding.samples if keep[i]]
            keep[fresh] = False
            if fresh:
                dropped[finding.check] = dropped.get(finding.check, 0) + len(fresh)
        for name, factor in finding.repair.scale.items():
            if name in fields:
                scale[name] = scale.get(name, 1.0) * factor
                reasons[name] = finding.check if name not in reasons else f"{reasons[name]}, {finding.check}"
    # a fault whose samples are left out for another one is gone with them
    still = tuple(f for f in left if not len(f.samples) or keep[np.asarray(f.samples)].any())
    return Plan(np.flatnonzero(keep), dropped, scale, reasons, still)


def write_cleaned(diagnosis: Diagnosis, plan: Plan, path: Path) -> int:
    """Write what is left, in the units of the data set.

    Args:
        diagnosis: The examined set.
        plan: What to leave out and what to multiply.
        path: A file that does not exist: extended XYZ, or HDF5 as ``dataset: HDF5`` reads it.

    Returns:
        The number of samples written.

    Raises:
        ConfigError: If nothing is left.
    """
    if not len(plan.keep):
        raise ConfigError("--fix: no sample is left. Look at the errors first.")
    with draft_of(path) as draft:
        if path.suffix in (".h5", ".hdf5"):
            _write_hdf5(diagnosis, plan, draft)
        else:
            _write_extxyz(diagnosis, plan, draft)
    return len(plan.keep)


def _samples(diagnosis: Diagnosis, plan: Plan) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Kept samples, repaired: number and quantities, per-system ones without their first axis."""
    frames = diagnosis.samples.frames
    atom_fields = set(frames.atom_fields)
    for block in diagnosis.samples.blocks(plan.keep):
        for number, row in enumerate(block.rows.tolist()):
            part = slice(block.ptr[number], block.ptr[number + 1])
            yield (
                row,
                {
                    name: np.asarray(block.arrays[name][part] if name in atom_fields else block.arrays[name][number])
                    * plan.scale.get(name, 1)
                    for name in frames.fields
                },
            )


def _write_extxyz(diagnosis: Diagnosis, plan: Plan, draft: Path) -> None:
    from ase.io.extxyz import write_xyz

    part = np.full(len(diagnosis.samples), "", dtype=object)
    for name, rows in diagnosis.samples.splits.items():
        part[rows] = name
    with draft.open("w", encoding="utf-8") as file:
        for row, sample in _samples(diagnosis, plan):
            write_xyz(file, [_atoms(diagnosis, row, sample, part[row])])
        for z, energy in diagnosis.samples.isolated.items():
            write_xyz(file, [_isolated(z, energy * plan.scale.get("y", 1.0), diagnosis)])


def _atoms(diagnosis: Diagnosis, row: int, sample: dict[str, np.ndarray], part: str) -> Atoms:
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    box = np.asarray(sample.get("box", np.zeros((3, 3))), dtype=np.float64).reshape(3, 3)
    atoms = Atoms(numbers=sample["z"], positions=sample["pos"], cell=box, pbc=box.any(axis=1))
    results: dict[str, Any] = {}
    if "y" in sample:
        results["energy"] = float(np.ravel(sample["y"])[0])
    if "neg_dy" in sample:
        results["forces"] = np.asarray(sample["neg_dy"], dtype=np.float64)
    if "stress" in sample and np.isfinite(sample["stress"]).all() and box.any(axis=1).all():
        full = np.asarray(sample["stress"], dtype=np.float64).reshape(3, 3)
        results["stress"] = full[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    for field, name in (PER_SYSTEM | PER_ATOM).items():
        if field not in sample or not np.isfinite(sample[field]).all():
            continue
        value = np.asarray(sample[field], dtype=np.float64)
        if name in ("dipole", "charges"):
            results[name] = value.reshape(-1)
        else:
            atoms.info[name] = round(float(value)) if float(value).is_integer() else float(value)
    atoms.calc = SinglePointCalculator(atoms, **results)
    known = {"z", "pos", "box", "y", "neg_dy", "stress", *PER_SYSTEM, *PER_ATOM}
    for name, value in sample.items():
        if name not in known and np.isfinite(value).all():
            (atoms.arrays if name in diagnosis.samples.frames.atom_fields else atoms.info)[name] = value
    if part:
        atoms.info["split"] = part
    survey = diagnosis.samples.survey
    atoms.info["source_frame"] = int(survey.frame_of[row]) if survey is not None and len(survey.frame_of) else row
    return atoms


def _isolated(z: int, energy: float, diagnosis: Diagnosis) -> Atoms:
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = Atoms(SYMBOLS[z], positions=[[0.0, 0.0, 0.0]])
    atoms.info["config_type"] = "IsolatedAtom"
    results: dict[str, Any] = {"energy": energy}
    if diagnosis.measured.has_forces:
        results["forces"] = np.zeros((1, 3))
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _write_hdf5(diagnosis: Diagnosis, plan: Plan, draft: Path) -> None:
    """One group for each number of atoms."""
    import h5py

    names = {"z": "types", "pos": "pos", "y": "energy", "neg_dy": "forces"}
    samples = diagnosis.samples
    atom_fields = set(samples.frames.atom_fields)
    counts = np.asarray(samples.frames.counts)[plan.keep]
    with h5py.File(draft, "w") as file:
        for key, unit in (("energy_unit", samples.energy_unit), ("length_unit", samples.length_unit)):
            if unit is not None:
                file.attrs[key] = unit
        for size in np.unique(counts).tolist():
            rows = plan.keep[counts == size]
            block = samples.take(rows)
            group = file.create_group(f"atoms_{size}")
            for name in samples.frames.fields:
                values = np.asarray(block.arrays[name])
                factor = plan.scale.get(name, 1)
                values = values * factor if factor != 1 else values
                if name in atom_fields:
                    values = values.reshape(len(rows), size, *values.shape[1:])
                elif name == "y":
                    values = values.reshape(len(rows))
                group[names.get(name, name)] = values
            group["source_frame"] = rows
