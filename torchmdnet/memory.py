"""How much memory there is, and refusing a calculation that cannot fit into it before it starts."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torchmdnet.errors import NotEnoughMemory
from torchmdnet.switches import is_on

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory", "check_memory", "expected_edges", "total_memory"]

_GROUP = Path("/sys/fs/cgroup")

#: Numbers of one channel that a calculation holds at once for each atom and component of a feature, at the least. An
#: evaluation of TensorNet on the CPU holds 22.
FEATURES = 10
#: Bytes that an edge takes at the least: two indices, a vector, a distance and where it lies in the radial grid.
EDGE_BYTES = 64
#: Atoms and edges below which nothing is looked up.
FEW_ATOMS, FEW_EDGES = 10_000, 1_000_000


def total_memory() -> int:
    """Bytes of memory that this process may use: those of the machine, or of its control group."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 2**63
    limit, _ = _control_group()
    return size if limit is None else min(size, limit)


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can be had now without swapping; None where it is not known.

    Args:
        device: A CUDA device, whose memory is asked for; any other is the memory of the machine, less where the control
            group of this process, such as a job or a container, has less left.
    """
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    free = 1024 * int(match[1]) if match else None
    limit, used = _control_group()
    if limit is not None and used is not None:
        left = max(0, limit - used)
        free = left if free is None else min(free, left)
    return free


def _control_group() -> tuple[int | None, int | None]:
    """Limit and use of the control group, without files that the system can drop; None where there is none."""
    for limit_file, use_file in (
        (_GROUP / "memory.max", _GROUP / "memory.current"),
        (_GROUP / "memory/memory.limit_in_bytes", _GROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = limit_file.read_text().strip(), use_file.read_text().strip()
            statistics = (limit_file.parent / "memory.stat").read_text()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 2**60:
            files = re.search(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
            return int(limit), int(used) - (int(files[1]) if files else 0)
    return None, None


def check_memory(
    num_atoms: int, num_edges: float, *, components: int, channels: int, itemsize: int, device: torch.device
) -> None:
    """Refuse a calculation whose features and edges alone do not fit into memory.

    The estimate is a lower bound, about half of what an evaluation takes, so that nothing is refused that could run.
    ``TORCHMDNET_MEMORY_CHECK=0`` turns it off.

    Args:
        num_atoms: Atoms of all systems (N).
        num_edges: Directed edges (E), or the number to expect.
        components: Numbers of a feature for each channel, 9 of a tensor.
        channels: Feature channels (F).
        itemsize: Bytes of a number.
        device: Where it is calculated.

    Raises:
        NotEnoughMemory: With the atoms, edges and bytes that are needed, and the bytes that there are.
    """
    is_small = num_atoms < FEW_ATOMS and num_edges < FEW_EDGES
    if is_small or not is_on("TORCHMDNET_MEMORY_CHECK"):
        return
    needed = num_atoms * FEATURES * components * channels * itemsize + num_edges * EDGE_BYTES
    available = available_memory(device)
    if available is not None and needed > available:
        raise NotEnoughMemory(
            f"{num_atoms:,} atoms with about {round(num_edges):,} edges need at least {_gigabytes(needed)} of memory "
            f"in this model ({channels} channels), but {_gigabytes(available)} are available. Take fewer atoms or "
            "systems at once, a smaller model or cutoff, or a machine with more memory. TORCHMDNET_MEMORY_CHECK=0 "
            "tries anyway."
        )


def expected_edges(num_atoms: int, volume: float, cutoff: float) -> float:
    """Directed edges of evenly spread atoms: N (N / V) 4/3 π r³."""
    return num_atoms * (num_atoms / volume) * 4 / 3 * math.pi * cutoff**3 if volume > 0 else 0.0


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
