"""Files that are whole or not there, written beside their place and moved into it; and folders of a user alone."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import select
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torchmdnet.errors import ConfigError, WriteError
from torchmdnet.text import check_text

__all__ = [
    "STORAGE_ERRORS",
    "check_target",
    "draft_of",
    "ensure_home",
    "expanded",
    "is_one_of",
    "not_a_file",
    "plain",
    "private_temporary_folder",
    "reader_may_end",
    "unwritten",
    "write_json",
]

log = logging.getLogger(__name__)

#: What the system says of a full, broken, lost or protected disk.
STORAGE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
    | {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTDIR}
)
#: Bytes left on a disk below which it counts as full.
_FULL = 1 << 20


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` filled in, as far as there is such a user.

    A folder that is itself called ``~``, written ``./~``, is given with its whole path: a ``Path`` leaves out ``./``,
    and would mean the home folder where it is filled in again.
    """
    filled = Path(os.path.expanduser(os.fspath(path)))
    return filled.absolute() if os.path.expanduser(filled) != str(filled) else filled


def check_target(path: str | os.PathLike[str], key: str) -> Path:
    """A file that can be written, found out before the work whose result it will hold.

    Folders above it that are not there yet are not made, but whether they could be is looked at.

    Args:
        path: The file.
        key: What names it; it opens the message of an error.

    Returns:
        The path with ``~`` filled in.

    Raises:
        ConfigError: If it is a folder or no regular file, or if nothing can be written beside it.
    """
    path = expanded(check_text(os.fspath(path), key))
    try:
        if path.is_dir():
            raise ConfigError(f"{key}: {str(path)!r} is a folder. Name a file.")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{key}: {str(path)!r} is no regular file, so it cannot be replaced. Name another.")
        folder = path.absolute().parent
        if ".." in folder.parts and not folder.exists():
            raise ConfigError(
                f"{key}: {str(path)!r} leads through a folder that is not there. Make it, or leave it out."
            )
        while not folder.exists():
            folder = folder.parent
        trial = folder / _draft_name(path)
        with open(trial, "wb"):
            pass
        trial.unlink(missing_ok=True)
    except OSError as error:
        where = error.strerror or str(error)
        raise ConfigError(f"{key}: {str(path)[:200]!r} cannot be written: {where}. Choose another.") from error
    return path


def not_a_file(path: str | os.PathLike[str]) -> str | None:
    """Why nothing can be read from a path, in words that follow a key; None of a regular file."""
    path = expanded(path)
    try:
        if path.is_file():
            return None
        if path.is_dir():
            return f"{str(path)!r} is a folder, not a file."
        if path.exists():
            return f"{str(path)!r} is no regular file."
    except (OSError, ValueError) as error:  # no access, a name that is too long
        reason = error.strerror if isinstance(error, OSError) else None
        return f"{str(path)[:200]!r} cannot be read: {reason or error}."
    return f"there is no file {str(path)!r}."


@contextmanager
def draft_of(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path that replaces ``path`` when the block ends well; otherwise ``path`` stays as it was.

    Raises:
        WriteError: If the disk is full or the folder cannot be written.
    """
    path = Path(path)
    draft = path.with_name(_draft_name(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        number = _storage_error(error, path, draft)
        if number is None:
            raise
        reason = os.strerror(number) if number else str(error).strip().splitlines()[0]
        raise unwritten(path, reason, number or None) from error
    finally:
        with suppress(OSError):  # of a folder that went or is read-only
            draft.unlink(missing_ok=True)


def is_one_of(target: Path, paths: Iterable[str | os.PathLike[str]]) -> bool:
    """Whether a file that is about to be written is one of those that are read, under whatever name."""
    return target.exists() and any(os.path.exists(path) and target.samefile(path) for path in paths)


def unwritten(path: Path, reason: str, number: int | None = None) -> WriteError:
    """The error for a file that could not take its place.

    Args:
        path: The file.
        reason: Why.
        number: The ``errno`` behind it, if it is known.
    """
    left = "The file that was there is unchanged." if path.exists() else "Nothing is left of it."
    return WriteError(f"{path} could not be written: {reason}. {left}", number, reason)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null, arrays lists, and what is unknown text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # of NumPy and PyTorch
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON, whole or not at all; see :func:`plain` for what becomes of values that it cannot hold."""
    with draft_of(path) as draft:
        draft.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _storage_error(error: OSError | RuntimeError, path: Path, draft: Path) -> int | None:
    """The ``errno`` of an error in writing a draft, 0 if it is not known, None of any other error."""
    if isinstance(error, WriteError):
        return None
    if isinstance(error, OSError):
        ours = {os.fspath(name) for name in (draft, path, path.parent)}
        if error.errno in STORAGE_ERRORS:
            return error.errno if error.filename is None or os.fspath(error.filename) in ours else None
        return error.errno if error.filename is not None and os.fspath(error.filename) in ours else None
    text = str(error)  # PyTorch writes with streams of C++, which keep no number
    if not any(sign in text for sign in ("PytorchStreamWriter", "inline_container", os.fspath(draft))):
        return None
    with suppress(OSError):
        if shutil.disk_usage(path.parent).free < _FULL:
            return errno.ENOSPC
    return 0


def _draft_name(path: Path) -> str:
    return f".{path.name}.{os.getpid()}.tmp"


@contextmanager
def reader_may_end() -> Iterator[None]:
    """End the program quietly where what reads its standard output, such as ``head``, has ended.

    Raises:
        SystemExit: Then, with the status that shells give to ``SIGPIPE``.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if _is_read(sys.stdout):
            raise  # of another pipe
        with suppress(OSError, ValueError):  # so that the interpreter does not fail to flush it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _is_read(stream: IO[str]) -> bool:
    """False for a pipe that has no reader any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # systems without, and streams that are no file
        return True


def private_temporary_folder() -> Path | None:
    """A temporary folder of this user's alone, into which others cannot put anything; None where there can be none."""
    try:
        user = os.getuid() if hasattr(os, "getuid") else 0
        folder = Path(tempfile.gettempdir()) / f"torchmdnet-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat(follow_symlinks=False)
        is_private = not hasattr(os, "getuid") or (status.st_uid == user and status.st_mode & 0o777 == 0o700)
        return folder if is_private else None
    except OSError:  # no temporary folder
        return None


def ensure_home() -> None:
    """Give a user without a home folder, as in many containers, a temporary one: ASE cannot be imported without.

    Raises:
        ConfigError: If there cannot be one.
    """
    if os.path.expanduser("~") != "~":
        return
    folder = private_temporary_folder()
    if folder is None:
        raise ConfigError("HOME: it is not set, and this user has no home folder. Set HOME to a folder.")
    os.environ["HOME"] = str(folder)
    log.warning("This user has no home folder: %s takes its place. Set HOME to a folder that is kept.", folder)
