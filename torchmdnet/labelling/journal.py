"""What has been computed so far, in a file that survives being killed at any moment.

The file is only ever appended to, one line of JSON for each piece of work. A line without its end, which is all that a
sudden death can leave behind, is cut off when the file is opened again.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.parse import parse_json

__all__ = ["Journal"]

#: Seconds between two demands that what was written reaches the disk, for the case of a power failure.
SYNC = 5.0


class Journal:
    """Outcomes by key: what was computed, or the error that prevented it.

    Args:
        path: The file; made if it is not there.
        header: Everything the outcomes depend on. A journal that has results with another header is refused; one with
            errors alone begins again.

    Raises:
        DataError: If the file belongs to other settings, to another program, or to a process that is running.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        #: Where the line of each key stands, and the names of what it holds, none for an error.
        self._places: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._synced = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (open until closed)
        try:
            self._lock()
            self._read(json.loads(json.dumps(dict(header))))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.path}: another process is writing to it. Wait for its end.") from None
        except OSError:
            pass  # a file system without locks

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        place, found = 0, None
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            entry = _parse(line)
            if place == 0:
                found = entry or {}
                if "journal" not in found:
                    raise DataError(f"{self.path} was not written by this program. Choose another output.")
            elif entry is not None and "key" in entry:
                self._places[entry["key"]] = (place, tuple(entry.get("result", ())))
            place += len(line)
        if found is not None and any(names for _, names in self._places.values()):
            self._check(found, header)
        elif found is None or any(found.get(name) != header[name] for name in header):
            place = 0  # nothing is lost with another header
            self._places.clear()
        self._file.truncate(place)
        self._file.seek(place)
        if place == 0:
            self._write({"journal": 1, **header})

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for name in header:
            if found.get(name) != header[name]:
                raise DataError(
                    f"{self.path} has results with {name} {found.get(name)!r}, but now it is {header[name]!r}. Choose "
                    "another output, or delete the file to compute everything again."
                )

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def succeeded(self, key: str) -> bool:
        """Whether there is a result, not an error."""
        return key in self._places and bool(self._places[key][1])

    def names(self, key: str) -> tuple[str, ...]:
        """Names of the quantities in a result."""
        return self._places[key][1]

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The outcome for a key: ``result``, or ``error`` and, where known, ``source``."""
        self._file.seek(self._places[key][0])
        return parse_json(self._file.readline(), f"{self.path}: it was changed while it was read", DataError)

    def append(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Note an outcome, ``{"result": {...}}`` or ``{"error": "..."}``; a later one replaces an earlier one."""
        self._file.seek(0, os.SEEK_END)
        place = self._file.tell()
        self._write({"key": key, **outcome})
        self._places[key] = (place, tuple(outcome.get("result", ())))

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"{self.path} cannot grow, the disk is full. Free some space and run the same command again: what "
                    "was computed before is kept."
                ) from error
            raise

    def close(self) -> None:
        """Bring everything to the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line, "journal")
    except ConfigError:
        return None
    return entry if isinstance(entry, dict) else None
