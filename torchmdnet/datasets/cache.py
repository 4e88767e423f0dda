"""A cache of frames that were slow to read, safe against stale, damaged and half-written entries.

An entry is a folder named by a digest of everything it depends on: the content of the source files, the arguments, and
the layout of the cache itself. It is written under a temporary name and renamed when complete, so that a reader never
sees half of one and two processes may build the same entry at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchmdnet.datasets.frames import FORMAT, Frames
from torchmdnet.errors import DataError
from torchmdnet.files import expanded
from torchmdnet.parse import parse_json

__all__ = ["cache_folder", "cached_frames", "digest"]

logger = logging.getLogger(__name__)

#: Entries below this size are read into memory, larger ones are mapped.
IN_MEMORY_BYTES = 256 * 2**20

#: Checksum of the notes, as ``sha256sum -c`` reads it; ``frames.json`` has those of everything else.
_SUMS = "sha256sums"

Build = Callable[[Path | None], tuple[Frames, dict[str, Any]]]


def cache_folder() -> Path:
    """``$TORCHMDNET_CACHE``, else ``torchmdnet`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("TORCHMDNET_CACHE")
    if own:
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torchmdnet"


def digest(files: Iterable[str | Path], arguments: dict[str, Any]) -> str:
    """SHA-256 over the content of files, in order, and over everything else that shapes the result."""
    whole = hashlib.sha256(json.dumps({**arguments, "layout": FORMAT}, sort_keys=True, default=repr).encode())
    for path in files:
        part = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                part.update(block)
        whole.update(part.digest())
    return whole.hexdigest()


def cached_frames(kind: str, key: str, build: Build) -> tuple[Frames, dict[str, Any]]:
    """Frames from the cache, or built and put there.

    Args:
        kind: Folder for one kind of source.
        key: Digest of everything the frames depend on.
        build: Called with the folder to write to, or with None to collect in memory; returns the frames and notes
            (anything that JSON can hold) to be kept with them.

    Returns:
        The frames and the notes.
    """
    entry = cache_folder() / kind / key[:40]
    try:
        found = _open(entry)
        if found is not None:
            return found
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(entry.parent)
        with _turn(entry.with_suffix(".lock")):
            found = _open(entry, quiet=True)  # another process may have been faster
            if found is None:
                _write(entry, build)
                found = _open(entry)
        if found is not None:
            return found
        logger.warning("The cache entry %s was written but cannot be read back; the data are kept in memory.", entry)
    except OSError as error:
        logger.warning("The cache %s cannot be used (%s); the data are kept in memory.", entry.parent, error)
    return build(None)


def _open(entry: Path, quiet: bool = False) -> tuple[Frames, dict[str, Any]] | None:
    if not entry.is_dir():
        return None
    try:
        if not (entry / _SUMS).exists():  # of an earlier version
            return None
        if (entry / _SUMS).read_bytes() != _sums(entry):
            raise DataError(f"{entry}: notes.json does not match its checksum.")
        frames = Frames.open(entry, verify=True)
        notes = parse_json((entry / "notes.json").read_bytes(), str(entry))
        if frames.nbytes < IN_MEMORY_BYTES:
            frames = Frames.open(entry, in_memory=True)
        return frames, notes
    except (DataError, OSError, ValueError) as error:
        if not quiet:
            logger.warning("A cache entry is damaged and will be made again: %s", error)
        return None


def _sums(entry: Path) -> bytes:
    return f"{hashlib.sha256((entry / 'notes.json').read_bytes()).hexdigest()}  notes.json\n".encode()


def _write(entry: Path, build: Build) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
    try:
        _, notes = build(scratch)
        (scratch / "notes.json").write_text(json.dumps(notes))
        (scratch / _SUMS).write_bytes(_sums(scratch))
        if entry.exists():  # damaged: step aside first, a rename cannot replace a full folder
            aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
            entry.rename(aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
        try:
            scratch.rename(entry)
        except OSError:
            if not entry.is_dir():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(folder: Path, age: float = 86400.0) -> None:
    """Scratch folders of processes that were killed a day ago or earlier."""
    for path in folder.glob("*.tmp-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait for other processes on this machine; without file locks everyone works on their own copy."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        with open(path, "w") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    finally:
        with suppress(OSError):
            path.unlink()
