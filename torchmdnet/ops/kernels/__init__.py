"""Compiled twins of the operations on edges: custom operators with derivatives of every order."""

from torchmdnet.ops.kernels.operators import can_run, embed, message

__all__ = ["can_run", "embed", "message"]
