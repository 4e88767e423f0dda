"""Finding the files a data set is made of, and showing progress while they are read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torchmdnet.errors import DataError

__all__ = ["expand", "find_files", "natural_key", "progress"]

T = TypeVar("T")


def expand(path: str | os.PathLike[str]) -> str:
    """A path with ``~`` and environment variables filled in."""
    return os.path.expandvars(os.path.expanduser(os.fspath(path)))


def natural_key(name: str | os.PathLike[str]) -> tuple[tuple[int, int, str], ...]:
    """Sorting key that reads numbers as numbers: ``part_2`` comes before ``part_10``."""
    parts = re.split(r"(\d+)", os.fspath(name))
    return tuple((1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts)


def find_files(where: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], what: str) -> list[Path]:
    """The files that a path, a glob pattern or a list of them stands for.

    ``~`` and environment variables are expanded, a semicolon separates several paths in one text, and the matches of
    a pattern are sorted naturally.

    Args:
        where: What the user wrote.
        what: The option it was given as, to open error messages.

    Raises:
        DataError: If nothing matches, a path is not a file, or a file would be read twice.
    """
    entries = [where] if isinstance(where, str | os.PathLike) else list(where)
    entries = [part for entry in entries for part in os.fspath(entry).split(";") if part.strip()]
    if not entries:
        raise DataError(f"{what}: no file is given. Give a path, a pattern such as 'data/*.extxyz', or a list of them.")
    found: list[Path] = []
    for entry in entries:
        text = expand(entry.strip())
        if os.path.isdir(text):
            raise DataError(f"{what}: {entry} is a folder. Name its files with a pattern such as '{entry}/*.extxyz'.")
        if os.path.exists(text) and not os.path.isfile(text):
            raise DataError(f"{what}: {entry} is no regular file. Name a file.")
        if os.path.exists(text):
            found.append(Path(text))
            continue
        matches = sorted((m for m in glob.glob(text, recursive=True) if os.path.isfile(m)), key=natural_key)
        if not matches:
            kind = "No file matches the pattern" if glob.has_magic(text) else "There is no file"
            raise DataError(f"{what}: {kind} {entry!r} (looked from {os.getcwd()}).")
        found += [Path(m) for m in matches]
    seen: dict[str, Path] = {}
    for path in found:
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(f"{what}: {path} is listed twice. Its frames would end up in training and test alike.")
        seen[real] = path
    return found


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "frame") -> Iterator[T]:
    """Pass items on, with a progress bar on a terminal once it takes longer than two seconds."""
    from tqdm import tqdm

    yield from tqdm(items, desc=description, total=total, unit=unit, delay=2.0, leave=False, disable=None)
