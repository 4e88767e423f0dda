"""Make the pictures of docs/index.md from a run of examples/quickstart.py.

python tools/build_docs_pictures.py --run runs/quickstart

Trains first if the run is not there, which takes minutes, and keeps what the terminal showed in RUN/terminal.txt. The
picture of the report is taken by Chromium; without it the old one stays.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from ase.io import read
from matplotlib.axes import Axes
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from torchmdnet.page import BLUE, ORANGE, STYLE, new_figure

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"

WIDTH = 96  # columns of the terminal
#: Lines of the terminal that are left out of the picture: epochs between the first and the last of these many.
FIRST_EPOCHS, LAST_EPOCHS = 6, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart", help="default: %(default)s")
    run: Path = parser.parse_args().run.resolve()
    transcript = run / "terminal.txt"
    if not transcript.exists():
        text = record([sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(run)])
        transcript.write_bytes(text)
    (ASSETS / "terminal.svg").write_text(
        terminal_svg(transcript.read_bytes().decode(), "torchmd-train --conf quickstart.yaml"), encoding="utf-8"
    )
    simulation_png(run / "md" / "trajectory.traj", ASSETS / "simulation.png")
    report_png(run / "report.html", ASSETS / "report.png")


def record(command: list[str]) -> bytes:
    """Run a command in a terminal of its own and return all that it wrote there."""
    chunks: list[bytes] = []

    def read_and_keep(descriptor: int) -> bytes:
        chunks.append(os.read(descriptor, 1 << 16))
        return chunks[-1]

    os.environ["COLUMNS"] = str(WIDTH)
    if status := pty.spawn(command, read_and_keep):
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return b"".join(chunks)


def terminal_svg(transcript: str, title: str) -> str:
    """What a terminal shows at the end, as a picture without a font of its own."""
    lines = [re.split(r"\x1b\[2K|\r", line.rstrip("\r"))[-1] for line in transcript.split("\n")]  # redrawn bars
    lines = [
        line for line in lines if not re.match(r"epoch \d+.*━|loss \S+  ", line)
    ]  # the last bar, erased afterwards
    lines = [re.sub(r"\x1b\[\?25[hl]|\x1b\[\d*A", "", line) for line in lines]
    epochs = [i for i, line in enumerate(lines) if re.match(r"(\x1b\[1m)? +\d+ ", line)]
    dropped = set(epochs[FIRST_EPOCHS:-LAST_EPOCHS])
    begin, end = epochs[0] - 2, next(i for i, line in enumerate(lines) if line.startswith("report: "))
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    for i in range(begin, end):
        if i not in dropped:
            line = re.sub(r"/\S*/(?=\w+/(best|potential)\.)", "runs/", lines[i])  # not where this machine has it
            console.print(Text.from_ansi(line), soft_wrap=True)
        elif i == min(dropped):
            console.print(Text("    …", style="dim"))
    svg = console.export_svg(title=title, theme=SVG_EXPORT_THEME)
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL).replace("Fira Code", "ui-monospace")


def simulation_png(trajectory: Path, out: Path) -> None:
    """A molecule with the places its atoms went through, beside the energies of the simulation."""
    import matplotlib

    frames = read(trajectory, ":")
    assert isinstance(frames, list)
    times = 0.5 * 20 * np.arange(len(frames))  # fs between stored frames
    per_atom = 1000 / len(frames[0])
    kinetic = per_atom * np.array([frame.get_kinetic_energy() for frame in frames])
    potential = per_atom * np.array([frame.get_potential_energy() for frame in frames])
    for frame in frames:
        minimize_rotation_and_translation(frames[0], frame)
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(2, 4.6, 3.4)
        draw(left, frames)
        zero = potential[0]
        for values, label, colour in (
            (potential - zero + kinetic, "total", "#1d2126"),
            (potential - zero, "potential", BLUE),
            (kinetic, "kinetic", ORANGE),
        ):
            right.plot(times, values, label=label, color=colour, lw=1.2)
        right.set(xlabel="time / fs", ylabel="energy / (meV/atom)", title="Energy is conserved")
        right.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        figure.savefig(out)


def draw(axes: Axes, frames: list[Atoms], shadows: int = 14) -> None:
    """Balls and sticks of the first frame, over pale ones of later frames."""
    centre = frames[0].positions.mean(axis=0)
    _, _, directions = np.linalg.svd(frames[0].positions - centre, full_matrices=False)
    turn = directions.T @ rotation(np.deg2rad(30))  # the flat side of the molecule faces the reader, a little tilted
    for number in range(len(frames) - 1, -1, -max(1, len(frames) // shadows)):
        draw_one(axes, (frames[number].positions - centre) @ turn, frames[0].numbers, alpha=0.1, over=0)
    draw_one(axes, (frames[0].positions - centre) @ turn, frames[0].numbers, alpha=1.0, over=100)
    axes.set(aspect="equal", title="Ethanol at constant energy")
    axes.margins(0.12)
    axes.axis("off")


def rotation(angle: float) -> np.ndarray:
    """About the first axis, (3, 3)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])


def draw_one(axes: Axes, positions: np.ndarray, numbers: np.ndarray, *, alpha: float, over: float) -> None:
    """Balls and sticks of one structure, nearer atoms over those behind; positions (N, 3)."""
    radii = covalent_radii[numbers]
    depths = over + positions[:, 2] - positions[:, 2].min()
    for i, (x, y, _) in enumerate(positions):
        size, colour = 1400 * max(radii[i], 0.42), jmol_colors[numbers[i]]
        axes.scatter(x, y, s=size, color=[colour], ec="#1d2126", lw=1, alpha=alpha, zorder=depths[i])
        for j in range(i):
            if np.linalg.norm(positions[i] - positions[j]) < 1.2 * (radii[i] + radii[j]):
                ends = positions[[i, j], :2].T
                axes.plot(*ends, color="#8a8f98", lw=6, alpha=alpha, zorder=min(depths[i], depths[j]) - 0.01)


def report_png(report: Path, out: Path) -> None:
    """The upper part of the report, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium: the picture of the report stays as it is")
        return
    options = ["--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--window-size=1120,1560"]
    subprocess.run([browser, *options, f"--screenshot={out}", report.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
