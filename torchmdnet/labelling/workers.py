"""Processes that compute, one piece of work each at a time.

A process that dies, never returns or takes all memory costs its piece and nothing else. None outlives the process that
gives out the work.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.memory import available_memory, total_memory
from torchmdnet.processes import Guard, kill_group, lead_group, memory_of_groups

__all__ = ["Work", "progress_bar", "run"]

logger = logging.getLogger(__name__)

#: Seconds between two lines about the progress where there is no terminal to show a bar on.
REPORT = 30.0
#: Seconds between two looks at the time and the memory that the processes have used.
LOOK = 0.25
#: Seconds for a process to get ready.
PREPARATION = 600.0
#: Share of the available memory that the processes may use together.
MEMORY = 0.9
_MESSAGE = 500


class Work(Protocol):
    """What the processes do; it is sent to each of them once."""

    def prepare(self) -> Callable[[Any], dict[str, Any]]:
        """Load what is needed; the function it returns turns a piece of work into a result that JSON can hold."""
        ...


def run(
    work: Work,
    pieces: Iterable[tuple[str, Any]],
    *,
    processes: int = 1,
    timeout: float | None = None,
    memory: float | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do pieces of work in parallel.

    However this process ends, the others end within seconds, with the programs that they have started.

    Args:
        work: What to do.
        pieces: Key and content of each piece; asked for as processes become free.
        processes: How many processes.
        timeout: Seconds after which a piece is given up. None: never.
        memory: Bytes that the processes may use together; beyond, the piece of the largest one is given up. None: nine
            tenths of what is available now.

    Yields:
        Key and outcome, ``{"result": {...}}`` or ``{"error": "..."}``, in the order in which they are done.

    Raises:
        ConfigError: If the work cannot be prepared at all.
        DataError: If the processes end, run out of memory or take ten minutes before they begin.
    """
    bounds = _Bounds(timeout, memory)
    waiting = iter(pieces)
    upcoming = next(waiting, None)
    workers: list[_Worker] = []
    if upcoming is None:
        return
    guard = Guard()
    try:
        with _threads_shared(processes):
            while upcoming is not None or any(worker.key is not None for worker in workers):
                busy = sum(worker.key is not None for worker in workers)
                if upcoming is not None and len(workers) < processes and busy == len(workers):
                    workers.append(_Worker(work, guard))
                for worker in workers:
                    if upcoming is not None and worker.key is None:
                        worker.give(*upcoming)
                        upcoming = next(waiting, None)
                if upcoming is not None and len(workers) < processes:
                    continue
                for worker, excess in _to_look_at(workers, bounds).items():
                    outcome = worker.outcome(excess)
                    if outcome is not None:
                        key, worker.key = worker.key, None
                        assert key is not None
                        yield key, outcome
                    if not worker.is_alive:
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.end(grace=0.0 if worker.key is not None else 0.2)
        guard.close()


class _Bounds:
    """What the processes may use."""

    def __init__(self, timeout: float | None, memory: float | None) -> None:
        self.timeout = timeout
        self.memory = MEMORY * (available_memory() or total_memory()) if memory is None else memory
        self._looked = time.monotonic()

    def exceeded(self, busy: list[_Worker]) -> dict[_Worker, str]:
        """Workers that have exceeded a bound, with what to say."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return {}
        self._looked = now
        found: dict[_Worker, str] = {}
        used = memory_of_groups({worker.pid for worker in busy})
        total = sum(used.values())
        if total > self.memory:
            largest = max(busy, key=lambda worker: used[worker.pid])
            share = "" if len(busy) == 1 else f" of the {_gigabytes(total)} of {len(busy)} processes"
            words = f"used {_gigabytes(used[largest.pid])}{share}, more than the allowed {_gigabytes(self.memory)}"
            found[largest] = f"{words} (--memory)"
        for worker in busy:
            limit = self.timeout if worker.is_ready else PREPARATION
            if limit is not None and now - worker.since > limit:
                found[worker] = (
                    f"no result after {limit:g} s" if worker.is_ready else f"was not ready after {limit:g} s"
                )
        return found


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2g} GB"


def _to_look_at(workers: list[_Worker], bounds: _Bounds) -> dict[_Worker, str]:
    """Workers that have something to say or have died, with "", and those that have exceeded a bound, with which."""
    busy = [worker for worker in workers if worker.key is not None]
    ready = set(wait([worker.connection for worker in busy], LOOK))
    heard = {worker: "" for worker in busy if worker.connection in ready or not worker.process.is_alive()}
    return bounds.exceeded(busy) | heard


class _Worker:
    """One process and the piece it works on."""

    def __init__(self, work: Work, guard: Guard) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self.guard = guard
        guard.add(self.pid)
        other.close()
        self.key: str | None = None
        self.since = time.monotonic()
        self.is_ready = False
        self.is_alive = True

    def give(self, key: str, piece: Any) -> None:
        self.key, self.since = key, time.monotonic()
        with contextlib.suppress(OSError):  # it has died, which is found out next
            self.connection.send(piece)

    def outcome(self, excess: str) -> dict[str, Any] | None:
        """What has become of the piece; None if the process was only getting ready.

        Args:
            excess: The bound that the process has exceeded, if any.
        """
        if self.connection.poll():
            with contextlib.suppress(EOFError, OSError):
                kind, content = self.connection.recv()
                if kind == "ready":
                    self.is_ready, self.since = True, time.monotonic()
                    return None
                if kind == "unable":
                    raise content
                return {kind: content}
        self.end(grace=0.0 if excess else 1.0)
        cause = _cause(self.process.exitcode)
        if self.is_ready:
            return {"error": excess or f"the process {cause}"}
        if excess:
            raise DataError(f"a process {excess}, before it could begin.")
        raise DataError(
            f"a process {cause} before it could begin. Is there enough memory for all of them? A script that calls "
            "this function needs the guard: if __name__ == '__main__'."
        )

    def end(self, grace: float) -> None:
        """End the process and what it has started; it has some seconds to end by itself."""
        self.is_alive = False
        self.connection.close()
        self.process.join(grace)
        kill_group(self.pid)
        self.process.kill()
        self.process.join()
        self.guard.remove(self.pid)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with status {exitcode}"


def _serve(connection: Connection, work: Work) -> None:
    """The life of a process: get ready, then answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the one who gives out the work
    lead_group()
    try:
        compute = work.prepare()
    except Exception as error:
        if not isinstance(error, ConfigError):
            error = ConfigError(f"the calculator cannot be made: {_told(error)}")
        connection.send(("unable", error))
        return
    connection.send(("ready", None))
    while True:
        try:
            piece = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("result", compute(piece))
        except Exception as error:  # calculators raise whatever their code runs into
            answer = ("error", _told(error))
        try:
            connection.send(answer)
        except OSError:
            return


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    told = text if isinstance(error, (ConfigError, DataError)) else f"{type(error).__name__}: {text}".rstrip(": ")
    return told if len(told) <= _MESSAGE else told[:_MESSAGE] + " ..."


@contextlib.contextmanager
def _threads_shared(processes: int) -> Iterator[None]:
    """Share the cores among processes that start, where the user has not said how many threads each may use."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


@contextlib.contextmanager
def progress_bar(description: str, total: int | None, done: int, unit: str) -> Iterator[Callable[[bool], None]]:
    """Show how far the work is, how fast it goes and when it will end: a bar on a terminal, otherwise a line now and
    then. The function is to be called after each piece, with whether it failed."""
    from tqdm import tqdm

    start = time.monotonic()
    state = {"done": 0, "failed": 0, "told": start}
    with tqdm(desc=description, total=total, initial=done, unit=unit, disable=None, smoothing=0.1) as bar:

        def tell(failed: bool) -> None:
            state["done"] += 1
            state["failed"] += failed
            if failed:
                bar.set_postfix(failed=state["failed"], refresh=False)
            bar.update()
            now = time.monotonic()
            if bar.disable and now - state["told"] > REPORT:
                state["told"] = now
                rate = state["done"] / (now - start)
                left = "" if total is None else f", {_duration((total - done - state['done']) / rate)} left"
                logger.info("%s: %d%s, %d failed, %.3g per second%s", description, done + state["done"],
                            "" if total is None else f" of {total}", state["failed"], rate, left)  # fmt: skip

        yield tell


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
