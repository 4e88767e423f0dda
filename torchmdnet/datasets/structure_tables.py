"""Structures in tables: LMDB databases of ASE, Parquet files and NumPy archives. Nothing in them can run code.

Each reader yields numbered :class:`ase.Atoms` whose ``info`` and ``arrays`` hold whatever the row has beside the
structure, so that labels are found in them as in any other file.
"""

from __future__ import annotations

import importlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.datasets.labels import USUAL_NAMES
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.parse import parse_json

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["TABLES", "USUAL_COLUMNS", "Choose", "checked_columns", "read_table"]

#: From the number of rows to the numbers of those to read, ascending; None for all of them.
Choose = Callable[[int], Sequence[int] | None]
#: What makes up a structure -> its name in a table.
Columns = Mapping[str, str]

#: Names of the structure in a table, tried in this order where none is given.
USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "numbers": ("atomic_numbers", "numbers", "nuclear_charges", "z", "Z"),
    "positions": ("positions", "pos", "coordinates", "coords", "R"),
    "cell": ("cell", "lattice", "lattice_vectors", "box"),
    "pbc": ("pbc",),
}
#: What an ASE row holds beside quantities.
_BOOKKEEPING = frozenset(
    {"id", "unique_id", "ctime", "mtime", "user", "calculator", "calculator_parameters", "constraints"}
)
_RESERVED = (b"nextid", b"deleted_ids", b"metadata")
#: How sGDML's archives state their units.
_UNITS = {"e_unit": "energy_unit", "r_unit": "length_unit"}
#: Quantities of the system, also where their first axis happens to have a row for each atom.
_OF_SYSTEM = frozenset({"energy", "stress", "cauchy_stress", "cauchy_stress_times_volume", "virial", "dipole", "D"})
ROWS_AT_ONCE = 1024


def checked_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Refuse names of columns for what is no part of a structure."""
    for part in columns or {}:
        if part not in USUAL_COLUMNS:
            raise ConfigError(
                f"columns: {part!r} is no part of a structure.{did_you_mean(part, USUAL_COLUMNS)} Choose from "
                f"{', '.join(USUAL_COLUMNS)}; labels are named by energy_key, forces_key and so on."
            )
    return dict(columns or {})


def read_table(path: Path, columns: Columns, choose: Choose) -> Iterator[tuple[int, Atoms]]:
    """Rows of a file with their numbers.

    Raises:
        DataError: With the file and the row, if it cannot be read, or a package that reads it is missing.
    """
    yield from TABLES[path.suffix](path, columns, choose)


# ---------------------------------------------------------------------------------------------------------------- LMDB


def read_lmdb(path: Path, columns: Columns, choose: Choose) -> Iterator[tuple[int, Atoms]]:
    """Rows of an ``.aselmdb``: the number of a row in decimal -> the row as JSON, compressed with zlib."""
    lmdb = _package("lmdb", "lmdb", path)
    try:
        env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{path}: the file cannot be read as LMDB ({error}). Is it complete?") from error
    with env:
        used = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if path.stat().st_size < used:  # reading beyond the end of a mapped file would kill the process
            raise DataError(
                f"{path}: the file has {path.stat().st_size} bytes, but its pages reach to {used}. It is incomplete; "
                "copy it again."
            )
        with env.begin() as transaction:
            ids = _row_ids(transaction, path)
            wanted = choose(len(ids))
            for number in range(len(ids)) if wanted is None else wanted:
                where = f"{path}, frame {number}"
                value = transaction.get(b"%d" % ids[number])
                if value is None:
                    raise DataError(f"{where}: row {ids[number]} is missing. The file is damaged.")
                yield number, _atoms_of_row(_decoded(value, where), columns, where)


def _row_ids(transaction: Any, path: Path) -> list[int]:
    following = transaction.get(b"nextid")
    if following is not None:
        deleted = transaction.get(b"deleted_ids")
        gone = set(_decoded(deleted, f"{path}, deleted_ids")) if deleted else set()
        return [i for i in range(1, int(_decoded(following, f"{path}, nextid"))) if i not in gone]
    keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
    ids = sorted(int(key) for key in keys if key.isdigit())
    if not ids:
        others = ", ".join(repr(key) for key in keys if key not in _RESERVED) or "none"
        raise DataError(f"{path}: there are no rows numbered 1, 2, ... in it; its keys are {others[:200]}.")
    return ids


def _decoded(value: bytes, where: str) -> Any:
    """A JSON value, compressed or not; a pickle is refused."""
    if value[:1] == b"\x80":
        raise DataError(
            f"{where}: the row is a Python pickle, as in older LMDB files of fairchem (torch_geometric objects). "
            "Reading a pickle runs whatever code it holds, so it is refused. Where you trust the file, read it with "
            "the program that wrote it, and write the structures with ase.db to an .aselmdb file (package "
            "ase-db-backends) or with ase.io to extended XYZ."
        )
    try:
        text = value if value[:1] in (b"{", b"[") else zlib.decompress(value)
        return parse_json(text, "the row", object_hook=_with_arrays)
    except (zlib.error, ValueError) as error:
        reason = str(error).removesuffix(".")
        raise DataError(f"{where}: the row is no JSON compressed with zlib ({reason}). The file is damaged.") from error


def _with_arrays(node: dict[str, Any]) -> Any:
    """Arrays as ASE writes them in JSON: shape, type and numbers."""
    if "__ndarray__" not in node:
        return node
    shape, kind, numbers = node["__ndarray__"]
    dtype = np.dtype(str(kind))
    if dtype.kind not in "biufc":
        raise ValueError(f"an array of {kind}")
    return np.array(numbers, dtype=dtype).reshape(shape)


def _atoms_of_row(row: Any, columns: Columns, where: str) -> Atoms:
    if not isinstance(row, dict):
        raise DataError(f"{where}: the row is a {type(row).__name__} instead of named quantities.")
    found = {name: value for name, value in row.items() if name not in _BOOKKEEPING and value is not None}
    cell = found.get("cell")
    if isinstance(cell, dict):  # ASE's own object
        found["cell"] = cell.get("array")
    for nested in ("data", "key_value_pairs"):
        found.update(within if isinstance(within := found.pop(nested, None), dict) else {})
    return _atoms(found, columns, where)


# ------------------------------------------------------------------------------------------------------------- Parquet


def read_parquet(path: Path, columns: Columns, choose: Choose) -> Iterator[tuple[int, Atoms]]:
    """Rows of a Parquet file: a column of lists for each array."""
    pyarrow = _package("pyarrow", "parquet", path)
    parquet = _package("pyarrow.parquet", "parquet", path)
    number = 0
    try:
        with parquet.ParquetFile(str(path)) as file:
            wanted = choose(file.metadata.num_rows)
            chosen = None if wanted is None else set(wanted)
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                rows = {name: _cells(batch.column(name)) for name in batch.schema.names}
                for row in range(batch.num_rows):
                    if chosen is None or number in chosen:
                        found = {name: cells[row] for name, cells in rows.items() if cells[row] is not None}
                        yield number, _atoms(found, columns, f"{path}, frame {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, frame {number}: the file cannot be read as Parquet ({error}). Is it complete?"
        ) from error


def _cells(column: Any) -> list[Any]:
    """A column as numbers and texts, or, where it holds lists, as arrays; None is a missing cell."""
    from pyarrow import types

    compute: Any = importlib.import_module("pyarrow.compute")

    def is_list(kind: Any) -> bool:
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    column = getattr(column, "storage", column)
    if not is_list(column.type):
        return column.to_pylist()
    lengths = compute.list_value_length(column).to_pylist()
    inner = column.flatten()  # without the missing cells
    widths = compute.unique(compute.list_value_length(inner)).to_pylist() if is_list(inner.type) else [None]
    if is_list(inner.type) and (len(widths) != 1 or widths[0] is None or is_list(inner.type.value_type)):
        return [None if cell is None else _array(cell) for cell in column.to_pylist()]
    if widths[0] is None:
        values = inner.to_numpy(zero_copy_only=False)
    else:
        values = inner.flatten().to_numpy(zero_copy_only=False).reshape(-1, widths[0])
    ends = np.cumsum([length or 0 for length in lengths]).tolist()
    return [None if length is None else values[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def _array(cell: Any) -> Any:
    try:
        return np.array(cell)
    except ValueError:  # rows of different lengths
        return cell


# --------------------------------------------------------------------------------------------------------------- NumPy


def read_npz(path: Path, columns: Columns, choose: Choose) -> Iterator[tuple[int, Atoms]]:
    """Frames of a NumPy archive: positions (frames, atoms, 3), and atomic numbers (atoms,) or (frames, atoms).

    Molecules of different size are padded with atomic number 0. An array with a row for each frame belongs to the
    frames; a single number or text belongs to all of them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, AttributeError, TypeError) as error:
        why = "an array holds Python objects, which could run code" if "pickle" in str(error) else str(error)
        raise DataError(
            f"{path}: the file cannot be read as an .npz archive of numbers ({why}). Save molecules of different size "
            "as one array, padded with atomic number 0."
        ) from error
    names = {part: _column(part, columns, arrays, str(path)) for part in USUAL_COLUMNS}
    positions, numbers = arrays[str(names["positions"])], arrays[str(names["numbers"])]
    if positions.ndim == 2:
        of_atoms = {n: a[None] for n, a in arrays.items() if a.ndim == 2 and a.shape == positions.shape}
        arrays, positions = {**arrays, **of_atoms}, positions[None]
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(f"{path}: {names['positions']} has shape {positions.shape} instead of (frames, atoms, 3).")
    total, size = positions.shape[:2]
    if numbers.shape not in ((size,), (total, size)):
        raise DataError(
            f"{path}: {names['numbers']} has shape {numbers.shape}, but {names['positions']} has {total} frames of "
            f"{size} atoms, so ({size},) or ({total}, {size}) is needed."
        )
    numbers = np.broadcast_to(numbers, (total, size))
    shared: dict[str, Any] = {_UNITS.get(n, n): a.item() for n, a in arrays.items() if a.ndim == 0}
    for part, shape in (("cell", (3, 3)), ("pbc", (3,))):
        if names[part] and arrays[str(names[part])].shape == shape:
            shared[str(names[part])] = arrays[str(names[part])]
    known = {names["positions"], names["numbers"], *shared}
    _check_rows(path, {n: a for n, a in arrays.items() if n not in known}, total, names)
    of_frame = {n: a for n, a in arrays.items() if n not in known and a.ndim and len(a) == total}
    wanted = choose(total)
    for number in range(total) if wanted is None else wanted:
        real = numbers[number] != 0
        found = {**shared, str(names["numbers"]): numbers[number], str(names["positions"]): positions[number]}
        found.update({name: array[number] for name, array in of_frame.items()})
        if not real.all():
            found = {n: v[real] if n not in _OF_SYSTEM and np.shape(v)[:1] == (size,) else v for n, v in found.items()}
        yield number, _atoms(found, columns, f"{path}, frame {number}")


def _check_rows(path: Path, arrays: Mapping[str, np.ndarray], total: int, names: Mapping[str, str | None]) -> None:
    """Refuse cells and labels without a row for each frame, which would be passed over."""
    labels = {name for usual in USUAL_NAMES.values() for name in usual}
    for name, array in arrays.items():
        if (name in labels or name in (names["cell"], names["pbc"])) and array.ndim and len(array) != total:
            raise DataError(
                f"{path}: {name} has shape {array.shape}, but {names['positions']} has {total} frames; it needs a row "
                "for each."
            )


# -------------------------------------------------------------------------------------------------------- one structure


def _atoms(found: dict[str, Any], columns: Columns, where: str) -> Atoms:
    """A structure and whatever else the row has; arrays with a row for each atom are the atoms'."""
    from ase import Atoms

    names = {part: _column(part, columns, found, where) for part in USUAL_COLUMNS}
    numbers = _numbers(found.pop(str(names["numbers"])), None, "iu", f"{where}: {names['numbers']}")
    size = len(numbers)
    positions = _numbers(found.pop(str(names["positions"])), (size, 3), "iuf", f"{where}: {names['positions']}")
    cell = np.zeros((3, 3))
    if names["cell"]:
        cell = _numbers(found.pop(names["cell"]), (3, 3), "iuf", f"{where}: {names['cell']}")
    pbc = np.abs(cell).sum(axis=1) > 0  # where the row does not say
    if names["pbc"]:
        stated = found.pop(names["pbc"])
        try:
            pbc = np.broadcast_to(np.asarray(stated, dtype=bool), 3)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: {names['pbc']} is {str(stated)[:60]!r}; it says for each lattice vector, or all, whether "
                "the structure repeats along it, true or false."
            ) from error
    if found.get("cauchy_stress_volume_normalized") is False:  # its sign is not stated
        found["cauchy_stress_times_volume"] = found.pop("cauchy_stress", None)
    atoms = Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc)
    for name, value in found.items():
        of_atoms = name not in _OF_SYSTEM and np.ndim(value) > 0 and len(value) == size
        of_atoms = of_atoms and np.shape(value) != (1,)  # of one atom, or of the system: other frames tell
        if of_atoms and np.asarray(value).dtype.kind in "biuf":
            atoms.arrays[name] = np.asarray(value)
        else:
            atoms.info[name] = value
    return atoms


def _column(part: str, columns: Columns, found: Mapping[str, Any], where: str) -> str | None:
    """The name of a part of the structure; None for a cell that is not there."""
    names = (columns[part],) if part in columns else USUAL_COLUMNS[part]
    name = next((name for name in names if name in found), None)
    if name is None and (part in columns or part in ("numbers", "positions")):
        raise DataError(
            f"{where}: there is no {' or '.join(map(repr, names))}, only {', '.join(map(str, found)) or 'nothing'}."
            f"{did_you_mean(names[0], found)} Name it: dataset_arg: {{columns: {{{part}: ...}}}}."
        )
    return name


def _numbers(value: Any, shape: tuple[int, ...] | None, kinds: str, what: str) -> np.ndarray:
    if np.iscomplexobj(value):
        raise DataError(f"{what} holds complex numbers.")
    try:
        array = np.asarray(value, dtype=np.float64 if "f" in kinds else None)
        array = array if shape is None else array.reshape(shape)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is no array of numbers of shape {shape or '(atoms,)'} ({error}).") from error
    if array.dtype.kind not in kinds or (shape is None and array.ndim != 1):
        raise DataError(f"{what} holds {array.dtype} of shape {array.shape} instead of whole numbers, (atoms,).")
    return array


def _package(name: str, extra: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path}: reading it takes another package: pip install 'torchmd-net[{extra}]'.") from error


#: Reader of each kind of file, by its ending.
TABLES: dict[str, Callable[[Path, Columns, Choose], Iterator[tuple[int, Atoms]]]] = {
    ".aselmdb": read_lmdb,
    ".lmdb": read_lmdb,
    ".mdb": read_lmdb,
    ".parquet": read_parquet,
    ".npz": read_npz,
}
