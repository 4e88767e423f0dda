"""Your own data: HDF5 files with one group per kind of molecule."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.faults import faults_are_refused
from torchmdnet.datasets.files import find_files, progress
from torchmdnet.datasets.frames import Field, FrameBuilder, Frames, Indices, JoinedFrames, as_tensor, checked_indices
from torchmdnet.datasets.labels import Absence, LabelKind, Labels, LabelShape, find_label, suggested_names
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import normalise_unit

__all__ = ["HDF5"]

logger = logging.getLogger(__name__)

METADATA = "_metadata"
#: Dataset in a group -> field of a sample, and its shape for n samples of N atoms.
FIELDS = {
    "pos": "pos",
    "types": "z",
    "energy": "y",
    "forces": "neg_dy",
    "partial_charges": "partial_charges",
    "box": "box",
    "q": "q",
    "s": "s",
    "stress": "stress",
    "config_weight": "config_weight",
}
ATOMS = ("z", "pos", "neg_dy", "partial_charges")
#: Shapes of one row that are not ().
ROWS = {"pos": (3,), "neg_dy": (3,), "box": (3, 3), "stress": (3, 3)}
#: Attributes of a file that state what its numbers are.
FACTS = ("energy_unit", "length_unit", "level_of_theory", "citation")


class HDF5(FramesDataset):
    """Samples in HDF5 files.

    Every group but ``_metadata`` holds n samples with N atoms each:

    =================== ======================== =================================================
    dataset             shape                    content
    =================== ======================== =================================================
    ``pos``             (n, N, 3)                positions
    ``types``           (n, N), or (N,) for all  atomic numbers, or types of beads
    ``energy``          (n,) or (n, 1)           optional
    ``forces``          (n, N, 3)                optional; training needs one of the two labels
    ``partial_charges`` (n, N), or (N,) for all  optional
    ``box``             (n, 3, 3)                optional; lattice vectors, a row of zeros where not periodic
    ``q``, ``s``        (n,)                     optional; total charge, unpaired electrons
    ``stress``          (n, 3, 3)                optional; tension positive, NaN where a sample has none
    ``config_weight``   (n,)                     optional; multiplies the losses of a sample
    any of ``labels``   (n, ...) or (n, N, ...)  NaN where a sample has none
    =================== ======================== =================================================

    Datasets in ``_metadata`` become attributes of the data set, as tensors; priors ask for ``atomic_number``,
    ``distance_scale`` and ``energy_scale``. Units stay as they are in the file; it can state them in its attributes
    ``energy_unit``, ``length_unit``, ``level_of_theory`` and ``citation``. A sample has ``z`` (N,), ``pos`` (N, 3),
    ``y`` (1,), ``neg_dy`` (N, 3), ``partial_charges`` (N,), ``box`` (1, 3, 3), ``q`` (1,), ``s`` (1,); a batch has
    ``y`` (S,).

    Args:
        filename: A path, a pattern, several separated by semicolons, or a list; ``~`` is expanded.
        dataset_preload_limit: Files below this many MB are read into memory; larger ones are read as samples are asked
            for, in loader workers.
        transform: Called with each sample.
        labels: Further labels to learn, by name; training fills this in from ``properties``. Each is a dataset of that
            name, or of a usual one, in every group.
        **kwargs: Accepted for compatibility; ignored with a warning.

    Raises:
        DataError: If a file cannot be read, groups do not hold the same datasets, a shape is wrong or a number is NaN;
            the message has the file and the group.
    """

    fits_reference_energies: ClassVar[bool] = True

    def __init__(
        self,
        filename: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        dataset_preload_limit: float = 1024,
        transform: Any = None,
        *,
        labels: Labels | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            logger.warning("HDF5: %s have no effect.", ", ".join(kwargs))
        self.files = find_files(filename, "dataset_root")
        preload = sum(path.stat().st_size for path in self.files) <= dataset_preload_limit * 1024**2
        groups: list[_Group] = []
        for path in self.files:
            with _open(path) as file, _readable(path):
                self._read_metadata(file, path)
                self._read_facts(file, path)
                groups += [_Group(path, name, file[name], labels or {}) for name in file if name != METADATA]
        _check_alike(groups, self.files)
        if not any(map(len, groups)):
            raise DataError(f"{', '.join(map(str, self.files))}: there are no samples in the groups.")
        frames = _preloaded(groups) if preload else JoinedFrames(groups)
        super().__init__(frames, transform)
        self.gathers_in_process = preload
        self._unread = groups[0].unread
        self.runs = np.array([len(group) for group in groups])

    def absent_label(self, kind: LabelKind) -> Absence | None:
        read = {field: key for key, field in FIELDS.items()}
        reason = f"the groups hold {', '.join([*(read.get(f, f) for f in self.frames.fields), *self._unread])}."
        named = suggested_names(kind, self._unread)
        if named:
            reason += f" Is {named[0]!r} the {kind}? Then name that dataset {kind!r}, forces and not gradients."
        return Absence(reason, bool(named))

    def unit_advice(self, unit: str) -> str | None:
        if self.energy_unit is not None:
            return None
        return f"State it in the file, attribute energy_unit = {unit!r}, so that calculators convert it."

    def _read_metadata(self, file: Any, path: Path) -> None:
        for name in file.get(METADATA, ()):
            value = np.asarray(file[METADATA][name])
            if value.dtype.kind not in "biuf":
                raise DataError(f"{path}, {METADATA}/{name}: holds {value.dtype} instead of numbers.")
            setattr(self, name, torch.from_numpy(np.array(value)))

    def _read_facts(self, file: Any, path: Path) -> None:
        for name in FACTS:
            if name not in file.attrs:
                continue
            stated, known = file.attrs[name], getattr(self, name)
            stated = stated.decode() if isinstance(stated, bytes) else str(stated)
            if name.endswith("_unit"):
                stated = normalise_unit(stated, name.removesuffix("_unit"))
            if known not in (None, stated):
                raise DataError(f"{path}: {name} is {stated!r}, but {known!r} in the files before it.")
            setattr(self, name, stated)


class _Group:
    """The samples of one group, read from the file when they are asked for.

    The file is opened again in each process and never travels with a pickle.
    """

    in_memory = False

    def __init__(self, path: Path, name: str, group: Any, labels: Labels) -> None:
        self.path, self.name = str(path), name
        self.where = f"{path}, group {name!r}"
        if not hasattr(group, "keys"):
            raise DataError(f"{self.where}: it is a dataset; samples are expected in groups.")
        for needed in ("pos", "types"):
            if needed not in group:
                raise DataError(f"{self.where}: {needed!r} is missing. It holds {', '.join(group) or 'nothing'}.")
        shape = group["pos"].shape
        if len(shape) != 3 or shape[2] != 3:
            raise DataError(f"{self.where}: pos has shape {shape} instead of (n, N, 3).")
        self.num, self.size = int(shape[0]), int(shape[1])
        num, size = self.num, self.size
        allowed = {
            "pos": [(num, size, 3)],
            "types": [(size,), (num, size)],
            "energy": [(num,), (num, 1)],
            "forces": [(num, size, 3)],
            "partial_charges": [(size,), (num, size)],
            "box": [(num, 3, 3)],
            "q": [(num,)],
            "s": [(num,)],
            "stress": [(num, 3, 3)],
            "config_weight": [(num,)],
        }
        self.field_of = {key: field for key, field in FIELDS.items() if key in group}
        self.labels: dict[str, LabelShape] = {}
        for field, label in labels.items():
            key = find_label(field, group)
            if key is None:
                raise DataError(f"{self.where}: {field!r} is missing. It holds {', '.join(group)}.")
            if key not in self.field_of:
                self.field_of[key], self.labels[key] = field, label
                whole = (num, size, *label.row) if label.level == "atom" else (num, *label.row)
                allowed[key] = [(*whole, 1), whole] if label.shape == (1,) else [whole]
        self.datasets = list(self.field_of)
        forms = {(num,): "number", (num, 1): "number", (num, size, 3): "atoms × 3"}
        #: Datasets that are not read, with their form.
        self.unread = {
            key: forms.get(group[key].shape, "other")
            for key in group
            if key not in self.field_of and hasattr(group[key], "shape")
        }
        for key in self.datasets:
            if group[key].shape not in allowed[key]:
                fits = " or ".join(str(option) for option in reversed(allowed[key]))
                raise DataError(
                    f"{self.where}: {key} has shape {group[key].shape}, but pos has {num} samples of {size} atoms, "
                    f"so {fits} is needed."
                )
            if group[key].dtype.kind not in "iuf":
                raise DataError(f"{self.where}: {key} holds {group[key].dtype} instead of numbers.")
        # (N,) belongs to all samples, also where there happen to be N of them
        self.shared = {key for key in ("types", "partial_charges") if key in group and group[key].ndim == 1}
        self.types = {key: group[key].dtype for key in self.datasets}
        self.nbytes = sum(int(group[key].nbytes) for key in self.datasets)
        self._file: tuple[int, Any] | None = None

    def _group(self) -> Any:
        """The open group; a process does not use a file that another one opened."""
        if self._file is None or self._file[0] != os.getpid():
            import h5py

            self._file = (os.getpid(), h5py.File(self.path, "r")[self.name])
        return self._file[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return self.num

    @property
    def fields(self) -> list[str]:
        return list(self.field_of.values())

    @property
    def atom_fields(self) -> list[str]:
        return [field for key, field in self.field_of.items() if self.is_per_atom(key)]

    def is_per_atom(self, key: str) -> bool:
        """Whether a dataset has a row for each atom."""
        label = self.labels.get(key)
        return self.field_of[key] in ATOMS if label is None else label.level == "atom"

    def row_of(self, key: str) -> tuple[int, ...]:
        """Shape of one row of a dataset."""
        label = self.labels.get(key)
        return label.row if label is not None else ROWS.get(self.field_of[key], ())

    @property
    def num_atoms(self) -> int:
        return self.num * self.size

    @property
    def counts(self) -> np.ndarray:
        return np.full(self.num, self.size, dtype=np.int64)

    def __contains__(self, name: object) -> bool:
        return name in self.fields

    def read(self, key: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Samples of one dataset, (b, ...), finite."""
        with _readable(self.path):
            dataset = self._group()[key]
            if key in self.shared:
                one = dataset[()]
                found = np.broadcast_to(
                    one, (len(range(self.num)[rows]) if isinstance(rows, slice) else len(rows), *one.shape)
                )
            elif isinstance(rows, slice):
                found = dataset[rows]
            else:
                unique, inverse = np.unique(rows, return_inverse=True)  # HDF5 wants ascending numbers
                found = dataset[unique][inverse]
        is_checked = found.dtype.kind == "f" and key not in (*self.labels, "stress") and faults_are_refused()
        if is_checked and not np.isfinite(found).all():
            first = int(np.argwhere(~np.isfinite(found))[0][0])
            row = range(self.num)[rows][first] if isinstance(rows, slice) else int(rows[first])
            raise DataError(f"{self.where}, sample {row}: {key} is NaN or infinite.")
        if key == "types":
            whole = found.astype(np.int64)
            if (whole != found).any() or (whole < 0).any():
                raise DataError(
                    f"{self.where}: types hold {found[(whole != found) | (whole < 0)][0]}, no type of atom."
                )
            found = whole
        return found

    def __getitem__(self, name: str) -> np.ndarray:
        key = next(key for key, field in self.field_of.items() if field == name)
        return self.read(key).reshape(-1, *self.row_of(key))

    def gather(self, indices: Indices) -> dict[str, Tensor]:
        rows = checked_indices(indices, self.num)
        out: dict[str, Tensor] = {}
        for key in self.datasets:
            flat = self.read(key, rows).reshape(-1, *self.row_of(key))
            out[self.field_of[key]] = as_tensor(np.array(flat))
        out["batch"] = torch.from_numpy(np.repeat(np.arange(len(rows)), self.size))
        out["ptr"] = torch.from_numpy(np.arange(0, (len(rows) + 1) * self.size, self.size))
        return out

    def sample(self, index: int) -> dict[str, Tensor]:
        out = self.gather([index])
        return {name: value for name, value in out.items() if name not in ("batch", "ptr")}

    def elements(self) -> np.ndarray:
        with _readable(self.path):
            types = np.asarray(self._group()["types"], dtype=np.int64)
        return np.unique(types)

    def composition(self, indices: Indices | None = None) -> tuple[np.ndarray, np.ndarray]:
        z, elements = self.read("types"), self.elements()
        table = np.stack([(z == element).sum(axis=1) for element in elements], axis=1)
        return (table if indices is None else table[checked_indices(indices, self.num)]), elements


def _open(path: Path) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read as HDF5 ({error}). Is it complete?") from error


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn what HDF5 raises for a damaged file, in many kinds, into an error that names the file.

    Raises:
        DataError: Naming it.
    """
    try:
        yield
    except (ConfigError, DataError, FileNotFoundError):
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path}: the file cannot be read as HDF5 ({reason}). Is it complete?") from error


def _check_alike(groups: Sequence[_Group], files: Sequence[Path]) -> None:
    if not groups:
        raise DataError(f"{', '.join(map(str, files))}: there is no group with samples.")
    first = groups[0]
    for group in groups[1:]:
        if set(group.datasets) != set(first.datasets):
            missing = sorted(set(first.datasets) - set(group.datasets))
            extra = sorted(set(group.datasets) - set(first.datasets))
            text = [f"{', '.join(missing)} is missing"] if missing else []
            text += [f"{', '.join(extra)} is not in the other groups"] if extra else []
            raise DataError(
                f"{group.where}: {'; '.join(text)} ({first.where} holds {', '.join(first.datasets)}). "
                "Every group needs the same datasets."
            )


def _preloaded(groups: Sequence[_Group]) -> Frames:
    """Everything in memory, in the precision of the file."""
    fields: dict[str, Field] = {"z": Field("atom", (), "int64")}
    for key, name in groups[0].field_of.items():
        if name != "z":
            dtype = np.result_type(np.float32, *(group.types[key] for group in groups))
            fields[name] = Field("atom" if groups[0].is_per_atom(key) else "system", groups[0].row_of(key), dtype.str)
    builder = FrameBuilder(fields=fields)
    for group in progress(groups, "Reading HDF5", len(groups), "group"):
        if group.num:
            builder.append_block({field: group.read(key) for key, field in group.field_of.items()})
        group._file = None
    return builder.finish()
