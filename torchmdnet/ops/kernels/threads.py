"""How many threads share a loop: as many as PyTorch uses, or fewer where another program has their cores."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator

import torch

__all__ = ["Cores", "cores", "openmp"]

log = logging.getLogger(__name__)

#: Share of recent loops to which a thread came late, from which on the cores count as taken, and below which as free.
CROWDED, CALM = 0.3, 0.1
#: Seconds for which fewer threads are used then, before loops try more again: at first, and where that fails each time.
RETREAT, LONGEST = 0.25, 4.0
#: Weight of the last loop in that share.
LAST = 0.1


@functools.cache
def openmp() -> int:
    """Address of the entry through which PyTorch starts its threads, ``GOMP_parallel``; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):  # another OpenMP, or Windows, where no library can be asked for all
        return 0


class Cores(threading.local):
    """Whether the cores that threads would use are free.

    A thread that another program keeps from its core comes to a loop when the others have done all of it, and they wait
    for it: for the rest of a time slice, some milliseconds, in each loop. Where that happens half of the threads are
    faster, and used for a while; half of these where it goes on.
    """

    def __init__(self) -> None:
        self._late = 0.0
        self._halvings, self._until, self._retreat = 0, 0.0, RETREAT
        self.given: int | None = None

    def count(self) -> int:
        """Threads that PyTorch uses when the cores are free, in which loops divide what they add up."""
        return self.given or torch.get_num_threads()

    def for_loops(self) -> int:
        """Threads for the next loop of this thread."""
        return self.free() if openmp() else 1

    def free(self) -> int:
        """Threads that find a core, as far as is known."""
        if _fork.has_lost_threads:
            _fork.tell()
            return 1
        threads = self.count()
        if self._halvings and (now := time.monotonic()) >= self._until:
            self._halvings, self._until = self._halvings - 1, now + self._retreat
        threads = max(threads >> self._halvings, 1)
        _fork.has_used_threads |= threads > 1
        return threads

    def notice(self, is_late: bool) -> None:
        """Take note of a loop that several threads shared.

        Args:
            is_late: Whether one of them came when another had finished.
        """
        self._late += LAST * (is_late - self._late)
        if self._late > CROWDED:
            self._late = CROWDED - 1.5 * LAST  # two more such loops lead back here
            self._halvings = min(self._halvings + 1, self.count().bit_length() - 1)
            self._until = time.monotonic() + self._retreat
            self._retreat = min(2 * self._retreat, LONGEST)
        elif self._late < CALM:
            self._retreat = RETREAT

    @contextlib.contextmanager
    def for_all(self) -> Iterator[None]:
        """PyTorch too uses fewer threads within, where the cores are taken, until loops have found more of them free.

        Not where deterministic algorithms are asked for: the last bits of sums depend on the number of threads.
        """
        threads, wanted = torch.get_num_threads(), self.free()
        if self._late >= CALM:
            wanted = max(wanted // 2, 1)
        if wanted >= threads or torch.are_deterministic_algorithms_enabled():
            yield
            return
        outer, self.given = self.given, self.count()
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self.given = outer


class _Fork:
    """Whether this process was forked from one that had several threads, or had used them.

    They do not exist in this process, which would wait for them for ever; so it has one thread, in PyTorch and in
    loops.
    """

    def __init__(self) -> None:
        self.has_used_threads = self.has_lost_threads = self.is_told = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        if self.has_used_threads or torch.get_num_threads() > 1 or cores.given is not None:
            self.has_lost_threads, cores.given = True, None
            torch.set_num_threads(1)

    def tell(self) -> None:
        """Say once that there is one thread."""
        if not self.is_told:
            self.is_told = True
            log.warning(
                "One thread is used, because this process was forked from one that had several. Start processes with "
                "the method 'spawn' or 'forkserver' of multiprocessing to have more in each."
            )


cores, _fork = Cores(), _Fork()
