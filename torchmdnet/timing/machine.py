"""What times and memory depend on: threads, precision of products, and the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchmdnet._version import __version__

__all__ = ["Memory", "about_machine", "matrix_products", "num_threads", "physical_cores"]


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Use as many threads for arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """Let matrix products of float32 be as precise as PyTorch's ``highest``, ``high`` or ``medium``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Memory:
    """What is held at the worst moment beyond what was held at the start: of the process, or of a GPU.

    On the CPU the kernel keeps the highest resident size, and Linux allows it to be reset; elsewhere it is not known.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.before: int | None = None

    def start(self) -> None:
        """Give back what can be given back, and start counting."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        except OSError:
            self.before = None

    def used(self) -> int | None:
        """In bytes; None where it is not known."""
        if self.before is None:
            return None
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self.before)


def _status(name: str) -> int | None:
    """A size that Linux keeps of this process, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(match[1]) if match else None


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads not counted."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for block in _cpuinfo().split("\n\n"):
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if int(facts.get("processor", -1)) in allowed and "core id" in facts:
            cores.add((facts.get("physical id"), facts["core id"]))
    return len(cores) or len(allowed)


def _cpuinfo() -> str:
    """What Linux says of the processors; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def about_machine() -> dict[str, Any]:
    """Hardware and versions that numbers depend on."""
    import ase
    import numba

    model = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "physical_cores": physical_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {
            "torchmd-net": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "numpy": np.__version__,
            "ase": ase.__version__,
        },
    }
