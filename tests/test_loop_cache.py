"""Compiled loops are kept on disk, each as what it is, wherever something can be written."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import pytest
from conftest import WITHOUT_RIGHTS
from daily import daily
from numba.core import event

from torchmdnet import loop_cache

#: A function and its helper in modules of their own, as quick to compile as any.
HELPER = """
from torchmdnet.loop_cache import jit

@jit()
def double(x):
    return 2 * x
"""
PLAIN = """
import torchmdnet_helper
from torchmdnet.loop_cache import jit
from torchmdnet_helper import double

@jit()
def fill(x):
    return double(x)
"""
CALL_PLAIN = """
import os, threading
from torchmdnet_example import fill
found = []
threads = [threading.Thread(target=lambda: found.append(fill(1.0))) for _ in range(int(os.environ["THREADS"]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == [2 * 1.0] * len(threads) or found == [3.0]
print(found[0], "compiled" if sum(fill.stats.cache_misses.values()) else "loaded")
"""
LOOPS = """
from torchmdnet.ops.kernels.sharing import claimed, compiled

@compiled
def fill(job, x, out):
    for i in claimed(job, x.shape[0]):
        out[i] = 2 * x[i]
"""
#: Does it with a little work and with much, as the arguments say, and tells whether it was compiled.
CALL_LOOPS = """
import sys
import numpy as np, torch
from torchmdnet_loops import fill
torch.set_num_threads(2)
x, out = np.arange(1000.0), np.zeros(1000)
for size in sys.argv[1:]:
    out[:] = 0
    fill({"small": 1, "large": 10**9}[size], x, out)
    assert (out == 2 * x).all()
print("compiled" if sum(fill.entry.stats.cache_misses.values()) else "loaded")
"""
#: Numbers of a loop that LLVM, optimizing it once more, adds up in another order.
CALL_REFINE = """
import numpy as np
from torchmdnet.ops.kernels.loops import algebra
rng = np.random.default_rng(0)
X, D, out = (rng.normal(size=(9, 9, 8)).astype(np.float32) for _ in range(3))
algebra.refine(1, X, D, rng.normal(size=9).astype(np.float32), out)
print(out.tobytes().hex(), "compiled" if sum(algebra.refine.entry.stats.cache_misses.values()) else "loaded")
"""

Call = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Run code in a process of its own, beside the modules above, with a cache that is empty at first."""
    modules = tmp_path / "code"
    modules.mkdir()
    for name, source in (("helper", HELPER), ("example", PLAIN), ("loops", LOOPS)):
        (modules / f"torchmdnet_{name}.py").write_text(source)

    def run(*sizes: str, threads: int = 1, code: str = "", **environment: str) -> subprocess.CompletedProcess:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "OMP_"))}
        path = os.pathsep.join([str(modules), *sys.path])
        settings = {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "THREADS": str(threads)}
        return subprocess.run(
            [*WITHOUT_RIGHTS, sys.executable, "-c", code or (CALL_LOOPS if sizes else CALL_PLAIN), *sizes],
            env=kept | settings | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def entries(tmp_path: Path, pattern: str = "*.loop") -> list[Path]:
    return sorted((tmp_path / "cache").rglob(pattern))


def told(end: subprocess.CompletedProcess) -> str:
    assert end.returncode == 0, end.stderr
    return end.stdout.strip()


@pytest.mark.parametrize("sizes", [pytest.param(("small", "large"), marks=pytest.mark.slow), ("large", "small")])
def test_one_compilation_serves_one_thread_and_several(sizes: tuple[str, str], call: Call, tmp_path: Path) -> None:
    assert told(call(sizes[0])) == "compiled"
    files = entries(tmp_path)
    assert told(call(sizes[1])) == "loaded"
    assert entries(tmp_path) == files


def test_an_edited_helper_is_compiled_again_and_the_old_code_goes(call: Call, tmp_path: Path) -> None:
    assert told(call()) == "2.0 compiled"
    before = entries(tmp_path)
    helper = tmp_path / "code" / "torchmdnet_helper.py"
    helper.write_text(helper.read_text().replace("2 * x", "3 * x"))
    assert told(call()) == "3.0 compiled"
    after = entries(tmp_path)
    assert len(after) == len(before) == 2
    assert not set(after) & set(before)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[99] ^= 1
    path.write_bytes(bytes(content))


def put_a_folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


#: What may have happened to an entry of the cache.
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "cut off after its digest": lambda path: path.write_bytes(path.read_bytes()[:32]),
    "empty": lambda path: path.write_bytes(b""),
    "zero-filled": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": flip_a_bit,
    "a link to nothing": link_to_nothing,
    "locked by a process that was killed": lambda path: path.unlink() or path.with_name(f"{path.name}.lock").touch(),
}
#: What a user can meet who may not replace it.
OBSTACLES: dict[str, Callable[[Path], Any]] = {
    "unreadable": lambda path: path.chmod(0),
    "in an unreadable folder": lambda path: path.parent.chmod(0),
    "in a folder that cannot be written": lambda path: (path.write_bytes(b""), path.parent.chmod(0o555)),
    "a folder": put_a_folder_in_its_place,
}


@pytest.mark.parametrize("damage", daily(DAMAGE, "truncated", "a bit flipped", "locked by a process that was killed"))
def test_a_damaged_file_counts_as_none(call: Call, tmp_path: Path, damage: str) -> None:
    told(call())
    for path in entries(tmp_path):
        DAMAGE[damage](path)
    assert told(call()) == "2.0 compiled"
    assert told(call()) == "2.0 loaded"
    assert not entries(tmp_path, "*.lock")


@pytest.mark.skipif(sys.platform != "linux", reason="root loses its rights by a program of Linux")
@pytest.mark.parametrize("obstacle", daily(OBSTACLES, "unreadable", "in a folder that cannot be written"))
def test_what_cannot_be_replaced_is_compiled_all_the_same(call: Call, tmp_path: Path, obstacle: str) -> None:
    told(call())
    for path in entries(tmp_path):
        OBSTACLES[obstacle](path)
    try:
        assert told(call(TMPDIR=str(tmp_path))) == "2.0 compiled"
    finally:
        for folder in (tmp_path / "cache").rglob("*"):
            folder.chmod(0o755)


def test_processes_that_start_together_compile_once(call: Call, tmp_path: Path) -> None:
    """Each in two threads, with a cache that is cold, then with one whose entries are all damaged."""
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            ends = sorted(told(end) for end in pool.map(lambda _: call(threads=2), range(4)))
        assert ends == ["2.0 compiled", "2.0 loaded", "2.0 loaded", "2.0 loaded"]
        assert not entries(tmp_path, "*.lock")
        for path in entries(tmp_path):
            path.write_bytes(bytes(path.stat().st_size))


def test_code_goes_to_the_cache_of_the_user_where_the_package_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, home, temporary = tmp_path / "package", tmp_path / "home", tmp_path / "temporary"
    for folder in (package, home, temporary):
        folder.mkdir()
    blocked = tmp_path / "file"
    blocked.write_text("a folder cannot be made below a file")
    monkeypatch.setattr(loop_cache.numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr(loop_cache.tempfile, "tempdir", str(temporary))

    def chosen() -> Path | None:
        loop_cache.folders.cache_clear()
        loop_cache.writable_folder.cache_clear()
        return loop_cache.writable_folder()

    try:
        monkeypatch.setattr(loop_cache, "_PACKAGE", package)
        assert chosen() == package / "__pycache__" / "loops"
        monkeypatch.setattr(loop_cache, "_PACKAGE", blocked)
        folder = chosen()
        assert folder is not None
        assert folder.parent == home / "torchmdnet"
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        folder = chosen()
        assert folder is not None
        assert folder.is_relative_to(temporary)
        folder.parent.chmod(0o777)  # others could put machine code there
        assert chosen() is None
        monkeypatch.setattr(loop_cache.numba.config, "CACHE_DIR", str(home / "mine"))
        folder = chosen()
        assert folder is not None
        assert folder.is_relative_to(home / "mine")
    finally:
        monkeypatch.undo()
        loop_cache.folders.cache_clear()
        loop_cache.writable_folder.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is the one place where not even root can make a folder")
def test_a_loop_runs_where_nothing_can_be_written(call: Call, tmp_path: Path) -> None:
    blocked = {"NUMBA_CACHE_DIR": "/proc/nowhere", "HOME": "/proc/nowhere"}
    (tmp_path / "temporary").mkdir()
    first, second = (call(**blocked, TMPDIR=str(tmp_path / "temporary")) for _ in range(2))
    assert (told(first), told(second)) == ("2.0 compiled", "2.0 loaded")
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / f"torchmdnet-{os.getuid()}").write_text("a folder cannot be made here")
    nowhere = call(**blocked, TMPDIR=str(tmp_path / "temporary"))
    assert told(nowhere) == "2.0 compiled"
    for end in (first, second, nowhere):
        assert end.stderr.count("Set NUMBA_CACHE_DIR to a folder that can be written") == 1


def test_what_is_no_longer_used_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "torchmdnet" / "here"
    other = tmp_path / "torchmdnet" / "removed"
    for place in (folder, other):
        place.mkdir(parents=True)
        for name in ("a-1-2-3.loop", "b-1-2-3.loop", "b-1-2-3.loop.lock"):
            (place / name).touch()
    (other / "notes.txt").touch()
    long_ago = time.time() - (loop_cache.DAYS + 1) * 86400
    for place in (folder, other):
        for path in (place / "a-1-2-3.loop", place / "b-1-2-3.loop.lock"):
            os.utime(path, (long_ago, long_ago))
    os.utime(other / "notes.txt", (long_ago, long_ago))
    loop_cache._prune(folder)
    assert sorted(str(path.relative_to(tmp_path / "torchmdnet")) for path in tmp_path.rglob("*.*")) == [
        "here/b-1-2-3.loop",
        "removed/b-1-2-3.loop",
        "removed/notes.txt",
    ]


def test_a_first_call_tells_that_it_compiles_and_how_long_it_took(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = loop_cache._Progress()
    progress.NOTICE = 0.0  # type: ignore[misc]
    dispatcher = type("Dispatcher", (), {"py_func": loop_cache.folders})
    calls = ((progress.on_start, event.EventStatus.START), (progress.on_end, event.EventStatus.END))
    with caplog.at_level(logging.WARNING, logger=loop_cache.__name__):
        for listen, status in calls * 2:
            listen(event.Event("numba:compile", status, data={"dispatcher": dispatcher}))
            assert progress._notice is not None
            progress._notice.join()
        progress.close()
    assert "Compiling loops for this processor, which" in caplog.text
    assert [record.message.split(" ")[0] for record in caplog.records] == ["Compiling", "Compiled"]


def test_what_compiles_in_a_moment_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    progress = loop_cache._Progress()
    dispatcher = type("Dispatcher", (), {"py_func": loop_cache.folders})
    with caplog.at_level(logging.WARNING, logger=loop_cache.__name__):
        progress.on_start(event.Event("numba:compile", event.EventStatus.START, data={"dispatcher": dispatcher}))
        assert progress._depth == 1
        progress.on_end(event.Event("numba:compile", event.EventStatus.END, data={"dispatcher": dispatcher}))
        assert progress._depth == 0
        progress._tell(progress._number, "torchmdnet.neighbors.brute")
        progress.close()
    assert not caplog.records


def test_a_signal_is_heard_between_two_parts_of_what_is_compiled() -> None:
    from torchmdnet.config.stopping import Stopped, stop_signals

    progress = loop_cache._progress
    dispatcher = type("Dispatcher", (), {"py_func": len})  # not ours, and not announced
    started = event.Event("numba:compile", event.EventStatus.START, data={"dispatcher": dispatcher})
    ended = event.Event("numba:compile", event.EventStatus.END, data={"dispatcher": dispatcher})
    with stop_signals():
        progress.on_start(started)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            progress.on_end(ended)
        progress.on_start(started)
        progress.on_end(ended)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_messages_name_what_loops_are_for() -> None:
    assert loop_cache._purpose("torchmdnet.neighbors.brute") == "the neighbour search"
    assert loop_cache._purpose("torchmdnet.ops.kernels.loops.message") == "the edges of the model"
    assert loop_cache._purpose("torchmdnet.ops.kernels.sharing") == "the model"
    assert loop_cache._purpose("torchmdnet.stacking") == "this processor"


def test_numbers_are_the_same_in_the_process_that_compiles_and_in_those_that_read(call) -> None:
    first, second = told(call(code=CALL_REFINE)).split(), told(call(code=CALL_REFINE)).split()
    assert [first[1], second[1]] == ["compiled", "loaded"]
    assert first[0] == second[0]


def test_digest_follows_imports() -> None:
    from torchmdnet.ops.kernels import simd
    from torchmdnet.ops.kernels.loops import algebra

    assert loop_cache.source_digest(algebra.__name__) != loop_cache.source_digest(simd.__name__)
    text = Path(algebra.__file__).read_text()
    assert "\nfrom torchmdnet.ops.kernels.simd import" in text  # in the form that the digest looks for


@loop_cache.jit()
def halved(x):
    return x / 2


@loop_cache.jit()
def impossible(x):
    return x.nothing


def test_a_lock_is_held_until_the_code_is_written_or_compiling_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held, write = [], loop_cache._write

    def note(path: Path, payload: bytes) -> None:
        held.append([Path(lock.lock_file).name for lock in loop_cache._HELD] == [f"{path.name}.lock"])
        write(path, payload)

    monkeypatch.setattr(loop_cache, "_write", note)
    monkeypatch.setattr(loop_cache, "writable_folder", lambda: tmp_path)
    monkeypatch.setattr(loop_cache, "folders", lambda: (tmp_path,))
    assert halved(3.0) == 1.5
    assert held == [True]
    with pytest.raises(numba.TypingError):
        impossible(3.0)
    assert loop_cache._HELD == []
    assert [path.suffix for path in tmp_path.iterdir()] == [".loop"]
