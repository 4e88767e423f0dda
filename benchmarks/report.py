"""From comparisons to a table that people read and a file that programs read."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import Row
from sides import REPOSITORY

__all__ = ["about_this_run", "closing", "results_file", "table_header", "table_line", "warnings", "write"]

#: Columns of the table with their widths on a terminal.
COLUMNS = {
    "workload": 36,
    "threads": 7,
    "reference / ours": 16,
    "spread": 15,
    "CPU ratio": 9,
    "ours wall, CPU": 18,
    "cores used": 10,
    "reference wall, CPU": 19,
    "peak MiB": 11,
    "largest deviation": 40,
}
#: Part of the wall-clock time by which the processor time of one thread may differ on an idle machine.
IDLE = 0.2


def table_header() -> str:
    """Two lines of a markdown table, aligned for a terminal."""
    names = " | ".join(name.ljust(width) for name, width in COLUMNS.items())
    return f"| {names} |\n| {' | '.join('-' * width for width in COLUMNS.values())} |"


def table_line(row: Row) -> str:
    """One line of a markdown table."""
    ratios, cpu_ratios = row.ratios(), row.ratios("cpu")
    cells = [
        row.name,
        str(row.threads),
        f"{statistics.median(ratios):.2f}" if ratios else "–",
        f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "–",
        f"{statistics.median(cpu_ratios):.2f}" if cpu_ratios else "–",
        _durations(row, "ours"),
        f"{row.processor_shares()['ours']:.2f}" if row.sides["ours"].wall else "–",
        _durations(row, "reference") if "reference" in row.sides else "not run",
        ", ".join(f"{times.peak_memory / 2**20:.0f}" if times.wall else "–" for times in row.sides.values()),
        ", ".join(f"{quantity} {deviation:.0e}" for quantity, deviation in row.deviations.items()) or "–",
    ]
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))} |"


def warnings(rows: Sequence[Row], device: str = "cpu") -> list[str]:
    """What a reader should know before trusting the numbers."""
    told = [
        f"{row.name}: {side} failed: {times.failed}"
        for row in rows
        for side, times in row.sides.items()
        if times.failed
    ]
    for row in rows:
        if not row.agrees:
            found = ", ".join(f"{quantity} by {deviation:.0e}" for quantity, deviation in row.deviations.items())
            told.append(f"{row.name}: the two packages compute different things, {found}")
    alone = [row for row in rows if row.threads == 1 and device == "cpu"]  # a processor waits for a GPU
    shares = [(share, row.name) for row in alone for share in row.processor_shares().values()]
    waited = [(share, name) for share, name in shares if share < 1 - IDLE]
    if waited:
        told.append(
            f"the machine was busy: single threads had the processor for {min(waited)[0]:.0%} to {max(waited)[0]:.0%} "
            f"of the time in {', '.join(dict.fromkeys(name for _, name in waited))}. Repeat these on an idle machine; "
            "until then the ratio of CPU times is the better guide."
        )
    crowded = dict.fromkeys(name for share, name in shares if share > 1 + IDLE)
    if crowded:
        told.append(f"more than one processor was used although one thread was asked for in {', '.join(crowded)}.")
    return told


def closing(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """What stands below the table: further tables, on what all of it was measured, and warnings."""
    processor = about["machine"]
    told = [f"## {name}\n\n{table}" for name, table in about["tables"].items()]
    told.append(
        f"{processor['cpu']}, {processor['cores']} cores, {processor['memory_gib']} GiB, {processor['system']}"
        + (f", {processor['gpu']}" if processor["gpu"] else "")
        + f"; load {processor['load']} at the start"
        + (
            f"; beside {beside} program{'s' * (beside > 1)} that keep{'s' * (beside == 1)} a core busy"
            if (beside := about["settings"].get("beside", 0))
            else ""
        )
    )
    for side in ("ours", "reference"):
        facts = next((row.facts[side] for row in rows if "version" in row.facts.get(side, {})), None)
        if facts is not None:
            release = f"torchmd-net {facts['version']}" + (f" at {about['revision']}" if side == "ours" else "")
            told.append(f"{side}: {release}, Python {facts['python']}, torch {facts['torch']}")
    return "\n\n".join(told + [f"Warning: {warning}" for warning in warnings(rows, about["device"])])


def results_file(about: dict[str, Any], folder: Path) -> Path:
    """Where the table goes, named by date and processor."""
    machine = about["machine"]
    processor = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-")
    return folder / f"{about['date'][:16].replace('T', '-').replace(':', '')}-{processor}.md"


def write(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Save the table as markdown, and beside it everything behind it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = "\n".join([table_header(), *map(table_line, rows)])
    heading = f"# This package against others, {about['date'][:10]}"
    path.write_text(f"{heading}\n\n{table}\n\n{closing(rows, about)}\n", encoding="utf-8")
    results = about | {"rows": [row.as_json() for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def about_this_run(settings: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """When, with which commit and on what the numbers arise."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"date": date, "revision": revision(REPOSITORY), "machine": machine(device), "settings": settings}
    return about | {"device": device, "tables": {}, "data": {}}


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, the GPU if it is the one that is timed, and the system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpu": None if device == "cpu" else _gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def revision(repository: Path) -> str:
    """The commit of a checkout, marked when files have changed since; ``"unknown"`` outside of one."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or platform.machine()
    try:
        fields = re.findall(r"^(?:model name|Hardware)\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        fields = []
    return fields[0].strip() if fields else platform.processor() or platform.machine()


def _durations(row: Row, side: str) -> str:
    """The medians of wall-clock and processor time, in ms or s; or samples per second of wall-clock time."""
    times, samples = row.sides[side], row.facts.get(side, {}).get("num_samples")
    if not times.wall:
        return "failed" if times.failed else "–"
    wall, cpu = statistics.median(times.wall), statistics.median(times.cpu)
    if samples is not None:
        return f"{samples / wall:,.0f} samples/s"
    return f"{wall:.2f}, {cpu:.2f} s" if wall >= 10 else f"{1000 * wall:.4g}, {1000 * cpu:.4g} ms"
