"""Fuzz for a while: ``make fuzz FUZZ_SECONDS=300``. Prints how much was tried and every different failure."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import inputs
import program_inputs
import programs
import targets
from hypothesis import HealthCheck, Phase, given, seed, settings
from isolate import isolated

#: Name -> inputs, the target that takes them, and how many are tried in a turn.
CAMPAIGNS: dict[str, tuple[Callable[[], Any], Callable[..., bool], int]] = {
    "settings": (lambda: inputs.settings.map(lambda content: (content,)), targets.settings, 60),
    "words": (lambda: inputs.command_lines().map(lambda words: (words,)), targets.words, 60),
    "structures": (inputs.structures, targets.structures, 60),
    "checkpoints": (inputs.checkpoints, targets.checkpoint, 60),
    "commands": (program_inputs.commands, programs.command, 90),
    "trainings": (program_inputs.trainings, programs.training, 90),
    "runs": (program_inputs.runs, programs.continued, 60),
    "names": (lambda: program_inputs.names.map(lambda name: (name,)), programs.named, 5),
    "caches": (lambda: program_inputs.caches().map(lambda damaged: (damaged,)), programs.cache, 40),
    "environment": (program_inputs.surroundings, programs.environment, 40),
}

#: Seconds after which an input is shown for its time.
SLOW = 60.0


def main() -> None:
    """Take the kinds in turn until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", choices=sorted(CAMPAIGNS), action="append")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warm_up()
    end = time.monotonic() + args.seconds
    names = args.only or list(CAMPAIGNS)
    counts = {name: Counter[str]() for name in names}
    times = Counter[str]()
    failures: dict[tuple[str, str, str], tuple[int, Any, str]] = {}

    def trial(name: str, target: Callable[..., bool]) -> Callable[[Any], None]:
        def one(value: Any) -> None:
            begin = time.monotonic()
            if begin > end:
                return
            outcome = isolated(functools.partial(target, *value))
            spent = time.monotonic() - begin
            times[name] += spent
            if spent > SLOW:
                print(f"{spent:.0f} s {name}: {value!r:.700}", flush=True)
            counts[name]["inputs"] += 1
            counts[name]["failures" if outcome.failed else "accepted" if outcome.accepted else "refused"] += 1
            if outcome.failed:
                kind, size = (name, outcome.kind, outcome.place), len(repr(value))
                if kind not in failures or size < failures[kind][0]:
                    failures[kind] = (size, value, outcome.text)
                    told = outcome.text.strip().splitlines() or [""]
                    print(f"found {kind}: {value!r:.700}\n      {told[-1]:.700}", flush=True)

        return one

    turn = 0
    while time.monotonic() < end:
        for name in names:
            strategy, target, number = CAMPAIGNS[name]
            turn += 1
            each = seed(args.seed + turn)(given(strategy())(trial(name, target)))
            settings(
                max_examples=number,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(each)()
    for kind, (_, value, text) in failures.items():
        print(f"\n=== {kind}\n{value!r:.3000}\n{text}")
    print(f"\nseed {args.seed}")
    for name, count in counts.items():
        print(
            f"{name:<12} {count['inputs']:>6} inputs  {count['refused']:>6} refused  {count['accepted']:>6} accepted  "
            f"{count['failures']:>4} failures  {times[name]:>6.0f} s"
        )
    total = sum(count["inputs"] for count in counts.values())
    print(f"{total} inputs, {len(failures)} different failures")
    sys.exit(bool(failures))


def warm_up() -> None:
    """Import what the targets need, compile loops, and make the files that are damaged, before anything is forked.

    Loops take a minute to compile where the package is new, more than an input may.
    """
    import torch

    torch.set_num_threads(1)
    targets.SECONDS, seconds = 600, targets.SECONDS
    programs.finished_run()
    programs.cache_files()
    for suffix in (".ckpt", ".safetensors", ".zip"):
        targets.checkpoint(targets.model_bytes(suffix), suffix)
    targets.structures(targets.EXTXYZ.encode(), ".extxyz")
    with programs.place():
        programs.lay_out({})
        for line in program_inputs.LINES:
            if line[0] in ("bench", "info", "convert", "data"):
                targets.command([word for word in line if "QM9" not in word])
    targets.SECONDS = seconds


if __name__ == "__main__":
    main()
