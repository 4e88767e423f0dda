"""The stages of :mod:`gpu_check`, each run in a process of its own.

``python tools/gpu_stages.py STAGE --results FILE [--pack FOLDER] [--dry-run]`` appends lines of JSON to a file: facts,
checks with the largest value that is allowed, and rows of tables. On a GPU as on the CPU the same functions run; a dry
run takes the smallest systems.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.extend(str(REPOSITORY / folder) for folder in ("tests/gates", "tests/ops", "benchmarks", "tools"))

import numpy as np
import torch
from gpu_check import append
from torch import Tensor

__all__ = ["At", "run"]

#: Largest deviation from numbers of the CPU, relative to the scale: in double precision, and how many times what single
#: precision spread on the CPU.
DOUBLE, SPREADS = 1e-9, 10.0
#: The same for large systems in single precision, energies and forces.
SINGLE = 1e-4
#: Calls with the same positions whose forces have to be the same to the last bit.
REPEATS = 8
#: A captured call records its graph within so many calls of one kind.
CALLS_TO_CAPTURE = 4
#: Programs that are compiled side by side.
COMPILERS = 8


class At:
    """Where a stage runs, and where its results go."""

    def __init__(self, stage: str, results: Path, pack: Path | None, *, is_dry: bool, until: float = 60.0) -> None:
        self.stage, self.results, self.pack, self.is_dry = stage, results, pack, is_dry
        self.device = "cpu" if is_dry else "cuda"
        self.end = time.monotonic() + until

    @property
    def left(self) -> float:
        """Seconds until the stage will be ended."""
        return self.end - time.monotonic()

    def fact(self, name: str, value: Any) -> None:
        append(self.results, self.stage, fact=name, value=value)

    def check(self, name: str, value: float, allowed: float) -> None:
        append(self.results, self.stage, check=name, value=value, allowed=allowed, ok=bool(value <= allowed))

    def row(self, table: str, **columns: Any) -> None:
        append(self.results, self.stage, table=table, **columns)

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Let one part of a stage fail without the others."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            told = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
            append(self.results, self.stage, end=f"{name} failed", seconds=0.0, ok=False, tail=told)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- machine


def environment(at: At) -> None:
    """Versions, what the machine has, and how fast it copies, multiplies and launches."""
    from torchmdnet.ops import kernels

    if at.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no GPU is available to PyTorch; --dry-run runs everything on the CPU")
    for package in ("torch", "triton", "numba", "numpy", "ase", "vesin", "nvalchemiops"):
        at.fact(package, _version(package))
    at.fact("python", platform.python_version())
    if at.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        at.fact("card", properties.name)
        at.fact("compute capability", f"{properties.major}.{properties.minor}")
        at.fact("memory, GiB", round(properties.total_memory / 2**30, 1))
        at.fact("multiprocessors", properties.multi_processor_count)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        at.fact("driver and clocks", _output(query))
    at.fact("kernels run", kernels.has_kernel(torch.zeros(1, 16, device=at.device)))
    at.fact("compiled loops run", _loops_run())
    size = 2**14 if at.is_dry else 2**28
    x = torch.randn(size, device=at.device)
    y = torch.empty_like(x)
    at.fact("copy, GB/s", round(8 * size / 1e6 / timed(at, lambda: y.copy_(x), 0.5)["in a row, ms"], 1))
    n = 64 if at.is_dry else 8192
    a = torch.randn(n, n, device=at.device)
    for name, precision in (("float32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        at.fact(f"product, {name}, TFLOP/s", round(2e-9 * n**3 / timed(at, lambda: a @ a, 0.5)["in a row, ms"], 2))
    torch.set_float32_matmul_precision("highest")
    few = torch.zeros(1, device=at.device)
    at.fact("launch, µs", round(1e3 * timed(at, lambda: few.add_(1), 0.2)["in a row, ms"], 2))
    if at.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(500):
                few.add_(1)
        at.fact("launch in a replay, µs", round(2 * timed(at, graph.replay, 0.2)["in a row, ms"], 2))


def _version(package: str) -> str | None:
    try:
        return getattr(__import__(package), "__version__", "unknown")
    except Exception as error:  # whatever a broken installation raises
        return None if isinstance(error, ModuleNotFoundError) else f"broken: {error}"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _loops_run() -> bool | str:
    """Whether the loops of the CPU work here, on which priors and searches may fall back."""
    from torchmdnet.neighbors import pairs_within

    try:
        pos = torch.rand(20, 3, dtype=torch.float64)
        pairs_within(pos, torch.zeros(20, dtype=torch.long), None, 1, 5.0)
    except Exception as error:
        return f"no: {error}"
    return True


def timed(at: At, call: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Milliseconds of a call: the median where each is waited for, and the mean of calls in a row."""
    if at.is_dry:
        start = time.perf_counter()
        call()
        return dict.fromkeys(("ms", "in a row, ms"), 1e3 * (time.perf_counter() - start))
    for _ in range(5):
        call()
    at.synchronize()
    seconds = min(seconds, max(at.left / 4, 0.1))
    each: list[float] = []
    end = time.perf_counter() + seconds / 2
    while not each or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        at.synchronize()
        each.append(time.perf_counter() - start)
    count = max(1, min(1000, int(seconds / 2 / statistics.median(each))))
    start = time.perf_counter()
    for _ in range(count):
        call()
    at.synchronize()
    in_a_row = (time.perf_counter() - start) / count
    return {"ms": 1e3 * statistics.median(each), "in a row, ms": 1e3 * in_a_row}


def counted(at: At, call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels that a call starts on the GPU, copies, and how often the host waits."""
    if at.device != "cuda":
        return {"kernels": None, "copies": None, "waits": None}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in told)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return {"kernels": len(names) - len(copies), "copies": len(copies), "waits": waits}


def peak(at: At, call: Callable[[], Any]) -> dict[str, Any]:
    """Memory of the GPU that a call needs beside what is held."""
    if at.device != "cuda":
        call()
        return {"peak, MB": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return {"peak, MB": round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)}


# ------------------------------------------------------------------------------------------------------------- kernels


def kernels(at: At) -> None:
    """Compile every kernel for this card, or in a dry run for some card: registers, spills and shared memory."""
    import test_triton_compilation as compilation

    capability = (9, 0) if at.is_dry else torch.cuda.get_device_capability()
    every = [(*kernel, dtype) for kernel in compilation.KERNELS for dtype in ("fp32", "fp64")]
    every = every[:1] if at.is_dry else every
    spawn = multiprocessing.get_context("spawn")
    with (
        without_variable("TRITON_INTERPRET"),
        concurrent.futures.ProcessPoolExecutor(min(COMPILERS, len(every)), mp_context=spawn) as pool,
    ):
        waiting = {pool.submit(compiled, kernel, capability): kernel for kernel in every}
        for done in concurrent.futures.as_completed(waiting):
            module, name, constants, dtype = waiting[done]
            told = ", ".join(f"{key}={value}" for key, value in constants.items())
            with at.surviving(f"{module}.{name}({told}), {dtype},"):
                found = done.result()
                at.row("Kernels", kernel=f"{module}.{name}", dtype=dtype, constants=told, **found)


@contextmanager
def without_variable(name: str) -> Iterator[None]:
    """Start processes that have not this variable of the environment."""
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def compiled(kernel: tuple[str, str, dict[str, Any], str], capability: tuple[int, int]) -> dict[str, Any]:
    """What one kernel needs, by the assembler's own account."""
    import test_triton_compilation as compilation

    start = time.perf_counter()
    number = 10 * capability[0] + capability[1]
    binary = compilation.compile_for_gpu(*kernel, capability=number).asm["cubin"]
    seconds = round(time.perf_counter() - start, 2)
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = shutil.which("cuobjdump") or str(folder / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = _output([tool, "--dump-resource-usage", file.name])
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", told)}
    return {
        "registers": usage.get("REG"),
        "stack, bytes": usage.get("STACK"),
        "shared, bytes": usage.get("SHARED"),
        "seconds": seconds,
    }


# --------------------------------------------------------------------------------------------------------------- tests

TESTS = (
    "tests/ops/test_triton.py",
    "tests/calculators/test_fixed_step.py",
    "tests/calculators/test_external.py",
    "tests/neighbors/test_fixed.py",
)
DRY_TESTS = ("tests/neighbors/test_fixed.py", "-k", "leave or room")


def tests(at: At) -> None:
    """The tests that have something to do on a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += DRY_TESTS if at.is_dry else TESTS
    try:
        import xdist  # noqa: F401  # pyright: ignore[reportMissingImports]

        command += [] if at.is_dry else ["-n", "6", "--dist", "worksteal"]
    except ModuleNotFoundError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "tests.xml")
        done = subprocess.run([*command, f"--junitxml={found}"], cwd=REPOSITORY, timeout=at.left - 3)
        suite = ElementTree.parse(found).getroot()
    cases = list(suite.iter("testcase"))
    wrong = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    at.fact("tests", f"{len(cases)} run, {skipped} skipped, failed: {', '.join(map(str, wrong)) or 'none'}")
    at.check("tests that failed", len(wrong), 0)
    if not cases or done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode} after {len(cases)} tests")


# -------------------------------------------------------------------------------------------------------------- numbers


def golden(at: At, architecture: str) -> None:
    """One architecture against numbers that the CPU found in double precision."""
    import gates

    for name in (name for name, options in gates.MODELS.items() if options["model"] == architecture):
        frozen_numbers(at, name)
    captured(at, architecture)
    repeated(at, architecture)
    larger(at, architecture)


def frozen_numbers(at: At, name: str) -> None:
    """Energies, forces, stress and gradients of a loss, on grids and without, as ``tests/gates`` froze them."""
    import gates

    frozen = dict(np.load(gates.FROZEN))
    systems = ("ion",) if at.is_dry else tuple(gates.SYSTEMS)
    for mode in gates.MODES:
        spreads = dict(zip(gates.QUANTITIES, frozen[f"spread/{name}/{mode}"], strict=True))
        for dtype in (torch.float64, torch.float32):
            told = f"{name}, {mode}, {str(dtype).removeprefix('torch.')}"
            with at.surviving(told):
                found = gates.deviations(gates.all_numbers(name, mode, dtype, systems, at.device), frozen)
                for quantity, value in found.items():
                    allowed = DOUBLE if dtype == torch.float64 else SPREADS * float(spreads[quantity])
                    at.check(f"{told}, {quantity}", value, allowed)


def definitions(at: At) -> None:
    """The same numbers by a second formula: the definitions in PyTorch, without any kernel of ours."""
    import gates

    assert os.environ.get("TORCHMDNET_PLAIN_OPS"), "the stage runs with TORCHMDNET_PLAIN_OPS=1"
    architectures = {options["model"]: name for name, options in reversed(gates.MODELS.items())}
    for name in architectures.values():
        frozen_numbers(at, name)


def external_of(at: At, model: Any, system: Any) -> Any:
    """A calculator that captures, where there is something to capture."""
    from torchmdnet.calculators import External

    return External(
        model,
        system.z,
        device=at.device,
        dtype=model.dtype,
        use_cuda_graph=at.device == "cuda",
        cuda_graph_warmup_steps=3,
        q=system.q,
        s=system.s,
    )


def captured(at: At, name: str) -> None:
    """Replays against frozen numbers, for a molecule, and for a crystal whose list outgrows its capacity."""
    import gates

    frozen = np.load(gates.FROZEN)
    for which in ("ion",) if at.is_dry else ("ion", "crystal"):
        with at.surviving(f"{name}, {which}, captured"):
            system = gates.SYSTEMS[which]
            calculator = external_of(at, gates.model_of(name, "grid", torch.float64).to(at.device), system)
            for stretch in (1.3, 1.0):  # at last more neighbours than at first
                box = None if system.box is None else stretch * system.box
                for _ in range(CALLS_TO_CAPTURE):
                    energy, forces = calculator.calculate(stretch * system.pos, box)
            for quantity, found in (("energy", energy), ("forces", forces[0])):
                expected = frozen[f"{name}/grid/{which}/{quantity}"]
                value = gates.deviation(quantity, found.double().cpu().numpy(), expected)
                at.check(f"{name}, {which}, captured, {quantity}", value, DOUBLE)
            if at.device == "cuda":
                is_captured = calculator.use_cuda_graph and calculator.cuda_graph is not None
                at.check(f"{name}, {which}: 0 if it was captured", 0.0 if is_captured else 1.0, 0.0)


def repeated(at: At, name: str) -> None:
    """Forces are the same to the last bit from call to call, plain and captured."""
    import gates

    system = gates.SYSTEMS["ion" if at.is_dry else "crystal"].to(torch.float32, at.device)
    with at.surviving(f"{name}, repeated"):
        model = gates.model_of(name, "grid", torch.float32).to(at.device)
        calculator = external_of(at, model, system._replace(z=system.z.cpu()))
        arguments = (system.z, system.pos, system.batch, system.box, system.q, system.s)
        ways = {
            "plain": lambda: model(*arguments)[1],
            "captured": lambda: calculator.calculate(system.pos, system.box)[1],
        }
        for way, call in ways.items():
            for _ in range(CALLS_TO_CAPTURE):
                first = call()
            others = sum(not torch.equal(first, call()) for _ in range(REPEATS))
            at.check(f"{name}, {way}: calls with other forces", others, 0)


def larger(at: At, architecture: str) -> None:
    """Systems as large as users have them, against the numbers of the pack."""
    import gpu_pack

    golden = gpu_pack.golden_numbers(at.pack, [architecture], is_dry=at.is_dry)
    for system in gpu_pack.SYSTEMS_IN_PACK[: 1 if at.is_dry else None]:
        for dtype in (torch.float64, torch.float32):
            told = f"{architecture}, {system}, 128 channels, {str(dtype).removeprefix('torch.')}"
            with at.surviving(told):
                found = gpu_pack.numbers(architecture, system, dtype, at.device, is_dry=at.is_dry)
                for quantity, value in found.items():
                    expected = golden[f"{architecture}/{system}/{quantity}"]
                    off = float(np.abs(value - expected).max() / np.abs(expected).max())
                    at.check(f"{told}, {quantity}", off, DOUBLE if dtype == torch.float64 else SINGLE)


# ----------------------------------------------------------------------------------------------------------- sanitizer


def sanitizer(at: At) -> None:
    """Energies, forces and a step of training under compute-sanitizer: addresses first, then races."""
    command = [sys.executable, __file__, "small", "--results", str(at.results)] + ["--dry-run"] * at.is_dry
    tool = shutil.which("compute-sanitizer")
    if at.is_dry:
        subprocess.run(command, check=True, timeout=at.left)
        return
    if tool is None:
        at.fact("compute-sanitizer", "not found")
        return
    for kind in ("memcheck", "racecheck"):
        options = [tool, "--tool", kind, "--error-exitcode", "86", "--print-limit", "5"]
        variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        limit = at.left - 5 if kind == "racecheck" else 0.6 * at.left
        try:
            done = subprocess.run(
                [*options, *command], capture_output=True, text=True, timeout=limit, env=variables, errors="replace"
            )
        except subprocess.TimeoutExpired:
            at.fact(kind, f"did not end within {limit:.0f} s")
            continue
        told = re.findall(r"ERROR SUMMARY.*|RACECHECK SUMMARY.*|.*(?:Invalid|Error:|hazard).*", done.stdout)
        at.fact(kind, "; ".join(line.strip() for line in told[:4]) or f"ended with {done.returncode}")
        at.check(f"{kind}: exit status", done.returncode, 0)


def small(at: At) -> None:
    """What runs under compute-sanitizer."""
    import gates

    for name in ("tensornet",) if at.is_dry else ("tensornet", "equivariant-transformer"):
        gates.all_numbers(name, "grid", torch.float32, ("ion",), at.device)


# --------------------------------------------------------------------------------------------------------------- times


def systems_of(names: tuple[str, ...], at: At) -> tuple[str, ...]:
    return names[:1] if at.is_dry else names


def evaluation(at: At) -> None:
    """TensorNet, 128 channels, two layers, 5 Å, single precision: energy and forces of 12 to 98,304 atoms."""
    sizes = ("benzene", "dipeptide", "192-water", "2187-water", "24000-water", "98304-water")
    for system in systems_of(sizes, at):
        time_forces(at, "tensornet", system, seconds=1.5)


def others(at: At) -> None:
    """The other architectures."""
    for architecture in systems_of(("graph-network", "tensornet2", "equivariant-transformer", "transformer"), at):
        for system in systems_of(("dipeptide", "2187-water"), at):
            time_forces(at, architecture, system, seconds=0.6)


def time_forces(at: At, architecture: str, system: str, seconds: float) -> None:
    """A row for the plain call and one for the replay."""
    import gpu_pack
    from worker import tensors

    from torchmdnet.calculators import External

    with at.surviving(f"{architecture}, {system}"):
        model = gpu_pack.model_of(architecture, torch.float32, is_dry=at.is_dry).to(at.device).eval()
        atoms = gpu_pack.SYSTEMS[system]()
        inputs, frames = tensors(atoms, at.device)
        turn = _turns(frames)
        external = External(
            model, inputs["z"].cpu(), device=at.device, use_cuda_graph=at.device == "cuda", cuda_graph_warmup_steps=3
        )
        ways: dict[str, Callable[[], Any]] = {
            "call": lambda: model(pos=next(turn), **inputs),
            "captured": lambda: external.calculate(next(turn), inputs["box"]),
        }
        for way, call in ways.items():
            if way == "captured" and atoms.batch is not None:
                continue
            start = time.perf_counter()
            for _ in range(1 if at.is_dry else CALLS_TO_CAPTURE):
                call()
            at.synchronize()
            first = {"first calls, s": round(time.perf_counter() - start, 2)}
            found = {**timed(at, call, seconds), **counted(at, call), **peak(at, call), **first}
            told = way if way == "call" or external.use_cuda_graph or at.is_dry else "not captured"
            at.row("Energy and forces", model=architecture, atoms=len(atoms.z), system=system, way=told, **found)


def _turns(frames: list[Tensor]) -> Iterator[Tensor]:
    while True:
        for frame in frames:
            yield frame.clone()


def training(at: At) -> None:
    """Steps of AdamW on energies and forces."""
    import gpu_pack
    from worker import tensors

    for architecture, system in (
        ("tensornet", "32-benzenes"),
        ("tensornet", "2187-water"),
        ("equivariant-transformer", "32-benzenes"),
        ("graph-network", "32-benzenes"),
    )[: 1 if at.is_dry else None]:
        system = "benzene" if at.is_dry else system
        with at.surviving(f"{architecture}, {system}"):
            model = gpu_pack.model_of(architecture, torch.float32, is_dry=at.is_dry).to(at.device).train()
            atoms = gpu_pack.SYSTEMS[system]()
            inputs, frames = tensors(atoms, at.device)
            turn = _turns(frames)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

            def step(model: Any = model, optimizer: Any = optimizer, turn: Any = turn, inputs: Any = inputs) -> None:
                optimizer.zero_grad()
                energy, forces = model(pos=next(turn), **inputs)
                (energy.square().mean() + forces.square().mean()).backward()
                optimizer.step()

            start = time.perf_counter()
            step()
            at.synchronize()
            first = {"first call, s": round(time.perf_counter() - start, 2)}
            found = {**timed(at, step, 1.5), **counted(at, step), **peak(at, step), **first}
            at.row("Training steps", model=architecture, atoms=len(atoms.z), system=system, **found)


# --------------------------------------------------------------------------------------------------------------- tiles


def sweep(at: At) -> None:
    """Sizes of the tiles in which messages are summed, and their gradients: edges side by side, bytes of a row."""
    from torchmdnet.ops.kernels import forms

    before = dict(forms.TWINS)
    forms.TWINS[at.device] = "torchmdnet.ops.triton"  # in a dry run Triton's interpreter
    try:
        _sweep(at)
    finally:
        forms.TWINS.clear()
        forms.TWINS.update(before)


def _sweep(at: At) -> None:
    import gpu_pack

    from torchmdnet.graph import build_graph
    from torchmdnet.ops.messages import RadialPoints, rows_of_pairs
    from torchmdnet.ops.triton import operators as twins

    system = gpu_pack.SYSTEMS["benzene" if at.is_dry else "2187-water"]()
    F, rows = (4, 12) if at.is_dry else (128, 206)
    count = 2 if at.is_dry else None  # atoms: the interpreter takes a millisecond for each line of a kernel
    pos = torch.tensor(system.pos[:count], device=at.device)
    box = None if system.box is None else torch.tensor(system.box, device=at.device)
    graph = build_graph(torch.ones(len(pos), dtype=torch.long, device=at.device), pos, None, box, cutoff_upper=5.0)
    assert graph.pairs is not None
    P, N = graph.pairs.dist.shape[0], graph.num_atoms
    cell = (graph.pairs.dist / 5.0 * (rows - 7)).long()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=at.device)

    points = RadialPoints(random(P, 6), cell)
    where = rows_of_pairs(graph).layout(points, 9)
    known = {"O": random(N, 9, F), "coef": points.coef, "table": random(rows, 3, F), "X": random(N, 9, F)}
    shapes = {name: tuple(tensor.shape) for name, tensor in known.items()}
    rest = {name: tensor for name, tensor in known.items() if name != "O"}
    calls = {
        "sum, ms": lambda: twins.message.derivative("O", rest, shapes["O"], where),
        "gradients, ms": lambda: twins.message.gradients(["X", "coef"], known, shapes, where),
        "table, ms": lambda: twins.message.gradients(["table"], known, shapes, where),
    }
    tiles = [(4, 512), (2, 512), (8, 512), (4, 256), (4, 1024), (8, 256), (16, 256), (1, 512)]
    before = twins.EDGES, twins.WIDTH
    for edges, width in tiles[: 1 if at.is_dry else None]:
        if at.left < 5:
            break
        with at.surviving(f"{edges} edges, {width} bytes"):
            twins.EDGES, twins.WIDTH = edges, width
            found = {name: timed(at, call, 0.3)["in a row, ms"] for name, call in calls.items()}
            at.row("Tiles", edges=edges, bytes=width, pairs=P, **found)
    twins.EDGES, twins.WIDTH = before


RUN: dict[str, Callable[..., None]] = {
    "environment": environment,
    "kernels": kernels,
    "tests": tests,
    "golden": golden,
    "definitions": definitions,
    "sanitizer": sanitizer,
    "small": small,
    "evaluation": evaluation,
    "training": training,
    "others": others,
    "sweep": sweep,
}


def run(at: At) -> None:
    """The stage by its name; one that takes an argument has it behind a colon."""
    name, _, argument = at.stage.partition(":")
    RUN[name](at, *([argument] if argument else []))


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--until", type=float, default=60.0, help="seconds after which the stage will be ended")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deprecated", category=DeprecationWarning)
    run(At(args.stage, args.results, args.pack, is_dry=args.dry_run, until=args.until))


if __name__ == "__main__":
    main()
