"""Compiling a loop for the CPU, for one thread and for several."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import numba
import torch

from torchmdnet.loop_cache import jit
from torchmdnet.ops.kernels.work import CHECKS, WORTH_THREADS

__all__ = ["LOOPS", "called", "compiled", "exact", "inlined", "spliced"]

log = logging.getLogger(__name__)

#: Nothing calls the loops through a pointer of C, so they are compiled without that entry.
_EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": CHECKS, "no_cfunc_wrapper": True}
_OPTIONS: dict[str, Any] = {**_EXACT, "fastmath": {"contract", "reassoc", "nsz"}}
#: Nor does Python call what they are made of.
_INNER: dict[str, Any] = {"no_cpython_wrapper": True}

#: Every loop that is called from Python, by its module and name.
LOOPS: dict[str, Callable[..., Any]] = {}

#: For what loops are made of; compiled into each of them.
inlined = jit(**_OPTIONS, **_INNER, inline="never")

#: The same, put into each of them before LLVM sees it, where LLVM would call it with many vectors in memory.
spliced = jit(**_OPTIONS, **_INNER, inline="always")


class _Threads:
    """How many threads share a loop.

    The threads of OpenMP, which PyTorch and Numba share loops among, do not exist in a process that was forked after
    they were started, and both would wait for them for ever. So such a process has one thread, in PyTorch as well.
    """

    def __init__(self) -> None:
        self.is_forked = self.is_told = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        if torch.get_num_threads() > 1:
            self.is_forked = True
            torch.set_num_threads(1)

    def count(self) -> int:
        """Threads for the next loop, as many as PyTorch uses."""
        if not self.is_forked:
            most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
            return min(torch.get_num_threads(), most)
        if not self.is_told:
            self.is_told = True
            log.warning(
                "One thread is used, because this process was forked from one that had several. Start processes with "
                "the method 'spawn' or 'forkserver' of multiprocessing to have more in each."
            )
        return 1


_threads = _Threads()


def _listed(loop: Callable[..., Any], made: Any) -> Any:
    LOOPS[f"{loop.__module__}.{loop.__name__}"] = made
    return made


def called(loop: Callable[..., Any]) -> Any:
    """A loop that one thread runs."""
    return _listed(loop, jit(**_OPTIONS)(loop))


def exact(loop: Callable[..., Any]) -> Any:
    """The same with the arithmetic as it is written, for what decides by comparing numbers."""
    return _listed(loop, jit(**_EXACT)(loop))


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop that is called with the work it does, in multiply-adds, before its own arguments.

    ``numba.prange`` in it is shared by as many threads as PyTorch uses, when the work is worth it. What is compiled is
    only what is called, ``run.serial`` for one thread and ``run.threaded`` for several.
    """
    serial = jit(**_OPTIONS)(loop)
    threaded = serial if CHECKS else jit(parallel=True, **_OPTIONS)(loop)

    def run(work: int, *arrays: Any) -> None:
        if work >= WORTH_THREADS:
            threads = _threads.count()
            if threads > 1:
                wanted = torch.get_num_threads()
                numba.set_num_threads(threads)
                threaded(*arrays)
                torch.set_num_threads(wanted)  # both pools are OpenMP's, and starting Numba's resets PyTorch's
                return
        serial(*arrays)

    run.__doc__ = loop.__doc__
    run.serial, run.threaded = serial, threaded  # pyright: ignore[reportFunctionMemberAccess]
    return _listed(loop, run)
