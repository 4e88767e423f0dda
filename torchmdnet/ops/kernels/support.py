"""Which tensors compiled kernels take; for all others the definitions in PyTorch run."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from torchmdnet.ops.kernels.forms import TWINS
from torchmdnet.ops.kernels.triton_found import has_triton
from torchmdnet.ops.kernels.work import lanes_of
from torchmdnet.switches import is_on
from torchmdnet.tracing import device_kind, is_traced, records_operators

__all__ = ["has_cpu_loops", "has_edge_kernel", "has_kernel", "has_triton"]

_HAS_NUMBA = importlib.util.find_spec("numba") is not None and not is_on("TORCHMDNET_PLAIN_OPS")


def has_kernel(x: Tensor) -> bool:
    """Whether a compiled twin takes these features, channels last; ``TORCHMDNET_PLAIN_OPS=1`` turns them all off.

    Under ``torch.compile``, ``torch.export`` and the transforms of ``torch.func`` the definitions run.
    """
    if device_kind(x) not in TWINS:
        return has_cpu_loops(x, x.shape[-1])
    return x.dtype in (torch.float32, torch.float64) and not is_traced() and has_triton(x.device)


def has_edge_kernel(x: Tensor) -> bool:
    """Whether a compiled twin of an operator along edges takes this tensor, also while operators are recorded."""
    if not records_operators():
        return has_kernel(x)
    if device_kind(x) in TWINS:
        return x.dtype in (torch.float32, torch.float64) and has_triton(x.device)
    return _fits_loops(x, x.shape[-1])


def has_cpu_loops(x: Tensor, channels: int, *others: int) -> bool:
    """Whether it is the loops of the CPU that take tensors like this one.

    Args:
        x: Of their precision and on their device.
        channels: Channels of a row, which have to fill a vector.
        others: The same of other rows, such as the hidden layers of a network.
    """
    return _fits_loops(x, channels, *others) and not is_traced()


def _fits_loops(x: Tensor, *channels: int) -> bool:
    return (
        _HAS_NUMBA
        and device_kind(x) == "cpu"
        and "cpu" not in TWINS
        and x.dtype in (torch.float32, torch.float64)
        and min(channels) >= lanes_of(x.element_size())
    )
