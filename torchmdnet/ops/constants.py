"""Tables of numbers that every precision and device has a copy of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmdnet.tracing import is_traced

__all__ = ["Constant"]


class Constant:
    """A table that is made once for each precision and device.

    Copies for the CPU are made at once. Copies for other devices are kept on first use, unless the call is recorded or
    a transform of ``torch.func``: what is made there belongs to the recording and has no values outside it.

    Args:
        values: The numbers, in float64.
    """

    def __init__(self, values: Tensor | Sequence[Any]) -> None:
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self._copies = {(dtype, self.values.device): self.values.to(dtype) for dtype in (torch.float32, torch.float64)}

    def __call__(self, like: Tensor) -> Tensor:
        """The table in the precision and on the device of ``like``."""
        copy = self._copies.get((like.dtype, like.device))
        if copy is None:
            copy = self.values.to(like.device, like.dtype)
            if not is_traced() and type(copy) is Tensor:
                self._copies[like.dtype, like.device] = copy
        return copy
