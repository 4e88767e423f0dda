"""Structures with the labels that models are compared with, in eV and Å."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.files import not_a_file
from torchmdnet.units import energy_factor, length_factor

if TYPE_CHECKING:
    from ase import Atoms

    from torchmdnet.datasets.frames import Frames, JoinedFrames
    from torchmdnet.datasets.labels import LabelShape

__all__ = ["References", "files_of", "named_of", "part_of"]

#: Key of the kind of structure in extended XYZ files.
GROUP = "config_type"


@dataclass
class References:
    """Reference data.

    Args:
        name: What they are called.
        frames: All of the data.
        rows: Numbers of the S structures that are compared.
        scale: Multiply energies by this to have them in eV, and lengths to have them in Å.
        files: File of each structure, (S,); empty where there are none.
        groups: Kind of each structure, (S,); empty where the data do not say.
        level_of_theory: As far as it is known.
        splits: Parts of the data as their source states them, ``idx_test`` and so on.
    """

    name: str
    frames: Frames | JoinedFrames
    rows: np.ndarray
    scale: tuple[float, float] = (1.0, 1.0)
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=str))
    groups: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=str))
    level_of_theory: str | None = None
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        have = set(self.frames.fields)
        if not have & {"y", "neg_dy", "stress"}:
            raise DataError(
                f"{self.name}: there are no labels, neither energies nor forces, to compare with. Name them with "
                "--dataset-arg '{energy_key: NAME, forces_key: NAME}', or compute some with torchmd-net label."
            )
        counts = self.frames.counts[self.rows]
        self.ptr = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> np.ndarray:
        """Atoms of each structure, (S,)."""
        return np.diff(self.ptr)

    def select(self, rows: np.ndarray, name: str | None = None) -> References:
        """Some of the structures.

        Args:
            rows: Their numbers among these.
            name: What to call them.
        """
        return dataclasses.replace(
            self,
            name=name or self.name,
            rows=self.rows[rows],
            files=self.files[rows] if len(self.files) else self.files,
            groups=self.groups[rows] if len(self.groups) else self.groups,
        )

    def labels(self, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Labels by name, in eV and Å: ``energy`` (S,), ``forces`` (N, 3), ``stress`` (S, 3, 3), and those named.

        Where a structure has no such label there is NaN.
        """
        tensors = self.frames.gather(self.rows)
        energy, length = self.scale
        found: dict[str, np.ndarray] = {"z": tensors["z"].numpy()}
        for name, label, factor in (
            ("energy", "y", energy),
            ("forces", "neg_dy", energy / length),
            ("stress", "stress", energy / length**3),
        ):
            if label in tensors:
                found[name] = tensors[label].double().numpy() * factor
        if "energy" in found:
            found["energy"] = found["energy"].reshape(len(self), -1)[:, 0]
        for name in extra:
            if name in tensors:
                found[name] = tensors[name].double().numpy()
        return found

    def structure(self, number: int) -> Atoms:
        """One of the S structures, with its charge and spin."""
        from ase import Atoms

        sample = self.frames.sample(int(self.rows[number]))
        length = self.scale[1]
        atoms = Atoms(sample["z"].numpy(), sample["pos"].double().numpy() * length)
        if "box" in sample:
            box = sample["box"].double().numpy().reshape(3, 3) * length
            if box.any():
                atoms.set_cell(box)
                atoms.pbc = box.any(axis=1)
        atoms.info |= {name: float(sample[key]) for name, key in (("charge", "q"), ("spin", "s")) if key in sample}
        return atoms


def files_of(
    paths: Sequence[str], arguments: Mapping[str, Any], labels: Mapping[str, LabelShape] | None = None
) -> References:
    """The structures of files that ASE reads, or of HDF5 and ``.npy`` files.

    Args:
        paths: Paths or patterns.
        arguments: Arguments of the data set class, as ``dataset_arg`` has them.
        labels: Further labels to read, by name.

    Raises:
        DataError: If there is no such file, or no label in it.
    """
    from torchmdnet.data.doctor.opening import HDF5_SUFFIXES, open_files
    from torchmdnet.datasets.ase import ASE
    from torchmdnet.datasets.files import find_files

    files = find_files(list(paths), "data")
    name = ", ".join(paths) if len(paths) < 4 else f"{paths[0]} and {len(paths) - 1} more"
    if any(path.suffix in (*HDF5_SUFFIXES, ".npy") for path in files):
        samples = open_files(paths, arguments)
        return _checked(samples.dataset, samples.frames, name, samples)
    data = ASE(files, labels=labels, **arguments)
    if GROUP in data.quantities and "group_key" not in arguments:
        with contextlib.suppress(DataError):  # of frames without
            data = ASE(files, labels=labels, group_key=GROUP, **arguments)
    return _checked(data, data.frames, name, data)


def named_of(dataset: str, root: str | None, arguments: Mapping[str, Any]) -> References:
    """A data set by the name of its class.

    Raises:
        ConfigError: If there is none of that name, or an argument does not fit.
        DataError: If its files cannot be read.
    """
    from torchmdnet.data.doctor import open_named

    samples = open_named(dataset, root, arguments)
    return _checked(samples.dataset, samples.frames, dataset, samples)


def _checked(data: Any, frames: Any, name: str, about: Any) -> References:
    energy, length = (getattr(about, f"{kind}_unit", None) for kind in ("energy", "length"))
    total = len(frames)
    runs, files = getattr(data, "runs", None), getattr(data, "files", None)
    paths: list[Any] = []
    if isinstance(files, Mapping):
        paths = [path for listed in files.values() for path in listed]
    names = np.zeros(0, dtype=str)
    if runs is not None and len(paths) == len(runs) > 1 and int(np.sum(runs)) == total:
        names = np.repeat([Path(path).name for path in paths], runs)
    groups = getattr(data, "groups", None)
    return References(
        name,
        frames,
        np.arange(total),
        (energy_factor(energy or "eV"), length_factor(length or "Å")),
        names,
        np.zeros(0, dtype=str) if groups is None or len(groups) != total else np.asarray(groups),
        getattr(data, "level_of_theory", None),
        getattr(data, "splits", None) or {},
    )


def part_of(references: References, file: str | None, part: str) -> References:
    """Those structures that belong to a part of the data.

    Args:
        references: All of them.
        file: The ``splits.npz`` of a training run, in place of the parts that the data set states.
        part: ``train``, ``val`` or ``test``.

    Raises:
        ConfigError: If there is no such part.
    """
    if file is not None:
        if wrong := not_a_file(file):
            raise DataError(f"--splits: {wrong}")
        try:
            with np.load(file, allow_pickle=False) as stored:
                splits = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{file} cannot be read as a splits.npz of a training run ({error}).") from error
    else:
        splits = dict(references.splits)
    if f"idx_{part}" not in splits:
        known = [name.removeprefix("idx_") for name in splits if name.startswith("idx_")]
        raise ConfigError(
            f"--split: {part!r} is not a part of {references.name}.{did_you_mean(part, known)} "
            + (f"Choose from {', '.join(known)}." if known else "Name the splits.npz of a training run with --splits.")
        )
    rows = np.asarray(splits[f"idx_{part}"]).astype(np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(references.frames)):
        raise ConfigError(
            f"--splits: {file} has number {int(rows.max())}, but {references.name} holds {len(references.frames)} "
            "structures. It belongs to other data."
        )
    return references.select(rows, f"{references.name}, {part}")
