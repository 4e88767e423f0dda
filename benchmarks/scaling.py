"""Time and memory of a step against the number of atoms, for all packages at hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compare import Schedule
from report import IDLE
from sides import Failure, Side, Worker
from systems import SYSTEMS
from workloads import OPTIONS

__all__ = ["Point", "grow", "table"]

#: Seconds beyond which no step is waited for.
LONGEST_STEP = 45.0
#: Atoms from which memory says more about atoms than about the program.
MANY_ATOMS = 1000


@dataclass(frozen=True)
class Point:
    """What one package needs for a step of dynamics of one system.

    Args:
        side: Name of the package.
        threads: Threads it may use.
        system: Key of :data:`systems.SYSTEMS`.
        num_atoms: Number of atoms N.
        wall: Wall-clock seconds of each step.
        cpu: Processor seconds of each step.
        memory: Bytes held at the worst moment beyond what program and model hold.
        facts: What the package said of itself.
        note: Why there are no times.
    """

    side: str
    threads: int
    system: str
    num_atoms: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.wall)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def grow(
    side: Side, systems: Sequence[str], threads: int, device: str, schedule: Schedule, folder: Path
) -> Iterator[Point]:
    """Times of larger and larger systems, until one would take too long or too much.

    What it would take is told from the one before, growing with the number of atoms.
    """
    last: Point | None = None
    for system in systems:
        num_atoms = len(SYSTEMS[system]().z)
        point = Point(side.name, threads, system, num_atoms)
        refused = _would_take(last, num_atoms, schedule.memory_limit if device == "cpu" else None)
        if refused:
            yield replace(point, note=f"not run, {refused}")
            return
        order = {
            "task": "dynamics",
            "system": system,
            "weights": "tensornet.ckpt",
            "options": OPTIONS["tensornet"],
            "folder": str(folder),
            "threads": threads,
            "device": device,
            "memory_limit": schedule.memory_limit,
        }
        try:
            worker = Worker(side, order, schedule.timeout)
        except Failure as failure:
            yield replace(point, note=str(failure))
            return
        try:
            answer = worker.measure(2 * schedule.seconds)
        except Failure as failure:
            yield replace(point, note=str(failure))
            return
        finally:
            worker.close()
        worker.facts.pop("predictions")
        memory = answer["peak_memory"] - worker.facts["memory_before"]
        last = replace(point, wall=answer["wall"], cpu=answer["cpu"], memory=memory, facts=worker.facts)
        yield last


def table(points: Sequence[Point]) -> str:
    """A line for each package and size, and what the models are."""
    lines = [
        "| package | threads | atoms | ms a step | fastest – slowest | µs an atom | kB an atom |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        cells = [point.side, str(point.threads), f"{point.num_atoms:,}"]
        if point.wall:
            low, high = min(point.wall), max(point.wall)
            cells += [f"{1e3 * point.seconds:.4g}", f"{1e3 * low:.4g} – {1e3 * high:.4g}"]
            cells.append(f"{1e6 * point.seconds / point.num_atoms:.4g}")
            memory = point.memory if point.num_atoms >= MANY_ATOMS else None
            cells.append("–" if memory is None else f"{memory / point.num_atoms / 1e3:.0f}")
        else:
            cells += [point.note, "–", "–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    models = {"ours": "TensorNet, 128 channels, 2 layers, 5 Å", "reference": "the same TensorNet"}
    for point in points:
        if "settings" in point.facts:
            models[point.side] = f"{point.facts['version']}, {point.facts['settings']}"
    told = [f"- {side}: {models[side]}" for side in dict.fromkeys(point.side for point in points) if side in models]
    shares = [sum(point.cpu) / sum(point.wall) for point in points if point.wall and point.threads == 1]
    lines += ["", "A step is velocity Verlet in ASE with the package's own calculator."]
    if shares and min(shares) < 1 - IDLE:
        lines[-1] += (
            f" The machine was busy: a single thread had the processor for {min(shares):.0%} of the time at worst."
        )
    return "\n".join([*lines, "", *told])


def _would_take(last: Point | None, num_atoms: int, memory_limit: int | None) -> str:
    """Why a system is too large, if it is."""
    if last is None:
        return ""
    seconds = statistics.median(last.cpu) / last.threads * num_atoms / last.num_atoms  # whatever else the machine does
    if seconds > LONGEST_STEP:
        return f"a step would take {seconds:.0f} s"
    if memory_limit is not None and last.memory is not None and last.num_atoms >= MANY_ATOMS:
        memory = last.memory * num_atoms / last.num_atoms
        if memory > memory_limit:
            return f"it would need {memory / 1e9:.0f} GB"
    return ""
