"""Compiling a loop for the CPU, for one thread and for several."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.core import event

from torchmdnet.ops.kernels.work import CHECKS, WORTH_THREADS

__all__ = ["LOOPS", "called", "compiled", "exact", "inlined", "spliced"]

log = logging.getLogger(__name__)

_EXACT: dict[str, Any] = {
    "cache": not CHECKS,  # what is on disk has no checks
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": CHECKS,
}
_OPTIONS: dict[str, Any] = {**_EXACT, "fastmath": {"contract", "reassoc", "nsz"}}

#: Every loop that is called from Python, by its module and name.
LOOPS: dict[str, Callable[..., Any]] = {}


class _Notice(event.Listener):
    """Says once that loops are being compiled, which a processor needs only the first time."""

    def on_start(self, event: Any) -> None:
        event_data = event.data or {}
        function = getattr(event_data.get("dispatcher"), "py_func", None)
        if not self.is_given and getattr(function, "__module__", "").startswith("torchmdnet."):
            self.is_given = True
            log.info("Compiling loops for this processor. This happens once, and takes about half a minute in all.")

    def on_end(self, event: Any) -> None:
        pass

    is_given = False


event.register("numba:compile", _Notice())

#: For what loops are made of; compiled into each of them.
inlined = numba.njit(**_OPTIONS, inline="never")

#: The same, put into each of them before LLVM sees it, where LLVM would call it with many vectors in memory.
spliced = numba.njit(**_OPTIONS, inline="always")


def _listed(loop: Callable[..., Any], made: Any) -> Any:
    LOOPS[f"{loop.__module__}.{loop.__name__}"] = made
    return made


def called(loop: Callable[..., Any]) -> Any:
    """A loop that one thread runs."""
    return _listed(loop, numba.njit(**_OPTIONS)(loop))


def exact(loop: Callable[..., Any]) -> Any:
    """The same with the arithmetic as it is written, for what decides by comparing numbers."""
    return _listed(loop, numba.njit(**_EXACT)(loop))


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop that is called with the work it does, in multiply-adds, before its own arguments.

    ``numba.prange`` in it is shared by as many threads as PyTorch uses, when the work is worth it.
    """
    serial = numba.njit(**_OPTIONS)(loop)
    threaded = serial if CHECKS else numba.njit(parallel=True, **_OPTIONS)(loop)

    def run(work: int, *arrays: Any) -> None:
        if work >= WORTH_THREADS:
            wanted = torch.get_num_threads()
            threads = min(wanted, numba.config.NUMBA_NUM_THREADS)  # pyright: ignore[reportAttributeAccessIssue]
            if threads > 1:
                numba.set_num_threads(threads)
                threaded(*arrays)
                torch.set_num_threads(wanted)  # both pools are OpenMP's, and starting Numba's resets PyTorch's
                return
        serial(*arrays)

    run.__doc__ = loop.__doc__
    return _listed(loop, run)
