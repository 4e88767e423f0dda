"""Compiled twins of the operations, with derivatives of every order."""

from torchmdnet.ops.kernels.operators import (
    EdgeLayout,
    can_run,
    embed,
    interact,
    message,
    mix,
    normalize,
    product,
    refine,
)

__all__ = ["EdgeLayout", "can_run", "embed", "interact", "message", "mix", "normalize", "product", "refine"]
