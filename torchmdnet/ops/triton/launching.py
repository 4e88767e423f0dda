"""Starting kernels of Triton on the device of their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["launch"]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **options: Any) -> None:
    """Run a kernel on the device of its tensors, if there is anything to do."""
    if all(grid):
        some = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(some):
            kernel[grid](*args, num_warps=num_warps, **options)
