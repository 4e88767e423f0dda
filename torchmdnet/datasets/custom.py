"""Your own data: NumPy files with coordinates, atomic numbers, energies and forces."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.faults import faults_are_refused
from torchmdnet.datasets.files import find_files, natural_key, progress
from torchmdnet.datasets.frames import Field as FrameField
from torchmdnet.datasets.frames import FrameBuilder, Frames, JoinedFrames
from torchmdnet.datasets.labels import Labels, LabelShape
from torchmdnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Custom"]

logger = logging.getLogger(__name__)

#: Names in ``label_files`` that need not be properties to be read.
OF_FRAMES = {
    "box": LabelShape("system", (3, 3)),
    "stress": LabelShape("system", (3, 3)),
    "config_weight": LabelShape("system", ()),
    "q": LabelShape("system", ()),
    "s": LabelShape("system", ()),
}
CHUNK = 2**24  # numbers looked at in one go


class Custom(FramesDataset):
    """Molecules in ``.npy`` files, one set of files per molecule.

    ============ ========================= ===========================================
    files        shape                     content
    ============ ========================= ===========================================
    coordinates  (frames, atoms, 3)        positions
    embeddings   (atoms,)                  atomic numbers, or types of beads
    energies     (frames,) or (frames, 1)  optional
    forces       (frames, atoms, 3)        optional; training needs one of the two labels
    label_files  (frames, ...) or          further labels, by name; NaN where a frame has none
                 (frames, atoms, ...)
    ============ ========================= ===========================================

    Files of one molecule are found by what is different in their names: ``coords_2.npy`` belongs to
    ``energy_02.npy``. Units and floating-point types stay as they are in the files. A sample has ``z`` (N,), ``pos``
    (N, 3), ``y`` (1,), or () from files of shape (frames,), and ``neg_dy`` (N, 3); a batch has ``y`` (S,).

    Args:
        coordglob: Pattern of the coordinate files; ``~`` and environment variables are expanded.
        embedglob: Pattern of the embedding files.
        energyglob: Pattern of the energy files.
        forceglob: Pattern of the force files.
        preload_memory_limit: Data below this many MB are read into memory, larger ones are mapped.
        transform: Called with each sample.
        pre_transform: Accepted for compatibility; does nothing.
        pre_filter: Accepted for compatibility; does nothing.
        label_files: Pattern of the files of each further label, ``{"dipole": "dipole_*.npy"}``. Without being asked for
            as labels, ``box`` (frames, 3, 3), or (3, 3) for all frames, ``stress`` (frames, 3, 3), ``config_weight``,
            which multiplies losses, and total charge and spin, ``q`` and ``s`` (frames,), are read.
        labels: Shape of each further label; training fills this in from ``properties``.

    Raises:
        ConfigError: If a label is asked for that has no files.
        DataError: If a pattern matches nothing, the files do not belong together, or an array has a wrong shape or
            holds NaN; the message has the file and the frame.
    """

    fits_reference_energies: ClassVar[bool] = True

    def __init__(
        self,
        coordglob: str,
        embedglob: str,
        energyglob: str | None = None,
        forceglob: str | None = None,
        preload_memory_limit: float = 1024,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Any = None,
        pre_filter: Any = None,
        *,
        label_files: Mapping[str, str] | None = None,
        labels: Labels | None = None,
    ) -> None:
        labels = labels or {}
        for name in labels:
            if name not in (label_files or {}):
                raise ConfigError(
                    f"properties: Custom has no files for {name!r}. Name them: dataset_arg: {{label_files: {{{name}: "
                    f'"{name}_*.npy"}}}}.'
                )
        labels = {**labels, **{name: OF_FRAMES[name] for name in label_files or {} if name in OF_FRAMES}}
        unused = [name for name in label_files or {} if name not in labels]
        if unused:
            logger.warning("Custom: label_files: %s are not read, no property is trained on them.", ", ".join(unused))
        if pre_transform is not None or pre_filter is not None:
            logger.warning("Custom: pre_transform and pre_filter do nothing; use transform.")
        patterns = {
            "coord_files": coordglob,
            "embed_files": embedglob,
            "energy_files": energyglob,
            "force_files": forceglob,
        }
        files = {what: _find(pattern, what) for what, pattern in patterns.items() if pattern is not None}
        files |= {f"label_files: {name}": _find((label_files or {})[name], f"label_files: {name}") for name in labels}
        molecules = [_Molecule(names, labels) for names in _pair(files)]
        nbytes = sum(molecule.nbytes for molecule in molecules)
        preload = nbytes < preload_memory_limit * 1024**2
        for molecule in progress(molecules, "Checking files", len(molecules), "molecule"):
            molecule.check_numbers()
        frames = _preloaded(molecules) if preload else JoinedFrames([molecule.mapped() for molecule in molecules])
        super().__init__(frames, transform)
        self.files = files
        # the established shape of y in a sample depends on the file it comes from
        self._y_shapes = [molecule.y_shape for molecule in molecules]
        self.runs = np.array([molecule.num_frames for molecule in molecules])
        self._first_frame = np.cumsum([0] + [molecule.num_frames for molecule in molecules])
        logger.info(
            "Custom: %d samples of %d molecules, %.1f MB, %s.",
            *(len(frames), len(molecules), nbytes / 1024**2, "in memory" if preload else "mapped from disk"),
        )

    def unit_advice(self, unit: str) -> str | None:
        return f"The model keeps the unit: pass units={unit!r} to calculators."

    def get(self, index: int) -> Data:
        """One sample, ``y`` in the shape its file gives it."""
        data = super().get(index)
        if "y" in data:
            row = index % len(self)
            molecule = int(np.searchsorted(self._first_frame, row, side="right")) - 1
            data.y = data["y"].reshape(self._y_shapes[molecule])
        return data


class _Molecule:
    """The files of one molecule, mapped and checked against each other."""

    def __init__(self, names: dict[str, str], labels: Labels) -> None:
        self.names = names
        self.labels = dict(labels)
        self.coordinates = _load(names["coord_files"], "coord_files")
        shape = self.coordinates.shape
        if len(shape) != 3 or shape[2] != 3:
            raise DataError(f"coord_files: {names['coord_files']} has shape {shape} instead of (frames, atoms, 3).")
        self.num_frames, self.num_atoms = shape[:2]
        if not self.num_frames or not self.num_atoms:
            raise DataError(f"coord_files: {names['coord_files']} has shape {shape}: it is empty.")
        self.z = self._types(_load(names["embed_files"], "embed_files"))
        self.y_shape: tuple[int, ...] = ()
        self.energies = self.forces = None
        if "energy_files" in names:
            self.energies = _load(names["energy_files"], "energy_files")
            if self.energies.shape not in ((self.num_frames,), (self.num_frames, 1)):
                raise self._misfit("energy_files", self.energies.shape, f"({self.num_frames},)")
            self.y_shape = () if self.energies.ndim == 1 else (1,)
        if "force_files" in names:
            self.forces = _load(names["force_files"], "force_files")
            if self.forces.shape != shape:
                raise self._misfit("force_files", self.forces.shape, str(shape))
        self.further = {name: self._further(name, label) for name, label in labels.items()}

    def _further(self, name: str, label: LabelShape) -> np.ndarray:
        what = f"label_files: {name}"
        array = _load(self.names[what], what)
        rows = self.coordinates.shape[:2] if label.level == "atom" else (self.num_frames,)
        whole = (*rows, *label.row)
        if name == "box" and array.shape == (3, 3):
            array = np.broadcast_to(array, whole)
        if array.shape not in (whole, (*whole, 1) if label.shape == (1,) else whole):
            raise self._misfit(what, array.shape, str(whole))
        return array.reshape(whole)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays with a row per frame."""
        found = {"coord_files": self.coordinates, "energy_files": self.energies, "force_files": self.forces}
        found |= self.further
        return {what: array for what, array in found.items() if array is not None}

    @property
    def nbytes(self) -> int:
        return self.z.nbytes + sum(array.nbytes for array in self.arrays.values())

    def _types(self, stored: np.ndarray) -> np.ndarray:
        name = self.names["embed_files"]
        if stored.shape != (self.num_atoms,):
            raise self._misfit("embed_files", stored.shape, f"({self.num_atoms},)")
        z = stored.astype(np.int64)
        if (z != stored).any() or (z < 0).any():
            raise DataError(
                f"embed_files: {name} holds {stored[(z != stored) | (z < 0)][0]}, which is no type of atom."
            )
        return z

    def _misfit(self, what: str, shape: tuple[int, ...], expected: str) -> DataError:
        return DataError(
            f"{what}: {self.names[what]} has shape {shape}, but {self.names['coord_files']} has "
            f"{self.num_frames} frames of {self.num_atoms} atoms, so {expected} is needed."
        )

    def check_numbers(self) -> None:
        """Refuse NaN and infinity, except in further labels, which may be missing."""
        if not faults_are_refused():
            return
        for what, array in self.arrays.items():
            if what in self.further and (what == "stress" or what not in OF_FRAMES):
                continue
            step = max(1, CHUNK // max(1, int(np.prod(array.shape[1:]))))
            for first in range(0, len(array), step):
                finite = np.isfinite(array[first : first + step])
                if not finite.all():
                    frame = first + int(np.argwhere(~finite)[0][0])
                    what = what if what in self.names else f"label_files: {what}"
                    raise DataError(f"{what}: {self.names[what]}, frame {frame}: a number is NaN or infinite.")

    def mapped(self) -> Frames:
        """Frames on top of the files."""
        atoms = {"pos": self.coordinates.reshape(-1, 3)}
        if self.forces is not None:
            atoms["neg_dy"] = self.forces.reshape(-1, 3)
        systems = {} if self.energies is None else {"y": self.energies.reshape(-1)}
        for name, array in self.further.items():
            label = self.labels[name]
            (atoms if label.level == "atom" else systems)[name] = array.reshape(-1, *label.row)
        ptr = np.arange(0, (self.num_frames + 1) * self.num_atoms, self.num_atoms)
        return Frames(ptr, atoms, systems, shared={"z": self.z}, in_memory=False)


def _preloaded(molecules: Sequence[_Molecule]) -> Frames:
    """One copy of everything in memory."""
    types = {what: np.result_type(*(m.arrays[what] for m in molecules)) for what in molecules[0].arrays}
    largest = max(int(m.z.max()) for m in molecules)
    fields = {
        "z": FrameField("atom", (), "uint8" if largest < 256 else "int64"),
        "pos": FrameField("atom", (3,), types["coord_files"].str),
        "neg_dy": FrameField("atom", (3,), types.get("force_files", types["coord_files"]).str),
        "y": FrameField("system", (), types.get("energy_files", types["coord_files"]).str),
    }
    for name, label in molecules[0].labels.items():
        fields[name] = FrameField(label.level, label.row, types[name].str)
    builder = FrameBuilder(fields=fields)
    for m in molecules:
        builder.append_block({"z": m.z, "pos": m.coordinates, "y": m.energies, "neg_dy": m.forces, **m.further})
    return builder.finish()


def _find(pattern: str, what: str) -> list[str]:
    """Matches of a pattern, in the established order, which decides which sample is which in a split."""
    return sorted(os.fspath(path) for path in find_files(pattern, what))


def _load(name: str, what: str) -> np.ndarray:
    try:
        array = np.load(name, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises ValueError, OSError, EOFError or SyntaxError, depending on the damage
        raise DataError(f"{what}: {name} cannot be read as a .npy array of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise DataError(f"{what}: {name} does not hold an array of numbers.")
    return array


def _pair(files: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    """The files of each molecule, matched by what distinguishes their names."""
    coordinates = files["coord_files"]
    for what, names in files.items():
        if len(names) != len(coordinates):
            raise DataError(
                f"{what}: {len(names)} files, but coord_files has {len(coordinates)}. Each molecule needs one of each."
            )
    labels = {what: dict(zip(_labels(names), names, strict=True)) for what, names in files.items()}
    reference = labels["coord_files"]
    for what, own in labels.items():
        if own.keys() == reference.keys():
            continue
        missing = sorted(reference.keys() - own.keys())
        if len(missing) == len(reference) and not any(re.search(r"\d", "".join(map(str, k))) for k in own | reference):
            logger.warning("%s: names have nothing in common with coord_files; they are paired in sorted order.", what)
            labels[what] = dict(zip(reference, sorted(own.values(), key=natural_key), strict=True))
            continue
        raise DataError(
            f"{what}: nothing belongs to {reference[missing[0]]}. Files are matched by what differs in their names, "
            f"and {what} has {', '.join(sorted(own.values())[:3])}{' ...' if len(own) > 3 else ''}. Rename them alike."
        )
    for label in reference:
        yield {what: own[label] for what, own in labels.items()}


def _labels(names: Sequence[str]) -> list[tuple[Any, ...]]:
    """What is left of each name without what all have in common, numbers read as numbers."""
    if len(names) == 1:
        return [()]
    prefix = _common_start(names)
    suffix = _common_start([name[::-1] for name in names])[::-1]
    prefix = re.sub(r"\d+$", "", prefix)  # do not cut a number in two
    suffix = re.sub(r"^\d+", "", suffix)
    shortest = min(len(name) for name in names)
    suffix = suffix[max(0, len(prefix) + len(suffix) - shortest) :]
    middle = [name[len(prefix) : len(name) - len(suffix)] for name in names]
    labels = [tuple(part[:2] if part[0] else (part[2],) for part in natural_key(text)) for text in middle]
    return labels if len(set(labels)) == len(labels) else [(text,) for text in middle]


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
