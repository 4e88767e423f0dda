"""A tiny kernel, to see whether Triton runs on a device at all."""

# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
import triton
import triton.language as tl

__all__ = ["advice", "probe"]

#: The oldest cards that Triton makes code for.
OLDEST_CARD = (7, 0)
_SIZE = 32


@triton.jit
def double(x, out, size, BLOCK: tl.constexpr):
    """out = 2 x."""
    at = tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, at < size, 0), at < size)


def probe(device: torch.device) -> None:
    """Compile the kernel for a device, run it there and look at what it made.

    Triton compiles a module in C for each machine, with the compiler and the headers of Python that it finds there.

    Raises:
        RuntimeError: If the card is too old, or the kernel makes something else than it should.
        Exception: Whatever Triton raises where it cannot run.
    """
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST_CARD:
            oldest, ours = (".".join(map(str, version)) for version in (OLDEST_CARD, found))
            raise RuntimeError(
                f"{torch.cuda.get_device_name(device)} has compute capability {ours}, {oldest} is needed"
            )
    x = torch.arange(_SIZE - 1, dtype=torch.float32, device=device)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        double[(1,)](x, out, _SIZE - 1, BLOCK=_SIZE)
    if out.tolist() != [2.0 * k for k in range(_SIZE - 1)]:
        raise RuntimeError("a kernel that doubles numbers does not")


def advice(error: Exception) -> str:
    """What to do about an error of :func:`probe`."""
    text = str(error)
    if "C compiler" in text:
        return "Install a C compiler (apt install gcc, conda install gcc), or name one in the variable CC."
    if isinstance(error, subprocess.CalledProcessError):
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            return f"Install the headers of Python (apt install python{version}-dev), which its C compiler looks for."
        return "Its C compiler failed; another one can be named in the variable CC."
    if "compute capability" in text:
        return "Nothing can be done about it on this card."
    return "Update the driver of the card, or install the PyTorch that is made for it."
