"""Taking turns: how the two sides are timed against each other, and what is made of the numbers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sides import Failure, Side, Worker
from workloads import Workload

__all__ = ["Row", "Schedule", "Times", "compare_start_up", "compare_workload"]

#: Relative deviation of a prediction beyond which two sides do not compute the same thing, in single precision.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Schedule:
    """How long to time.

    Args:
        rounds: Turns that each side takes.
        seconds: Length of a turn; one call at least.
        budget: Seconds after which a workload gets no further round, once it has had two.
        timeout: Longest wait for one answer of one side, in seconds.
        memory_limit: Bytes that one side may allocate.
    """

    rounds: int = 5
    seconds: float = 1.0
    budget: float = 120.0
    timeout: float = 300.0
    memory_limit: int | None = None


@dataclass
class Times:
    """What one side needed.

    Args:
        wall: Median wall-clock seconds of a call, for each round.
        cpu: Median processor seconds of a call, for each round.
        peak_memory: In bytes, of the whole process.
        failed: Why there are no times.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_memory: int = 0
    failed: str | None = None

    def add(self, answer: dict[str, Any]) -> None:
        self.wall.append(statistics.median(answer["wall"]))
        self.cpu.append(statistics.median(answer["cpu"]))
        self.peak_memory = max(self.peak_memory, answer["peak_memory"])


@dataclass
class Row:
    """One comparison.

    Args:
        name: Of the workload.
        threads: Threads each side may use.
        sides: Times by name of the side, ours first.
        deviations: Largest deviation of ours from the reference over the largest value, by quantity.
        facts: What the sides said of themselves.
    """

    name: str
    threads: int
    sides: dict[str, Times]
    deviations: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratios(self, clock: str = "wall") -> list[float]:
        """Time of the reference over ours, round by round; ``clock`` is ``"wall"`` or ``"cpu"``."""
        if "reference" not in self.sides:
            return []
        ours, reference = getattr(self.sides["ours"], clock), getattr(self.sides["reference"], clock)
        return [theirs / mine for mine, theirs in zip(ours, reference, strict=False)]

    @property
    def agrees(self) -> bool:
        return all(deviation <= TOLERANCE for deviation in self.deviations.values())

    def processor_shares(self) -> dict[str, float]:
        """Processor time over wall-clock time, by side; 1 is one thread that never had to wait."""
        shares = {}
        for name, times in self.sides.items():
            if times.wall:
                shares[name] = statistics.median(c / w for c, w in zip(times.cpu, times.wall, strict=True))
        return shares

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": self.ratios(), "cpu_ratios": self.ratios("cpu")}


def compare_workload(
    workload: Workload, threads: int, sides: Sequence[Side], schedule: Schedule, folder: Path, device: str = "cpu"
) -> Row:
    """Time one workload in a process of each side, by turns.

    Args:
        folder: For what the sides share, such as the weights of a model.
    """
    memory_limit = schedule.memory_limit
    settings = {"folder": str(folder), "threads": threads, "memory_limit": memory_limit, "device": device}
    row = Row(workload.name, threads, {side.name: Times() for side in sides})
    workers: dict[str, Worker] = {}
    try:
        for side in sides:
            try:
                workers[side.name] = Worker(side, workload.order | settings, schedule.timeout)
            except Failure as failure:
                row.sides[side.name].failed = str(failure)
        row.facts = {name: worker.facts for name, worker in workers.items()}
        predictions = {name: facts.pop("predictions") for name, facts in row.facts.items()}
        if len(predictions) == 2:
            row.deviations = deviations(predictions["ours"], predictions["reference"])
        take_turns({name: worker.measure for name, worker in workers.items()}, row, schedule)
    finally:
        for worker in workers.values():
            worker.close()
    return row


def compare_start_up(name: str, arguments: list[str], sides: Sequence[Side], schedule: Schedule) -> Row:
    """Time fresh interpreters by turns; the first of each side fills the caches of the disk and is not counted.

    Three turns are enough: each is long, and nothing in it depends on the one before.
    """
    schedule = replace(schedule, rounds=min(schedule.rounds, 3))
    row = Row(name, 1, {side.name: Times() for side in sides})
    runs = {side.name: lambda _, side=side: side.start_up(arguments, schedule.timeout) for side in sides}
    for name, run in list(runs.items()):
        try:
            run(0.0)
        except Failure as failure:
            row.sides[name].failed = str(failure)
            del runs[name]
    take_turns(runs, row, schedule)
    return row


def take_turns(measure: dict[str, Callable[[float], dict[str, Any]]], row: Row, schedule: Schedule) -> None:
    """Time the sides one after the other, again and again, so that a drift of the machine reaches both."""
    start = time.perf_counter()
    for done in range(schedule.rounds):
        if done >= 2 and time.perf_counter() - start > schedule.budget:
            break
        for name in list(measure):
            try:
                row.sides[name].add(measure[name](schedule.seconds))
            except Failure as failure:
                row.sides[name].failed = str(failure)
                del measure[name]


def deviations(ours: dict[str, list[float]], reference: dict[str, list[float]]) -> dict[str, float]:
    """For each quantity, the largest difference over the largest value; infinite if the shapes differ."""
    found = {}
    for quantity in ours.keys() | reference.keys():
        mine, theirs = ours.get(quantity, []), reference.get(quantity, [])
        if len(mine) != len(theirs) or not mine or not all(map(math.isfinite, mine + theirs)):
            found[quantity] = math.inf
        else:
            scale = max(map(abs, theirs)) or 1.0
            found[quantity] = max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / scale
    return dict(sorted(found.items()))
