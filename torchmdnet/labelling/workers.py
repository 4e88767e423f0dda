"""Processes that compute, one piece of work each at a time; a process that dies costs its piece and nothing else."""

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

__all__ = ["Work", "progress_bar", "run"]

logger = logging.getLogger(__name__)

#: Seconds between two lines about the progress where there is no terminal to show a bar on.
REPORT = 30.0
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
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Do pieces of work in parallel.

    Args:
        work: What to do.
        pieces: Key and content of each piece; asked for as processes become free.
        processes: How many processes.
        timeout: Seconds after which a piece is given up.

    Yields:
        Key and outcome, ``{"result": {...}}`` or ``{"error": "..."}``, in the order in which they are done.

    Raises:
        ConfigError: If the work cannot be prepared at all.
        DataError: If the processes end before they begin.
    """
    waiting = iter(pieces)
    upcoming = next(waiting, None)
    workers: list[_Worker] = []
    try:
        with _threads_shared(processes):
            while upcoming is not None or any(worker.key is not None for worker in workers):
                busy = sum(worker.key is not None for worker in workers)
                if upcoming is not None and len(workers) < processes and busy == len(workers):
                    workers.append(_Worker(work))
                for worker in workers:
                    if upcoming is not None and worker.key is None:
                        worker.give(*upcoming)
                        upcoming = next(waiting, None)
                if upcoming is not None and len(workers) < processes:
                    continue
                for worker in _first_of(workers, timeout):
                    outcome = worker.outcome(timeout)
                    if outcome is not None:
                        key, worker.key = worker.key, None
                        assert key is not None
                        yield key, outcome
                    if not worker.is_alive:
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _first_of(workers: list[_Worker], timeout: float | None) -> list[_Worker]:
    """Workers that have something to say or have run out of time."""
    busy = [worker for worker in workers if worker.key is not None]
    left = None
    if timeout is not None:
        started = [worker.since for worker in busy if worker.is_ready]
        left = max(0.0, min(started) + timeout - time.monotonic()) if started else None
    ready = set(wait([worker.connection for worker in busy], left))
    return [worker for worker in busy if worker.connection in ready or worker.is_late(timeout)]


class _Worker:
    """One process and the piece it works on."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        other.close()
        self.key: str | None = None
        self.since = 0.0
        self.is_ready = False
        self.is_alive = True

    def give(self, key: str, piece: Any) -> None:
        self.key, self.since = key, time.monotonic()
        with contextlib.suppress(OSError):  # it has died, which is found out next
            self.connection.send(piece)

    def is_late(self, timeout: float | None) -> bool:
        return timeout is not None and self.is_ready and time.monotonic() - self.since > timeout

    def outcome(self, timeout: float | None) -> dict[str, Any] | None:
        """What has become of the piece; None if the process was only getting ready."""
        if not self.connection.poll():
            self.end()
            return {"error": f"no result after {timeout:g} s"}
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return {"error": f"the process {_cause(self.process.exitcode)}"} if self.is_ready else self._not_begun()
        if kind == "ready":
            self.is_ready, self.since = True, time.monotonic()
            return None
        if kind == "unable":
            raise content
        return {kind: content}

    def _not_begun(self) -> dict[str, Any]:
        raise DataError(
            f"a process {_cause(self.process.exitcode)} before it could begin. Is there enough memory for all of "
            "them? A script that calls this function needs the guard: if __name__ == '__main__'."
        )

    def end(self) -> None:
        self.is_alive = False
        self.connection.close()
        self.process.join(0.0 if self.key is not None else 0.2)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with status {exitcode}"


def _serve(connection: Connection, work: Work) -> None:
    """The life of a process: get ready, then answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the one who gives out the work
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
