"""Compiling loops and what they are made of for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite.binding import Linkage
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from torchmdnet.loop_cache import jit
from torchmdnet.ops.kernels.work import CHECKS

__all__ = ["LOOPS", "called", "entry", "exact", "generated", "inlined", "inner", "listed", "spliced"]

#: Nothing calls the loops through a pointer of C, so they are compiled without that entry.
_EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": CHECKS, "no_cfunc_wrapper": True}
_OPTIONS: dict[str, Any] = {**_EXACT, "fastmath": {"contract", "reassoc", "nsz"}}
#: Nor does Python call what they are made of.
_INNER: dict[str, Any] = {"no_cpython_wrapper": True}


class _OwnCode(JITCodeLibrary):
    """Machine code that calls its own copies of all it is made of.

    Numba lets them be found by name, so that the first copy in a process serves every loop. Copies differ: LLVM has
    optimized each within another loop, with sums in another order. Numbers then depended, in their last bits, on which
    loops a process had compiled, and which it had read from disk before.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.linkonce_odr and not function.is_declaration:
                function.linkage = Linkage.internal
        super()._optimize_final_module()


class _Compiler(Compiler):
    """Compiles what Python calls."""

    def define_pipelines(self) -> list[Any]:
        """See :class:`numba.core.compiler.CompilerBase`."""
        library = self.state.library = _OwnCode(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        library.enable_object_caching()
        return super().define_pipelines()


#: Every loop that is called from Python, by its module and name.
LOOPS: dict[str, Callable[..., Any]] = {}

#: For what loops are made of; compiled into each of them.
inlined = jit(**_OPTIONS, **_INNER, inline="never")

#: The same, put into each of them before LLVM sees it, where LLVM would call it with many vectors in memory.
spliced = jit(**_OPTIONS, **_INNER, inline="always")

#: For loops that are called through an entry, which holds their code and is kept on disk in their place.
inner = numba.njit(**_OPTIONS, **_INNER)

#: For generators, which Numba cannot take from a cache: what needs one compiles it.
generated = numba.njit(**_OPTIONS, **_INNER)


def listed(loop: Callable[..., Any], made: Any) -> Any:
    """Enter what was made of a loop in :data:`LOOPS`."""
    LOOPS[f"{loop.__module__}.{loop.__name__}"] = made
    return made


def entry(function: Callable[..., Any]) -> Any:
    """What is called from Python, but is no loop over atoms or edges."""
    return jit(**_OPTIONS, pipeline_class=_Compiler)(function)


def called(loop: Callable[..., Any]) -> Any:
    """A loop that one thread runs."""
    return listed(loop, entry(loop))


def exact(loop: Callable[..., Any]) -> Any:
    """The same with the arithmetic as it is written, for what decides by comparing numbers."""
    return listed(loop, jit(**_EXACT, pipeline_class=_Compiler)(loop))
