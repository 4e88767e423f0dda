"""Loops whose rows several threads share.

The threads are those of PyTorch, started through the function of OpenMP that PyTorch calls too: a second pool would
stay awake on the cores that the first one wants. Each thread claims rows in small parts, so that fast and slow threads
end together.
"""

# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic

from torchmdnet.ops.calls import recorded
from torchmdnet.ops.kernels.compiling import entry, generated, inner, listed
from torchmdnet.ops.kernels.threads import cores, openmp
from torchmdnet.ops.kernels.work import WORTH_THREADS

__all__ = ["THREADS", "claimed", "compiled", "moving", "run_jobs"]

#: 64-bit integers in a cache line, so that what one thread writes often is not beside what others read.
LINE = 8
#: A job is an array of 64-bit integers. It begins with the first row that no thread has claimed, for each of two
#: regions; then how many parts the rows are claimed in, and how many threads there are.
PARTS, THREADS = 2 * LINE, 2 * LINE + 1
#: How many threads have left the loop, how many came when one had left, and how many failed.
LEFT, LATE, FAILED = 3 * LINE, 3 * LINE + 1, 3 * LINE + 2
#: The address of what a thread calls with the job, in jobs for :func:`run_jobs`.
ADDRESS = 3 * LINE + 3
#: The address of OpenMP's entry, and the arguments of the loop.
OPENMP, ARGUMENTS = 4 * LINE, 5 * LINE
#: Integers that arguments may take: an array is a structure of about ten.
ROOM = 512

#: The job of a thread that has all rows to itself.
ALONE = np.zeros(ARGUMENTS, np.int64)
#: As a number of threads: the loop is not run, but its address and arguments are stored for :func:`run_jobs`.
STORED = -1

#: Parts for each thread, so that the last ones to work on are short.
PARTS_PER_THREAD = 16

_INT = ir.IntType(64)

# --------------------------------------------------------------------------------------- what a thread does in one step


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, index_type: Any) -> Any:
    numbers = context.make_array(array_type)(context, builder, array)
    at = context.cast(builder, index, index_type, types.intp)
    return get_item_pointer(context, builder, array_type, numbers, [at], wraparound=False)


@intrinsic
def take(typing_context, numbers, index, count):
    """The number at ``index``, to which ``count`` is added."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1], sig.args[1])
        count = context.cast(builder, args[2], sig.args[2], types.int64)
        return builder.atomic_rmw("add", place, count, "seq_cst")

    return types.int64(numbers, index, count), generate


# ----------------------------------------------------------------------------------------------------------------- jobs


@intrinsic
def call(typing_context, loop, job, arguments):
    """Call a loop with a job and arguments, on as many threads as the job says, and return when all have left it."""
    types_of = (job, *arguments)
    loop.get_call_type(typing_context, types_of, {})
    result, zero, number = types.none, ir.IntType(32)(0), ir.IntType(32)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        compiled = sig.args[0].dispatcher.get_compile_result(result(*types_of))
        context.add_linking_libs([compiled.library])
        function = context.declare_function(builder.module, compiled.fndesc)
        values = [args[1], *(builder.extract_value(args[2], k) for k in range(len(arguments)))]
        values = [_borrowed(context, builder, kind, value) for kind, value in zip(types_of, values, strict=True)]
        layout = ir.LiteralStructType([value.type for value in values])
        if context.get_abi_sizeof(layout) > 8 * ROOM:
            raise ValueError(f"{sig.args[0].dispatcher.py_func.__name__}: more arguments than a job has room for")

        # what each thread calls, with the address of the job
        kind = ir.FunctionType(ir.VoidType(), [_INT.as_pointer()])
        thread = ir.Function(builder.module, kind, f"{compiled.fndesc.mangled_name}.thread")
        thread.linkage = "internal"
        inner = ir.IRBuilder(thread.append_basic_block())
        (raw,) = thread.args

        def at(index: int) -> Any:
            return inner.gep(raw, [_INT(index)])

        with inner.if_then(inner.icmp_signed(">", inner.load_atomic(at(LEFT), "acquire", 8), _INT(0))):
            inner.atomic_rmw("add", at(LATE), _INT(1), "monotonic")
        held = inner.bitcast(at(ARGUMENTS), layout.as_pointer())
        taken = [inner.load(inner.gep(held, [zero, number(k)])) for k in range(len(values))]
        status, _ = context.call_conv.call_function(inner, function, result, types_of, taken)
        with inner.if_then(status.is_error):
            inner.atomic_rmw("add", at(FAILED), _INT(1), "monotonic")
        inner.atomic_rmw("add", at(LEFT), _INT(1), "release")
        inner.ret_void()

        start = context.make_array(sig.args[1])(context, builder, args[1]).data
        threads = builder.load(builder.gep(start, [_INT(THREADS)]))
        is_alone = builder.or_(builder.icmp_signed("==", threads, _INT(0)), builder.icmp_signed("==", threads, _INT(1)))
        with builder.if_else(is_alone) as (one, other):
            with other:
                room = builder.bitcast(builder.gep(start, [_INT(ARGUMENTS)]), layout.as_pointer())
                for k, value in enumerate(values):
                    builder.store(value, builder.gep(room, [zero, number(k)]))
                address = builder.ptrtoint(thread, _INT)
                builder.store(address, builder.gep(start, [_INT(ADDRESS)]))
                several = builder.append_basic_block()
                stored = builder.append_basic_block()
                builder.cbranch(builder.icmp_signed(">", threads, _INT(0)), several, stored)
                builder.position_at_end(several)
                # GOMP_parallel(function, data, threads, flags)
                parallel = ir.FunctionType(ir.VoidType(), [kind.as_pointer(), _INT.as_pointer(), number, number])
                address = builder.load(builder.gep(start, [_INT(OPENMP)]))
                arguments_of = [thread, start, builder.trunc(threads, number), zero]
                builder.call(builder.inttoptr(address, parallel.as_pointer()), arguments_of)
                builder.branch(stored)
                builder.position_at_end(stored)
            with one:
                status, _ = context.call_conv.call_function(builder, function, result, types_of, values)
                with builder.if_then(status.is_error, likely=False):
                    context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(loop, job, arguments), generate


@intrinsic
def call_stored(typing_context, job):
    """Call what a job, given as the address of its first integer, holds the address of."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        job = builder.inttoptr(args[0], _INT.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_INT.as_pointer()])
        builder.store(_INT(0), builder.gep(job, [_INT(LEFT)]))
        address = builder.load(builder.gep(job, [_INT(ADDRESS)]))
        builder.call(builder.inttoptr(address, kind.as_pointer()), [job])
        return builder.load(builder.gep(job, [_INT(FAILED)]))

    return types.int64(types.int64), generate


@entry
def _run_jobs(jobs):
    failed = 0
    for k in range(jobs.shape[0]):
        failed += call_stored(jobs[k])
    return failed


def run_jobs(jobs: np.ndarray) -> None:
    """Run loops one after the other on this thread, given the addresses of their jobs."""
    if _run_jobs(jobs):
        raise MemoryError("There was no memory for what a loop needs.")


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An array that does not own its memory: views of it need no counts, for which threads would wait."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = ir.Constant(array.meminfo.type, None)
    array.parent = ir.Constant(array.parent.type, None)
    return array._getvalue()


@generated
def claimed(job, count, region=0):
    """Numbers from 0 to ``count - 1``, each for one of the threads that run this loop for the same job.

    A loop that has two such regions numbers them; no thread waits between them for others.
    """
    parts, at = job[PARTS], LINE * region
    size, first = count, 0
    if parts > 0:
        size = max((count + parts - 1) // parts, 1)
        first = take(job, at, size)
    while first < count:
        last = min(first + size, count)
        for n in range(first, last):  # noqa: UP028, Numba has no "yield from"
            yield n
        if parts == 0:
            break
        first = take(job, at, size)


def _entry(loop: Any) -> Any:
    """What is called from Python: ``start(job, *arguments)``."""

    def start(job, *arguments):
        call(loop, job, arguments)

    start.__name__ = start.__qualname__ = f"{loop.py_func.__name__}_entry"
    start.__module__ = loop.py_func.__module__
    return entry(start)


def compiled(loop: Callable[..., None], cost: int = 1) -> Callable[..., None]:
    """A loop over ``claimed(job, rows)``; it is called with its work, in multiply-adds, before its arguments.

    The job is the first argument of the loop itself. As many threads as PyTorch uses share its rows when the work is
    worth it. Each of them runs what stands before the rows, which thus writes to nothing that they share, and nothing
    stands behind.

    Args:
        loop: The function.
        cost: How many times as long as a multiply-add a unit of its work takes.
    """
    start = _entry(inner(loop))

    def run(work: int, *arguments: Any) -> None:
        calls = recorded()
        if calls is not None:
            if cost * work >= WORTH_THREADS and cores.count() > 1:
                calls.add(run, work, *arguments)
            else:
                job = np.zeros(ARGUMENTS + ROOM, np.int64)
                job[THREADS] = STORED
                start(job, *arguments)
                calls.add_loop(job, arguments, run_jobs)
        if cost * work >= WORTH_THREADS:
            threads = cores.for_loops()
            if threads > 1:
                job = np.zeros(ARGUMENTS + ROOM, np.int64)
                job[PARTS], job[THREADS], job[OPENMP] = PARTS_PER_THREAD * threads, threads, openmp()
                start(job, *arguments)
                if cost * work >= threads * WORTH_THREADS:  # in shorter ones a thread may be late that only slept
                    cores.notice(job[LATE] > 0)
                if job[FAILED]:
                    start(ALONE, *arguments)  # raises what a thread cannot
                    raise MemoryError("A thread had no memory for what a loop needs.")
                return
        start(ALONE, *arguments)

    run.__doc__ = loop.__doc__
    run.entry, run.loop = start, loop  # pyright: ignore[reportFunctionMemberAccess]
    return listed(loop, run)


def moving(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop like :func:`compiled`, which takes longer to read and write than to compute."""
    return compiled(loop, cost=16)
