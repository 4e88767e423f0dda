"""Fetching published files.

A file is collected under a temporary name, resumed after an interruption, compared with its checksum, and only then
gets its name: what stands at the final path is complete. The SHA-256 of every file is noted beside it when it is used
for the first time (``<file>.sha256``, readable by ``sha256sum -c``) and compared whenever the file is read again. One
process fetches, others wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from torchmdnet._version import __version__
from torchmdnet.datasets.files import expand
from torchmdnet.errors import DataError
from torchmdnet.parse import parse_json

__all__ = ["FULL", "Remote", "damaged", "disk_full", "fetch", "locked", "noted", "sha256", "unpack", "verify"]

logger = logging.getLogger(__name__)

#: Seconds without a byte after which a connection counts as stalled.
TIMEOUT = 60.0
#: Attempts in a row that may fail without bringing anything new.
RETRIES = 5
#: Seconds before the second attempt; doubled for each further one, up to a minute.
WAIT = 1.0

#: Numbers of the errors for a disk, a share of it, or a largest file size that is used up.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_BLOCK = 1 << 20


class Remote(NamedTuple):
    """A file that a publisher offers.

    Args:
        path: Where it belongs, relative to the raw folder of the data set.
        urls: Its addresses, tried in order.
        checksum: What the publisher says of it, ``"sha256:..."`` or ``"md5:..."``.
    """

    path: str
    urls: tuple[str, ...]
    checksum: str | None = None


class _Refused(Exception):
    """The server answered, and asking again would not help."""


def fetch(remote: Remote, folder: str | Path, *, what: str, mirror: str | None = None) -> Path:
    """A published file, complete and checked; taken from the folder if it is there already.

    Args:
        remote: The file.
        folder: The raw folder of the data set.
        what: Name of the data set, to open error messages.
        mirror: Take the file from here instead of its publisher: an address, a folder, or the file itself. Default:
            ``$TORCHMDNET_MIRROR``.

    Raises:
        DataError: If the file cannot be had or fails its checksum. Nothing incomplete is left under its name.
    """
    target = Path(folder) / remote.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if target.exists():
            verify(target, remote.checksum, what=what)
            return target
        reasons = []
        for source in _sources(remote, mirror):
            try:
                if source.startswith(("http://", "https://", "ftp://")):
                    _download(source, target, remote, what)
                else:
                    _take(Path(source), target, remote, what)
                return target
            except (_Refused, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise disk_full(target.parent, what) from error
                reasons.append(f"{source} ({_reason(error)})")
        raise DataError(
            f"{what}: {target.name} cannot be fetched from {'; nor from '.join(reasons)}. Get it elsewhere"
            f"{'' if mirror is None else ', for example from ' + remote.urls[0]}, and put it at {target.absolute()}, "
            "or name another place with mirror= (an address, a folder or the file itself) or TORCHMDNET_MIRROR."
        )


def verify(path: Path, checksum: str | None = None, *, what: str) -> str:
    """Compare a file with the checksum noted when it was first used, and note it on first use.

    A file that was put there by hand and is not the one its publisher describes is used with a warning: it may be an
    excerpt. Downloads never come this far with a wrong checksum.

    Returns:
        The SHA-256 of the file.

    Raises:
        DataError: If the file has changed since it was first used.
    """
    before = noted(path)
    wanted = {"sha256"} | ({checksum.partition(":")[0]} if checksum and not before else set())
    found = _digests(path, wanted)
    if before is not None and found["sha256"] != before:
        raise DataError(
            f"{what}: {path} has changed since it was first used: its SHA-256 is {found['sha256']}, noted in "
            f"{_note(path).name} is {before}. Delete the file to fetch it again, or delete the note if the change is "
            "meant."
        )
    if before is None:
        if checksum and found[checksum.partition(":")[0]] != checksum.partition(":")[2]:
            logger.warning(
                "%s: %s is not the file that was published (checksum %s). It is used because it was put there by hand; "
                "delete it to fetch the published one.",
                what,
                path,
                checksum,
            )
        _write_note(path, found["sha256"])
    return found["sha256"]


def damaged(path: str | Path, error: object, what: str) -> DataError:
    """The error for a file that cannot be read. What was noted of it is forgotten, as it can never have been right."""
    if isinstance(error, OSError) and error.errno is not None:  # the machine, not the content
        return DataError(f"{what}: {path} cannot be read ({error}).")
    with contextlib.suppress(OSError):
        _note(Path(path)).unlink(missing_ok=True)
    return DataError(f"{what}: {path} is damaged or of another kind ({error}). Delete it to fetch it again.")


def disk_full(folder: str | Path, what: str) -> DataError:
    """The error for a folder where nothing more can be written."""
    return DataError(
        f"{what}: the disk of {folder} is full, or takes no file so large. Free some space and run again: what was "
        "downloaded so far is kept, and only the rest will be fetched."
    )


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    return _digests(Path(path), {"sha256"})["sha256"]


def unpack(archive: Path, folder: Path, names: Collection[str], *, what: str, optional: Collection[str] = ()) -> None:
    """Take files out of a zip or tar archive.

    Only regular files with these names are written, each under a temporary name until it is complete. Folders may be
    missing or added at the front of a name in the archive.

    Args:
        archive: The archive.
        folder: Where to put the files.
        names: The paths wanted, as they are in the archive and below ``folder``.
        what: Name of the data set, to open error messages.
        optional: Further files to take if the archive has them.

    Raises:
        DataError: If the archive is damaged or lacks one of the files.
    """
    missing = {str(PurePosixPath(name)) for name in names}
    left, seen = {*missing, *optional}, []
    try:
        for name, stream in _members(archive):
            seen.append(str(PurePosixPath(name)))  # drops a leading ./
            path = _wanted_as(seen[-1], left)
            if path is not None:
                with stream() as source:
                    _write(source, folder / path)
                missing.discard(path)
                left.discard(path)
                if not left:
                    return
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise disk_full(folder, what) from error
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the archive
            raise
        raise damaged(archive, error, what) from error
    if not missing:
        return
    raise DataError(
        f"{what}: {archive} does not hold {', '.join(sorted(missing))}, but {', '.join(seen[:10]) or 'nothing'}"
        f"{', ...' if len(seen) > 10 else ''}."
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes away from a path; they wait here. Where files cannot be locked, they do not wait."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    file: IO[Any] | None = None
    try:
        while file is None:
            file = open(lock, "a")  # noqa: SIM115 (open until the end)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Waiting for another process that works on %s.", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_current(file, lock):  # the process before us has cleaned up; this lock guards nothing
                file.close()
                file = None
    except OSError as error:
        logger.debug("%s cannot be locked (%s).", lock, error)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                lock.unlink()
            file.close()


# ------------------------------------------------------------------------------------------------------------ sources


def _sources(remote: Remote, mirror: str | None) -> Sequence[str]:
    mirror = mirror or os.environ.get("TORCHMDNET_MIRROR")
    if not mirror:
        return remote.urls
    name = PurePosixPath(remote.path).name
    if "://" in mirror and not mirror.startswith("file://"):
        return [mirror if mirror.endswith(name) else f"{mirror.rstrip('/')}/{name}"]
    path = Path(expand(mirror.removeprefix("file://")))
    if path.is_dir():
        return [str(path / remote.path) if (path / remote.path).exists() else str(path / name)]
    return [str(path)]


def _take(source: Path, target: Path, remote: Remote, what: str) -> None:
    """Put a local file in its place, without a copy where the file system allows it."""
    if not source.is_file():
        raise _Refused("there is no such file")
    expected = remote.checksum
    found = _digests(source, {"sha256"} | ({expected.partition(":")[0]} if expected else set()))
    if reason := _mismatch(found, expected, target):
        raise DataError(f"{what}: {source} {reason}")
    part = _part(target)
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)
    _write_note(target, found["sha256"])


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, TimeoutError):
        return f"no data for {TIMEOUT:g} s"
    return str(error) or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- download


def _download(url: str, target: Path, remote: Remote, what: str) -> None:
    """Collect an address in ``<target>.part``, and rename it when it is complete and right."""
    if url.startswith("http://") and urllib.parse.urlsplit(url).hostname not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("%s: %s is not encrypted; only the checksum protects it.", what, url)
    part = _part(target)
    for again in (True, False):
        resumed = _collect(url, part, what, has_checksum=remote.checksum is not None)
        found = _digests(part, {"sha256"} | ({remote.checksum.partition(":")[0]} if remote.checksum else set()))
        reason = _mismatch(found, remote.checksum, target)
        if reason is None:
            break
        _discard(part)
        if not (resumed and again):  # a wrong start is the only thing that a second download could put right
            raise DataError(f"{what}: what {url} sends {reason} Nothing was kept.")
    os.replace(part, target)
    _discard(part)
    _write_note(target, found["sha256"])


def _mismatch(found: dict[str, str], stated: str | None, target: Path) -> str | None:
    if stated:
        kind, _, value = stated.partition(":")
        if found[kind] != value:
            return f"has the wrong checksum: {kind.upper()} {found[kind]} instead of {value}."
    before = noted(target)
    if before and found["sha256"] != before:
        return (
            f"is not the file that was used first: SHA-256 {found['sha256']} instead of {before}, noted in "
            f"{_note(target)}. Delete the note if the new file is wanted."
        )
    return None


def _collect(url: str, part: Path, what: str, has_checksum: bool) -> bool:
    """Download until complete, going on where the last attempt stopped. Returns whether a part was used."""
    from tqdm import tqdm

    state = _read_state(part, url)
    resumed, best, failures, error = False, _size(part), 0, None
    with tqdm(desc=f"{what}: {part.name.removesuffix('.part')}", unit="B", unit_scale=True, delay=2.0, leave=False,
              disable=None) as bar:  # fmt: skip
        while failures < RETRIES:
            if error is not None:
                logger.info("%s: %s, trying again.", url, _reason(error))
                time.sleep(min(WAIT * 2.0 ** max(failures - 1, 0), 60.0))
            if not (state.get("validator") or has_checksum):
                part.unlink(missing_ok=True)  # nothing would show that the rest belongs to this start
            resumed |= _size(part) > 0
            try:
                if _attempt(url, part, state, bar):
                    return resumed
                error = OSError("the connection was closed early")
            except urllib.error.HTTPError as problem:
                problem.close()
                if problem.code not in (408, 425, 429) and problem.code < 500:
                    raise
                error = problem
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as problem:
                if isinstance(getattr(problem, "reason", None), ssl.SSLCertVerificationError):
                    raise
                error = problem
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
    assert error is not None
    raise error


def _attempt(url: str, part: Path, state: dict[str, Any], bar: Any) -> bool:
    """One connection. Returns whether the part is complete."""
    have = _size(part)
    if have and have == state.get("total"):
        return True
    headers = {"User-Agent": f"torchmdnet/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if state.get("validator"):
            headers["If-Range"] = state["validator"]
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        _discard(part)  # longer than the file: start again
        return False
    with response:
        validator = _validator(response.headers)
        continues = response.status == 206 and _starts_at(response.headers.get("Content-Range"), have, state)
        continues &= validator in (None, state.get("validator"))  # some servers pay no heed to If-Range
        if have and not continues:
            have = 0
            if response.status == 206:  # the server has another file by now
                _discard(part)
                state.clear()
                return False
        length = response.headers.get("Content-Length")
        state["total"] = have + int(length) if length else None
        state["validator"] = validator or (state.get("validator") if have else None)
        state["url"] = url
        if response.headers.get_content_type() == "text/html":
            _discard(part)
            raise _Refused("the server sends a web page instead of the file")
        _check_space(part, state["total"], have)
        part.with_name(part.name + ".json").write_text(json.dumps(state))
        bar.reset(total=state["total"])
        bar.update(have)
        with open(part, "ab" if have else "wb") as file:
            while block := response.read1(_BLOCK):  # what has come, also when the rest never does
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if not _size(part) and not state["total"]:
        _discard(part)
        raise _Refused("the server sends an empty file")
    return state["total"] is None or _size(part) == state["total"]


def _validator(headers: Any) -> str | None:
    """What a server says by which two versions of a file can be told apart."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _starts_at(content_range: str | None, have: int, state: dict[str, Any]) -> bool:
    """Whether ``bytes 100-199/200`` goes on where we stand, in a file as long as it was before."""
    try:
        unit, _, rest = (content_range or "").partition(" ")
        span, _, total = rest.partition("/")
        first = int(span.partition("-")[0])
    except ValueError:
        return False
    return unit == "bytes" and first == have and (state.get("total") in (None, int(total)) if total != "*" else True)


def _check_space(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise OSError(errno.ENOSPC, f"{total - have} bytes are needed, {free} are free")


# ------------------------------------------------------------------------------------------------------ parts and notes


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_state(part: Path, url: str) -> dict[str, Any]:
    """What is known of a part from an earlier run; a part from another address is dropped."""
    try:
        state = parse_json(part.with_name(part.name + ".json").read_bytes(), str(part))
        if isinstance(state, dict) and state.get("url") == url:
            return state
    except (OSError, ValueError):
        pass
    _discard(part)
    return {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".json").unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def noted(path: Path) -> str | None:
    """The SHA-256 noted when a file was first used, or None."""
    try:
        words = _note(path).read_text().split()
    except OSError:
        return None
    return words[0].lower() if words and len(words[0]) == 64 else None


def _write_note(path: Path, digest: str) -> None:
    try:
        scratch = path.with_name(f"{path.name}.sha256.tmp")
        scratch.write_text(f"{digest}  {path.name}\n")
        os.replace(scratch, _note(path))
    except OSError as error:
        logger.debug("The checksum of %s cannot be noted (%s).", path, error)


def _digests(path: Path, kinds: Collection[str]) -> dict[str, str]:
    found = {kind: hashlib.md5(usedforsecurity=False) if kind == "md5" else hashlib.new(kind) for kind in kinds}
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            for digest in found.values():
                digest.update(block)
    return {kind: digest.hexdigest() for kind, digest in found.items()}


def _is_current(file: IO[Any], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------- archives


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Names of the regular files of an archive, each with a function that opens it."""
    with open(archive, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: file.open(info)
        return
    with tarfile.open(archive, "r:*") as file:
        for member in file:
            if member.isreg():
                yield member.name, lambda member=member: file.extractfile(member)


def _wanted_as(member: str, wanted: Collection[str]) -> str | None:
    """The name under which a member is wanted, if it is."""
    if member in wanted or ".." in PurePosixPath(member).parts:
        return member if member in wanted else None
    return next((name for name in wanted if name.endswith(f"/{member}") or member.endswith(f"/{name}")), None)


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".part")
    try:
        with open(scratch, "wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
