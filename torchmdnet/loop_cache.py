"""Compiled loops on disk, so that a machine compiles each of them once.

Numba's own cache does not tell one loop compiled with different options apart, does not notice that a helper in another
file has changed, and raises an error where neither the package's folder nor the home folder
can be written. :func:`jit` compiles like ``numba.njit`` and keeps the result here instead.

An entry is one file. Its name holds everything the machine code depends on, so a file either fits or is not looked at:

============  =====================================================================================================
function      module and name, readable
options       a digest of what it is compiled with
machine       a digest of the signature, the processor and its features, and the releases of Numba, llvmlite and Python
source        a digest of the module's source and of all modules of this package that it imports
============  =====================================================================================================
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from filelock import FileLock, Timeout
from numba.core import event, serialize
from numba.core.compiler import CompileResult

from torchmdnet.files import private_temporary_folder

__all__ = ["LoopCache", "folders", "interrupt", "jit"]

log = logging.getLogger(__name__)

#: Days after which an entry that no process has read is deleted.
DAYS = 60
#: Seconds for which a process waits for another that compiles the same loop, before it compiles the loop itself.
PATIENCE = 300.0

_PACKAGE = Path(__file__).resolve().parent
_DIGEST = hashlib.sha256


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with these options, with machine code kept on disk.

    Two dispatchers of one function with different options, such as ``boundscheck=True``, are kept apart.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        dispatcher._cache = LoopCache(function, options)
        return dispatcher

    return decorate


class LoopCache:
    """Machine code of one function, compiled with one set of options, for every signature; what a dispatcher asks.

    A damaged or truncated file counts as absent and is replaced. Of several processes that need the same loop at once
    one compiles it, while the others wait for at most :data:`PATIENCE` seconds.

    Args:
        function: The Python function.
        options: What it is compiled with.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._name = f"{function.__module__.removeprefix('torchmdnet.')}.{function.__qualname__}"
        self._name = re.sub(r"[^\w.]", "_", self._name)
        self._options = ", ".join(f"{key}={_sorted(value)}" for key, value in sorted(options.items()))
        self._source = source_digest(function.__module__)
        self._locks: dict[Any, FileLock] = {}
        self._is_enabled = True

    @property
    def cache_path(self) -> str | None:
        folder = next(iter(folders()), None)
        return None if folder is None else str(folder)

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False

    def flush(self) -> None:
        for folder in folders():
            for path in folder.glob(f"{self._name}-{_short(self._options)}-*"):
                _delete(path)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The machine code for a signature, or None; the caller then compiles it and calls :meth:`save_overload`."""
        if not self._is_enabled:
            return None
        target_context.refresh()
        entry = self._entry(sig, target_context)
        for folder in folders():
            found = _read(folder / entry, target_context)
            if found is not None:
                return found
        folder = writable_folder()
        if folder is None:
            return None
        lock = FileLock(folder / f"{entry}.lock", timeout=PATIENCE)
        if not _acquired(lock):
            return None
        found = _read(folder / entry, target_context)  # while this process waited, another may have compiled it
        if found is None:
            self._locks[sig] = lock
            _HELD.append(lock)
        else:
            _release(lock)
        return found

    def save_overload(self, sig: Any, cres: CompileResult) -> None:
        """Keep the machine code for a signature."""
        if not self._is_enabled:
            return
        lock = self._locks.pop(sig, None)
        try:
            folder = writable_folder()
            if folder is not None and not cres.lifted and not cres.library.has_dynamic_globals:
                entry = self._entry(sig, cres.target_context)
                _write(folder / entry, serialize.dumps(cres._reduce()))
                for path in folder.glob(f"{entry.rpartition('-')[0]}-*.loop"):
                    if path.name != entry:  # the same loop before the package was updated
                        _delete(path)
        finally:
            if lock is not None:
                _release(lock)

    def _entry(self, sig: Any, target_context: Any) -> str:
        machine = (sig, target_context.codegen().magic_tuple(), _releases(), _settings())
        return f"{self._name}-{_short(self._options)}-{_short(machine)}-{self._source}.loop"


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _short(value: Any) -> str:
    return _DIGEST(str(value).encode()).hexdigest()[:16]


@functools.cache
def _releases() -> str:
    return f"numba {numba.__version__}, llvmlite {llvmlite.__version__}, python {sys.implementation.cache_tag}"


def _settings() -> list[Any]:
    """Settings of Numba's, from its environment variables, which change what it compiles."""
    names = ("BOUNDSCHECK", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_AVX", "DEBUGINFO_DEFAULT")
    return [getattr(numba.config, name, None) for name in names]


#: Modules without loops of their own. How they compile is in the options.
_COMPILERS = (__name__, "torchmdnet.ops.kernels.compiling")


@functools.cache
def source_digest(module: str) -> str:
    """A digest of a module's source and of the modules of this package that it imports, directly or not."""
    digest, seen, waiting = _DIGEST(), set(_COMPILERS), [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sys.modules:
            continue
        seen.add(name)
        source = Path(sys.modules[name].__file__ or "").read_bytes()
        digest.update(name.encode() + source)
        imports = re.findall(rb"^(?:from|import) (torchmdnet[\w.]*)", source, re.MULTILINE)
        waiting += sorted({found.decode() for found in imports}, reverse=True)
    return digest.hexdigest()[:16]


@functools.cache
def folders() -> tuple[Path, ...]:
    """Folders in which compiled loops are looked for, in this order; new ones go to the first that can be written.

    ``NUMBA_CACHE_DIR`` where it is set, else the package's own ``__pycache__``, and the user's cache folder
    (``XDG_CACHE_HOME``, ``~/.cache``). Within folders that installations share, each has one of its own.
    """
    own = f"torchmdnet/{_PACKAGE.parent.name}-{_short(_PACKAGE)}"
    explicit = numba.config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    if explicit:
        return (Path(explicit) / own,)
    found = [_PACKAGE / "__pycache__" / "loops"]
    with contextlib.suppress(RuntimeError):  # no home folder
        found.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / own)
    return tuple(found)


@functools.cache
def writable_folder() -> Path | None:
    """The folder for new entries, or None where no folder can be written, which the log says once."""
    for folder in folders():
        if _can_write(folder):
            _prune(folder)
            return folder
    tried = ", ".join(str(folder) for folder in folders())
    folder = _temporary_folder()
    if folder is None:
        log.warning("Compiled loops cannot be kept: no access to %s. Each process compiles its own. %s", tried, _ADVICE)
    else:
        log.warning("Compiled loops are kept in %s until that is cleared: no access to %s. %s", folder, tried, _ADVICE)
    return folder


_ADVICE = "Set NUMBA_CACHE_DIR to a folder that can be written."


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _temporary_folder() -> Path | None:
    folder = private_temporary_folder()
    own = None if folder is None else folder / _short(_PACKAGE)
    return own if own is not None and _can_write(own) else None


def _prune(folder: Path) -> None:
    """Delete entries that no process has read for :data:`DAYS` days, those of other installations too."""
    oldest = time.time() - DAYS * 86400
    with contextlib.suppress(OSError):
        for path in folder.parent.glob("*/*.loop*"):
            if path.stat().st_mtime < oldest:
                _delete(path)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _read(path: Path, target_context: Any) -> CompileResult | None:
    """The machine code in a file; None where there is no file, or not the bytes that were written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = _DIGEST().digest_size
    if _DIGEST(content[size:]).digest() != content[:size]:
        return None
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > 86400:
            os.utime(path)  # still in use
    return CompileResult._rebuild(target_context, *pickle.loads(content[size:]))


def _write(path: Path, payload: bytes) -> None:
    """Write a file at once or not at all."""
    with contextlib.suppress(OSError):  # a full disk: the loop runs, and is compiled again the next time
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_DIGEST(payload).digest() + payload)
            os.chmod(temporary, 0o644)  # readable for every user of the package
            os.replace(temporary, path)
        except BaseException:
            _delete(Path(temporary))
            raise


#: Locks of loops that this process is compiling.
_HELD: list[FileLock] = []


def _acquired(lock: FileLock) -> bool:
    """Wait for a lock; False where that takes too long, or on network file systems without locks."""
    for _ in range(5):
        try:
            lock.acquire()
            return True
        except Timeout:
            return False
        except (OSError, NotImplementedError):  # its last holder deleted the file at this moment
            time.sleep(0.05)
    return False


def _release(lock: FileLock) -> None:
    with contextlib.suppress(ValueError):
        _HELD.remove(lock)
    with contextlib.suppress(OSError):
        lock.release()
    _delete(Path(lock.lock_file))


class _Progress(event.Listener):
    """Tells that loops are being compiled, and how long it took.

    The messages are warnings of the logger ``torchmdnet.loop_cache``, which Python shows where logging is not set up: a
    first evaluation would otherwise be silent for half a minute. Workers of another process say nothing.
    """

    #: Seconds without compiling after which the time is told, and of compiling after which it is announced.
    PAUSE, NOTICE = 2.0, 1.0

    def __init__(self) -> None:
        self._depth, self._is_told = 0, False
        self._began = self._ended = 0.0
        self._number = 0  # of loops so far
        self._asked: BaseException | None = None
        self._thread = 0  # that compiles
        self._timer: threading.Timer | None = None
        self._notice: threading.Timer | None = None

    def interrupt(self, error: BaseException) -> bool:
        """See :func:`interrupt`."""
        is_heard = self._depth > 0 and self._asked is None and self._thread == threading.get_ident()
        if is_heard:
            self._asked = error
        return is_heard

    def _raise(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            raise asked

    def on_start(self, event: Any) -> None:
        self._raise()
        self._thread = threading.get_ident()
        function = getattr((event.data or {}).get("dispatcher"), "py_func", None)
        self._depth += 1
        if self._timer is not None:
            self._timer.cancel()
        module = getattr(function, "__module__", "")
        if not module.startswith("torchmdnet."):
            return
        if self._depth == 1 and not (self._is_told or _is_worker()):
            self._announce(module)
        if self._began:
            return
        self._began = time.monotonic()

    def _announce(self, module: str) -> None:
        """Say, after a second, that loops of a module are compiled, if that is still going on."""
        self._number += 1
        self._notice = threading.Timer(self.NOTICE, self._tell, [self._number, module])
        self._notice.daemon = True
        self._notice.start()

    def _tell(self, number: int, module: str) -> None:
        if self._number != number or self._is_told or not self._depth:
            return
        self._is_told = True
        when = "once, until the package is updated" if writable_folder() else "in every run"
        log.warning("Compiling loops for %s, which takes half a minute or so, %s.", _purpose(module), when)

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if event._exc_details is not None:  # event.is_failed is true where nothing failed, and only there
            for lock in reversed(_HELD[-1:]):
                _release(lock)
        self._raise()
        if not self._began or self._depth:
            return
        self._ended = time.monotonic()
        self._timer = threading.Timer(self.PAUSE, self.close)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Say how long it took."""
        took = self._ended - self._began
        if self._began and not self._depth and took >= self.NOTICE and not _is_worker():
            log.warning("Compiled loops for %.0f s.", took)
        self._began = 0.0


#: What the loops of a module are for.
_PURPOSES = {
    "torchmdnet.neighbors": "the neighbour search",
    "torchmdnet.ops.kernels.loops.algebra": "the atoms of the model",
    "torchmdnet.ops.kernels.loops.attention": "attention",
    "torchmdnet.ops.kernels.loops": "the edges of the model",
    "torchmdnet.ops.kernels": "the model",
    "torchmdnet.datasets": "reading data",
}


def _purpose(module: str) -> str:
    """What the loops of a module are for, in words."""
    return next((words for name, words in _PURPOSES.items() if module.startswith(name)), "this processor")


def interrupt(error: BaseException) -> bool:
    """Raise an error between two parts of the loop that is being compiled, for handlers of signals.

    LLVM calls back into Python, where an error that a handler raises is lost.

    Returns:
        Whether this thread is compiling a loop and was not asked before; nothing is raised otherwise.
    """
    return _progress.interrupt(error)


def _is_worker() -> bool:
    return multiprocessing.parent_process() is not None or os.environ.get("LOCAL_RANK", "0") != "0"


_progress = _Progress()
event.register("numba:compile", _progress)
atexit.register(_progress.close)
