#!/usr/bin/env python
"""Time this package against the reference package, torchmd-net 3.1.0, and print how many times faster it is."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from compare import Row, Schedule, compare_start_up, compare_workload
from report import about_this_run, closing, results_file, table_header, table_line, write
from sides import BENCHMARKS, Side, available_memory, ours, reference
from workloads import STARTUP, all_workloads

HOW_TO_GET_A_REFERENCE = """\
No --reference was given, so only this package runs. Times alone say little, they depend on the machine. To compare,
put the reference package into an environment of its own and name its interpreter:

    python -m venv ~/reference
    ~/reference/bin/pip install torchmd-net==3.1.0
    python benchmarks/run.py --reference ~/reference/bin/python
"""


@dataclass(frozen=True)
class Job:
    """A comparison waiting to be made.

    Args:
        name: By which it is chosen.
        optional: Whether it runs only when it is named.
        run: Called with the sides, the schedule and a folder for shared files; gives a row, or a table of its own.
    """

    name: str
    optional: bool
    run: Callable[[list[Side], Schedule, Path], Row | str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 if this package failed, or computed something else than the reference."""
    args = parse_arguments(argv)
    jobs = choose(all_jobs(args.threads), args.only, everything=args.all)
    if args.list:
        print("\n".join(dict.fromkeys(job.name for job in jobs)))
        return 0
    sides = [ours(), args.reference] if args.reference else [ours()]
    if not args.reference:
        print(HOW_TO_GET_A_REFERENCE)
    schedule = Schedule(args.rounds, args.seconds, args.budget, args.timeout, memory_limit(args.memory))
    about = about_this_run(asdict(schedule))
    path = results_file(about, args.out)
    rows: list[Row] = []
    print(table_header(), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the workers too
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            result = job.run(sides, schedule, Path(folder))
            if isinstance(result, Row):
                rows.append(result)
                print(table_line(result), flush=True)
            else:
                about["tables"][job.name] = result
            write(rows, about, path)  # each time: a run that is cut short leaves what it has
    print("\n".join(["", closing(rows, about), f"Written to {path}, and as .json beside it."]))
    return 1 if any(row.sides["ours"].failed or not row.agrees for row in rows) else 0


def memory_limit(gib: float | None) -> int | None:
    """Bytes that a side may allocate: as given, or three quarters of what is free; None where that is not known."""
    if gib is not None:
        return int(gib * 2**30)
    free = available_memory()
    return None if free is None else free * 3 // 4


def all_jobs(threads: Sequence[int]) -> list[Job]:
    """Everything there is to time: starting up, then each workload with each number of threads."""
    start_up = [
        Job(name, False, lambda sides, schedule, _, args=(name, code): compare_start_up(*args, sides, schedule))
        for name, code in STARTUP.items()
    ]
    work = [
        Job(workload.name, workload.optional, lambda *args, load=workload, n=n: compare_workload(load, n, *args))
        for workload in all_workloads()
        for n in threads
    ]
    return [*start_up, *work, Job("loader/torch_geometric", False, loader_table)]


def loader_table(sides: Sequence[Side], schedule: Schedule, _: Path) -> str:
    """The table of ``loader.py``: our loader against the one of torch_geometric, in one process."""
    side = sides[0]
    command = [side.python, str(BENCHMARKS / "loader.py"), "--rounds", str(schedule.rounds)]
    command += ["--seconds", str(schedule.seconds / 2)]
    try:
        end = subprocess.run(
            command, capture_output=True, text=True, env=side.environment(threads=1), timeout=10 * schedule.timeout
        )
    except subprocess.TimeoutExpired:
        return "loader.py did not finish in time"
    return end.stdout.strip() if end.returncode == 0 else f"loader.py failed: {end.stderr.strip().splitlines()[-1]}"


def choose(jobs: Sequence[Job], only: Sequence[str], everything: bool) -> list[Job]:
    """The jobs whose names match one of the patterns; without patterns, those that are not optional, or all."""
    if only:
        return [job for job in jobs if any(fnmatchcase(job.name, pattern) for pattern in only)]
    return [job for job in jobs if everything or not job.optional]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with a message."""
    default = Schedule()
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    add = parser.add_argument
    add("--reference", metavar="PYTHON", help="interpreter of an environment with the reference package")
    add("--threads", metavar="N,...", default="1", help="numbers of threads to run with (default: 1)")
    add("--only", metavar="NAME,...", default="", help="names of workloads, with * for anything, such as '*/train'")
    add("--all", action="store_true", help="run the optional workloads too: other architectures, large training steps")
    add("--list", action="store_true", help="print the names and stop")
    add("--rounds", type=int, default=default.rounds, help="turns that each side takes (default: %(default)s)")
    add("--seconds", type=float, default=default.seconds, help="length of a turn (default: %(default)s)")
    add("--budget", type=float, default=default.budget, help="seconds after which there is no third round or later")
    add("--timeout", type=float, default=default.timeout, help="longest wait for one answer, s (default: %(default)s)")
    add("--memory", metavar="GIB", type=float, help="limit of each side (default: three quarters of what is free)")
    add("--out", type=Path, default=BENCHMARKS / "results", help="folder for the results (default: benchmarks/results)")
    args = parser.parse_args(argv)
    args.only = [pattern for pattern in args.only.split(",") if pattern]
    for pattern in args.only:
        if not choose(all_jobs([1]), [pattern], everything=True):
            parser.error(f"--only: nothing is called {pattern!r}. --list --all shows the names.")
    try:
        args.threads = [int(n) for n in args.threads.split(",")]
        if min(args.threads) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--threads: {args.threads!r} are not numbers of threads. Give some, such as 1,2.")
    for key in ("rounds", "seconds", "timeout", "memory"):
        value = getattr(args, key)
        if value is not None and value <= 0:
            parser.error(f"--{key}: {value} given, a positive number is needed.")
    if args.reference:
        try:
            args.reference = reference(args.reference)
        except FileNotFoundError as error:
            parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
