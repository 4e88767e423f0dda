#!/usr/bin/env python
"""What part of the machine's own speed the loops reach in which an evaluation spends its time.

python benchmarks/floors.py [--models tensornet] [--systems 192-water]

First the machine is asked how fast PyTorch multiplies matrices and a plain loop reads memory, cache by cache, on one
thread. Then energy and forces are computed, and for every compiled loop, and all matrix products
together, the shortest time is told that these speeds allow, its floor. It is the largest of

- arithmetic: its multiply-adds at the rate of a large matrix product,
- memory: every array it is given, read or written once, at the rate of the level of memory they fit into,
- gathering: for each edge the rows of the radial table, or the weights made of them, and the neighbour's features, at
  the rate of the cache that these fit into, a block of channels at a time where the loop takes it so. This is what a
  loop over edges has to read, however little arithmetic it does.

A loop at its floor has fraction 1. Fractions above 1 mean that arrays stayed in a faster cache than assumed. All times
are the processor's, so that whatever else runs on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import torch
from systems import SYSTEMS
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import OPTIONS

from torchmdnet.models.model import create_model

#: Bytes of memory that is read to learn how fast a level is.
LEVELS = {"second cache": 2**18, "third cache": 2**23, "memory": 2**28}
#: The largest arrays a level holds besides other things.
HOLDS = {"second cache": 2**18, "third cache": 2**24}
#: What a loop reads of neighbours, by the names of its arguments.
NEIGHBOURS = {
    "message_sum": ("X",),
    "scalar_message_sum": ("X",),
    "message_features": ("X",),
    "message_features_and_coef": ("O",),
    "message_backward": ("O",),
    "scalar_message_backward": ("O",),
    "embed_sum": ("Z",),
    "embed_features": ("Z",),
    "embed_backward": ("Z",),
    "key_products": ("K",),
    "key_backward": ("Q", "K"),
    "value_sum": ("V",),
    "value_backward": ("O",),
}
#: Part of an evaluation below which a loop is left out.
SMALL = 0.04
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Speeds of one thread.

    Args:
        flops: Floating point operations a second in a large matrix product in single precision.
        bandwidth: Bytes a second read, by level of memory.
    """

    flops: float
    bandwidth: dict[str, float]

    def level(self, size: int) -> str:
        """Where arrays of so many bytes stay between two uses."""
        return next((name for name, limit in HOLDS.items() if size <= limit), "memory")


@dataclass
class Kernel:
    """All calls of a loop in one evaluation.

    Args:
        seconds: That they took.
        flops: Floating point operations.
        floor: Shortest time that the machine allows, in s.
        bounds: What sets the floor, and for how long of it.
    """

    seconds: float = 0.0
    flops: float = 0.0
    floor: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)

    def add(self, seconds: float, flops: float, floors: dict[str, float]) -> None:
        """Count one more call."""
        bound = max(floors, key=lambda name: floors[name])
        self.seconds += seconds
        self.flops += flops
        self.floor += floors[bound]
        self.bounds[bound] = self.bounds.get(bound, 0.0) + floors[bound]


def probe() -> Machine:
    """Ask the machine; the best of several tries counts."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / min(_times(lambda: torch.mm(a, b), 10))
    bandwidth = {}
    for name, size in LEVELS.items():
        values, rounds = np.ones(size // 4, np.float32), max(1, 2**26 // size)
        bandwidth[name] = size * rounds / min(_times(lambda x=values, n=rounds: _read(x, n), 7))
    return Machine(flops, bandwidth)


@numba.njit(fastmath=True, cache=True)
def _read(values, rounds):
    """Read an array again and again; the factor keeps a compiler from reading it once."""
    total = np.float32(0)
    for n in range(rounds):
        factor = np.float32(n)
        for k in range(values.shape[0]):
            total += factor * values[k]
    return total


def _times(call: Callable[[], Any], repeats: int) -> list[float]:
    call()
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return found


def profile(architecture: str, system: str, machine: Machine) -> tuple[float, dict[str, Kernel]]:
    """Seconds of an evaluation, and what its loops and matrix products need, the fastest of several evaluations."""
    torch.manual_seed(0)
    model = create_model(dict(OPTIONS[architecture])).eval()
    atoms = SYSTEMS[system]()
    z, box = torch.tensor(atoms.z), None if atoms.box is None else torch.tensor(atoms.box, dtype=torch.float32)
    frames = [torch.tensor(atoms.frame(seed), dtype=torch.float32) for seed in range(REPEATS)]
    model(z, frames[0], box=box)
    model(z, frames[0], box=box)
    best: tuple[float, dict[str, Kernel]] | None = None
    for pos in frames:
        kernels: dict[str, Kernel] = {}
        with watched(machine, kernels):
            start = time.thread_time()
            model(z, pos, box=box)
            seconds = time.thread_time() - start
        if best is None or seconds < best[0]:
            best = seconds, kernels
    assert best is not None
    products = Kernel()
    with Products(machine, products):
        model(z, frames[0], box=box)
    best[1]["matrix products"] = products
    return best


class Products(TorchDispatchMode):
    """Within it every matrix product is noted, whoever asks for it."""

    def __init__(self, machine: Machine, kernel: Kernel) -> None:
        super().__init__()
        self.machine, self.kernel = machine, kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        found = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            flops = 2 * left.numel() * right.shape[-1]
            size = sum(x.numel() * x.element_size() for x in (left, right, found))
            self.kernel.add(seconds, flops, limits(flops, size, self.machine))
        return found


@contextmanager
def watched(machine: Machine, kernels: dict[str, Kernel]) -> Iterator[None]:
    """Within it every compiled loop notes what it does."""
    before = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("torchmdnet.ops.kernels."):
            continue
        for attribute, value in list(vars(module).items()):
            if hasattr(value, "loop") and hasattr(value, "entry"):
                before.append((module, attribute, value))
                setattr(module, attribute, _watching(attribute, value, machine, kernels))
    try:
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


def _watching(name: str, run: Callable[..., None], machine: Machine, kernels: dict[str, Kernel]) -> Callable[..., None]:
    names = list(inspect.signature(run.loop).parameters)[1:]  # behind the job

    def timed(work: int, *values: Any) -> None:
        start = time.thread_time()
        run(work, *values)
        seconds = time.thread_time() - start
        arrays = {key: value for key, value in zip(names, values, strict=True) if isinstance(value, np.ndarray)}
        kernels.setdefault(name, Kernel()).add(seconds, 2 * work, floors(name, work, arrays, machine))

    return timed


def limits(flops: float, size: int, machine: Machine) -> dict[str, float]:
    """Shortest times in s for so much arithmetic on so many bytes."""
    level = machine.level(size)
    return {"arithmetic": flops / machine.flops, level: size / machine.bandwidth[level]}


def floors(name: str, work: int, arrays: dict[str, np.ndarray], machine: Machine) -> dict[str, float]:
    """Shortest times in s that arithmetic, memory and gathering allow."""
    found = limits(2 * work, sum(array.nbytes for array in arrays.values()), machine)
    if "sender" in arrays and "table" in arrays:
        rows = arrays["coef"].shape[1] if "coef" in arrays else 1
        read = [(rows, arrays["table"])] + [(1, arrays[key]) for key in NEIGHBOURS.get(name, ()) if key in arrays]
        of_edge = sum(count * array[0].nbytes for count, array in read)
        level = machine.level(sum(array.nbytes for _, array in read))
        level = "third cache" if level == "memory" else level  # neighbours are near, in the list of atoms too
        found["gathering"] = len(arrays["sender"]) * of_edge / machine.bandwidth[level]
    elif "tables" in arrays:  # in blocks of channels, (B, R, 3, lanes) and (B, N, C, lanes)
        features = [arrays[key] for key in NEIGHBOURS[name]]
        weights = arrays["tables"].nbytes / arrays["tables"].shape[1] * (2 if "slope" in arrays else 1)
        of_edge = weights + sum(array.nbytes / array.shape[1] for array in features)
        level = machine.level(sum(array[0].nbytes for array in (arrays["tables"], *features)))
        level = "third cache" if level == "memory" else level
        found["gathering"] = len(arrays["sender"]) * of_edge / machine.bandwidth[level]
    return found


def table(machine: Machine, profiles: dict[str, tuple[float, dict[str, Kernel]]]) -> str:
    """Speeds and fractions as markdown."""
    speeds = ", ".join(f"{name} {speed / 1e9:.0f} GB/s" for name, speed in machine.bandwidth.items())
    lines = [
        f"One thread multiplies matrices at {machine.flops / 1e9:.0f} GFLOP/s and reads: {speeds}.",
        "",
        "| evaluation | ms | loop | part of it | GFLOP/s | floor set by | floor / time |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, (seconds, kernels) in profiles.items():
        for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].seconds):
            if kernel.seconds < SMALL * seconds:
                continue
            bound = max(kernel.bounds, key=lambda key: kernel.bounds[key])
            cells = [title, f"{1e3 * seconds:.1f}", name, f"{kernel.seconds / seconds:.0%}"]
            cells += [f"{kernel.flops / kernel.seconds / 1e9:.1f}", bound, f"{kernel.floor / kernel.seconds:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(OPTIONS), choices=OPTIONS)
    parser.add_argument("--systems", nargs="+", default=["192-water"], choices=SYSTEMS)
    parser.add_argument("--json", action="store_true", help="print values instead")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = probe()
    profiles = {
        f"{model}/{system}": profile(model, system, machine) for model in options.models for system in options.systems
    }
    text = table(machine, profiles)
    if not options.json:
        print(text)
        return
    values = {
        title: {"seconds": seconds, "kernels": {name: vars(kernel) for name, kernel in kernels.items()}}
        for title, (seconds, kernels) in profiles.items()
    }
    speeds = {"flops": machine.flops, "bandwidth": machine.bandwidth}
    print(json.dumps({"table": text, "data": {"machine": speeds, "evaluations": values}}))


if __name__ == "__main__":
    main()
