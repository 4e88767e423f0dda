"""Vectors of channels as a Numba type: what LLVM does not vectorise by itself is written with these.

``lanes`` are a few neighbouring channels, 256 bits, held in a register. Arithmetic between lanes is ``+ - * /`` and
:func:`exp`; :func:`load` and :func:`store` move them, :func:`splat` fills them with one number. LLVM turns them into
whatever the processor has.

Nothing stops a vector from reaching beyond its array, so loops keep to a rule for rows of F numbers and vectors of W:

- How many W are comes from :func:`lanes_that_fit` or :func:`lanes_that_divide`, which are told F and raise
  ``IndexError`` for a row they are not made for, before anything is read or written. Only loops that visit whole
  vectors and then what is left singly ask :func:`num_lanes`.
- Where a vector begins, if the last one is to end with the row, is for :func:`fit` to say. Such vectors overlap, so
  they are stored and never added to what is there.
- Callers ask :func:`torchmdnet.ops.kernels.has_cpu_loops` with the channels of a row; where there are none the
  definition in PyTorch runs.

With ``TORCHMDNET_CHECK_LOOPS=1`` in the environment every access is compared with the size of its array, and raises
``IndexError`` beyond it. That is slow, compiles anew in every process, and is for one thread.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalCall=false

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_model
from numpy.polynomial import Chebyshev, Polynomial

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.work import CHECKS, lanes_of

__all__ = [
    "exp",
    "fit",
    "item",
    "lanes_that_divide",
    "lanes_that_fit",
    "load",
    "load_two",
    "num_lanes",
    "raise_totals",
    "repeat",
    "repeat_two",
    "splat",
    "splat_two",
    "store",
    "total",
]

_FLAGS = ("contract", "reassoc", "nsz")


class Lanes(types.Type):
    """A vector of ``count`` numbers of one type; two vectors one behind the other are one too."""

    def __init__(self, dtype: types.Float, vectors: int = 1) -> None:
        self.dtype = dtype
        self.count = vectors * lanes_of(dtype.bitwidth // 8)
        super().__init__(name=f"Lanes({dtype}, {self.count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(element, lanes.count))


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, count: int = 1) -> Any:
    """The address of numbers ``index`` to ``index + count`` of a flat array."""
    numbers = context.make_array(array_type)(context, builder, array)
    if CHECKS:
        last = builder.sub(numbers.nitems, ir.Constant(index.type, count))
        is_within = builder.and_(
            builder.icmp_signed(">=", index, ir.Constant(index.type, 0)), builder.icmp_signed("<=", index, last)
        )
        with builder.if_then(builder.not_(is_within), likely=False):
            message = f"a compiled loop reaches for {count} numbers beyond the ends of an array"
            context.call_conv.return_user_exc(builder, IndexError, (message,))
    return builder.gep(numbers.data, [index])


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    place = _place(context, builder, array_type, array, index, vector.count)
    return builder.bitcast(place, vector.as_pointer())


def _filled(vector: Any, builder: Any, scalar: Any, count: int) -> Any:
    undefined, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(builder.insert_element(undefined, scalar, first), undefined, zeros)


@intrinsic
def load(typing_context, array, index):
    """Lanes that begin at ``index`` of a flat contiguous array."""
    return _load(array, index, Lanes(array.dtype))


@intrinsic
def load_two(typing_context, array, index):
    """The same of two vectors, which processors with registers of that size take for one."""
    return _load(array, index, Lanes(array.dtype, 2))


def _load(array: Any, index: Any, lanes: Lanes) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        vector = context.get_value_type(lanes)
        loaded = builder.load(_address(context, builder, sig.args[0], args[0], at, vector))
        loaded.align = array.dtype.bitwidth // 8
        return loaded

    return lanes(array, index), generate


@intrinsic
def store(typing_context, array, index, value):
    """Put lanes at ``index`` of a flat contiguous array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        vector = context.get_value_type(value)
        stored = builder.store(args[2], _address(context, builder, sig.args[0], args[0], at, vector))
        stored.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic
def splat(typing_context, array, number):
    """Lanes of the array's type, each the same number."""
    return _splat(array, number, Lanes(array.dtype))


@intrinsic
def splat_two(typing_context, array, number):
    """The same of two vectors."""
    return _splat(array, number, Lanes(array.dtype, 2))


def _splat(array: Any, number: Any, lanes: Lanes) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = context.cast(builder, args[1], sig.args[1], array.dtype)
        return _filled(context.get_value_type(lanes), builder, scalar, lanes.count)

    return lanes(array, number), generate


@intrinsic
def repeat(typing_context, array, index):
    """Lanes that all hold the number at ``index`` of a flat contiguous array."""
    return _repeat(array, index, Lanes(array.dtype))


@intrinsic
def repeat_two(typing_context, array, index):
    """The same of two vectors."""
    return _repeat(array, index, Lanes(array.dtype, 2))


def _repeat(array: Any, index: Any, lanes: Lanes) -> Any:
    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        number = builder.load(_place(context, builder, sig.args[0], args[0], at))
        return _filled(context.get_value_type(lanes), builder, number, lanes.count)

    return lanes(array, index), generate


@intrinsic
def item(typing_context, array, index):
    """The number at ``index`` of a flat contiguous array; unlike ``array[index]`` it never counts from the end."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        return builder.load(_place(context, builder, sig.args[0], args[0], at))

    return array.dtype(array, index), generate


@intrinsic
def total(typing_context, value):
    """Sum of the numbers in lanes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (vector,) = args
        count = sig.args[0].count
        undefined = ir.Constant(vector.type, ir.Undefined)
        while count > 1:  # fold the upper half onto the lower
            count //= 2
            order = [*range(count, 2 * count), *[0] * (sig.args[0].count - count)]
            upper = builder.shuffle_vector(
                vector, undefined, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
            )
            vector = builder.fadd(vector, upper, flags=_FLAGS)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return value.dtype(value), generate


#: By bits of a number: those of the mantissa, the exponent of 1, and a limit whose exponential is a normal number.
_FORMATS = {32: (23, 127, 87.0), 64: (52, 1023, 708.0)}
#: ln 2 in two pieces, the first of so few bits that small multiples of it are exact in single precision.
_LN2 = (355 / 512, math.log(2) - 355 / 512)
#: By bits of a number, polynomials for the exponential of half of ln 2 and less, as accurate as the numbers.
_EXP = {
    bits: Chebyshev.interpolate(np.exp, degree, [-math.log(2) / 2, math.log(2) / 2]).convert(kind=Polynomial).coef
    for bits, degree in ((32, 5), (64, 11))
}


@intrinsic
def exp(typing_context, value):
    """Exponential of each number to about the last bit, of what lies beyond the range of normal numbers as of its end.

    The nearest multiple of ln 2 becomes the exponent, and a polynomial is enough for the rest.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (x,) = args
        lanes = sig.args[0]
        bits = lanes.dtype.bitwidth
        mantissa, bias, limit = _FORMATS[bits]
        whole = ir.VectorType(ir.IntType(bits), lanes.count)
        nearest = get_or_insert_function(
            builder.module, ir.FunctionType(x.type, [x.type]), f"llvm.rint.v{lanes.count}f{bits}"
        )

        def constant(number: float) -> Any:
            return ir.Constant(x.type, [number] * lanes.count)

        def multiply_add(a: Any, b: Any, c: Any) -> Any:
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        x = builder.select(builder.fcmp_ordered("<", x, constant(limit)), x, constant(limit))
        x = builder.select(builder.fcmp_ordered(">", x, constant(-limit)), x, constant(-limit))
        n = builder.call(nearest, [builder.fmul(x, constant(1 / math.log(2)))])
        for part in _LN2:
            x = multiply_add(n, constant(-part), x)
        *lower, value = (constant(float(coefficient)) for coefficient in _EXP[bits])
        for coefficient in reversed(lower):
            value = multiply_add(value, x, coefficient)
        exponent = builder.add(builder.fptosi(n, whole), ir.Constant(whole, [bias] * lanes.count))
        power = builder.shl(exponent, ir.Constant(whole, [mantissa] * lanes.count))
        return builder.fmul(value, builder.bitcast(power, x.type))

    return value(value), generate


def _halves_of_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Sums of neighbours in one vector and then in another."""
    count = left.type.count
    every = [ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(first, 2 * count, 2))) for first in (0, 1)]
    return builder.fadd(*(builder.shuffle_vector(left, right, order) for order in every), flags=_FLAGS)


@intrinsic
def raise_totals(typing_context, array, index, v0, v1, v2, v3, v4, v5, v6, v7):
    """Add the sums of the numbers in eight lanes to eight neighbouring numbers of a flat contiguous array."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        count = sig.args[2].count
        vector = context.get_value_type(sig.args[2])
        for first in range(0, 8, count):
            rows = list(args[2 + first : 2 + first + count])
            while len(rows) > 1:
                rows = [_halves_of_pairs(builder, *rows[k : k + 2]) for k in range(0, len(rows), 2)]
            place = builder.add(at, ir.Constant(at.type, first))
            pointer = _address(context, builder, sig.args[0], args[0], place, vector)
            before = builder.load(pointer)
            before.align = array.dtype.bitwidth // 8
            stored = builder.store(builder.fadd(before, rows[0], flags=_FLAGS), pointer)
            stored.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, index, v0, v1, v2, v3, v4, v5, v6, v7), generate


def num_lanes(array: Any) -> int:
    """Numbers in the lanes of an array's type."""
    raise NotImplementedError("only inside compiled loops")


def lanes_that_fit(array: Any, width: int, vectors: int = 1) -> int:
    """The same for rows of numbers that are at least so many vectors long; of others nothing is read or written."""
    raise NotImplementedError("only inside compiled loops")


def lanes_that_divide(array: Any, width: int) -> int:
    """The same for rows that are whole vectors; of others nothing is read or written."""
    raise NotImplementedError("only inside compiled loops")


@overload(num_lanes, inline="always")
def _num_lanes(array):
    count = lanes_of(array.dtype.bitwidth // 8)
    return lambda array: count


@overload(lanes_that_fit, inline="always")
def _lanes_that_fit(array, width, vectors=1):
    count = lanes_of(array.dtype.bitwidth // 8)

    def lanes(array, width, vectors=1):
        if width < vectors * count:
            raise IndexError("rows of an array are shorter than the vectors in which a compiled loop visits them")
        return count

    return lanes


@overload(lanes_that_divide, inline="always")
def _lanes_that_divide(array, width):
    count = lanes_of(array.dtype.bitwidth // 8)

    def lanes(array, width):
        if width % count != 0:
            raise IndexError("rows of an array are not whole vectors, in which a compiled loop visits them")
        return count

    return lanes


@inlined
def fit(first, width, size):
    """Where a block of ``size`` numbers begins: at ``first``, or at the end of a row overlapping the one before."""
    return min(first, width - size)


def _define(function: Any, instruction: str) -> None:
    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            left, right = args
            return signature(left, left, left) if isinstance(left, Lanes) and left == right else None

    @lower_builtin(function, Lanes, Lanes)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args, flags=_FLAGS)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.isub, "fsub"),
    (operator.mul, "fmul"),
    (operator.imul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define(_function, _instruction)
