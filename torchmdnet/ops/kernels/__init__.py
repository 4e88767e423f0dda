"""Compiled kernels of the operations, with derivatives of every order; loops of the CPU are in :mod:`.loops`."""

from torchmdnet.ops.kernels.algebra import interact, normalize, norms_by_part, product, refine
from torchmdnet.ops.kernels.embedding import embed
from torchmdnet.ops.kernels.forms import TWINS, needed
from torchmdnet.ops.kernels.layout import EdgeLayout
from torchmdnet.ops.kernels.message import message_sum
from torchmdnet.ops.kernels.mixing import mix
from torchmdnet.ops.kernels.support import has_cpu_loops, has_edge_kernel, has_kernel
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.ops.kernels.work import WORTH_THREADS
from torchmdnet.tracing import is_traced

__all__ = [
    "TWINS",
    "WORTH_THREADS",
    "EdgeLayout",
    "cores",
    "embed",
    "has_cpu_loops",
    "has_edge_kernel",
    "has_kernel",
    "interact",
    "is_traced",
    "message_sum",
    "mix",
    "needed",
    "normalize",
    "norms_by_part",
    "product",
    "refine",
]
