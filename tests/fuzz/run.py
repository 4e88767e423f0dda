"""Fuzz for a while: ``make fuzz FUZZ_SECONDS=300``. Prints how much was tried and every different failure."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import inputs
import targets
from hypothesis import HealthCheck, Phase, given, seed, settings

#: Seconds after which an input that waits without using the processor ends the run.
WAIT = 900


def campaigns() -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """Inputs and target of each kind."""
    return {
        "settings": (inputs.settings, targets.settings),
        "words": (inputs.command_lines(), targets.words),
        "structures": (inputs.structures(), lambda given: targets.structures(*given)),
        "checkpoints": (inputs.checkpoints(), lambda given: targets.checkpoint(*given)),
    }


def main() -> None:
    """Take the kinds in turn until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", choices=["settings", "words", "structures", "checkpoints"], action="append")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    end, start = time.monotonic() + args.seconds, int(time.time())
    kinds = campaigns()
    tried = dict.fromkeys(args.only or kinds, 0)
    failures: dict[tuple[str, ...], tuple[int, Any, str]] = {}
    turn = 0

    def trial(name: str, target: Callable[[Any], None]) -> Callable[[Any], None]:
        def one(value: Any) -> None:
            if time.monotonic() > end:
                return
            tried[name] += 1
            faulthandler.dump_traceback_later(WAIT, exit=True)
            try:
                target(value)
            except (Exception, targets.TooLong) as error:
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "torchmdnet/" in f.filename]
                place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
                kind = (name, type(error).__name__, place)
                size = len(repr(value))
                if kind not in failures or size < failures[kind][0]:
                    failures[kind] = (size, value, "".join(traceback.format_exception(error)[-6:]))
                    if size < 400 or kind not in failures:
                        print(f"found {kind}: {value!r:.300}", flush=True)
            finally:
                faulthandler.cancel_dump_traceback_later()

        return one

    while time.monotonic() < end:
        for name in tried:
            strategy, target = kinds[name]
            turn += 1
            each = seed(start + turn)(given(strategy)(trial(name, target)))
            settings(
                max_examples=60,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(each)()
    for kind, (_, value, text) in failures.items():
        print(f"\n=== {kind}\n{value!r:.3000}\n{text}")
    print(f"{sum(tried.values())} inputs ({', '.join(f'{count} {name}' for name, count in tried.items())}), ", end="")
    print(f"{len(failures)} different failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
