r"""Mixing of channels, one matrix for each part of the tensors.

.. math:: X'_{ncg} = \sum_f X_{ncf}\, W_{l(c), fg}

===============  ====================  ===================================================================
letters          shape                 meaning
===============  ====================  ===================================================================
``X``, ``out``   (N, 9, F), (N, 9, G)  features before and after
``packed``       (3, blocks, F, 2 W)   matrices in blocks of two vectors; the last overlaps the one before
``part``, ``c``                        l = 0, 1, 2 with c = 2 l + 1 components from l² on
``r``                                  a row: one component of one atom; ``i0`` ... where six lie in X
===============  ====================  ===================================================================

Libraries have no product for rows that lie apart, as the components of a part do, and copies would cost as much as the
arithmetic of small systems.
"""

# pyright: reportMissingTypeArgument=false, reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import numpy as np

from torchmdnet.ops.kernels.compiling import called, inlined
from torchmdnet.ops.kernels.sharing import THREADS, claimed, compiled
from torchmdnet.ops.kernels.simd import fit, lanes_that_fit, load_two, repeat_two, splat_two, store
from torchmdnet.ops.kernels.work import lanes_of

__all__ = [
    "can_pack",
    "fill_packed",
    "mix",
    "pack",
]


#: Atoms whose features stay in the first cache while weights pass by.
CHUNK = 8
#: Atoms times channels for one thread that are so few that the weights had better pass once.
FEW = 14 * 128


def can_pack(num_channels: int, itemsize: int) -> bool:
    """Whether :func:`mix` takes so few channels."""
    return num_channels >= 2 * lanes_of(itemsize)


def pack(W: Any, *, turned: bool) -> Any:
    """Weights of the three parts (3, F, G), or turned (3, G, F), as :func:`mix` reads them: (3, blocks, F, 2 lanes)."""
    many = 2 * lanes_of(W.itemsize)
    F, G = W.shape[:0:-1] if turned else W.shape[1:]
    out = np.empty((3, (G + many - 1) // many, F, many), W.dtype)
    fill_packed(W, turned, out)
    return out


@called
def fill_packed(W, turned, out):
    """The loop of :func:`pack`; the last block overlaps the one before."""
    _, blocks, F, _ = out.shape
    G = W.shape[1] if turned else W.shape[2]
    many = 2 * lanes_that_fit(W, G, 2)
    for part in range(3):
        for block in range(blocks):
            first = fit(block * many, G, many)
            for f in range(F):
                for k in range(many):
                    out[part, block, f, k] = W[part, first + k, f] if turned else W[part, f, first + k]


@inlined
def row_of(r, c, first, atom):
    """Where row r of a part with c components lies among the components of all atoms."""
    return (atom + r // c) * 9 + first + r % c


@compiled
def mix(job, X, packed, out):
    """out_c = X_c W of the part of c: (N, 9, F) -> (N, 9, G), with weights from :func:`pack`.

    Six rows times two vectors of channels at a time keep twelve sums in registers; the last rows are made twice.
    """
    num_atoms, _, F = X.shape
    G, blocks = out.shape[2], packed.shape[1]
    W = lanes_that_fit(X, G, 2)
    x, w, o = X.reshape(-1), packed.reshape(-1), out.reshape(-1)
    zero = splat_two(x, 0.0)
    size = num_atoms if num_atoms * F <= FEW and job[THREADS] <= 1 else CHUNK
    for chunk in claimed(job, (num_atoms + size - 1) // size):
        atom = chunk * size
        for part in range(3):
            c, first = 2 * part + 1, part * part
            last = min(size, num_atoms - atom) * c - 1
            for block in range(blocks):
                g = fit(block * 2 * W, G, 2 * W)
                for r in range(0, last + 1, 6):  # 6 rows × 2 vectors: 12 sums, 2 weights and 1 feature in 16 registers
                    i0, i1 = row_of(r, c, first, atom), row_of(min(r + 1, last), c, first, atom)
                    i2, i3 = row_of(min(r + 2, last), c, first, atom), row_of(min(r + 3, last), c, first, atom)
                    i4, i5 = row_of(min(r + 4, last), c, first, atom), row_of(min(r + 5, last), c, first, atom)
                    a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
                    k = (part * blocks + block) * F * 2 * W
                    for f in range(F):
                        u = load_two(w, k)
                        a0 += repeat_two(x, i0 * F + f) * u
                        a1 += repeat_two(x, i1 * F + f) * u
                        a2 += repeat_two(x, i2 * F + f) * u
                        a3 += repeat_two(x, i3 * F + f) * u
                        a4 += repeat_two(x, i4 * F + f) * u
                        a5 += repeat_two(x, i5 * F + f) * u
                        k += 2 * W
                    store(o, i0 * G + g, a0)
                    store(o, i1 * G + g, a1)
                    store(o, i2 * G + g, a2)
                    store(o, i3 * G + g, a3)
                    store(o, i4 * G + g, a4)
                    store(o, i5 * G + g, a5)
