"""Compiled twins of the operations, with derivatives of every order."""

from torchmdnet.ops.kernels.forms import TWINS, needed
from torchmdnet.ops.kernels.operators import (
    EdgeLayout,
    can_loop,
    can_run,
    edge_loops,
    embed,
    interact,
    is_traced,
    message,
    mix,
    network_loops,
    node_loops,
    normalize,
    norms_by_part,
    product,
    refine,
)

__all__ = [
    "TWINS",
    "EdgeLayout",
    "can_loop",
    "can_run",
    "edge_loops",
    "embed",
    "interact",
    "is_traced",
    "message",
    "mix",
    "needed",
    "network_loops",
    "node_loops",
    "normalize",
    "norms_by_part",
    "product",
    "refine",
]
