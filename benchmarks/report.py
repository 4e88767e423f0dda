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

from compare import Row, Times
from sides import REPOSITORY

__all__ = ["about_this_run", "table_header", "table_line", "title", "warnings", "write"]

#: Columns of the table with their widths on a terminal.
COLUMNS = {
    "workload": 36,
    "threads": 7,
    "reference / ours": 16,
    "spread": 15,
    "CPU ratio": 9,
    "ours wall, CPU": 18,
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
    ours, reference = row.sides["ours"], row.sides.get("reference")
    ratios, cpu_ratios = row.ratios(), row.ratios("cpu")
    cells = [
        row.name,
        str(row.threads),
        f"{statistics.median(ratios):.2f}" if ratios else "–",
        f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else "–",
        f"{statistics.median(cpu_ratios):.2f}" if cpu_ratios else "–",
        _durations(ours),
        "not run" if reference is None else _durations(reference),
        ", ".join(f"{times.peak_memory / 2**20:.0f}" if times.wall else "–" for times in row.sides.values()),
        ", ".join(f"{quantity} {deviation:.0e}" for quantity, deviation in row.deviations.items()) or "–",
    ]
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))} |"


def warnings(rows: Sequence[Row]) -> list[str]:
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
    shares = [(share, row.name) for row in rows if row.threads == 1 for share in row.processor_shares().values()]
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


def title(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """What was compared, and on what."""
    processor = about["machine"]
    lines = [
        f"{processor['cpu']}, {processor['cores']} cores, {processor['memory_gib']} GiB, {processor['system']}; "
        f"load {processor['load']} at the start"
    ]
    for side in ("ours", "reference"):
        facts = next((row.facts[side] for row in rows if side in row.facts), None)
        if facts is not None:
            release = f"torchmd-net {facts['version']}" + (f" at {about['revision']}" if side == "ours" else "")
            lines.append(f"{side}: {release}, Python {facts['python']}, torch {facts['torch']}")
    return "\n".join(lines)


def write(rows: Sequence[Row], about: dict[str, Any], folder: Path) -> Path:
    """Save everything as JSON and the table as markdown, named by date and processor; returns the markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = re.sub(r"[^a-z0-9]+", "-", about["machine"]["cpu"].lower()).strip("-")
    path = folder / f"{about['date'][:16].replace('T', '-').replace(':', '')}-{processor}.md"
    heading = title(rows, about).replace("\n", "\n\n")
    text = f"# torchmdnet against the reference package, {about['date'][:10]}\n\n{heading}\n\n{table_header()}\n"
    text += "".join(f"{table_line(row)}\n" for row in rows)
    text += "".join(f"\nWarning: {warning}\n" for warning in warnings(rows))
    path.write_text(text, encoding="utf-8")
    results = about | {"rows": [row.as_json() for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def about_this_run(settings: dict[str, Any]) -> dict[str, Any]:
    """When, with which commit and on what the numbers arise."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"date": date, "revision": revision(REPOSITORY), "machine": machine(), "settings": settings}


def machine() -> dict[str, Any]:
    """The processor and the system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1),
    }


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


def _durations(times: Times) -> str:
    """The medians of wall-clock and processor time, in ms or s."""
    if not times.wall:
        return "failed" if times.failed else "–"
    wall, cpu = statistics.median(times.wall), statistics.median(times.cpu)
    return f"{wall:.2f}, {cpu:.2f} s" if wall >= 10 else f"{1000 * wall:.4g}, {1000 * cpu:.4g} ms"
