"""Labelled structures as extended XYZ or HDF5, complete or not there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError
from torchmdnet.files import draft_of

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["writer_for"]

#: Structures held in memory before they are written.
CHUNK = 1000
#: Quantities that are whole numbers.
_WHOLE = ("types", "q", "s")


def writer_for(output: Path) -> Callable[[Iterable[Atoms]], int]:
    """The function that writes structures in the format that a name asks for, and returns how many there were.

    Raises:
        ConfigError: If no format has that name.
    """
    if output.suffix in (".extxyz", ".xyz"):
        return lambda frames: write_extxyz(output, frames)
    if output.suffix in (".h5", ".hdf5"):
        return lambda frames: write_hdf5(output, frames)
    raise ConfigError(f"output: {output.name} ends in none of .extxyz, .xyz, .h5 and .hdf5, so its format is unknown.")


def write_extxyz(output: Path, frames: Iterable[Atoms]) -> int:
    """Extended XYZ as ASE writes it, with eight decimals."""
    from ase.io import write

    total = 0
    with draft_of(output) as draft, open(draft, "w", encoding="utf-8") as file:
        for chunk in _chunks(frames):
            write(file, chunk, format="extxyz")
            total += len(chunk)
    return total


def write_hdf5(output: Path, frames: Iterable[Atoms]) -> int:
    """The layout of :class:`torchmdnet.datasets.HDF5`, one group for each composition.

    Units and level of theory are attributes of the file. Labels that some structures lack are NaN for these.
    """
    import h5py

    total = 0
    with draft_of(output) as draft, h5py.File(draft, "w") as file:
        for chunk in _chunks(frames):
            for name, members in _by_composition(chunk).items():
                _append(file.require_group(name), [_arrays_of(atoms) for atoms in members])
            file.attrs.update({"energy_unit": "eV", "length_unit": "Å"})
            file.attrs["level_of_theory"] = chunk[0].info["level_of_theory"]
            total += len(chunk)
        _complete(file)
    return total


def _chunks(frames: Iterable[Atoms]) -> Iterator[list[Atoms]]:
    source = iter(frames)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield chunk


def _by_composition(frames: Iterable[Atoms]) -> dict[str, list[Atoms]]:
    found: dict[str, list[Atoms]] = {}
    for atoms in frames:
        found.setdefault(atoms.get_chemical_formula(), []).append(atoms)
    return found


def _arrays_of(atoms: Atoms) -> dict[str, Any]:
    """One structure by the names of the layout."""
    results = atoms.calc.results if atoms.calc is not None else {}
    arrays: dict[str, Any] = {
        "types": atoms.numbers.astype(np.int16),
        "pos": atoms.positions,
        "box": np.where(atoms.pbc[:, None], atoms.cell.array, 0.0),
        "q": np.int16(atoms.info["total_charge"]),
        "s": np.int16(atoms.info["spin_multiplicity"] - 1),
        **{name: results[name] for name in ("energy", "forces", "dipole", "charges") if name in results},
    }
    if "stress" in results:
        xx, yy, zz, yz, xz, xy = results["stress"]
        arrays["stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return arrays


def _append(group: Any, rows: list[dict[str, Any]]) -> None:
    """Add structures to the arrays of a group; where one has no such label there is NaN."""
    before = len(group["pos"]) if "pos" in group else 0
    for name in {*group, *(name for row in rows for name in row)}:
        if name not in group:
            shape = next(np.shape(row[name]) for row in rows if name in row)
            kind, empty = (np.int16, 0) if name in _WHOLE else (np.float64, np.nan)
            group.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), chunks=True, fillvalue=empty)
        dataset = group[name]
        dataset.resize(before + len(rows), axis=0)
        dataset[before:] = [row.get(name, np.full(dataset.shape[1:], np.nan)) for row in rows]


def _complete(file: Any) -> None:
    """Give all groups the same labels, NaN where there are none, and take cells away where nothing is periodic."""
    if not any(np.any(group["box"][()]) for group in file.values()):
        for group in file.values():
            del group["box"]
    for name in {name for group in file.values() for name in group}:
        for group in file.values():
            if name not in group:
                num, size = group["types"].shape
                shape = {"stress": (num, 3, 3), "dipole": (num, 3), "charges": (num, size)}[name]
                group.create_dataset(name, shape, np.float64, fillvalue=np.nan)
