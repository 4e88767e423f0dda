"""Systems of different sizes as a few long arrays.

A data set of a million molecules is not a million objects: it is one array of positions, one of atomic numbers, one of
energies, and ``ptr``, which says where each system starts. A batch is then one gather per array.

- :class:`Frames`: the arrays, in memory or mapped from ``.npy`` files in a folder;
- :class:`JoinedFrames`: several of them end to end, without copying;
- :class:`FrameBuilder`: grows them in a single pass over a source of unknown length.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from torchmdnet.datasets.columns import (
    HEADER,
    Column,
    Field,
    as_reference,
    entry_of,
    from_reference,
    npy_header,
    open_array,
)
from torchmdnet.errors import DataError
from torchmdnet.parse import parse_json

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data

__all__ = ["FIELDS", "Field", "FrameBuilder", "Frames", "JoinedFrames", "make_batch"]

#: Number of the on-disk layout; it is part of every cache key.
FORMAT = 1

#: Atoms looked at in one go.
_AT_ONCE = 2**22

Indices = Sequence[int] | np.ndarray | Tensor


#: The quantities every data set shares. Positions, boxes and energies keep the precision of their source.
FIELDS: dict[str, Field] = {
    "z": Field("atom", (), "uint8"),
    "pos": Field("atom", (3,), "float64"),
    "neg_dy": Field("atom", (3,), "float32"),
    "pq": Field("atom", (), "float32"),
    "partial_charges": Field("atom", (), "float32"),
    "y": Field("system", (1,), "float64"),
    "box": Field("system", (3, 3), "float64"),
    "q": Field("system", (), "float32"),
    "s": Field("system", (), "float32"),
    "stress": Field("system", (3, 3), "float32"),
    "dp": Field("system", (3,), "float32"),
    "dipole": Field("system", (3,), "float32"),
    **{
        name: Field("system", (), "float32") for name in ("config_weight", "y_weight", "neg_dy_weight", "stress_weight")
    },
}


class Frames:
    """A structure of arrays: S systems with N atoms in all.

    Args:
        ptr: First atom of each system, and the number of atoms at the end, (S + 1,).
        atoms: Arrays with one row per atom, (N, ...); ``z`` and ``pos`` are among them.
        systems: Arrays with one row per system, (S, ...).
        folder: The folder the arrays were opened from. With it, pickling stores only this path.
        in_memory: Whether arrays opened from ``folder`` were read rather than mapped.
        shared: Per-atom arrays that are the same in every system, (n, ...), where all systems have n atoms: the
            atomic numbers of a trajectory, for instance.

    Raises:
        DataError: If an array has the wrong number of rows.
    """

    def __init__(
        self,
        ptr: np.ndarray,
        atoms: Mapping[str, np.ndarray],
        systems: Mapping[str, np.ndarray] | None = None,
        *,
        folder: str | Path | None = None,
        in_memory: bool = True,
        shared: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.ptr = np.ascontiguousarray(ptr, dtype=np.int64)
        self.atoms = dict(atoms)
        self.systems = dict(systems or {})
        self.shared = dict(shared or {})
        self.folder = None if folder is None else str(folder)
        self.in_memory = in_memory
        self._check()
        self._prepare()

    def _check(self) -> None:
        if self.ptr.ndim != 1 or self.ptr[0] != 0 or (np.diff(self.ptr) < 0).any():
            raise DataError("ptr must start at 0 and ascend: it holds the first atom of each system.")
        for level, arrays, rows in (("atom", self.atoms, self.num_atoms), ("system", self.systems, len(self))):
            for name, array in arrays.items():
                if len(array) != rows:
                    raise DataError(f"{name} has {len(array)} rows; one per {level} would be {rows}.")
        for name, array in self.shared.items():
            if (self.counts != len(array)).any():
                raise DataError(f"{name} has {len(array)} rows and cannot be shared by systems of other sizes.")

    def _prepare(self) -> None:
        """Plain views: indexing a ``np.memmap`` makes a memmap of every result, which costs more than the gather."""
        counts = np.diff(self.ptr)
        size = int(counts[0]) if len(counts) and (counts == counts[0]).all() else None
        self._atom_views = {
            name: a.reshape(len(self), size, *a.shape[1:]) if size else a
            for name, a in ((name, np.asarray(a)) for name, a in self.atoms.items())
        }
        for name, array in self.shared.items():
            self._atom_views[name] = np.broadcast_to(array, (len(self), *array.shape))
        self._system_views = {name: np.asarray(a) for name, a in self.systems.items()}
        self._common_size = size

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @property
    def num_atoms(self) -> int:
        """Atoms of all systems together (N)."""
        return int(self.ptr[-1])

    @property
    def counts(self) -> np.ndarray:
        """Atoms in each system, (S,)."""
        return np.diff(self.ptr)

    @property
    def atom_fields(self) -> list[str]:
        """Names of the per-atom quantities."""
        return [*self.shared, *self.atoms]

    @property
    def fields(self) -> list[str]:
        """Names of all stored quantities."""
        return [*self.shared, *self.atoms, *self.systems]

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        arrays = (*self.shared.values(), *self.atoms.values(), *self.systems.values())
        return self.ptr.nbytes + sum(a.nbytes for a in arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.atoms or name in self.systems or name in self.shared

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole array of one quantity: (N, ...) or (S, ...)."""
        if name in self.shared:
            return np.tile(self.shared[name], (len(self), *[1] * (self.shared[name].ndim - 1)))
        return self.atoms[name] if name in self.atoms else self.systems[name]

    def __repr__(self) -> str:
        return f"Frames({len(self)} systems, {self.num_atoms} atoms: {', '.join(self.fields)})"

    # ------------------------------------------------------------------------------------------------ reading

    def gather(self, indices: Indices) -> dict[str, Tensor]:
        """Collect systems into contiguous tensors, in the order asked for.

        Args:
            indices: B system numbers; negative ones count from the end.

        Returns:
            Every stored quantity, (atoms of the batch, ...) or (B, ...), integers as int64 and floats as stored;
            and ``batch`` (atoms of the batch,) and ``ptr`` (B + 1,).

        Raises:
            IndexError: If a number is outside the data.
        """
        rows = checked_indices(indices, len(self))
        starts = self.ptr[rows]
        counts = self.ptr[rows + 1] - starts
        ptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(counts, out=ptr[1:])
        out: dict[str, Tensor] = {}
        if self._common_size:
            for name, array in self._atom_views.items():
                taken = array.take(rows, axis=0)
                out[name] = as_tensor(taken.reshape(-1, *taken.shape[2:]))
        else:
            which = np.repeat(starts - ptr[:-1], counts)
            which += np.arange(len(which))
            for name, array in self._atom_views.items():
                out[name] = as_tensor(array.take(which, axis=0))
        for name, array in self._system_views.items():
            out[name] = as_tensor(array.take(rows, axis=0))
        out["batch"] = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
        out["ptr"] = torch.from_numpy(ptr)
        return out

    def batch(self, indices: Indices) -> Batch:
        """Systems as one ``torch_geometric`` batch."""
        return make_batch(self.gather(indices), self.atom_fields)

    def sample(self, index: int) -> dict[str, Tensor]:
        """One system; a per-system quantity keeps its leading axis: ``y`` (1, 1), ``box`` (1, 3, 3), ``q`` (1,)."""
        row = int(checked_indices([index], len(self))[0])
        first, last = int(self.ptr[row]), int(self.ptr[row + 1])
        out = {name: as_tensor(np.array(a)) for name, a in self.shared.items()}
        out.update({name: as_tensor(np.array(a[first:last])) for name, a in self.atoms.items()})
        out.update({name: as_tensor(np.array(a[row : row + 1])) for name, a in self.systems.items()})
        return out

    def data(self, index: int) -> Data:
        """One system as ``torch_geometric.data.Data``; shapes as in :meth:`sample`."""
        from torch_geometric.data import Data

        return Data(**self.sample(index))

    def select(self, indices: Indices) -> Frames:
        """A copy, in memory, of some of the systems."""
        tensors = self.gather(indices)
        return Frames(
            tensors["ptr"].numpy(),
            {n: tensors[n].numpy().astype(a.dtype, copy=False) for n, a in {**self.shared, **self.atoms}.items()},
            {name: tensors[name].numpy().astype(a.dtype, copy=False) for name, a in self.systems.items()},
        )

    def elements(self) -> np.ndarray:
        """The atomic numbers that occur, ascending."""
        z = np.asarray(self.shared["z"] if "z" in self.shared else self.atoms["z"])
        pieces = (z[first : first + _AT_ONCE] for first in range(0, len(z), _AT_ONCE))  # counting copies what it counts
        if z.dtype.kind in "iu" and z.dtype.itemsize == 1:
            return np.flatnonzero(sum(np.bincount(piece.view(np.uint8), minlength=256) for piece in pieces))
        return np.unique(np.concatenate([np.unique(piece) for piece in pieces])) if len(z) else np.unique(z)

    def composition(self, indices: Indices | None = None) -> tuple[np.ndarray, np.ndarray]:
        """How many atoms of each element each system has: counts (S, K) and the K atomic numbers."""
        elements = self.elements()
        if "z" in self.shared:
            one = np.bincount(np.searchsorted(elements, self.shared["z"]), minlength=len(elements))
            return np.tile(one, (len(self) if indices is None else len(indices), 1)), elements
        z, counts, width = np.asarray(self.atoms["z"]), self.counts, len(elements)
        table = np.empty((len(self), width), dtype=np.int64)
        for first in range(0, len(self), 65536):
            last = min(first + 65536, len(self))
            column = np.searchsorted(elements, z[self.ptr[first] : self.ptr[last]])
            system = np.repeat(np.arange(last - first), counts[first:last])
            found = np.bincount(system * width + column, minlength=(last - first) * width)
            table[first:last] = found.reshape(last - first, width)
        return (table if indices is None else table[checked_indices(indices, len(self))]), elements

    # ------------------------------------------------------------------------------------------- files, pickling

    @classmethod
    def from_samples(
        cls,
        samples: Iterable[Mapping[str, Any]],
        folder: str | Path | None = None,
        *,
        fields: Mapping[str, Field] | None = None,
    ) -> Frames:
        """Collect samples in one pass; see :class:`FrameBuilder`."""
        builder = FrameBuilder(folder, fields=fields)
        for sample in samples:
            builder.append(sample)
        return builder.finish()

    def save(self, folder: str | Path) -> None:
        """Write the arrays as ``.npy`` files with a manifest, ``frames.json``."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {"format": FORMAT, "arrays": {}}
        atoms = {name: self[name] for name in self.atom_fields}
        for level, arrays in (("ptr", {"ptr": self.ptr}), ("atom", atoms), ("system", self.systems)):
            for name, array in arrays.items():
                data = np.ascontiguousarray(array)
                with open(path / f"{name}.npy", "wb") as file:
                    file.write(npy_header(data.dtype, data.shape))
                    file.write(data.data)
                manifest["arrays"][name] = entry_of(level, data.dtype, data.shape, zlib.crc32(data.data))
        _write_manifest(path, manifest)

    @classmethod
    def open(cls, folder: str | Path, *, in_memory: bool = False, verify: bool = False) -> Frames:
        """Open a folder written by :meth:`save` or a :class:`FrameBuilder`.

        Args:
            folder: Where ``frames.json`` lies.
            in_memory: Read the arrays instead of mapping them.
            verify: Compare the checksum of every array with the manifest.

        Raises:
            DataError: If a file is missing, has another size, or fails its checksum.
        """
        path = Path(folder)
        try:
            manifest = parse_json((path / "frames.json").read_bytes(), "frames.json")
            entries: dict[str, dict[str, Any]] = manifest["arrays"]
            if manifest["format"] != FORMAT:
                raise DataError(f"{path}: layout {manifest['format']} is not the current one, {FORMAT}.")
            if manifest.get("crc32", _sum(manifest)) != _sum(manifest):  # earlier versions wrote none
                raise DataError(f"{path}: frames.json does not match its checksum: the file is damaged.")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: frames.json is missing or unreadable ({error}).") from error
        groups: dict[str, dict[str, np.ndarray]] = {"ptr": {}, "atom": {}, "system": {}}
        try:
            for name, entry in entries.items():
                groups[entry["level"]][name] = open_array(path / f"{name}.npy", entry, in_memory, verify)
            ptr = groups["ptr"]["ptr"]
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{path}: frames.json describes no arrays ({error!r}).") from error
        return cls(ptr, groups["atom"], groups["system"], folder=path, in_memory=in_memory)

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is not None:
            return {"folder": self.folder, "in_memory": self.in_memory}
        groups = {"atoms": self.atoms, "systems": self.systems, "shared": self.shared}
        return {"ptr": self.ptr} | {k: {n: as_reference(a) for n, a in v.items()} for k, v in groups.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "folder" in state:
            opened = Frames.open(state["folder"], in_memory=state["in_memory"])
            self.__dict__.update(opened.__dict__)
            return
        groups = [{n: from_reference(a) for n, a in state[k].items()} for k in ("atoms", "systems", "shared")]
        self.__init__(state["ptr"], groups[0], groups[1], shared=groups[2])


class Part(Protocol):
    """What :class:`JoinedFrames` needs of the frames it joins."""

    @property
    def in_memory(self) -> bool: ...
    @property
    def fields(self) -> list[str]: ...
    @property
    def atom_fields(self) -> list[str]: ...
    @property
    def num_atoms(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def counts(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> np.ndarray: ...
    def gather(self, indices: Indices) -> dict[str, Tensor]: ...
    def sample(self, index: int) -> dict[str, Tensor]: ...
    def elements(self) -> np.ndarray: ...
    def composition(self, indices: Indices | None = None) -> tuple[np.ndarray, np.ndarray]: ...


class JoinedFrames:
    """Several :class:`Frames` end to end; batches may mix them.

    Args:
        parts: Frames with the same quantities.

    Raises:
        DataError: If the parts do not hold the same quantities.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        if not parts:
            raise DataError("There is nothing to join: no frames were given.")
        for number, part in enumerate(parts):
            if set(part.fields) != set(parts[0].fields):
                raise DataError(
                    f"Part {number} holds {', '.join(sorted(part.fields))}, but the first holds "
                    f"{', '.join(sorted(parts[0].fields))}. Every part needs the same quantities."
                )
        self.parts = list(parts)
        self.offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        self.in_memory = all(part.in_memory for part in parts)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def atom_fields(self) -> list[str]:
        """Names of the per-atom quantities."""
        return self.parts[0].atom_fields

    @property
    def fields(self) -> list[str]:
        """Names of all stored quantities."""
        return self.parts[0].fields

    @property
    def num_atoms(self) -> int:
        """Atoms of all systems together (N)."""
        return sum(part.num_atoms for part in self.parts)

    @property
    def counts(self) -> np.ndarray:
        """Atoms in each system, (S,)."""
        return np.concatenate([part.counts for part in self.parts])

    @property
    def nbytes(self) -> int:
        """Size of all arrays, in bytes."""
        return sum(part.nbytes for part in self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole array of one quantity, joined: a copy."""
        return np.concatenate([np.asarray(part[name]) for part in self.parts])

    def __repr__(self) -> str:
        return f"JoinedFrames({len(self)} systems in {len(self.parts)} parts: {', '.join(self.fields)})"

    def locate(self, index: int) -> tuple[int, int]:
        """The part a system lies in, and its number there."""
        row = int(checked_indices([index], len(self))[0])
        part = int(np.searchsorted(self.offsets, row, side="right")) - 1
        return part, row - int(self.offsets[part])

    def gather(self, indices: Indices) -> dict[str, Tensor]:
        """Collect systems into contiguous tensors; see :meth:`Frames.gather`."""
        rows = checked_indices(indices, len(self))
        owner = np.searchsorted(self.offsets, rows, side="right") - 1
        wanted = np.unique(owner)
        if len(wanted) == 1:
            return self.parts[wanted[0]].gather(rows - self.offsets[wanted[0]])
        pieces = [self.parts[p].gather(rows[owner == p] - self.offsets[p]) for p in wanted]
        order = np.argsort(owner, kind="stable")  # pieces hold the systems in this order
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        counts = np.concatenate([np.diff(piece["ptr"].numpy()) for piece in pieces])
        starts = np.concatenate([[0], np.cumsum(counts)])[:-1][place]
        counts = counts[place]
        ptr = np.concatenate([[0], np.cumsum(counts)])
        which = np.repeat(starts - ptr[:-1], counts)
        which += np.arange(len(which))
        atoms, systems = torch.from_numpy(which), torch.from_numpy(place)
        atom_fields = set(self.atom_fields)
        out = {
            name: torch.cat([piece[name] for piece in pieces])[atoms if name in atom_fields else systems]
            for name in self.fields
        }
        out["batch"] = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
        out["ptr"] = torch.from_numpy(ptr)
        return out

    def batch(self, indices: Indices) -> Batch:
        """Systems as one ``torch_geometric`` batch."""
        return make_batch(self.gather(indices), self.atom_fields)

    def sample(self, index: int) -> dict[str, Tensor]:
        """One system; see :meth:`Frames.sample`."""
        part, row = self.locate(index)
        return self.parts[part].sample(row)

    def data(self, index: int) -> Data:
        """One system as ``torch_geometric.data.Data``."""
        from torch_geometric.data import Data

        return Data(**self.sample(index))

    def elements(self) -> np.ndarray:
        """The atomic numbers that occur, ascending."""
        return np.unique(np.concatenate([part.elements() for part in self.parts]))

    def composition(self, indices: Indices | None = None) -> tuple[np.ndarray, np.ndarray]:
        """How many atoms of each element each system has: counts (S, K) and the K atomic numbers."""
        elements = self.elements()
        table = np.zeros((len(self), len(elements)), dtype=np.int64)
        for part, first, last in zip(self.parts, self.offsets[:-1], self.offsets[1:], strict=True):
            counts, present = part.composition()
            table[first:last, np.searchsorted(elements, present)] = counts
        return (table if indices is None else table[checked_indices(indices, len(self))]), elements


class FrameBuilder:
    """Collects systems one by one, or block by block, in a single pass.

    With a folder the arrays grow on disk, so a source larger than memory is no difficulty; without, in memory. The
    first system decides which quantities the set has, and every later one must bring the same.

    Args:
        folder: Where to write; it must not hold frames yet.
        fields: Quantities beyond :data:`FIELDS`, or another way to store those:
            ``{"pos": Field("atom", (3,), "float32")}``.
    """

    def __init__(self, folder: str | Path | None = None, *, fields: Mapping[str, Field] | None = None) -> None:
        self.known = {**FIELDS, **(fields or {})}
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._columns: dict[str, Column] = {}
        self._counts: list[np.ndarray] = []
        self._pending: list[int] = []
        self.num_systems = 0
        self.num_atoms = 0

    def append(self, sample: Mapping[str, Any]) -> None:
        """Add one system: ``z`` (N,), ``pos`` (N, 3) and whatever labels it has; entries that are None are absent.

        Raises:
            DataError: If a quantity is missing, unexpected, or has the wrong shape; the message has its number.
        """
        values = {name: value for name, value in sample.items() if value is not None}
        num_atoms = len(values["z"])
        for name, column in self._open_columns(values).items():
            rows = num_atoms if column.field.level == "atom" else 1
            column.write(values[name], rows, self.num_systems)
        self._pending.append(num_atoms)
        if len(self._pending) >= 65536:
            self._flush_counts()
        self.num_systems += 1
        self.num_atoms += num_atoms

    def append_block(self, block: Mapping[str, Any]) -> None:
        """Add n systems of N atoms at once: ``pos`` (n, N, 3), ``z`` (N,) or (n, N), labels (n, ...) or (n, N, ...)."""
        values = {name: value for name, value in block.items() if value is not None}
        num, size = np.shape(values["pos"])[:2]
        z = np.asarray(values["z"])
        values["z"] = np.broadcast_to(z, (num, size)) if z.ndim == 1 else z
        for name, column in self._open_columns(values).items():
            column.write(values[name], num * size if column.field.level == "atom" else num, self.num_systems)
        self._flush_counts()
        self._counts.append(np.full(num, size, dtype=np.int64))
        self.num_systems += num
        self.num_atoms += num * size

    def add_column(self, name: str, values: np.ndarray) -> None:
        """Add a quantity that is known only at the end, for all systems or atoms at once."""
        column = self._columns[name] = self._column(name)
        column.write(values, self.num_atoms if column.field.level == "atom" else self.num_systems, 0)

    def change_level(self, name: str, field: Field) -> None:
        """Store the same numbers of a quantity per system instead of per atom, or the other way round.

        Raises:
            DataError: If they are not as many as the other way needs.
        """
        self.known[name] = field
        column = self._columns.get(name)
        if column is None:
            return
        old = column.rows * int(np.prod(column.field.shape, dtype=np.int64))
        rows = self.num_atoms if field.level == "atom" else self.num_systems
        if old != rows * int(np.prod(field.shape, dtype=np.int64)):
            raise DataError(
                f"system {self.num_systems}: {name} has shape {field.shape}, and not one row for each atom."
            )
        column.field, column.rows = field, rows

    def drop_column(self, name: str) -> None:
        """Leave out a quantity that turned out to say nothing."""
        self._columns.pop(name).release()
        if self.folder is not None:
            (self.folder / f"{name}.npy").unlink()

    def finish(self) -> Frames:
        """The collected frames; with a folder, the files are complete and mapped."""
        self._flush_counts()
        if not self.num_systems:
            raise DataError("There are no systems to store.")
        ptr = np.concatenate([[0], np.cumsum(np.concatenate(self._counts))]).astype(np.int64)
        if self.folder is None:
            arrays = {name: column.array() for name, column in self._columns.items()}
            levels = {name: column.field.level for name, column in self._columns.items()}
            return Frames(
                ptr,
                {n: a for n, a in arrays.items() if levels[n] == "atom"},
                {n: a for n, a in arrays.items() if levels[n] == "system"},
            )
        manifest: dict[str, Any] = {"format": FORMAT, "arrays": {}}
        for name, column in self._columns.items():
            manifest["arrays"][name] = column.close()
        (self.folder / "ptr.npy").write_bytes(npy_header(ptr.dtype, ptr.shape) + ptr.tobytes())
        manifest["arrays"]["ptr"] = entry_of("ptr", ptr.dtype, ptr.shape, zlib.crc32(ptr.data))
        _write_manifest(self.folder, manifest)
        return Frames.open(self.folder)

    def close(self) -> None:
        """Release open files without finishing."""
        for column in self._columns.values():
            column.release()

    def _open_columns(self, values: Mapping[str, Any]) -> dict[str, Column]:
        if not self._columns:
            for name in values:
                if name not in self.known:
                    raise DataError(
                        f"{name!r} is not a known quantity. Describe it with fields={{{name!r}: Field(...)}}."
                    )
                self._columns[name] = self._column(name)
        if values.keys() != self._columns.keys():
            missing = sorted(self._columns.keys() - values.keys())
            extra = sorted(values.keys() - self._columns.keys())
            raise DataError(
                f"system {self.num_systems}: "
                + "; ".join(
                    ([f"{', '.join(missing)} is missing"] if missing else [])
                    + ([f"{', '.join(extra)} was not in the systems before it"] if extra else [])
                )
                + ". Every system of a set needs the same quantities."
            )
        return self._columns

    def _column(self, name: str) -> Column:
        path = None if self.folder is None else self.folder / f"{name}.npy"
        return Column(name, self.known[name], path, header=HEADER)

    def _flush_counts(self) -> None:
        if self._pending:
            self._counts.append(np.array(self._pending, dtype=np.int64))
            self._pending = []


def make_batch(tensors: Mapping[str, Tensor], atom_fields: Collection[str]) -> Batch:
    """Wrap tensors that are already contiguous into a ``torch_geometric`` batch.

    ``to_data_list`` and indexing work on the result as on a collated one.

    Args:
        tensors: What :meth:`Frames.gather` returns: quantities, ``batch`` and ``ptr``.
        atom_fields: The names among them that have one row per atom.
    """
    from torch_geometric.data import Batch, Data

    global _BATCH_CLASS
    if _BATCH_CLASS is None:
        _BATCH_CLASS = type(Batch(_base_cls=Data))
    ptr = tensors["ptr"]
    num = len(ptr) - 1
    batch = type.__call__(_BATCH_CLASS)
    batch._store._mapping.update(tensors)  # the constructor would set them one by one, eight times slower
    by_system = torch.arange(num + 1)
    zeros = torch.zeros(num, dtype=torch.int64)
    names = [name for name in tensors if name not in ("batch", "ptr")]
    slices = {name: ptr if name in atom_fields else by_system for name in names}
    batch._store.__dict__.update(_num_graphs=num, _slice_dict=slices, _inc_dict=dict.fromkeys(names, zeros))
    return batch


_BATCH_CLASS: Any = None  # building it through the metaclass inspects signatures every time


def as_tensor(array: np.ndarray) -> Tensor:
    """An owned array as a tensor: integers become int64, floats keep their precision."""
    if array.dtype.kind in "iu" and array.dtype != np.int64:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def checked_indices(indices: Indices, size: int) -> np.ndarray:
    """System numbers as a non-negative int64 array, (B,).

    Raises:
        IndexError: If one lies outside ``-size ... size - 1``.
    """
    rows = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(rows) and (rows.min() < 0 or rows.max() >= size):
        wrong = rows[(rows < -size) | (rows >= size)]
        if len(wrong):
            raise IndexError(f"index {wrong[0]} is outside the data set, which has {size} systems")
        rows = np.where(rows < 0, rows + size, rows)
    return rows


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "frames.json").write_text(json.dumps({**manifest, "crc32": _sum(manifest)}, indent=1))


def _sum(manifest: dict[str, Any]) -> int:
    """Checksum of what a manifest says of the arrays."""
    return zlib.crc32(json.dumps(manifest["arrays"], sort_keys=True).encode())
