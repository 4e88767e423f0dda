"""Frames of any file that ASE reads, with their numbers, and errors that name the file and the frame."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from torchmdnet.datasets.structure_tables import TABLES, read_table
from torchmdnet.elements import ISOTOPES, unknown_element
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import normalise_unit

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["ALL", "Index", "count_structures", "index_text", "read_structures"]

#: A frame number, or the start, stop and step of a slice.
Index = tuple[int | None, int | None, int | None] | int
#: No structure has as many atoms.
MOST_ATOMS = 10**12
ALL: Index = (None, None, None)


def index_text(index: Index) -> str:
    """An index as ASE writes it: ``"-1"``, ``"::10"``."""
    return str(index) if isinstance(index, int) else ":".join("" if i is None else str(i) for i in index)


def read_structures(path: Path, index: Index, columns: Mapping[str, str] | None = None) -> Iterator[tuple[int, Atoms]]:
    """Frames of one file with their numbers; whatever goes wrong names the file and the frame.

    Args:
        path: The file.
        index: Which of its frames.
        columns: Names of the structure's parts in a table, see :mod:`torchmdnet.datasets.structure_tables`.
    """
    kind = _format(path)
    if kind == "extxyz":
        wanted = _wanted(index, lambda: _count_extxyz(path))
        yield from _read_extxyz(path, wanted)
    elif kind == "table":
        yield from read_table(path, columns or {}, lambda total: _wanted(index, lambda: total))
    elif kind in ("db", "json"):
        yield from _read_database(path, index)
    else:
        yield from _read_other(path, kind, index)


def _format(path: Path) -> str:
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.")
    if path.suffix in TABLES:
        return "table"
    try:
        kind = cast(str, filetype(str(path)))
        if kind not in ioformats:
            raise UnknownFileTypeError(kind)
        return kind
    except UnknownFileTypeError as error:
        raise DataError(f"{path}: ASE does not know this kind of file ({error}).") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: the file cannot be read ({error}). Is it complete?") from error


def _wanted(index: Index, count: Callable[[], int]) -> Sequence[int] | None:
    """Numbers of the frames asked for; None for all of them."""
    if index == ALL:
        return None
    total = count()
    if isinstance(index, int):
        return [range(total)[index]] if -total <= index < total else []
    return sorted(range(total)[slice(*index)])


def count_structures(paths: Sequence[Path]) -> int | None:
    """Number of frames where it is quick to find out, for the progress bar."""
    try:
        if all(_format(path) == "extxyz" for path in paths):
            return sum(_count_extxyz(path) for path in paths)
    except (DataError, OSError, ValueError):
        pass  # the reader will say what is wrong
    return None


def _open_text(path: Path) -> TextIO:
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt")


def _extxyz_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The text of each frame, with the line it starts on."""
    line_number, frame = 0, 0
    try:
        with _open_text(path) as file:
            header = file.readline()
            while header:
                line_number += 1
                if not header.strip():
                    header = file.readline()
                    continue
                try:
                    num = int(header)
                except ValueError as error:
                    raise DataError(
                        f"{path}, frame {frame}: line {line_number} should be a number of atoms, "
                        f"but it is {header.strip()[:60]!r}."
                    ) from error
                if not 0 <= num < MOST_ATOMS:
                    raise DataError(
                        f"{path}, frame {frame}: line {line_number} should be a number of atoms, "
                        f"but it is {header.strip()[:60]!r}."
                    )
                body = list(itertools.islice(file, num + 1))
                if len(body) < num + 1:
                    raise DataError(
                        f"{path}, frame {frame}: the file ends after {max(len(body) - 1, 0)} of {num} atoms. "
                        "It is incomplete."
                    )
                if num and _is_cut(body):
                    raise _cut(path, frame, line_number + num + 1, body[-1])
                text, first = header + "".join(body), line_number
                line_number += num + 1
                while (header := file.readline()).startswith("VEC"):  # ADF writes the cell after the atoms
                    text += header
                    line_number += 1
                yield first, text
                frame += 1
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}, frame {frame}: the file cannot be read on ({error}). Is it complete?") from error
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error}).") from error


def _is_cut(body: list[str]) -> bool:
    """Whether the last line of a frame, where it is the last of the file, has less than it should.

    Args:
        body: Comment and atoms of the frame, with their line ends.
    """
    *others, last = body[1:]
    if last.endswith(("\n", "\r")):
        return False
    listed = re.search(r'Properties="?([^"\s]+)', body[0])
    counts = listed[1].split(":")[2::3] if listed else []
    columns = sum(map(int, counts)) if all(re.fullmatch("[0-9]{1,6}", count) for count in counts) else 0
    if not columns and others:
        columns = min(len(line.split()) for line in others)
    widths = {len(line.rstrip()) for line in others}  # one width is a column format, in which a digit can be missed
    return len(last.split()) < columns or (len(widths) == 1 and len(last.rstrip()) < widths.pop())


def _cut(path: Path, frame: int, line_number: int, line: str) -> DataError:
    return DataError(
        f"{path}, frame {frame}: line {line_number}, the last one, is cut off: {line.strip()[:60]!r}. The file is "
        "incomplete; copy it again, or delete this frame."
    )


def _count_extxyz(path: Path) -> int:
    return sum(1 for _ in _extxyz_texts(path))


def _read_extxyz(path: Path, wanted: Sequence[int] | None, chunk: int = 200) -> Iterator[tuple[int, Atoms]]:
    """Extended XYZ in one pass. ASE parses the text; the frames are cut apart here, because it would stop at a blank
    line without a word and seek through a compressed file from its start for every frame."""
    chosen = None if wanted is None else set(wanted)
    texts = (
        (number, first, text)
        for number, (first, text) in enumerate(_extxyz_texts(path))
        if chosen is None or number in chosen
    )
    fault: DataError | None = None
    while fault is None:
        block: list[tuple[int, int, str]] = []
        try:
            block.extend(itertools.islice(texts, chunk))
        except DataError as error:
            fault = error  # the frames before it come first
        if not block and fault is None:
            return
        frames = _parse_extxyz("".join(text for _, _, text in block)) if block else []
        if isinstance(frames, Exception) or len(frames) != len(block):
            for number, first, text in block:  # once more, one by one, to find out which
                one = _parse_extxyz(text)
                if isinstance(one, KeyError) and one.args[0] in ISOTOPES:
                    one = _parse_isotopes(text)
                if isinstance(one, Exception):
                    if not text.endswith("\n"):
                        lines = text.splitlines()
                        raise _cut(path, number, first + len(lines) - 1, lines[-1]) from one
                    raise DataError(f"{path}, frame {number}: {_reason(one)}") from one
                yield number, _with_pairs(one[0], text)
        else:
            for (number, _, text), atoms in zip(block, frames, strict=True):
                yield number, _with_pairs(atoms, text)
    raise fault


def _parse_extxyz(text: str) -> list[Atoms] | Exception:
    from ase.io import read

    try:
        return cast("list[Atoms]", read(io.StringIO(text), index=":", format="extxyz"))
    except Exception as error:  # ASE's parsers raise whatever their code runs into
        return error


def _parse_isotopes(text: str) -> list[Atoms] | Exception:
    """A frame in which hydrogen is written as ``D`` or ``T``: hydrogen atoms with the masses of the isotopes."""
    header, comment, *lines = text.splitlines()
    listed = re.search(r'Properties="?([^"\s]+)', comment)
    parts = listed[1].split(":") if listed else ["species", "S", "1"]
    names, widths = parts[::3], [int(width) for width in parts[2::3]]
    if "species" not in names:
        return KeyError("D")
    column = sum(widths[: names.index("species")])
    masses: dict[int, float] = {}
    for atom in range(int(header)):
        words = lines[atom].split()
        element, mass = ISOTOPES.get(words[column].capitalize(), (None, None)) if len(words) > column else (None, None)
        if element is not None and mass is not None:
            masses[atom] = mass
            lines[atom] = " ".join([*words[:column], element, *words[column + 1 :]])
    found = _parse_extxyz("\n".join([header, comment, *lines]) + "\n")
    if not isinstance(found, Exception):
        whole = found[0].get_masses()
        whole[list(masses)] = list(masses.values())
        found[0].set_array("masses", whole)
    return found


#: ``name=value`` in the comment of an xyz file, or a word without a value.
_WORDS = re.compile(
    r"""(?P<given>[^\s="']+)\s*=\s*(?:"(?:[^"\\]|\\.)*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|\S+)|(?P<bare>"[^"]*"|'[^']*'|\S+)"""
)
_NAME = re.compile(r"[A-Za-z_][\w.-]*:?")


def _with_pairs(atoms: Atoms, text: str) -> Atoms:
    """The frame with the values of words that stand before a number in its comment: ``charge 1``, ``E: -76.4``.

    ASE takes words without ``=`` for true. A pair is read where it can mean one thing only: a single number follows the
    word, the word occurs once, and the number is not followed by a unit other than eV. Other words stay true, and are
    refused where they would be labels.
    """
    results = atoms.calc.results if atoms.calc is not None else {}
    if not any(value is True for source in (atoms.info, results) for value in source.values()):
        return atoms
    comment = text.split("\n", 2)[1]
    words = [None if match["given"] else match["bare"] for match in _WORDS.finditer(comment)]
    numbers = [None if word is None else _number(word) for word in words]
    taken: list[str] = [match["given"] for match in _WORDS.finditer(comment) if match["given"]]
    pairs: dict[str, tuple[str, float]] = {}
    for at in range(1, len(words)):
        name, value, last = words[at - 1], numbers[at], at == len(words) - 1
        if value is None or name is None or not _NAME.fullmatch(name) or numbers[at - 1] is not None:
            continue
        if not last and (numbers[at + 1] is not None or _is_foreign_unit(words[at + 1])):
            continue
        key = name.rstrip(":")
        pairs[name] = (key, value)
        taken.append(key)
    for name, (key, value) in pairs.items():
        if taken.count(key) > 1 or sum(word == name for word in words) > 1:
            continue
        for source in (atoms.info, results):
            if source.get(name) is True:
                del source[name]
                source[key] = value
    for word, value in zip(words, numbers, strict=True):
        if value is not None and word is not None and atoms.info.get(word) is True:
            del atoms.info[word]  # the number itself is no name
    return atoms


def _number(word: str) -> float | None:
    try:
        value = float(word.rstrip(",;"))
    except ValueError:
        return None
    return int(value) if value.is_integer() and re.fullmatch(r"[-+]?\d+", word.rstrip(",;")) else value


def _is_foreign_unit(word: str | None) -> bool:
    """Whether a word is a unit of energy other than eV."""
    try:
        return word is not None and normalise_unit(word.strip("()[],;"), "energy") != "eV"
    except ConfigError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return unknown_element(error.args[0])
    return f"it cannot be parsed ({type(error).__name__}: {error})."


def _read_database(path: Path, index: Index) -> Iterator[tuple[int, Atoms]]:
    """Rows of an ASE database, with their key-value pairs and data, which ``ase.io.read`` leaves behind."""
    from ase.db import connect

    number = -1
    try:
        database = connect(str(path))
        wanted = _wanted(index, lambda: database.count())
        chosen = None if wanted is None else set(wanted)
        for number, row in enumerate(database.select()):
            if chosen is None or number in chosen:
                yield number, row.toatoms(add_additional_information=True)
    except Exception as error:  # database backends raise their own kinds
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, frame {number + 1}: {_reason(error)}") from error


def _read_other(path: Path, kind: str, index: Index) -> Iterator[tuple[int, Atoms]]:
    from ase.io import iread

    number = -1
    try:
        text = index_text(index)
        start, step = (0, 1) if isinstance(index, int) else (index[0] or 0, index[2] or 1)
        for number, atoms in enumerate(iread(str(path), index=text, format=kind, do_not_split_by_at_sign=True)):
            yield (index if isinstance(index, int) else start + step * number), atoms
    except Exception as error:  # as above: any kind of error for any kind of file
        raise DataError(f"{path}, frame {number + 1}: {_reason(error)}") from error
