"""Data sets that are read once and then mapped from disk.

A source is turned into long arrays, one file per quantity, and opened with ``numpy.memmap`` from then on: nothing is
loaded, several processes share the pages, and a batch is one gather per quantity. The files are raw little-endian
arrays in ``root/processed``:

==================  =======  =====================================================
``<name>.idx``      int64    first atom of each conformer, and the number of atoms
``<name>.z``        int8     atomic numbers, one per atom
``<name>.pos``      float32  positions, (atoms, 3), Å
``<name>.y``        float64  energies, one per conformer
``<name>.neg_dy``   float32  forces, (atoms, 3)
``<name>.q``        int8     total charges, one per conformer
``<name>.pq``       float32  partial charges, one per atom
``<name>.dp``       float32  dipoles, (conformers, 3)
==================  =======  =====================================================

each with the suffix ``.mmap``. ``<name>.json`` says what they were made from, so that a changed source, another filter
or a half-written file is noticed, and the rare type that does not fit (int16 for a charge of 200).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch_geometric.data import Dataset as GeometricDataset

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.columns import Column, Field
from torchmdnet.datasets.download import FULL, Remote, damaged, disk_full, fetch, locked, noted, sha256
from torchmdnet.datasets.files import expand
from torchmdnet.datasets.frames import Frames, Indices, JoinedFrames
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.parse import parse_json

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data

__all__ = ["Block", "MemmappedDataset", "NothingLeft", "conformers", "open_hdf5", "rows"]

logger = logging.getLogger(__name__)

#: Number of the layout described above.
LAYOUT = 1

#: The quantities a set may hold beside ``z`` and ``pos``, and how they are stored.
PROPERTIES: dict[str, Field] = {
    "y": Field("system", (1,), "float64"),
    "neg_dy": Field("atom", (3,), "float32"),
    "q": Field("system", (), "int8"),
    "s": Field("system", (), "int8"),
    "pq": Field("atom", (), "float32"),
    "dp": Field("system", (3,), "float32"),
    "box": Field("system", (3, 3), "float32"),
}


class NothingLeft(DataError):
    """A source without systems, or filters that none of them passes."""


class Block(NamedTuple):
    """Some systems in a row, as flat arrays.

    Args:
        counts: Atoms of each system, (n,).
        atoms: Quantities with one row per atom of all n systems; ``z`` and ``pos`` are among them.
        systems: Quantities with one row per system, (n, ...).
        notes: What is known of each system but not stored, such as ``mol_id``: n values each.
    """

    counts: np.ndarray
    atoms: Mapping[str, np.ndarray]
    systems: Mapping[str, np.ndarray]
    notes: Mapping[str, Sequence[Any]]

    def samples(self, notes: bool = False) -> Iterator[Data]:
        """The systems one by one: ``y`` (1, 1), ``q`` (), ``dp`` (1, 3)."""
        from torch_geometric.data import Data

        stop = np.cumsum(self.counts)
        for i, (last, count) in enumerate(zip(stop.tolist(), self.counts.tolist(), strict=True)):
            values: dict[str, Any] = {}
            for name, array in self.atoms.items():
                values[name] = _tensor(name, array[last - count : last])
            for name, array in self.systems.items():
                values[name] = _tensor(name, array[i] if name in ("q", "s") else array[i : i + 1])
            if notes:
                values.update({name: column[i] for name, column in self.notes.items()})
            yield Data(**values)


def conformers(
    z: np.ndarray, pos: np.ndarray, *, notes: Mapping[str, Sequence[Any]] | None = None, **labels: np.ndarray | None
) -> Block:
    """A block of n conformers of N atoms: ``z`` (N,) or (n, N), ``pos`` (n, N, 3), labels (n, ...) or (n, N, ...).

    Labels that are None are left out. Units are those of the data set.
    """
    num, size = pos.shape[:2]
    z = np.broadcast_to(np.asarray(z), (num, size)).reshape(-1)
    atoms: dict[str, np.ndarray] = {"z": z, "pos": pos.reshape(-1, 3)}
    systems: dict[str, np.ndarray] = {}
    for name, values in labels.items():
        if values is None:
            continue
        field = PROPERTIES[name]
        rows = num * size if field.level == "atom" else num
        (atoms if field.level == "atom" else systems)[name] = np.asarray(values).reshape(rows, *field.shape)
    return Block(np.full(num, size), atoms, systems, notes or {})


@contextlib.contextmanager
def open_hdf5(path: str | os.PathLike[str], what: str) -> Iterator[Any]:
    """An HDF5 file, open for reading; what is damaged or missing in it becomes an error that names the file."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            yield file
    except KeyError as error:
        raise DataError(f"{what}: {path} does not have the expected layout: {error.args[0]}.") from error
    except OSError as error:
        raise damaged(os.fspath(path), error, what) from error


def rows(total: int, at_once: int = 16384) -> Iterator[slice]:
    """Slices that cover ``total`` rows, so that a long array is not held in memory at once."""
    for first in range(0, total, at_once):
        yield slice(first, min(first + at_once, total))


class MemmappedDataset(FramesDataset, GeometricDataset):
    """A data set in memory-mapped files, made from its source when they are missing or out of date.

    A subclass supplies :meth:`blocks`, or :meth:`sample_iter` if its source comes one system at a time. What it
    downloads is listed in :attr:`remotes`.

    A sample has ``z`` (N,) int64, ``pos`` (N, 3) float32 and, as far as the set has them, ``y`` (1, 1) float64,
    ``neg_dy`` (N, 3) float32, ``q`` () int64, ``pq`` (N,) float32, ``dp`` (1, 3) float32.

    Args:
        root: Folder for the files: downloads go to ``root/raw``, the arrays to ``root/processed``.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        properties: The quantities to store and to offer beside ``z`` and ``pos``.
        mirror: Where to get the files instead of from their publisher: an address, a folder, or the file itself.
    """

    #: Quantities of this set beyond :data:`PROPERTIES`.
    fields: ClassVar[dict[str, Field]] = {}

    def __init__(
        self,
        root: str | os.PathLike[str] | None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        properties: Sequence[str] = ("y", "neg_dy", "q", "pq", "dp"),
        *,
        mirror: str | None = None,
    ) -> None:
        if root is None or not os.fspath(root):
            raise ConfigError(f"{type(self).__name__}: root is missing. Give a folder for the data.")
        self._known = {**PROPERTIES, **self.fields}
        for name in properties:
            if name not in self._known:
                raise ConfigError(
                    f"properties: {name!r} is not available.{did_you_mean(name, self._known)} "
                    f"Choose from {', '.join(self._known)}."
                )
        self.properties = tuple(properties)
        self.mirror = mirror
        GeometricDataset.__init__(self, expand(root), transform, pre_transform, pre_filter)
        FramesDataset.__init__(self, self._open(), transform, reference_energies=self.reference_energies)

    #: Energy of each element in :attr:`energy_unit`, where the source states it.
    reference_energies: dict[int, float] | None = None

    # -------------------------------------------------------------------------------------- what a subclass supplies

    @property
    def name(self) -> str:
        """Start of the file names; it tells apart what differs by arguments."""
        return type(self).__name__

    @property
    def remotes(self) -> Sequence[Remote]:
        """The files to download."""
        return ()

    @property
    def raw_file_names(self) -> list[str]:
        """The files below ``root/raw`` that the arrays are made from."""
        return [remote.path for remote in self.remotes]

    def download(self) -> None:
        """Fetch :attr:`remotes`; files that are there already are compared with their checksums."""
        for remote in self.remotes:
            fetch(remote, self.raw_dir, what=type(self).__name__, mirror=self.mirror)

    def blocks(self) -> Iterator[Block]:
        """The systems of the source, in order, some at a time."""
        raise NotImplementedError(f"{type(self).__name__} has to supply blocks() or sample_iter().")

    def sample_iter(self, mol_ids: bool = False) -> Iterator[Data]:
        """The systems of the source one by one, after ``pre_filter`` and ``pre_transform``.

        Args:
            mol_ids: Add what the source calls them, ``mol_id``.
        """
        for block in self.blocks():
            for sample in block.samples(notes=mol_ids):
                kept = self.filter_and_pre_transform(sample)
                if kept is not None:
                    yield kept

    @property
    def arguments(self) -> dict[str, Any]:
        """Whatever shapes the arrays besides the source, ``pre_filter`` and ``pre_transform``."""
        return {}

    @property
    def nothing_left(self) -> str:
        """What to say when no system is left to store."""
        return "no system is left after the filters." if self.pre_filter is not None else "the source holds no systems."

    def filter_and_pre_transform(self, data: Data) -> Data | None:
        """One sample as it is to be stored, or None if it is not."""
        if self.pre_filter is not None and not self.pre_filter(data):
            return None
        return data if self.pre_transform is None else self.pre_transform(data)

    # ---------------------------------------------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self.indices())

    def len(self) -> int:
        """The number of systems that are stored."""
        return len(self.frames)

    def get(self, idx: int) -> Data:  # pyright: ignore[reportIncompatibleMethodOverride] (torch_geometric's name)
        """One stored system, before :attr:`transform`."""
        sample = self.frames.data(idx)
        for name in ("q", "s"):
            if name in self.properties:
                sample[name] = sample[name].reshape(())
        return sample

    def __getitem__(self, index: Any) -> Any:
        """One system as ``Data``; for a slice, numbers or a mask, a data set of those."""
        return GeometricDataset.__getitem__(self, index)

    def batch(self, indices: Indices) -> Batch:
        """Systems as one batch, in the order asked for."""
        rows: Any = indices
        if self._indices is not None:
            rows = [self._indices[int(i)] for i in indices]
        if self.transform is None:
            return self.frames.batch(rows)
        from torch_geometric.data import Batch

        return Batch.from_data_list([self.transform(self.get(int(row))) for row in rows])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"

    def __copy__(self) -> MemmappedDataset:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Where the files are, not what is in them."""
        return {name: value for name, value in self.__dict__.items() if name != "frames"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.frames = self._open()

    # --------------------------------------------------------------------------------------------------- the files

    @property
    def processed_file_names(self) -> list[str]:
        """The files below ``root/processed``."""
        return [f"{self.name}.{prop}.mmap" for prop in ("idx", "z", "pos", *self.properties)]

    @property
    def source_files(self) -> list[str]:
        """The files whose change makes the arrays out of date."""
        try:
            return [path for path in self.raw_paths if os.path.isfile(path)]
        except NotImplementedError:
            return []

    def _download(self) -> None:
        if self._problem() is None:
            return
        if type(self).download is not MemmappedDataset.download and not self.remotes:
            if all(os.path.exists(path) for path in self.raw_paths):
                return
            os.makedirs(self.raw_dir, exist_ok=True)
        self.download()

    def _process(self) -> None:
        if self._problem() is None:
            return
        folder = Path(self.processed_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / self.name):
            if (reason := self._problem()) is not None:  # another process may have been faster
                logger.info("%s: preparing the data (%s).", type(self).__name__, reason)
                self.process()

    def process(self) -> None:
        """Turn the source into arrays, in one pass."""
        sources = [self._fingerprint(path) for path in self.source_files]
        writer = _Writer(Path(self.processed_dir), self.name, {name: self._known[name] for name in self.properties})
        try:
            for block in self._incoming():
                writer.append(block)
            if not writer.num_systems:
                raise NothingLeft(f"{type(self).__name__}: {self.nothing_left}")
            writer.finish({"sources": sources, **self._description()})
        except OSError as error:
            if error.errno in FULL:
                raise disk_full(self.processed_dir, type(self).__name__) from error
            raise
        finally:
            writer.discard()
        logger.info(
            "%s: %d systems, %d atoms in %s.", self.name, writer.num_systems, writer.num_atoms, self.processed_dir
        )

    def _incoming(self) -> Iterator[Block]:
        """Blocks to store: as the source gives them, unless someone wants to see each sample."""
        plain = type(self).sample_iter is MemmappedDataset.sample_iter
        if plain and self.pre_filter is None and self.pre_transform is None:
            yield from self.blocks()
        else:
            yield from _collect(self.sample_iter(), {name: self._known[name] for name in self.properties})

    def _description(self) -> dict[str, Any]:
        described = {**self.arguments, "pre_filter": _describe(self.pre_filter)}
        described["pre_transform"] = _describe(self.pre_transform)
        return {"arguments": json.loads(json.dumps(described, default=repr))}

    def _problem(self) -> str | None:
        """Why the arrays cannot be used as they are, or None."""
        folder = Path(self.processed_dir)
        for file in self.processed_file_names:
            if not (folder / file).is_file():
                return "no arrays yet"
        manifest = _read_manifest(folder / f"{self.name}.json")
        if manifest is None:  # by an earlier release: there is only the time to go by
            if self.pre_filter is not None or self.pre_transform is not None:
                return "the arrays do not say which filter they were made with"
            written = min((folder / file).stat().st_mtime for file in self.processed_file_names)
            if any(os.path.getmtime(path) > written for path in self.source_files):
                return "the source is newer than the arrays"
        else:
            if not manifest.get("complete") or manifest.get("layout") != LAYOUT:
                return "the arrays were not finished"
            if {"arguments": manifest.get("arguments")} != self._description():
                return "the arrays were made with other arguments"
            if not self._same_sources(manifest):
                return "the source has changed"
        try:
            self._layout()
        except DataError as error:
            return str(error)
        return None

    def _same_sources(self, manifest: dict[str, Any]) -> bool:
        known = {entry["file"]: entry for entry in manifest["sources"]}
        present = {self._short(path): path for path in self.source_files}
        downloaded = bool(self.remotes)  # what can be had again may be deleted to save space
        if not (set(present) <= set(known) if downloaded else set(present) == set(known)):
            return False
        touched = False
        for name, path in present.items():
            entry, status = known[name], os.stat(path)
            if status.st_size != entry["size"]:
                return False
            if status.st_mtime_ns != entry["mtime"]:
                if sha256(path) != entry["sha256"]:
                    return False
                entry["mtime"], touched = status.st_mtime_ns, True
        if touched:
            try:
                _write_manifest(Path(self.processed_dir) / f"{self.name}.json", manifest)
            except OSError as error:
                logger.debug("%s", error)
        return True

    def _short(self, path: str) -> str:
        """A path as the manifest has it: one below the root stays valid when the root moves."""
        inside = os.path.relpath(path, self.root)
        return os.path.abspath(path) if inside.startswith("..") else inside

    def _fingerprint(self, path: str) -> dict[str, Any]:
        status = os.stat(path)
        digest = noted(Path(path)) or sha256(path)  # a note was compared a moment ago, by fetch()
        return {"file": self._short(path), "size": status.st_size, "mtime": status.st_mtime_ns, "sha256": digest}

    def _layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of every array.

        Raises:
            DataError: If a file is missing or has the wrong size.
        """
        folder = Path(self.processed_dir)
        manifest = _read_manifest(folder / f"{self.name}.json") or {}
        types = manifest.get("types", {})
        index = folder / f"{self.name}.idx.mmap"
        size = index.stat().st_size if index.is_file() else 0
        if size < 16 or size % 8:
            raise DataError(f"{index} is missing or incomplete.")
        num_systems = size // 8 - 1
        with open(index, "rb") as file:
            file.seek(-8, os.SEEK_END)
            num_atoms = int.from_bytes(file.read(8), "little", signed=True)
        fields = {"z": Field("atom", (), "int8"), "pos": Field("atom", (3,), "float32")}
        fields.update({name: self._known[name] for name in self.properties})
        layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {"idx": (np.dtype("<i8"), (num_systems + 1,))}
        for name, field in fields.items():
            dtype = np.dtype(types.get(name, field.dtype)).newbyteorder("<")
            shape = (num_atoms if field.level == "atom" else num_systems, *field.shape)
            expected = dtype.itemsize * int(np.prod(shape))
            path = folder / f"{self.name}.{name}.mmap"
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise DataError(f"{path} has {found} bytes instead of {expected}: the file is incomplete.")
            layout[name] = (dtype, shape)
        return layout

    def _open(self) -> Frames | JoinedFrames:
        arrays = {
            name: np.memmap(os.path.join(self.processed_dir, f"{self.name}.{name}.mmap"), dtype, "r", 0, shape)
            for name, (dtype, shape) in self._layout().items()
        }
        ptr = arrays.pop("idx")
        atoms = {n: a for n, a in arrays.items() if n in ("z", "pos") or self._known[n].level == "atom"}
        return Frames(ptr, atoms, {name: array for name, array in arrays.items() if name not in atoms})


# ------------------------------------------------------------------------------------------------------------- storing


class _Writer:
    """Arrays that grow in temporary files and get their names when all are complete."""

    def __init__(self, folder: Path, name: str, fields: Mapping[str, Field]) -> None:
        self.folder, self.name = folder, name
        fields = {"z": Field("atom", (), "int8"), "pos": Field("atom", (3,), "float32"), **fields}
        self.num_systems = self.num_atoms = 0
        files = {"idx": Field("system", (), "int64"), **fields}
        self.columns = {
            prop: Column(prop, field, self._path(prop, ".tmp"), widens=True) for prop, field in files.items()
        }
        self.columns["idx"].write(0, 1, 0)

    def _path(self, prop: str, suffix: str = "") -> Path:
        return self.folder / f"{self.name}.{prop}.mmap{suffix}"

    def append(self, block: Block) -> None:
        num, num_atoms = len(block.counts), int(block.counts.sum())
        if not num:
            return
        values = {**block.systems, **block.atoms, "idx": self.num_atoms + np.cumsum(block.counts)}
        for prop, column in self.columns.items():
            if values.get(prop) is None:
                raise DataError(f"{self.name}: system {self.num_systems} has no {prop!r}.")
            try:
                column.write(values[prop], num_atoms if column.field.level == "atom" else num, self.num_systems)
            except DataError as error:
                raise DataError(f"{self.name}: {error}") from error
        self.num_systems += num
        self.num_atoms += num_atoms

    def finish(self, notes: Mapping[str, Any]) -> None:
        types = {prop: column.dtype.name for prop, column in self.columns.items() if prop != "idx"}
        manifest = {"layout": LAYOUT, "types": types, **notes}
        manifest |= {"num_systems": self.num_systems, "num_atoms": self.num_atoms}
        for column in self.columns.values():
            column.sync()
        path = self.folder / f"{self.name}.json"
        _write_manifest(path, {**manifest, "complete": False})  # until the last file has its name
        for prop in self.columns:
            os.replace(self._path(prop, ".tmp"), self._path(prop))
        _write_manifest(path, {**manifest, "complete": True})

    def discard(self) -> None:
        for prop, column in self.columns.items():
            column.release()
            self._path(prop, ".tmp").unlink(missing_ok=True)


def _collect(samples: Iterable[Data], fields: Mapping[str, Field], size: int = 1024) -> Iterator[Block]:
    """Samples as blocks."""
    pending: list[Data] = []
    for sample in samples:
        pending.append(sample)
        if len(pending) == size:
            yield _block(pending, fields)
            pending = []
    if pending:
        yield _block(pending, fields)


def _block(samples: list[Data], fields: Mapping[str, Field]) -> Block:
    counts = np.array([len(sample["z"]) for sample in samples])
    fields = {"z": Field("atom", (), "int64"), "pos": Field("atom", (3,), "float32"), **fields}
    levels: dict[str, dict[str, np.ndarray]] = {"atom": {}, "system": {}}
    for name, field in fields.items():
        columns = []
        for sample, count in zip(samples, counts.tolist(), strict=True):
            if name not in sample:
                continue
            value = np.asarray(sample[name])
            rows = count if field.level == "atom" else 1
            try:
                columns.append(value.reshape(rows, *field.shape))
            except ValueError as error:
                raise DataError(f"{name} has shape {value.shape} instead of {(rows, *field.shape)}.") from error
        if len(columns) == len(samples):
            levels[field.level][name] = np.concatenate(columns)
    return Block(counts, levels["atom"], levels["system"], {})


# ------------------------------------------------------------------------------------------------------- small helpers


def _tensor(name: str, values: Any) -> torch.Tensor:
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(np.float64 if name == "y" else np.float32))


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {"complete": False}
    return manifest if isinstance(manifest, dict) else {"complete": False}


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(manifest, indent=1))
    os.replace(scratch, path)


def _describe(function: Any) -> str | None:
    """Text that changes when a function does, and not from one run to the next."""
    if function is None:
        return None
    code = getattr(function, "__code__", None)
    if code is not None:
        what = (code.co_code.hex(), [repr(c) for c in code.co_consts if not hasattr(c, "co_code")], code.co_names)
        return f"{function.__module__}.{function.__qualname__}:{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
    kind = type(function)
    state = dict(sorted(getattr(function, "__dict__", {}).items()))
    return f"{kind.__module__}.{kind.__qualname__}:{state}" if " at 0x" not in repr(state) else repr(kind)
