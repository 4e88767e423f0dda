"""Calls of fixed shape, recorded once on the GPU and replayed without the cost of launching them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CudaGraph", "check_cuda"]


def check_cuda(device: str | torch.device, option: str) -> None:
    """Refuse to capture where there is no GPU, or the model is elsewhere.

    Raises:
        ValueError: Naming the option.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"{option}=True needs CUDA, which is not available here. Pass {option}=False.")
    if torch.device(device).type != "cuda":
        raise ValueError(f"{option}=True needs the model on the GPU, but device is {device!r}. Pass 'cuda'.")


class CudaGraph:
    """A function captured as a CUDA graph.

    The function must not wait for the GPU or make arrays whose size depends on values. Its inputs are copied, so that
    the caller's tensors are free to go; which of them are None is frozen, as are their shapes.

    Args:
        function: Takes tensors or None, returns tensors.
        inputs: Arguments to record with, on the GPU.
        warmup_steps: Calls before the recording, during which libraries set themselves up.

    Raises:
        RuntimeError: If the function cannot be captured.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor | None, ...],
        warmup_steps: int = 12,
    ) -> None:
        self.inputs: tuple[Tensor | None, ...] = tuple(None if x is None else x.clone() for x in inputs)
        self.device = next(x.device for x in self.inputs if x is not None)
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmup_steps):
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Replay with other values; the results are copies.

        Raises:
            ValueError: If an input appears or vanishes, or has another shape than at the recording.
        """
        for number, (ours, theirs) in enumerate(zip(self.inputs, inputs, strict=True)):
            recorded, given = (None if x is None else tuple(x.shape) for x in (ours, theirs))
            if recorded != given:
                raise ValueError(
                    f"Input {number} of the captured call had shape {recorded}, now it has {given}. A CUDA graph keeps "
                    "the shapes of its first call: give a box always or never, and the same number of atoms."
                )
            if ours is not None and theirs is not None:
                ours.copy_(theirs)
        with torch.cuda.device(self.device):
            self.graph.replay()
            return tuple(output.clone() for output in self.outputs)

    def release(self) -> None:
        """Give up the graph and its memory, which PyTorch uses again; it cannot be replayed afterwards."""
        self.graph.reset()
        self.inputs = self.outputs = ()
