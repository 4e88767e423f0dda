"""Whether Triton can be used: its release, and whether a tiny kernel runs on a device."""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torchmdnet.switches import is_on

__all__ = ["has_triton"]

#: The release that comes with the oldest PyTorch we run on.
OLDEST_TRITON = (3, 2)

_log = logging.getLogger("torchmdnet.ops.kernels")
#: Devices on which a kernel was tried, and whether it ran.
_tried: dict[torch.device, bool] = {}


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can be used on a device; a warning tells once if they cannot, and why.

    On the first call for a GPU a tiny kernel is compiled and run there. Tensors of the CPU reach kernels in Triton's
    interpreter only, which needs no trial.
    """
    if not _is_recent():
        return False
    if device.type == "cpu":
        return True
    found = _tried.get(device)
    if found is None:
        if torch.cuda.is_current_stream_capturing():  # nothing may be waited for; the call before was a plain one
            return True
        found = _tried[device] = _runs_on(device)
    return found


def forget() -> None:
    """Try again what was tried."""
    _tried.clear()
    _is_recent.cache_clear()


@functools.cache
def _is_recent() -> bool:
    if is_on("TORCHMDNET_PLAIN_OPS"):
        return False
    try:
        found = importlib.import_module("triton").__version__
    except (ImportError, AttributeError):  # a folder of that name on the path has no version
        found = "none"
    is_recent = found != "none" and tuple(int(number) for number in found.split(".")[:2]) >= OLDEST_TRITON
    if not is_recent:
        oldest = ".".join(map(str, OLDEST_TRITON))
        _log.warning("Triton %s or later is needed on the GPU, found: %s. Plain PyTorch runs, slower.", oldest, found)
    return is_recent


def _runs_on(device: torch.device) -> bool:
    probe = importlib.import_module("torchmdnet.ops.triton.probe")  # by name: kernels of a device need this module
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            probe.probe(device)
    except Exception as error:  # whatever a compiler, a driver or Triton raises: definitions run everywhere
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        _log.warning(
            "Triton does not run on %s (%s). Plain PyTorch runs, slower. %s", device, reason, probe.advice(error)
        )
        return False
    return True
