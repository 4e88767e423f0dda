#!/usr/bin/env python
"""Time this package against the reference package, torchmd-net 3.1.0, and print how many times faster it is.

With --others, time per step and memory against the number of atoms are told for other packages as well.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import scaling
from compare import Row, Schedule, compare_start_up, compare_workload
from report import about_this_run, closing, results_file, table_header, table_line, write
from sides import BENCHMARKS, Side, available_memory, others, ours, reference
from workloads import GROWTH, STARTUP, When, all_workloads

HOW_TO_GET_A_REFERENCE = """\
No --reference was given, so only this package runs. Times alone say little, they depend on the machine. To compare,
put the reference package into an environment of its own and name its interpreter:

    python -m venv ~/reference
    ~/reference/bin/pip install torchmd-net==3.1.0
    python benchmarks/run.py --reference ~/reference/bin/python
"""


class Table(NamedTuple):
    """A table of its own, as markdown, and the values behind it."""

    text: str
    data: Any = None


@dataclass(frozen=True)
class Job:
    """A comparison waiting to be made.

    Args:
        name: By which it is chosen.
        when: See :class:`workloads.Workload`.
        run: Called with the sides, the schedule and a folder for shared files; gives a row, or a table of its own.
    """

    name: str
    when: When
    run: Callable[[list[Side], Schedule, Path], Row | Table]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 if this package failed, or computed something else than the reference."""
    args = parse_arguments(argv)
    jobs = choose(all_jobs(args), args.only, everything=args.all)
    if args.list:
        print("\n".join(dict.fromkeys(job.name for job in jobs)))
        return 0
    sides = [ours(), args.reference] if args.reference else [ours()]
    if not args.reference:
        print(HOW_TO_GET_A_REFERENCE)
    schedule = Schedule(args.rounds, args.seconds, args.budget, args.timeout, memory_limit(args.memory))
    about = about_this_run({**asdict(schedule), "beside": args.beside}, args.device)
    path = results_file(about, args.out)
    rows: list[Row] = []
    print(table_header(), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the workers too
    with tempfile.TemporaryDirectory() as folder, busy_programs(args.beside):
        for job in jobs:
            result = job.run(sides, schedule, Path(folder))
            if isinstance(result, Row):
                rows.append(result)
                print(table_line(result), flush=True)
            else:
                about["tables"][job.name], about["data"][job.name] = result
            write(rows, about, path)  # each time: a run that is cut short leaves what it has
    print("\n".join(["", closing(rows, about), f"Written to {path}, and as .json beside it."]))
    return 1 if any(row.sides["ours"].failed or not row.agrees for row in rows) else 0


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """So many programs that each keep a core busy, as others on a shared machine do."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def memory_limit(gib: float | None) -> int | None:
    """Bytes that a side may allocate: as given, or three quarters of what is free; None where that is not known."""
    if gib is not None:
        return int(gib * 2**30)
    free = available_memory()
    return None if free is None else free * 3 // 4


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """Everything there is to time: starting up, each workload, and what has tables of its own."""
    device, is_cpu = args.device, args.device == "cpu"
    one = args.threads or (1,)
    one_and_two = args.threads or ((1, 2) if is_cpu and args.all and num_cores() > 1 else (1,))
    jobs = []
    for name, code in STARTUP.items() if is_cpu else ():
        jobs.append(Job(name, "always", lambda *given, of=(name, code): compare_start_up(*of, *given[:2])))
    for workload in all_workloads(device):
        for threads in one_and_two if workload.twice else one:
            jobs.append(Job(workload.name, workload.when, partial(compare_workload, workload, threads, device=device)))
    if is_cpu:
        jobs.append(Job("loader/torch_geometric", "always", partial(script, "loader.py", [])))
        jobs.append(Job("floors", "all", partial(script, "floors.py", ["--json"])))
    jobs.append(Job("precision", "all", partial(script, "precision.py", ["--json", "--device", device])))
    jobs.append(Job("growth", "all", partial(growth, args.others, one_and_two, device)))
    return jobs


def device_found() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def growth(
    others: Sequence[Side], threads: Sequence[int], device: str, sides: Sequence[Side], schedule: Schedule, folder: Path
) -> Table:
    """Time and memory of a step against the number of atoms, of all packages; ours with each number of threads."""
    runs = [(sides[0], n) for n in threads] + [(side, threads[0]) for side in (*sides[1:], *others)]
    points = []
    for side, n in runs:
        for point in scaling.grow(side, GROWTH[device], n, device, schedule, folder):
            told = f"{1e3 * point.seconds:.4g} ms" if point.wall else point.note
            print(f"growth: {side.name}, {n} thread{'s' * (n > 1)}, {point.system}: {told}", flush=True)
            points.append(point)
    return Table(scaling.table(points), [point.as_json() for point in points])


def script(name: str, options: Sequence[str], sides: Sequence[Side], schedule: Schedule, _: Path) -> Table:
    """What a script beside this one finds, in a process of our package with one thread."""
    side = sides[0]
    command = [side.python, str(BENCHMARKS / name), *options]
    if not options:
        command += ["--rounds", str(schedule.rounds), "--seconds", str(schedule.seconds / 2)]
    try:
        end = subprocess.run(
            command, capture_output=True, text=True, env=side.environment(threads=1), timeout=10 * schedule.timeout
        )
    except subprocess.TimeoutExpired:
        return Table(f"{name} did not finish in time")
    if end.returncode:
        return Table(f"{name} failed: {end.stderr.strip().splitlines()[-1]}")
    if "--json" not in options:
        return Table(end.stdout.strip())
    found = json.loads(end.stdout.strip().splitlines()[-1])
    return Table(found["table"], found["data"])


def choose(jobs: Sequence[Job], only: Sequence[str], everything: bool) -> list[Job]:
    """The jobs whose names match one of the patterns; without patterns, the usual ones, with --all more of them."""
    if only:
        return [job for job in jobs if any(fnmatchcase(job.name, pattern) for pattern in only)]
    return [job for job in jobs if job.when == "always" or (everything and job.when == "all")]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with a message."""
    default = Schedule()
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    add = parser.add_argument
    add("--reference", metavar="PYTHON", help="interpreter of an environment with the reference package")
    add("--others", metavar="PYTHON", help="interpreter of an environment with other packages: mace-torch, torchani")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where PyTorch finds a GPU, else cpu")
    add(
        "--threads",
        metavar="N,...",
        help="numbers of threads to run with (default: 1; with --all 1 and 2 where it matters)",
    )
    add("--only", metavar="NAME,...", default="", help="names of workloads, with * for anything, such as '*/train'")
    add("--all", action="store_true", help="other architectures, growth with atoms, precision and floors too")
    add("--list", action="store_true", help="print the names and stop; those that have to be named with --only '*'")
    add("--rounds", type=int, default=default.rounds, help="turns that each side takes (default: %(default)s)")
    add("--seconds", type=float, default=default.seconds, help="length of a turn (default: %(default)s)")
    add("--budget", type=float, default=default.budget, help="seconds after which there is no third round or later")
    add("--timeout", type=float, default=default.timeout, help="longest wait for one answer, s (default: %(default)s)")
    add("--beside", metavar="N", type=int, default=0, help="programs that keep a core busy meanwhile (default: 0)")
    add("--memory", metavar="GIB", type=float, help="limit of each side (default: three quarters of what is free)")
    add("--out", type=Path, default=BENCHMARKS / "results", help="folder for the results (default: benchmarks/results)")
    args = parser.parse_args(argv)
    args.device = args.device or device_found()
    args.only = [pattern for pattern in args.only.split(",") if pattern]
    if args.threads is not None:
        try:
            args.threads = [int(n) for n in args.threads.split(",")]
            if min(args.threads) < 1:
                raise ValueError
        except ValueError:
            parser.error(f"--threads: {args.threads!r} are not numbers of threads. Give some, such as 1,2.")
    for pattern in args.only:
        if not choose(all_jobs(args), [pattern], everything=True):
            parser.error(f"--only: nothing is called {pattern!r}. --list --only '*' shows the names.")
    if args.beside < 0:
        parser.error(f"--beside: {args.beside} given, 0 or more programs are possible.")
    for key in ("rounds", "seconds", "timeout", "memory"):
        value = getattr(args, key)
        if value is not None and value <= 0:
            parser.error(f"--{key}: {value} given, a positive number is needed.")
    try:
        args.reference = reference(args.reference) if args.reference else None
        args.others = others(args.others) if args.others else []
    except FileNotFoundError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
