"""Compiled twins of the operations: custom operators with derivatives of every order."""

from torchmdnet.ops.kernels.operators import can_run, embed, message, product

__all__ = ["can_run", "embed", "message", "product"]
