"""Memory of the values on a tape, used again as soon as the last reference to a value goes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Buffer", "Workspace"]

#: Evaluations after which arrays that were not needed since the last time are released.
_PERIOD = 16
#: Shapes beyond which those that are remembered are forgotten.
_MANY = 4096


class Buffer:
    """An array, which is a tensor too. Its memory returns to its workspace with the last reference to the buffer.

    A step that reads an array later keeps the buffer, not the array or the tensor.
    """

    __slots__ = ("_array", "_flat", "_home", "_tensor", "key")

    def __init__(self, values: Tensor | np.ndarray, home: _Shelf | None = None, flat: Any = None):
        self._tensor, self._array = (values, None) if isinstance(values, Tensor) else (None, values)
        self._home, self._flat = home, flat
        #: The number of the value on its tape; -1 for anything else.
        self.key = -1

    @property
    def array(self) -> Any:
        """As an array of NumPy."""
        if self._array is None:
            assert self._tensor is not None
            self._array = self._tensor.contiguous().numpy()
        return self._array

    @property
    def tensor(self) -> Tensor:
        """As a tensor without history."""
        if self._tensor is None:
            assert self._array is not None
            self._tensor = torch.from_numpy(self._array)
        return self._tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple((self._tensor if self._array is None else self._array).shape)  # type: ignore[union-attr]

    def owned(self) -> Tensor:
        """As a tensor that may outlive the buffer: the workspace never gets its memory back."""
        self._home = None
        return self.tensor

    def __del__(self) -> None:
        if self._home is not None:
            self._home.free.append(self._flat)


class Workspace:
    """Arrays that wait to be used again, in sizes that are rounded up by at most an eighth."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[int, torch.dtype], _Shelf] = {}
        self._of_shape: dict[tuple[tuple[int, ...], torch.dtype], tuple[_Shelf, int]] = {}
        self._evaluations = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, ()

    def acquire(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        """A buffer with arbitrary values."""
        found = self._of_shape.get((shape, dtype))
        if found is None:
            found = self._of_shape[shape, dtype] = self._place(shape, dtype)
        shelf, size = found
        flat = shelf.take()
        return Buffer(flat[:size].reshape(shape), shelf, flat)

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[_Shelf, int]:
        size = math.prod(shape)
        step = 1 << max(size.bit_length() - 4, 0)
        kind = (-(-size // step) * step, dtype)
        shelf = self._shelves.get(kind)
        if shelf is None:
            shelf = self._shelves[kind] = _Shelf(*kind)
        return shelf, size

    def begin(self) -> None:
        """Call before every evaluation: now and then, arrays that no evaluation needed are given back to the system."""
        self._evaluations += 1
        if self._evaluations % _PERIOD:
            return
        for shelf in self._shelves.values():
            shelf.release_idle()
        if len(self._of_shape) > _MANY:
            self._shelves = {kind: shelf for kind, shelf in self._shelves.items() if shelf.free}
            self._of_shape.clear()


class _Shelf:
    """Free arrays of one size."""

    __slots__ = ("dtype", "free", "idle", "size")

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.free: list[Any] = []
        self.idle = 0  # the fewest that were free since the last release

    def take(self) -> Any:
        free = self.free
        try:
            flat = free.pop()
        except IndexError:
            return torch.empty(self.size, dtype=self.dtype).numpy()  # aligned, unlike NumPy's
        if len(free) < self.idle:
            self.idle = len(free)
        return flat

    def release_idle(self) -> None:
        del self.free[: self.idle]
        self.idle = len(self.free)
