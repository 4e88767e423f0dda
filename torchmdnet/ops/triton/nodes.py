"""Kernels over atoms and channels: the algebra of 3×3 matrices, one channel of an atom to a lane.

Features are (N, 9, F) in the orthonormal basis of :mod:`torchmdnet.ops.irreps`. A program takes ``BLOCK`` of the N F
channels of all atoms, so any F fills it. Constants are made in the type of the features: a bare number would be of
single precision.
"""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "interact",
    "interact_backward",
    "matrix_product",
    "normalize",
    "normalize_backward",
    "normalize_twice",
    "part_norms",
    "part_norms_backward",
    "refine",
    "refine_backward",
    "scale",
    "scale_backward",
    "square_norm",
    "square_norm_backward",
]

_R2, _R3, _R6 = tl.constexpr(2**-0.5), tl.constexpr(3**-0.5), tl.constexpr(6**-0.5)


@triton.jit
def block(size, F, BLOCK: tl.constexpr):
    """The atoms and channels of this program: where their components begin, n, f, and which of them exist."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, f = (index // F).to(tl.int64), index % F  # divided while it is short
    return n * (9 * F) + f, n, f, index < size


@triton.jit
def components(x, k, F, mask):
    """The nine components of each channel."""
    return (
        tl.load(x + k, mask, 0),
        tl.load(x + k + F, mask, 0),
        tl.load(x + k + 2 * F, mask, 0),
        tl.load(x + k + 3 * F, mask, 0),
        tl.load(x + k + 4 * F, mask, 0),
        tl.load(x + k + 5 * F, mask, 0),
        tl.load(x + k + 6 * F, mask, 0),
        tl.load(x + k + 7 * F, mask, 0),
        tl.load(x + k + 8 * F, mask, 0),
    )


@triton.jit
def put(x, k, F, mask, v0, v1, v2, v3, v4, v5, v6, v7, v8):
    """Store nine components."""
    tl.store(x + k, v0, mask)
    tl.store(x + k + F, v1, mask)
    tl.store(x + k + 2 * F, v2, mask)
    tl.store(x + k + 3 * F, v3, mask)
    tl.store(x + k + 4 * F, v4, mask)
    tl.store(x + k + 5 * F, v5, mask)
    tl.store(x + k + 6 * F, v6, mask)
    tl.store(x + k + 7 * F, v7, mask)
    tl.store(x + k + 8 * F, v8, mask)


@triton.jit
def matrix(v0, v1, v2, v3, v4, v5, v6, v7, v8, IS_TURNED: tl.constexpr):
    """Entries of the matrix with these components, or of its transpose."""
    r2, r3, r6 = tl.full([1], _R2, v0.dtype), tl.full([1], _R3, v0.dtype), tl.full([1], _R6, v0.dtype)
    trace, diagonal, last = r3 * v0, r2 * v7, r6 * v8
    a, b, c = r2 * v1, r2 * v2, r2 * v3
    if IS_TURNED:
        a, b, c = -a, -b, -c
    s, t, u = r2 * v4, r2 * v5, r2 * v6
    m00, m01, m02 = trace + diagonal - last, s - c, u + b
    m10, m11, m12 = s + c, trace - diagonal - last, t - a
    m20, m21, m22 = u - b, t + a, trace + last + last
    return m00, m01, m02, m10, m11, m12, m20, m21, m22


@triton.jit
def parts_of(m00, m01, m02, m10, m11, m12, m20, m21, m22):
    """Components of the matrix with these entries."""
    r2, r3, r6 = tl.full([1], _R2, m00.dtype), tl.full([1], _R3, m00.dtype), tl.full([1], _R6, m00.dtype)
    v0, v1, v2 = r3 * (m00 + m11 + m22), r2 * (m21 - m12), r2 * (m02 - m20)
    v3, v4, v5 = r2 * (m10 - m01), r2 * (m01 + m10), r2 * (m12 + m21)
    v6, v7, v8 = r2 * (m02 + m20), r2 * (m00 - m11), r6 * (m22 + m22 - m00 - m11)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8


@triton.jit
def multiply(
    x00, x01, x02, x10, x11, x12, x20, x21, x22, y00, y01, y02, y10, y11, y12, y20, y21, y22, BOTH: tl.constexpr
):
    """Entries of X Y, or with BOTH of X Y + Y X."""
    m00, m01, m02 = (
        x00 * y00 + x01 * y10 + x02 * y20,
        x00 * y01 + x01 * y11 + x02 * y21,
        x00 * y02 + x01 * y12 + x02 * y22,
    )
    m10, m11, m12 = (
        x10 * y00 + x11 * y10 + x12 * y20,
        x10 * y01 + x11 * y11 + x12 * y21,
        x10 * y02 + x11 * y12 + x12 * y22,
    )
    m20, m21, m22 = (
        x20 * y00 + x21 * y10 + x22 * y20,
        x20 * y01 + x21 * y11 + x22 * y21,
        x20 * y02 + x21 * y12 + x22 * y22,
    )
    if BOTH:
        m00 += y00 * x00 + y01 * x10 + y02 * x20
        m01 += y00 * x01 + y01 * x11 + y02 * x21
        m02 += y00 * x02 + y01 * x12 + y02 * x22
        m10 += y10 * x00 + y11 * x10 + y12 * x20
        m11 += y10 * x01 + y11 * x11 + y12 * x21
        m12 += y10 * x02 + y11 * x12 + y12 * x22
        m20 += y20 * x00 + y21 * x10 + y22 * x20
        m21 += y20 * x01 + y21 * x11 + y22 * x21
        m22 += y20 * x02 + y21 * x12 + y22 * x22
    return m00, m01, m02, m10, m11, m12, m20, m21, m22


@triton.jit
def product(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8,
    A_IS_TURNED: tl.constexpr, B_IS_TURNED: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Components of A B, or of A B + B A, from those of A and B, of which either may be transposed."""
    x00, x01, x02, x10, x11, x12, x20, x21, x22 = matrix(a0, a1, a2, a3, a4, a5, a6, a7, a8, A_IS_TURNED)
    y00, y01, y02, y10, y11, y12, y20, y21, y22 = matrix(b0, b1, b2, b3, b4, b5, b6, b7, b8, B_IS_TURNED)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = multiply(
        x00, x01, x02, x10, x11, x12, x20, x21, x22, y00, y01, y02, y10, y11, y12, y20, y21, y22, BOTH
    )
    return parts_of(m00, m01, m02, m10, m11, m12, m20, m21, m22)


@triton.jit
def dot(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    """Inner product of two sets of nine."""
    return a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3 + a4 * b4 + a5 * b5 + a6 * b6 + a7 * b7 + a8 * b8


@triton.jit
def put_sum(x, k, F, mask, s, a0, a1, a2, a3, a4, a5, a6, a7, a8, t, b0, b1, b2, b3, b4, b5, b6, b7, b8):
    """Store s a + t b."""
    put(
        x, k, F, mask,
        s * a0 + t * b0, s * a1 + t * b1, s * a2 + t * b2, s * a3 + t * b3, s * a4 + t * b4, s * a5 + t * b5,
        s * a6 + t * b6, s * a7 + t * b7, s * a8 + t * b8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def matrix_product(
    X, Y, out, size, F,
    X_IS_TURNED: tl.constexpr, Y_IS_TURNED: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = X Y or X Y + Y X, of which either may be transposed."""
    k, _, _, mask = block(size, F, BLOCK)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = components(X, k, F, mask)
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = components(Y, k, F, mask)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8, X_IS_TURNED, Y_IS_TURNED, BOTH
    )
    put(out, k, F, mask, v0, v1, v2, v3, v4, v5, v6, v7, v8)


@triton.jit(do_not_specialize=["size"])
def part_norms(X, out, size, F, BLOCK: tl.constexpr):
    """out = |I|², |A|², |S|² of each channel: (N, 9, F) -> (N, 3 F)."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    at = out + n * (3 * F) + f
    tl.store(at, v0 * v0, mask)
    tl.store(at + F, v1 * v1 + v2 * v2 + v3 * v3, mask)
    tl.store(at + 2 * F, v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7 + v8 * v8, mask)


@triton.jit(do_not_specialize=["size"])
def part_norms_backward(X, grad, out, size, F, BLOCK: tl.constexpr):
    """out = 2 X times the gradient of each part, the gradient of :func:`part_norms`."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    at = grad + n * (3 * F) + f
    g0, g1, g2 = 2 * tl.load(at, mask, 0), 2 * tl.load(at + F, mask, 0), 2 * tl.load(at + 2 * F, mask, 0)
    put(out, k, F, mask, g0 * v0, g1 * v1, g1 * v2, g1 * v3, g2 * v4, g2 * v5, g2 * v6, g2 * v7, g2 * v8)


@triton.jit(do_not_specialize=["size"])
def normalize(X, out, size, F, BLOCK: tl.constexpr):
    """out = X / (|X|² + 1)."""
    k, _, _, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    s = 1 / (dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8) + 1)
    put(out, k, F, mask, s * v0, s * v1, s * v2, s * v3, s * v4, s * v5, s * v6, s * v7, s * v8)


@triton.jit(do_not_specialize=["size"])
def normalize_backward(X, grad, out, size, F, BLOCK: tl.constexpr):
    """Gradient of :func:`normalize` in X."""
    k, _, _, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = components(grad, k, F, mask)
    s = 1 / (dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8) + 1)
    t = -2 * s * s * dot(g0, g1, g2, g3, g4, g5, g6, g7, g8, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    put_sum(out, k, F, mask, s, g0, g1, g2, g3, g4, g5, g6, g7, g8, t, v0, v1, v2, v3, v4, v5, v6, v7, v8)


@triton.jit(do_not_specialize=["size"])
def normalize_twice(X, inner, grad, out_X, out_inner, size, F, BLOCK: tl.constexpr):
    """Gradients of :func:`normalize_backward` in X and in the gradient it was given, ``inner``."""
    k, _, _, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = components(inner, k, F, mask)
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = components(grad, k, F, mask)
    s = 1 / (dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8) + 1)
    t = -2 * s * s
    av = dot(a0, a1, a2, a3, a4, a5, a6, a7, a8, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    bv = dot(b0, b1, b2, b3, b4, b5, b6, b7, b8, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    ab = dot(a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8)
    along, ta, tb = t * ab - 4 * t * s * av * bv, t * bv, t * av
    put(
        out_X, k, F, mask,
        along * v0 + ta * a0 + tb * b0, along * v1 + ta * a1 + tb * b1, along * v2 + ta * a2 + tb * b2,
        along * v3 + ta * a3 + tb * b3, along * v4 + ta * a4 + tb * b4, along * v5 + ta * a5 + tb * b5,
        along * v6 + ta * a6 + tb * b6, along * v7 + ta * a7 + tb * b7, along * v8 + ta * a8 + tb * b8,
    )  # fmt: skip
    put_sum(out_inner, k, F, mask, s, b0, b1, b2, b3, b4, b5, b6, b7, b8, ta, v0, v1, v2, v3, v4, v5, v6, v7, v8)


@triton.jit(do_not_specialize=["size"])
def interact(Y, M, factor, out, size, F, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = P / (|P|² + 1) of P = factor (Y M + M Y), or without BOTH P = 2 factor Y M."""
    k, n, _, mask = block(size, F, BLOCK)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = components(Y, k, F, mask)
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = components(M, k, F, mask)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8, False, False, BOTH
    )
    times = tl.load(factor + n, mask, 0)
    if not BOTH:
        times = 2 * times
    square = dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    s = times / (times * times * square + 1)
    put(out, k, F, mask, s * v0, s * v1, s * v2, s * v3, s * v4, s * v5, s * v6, s * v7, s * v8)


@triton.jit(do_not_specialize=["size"])
def interact_backward(Y, M, factor, grad, out_Y, out_M, size, F, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of :func:`interact` in Y and M."""
    k, n, _, mask = block(size, F, BLOCK)
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = components(Y, k, F, mask)
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = components(M, k, F, mask)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        a0, a1, a2, a3, a4, a5, a6, a7, a8, b0, b1, b2, b3, b4, b5, b6, b7, b8, False, False, BOTH
    )
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = components(grad, k, F, mask)
    times = tl.load(factor + n, mask, 0)
    if not BOTH:
        times = 2 * times
    # P = times v: the gradient of P / (|P|² + 1) is s g - 2 s² (g · P) P, and times that is the one in v
    squared = times * times
    s = 1 / (squared * dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8) + 1)
    t = -2 * s * s * squared * times * dot(g0, g1, g2, g3, g4, g5, g6, g7, g8, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    s = s * times
    d0, d1, d2, d3, d4 = s * g0 + t * v0, s * g1 + t * v1, s * g2 + t * v2, s * g3 + t * v3, s * g4 + t * v4
    d5, d6, d7, d8 = s * g5 + t * v5, s * g6 + t * v6, s * g7 + t * v7, s * g8 + t * v8
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        d0, d1, d2, d3, d4, d5, d6, d7, d8, b0, b1, b2, b3, b4, b5, b6, b7, b8, False, True, BOTH
    )
    put(out_Y, k, F, mask, v0, v1, v2, v3, v4, v5, v6, v7, v8)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        a0, a1, a2, a3, a4, a5, a6, a7, a8, d0, d1, d2, d3, d4, d5, d6, d7, d8, True, False, BOTH
    )
    put(out_M, k, F, mask, v0, v1, v2, v3, v4, v5, v6, v7, v8)


@triton.jit(do_not_specialize=["size"])
def refine(X, D, factor, out, size, F, BLOCK: tl.constexpr):
    """out = X + D + factor D²."""
    k, n, _, mask = block(size, F, BLOCK)
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = components(X, k, F, mask)
    d0, d1, d2, d3, d4, d5, d6, d7, d8 = components(D, k, F, mask)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        d0, d1, d2, d3, d4, d5, d6, d7, d8, d0, d1, d2, d3, d4, d5, d6, d7, d8, False, False, False
    )
    s = tl.load(factor + n, mask, 0)
    put(
        out, k, F, mask,
        x0 + d0 + s * v0, x1 + d1 + s * v1, x2 + d2 + s * v2, x3 + d3 + s * v3, x4 + d4 + s * v4,
        x5 + d5 + s * v5, x6 + d6 + s * v6, x7 + d7 + s * v7, x8 + d8 + s * v8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def refine_backward(D, factor, grad, out, size, F, BLOCK: tl.constexpr):
    """Gradient of :func:`refine` in D."""
    k, n, _, mask = block(size, F, BLOCK)
    d0, d1, d2, d3, d4, d5, d6, d7, d8 = components(D, k, F, mask)
    g0, g1, g2, g3, g4, g5, g6, g7, g8 = components(grad, k, F, mask)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = product(
        d0, d1, d2, d3, d4, d5, d6, d7, d8, g0, g1, g2, g3, g4, g5, g6, g7, g8, True, False, True
    )
    s = tl.load(factor + n, mask, 0)
    put(
        out, k, F, mask,
        g0 + s * v0, g1 + s * v1, g2 + s * v2, g3 + s * v3, g4 + s * v4,
        g5 + s * v5, g6 + s * v6, g7 + s * v7, g8 + s * v8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def scale(X, gate, out, size, F, BLOCK: tl.constexpr):
    """out = X with each part times its own factor for each channel, gate (N, 3 F)."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    at = gate + n * (3 * F) + f
    g0, g1, g2 = tl.load(at, mask, 0), tl.load(at + F, mask, 0), tl.load(at + 2 * F, mask, 0)
    put(out, k, F, mask, g0 * v0, g1 * v1, g1 * v2, g1 * v3, g2 * v4, g2 * v5, g2 * v6, g2 * v7, g2 * v8)


@triton.jit(do_not_specialize=["size"])
def scale_backward(X, gate, grad, out_X, out_gate, size, F, BLOCK: tl.constexpr):
    """Gradients of :func:`scale` in X and gate."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    h0, h1, h2, h3, h4, h5, h6, h7, h8 = components(grad, k, F, mask)
    at = gate + n * (3 * F) + f
    g0, g1, g2 = tl.load(at, mask, 0), tl.load(at + F, mask, 0), tl.load(at + 2 * F, mask, 0)
    put(out_X, k, F, mask, g0 * h0, g1 * h1, g1 * h2, g1 * h3, g2 * h4, g2 * h5, g2 * h6, g2 * h7, g2 * h8)
    to = out_gate + n * (3 * F) + f
    tl.store(to, h0 * v0, mask)
    tl.store(to + F, h1 * v1 + h2 * v2 + h3 * v3, mask)
    tl.store(to + 2 * F, h4 * v4 + h5 * v5 + h6 * v6 + h7 * v7 + h8 * v8, mask)


@triton.jit(do_not_specialize=["size"])
def square_norm(X, out, size, F, BLOCK: tl.constexpr):
    """out = |X|² of each channel: (N, 9, F) -> (N, F)."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    tl.store(out + n * F + f, dot(v0, v1, v2, v3, v4, v5, v6, v7, v8, v0, v1, v2, v3, v4, v5, v6, v7, v8), mask)


@triton.jit(do_not_specialize=["size"])
def square_norm_backward(X, grad, out, size, F, BLOCK: tl.constexpr):
    """out = 2 X times the gradient of each channel, the gradient of :func:`square_norm`."""
    k, n, f, mask = block(size, F, BLOCK)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(X, k, F, mask)
    g = 2 * tl.load(grad + n * F + f, mask, 0)
    put(out, k, F, mask, g * v0, g * v1, g * v2, g * v3, g * v4, g * v5, g * v6, g * v7, g * v8)
