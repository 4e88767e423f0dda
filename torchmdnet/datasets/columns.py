"""Arrays that grow on disk or in memory, and are mapped when they are complete."""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from torch import Tensor

from torchmdnet.errors import DataError

__all__ = ["HEADER", "Column", "Field", "as_reference", "entry_of", "from_reference", "npy_header", "open_array"]


class Field(NamedTuple):
    """How one quantity is stored: one row per atom or per system, the shape of a row, and the type on disk."""

    level: Literal["atom", "system"]
    shape: tuple[int, ...]
    dtype: str


HEADER = 128


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """A version 1.0 ``.npy`` header of fixed length, so that the number of rows can be filled in afterwards."""
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def entry_of(level: str, dtype: np.dtype, shape: tuple[int, ...], crc: int) -> dict[str, Any]:
    return {"level": level, "dtype": dtype.str, "shape": list(shape), "crc32": crc}


def open_array(path: Path, entry: dict[str, Any], in_memory: bool, verify: bool) -> np.ndarray:
    dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
    expected = HEADER + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    try:
        found = os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path} is missing.") from error
    if found != expected:
        raise DataError(f"{path} has {found} bytes instead of {expected}: the file is incomplete.")
    array: np.ndarray
    if in_memory or 0 in shape:
        with open(path, "rb") as file:
            file.seek(HEADER)
            array = np.fromfile(file, dtype=dtype).reshape(shape)
    else:
        array = np.memmap(path, dtype=dtype, mode="r", offset=HEADER, shape=shape)
    if verify and zlib.crc32(np.asarray(array).data if array.size else b"") != entry["crc32"]:
        raise DataError(f"{path} does not match its checksum: the file is damaged.")
    return array


class _MapReference(NamedTuple):
    """Where a mapped array lies, in place of its content."""

    filename: str
    dtype: str
    offset: int
    shape: tuple[int, ...]


def as_reference(array: np.ndarray) -> np.ndarray | _MapReference:
    """A reference for an array mapped from a file, whole or a contiguous part of it; other arrays as they are."""
    root = array
    while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
        root = root.base
    if not (isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap) and array.flags.c_contiguous):
        return array
    filename = getattr(root, "filename", None)
    if not filename:
        return array
    shift = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return _MapReference(str(filename), array.dtype.str, int(root.offset) + shift, array.shape)


def from_reference(packed: np.ndarray | _MapReference) -> np.ndarray:
    if not isinstance(packed, _MapReference):
        return packed
    return np.memmap(packed.filename, dtype=packed.dtype, mode="r", offset=packed.offset, shape=packed.shape)


class Column:
    """One growing array: bytes in memory or in a file.

    Args:
        name: What it holds.
        field: Of what shape and type, per atom or per system.
        path: The file; None for memory.
        header: Bytes that are left free at its beginning, for :meth:`close`.
        widens: Whether integers take a wider type when a value does not fit, instead of an error.
    """

    def __init__(self, name: str, field: Field, path: Path | None, *, header: int = 0, widens: bool = False) -> None:
        self.name, self.field, self.path = name, field, path
        self.header, self.widens = header, widens
        self.dtype = np.dtype(field.dtype).newbyteorder("<")
        self.rows, self.crc = 0, 0
        self.file: BinaryIO | None = None
        self.memory = bytearray()
        if path is not None:
            self.file = open(path, "w+b")  # noqa: SIM115 (open until close())
            self.file.write(bytes(header))

    def write(self, value: Any, rows: int, first_system: int) -> None:
        """Add rows, of any shape that holds as many numbers.

        Raises:
            DataError: If they have another shape, are no numbers, or do not fit the type.
        """
        array = np.asarray(value.numpy() if isinstance(value, Tensor) else value)
        size = rows * int(np.prod(self.field.shape, dtype=np.int64))
        shape = (rows, *self.field.shape)
        last = shape[-1:] if self.field.shape else ()
        if array.size != size or (array.ndim and last and last != (1,) and array.shape[-1:] != last):
            raise DataError(f"system {first_system}: {self.name} has shape {array.shape}, which does not fit {shape}.")
        if array.dtype.kind in "OSU":
            raise DataError(f"system {first_system}: {self.name} holds {array.dtype} instead of numbers.")
        if self.dtype.kind in "iu" and array.size:
            self._fit(array, first_system)
        with np.errstate(over="ignore"):  # becomes infinite, which is looked for where labels are checked
            data = np.ascontiguousarray(array, dtype=self.dtype).tobytes()
        if self.file is None:
            self.memory += data
        else:
            self.file.write(data)
            self.crc = zlib.crc32(data, self.crc)
        self.rows += rows

    def _fit(self, array: np.ndarray, first_system: int) -> None:
        """Widen the type until the numbers fit, or refuse them."""
        low, high = int(array.min()), int(array.max())
        while low < np.iinfo(self.dtype).min or high > np.iinfo(self.dtype).max:
            if not self.widens or self.dtype.itemsize == 8:
                info = np.iinfo(self.dtype)
                raise DataError(
                    f"system {first_system}: {self.name} runs from {low} to {high}, beyond {info.min} ... {info.max}."
                )
            old, self.dtype = self.dtype, np.dtype(f"<i{2 * self.dtype.itemsize}")
            assert self.file is not None
            assert self.path is not None
            self.file.flush()
            stored = np.fromfile(self.path, old, offset=self.header)
            self.file.seek(self.header)
            stored.astype(self.dtype).tofile(self.file)

    def array(self) -> np.ndarray:
        """What is in memory."""
        return np.frombuffer(self.memory, dtype=self.dtype).reshape(self.rows, *self.field.shape)

    def close(self) -> dict[str, Any]:
        """Complete the file with its header; what a manifest says of it."""
        assert self.file is not None
        shape = (self.rows, *self.field.shape)
        self.file.seek(0)
        self.file.write(npy_header(self.dtype, shape))
        self.file.close()
        return entry_of(self.field.level, self.dtype, shape, self.crc)

    def sync(self) -> None:
        """Complete a file that has no header, down to the disk."""
        assert self.file is not None
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def release(self) -> None:
        """Close the file, complete or not."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # what waits in memory may find no room either
                self.file.close()
