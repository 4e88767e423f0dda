"""How many kernels a call would start on a GPU, how often the host would wait for it, and what it allocates.

Counted on a CPU, where tensors take the code for CUDA (:func:`torchmdnet.tracing.as_if_on`): each operation of PyTorch
that computes something is one launch, also where CUDA takes several kernels for it, as for sorting; each launch of a
Triton kernel is one. Triton's kernels are not run, so that results are arbitrary; what decides sizes, the search
for neighbours, runs in Triton's interpreter where that is chosen, ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from torchmdnet.tracing import as_if_on

__all__ = ["Counts", "counting"]

#: Operations that start nothing: they make arrays, or other views of them.
_FREE = frozenset(  # a number for a kernel stays on the host
    f"aten::{name}"
    for name in (
        "_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh",
        "new_empty", "new_empty_strided", "resize_", "scalar_tensor", "set_", "set_data",
    )
)  # fmt: skip
#: Operations after which the host waits: for a value, or for a size that depends on values.
_WAITS = frozenset(
    f"aten::{name}"
    for name in (
        "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "histc", "is_nonzero",
        "masked_select", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim",
    )
)  # fmt: skip
#: What brings values to the host, as Python calls it; on the CPU PyTorch has no operation for it.
_TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
#: What brings values to the device.
_TO_DEVICE = {torch.tensor, torch.as_tensor, torch.from_numpy}


#: Kernels that run where they can, beside those of the search, since it reads what they find.
_DECIDE = {"mark", "spread"}


class Counts:
    """What was counted.

    Attributes:
        launches: Launches, by the name of the operation or kernel.
        waits: Waits of the host, by what it waits for.
        copies: Arrays that the host sends to the device, by the function that makes them.
        largest: Bytes of the largest array.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.largest = 0

    @property
    def num_launches(self) -> int:
        """All launches."""
        return self.launches.total()

    @property
    def num_waits(self) -> int:
        """All waits of the host."""
        return self.waits.total()

    def __str__(self) -> str:
        most = ", ".join(f"{name} {count}" for name, count in self.launches.most_common(12))
        return f"{self.num_launches} launches, {self.num_waits} waits, {self.largest / 1e6:.3g} MB at most: {most}"


class _Operations(TorchDispatchMode):
    """Counts operations below autograd."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made, counts, name = func(*args, **kwargs), self.counts, func._schema.name
        if name in _WAITS and not (name == "aten::repeat_interleave" and kwargs.get("output_size") is not None):
            counts.waits[name] += 1
        if name == "aten::index" or (name.startswith("aten::index_put") and args[2].numel() > 1):
            by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            if by_mask:  # is turned into places first
                counts.waits["indexing by a mask"] += 1
                counts.launches["aten::nonzero"] += 1
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or name in _FREE:
            self._allocated(made, args) if not is_view else None
            return made
        sizes = [x.numel() for x in tree_leaves((made, args)) if isinstance(x, Tensor)]
        if any(sizes):
            counts.launches[name] += 1
        self._allocated(made, args)
        return made

    def _allocated(self, made: Any, args: Any) -> None:
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.counts.largest = max(self.counts.largest, x.numel() * x.element_size())


class _Calls(TorchFunctionMode):
    """Counts what reaches no operation."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TO_HOST:
            self.counts.waits[f"Tensor.{func.__name__}"] += 1
        elif func is Tensor.to and "cpu" in [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str)]:
            self.counts.waits["Tensor.to"] += 1
        elif func in _TO_DEVICE:
            self.counts.copies[func.__name__] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def counting(kind: str = "cuda") -> Iterator[Counts]:
    """Count within it, as if on another kind of device.

    Args:
        kind: Of the device.

    Example:
        >>> with counting() as counts:
        ...     model(z, pos)
        >>> counts.num_launches
    """
    counts = Counts()
    with as_if_on(kind), _launches_replaced(counts), _Calls(counts), _Operations(counts):
        yield counts


@contextlib.contextmanager
def _launches_replaced(counts: Counts) -> Iterator[None]:
    """Count launches of Triton's kernels; those that decide sizes run, in Triton's interpreter."""
    try:
        from triton.runtime.interpreter import InterpretedFunction  # pyright: ignore[reportMissingImports]
        from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield
        return
    classes: Any = (InterpretedFunction, JITFunction)
    before = [cls.run for cls in classes]

    def counted(run: Callable[..., Any], runs: bool) -> Callable[..., Any]:
        def launch(kernel: Any, *args: Any, **options: Any) -> Any:
            name = kernel.fn.__name__
            counts.launches[f"triton::{name}"] += 1
            decides = kernel.fn.__module__.startswith("torchmdnet.neighbors") or kernel.fn.__name__ in _DECIDE
            if not (runs and decides):
                return None
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return run(kernel, *args, **options)

        return launch

    try:
        for cls, run in zip(classes, before, strict=True):
            cls.run = counted(run, runs=cls is InterpretedFunction)
        yield
    finally:
        for cls, run in zip(classes, before, strict=True):
            cls.run = run
