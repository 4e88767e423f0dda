#!/usr/bin/env python
"""Draw what ``run.py`` has found.

python benchmarks/plot.py benchmarks/results/DATE-MACHINE.json [--out docs/assets]

Writes ``speed-ratios.png``, ``speed-growth.png`` and ``speed-memory.png``, of those the results have values for.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from scaling import MANY_ATOMS
from sides import REPOSITORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Colours that colour-blind people tell apart (Wong, Nature Methods 8, 441, 2011), and markers.
STYLES = {"ours": ("#0072b2", "o"), "reference": ("#d55e00", "s")}
MORE_STYLES = [("#009e73", "^"), ("#cc79a7", "v"), ("#e69f00", "D")]
NAMES = {"ours": "this package", "reference": "torchmd-net 3.1.0"}


def ratios(results: dict[str, Any], axes: Axes) -> bool:
    """A bar for each comparison, from the slowest to the fastest round."""
    rows = [row for row in results["rows"] if row["ratios"] and not row["name"].startswith("startup/")]
    for place, row in enumerate(reversed(rows)):
        middle = statistics.median(row["ratios"])
        ends = [[middle - min(row["ratios"])], [max(row["ratios"]) - middle]]
        axes.barh(place, middle, color=STYLES["ours"][0], alpha=0.8)
        axes.errorbar(middle, place, xerr=ends, color="black", capsize=2, linewidth=1)
        axes.annotate(f" {middle:.1f}", (max(row["ratios"]), place), va="center", fontsize=8)
    labels = [row["name"] + (f", {row['threads']} threads" if row["threads"] > 1 else "") for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_xlabel("times as fast as torchmd-net 3.1.0")
    return bool(rows)


def growth(results: dict[str, Any], axes: Axes, clock: str = "wall") -> bool:
    """Time of a step against the number of atoms, of one thread alone if it is the processor's."""
    for name, style, points in _lines(results, one_thread=clock == "cpu"):
        x = [point["num_atoms"] for point in points]
        axes.plot(x, [1e3 * statistics.median(point[clock]) for point in points], label=name, **style)
    unit = "ms a step of dynamics" if clock == "wall" else "processor time of a step of dynamics, ms"
    axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel=unit)
    return _finished(axes)


def memory(results: dict[str, Any], axes: Axes) -> bool:
    """Memory of an atom against the number of atoms."""
    for name, style, points in _lines(results, one_thread=True):
        large = [point for point in points if point["num_atoms"] >= MANY_ATOMS and point["memory"]]
        x = [point["num_atoms"] for point in large]
        if large:
            axes.plot(x, [point["memory"] / point["num_atoms"] / 1e3 for point in large], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel="kB an atom at the worst moment")
    return _finished(axes)


def _lines(results: dict[str, Any], *, one_thread: bool = False) -> list[tuple[str, dict[str, Any], list[Any]]]:
    """Name, style and points of each package and number of threads (of one thread alone, if so asked)."""
    points = [point for point in results.get("data", {}).get("growth") or [] if point["wall"]]
    further = [side for side in dict.fromkeys(point["side"] for point in points) if side not in STYLES]
    styles, found = STYLES | dict(zip(further, MORE_STYLES, strict=False)), []
    for side, count in dict.fromkeys((point["side"], point["threads"]) for point in points):
        if one_thread and count > 1:
            continue
        color, marker = styles[side]
        name = f"{NAMES.get(side, side)}{f', {count} threads' if count > 1 else ''}"
        style = {"color": color, "marker": marker, "markersize": 4, "linestyle": "--" if count > 1 else "-"}
        found.append((name, style, [point for point in points if (point["side"], point["threads"]) == (side, count)]))
    return found


def _finished(axes: Axes) -> bool:
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    return bool(axes.lines)


def draw(results: dict[str, Any], folder: Path, clock: str = "wall") -> list[Path]:
    """Write the figures; the names of those that were written."""
    machine = results["machine"]
    told = f"{machine.get('gpu') or machine['cpu']}, {results['date'][:10]}"
    timed = partial(growth, clock=clock)
    written = []
    for name, paint, size in (("ratios", ratios, (7, 4.2)), ("growth", timed, (6, 4)), ("memory", memory, (6, 4))):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        if paint(results, axes):
            axes.set_title(told, fontsize=9, loc="right")
            written.append(folder / f"speed-{name}.png")
            figure.savefig(written[-1], dpi=130)
        plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a .json file that run.py has written")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "assets", help="default: %(default)s")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu if the machine was busy")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in draw(json.loads(options.results.read_text(encoding="utf-8")), options.out, options.clock):
        print(path)


if __name__ == "__main__":
    main()
