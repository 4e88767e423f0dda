"""One side of a comparison: the same lines run in our environment and in that of the reference package.

``run.py`` starts this file with one end of a socket, and both ends talk in lines of JSON, because packages print on
standard output what they like. The first line that arrives is the order; the answer, once everything is compiled and
warm, holds what was computed. From then on a number of seconds is answered with the times of as many calls as fit.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

from systems import SYSTEMS, System

#: Calls before the clock counts, and the seconds after which fewer will do.
WARM_UP_CALLS, WARM_UP_SECONDS = 5, 30.0
#: Configurations a call takes turns with, so that none can be answered from memory.
NUM_FRAMES = 4


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1])).makefile("rw", encoding="utf-8")

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        order = json.loads(channel.readline())
        limit_memory(order["memory_limit"])
        call, facts = prepare(order)
        warm_up(call)
        send(facts | {"peak_memory": peak_memory()})
        for line in channel:
            wall, cpu = measure(call, seconds=json.loads(line))
            send({"wall": wall, "cpu": cpu, "peak_memory": peak_memory()})
    except (Exception, KeyboardInterrupt) as error:
        send({"failed": describe(error)})
        raise


def prepare(order: dict[str, Any]) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The call to time, and what it is about.

    Args:
        order: ``options`` of the model, the ``checkpoint`` that holds it (written here when there is none), ``system``,
            ``task`` and ``threads``.
    """
    import torch

    import torchmdnet
    from torchmdnet.models.model import load_model

    torch.set_num_threads(order["threads"])
    if not Path(order["checkpoint"]).exists():
        write_checkpoint(order["checkpoint"], order["options"])
    model = load_model(order["checkpoint"])
    system = SYSTEMS[order["system"]]()
    inputs, frames = tensors(system)
    memory = peak_memory()
    model.eval()
    start = time.perf_counter()
    energy, forces = model(pos=frames[0].clone(), **inputs)
    facts = {
        "first_call": time.perf_counter() - start,
        "energy": energy.detach().flatten().tolist(),
        "forces": forces.detach().flatten().tolist(),
        "memory_before": memory,
        "num_atoms": len(system.z),
        "package": str(Path(torchmdnet.__file__).parent),
        "version": torchmdnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    turn = cycle(frames)
    if order["task"] == "forces":
        return lambda: model(pos=next(turn).clone(), **inputs), facts

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    energy, forces = torch.zeros_like(energy), torch.zeros_like(forces)  # the labels

    def step() -> None:
        optimizer.zero_grad()
        y, neg_dy = model(pos=next(turn).clone(), **inputs)
        loss = torch.nn.functional.mse_loss(y, energy) + torch.nn.functional.mse_loss(neg_dy, forces)
        loss.backward()
        optimizer.step()

    step()
    facts["gradient"] = {
        name: float(parameter.grad.norm()) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return step, facts


def write_checkpoint(path: str, options: dict[str, Any]) -> None:
    """Save random weights in the smallest file that both packages load."""
    import torch

    from torchmdnet.models.model import create_model

    torch.manual_seed(0)
    model = create_model(dict(options))
    with torch.no_grad():  # zero biases would hide the terms that they add
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": options, "state_dict": state}, path)


def tensors(system: System) -> tuple[dict[str, Any], list[Any]]:
    """The arguments of a model except the positions, and several positions (N, 3)."""
    import torch

    inputs = {
        "z": torch.tensor(system.z),
        "batch": None if system.batch is None else torch.tensor(system.batch),
        "box": None if system.box is None else torch.tensor(system.box, dtype=torch.float32),
    }
    return inputs, [torch.tensor(system.frame(seed), dtype=torch.float32) for seed in range(NUM_FRAMES)]


def warm_up(call: Callable[[], Any]) -> None:
    """Call until everything that is compiled, allocated or cached is."""
    start = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break
        call()


def measure(call: Callable[[], Any], seconds: float) -> tuple[list[float], list[float]]:
    """Wall-clock and processor seconds of each call, of which one or more fill the given time."""
    wall: list[float] = []
    cpu: list[float] = []
    end = time.perf_counter() + seconds
    while not wall or time.perf_counter() < end:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return wall, cpu


def peak_memory() -> int:
    """The most memory this process has held at once, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(limit: int | None) -> None:
    """Let allocations beyond ``limit`` bytes fail here, before the machine runs out for everyone."""
    if limit is not None and sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def describe(error: BaseException) -> str:
    """One line about what went wrong."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        return "out of memory" + (f", limited to {limit / 2**30:.1f} GiB" if limit != resource.RLIM_INFINITY else "")
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    try:
        main()
    except Exception:
        import traceback

        traceback.print_exc()
        os._exit(1)  # at once, whatever threads the packages have started
