"""A short name for the content of a data set, by which changed data are noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from torchmdnet.data.loader import collect

__all__ = ["STRUCTURE", "data_digest", "differences", "digest_by_field"]

#: Systems of a part that are read; of larger parts evenly chosen ones.
MAX_SYSTEMS = 5_000
#: The same of a whole data set.
MAX_OF_ALL = 20_000
_BLOCK = 500

#: Fields that say which system is which; all others are labels.
STRUCTURE = frozenset({"z", "pos", "box", "sizes"})
#: The names that number atoms and systems have in a batch.
_COUNTS = frozenset({"batch", "ptr"})


def data_digest(dataset: Any, parts: Mapping[str, Any]) -> str:
    """Digest of the systems of each part, in their order, with everything they hold.

    Args:
        dataset: A data set of S systems.
        parts: Name to indices (n,) of its systems. Of a part with more than 5,000 systems evenly chosen ones are read.

    Returns:
        32 hexadecimal digits; the same for the same data in every process and version.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, indices in parts.items():
        rows = np.asarray(indices)
        digest.update(f"{name} {len(rows)} of {len(dataset)}\n".encode())
        for batch in _blocks(dataset, _evenly(rows, MAX_SYSTEMS)):
            for field in sorted(batch):
                digest.update(field.encode())
                digest.update(batch[field].tobytes())
    return digest.hexdigest()


def digest_by_field(dataset: Any) -> dict[str, Any]:
    """Digest of each field of a data set, in the order of the systems, however they are divided.

    Weights of samples are left out: they are settings. So is a field that is another one each time it is read, as with
    a random ``transform``.

    Args:
        dataset: A data set of S systems; of more than 20,000 evenly chosen ones are read, some 0.05 s in memory.

    Returns:
        ``systems``, their number, and ``fields``, names to 32 hexadecimal digits; ``sizes`` are the numbers of atoms.
    """
    rows = _evenly(np.arange(len(dataset)), MAX_OF_ALL)
    found: dict[str, Any] = {}
    for batch in _blocks(dataset, rows):
        for field, values in _told(batch).items():
            digest = found.setdefault(field, hashlib.blake2b(digest_size=16))
            digest.update(f"{values.dtype.str}\n".encode())
            digest.update(values.tobytes())
    twice = [next(_blocks(dataset, rows[:10]), {}) for _ in range(2)]
    first, second = (_told(batch) for batch in twice)
    stable = {field for field in found if field in second and first[field].tobytes() == second[field].tobytes()}
    return {"systems": len(dataset), "fields": {field: found[field].hexdigest() for field in sorted(stable)}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, structures_only: bool = False) -> str:
    """What two results of :func:`digest_by_field` disagree in, in words; empty if nothing. New fields do not count.

    Args:
        before: Of earlier data.
        now: Of the data in use.
        structures_only: Whether labels may differ.
    """
    if before["systems"] != now["systems"]:
        return f"there were {before['systems']} systems, now there are {now['systems']}"
    old, new = before["fields"], now["fields"]
    changed = [field for field in old if field in new and old[field] != new[field]]
    structures = [field for field in changed if field in STRUCTURE]
    labels = [] if structures_only else [field for field in changed if field not in STRUCTURE]
    if structures:
        return f"the {now['systems']} systems are others, or stand in another order ({', '.join(structures + labels)})"
    return f"the structures are the same, but not their labels ({', '.join(labels)})" if labels else ""


def _evenly(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _blocks(dataset: Any, rows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(rows), _BLOCK):
        batch: dict[str, Any] = cast(Any, collect(dataset, rows[first : first + _BLOCK])).to_dict()
        yield {name: np.ascontiguousarray(value.numpy()) for name, value in batch.items() if hasattr(value, "numpy")}


def _told(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    fields = {name: value for name, value in batch.items() if name not in _COUNTS and not name.endswith("_weight")}
    return {**fields, "sizes": np.diff(batch["ptr"])} if "ptr" in batch else fields
