"""Structure-data files (V2000): molecules one after another, each with named data items."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from torchmdnet.datasets.memdataset import Block
from torchmdnet.elements import atomic_number
from torchmdnet.errors import DataError

__all__ = ["read_sdf"]


def read_sdf(path: str | Path, what: str, at_once: int = 4096) -> Iterator[Block]:
    """Read atoms and data items, some molecules at a time.

    Args:
        path: The file.
        what: Name of the data set, to open error messages.
        at_once: Molecules in a block.

    Yields:
        Blocks with ``z``, ``pos`` in Å, and the note ``items``: a dictionary for each molecule, item name to text.

    Raises:
        DataError: If a molecule cannot be read; the message has its number.
    """
    atoms: list[str] = []
    counts: list[int] = []
    items: list[dict[str, str]] = []
    for number, record in enumerate(_records(path), start=1):
        lines = record[: record.find("M  END")].split("\n")
        try:
            count = _count(lines[3])
            if len(lines) < 4 + count:
                raise ValueError(f"{count} atoms are announced, but the record ends before them")
        except (IndexError, ValueError) as error:
            raise DataError(f"{what}: {path}, record {number}: not a V2000 molecule ({error}).") from error
        atoms += lines[4 : 4 + count]
        counts.append(count)
        items.append(_items(record))
        if len(counts) == at_once:
            yield _block(atoms, counts, items, path, what)
            atoms, counts, items = [], [], []
    if counts:
        yield _block(atoms, counts, items, path, what)


def _records(path: str | Path) -> Iterator[str]:
    """The text of each molecule."""
    rest = ""
    with open(path) as file:
        while text := file.read(1 << 20):
            *records, rest = (rest + text).split("$$$$\n")
            yield from records
    if rest.removesuffix("$$$$").strip():
        yield rest


def _count(line: str) -> int:
    """Number of atoms: three columns, as large molecules leave no blank after them."""
    return int(line[:3]) if line[:3].strip().isdigit() else int(line.split()[0])


def _items(record: str) -> dict[str, str]:
    """``> <Name>`` and the lines below it, up to a blank one."""
    found: dict[str, str] = {}
    for part in record.split("\n>")[1:]:
        title, _, text = part.partition("\n")
        lines = text.split("\n")
        end = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        found[title[title.find("<") + 1 : title.rfind(">")]] = "\n".join(line.strip() for line in lines[:end])
    return found


def _block(atoms: list[str], counts: list[int], items: list[dict[str, str]], path: str | Path, what: str) -> Block:
    words = [line.split(None, 4)[:4] for line in atoms]
    try:
        z = np.array([atomic_number(word[3]) for word in words])
        pos = np.array(list(map(float, chain.from_iterable(word[:3] for word in words)))).reshape(-1, 3)
    except (KeyError, IndexError, ValueError):  # columns of ten run into each other, or a line is wrong
        z, pos = _by_columns(atoms, path, what)
    return Block(np.array(counts), {"z": z, "pos": pos}, {}, {"items": items})


def _by_columns(atoms: list[str], path: str | Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    z, pos = [], []
    for line in atoms:
        try:
            pos.append([float(line[i : i + 10]) for i in (0, 10, 20)])
            z.append(atomic_number(line[31:34].strip()))
        except (KeyError, ValueError) as error:
            raise DataError(f"{what}: {path}: {line.rstrip()!r} is not a position and an element.") from error
    return np.array(z), np.array(pos)
