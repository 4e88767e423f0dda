r"""The algebra of 3×3 matrices in vectors of channels: products, norms, gates, with their derivatives.

.. math::
    \text{normalize:}\; \frac{X}{\|X\|^2 + 1}, \quad
    \text{interact:}\; \mathrm{normalize}(\lambda\, (Y M + M Y)), \quad
    \text{refine:}\; X + D + \lambda D^2, \quad
    \text{gate:}\; X \odot g_{l(c)}

==========================  =========  ===================================================================
letters                     shape      meaning
==========================  =========  ===================================================================
``X``, ``Y``, ``M``, ``D``  (N, 9, F)  features in the orthonormal basis of :mod:`torchmdnet.ops.irreps`
``A``, ``B``, ``G``, ``H``  9 vectors  entries of the matrices Y and M and of gradients; ``At`` transposed
``v``                       9 vectors  components of a block of channels
``factor``                  (N,)       λ; ``both`` for Y M + M Y, else 2 Y M
``gates``                   (N, 3 F)   g: one number for each part and channel
``O``, ``dO``               (N, 9, F)  gradients in a result and in its change
``r2``, ``r3``, ``r6``                 1/√2, 1/√3, 1/√6
==========================  =========  ===================================================================

The basis is orthonormal, so a gradient in components is one in the matrix, and the gradients of ⟨G, A B + B A⟩ are the
same product with the transposed argument: :math:`G B^T + B^T G` in A. Transposing turns the sign of the antisymmetric
components alone, hence ``turned``.

With s = 1 / (|v|² + 1) and the symmetric Jacobian :math:`J = s - 2 s^2 v v^T` of normalize,

.. math::
    J g = s\, g - 2 s^2 (g \cdot v)\, v, \qquad
    \nabla_v (b \cdot J a) = \big(-2 s^2\, a \cdot b + 8 s^3 (a \cdot v)(b \cdot v)\big)\, v
    - 2 s^2 \big((b \cdot v)\, a + (a \cdot v)\, b\big)

are what backward, tangent and reverse are made of.

A block of channels at the end of a row overlaps the one before, so F has to be at least as large as a vector.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from torchmdnet.ops.kernels.compiling import inlined
from torchmdnet.ops.kernels.sharing import claimed, compiled, moving
from torchmdnet.ops.kernels.simd import fit, lanes_that_fit, load, splat, store

__all__ = [
    "add_norms_backward",
    "components",
    "gate",
    "gate_backward",
    "gate_reverse",
    "gate_tangent",
    "interact",
    "interact_backward",
    "interact_reverse",
    "interact_tangent",
    "matrix_product",
    "normalize",
    "normalize_backward",
    "normalize_reverse",
    "normalize_twice",
    "part_norms",
    "part_norms_backward",
    "put",
    "refine",
    "refine_backward",
    "refine_reverse",
    "refine_tangent",
    "squared_norms",
    "squared_norms_backward",
    "squared_norms_tangent",
]


__all__ = [
    "interact",
    "interact_backward",
    "interact_reverse",
    "interact_tangent",
    "matrix_product",
    "normalize",
    "normalize_backward",
    "normalize_reverse",
    "normalize_twice",
    "part_norms",
    "part_norms_backward",
    "refine",
    "refine_backward",
    "refine_reverse",
    "refine_tangent",
]


_R2, _R3, _R6 = 2**-0.5, 3**-0.5, 6**-0.5


@inlined
def components(x, k, F):
    """The nine components of a block of channels."""
    return (
        load(x, k),
        load(x, k + F),
        load(x, k + 2 * F),
        load(x, k + 3 * F),
        load(x, k + 4 * F),
        load(x, k + 5 * F),
        load(x, k + 6 * F),
        load(x, k + 7 * F),
        load(x, k + 8 * F),
    )


@inlined
def put(x, k, F, v):
    """Store nine components."""
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = v
    store(x, k, v0)
    store(x, k + F, v1)
    store(x, k + 2 * F, v2)
    store(x, k + 3 * F, v3)
    store(x, k + 4 * F, v4)
    store(x, k + 5 * F, v5)
    store(x, k + 6 * F, v6)
    store(x, k + 7 * F, v7)
    store(x, k + 8 * F, v8)


@inlined
def matrix(v, r2, r3, r6, turned):
    """Entries of the matrix with components v; ``turned`` is r2, or -r2 for the transposed matrix."""
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = v
    trace, diagonal, last = r3 * v0, r2 * v7, r6 * v8
    a, b, c = turned * v1, turned * v2, turned * v3
    s, t, u = r2 * v4, r2 * v5, r2 * v6
    return (
        *(trace + diagonal - last, s - c, u + b),
        *(s + c, trace - diagonal - last, t - a),
        *(u - b, t + a, trace + last + last),
    )


@inlined
def parts_of(m, r2, r3, r6):
    """Components of the matrix with entries m."""
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m
    return (
        r3 * (m00 + m11 + m22),
        r2 * (m21 - m12),
        r2 * (m02 - m20),
        r2 * (m10 - m01),
        r2 * (m01 + m10),
        r2 * (m12 + m21),
        r2 * (m02 + m20),
        r2 * (m00 - m11),
        r6 * (m22 + m22 - m00 - m11),
    )


@inlined
def multiply(x, y):
    """Product of two matrices."""
    x00, x01, x02, x10, x11, x12, x20, x21, x22 = x
    y00, y01, y02, y10, y11, y12, y20, y21, y22 = y
    return (
        *(x00 * y00 + x01 * y10 + x02 * y20, x00 * y01 + x01 * y11 + x02 * y21, x00 * y02 + x01 * y12 + x02 * y22),
        *(x10 * y00 + x11 * y10 + x12 * y20, x10 * y01 + x11 * y11 + x12 * y21, x10 * y02 + x11 * y12 + x12 * y22),
        *(x20 * y00 + x21 * y10 + x22 * y20, x20 * y01 + x21 * y11 + x22 * y21, x20 * y02 + x21 * y12 + x22 * y22),
    )


@inlined
def add(x, y):
    """Sum of two sets of nine."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = x
    y0, y1, y2, y3, y4, y5, y6, y7, y8 = y
    return x0 + y0, x1 + y1, x2 + y2, x3 + y3, x4 + y4, x5 + y5, x6 + y6, x7 + y7, x8 + y8


@inlined
def scale(s, x):
    """A set of nine times a factor."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = x
    return s * x0, s * x1, s * x2, s * x3, s * x4, s * x5, s * x6, s * x7, s * x8


@inlined
def dot(x, y):
    """Inner product of two sets of nine."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8 = x
    y0, y1, y2, y3, y4, y5, y6, y7, y8 = y
    return x0 * y0 + x1 * y1 + x2 * y2 + x3 * y3 + x4 * y4 + x5 * y5 + x6 * y6 + x7 * y7 + x8 * y8


@inlined
def product(A, B, both):
    """A B + B A, or without ``both`` 2 A B."""
    P = multiply(A, B)
    if both:
        return add(P, multiply(B, A))
    return add(P, P)


@compiled
def matrix_product(job, X, Y, sign_X, sign_Y, both, out):
    """out = X Y or X Y + Y X; a sign of -1 transposes by turning the antisymmetric part."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, y, o = X.reshape(-1), Y.reshape(-1), out.reshape(-1)
    r2, r3, r6 = splat(x, _R2), splat(x, _R3), splat(x, _R6)
    turn_X, turn_Y = splat(x, sign_X * _R2), splat(x, sign_Y * _R2)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(x, k, F), r2, r3, r6, turn_X)
            B = matrix(components(y, k, F), r2, r3, r6, turn_Y)
            P = multiply(A, B)
            if both:
                P = add(P, multiply(B, A))
            put(o, k, F, parts_of(P, r2, r3, r6))


@moving
def part_norms(job, X, out):
    """out = |I|², |A|², |S|² of each channel: (N, 9, F) -> (N, 3 F)."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, o = X.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            f = fit(block, F, W)
            v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(x, n * 9 * F + f, F)
            at = n * 3 * F + f
            store(o, at, v0 * v0)
            store(o, at + F, v1 * v1 + v2 * v2 + v3 * v3)
            store(o, at + 2 * F, v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7 + v8 * v8)


@moving
def part_norms_backward(job, X, grad, out):
    """out = 2 X times the gradient of each part, the gradient of :func:`part_norms`."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, g, o = X.reshape(-1), grad.reshape(-1), out.reshape(-1)
    two = splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            f = fit(block, F, W)
            at = n * 3 * F + f
            g0, g1, g2 = two * load(g, at), two * load(g, at + F), two * load(g, at + 2 * F)
            v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(x, n * 9 * F + f, F)
            put(o, n * 9 * F + f, F, (g0 * v0, g1 * v1, g1 * v2, g1 * v3, g2 * v4, g2 * v5, g2 * v6, g2 * v7, g2 * v8))


@moving
def normalize(job, X, out):
    """out = X / (|X|² + 1)."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, o = X.reshape(-1), out.reshape(-1)
    one = splat(x, 1.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v = components(x, k, F)
            put(o, k, F, scale(one / (dot(v, v) + one), v))


@inlined
def pull_back_normalization(v, g, one, two):
    """Gradient in v of g · v / (|v|² + 1)."""
    s = one / (dot(v, v) + one)
    t = (one - two) * two * s * s * dot(g, v)
    return add(scale(s, g), scale(t, v))


@moving
def normalize_backward(job, X, grad, out):
    """Gradient of :func:`normalize` in X."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, g, o = X.reshape(-1), grad.reshape(-1), out.reshape(-1)
    one, two = splat(x, 1.0), splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            put(o, k, F, pull_back_normalization(components(x, k, F), components(g, k, F), one, two))


@inlined
def bend_normalization(v, a, b, one, two):
    """Gradient in v of b · J a, with the symmetric Jacobian J of v / (|v|² + 1)."""
    s = one / (dot(v, v) + one)
    twice = (one - two) * two * s * s
    av, bv = dot(a, v), dot(b, v)
    along = twice * dot(a, b) - two * two * twice * s * av * bv
    return add(scale(along, v), scale(twice, add(scale(bv, a), scale(av, b))))


@moving
def normalize_twice(job, X, inner, grad, out_X, out_inner):
    """Gradients of :func:`normalize_backward` in X and in the gradient it was given, ``inner``."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, g, h = X.reshape(-1), inner.reshape(-1), grad.reshape(-1)
    ox, og = out_X.reshape(-1), out_inner.reshape(-1)
    one, two = splat(x, 1.0), splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v, a, b = components(x, k, F), components(g, k, F), components(h, k, F)
            put(ox, k, F, bend_normalization(v, a, b, one, two))
            put(og, k, F, pull_back_normalization(v, b, one, two))


@moving
def normalize_reverse(job, X, dX, O, dO, out):
    """Gradient in X of ⟨O, normalize(X)⟩ + ⟨dO, J dX⟩, with the Jacobian J of :func:`normalize`."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, dx, g, dg, o = X.reshape(-1), dX.reshape(-1), O.reshape(-1), dO.reshape(-1), out.reshape(-1)
    one, two = splat(x, 1.0), splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v = components(x, k, F)
            bent = bend_normalization(v, components(dg, k, F), components(dx, k, F), one, two)
            put(o, k, F, add(bent, pull_back_normalization(v, components(g, k, F), one, two)))


@compiled
def interact(job, Y, M, factor, both, out):
    """out = P / (|P|² + 1) of P = factor (Y M + M Y), or without ``both`` P = 2 factor Y M."""
    num_atoms, _, F = Y.shape
    W = lanes_that_fit(Y, F)
    y, m, o = Y.reshape(-1), M.reshape(-1), out.reshape(-1)
    r2, r3, r6, one = splat(y, _R2), splat(y, _R3), splat(y, _R6), splat(y, 1.0)
    for n in claimed(job, num_atoms):
        times = splat(y, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(y, k, F), r2, r3, r6, r2)
            B = matrix(components(m, k, F), r2, r3, r6, r2)
            v = scale(times, parts_of(product(A, B, both), r2, r3, r6))
            put(o, k, F, scale(one / (dot(v, v) + one), v))


@compiled
def interact_backward(job, Y, M, factor, both, grad, out_Y, out_M):
    """Gradients of :func:`interact` in Y and M."""
    num_atoms, _, F = Y.shape
    W = lanes_that_fit(Y, F)
    y, m, g, oy, om = Y.reshape(-1), M.reshape(-1), grad.reshape(-1), out_Y.reshape(-1), out_M.reshape(-1)
    r2, r3, r6, one, two = splat(y, _R2), splat(y, _R3), splat(y, _R6), splat(y, 1.0), splat(y, 2.0)
    turned = splat(y, -_R2)
    for n in claimed(job, num_atoms):
        times = splat(y, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(y, k, F), r2, r3, r6, r2)
            B = matrix(components(m, k, F), r2, r3, r6, r2)
            v = scale(times, parts_of(product(A, B, both), r2, r3, r6))
            d = scale(times, pull_back_normalization(v, components(g, k, F), one, two))
            G = matrix(d, r2, r3, r6, r2)
            At = matrix(components(y, k, F), r2, r3, r6, turned)
            Bt = matrix(components(m, k, F), r2, r3, r6, turned)
            put(oy, k, F, parts_of(product(G, Bt, both), r2, r3, r6))
            put(om, k, F, parts_of(product(At, G, both), r2, r3, r6))


@compiled
def refine(job, X, D, factor, out):
    """out = X + D + factor D²."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, d, o = X.reshape(-1), D.reshape(-1), out.reshape(-1)
    r2, r3, r6 = splat(x, _R2), splat(x, _R3), splat(x, _R6)
    for n in claimed(job, num_atoms):
        times = splat(x, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v = components(d, k, F)
            A = matrix(v, r2, r3, r6, r2)
            square = scale(times, parts_of(multiply(A, A), r2, r3, r6))
            put(o, k, F, add(add(components(x, k, F), v), square))


@compiled
def refine_backward(job, D, factor, grad, out):
    """Gradient of :func:`refine` in D."""
    num_atoms, _, F = D.shape
    W = lanes_that_fit(D, F)
    d, g, o = D.reshape(-1), grad.reshape(-1), out.reshape(-1)
    r2, r3, r6 = splat(d, _R2), splat(d, _R3), splat(d, _R6)
    turned = splat(d, -_R2)
    for n in claimed(job, num_atoms):
        times = splat(d, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(d, k, F), r2, r3, r6, turned)
            v = components(g, k, F)
            G = matrix(v, r2, r3, r6, r2)
            both = add(multiply(A, G), multiply(G, A))
            put(o, k, F, add(v, scale(times, parts_of(both, r2, r3, r6))))


# Derivatives along a direction in which the arguments change, and the gradients of value and derivative together: what
# training on forces needs. O is a gradient in the value, dO one in the derivative.


@compiled
def interact_tangent(job, Y, M, dY, dM, factor, both, out):
    """The derivative of :func:`interact`."""
    num_atoms, _, F = Y.shape
    W = lanes_that_fit(Y, F)
    y, m, dy, dm, o = Y.reshape(-1), M.reshape(-1), dY.reshape(-1), dM.reshape(-1), out.reshape(-1)
    r2, r3, r6, one, two = splat(y, _R2), splat(y, _R3), splat(y, _R6), splat(y, 1.0), splat(y, 2.0)
    for n in claimed(job, num_atoms):
        times = splat(y, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(y, k, F), r2, r3, r6, r2)
            B = matrix(components(m, k, F), r2, r3, r6, r2)
            dA = matrix(components(dy, k, F), r2, r3, r6, r2)
            dB = matrix(components(dm, k, F), r2, r3, r6, r2)
            v = scale(times, parts_of(product(A, B, both), r2, r3, r6))
            dv = scale(times, parts_of(add(product(dA, B, both), product(A, dB, both)), r2, r3, r6))
            put(o, k, F, pull_back_normalization(v, dv, one, two))


@compiled
def interact_reverse(job, Y, M, dY, dM, factor, both, O, dO, out_Y, out_M):
    """Gradients in Y and M of :func:`interact` and :func:`interact_tangent` together."""
    num_atoms, _, F = Y.shape
    W = lanes_that_fit(Y, F)
    y, m, dy, dm = Y.reshape(-1), M.reshape(-1), dY.reshape(-1), dM.reshape(-1)
    g, dg, oy, om = O.reshape(-1), dO.reshape(-1), out_Y.reshape(-1), out_M.reshape(-1)
    r2, r3, r6, one, two = splat(y, _R2), splat(y, _R3), splat(y, _R6), splat(y, 1.0), splat(y, 2.0)
    turned = splat(y, -_R2)
    for n in claimed(job, num_atoms):
        times = splat(y, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            A = matrix(components(y, k, F), r2, r3, r6, r2)
            B = matrix(components(m, k, F), r2, r3, r6, r2)
            dA = matrix(components(dy, k, F), r2, r3, r6, r2)
            dB = matrix(components(dm, k, F), r2, r3, r6, r2)
            v = scale(times, parts_of(product(A, B, both), r2, r3, r6))
            dv = scale(times, parts_of(add(product(dA, B, both), product(A, dB, both)), r2, r3, r6))
            slope = components(dg, k, F)
            of_dv = pull_back_normalization(v, slope, one, two)
            of_v = add(
                pull_back_normalization(v, components(g, k, F), one, two), bend_normalization(v, slope, dv, one, two)
            )
            G = matrix(scale(times, of_v), r2, r3, r6, r2)
            H = matrix(scale(times, of_dv), r2, r3, r6, r2)
            At, Bt = (
                matrix(components(y, k, F), r2, r3, r6, turned),
                matrix(components(m, k, F), r2, r3, r6, turned),
            )
            dAt, dBt = (
                matrix(components(dy, k, F), r2, r3, r6, turned),
                matrix(components(dm, k, F), r2, r3, r6, turned),
            )
            put(oy, k, F, parts_of(add(product(G, Bt, both), product(H, dBt, both)), r2, r3, r6))
            put(om, k, F, parts_of(add(product(At, G, both), product(dAt, H, both)), r2, r3, r6))


@compiled
def refine_tangent(job, D, dX, dD, factor, out):
    """The derivative of :func:`refine`."""
    num_atoms, _, F = D.shape
    W = lanes_that_fit(D, F)
    d, dx, dd, o = D.reshape(-1), dX.reshape(-1), dD.reshape(-1), out.reshape(-1)
    r2, r3, r6 = splat(d, _R2), splat(d, _R3), splat(d, _R6)
    for n in claimed(job, num_atoms):
        times = splat(d, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v = components(dd, k, F)
            A, B = matrix(components(d, k, F), r2, r3, r6, r2), matrix(v, r2, r3, r6, r2)
            change = scale(times, parts_of(product(A, B, True), r2, r3, r6))
            put(o, k, F, add(add(components(dx, k, F), v), change))


@compiled
def refine_reverse(job, D, dD, factor, O, dO, out):
    """Gradient in D of :func:`refine` and :func:`refine_tangent` together."""
    num_atoms, _, F = D.shape
    W = lanes_that_fit(D, F)
    d, dd, g, dg, o = D.reshape(-1), dD.reshape(-1), O.reshape(-1), dO.reshape(-1), out.reshape(-1)
    r2, r3, r6 = splat(d, _R2), splat(d, _R3), splat(d, _R6)
    turned = splat(d, -_R2)
    for n in claimed(job, num_atoms):
        times = splat(d, factor[n])
        for block in range(0, F, W):
            k = n * 9 * F + fit(block, F, W)
            v = components(g, k, F)
            A, dA = (
                matrix(components(d, k, F), r2, r3, r6, turned),
                matrix(components(dd, k, F), r2, r3, r6, turned),
            )
            G, H = matrix(v, r2, r3, r6, r2), matrix(components(dg, k, F), r2, r3, r6, r2)
            both = add(product(A, G, True), product(dA, H, True))
            put(o, k, F, add(v, scale(times, parts_of(both, r2, r3, r6))))


@moving
def squared_norms(job, X, out):
    """out = |X|², (N, 9, F) -> (N, F)."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, o = X.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            v0, v1, v2, v3, v4, v5, v6, v7, v8 = components(x, n * 9 * F + f, F)
            total = v0 * v0 + v1 * v1 + v2 * v2 + v3 * v3 + v4 * v4 + v5 * v5 + v6 * v6 + v7 * v7 + v8 * v8
            store(o, n * F + f, total)


@moving
def squared_norms_tangent(job, X, dX, out):
    """The derivative of :func:`squared_norms`, 2 ⟨X, dX⟩."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, o = X.reshape(-1), dX.reshape(-1), out.reshape(-1)
    two = splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            store(o, n * F + f, two * dot(components(x, n * 9 * F + f, F), components(dx, n * 9 * F + f, F)))


@moving
def add_norms_backward(job, X, grad, out):
    """out += 2 X grad, the gradient of :func:`squared_norms`."""
    num_atoms, _, F = X.shape
    x, g, o = X.reshape(-1), grad.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for c in range(9):
            at = n * 9 * F + c * F
            for f in range(F):
                o[at + f] += 2 * x[at + f] * g[n * F + f]


@moving
def squared_norms_backward(job, X, grad, out):
    """out = 2 X grad, the gradient of :func:`squared_norms`."""
    num_atoms, _, F = X.shape
    W = lanes_that_fit(X, F)
    x, g, o = X.reshape(-1), grad.reshape(-1), out.reshape(-1)
    two = splat(x, 2.0)
    for n in claimed(job, num_atoms):
        for block in range(0, F, W):
            f = fit(block, F, W)
            g0 = two * load(g, n * F + f)
            for c in range(9):
                at = (n * 9 + c) * F + f
                store(o, at, g0 * load(x, at))


@inlined
def gated(g, at, F, v):
    """Nine components times the gate of their part."""
    g0, g1, g2 = load(g, at), load(g, at + F), load(g, at + 2 * F)
    v0, v1, v2, v3, v4, v5, v6, v7, v8 = v
    return g0 * v0, g1 * v1, g1 * v2, g1 * v3, g2 * v4, g2 * v5, g2 * v6, g2 * v7, g2 * v8


@inlined
def multiply_each(a, b):
    """Products of two sets of nine, one by one."""
    a0, a1, a2, a3, a4, a5, a6, a7, a8 = a
    b0, b1, b2, b3, b4, b5, b6, b7, b8 = b
    return a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7, a8 * b8


@moving
def gate(job, X, gates, out):
    """out = X times the gate of each part: (N, 9, F), (N, 3 F)."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, g, o = X.reshape(-1), gates.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            k = n * 9 * F + f
            put(o, k, F, gated(g, n * 3 * F + f, F, components(x, k, F)))


@moving
def gate_backward(job, X, gates, grad, out_X, out_gate):
    """Gradients of :func:`gate`."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, g, d = X.reshape(-1), gates.reshape(-1), grad.reshape(-1)
    ox, og = out_X.reshape(-1), out_gate.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            change = components(d, k, F)
            put(ox, k, F, gated(g, at, F, change))
            p0, p1, p2, p3, p4, p5, p6, p7, p8 = multiply_each(components(x, k, F), change)
            store(og, at, p0)
            store(og, at + F, p1 + p2 + p3)
            store(og, at + 2 * F, p4 + p5 + p6 + p7 + p8)


@moving
def gate_tangent(job, X, dX, gates, dgates, out):
    """The derivative of :func:`gate`."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, g, dg, o = X.reshape(-1), dX.reshape(-1), gates.reshape(-1), dgates.reshape(-1), out.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            put(o, k, F, add(gated(g, at, F, components(dx, k, F)), gated(dg, at, F, components(x, k, F))))


@moving
def gate_reverse(job, X, dX, gates, dgates, O, dO, out_X, out_gate):
    """Gradients of :func:`gate` and :func:`gate_tangent` together, O in the value and dO in the derivative."""
    num_atoms, _, F = X.shape
    lanes = lanes_that_fit(X, F)
    x, dx, g, dg = X.reshape(-1), dX.reshape(-1), gates.reshape(-1), dgates.reshape(-1)
    d, dd, ox, og = O.reshape(-1), dO.reshape(-1), out_X.reshape(-1), out_gate.reshape(-1)
    for n in claimed(job, num_atoms):
        for block in range(0, F, lanes):
            f = fit(block, F, lanes)
            at, k = n * 3 * F + f, n * 9 * F + f
            a, b = components(d, k, F), components(dd, k, F)
            put(ox, k, F, add(gated(g, at, F, a), gated(dg, at, F, b)))
            a0, a1, a2, a3, a4, a5, a6, a7, a8 = multiply_each(components(x, k, F), a)
            b0, b1, b2, b3, b4, b5, b6, b7, b8 = multiply_each(components(dx, k, F), b)
            store(og, at, a0 + b0)
            store(og, at + F, a1 + a2 + a3 + b1 + b2 + b3)
            store(og, at + 2 * F, a4 + a5 + a6 + a7 + a8 + b4 + b5 + b6 + b7 + b8)
