#!/usr/bin/env python
"""What several threads bring, loop by loop, and what part of the time is left to one.

python benchmarks/threads.py [--model tensornet --system 192-water --task forces train --threads 2 --out FILE.md]

One process takes turns with one thread and with several. A loop counts with the time of its calls; what is in none of
them is Python and PyTorch: matrix products, the search for neighbours, autograd. The serial share is the time that does
not get shorter with threads, in percent of the time with one, if the rest were shared perfectly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import about_this_run
from systems import SYSTEMS
from workloads import OPTIONS

from torchmdnet.models.model import create_model
from torchmdnet.ops.kernels.compiling import LOOPS

#: Loops with less of the time than this, in percent, are added up in one row.
SMALL = 1.0


class Clock:
    """Seconds in each loop since it was last read, wherever the package calls it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._timed_loops: dict[str, Callable[..., Any]] = {}

    def watch(self) -> None:
        """Time every loop that has been loaded, wherever it stands."""
        new = {name: loop for name, loop in LOOPS.items() if name not in self._timed_loops}
        self._timed_loops.update(new)
        timed = {id(loop): self._timed(name.removeprefix("torchmdnet."), loop) for name, loop in new.items()}
        for module in [module for name, module in sys.modules.items() if name.startswith("torchmdnet.")]:
            for name, value in list(vars(module).items()):
                if id(value) in timed and module.__name__ != "torchmdnet.ops.kernels.compiling":
                    setattr(module, name, timed[id(value)])

    def _timed(self, name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        short = name.rpartition("loops.")[2]

        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return loop(*arguments)
            finally:
                self.seconds[short] = self.seconds.get(short, 0.0) + time.perf_counter() - begin

        return run

    def read(self) -> dict[str, float]:
        """What was measured, and begin again."""
        found, self.seconds = self.seconds, {}
        return found


def calls(name: str, system: str) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """The model, and what is timed, by task."""
    torch.manual_seed(0)
    model, given = create_model(OPTIONS[name]), SYSTEMS[system]()
    z, pos = torch.tensor(given.z), torch.tensor(given.pos, dtype=torch.float32)
    batch = torch.zeros_like(z) if given.batch is None else torch.tensor(given.batch)
    box = None if given.box is None else torch.tensor(given.box, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def forces() -> None:
        model(z, pos, batch, box)

    def train() -> None:
        optimizer.zero_grad()
        energy, found = model(z, pos, batch, box)
        (1e-3 * energy.square().mean() + found.square().mean()).backward()
        optimizer.step()

    return (model, {"forces": forces, "train": train})


def measured(call: Callable[[], Any], clock: Clock, threads: int, seconds: float) -> list[dict[str, float]]:
    """Median milliseconds of each loop, and of the whole, with one thread and with several."""
    rows: list[list[dict[str, float]]] = [[], []]
    for number in (1, threads):
        torch.set_num_threads(number)
        for _ in range(3):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rows[1]) < 5:
        for number, row in zip((1, threads), rows, strict=True):
            torch.set_num_threads(number)
            call()
            clock.read()
            begin = time.perf_counter()
            call()
            whole = time.perf_counter() - begin
            row.append({**clock.read(), "all": whole})
    names = dict.fromkeys(name for row in rows for found in row for name in found)
    return [{name: 1e3 * median(found.get(name, 0.0) for found in row) for name in names} for row in rows]


def table(title: str, one: dict[str, float], several: dict[str, float], threads: int) -> list[str]:
    """Rows of a table, those that take longest first."""
    whole = one["all"]
    loops = {name: ms for name, ms in one.items() if name != "all"}
    rest = (whole - sum(loops.values()), several["all"] - sum(several[name] for name in loops))
    rows = [(name, ms, several[name]) for name, ms in loops.items() if ms >= SMALL * whole / 100]
    small = [(ms, several[name]) for name, ms in loops.items() if ms < SMALL * whole / 100]
    rows.sort(key=lambda row: -row[1])
    rows.append((f"{len(small)} smaller loops", sum(x for x, _ in small), sum(y for _, y in small)))
    rows.append(("Python and PyTorch", *rest))
    rows.append(("**all**", whole, several["all"]))
    lines = [f"### {title}", "", f"| | ms | share | ms with {threads} threads | times as fast | serial, % of all |"]
    lines.append("|---|---|---|---|---|---|")
    for name, before, after in rows:
        gain = before / after if after > 0 else float("nan")
        serial = max(threads * after - before, 0.0) / (threads - 1)
        lines.append(
            f"| {name} | {before:.2f} | {before / whole:.0%} | {after:.2f} | {gain:.2f} | {100 * serial / whole:.1f} |"
        )
    return [*lines, ""]


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(OPTIONS), default=["tensornet"])
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="192-water")
    parser.add_argument("--task", nargs="+", choices=["forces", "train"], default=["forces", "train"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each model and task")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    args = parser.parse_args()
    lines: list[str] = []
    clock = Clock()
    for name in args.model:
        model, tasks = calls(name, args.system)
        for task in args.task:
            model.train(task == "train")  # drops what was made of the weights, so it is set once
            call = tasks[task]
            call()  # loads modules with loops
            clock.watch()
            one, several = measured(call, clock, args.threads, args.seconds)
            lines += table(f"{name}, {args.system}, {task}", one, several, args.threads)
            print("\n".join(lines[lines.index(f"### {name}, {args.system}, {task}") :]), flush=True)
    if args.out is not None:
        about = about_this_run({})
        where = f"{about['date']}, {about['revision']}, {about['machine']['cpu']}, {about['machine']['cores']} cores"
        args.out.write_text("\n".join(["# Threads, loop by loop", "", where, "", *lines]), encoding="utf-8")


if __name__ == "__main__":
    main()
