"""Memory of the values on a tape, used again as soon as the last reference to a value goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torchmdnet.ops.calls import repeatable

__all__ = ["Buffer", "Places", "Shelves", "Workspace"]

#: Evaluations after which arrays that were not needed since the last time are released.
_PERIOD = 16
#: Shapes beyond which those that are remembered are forgotten.
_MANY = 4096


class Buffer:
    """A tensor, which is an array too.

    A step that reads a tensor later keeps the buffer, not the tensor or its array, whose memory may be used again.
    """

    #: As a tensor without history, and as an array of NumPy; either is made of the other when it is first read.
    tensor: Tensor
    array: Any
    #: The number of the value on its tape.
    key = -1
    #: Whether the value depends on the geometry.
    moves = False
    #: Whether a step keeps these numbers, so that nothing may be added to them in place.
    is_shared = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name == "array":
            self.array = self.tensor.contiguous().numpy()
            return self.array
        if name == "tensor":
            self.tensor = torch.from_numpy(self.array)
            return self.tensor
        raise AttributeError(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.array.shape

    def owned(self) -> Tensor:
        """As a tensor that may outlive the buffer."""
        return self.tensor


class _Lent(Buffer):
    """A buffer whose memory returns to its shelf with the last reference to it."""

    def __init__(self, array: Any, free: list[Any] | None, flat: Any) -> None:
        self.array, self.free, self.flat = array, free, flat

    def owned(self) -> Tensor:
        self.free = None
        return self.tensor

    def __del__(self) -> None:
        if self.free is not None:
            self.free.append(self.flat)


class Workspace:
    """Arrays that wait to be used again, in sizes that are rounded up by at most an eighth."""

    def __init__(self) -> None:
        self.shelves = Shelves()
        self._places: dict[torch.dtype, Places] = {}
        self._evaluations = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[Any, ...]:
        return Workspace, ()

    def begin(self, dtype: torch.dtype) -> Places:
        """Call before every evaluation; now and then, arrays that no evaluation needed are given back to the system.

        Returns:
            Where buffers of this precision come from.
        """
        self._evaluations += 1
        if self._evaluations % _PERIOD == 0:
            for shelf in [*self.shelves.values()]:
                shelf.release_idle()
            if sum(map(len, [*self._places.values()])) > _MANY:
                self._places.clear()
                for kind in [kind for kind, shelf in [*self.shelves.items()] if not shelf.free]:
                    self.shelves.pop(kind, None)
        places = self._places.get(dtype)
        if places is None:
            places = self._places[dtype] = Places(self.shelves, dtype)
        return places


class Places(dict[tuple[int, ...], tuple[Any, int]]):
    """Buffers of one precision, of a workspace."""

    def __init__(self, shelves: Shelves, dtype: torch.dtype) -> None:
        super().__init__()
        self.shelves, self.dtype = shelves, dtype

    def __missing__(self, shape: tuple[int, ...]) -> tuple[Any, int]:
        size = math.prod(shape)
        step = 1 << max(size.bit_length() - 4, 0)
        self[shape] = self.shelves[-(-size // step) * step, self.dtype], size
        return self[shape]

    def empty(self, *shape: int) -> Buffer:
        """A buffer with arbitrary values."""
        shelf, size = self[shape]
        free = shelf.free
        try:
            flat = free.pop()
        except IndexError:  # it is not looked at first: threads share a workspace
            flat = torch.empty(shelf.size, dtype=shelf.dtype).numpy()  # aligned, unlike NumPy's
        if len(free) < shelf.idle:
            shelf.idle = len(free)
        return _Lent(flat[:size].reshape(shape), free, flat)

    def zeros(self, *shape: int) -> Buffer:
        """A buffer that holds zeros."""
        made = self.empty(*shape)
        repeatable(made.array.fill, 0)
        return made


class Shelves(dict[tuple[int, torch.dtype], "_Shelf"]):
    """Free arrays by size and precision."""

    def __missing__(self, kind: tuple[int, torch.dtype]) -> _Shelf:
        made = self[kind] = _Shelf(*kind)
        return made


class _Shelf:
    """Free arrays of one size."""

    __slots__ = ("dtype", "free", "idle", "size")

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.free: list[Any] = []
        self.idle = 0  # the fewest that were free since the last release

    def release_idle(self) -> None:
        del self.free[: self.idle]
        self.idle = len(self.free)
