#!/usr/bin/env python3
"""Prove or refute on a GPU, in one call of under eight minutes, what can only be counted and interpreted elsewhere.

Every stage is a process of its own with a limit of its own; see :mod:`gpu_stages` for what each does. What a stage
finds is appended at once to ``gpu-check.jsonl``, so a call that is cut short leaves what it has. A table follows in
``gpu-check.md`` and on standard output. The exit status is 1 if anything is off.

    make gpu-pack                                  # on any machine: wheels and numbers that the GPU's may lack
    make gpu-check PYTHON=python3 GPU_PACK=gpu-pack
    python tools/gpu_check.py --only evaluation,training --seconds 200
    python tools/gpu_check.py --dry-run            # every stage, small, on the CPU
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["STAGES", "Stage", "main", "report"]

TOOLS = Path(__file__).resolve().parent
REPOSITORY = TOOLS.parent
ARCHITECTURES = ("tensornet", "tensornet2", "equivariant-transformer", "transformer", "graph-network")
#: How much longer stages of a dry run may take, on a machine that compiles loops or is busy.
SLOWER = 20
#: Lines of a stage's output that are kept where it fails.
TAIL = 8


class Stage(NamedTuple):
    """One process of the check."""

    name: str
    #: Seconds after which it is ended.
    limit: float
    #: Stages of the same round run side by side: nothing is timed in them.
    round: int
    #: Further variables of its environment.
    variables: dict[str, str] = {}


#: The limits of the rounds add up to what a call may take.
STAGES = (
    Stage("environment", 40, 0),
    Stage("kernels", 170, 1),
    Stage("tests", 170, 1),
    *(Stage(f"golden:{name}", 170, 1) for name in ARCHITECTURES),
    Stage("definitions", 170, 1, {"TORCHMDNET_PLAIN_OPS": "1"}),
    Stage("sanitizer", 170, 1),
    Stage("evaluation", 80, 2),
    Stage("training", 50, 3),
    Stage("others", 50, 4),
    Stage("sweep", 50, 5),
)


class Running(NamedTuple):
    """A stage at work."""

    stage: Stage
    process: subprocess.Popen[bytes]
    output: Any
    start: float
    end: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--only", metavar="STAGE,...", default="", help=f"stages, of {', '.join(stage.name for stage in STAGES)}")
    add(
        "--pack", type=Path, help="folder made by tools/gpu_pack.py: golden numbers, and wheels that --install installs"
    )
    add("--install", action="store_true", help="install those wheels of the pack whose packages are missing here")
    add("--out", type=Path, default=Path("gpu-check"), help="folder for the results (default: gpu-check)")
    add("--seconds", type=float, help="for all stages together (default: 450, of a dry run an hour)")
    add("--dry-run", action="store_true", help="every stage on the CPU with the smallest systems")
    args = parser.parse_args(argv)
    names = [name for name in args.only.split(",") if name]
    unknown = sorted(set(names) - {stage.name for stage in STAGES})
    if unknown:
        parser.error(
            f"--only: no stage is called {', '.join(unknown)}. Choose from {', '.join(s.name for s in STAGES)}."
        )
    if args.pack is not None and not args.pack.is_dir():
        parser.error(f"--pack: {args.pack} is no folder. Make it with 'make gpu-pack', or leave the option out.")
    if args.install and args.pack is None:
        parser.error("--install: there is no pack to install from. Add --pack FOLDER.")
    start = time.monotonic()
    if args.install:
        install(args.pack)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "gpu-check.jsonl"
    results.unlink(missing_ok=True)
    stages = [stage for stage in STAGES if not names or stage.name in names]
    seconds = args.seconds or (3600.0 if args.dry_run else 450.0)
    run_all(stages, results, args.pack, start + seconds, is_dry=args.dry_run)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    text = report(lines, time.monotonic() - start)
    (args.out / "gpu-check.md").write_text(text)
    print(text)
    return 0 if all(line.get("ok", True) for line in lines) else 1


def install(pack: Path) -> None:
    """Install the wheels of packages that are missing, into the environment of this interpreter."""
    from importlib.metadata import PackageNotFoundError, version

    missing = []
    for wheel in sorted((pack / "wheels").glob("*.whl")):
        try:
            version(wheel.name.split("-")[0])
        except PackageNotFoundError:
            missing.append(str(wheel))
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *missing]
        subprocess.run(command, check=True)


def run_all(stages: Iterable[Stage], results: Path, pack: Path | None, deadline: float, *, is_dry: bool) -> None:
    """Run the stages round by round; a round that would begin after the deadline is left out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, which ends the stages too
    for _, group in groupby(stages, key=lambda stage: stage.round):
        # two cores are fewer than a round of the dry run has stages
        for some in ([stage] for stage in group) if is_dry else [list(group)]:
            run_round(some, results, pack, deadline, is_dry=is_dry)


def run_round(stages: Sequence[Stage], results: Path, pack: Path | None, deadline: float, *, is_dry: bool) -> None:
    """Run stages side by side until each has ended, or its time is up."""
    running: list[Running] = []
    try:
        for stage in stages:
            now = time.monotonic()
            if now + 5 > deadline:
                append(results, stage.name, end="left out", seconds=0.0, ok=False, tail="no time was left")
                continue
            limit = stage.limit * (SLOWER if is_dry else 1)
            running.append(begin(stage, results, pack, min(now + limit, deadline), is_dry=is_dry))
        while running:
            time.sleep(0.05)
            for one in list(running):
                code = one.process.poll()
                is_late = time.monotonic() > one.end
                if code is None and not is_late:
                    continue
                running.remove(one)
                end = "out of time" if code is None else "done" if code == 0 else f"failed with {code}"
                stop(one)
                seconds = round(time.monotonic() - one.start, 1)
                tail = "" if code == 0 else last_lines(one.output)
                append(results, one.stage.name, end=end, seconds=seconds, ok=code == 0, tail=tail)
                one.output.close()
    finally:
        for one in running:
            stop(one)


def begin(stage: Stage, results: Path, pack: Path | None, end: float, *, is_dry: bool) -> Running:
    """Start the process of a stage."""
    command = [sys.executable, str(TOOLS / "gpu_stages.py"), stage.name, "--results", str(results.resolve())]
    command += ["--until", f"{end - time.monotonic():.1f}"]
    if pack is not None:
        command += ["--pack", str(pack.resolve())]
    variables = {**os.environ, **stage.variables, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    if is_dry:
        command.append("--dry-run")
        variables |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    output = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )
    return Running(stage, process, output, time.monotonic(), end)


def stop(one: Running) -> None:
    """End a stage and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()


def last_lines(output: Any) -> str:
    """The end of what a stage printed."""
    output.seek(0)
    return "\n".join(output.read().decode(errors="replace").strip().splitlines()[-TAIL:])


def append(results: Path, stage: str, **fields: Any) -> None:
    """Add a line to the results, whole and at once, since stages write there side by side."""
    line = json.dumps({"stage": stage, **fields}, ensure_ascii=False) + "\n"
    file = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


# ----------------------------------------------------------------------------------------------------------- the report


def report(lines: Sequence[dict[str, Any]], seconds: float) -> str:
    """What was found, as Markdown."""
    parts = [f"# GPU check, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {seconds:.0f} s", ""]
    parts += [f"- {line['fact']}: {line['value']}" for line in lines if "fact" in line]
    parts += ["", "| stage | end | seconds | checks | off |", "|---|---|---|---|---|"]
    for line in lines:
        if "end" in line:
            checks = [other for other in lines if other["stage"] == line["stage"] and "check" in other]
            off = sum(not check["ok"] for check in checks)
            parts.append(f"| {line['stage']} | {line['end']} | {line['seconds']} | {len(checks)} | {off} |")
    parts += list(_off(lines))
    for kind in dict.fromkeys(line["table"] for line in lines if "table" in line):
        parts += ["", f"## {kind}", "", *_table([line for line in lines if line.get("table") == kind])]
    return "\n".join(parts) + "\n"


def _off(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    wrong = [line for line in lines if not line.get("ok", True)]
    if wrong:
        yield from ("", "## Off", "")
    for line in wrong:
        if "check" in line:
            yield f"- {line['stage']}: {line['check']}: {line['value']:.3g}, allowed {line['allowed']:.3g}"
        else:
            told = (line.get("tail") or "").strip().replace("\n", "\n      ")
            yield f"- {line['stage']}: {line['end']}\n\n      {told}\n"


def _table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for line in lines for key in line if key not in ("stage", "table")))
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for line in lines:
        yield f"| {' | '.join(_cell(line.get(column)) for column in columns)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
