"""Frames of any file that ASE reads, with their numbers, and errors that name the file and the frame."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import mmap
import re
import zlib
from collections import Counter
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
MOST_ATOMS = 10**8
#: Numbers and words that a line of an extended XYZ file may have, and characters.
MOST_COLUMNS, LONGEST_LINE = 100_000, 2**23
#: Characters of the message of another package.
_REASON = 300
#: Characters of a comment in which ``charge 1`` is looked for; a longer one was written by a program.
LONGEST_PROSE = 10_000
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
        yield from _read_database(path, kind, index)
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


def _open_text(path: Path, encoding: str | None = None) -> TextIO:
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding=encoding)


def _extxyz_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The text of each frame, with the line it starts on."""
    line_number, frame = 0, 0
    try:
        with _open_text(path) as file:
            lines = _lines(file, path)
            header = next(lines, "")
            while header:
                line_number += 1
                if not header.strip():
                    header = next(lines, "")
                    continue
                num = _number_of_atoms(header, f"{path}, frame {frame}: line {line_number}")
                body = []
                for line in itertools.islice(lines, num + 1):
                    if len(body) == 1:
                        _check_columns(body[0], line, f"{path}, frame {frame}: line {line_number + 1}")
                    elif body and not line.strip():
                        raise DataError(
                            f"{path}, frame {frame}: line {line_number + len(body) + 1} is empty after "
                            f"{len(body) - 1} of {num} atoms. Correct the number in line {line_number}, or the atoms."
                        )
                    body.append(line)
                if len(body) < num + 1:
                    raise DataError(
                        f"{path}, frame {frame}: the file ends after {max(len(body) - 1, 0)} of {num} atoms. "
                        "It is incomplete."
                    )
                if num and _is_cut(body):
                    raise _cut(path, frame, line_number + num + 1, body[-1])
                if not num:
                    _check_columns(body[0], None, f"{path}, frame {frame}: line {line_number + 1}")
                text, first = header + "".join(body), line_number
                line_number += num + 1
                while (header := next(lines, "")).startswith("VEC"):  # ADF writes the cell after the atoms
                    text += header
                    line_number += 1
                yield first, text
                frame += 1
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}, frame {frame}: the file cannot be read on ({error}). Is it complete?") from error
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error}).") from error


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Lines of a text file, of which none may fill the memory."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path}: line {number} has more than {LONGEST_LINE:,} characters, which no line of an extended XYZ "
                f"file has. It begins with {line[:60]!r}. Is it another kind of file?"
            )
        yield line


def _number_of_atoms(header: str, where: str) -> int:
    """The number that a frame begins with."""
    told = f"{where} should be a number of atoms, but it is {header.strip()[:60]!r}."
    try:
        num = int(header)
    except ValueError as error:
        raise DataError(told) from error
    if not 0 <= num < MOST_ATOMS:
        raise DataError(f"{told} A number from 0 to {MOST_ATOMS - 1:,} is accepted.")
    return num


def _listed_columns(comment: str) -> Iterator[list[str]]:
    """The words of each ``Properties=species:S:1:pos:R:3`` in a comment: name, kind and number of columns by turns."""
    for match in re.finditer(r"""Properties\s*=\s*(?:"([^"]*)|'([^']*)|[{[]([^}\]]*)|(\S*))""", comment):
        yield next(group for group in match.groups() if group is not None).strip().split(":")


def _check_columns(comment: str, line: str | None, where: str) -> None:
    """Refuse a comment that lists more columns than the first atom has, for which a parser would make room.

    Args:
        comment: The line with ``Properties``.
        line: That of the first atom; None where there is none.
        where: The place of the comment.
    """
    for listed in _listed_columns(comment):
        total = 0
        if len(listed) % 3 or "" in listed:
            raise DataError(
                f"{where}: Properties is {':'.join(listed)[:60]!r}. It should have a name, a kind and a number of "
                "columns for each quantity, as in species:S:1:pos:R:3."
            )
        for name, count in zip(listed[::3], listed[2::3], strict=False):
            if not re.fullmatch("[0-9]{1,18}", count) or not 0 < int(count) <= MOST_COLUMNS:
                raise DataError(
                    f"{where}: Properties has {count[:40]!r} columns for {name[:40]!r}. A number from 1 to "
                    f"{MOST_COLUMNS:,} is accepted, as in pos:R:3."
                )
            total += int(count)
        if not {"pos", "positions"} & {*listed[::3]}:
            raise DataError(
                f"{where}: Properties has no positions, only {', '.join(listed[::3])[:200]}. Name their columns "
                "pos:R:3."
            )
        found = MOST_COLUMNS if line is None else len(line.split())
        if total > found:
            raise DataError(
                f"{where}: Properties lists {total:,} columns, but "
                + (f"no line may have more than {found:,}." if line is None else f"the first atom has {found:,}.")
                + " Correct one of the two."
            )


def _is_cut(body: list[str]) -> bool:
    """Whether the last line of a frame, where it is the last of the file, has less than it should.

    Args:
        body: Comment and atoms of the frame, with their line ends.
    """
    *others, last = body[1:]
    if last.endswith(("\n", "\r")):
        return False
    columns = sum(map(int, next(_listed_columns(body[0]), [])[2::3]))
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
                    raise _unreadable(path, number, kind="extxyz", error=one) from one
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
    parts = next(_listed_columns(comment), ["species", "S", "1"])
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
    if len(comment) > LONGEST_PROSE:
        return atoms
    words = [None if match["given"] else match["bare"] for match in _WORDS.finditer(comment)]
    numbers = [None if word is None else _number(word) for word in words]
    taken: list[str] = [match["given"] for match in _WORDS.finditer(comment) if match["given"]]
    pairs: dict[str, tuple[str, float]] = {}
    occurring = Counter(words)
    for at in range(1, len(words)):
        name, value, last = words[at - 1], numbers[at], at == len(words) - 1
        if value is None or name is None or not _NAME.fullmatch(name) or numbers[at - 1] is not None:
            continue
        if not last and (numbers[at + 1] is not None or _is_foreign_unit(words[at + 1])):
            continue
        key = name.rstrip(":")
        pairs[name] = (key, value)
        taken.append(key)
    known = Counter(taken)
    for name, (key, value) in pairs.items():
        if known[key] > 1 or occurring[name] > 1:
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


def _unreadable(path: Path, frame: int | None, kind: str, error: Exception) -> DataError:
    """What is told of an error in a reader of another package, which may be of any kind.

    Args:
        path: The file.
        frame: The frame that was read; None where the file has not given any.
        kind: ASE's name of the format.
        error: What the reader raised.
    """
    from ase.io.formats import ioformats

    where = str(path) if frame is None else f"{path}, frame {frame}"
    if isinstance(error, KeyError):
        key = error.args[0] if error.args else None
        if kind == "extxyz" or re.fullmatch("[A-Za-z]{1,3}", str(key)):
            return DataError(f"{where}: {unknown_element(key)}")
        why = f"{key!r} is missing"
    elif isinstance(error, AttributeError) and error.name and type(error.obj).__module__ != "builtins":
        why = f"{error.name!r} is missing"  # of a row
    elif isinstance(error, (EOFError, StopIteration)):
        why = "it ends too early"
    elif isinstance(error, IndexError):
        why = f"a value is missing: {error}"
    else:
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        why = text if len(text) <= _REASON else f"{text[:_REASON]} ..."
    name = ioformats[kind].description
    name = "extended XYZ" if kind == "extxyz" else re.sub("[ -](file|format)$", "", name)
    return DataError(f"{where}: cannot be read as {name} ({why}).")


def _read_database(path: Path, kind: str, index: Index) -> Iterator[tuple[int, Atoms]]:
    """Rows of an ASE database, with their key-value pairs and data, which ``ase.io.read`` leaves behind."""
    from ase.db import connect

    reached: int | None = None
    try:
        database = connect(str(path))
        wanted = _wanted(index, lambda: database.count())
        chosen = None if wanted is None else set(wanted)
        for number, row in enumerate(database.select()):
            reached = number
            if chosen is None or number in chosen:
                yield number, row.toatoms(add_additional_information=True)
            reached = number + 1
    except Exception as error:  # database backends raise their own kinds
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, reached, kind, error) from error


#: Where other formats state a number of atoms; ASE makes room for it, or counts to it, before it meets the end.
_COUNTS = {
    "cfg": rb"^\s*Number of particles\s*=\s*(\d+)",
    "cube": rb"\A.*\n.*\n\s*(\d+)",
    "gen": rb"\A\s*(\d+)",
    "gromacs": rb"\A.*\n\s*(\d+)",
    "lammps-data": rb"^[ \t]*(\d+)[ \t]+atoms\b",
    "lammps-dump-text": rb"^ITEM: NUMBER OF ATOMS\s+(\d+)",
    "vasp": rb"\A(?:.*\n){5,6}((?:[ \t]*\d+)+)[ \t]*\r?$",
    "xsf": rb"^\s*PRIMCOORD.*\n\s*(\d+)",
}


def _check_count(path: Path, kind: str) -> None:
    """Refuse a file that states more atoms than it has bytes."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in re.finditer(_COUNTS[kind], content, re.MULTILINE):
            if any(len(word) > 18 or int(word) > size for word in match[1].split()):
                line = content[: match.start(1)].count(b"\n") + 1
                raise DataError(
                    f"{path}: line {line} states {match[1].decode().strip()[:60]} atoms, more than the file has bytes "
                    f"({size:,}). Correct the number; is the file complete?"
                )


#: Sites that symmetry operations may make of the atoms of a CIF. ASE compares each with all others, which takes a
#: minute or more for as many as these.
MOST_SITES = 4_000


def _check_sites(path: Path) -> None:
    """Refuse a CIF whose symmetry operations make more sites of its atoms than ASE can compare with one another."""
    atoms = symmetries = rows = 0
    names: list[str] = []
    with _open_text(path, "latin-1") as file:
        for line in itertools.chain(_lines(file, path), ["data_"]):
            word = line.strip().lower()
            if word and not word.startswith(("loop_", "_", "data_", "#")):
                rows += 1
                continue
            if rows and "_atom_site_fract_x" in names:
                atoms = rows
            elif rows and any("symmetry_equiv_pos" in name or "space_group_symop" in name for name in names):
                symmetries = rows
            if word.startswith("data_"):
                sites = atoms * max(symmetries, 1)
                if sites > MOST_SITES:
                    raise DataError(
                        f"{path}: atoms times symmetry operations are {atoms:,} x {max(symmetries, 1):,} = {sites:,} "
                        f"sites. At most {MOST_SITES:,} are read from a CIF, as ASE compares each with all others. "
                        "Write the whole cell as extended XYZ with another program, and read that."
                    )
                atoms = symmetries = 0
            names = [*([] if rows else names), word.split()[0]] if word.startswith("_") else []
            rows = 0


def _read_other(path: Path, kind: str, index: Index) -> Iterator[tuple[int, Atoms]]:
    from ase.io import iread

    if kind in _COUNTS and path.suffix not in (".gz", ".bz2", ".xz"):
        _check_count(path, kind)
    number = -1
    try:
        if kind == "cif":
            _check_sites(path)
        text = index_text(index)
        start, step = (0, 1) if isinstance(index, int) else (index[0] or 0, index[2] or 1)
        for number, atoms in enumerate(iread(str(path), index=text, format=kind, do_not_split_by_at_sign=True)):
            yield (index if isinstance(index, int) else start + step * number), atoms
    except DataError:
        raise
    except Exception as error:  # as above: any kind of error for any kind of file
        raise _unreadable(path, number + 1 if number >= 0 else None, kind, error) from error
