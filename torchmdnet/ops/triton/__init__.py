"""Twins of the operators for GPUs, written in Triton.

Every form and stage of :mod:`torchmdnet.ops.kernels` has one here, under its own name.

What to expect, predicted from the bytes that move and not measured, for F channels of b bytes, K rows of the table that
an edge reads, and 9 components:

- A sum over neighbours reads 9 F b of features and 3 K F b of the table for each edge and does (6 K + 18) F operations
  with them, less than two for each number. Features of neighbours and a table of a megabyte live in the second-level
  cache, so its bandwidth is the floor: with F = 128 and K = 6 in single precision 13.8 kB for each edge, of which two
  thirds are the table. Memory itself sees each atom's features once, 4.6 kB.
- The gradient in features and coefficients together reads the same once more, and writes K b for each edge.
- The gradient of a table reads 18 F b for each edge, and writes and reads K rows of the table for each of its cells and
  for every 64 edges, or for each of 8192 shares of the edges where there are more.
- Everything over atoms and channels moves 9 b for each tensor, atom and channel, with 100 to 400 operations: memory is
  the floor, and a chain of such steps costs what its tensors weigh.

Small molecules are another matter: with a hundred programs to a kernel a device is idle, and the launches themselves
are what takes the time, so steps are best replayed as CUDA graphs.
"""

from torchmdnet.ops.triton.operators import (
    contraction,
    embedding,
    interact,
    matrix_product,
    message,
    mixing,
    normalize,
    normalize_slope,
    norms_by_part,
    refine,
)

__all__ = [
    "contraction",
    "embedding",
    "interact",
    "matrix_product",
    "message",
    "mixing",
    "normalize",
    "normalize_slope",
    "norms_by_part",
    "refine",
]
