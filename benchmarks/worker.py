"""One side of a comparison: the same lines run in our environment and in that of the reference package.

``run.py`` starts this file with one end of a socket, and both ends talk in lines of JSON, because packages print on
standard output what they like. The first line that arrives is the order; the answer, once everything is compiled and
warm, holds what was computed. From then on a number of seconds is answered with the times of as many calls as fit.

``others.py`` serves other packages in the same way.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

from systems import SYSTEMS, System

#: Calls before the clock counts, and the seconds after which fewer will do.
WARM_UP_CALLS, WARM_UP_SECONDS = 5, 15.0
#: Configurations a call takes turns with, so that none can be answered from memory.
NUM_FRAMES = 4
#: Steps of dynamics after which it starts again, since random weights hold no molecule together.
STRETCH = 50

Call: TypeAlias = Callable[[], Any]
Facts: TypeAlias = dict[str, Any]


def serve(prepare: Callable[[dict[str, Any]], tuple[Call, Facts]]) -> None:
    """Answer ``run.py`` until it has no more questions."""
    channel = socket.socket(fileno=int(sys.argv[1])).makefile("rw", encoding="utf-8")

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    try:
        order = json.loads(channel.readline())
        device = order["device"]
        if device == "cpu":  # a driver reserves addresses without end
            limit_memory(order["memory_limit"])
        call, facts = prepare(order)
        call = waiting(call, device)
        warm_up(call)
        send(facts | {"peak_memory": peak_memory(device)})
        for line in channel:
            wall, cpu = measure(call, seconds=json.loads(line))
            send({"wall": wall, "cpu": cpu, "peak_memory": peak_memory(device)})
    except (Exception, KeyboardInterrupt) as error:
        send({"failed": describe(error)})
        traceback.print_exc()
        os._exit(1)  # at once, whatever threads the packages have started


def prepare(order: dict[str, Any]) -> tuple[Call, Facts]:
    """The call to time, and what is known about it.

    Args:
        order: ``task``, a key of :data:`TASKS`; ``threads``; ``device``; the ``folder`` in which the sides share files,
            written by the first that needs one; and what the task reads.
    """
    import torch

    import torchmdnet

    torch.set_num_threads(order["threads"])
    call, facts = TASKS[order["task"]](order)
    return call, facts | {
        "package": str(Path(torchmdnet.__file__).parent),
        "version": torchmdnet.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def prepare_model(order: dict[str, Any]) -> tuple[Call, Facts]:
    """An evaluation, or a training step, of the model whose ``options`` and ``weights`` are ordered."""
    import torch

    from torchmdnet.models.model import load_model

    device = order["device"]
    model = load_model(str(checkpoint_of(order)), device=device)
    system = SYSTEMS[order["system"]]()
    inputs, frames = tensors(system, device)
    facts: Facts = {"num_atoms": len(system.z), "memory_before": held_memory(device)}
    model.eval()
    start = time.perf_counter()
    energy, forces = model(pos=frames[0].clone(), **inputs)
    facts["first_call"] = time.perf_counter() - start
    facts["predictions"] = {
        "energy": energy.detach().flatten().tolist(),
        "forces": forces.detach().flatten().tolist(),
    }
    turn = cycle(frames)
    if order["task"] == "forces":
        return lambda: model(pos=next(turn).clone(), **inputs), facts

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    energy, forces = torch.zeros_like(energy), torch.zeros_like(forces)  # the labels

    def step() -> None:
        with cores_of_a_step():
            optimizer.zero_grad()
            y, neg_dy = model(pos=next(turn).clone(), **inputs)
            loss = torch.nn.functional.mse_loss(y, energy) + torch.nn.functional.mse_loss(neg_dy, forces)
            loss.backward()
            optimizer.step()

    step()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    facts["predictions"]["gradient"] = [float(gradients[name].norm()) for name in sorted(gradients)]
    return step, facts


def cores_of_a_step() -> AbstractContextManager[None]:
    """What the package's trainer puts around a step of training."""
    try:
        from torchmdnet.ops.kernels.threads import cores
    except ImportError:  # the reference package
        return nullcontext()
    return cores.for_all()


def prepare_dynamics(order: dict[str, Any]) -> tuple[Call, Facts]:
    """A step of velocity Verlet in ASE."""
    from torchmdnet.calculators import TMDNETCalculator

    system = SYSTEMS[order["system"]]()
    calculator = TMDNETCalculator(str(checkpoint_of(order)), device=order["device"])
    return dynamics(calculator, system, order["device"])


def prepare_external(order: dict[str, Any]) -> tuple[Call, Facts]:
    """Energy and forces from ``External``, as engines call it, replaying a CUDA graph where there is CUDA."""
    import torch

    from torchmdnet.calculators import External

    device = order["device"]
    system = SYSTEMS[order["system"]]()
    inputs, frames = tensors(system, device)
    facts: Facts = {"num_atoms": len(system.z), "memory_before": held_memory(device)}
    external = External(
        str(checkpoint_of(order)), torch.tensor(system.z, device=device), device=device, use_cuda_graph=device != "cpu"
    )
    turn = cycle(frames)
    energy, forces = external.calculate(frames[0].clone(), inputs["box"])
    facts["predictions"] = {"energy": energy.flatten().tolist(), "forces": forces.flatten().tolist()}
    return lambda: external.calculate(next(turn).clone(), inputs["box"]), facts


def dynamics(calculator: Any, system: System, device: str) -> tuple[Call, Facts]:
    """A step of 0.5 fs with any ASE calculator, from 300 K, with all that ASE does between two calls of it."""
    import numpy as np
    from ase import Atoms, units
    from ase.md.verlet import VelocityVerlet

    start = Atoms(numbers=system.z, positions=system.frame(0), cell=system.box, pbc=system.box is not None)
    start.info["charge"] = 0  # older releases want to be told
    normal = np.random.default_rng(0).standard_normal((len(start), 3))
    start.set_momenta(normal * np.sqrt(units.kB * 300 * start.get_masses())[:, None])
    facts: Facts = {"num_atoms": len(start), "memory_before": held_memory(device)}
    atoms = start.copy()
    atoms.calc = calculator
    before = time.perf_counter()
    forces = atoms.get_forces()
    facts["first_call"] = time.perf_counter() - before
    facts["predictions"] = {"energy": [float(atoms.get_potential_energy())], "forces": forces.ravel().tolist()}
    state: dict[str, Any] = {"left": 0}

    def step() -> None:
        if state["left"] == 0:
            atoms.set_positions(start.get_positions())
            atoms.set_momenta(start.get_momenta())
            state.update(steps=VelocityVerlet(atoms, timestep=0.5 * units.fs).irun(STRETCH), left=STRETCH)
            next(state["steps"])  # the forces to start with
        next(state["steps"])
        state["left"] -= 1

    return step, facts


def prepare_loader(order: dict[str, Any]) -> tuple[Call, Facts]:
    """An epoch of training batches of ``batch_size`` molecules, in this process."""
    from torchmdnet.data import DataModule

    folder = Path(order["folder"], "molecules")
    if not folder.exists():
        write_molecules(folder)
    options = {
        "dataset": "Custom",
        "dataset_root": str(folder),
        "dataset_arg": None,
        "coord_files": str(folder / "coords_*.npy"),
        "embed_files": str(folder / "embed_*.npy"),
        "energy_files": str(folder / "energy_*.npy"),
        "force_files": str(folder / "forces_*.npy"),
        "dataset_preload_limit": 1024,
        "train_size": 4000,
        "val_size": 48,
        "test_size": 48,
        "seed": 1,
        "log_dir": str(folder),
        "splits": None,
        "standardize": False,
        "prior_model": None,
        "test_interval": -1,
        "batch_size": order["batch_size"],
        "inference_batch_size": order["batch_size"],
        "num_workers": 0,
    }
    data = DataModule(options)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    energy = forces = 0.0
    samples = 0
    for batch in loader:
        samples += batch.num_graphs
        energy += float(batch.y.double().sum())
        forces += float(batch.neg_dy.double().abs().sum())

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch, {"num_samples": samples, "predictions": {"energy": [energy], "forces": [forces]}}


#: What can be timed, by name.
TASKS: dict[str, Callable[[dict[str, Any]], tuple[Call, Facts]]] = {
    "forces": prepare_model,
    "train": prepare_model,
    "dynamics": prepare_dynamics,
    "external": prepare_external,
    "load": prepare_loader,
}


def write_molecules(folder: Path) -> None:
    """Save 4,096 frames of 16 made-up molecules, of 10 to 55 atoms, in the format of the ``Custom`` data set."""
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(0)
    for molecule, num_atoms in enumerate(range(10, 58, 3)):
        files = {
            "coords": rng.normal(size=(256, num_atoms, 3)),
            "embed": rng.integers(1, 10, num_atoms),
            "energy": rng.normal(size=(256, 1)),
            "forces": rng.normal(size=(256, num_atoms, 3)),
        }
        for name, values in files.items():
            np.save(folder / f"{name}_{molecule:02d}.npy", values.astype("int64" if name == "embed" else "float32"))


def checkpoint_of(order: dict[str, Any]) -> Path:
    """The file of weights that is ordered; the first who needs it writes it."""
    path = Path(order["folder"], order["weights"])
    if not path.exists():
        write_checkpoint(path, order["options"])
    return path


def write_checkpoint(path: Path, options: dict[str, Any]) -> None:
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


def tensors(system: System, device: str) -> tuple[dict[str, Any], list[Any]]:
    """The arguments of a model except the positions, and several positions (N, 3)."""
    import torch

    inputs = {
        "z": torch.tensor(system.z, device=device),
        "batch": None if system.batch is None else torch.tensor(system.batch, device=device),
        "box": None if system.box is None else torch.tensor(system.box, dtype=torch.float32, device=device),
    }
    return inputs, [torch.tensor(system.frame(seed), dtype=torch.float32, device=device) for seed in range(NUM_FRAMES)]


def waiting(call: Call, device: str) -> Call:
    """The call and, on a GPU, what it has started."""
    if device == "cpu":
        return call
    import torch

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait


def warm_up(call: Call) -> None:
    """Call until everything that is compiled, allocated or cached is."""
    start = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break
        call()


def measure(call: Call, seconds: float) -> tuple[list[float], list[float]]:
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


def held_memory(device: str = "cpu") -> int:
    """The memory this process holds now, in bytes: of the machine, or of the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * resource.getpagesize()


def peak_memory(device: str = "cpu") -> int:
    """The most memory this process has held at once, in bytes: of the machine, or of the GPU."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated()
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
    serve(prepare)
