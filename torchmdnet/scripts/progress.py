"""What a command is doing and how much is left, on standard error, so that results can be piped."""

from __future__ import annotations

import sys
import time

from torchmdnet.config.rundir import move_handlers

__all__ = ["Meter", "Steps"]

#: Parts of the whole after which a line is written where there is no terminal.
PARTS = 10


class Steps:
    """The steps of a command: a bar on a terminal, a line for each step where there is none.

    Args:
        total: Number of steps.
        ticking: Whether the time taken is redrawn while a step runs, which takes a thread; not for measurements.
    """

    def __init__(self, total: int, *, ticking: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.total = total
        self.number = 0
        console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                BarColumn(bar_width=12),
                MofNCompleteColumn(separator=" of "),
                *([TimeElapsedColumn()] if ticking else []),
                TextColumn("{task.description}", markup=False),
                console=console,
                transient=True,
                auto_refresh=ticking,
            )
            self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Steps:
        if self.bar is not None:
            self._stderr = sys.stderr
            self.bar.start()
            self._above = sys.stderr
            move_handlers({id(self._stderr): self._above})  # what is logged would end up on the line of the bar
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            move_handlers({id(self._above): self._stderr})

    def begin(self, words: str) -> None:
        """The next step begins, the one before has ended."""
        self.number += 1
        if self.bar is None:
            print(f"{self.number} of {self.total}: {words}", file=sys.stderr, flush=True)
        else:
            self.bar.update(self.task, completed=self.number - 1, description=words, refresh=True)


class Meter:
    """One long piece of work: a bar with numbers on a terminal, ten lines where there is none.

    The time left is estimated from what was done since the second update, as the first may have compiled loops.

    Args:
        total: How much there is to do.
        done: How much of it was done before.
    """

    def __init__(self, total: float, done: float = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.total, self.done = max(total, 1e-300), done
        self._part = int(PARTS * done / self.total)
        self._since: tuple[float, float] | None = None
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            self.bar = Progress(
                BarColumn(bar_width=12),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True, highlight=False),
                transient=True,
                auto_refresh=False,
            )
            self.task = self.bar.add_task("", total=self.total)
            self.bar.update(self.task, completed=done)

    def __enter__(self) -> Meter:
        if self.bar is not None:
            self._stderr = sys.stderr
            self.bar.start()
            self._above = sys.stderr
            move_handlers({id(self._stderr): self._above})
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
            move_handlers({id(self._above): self._stderr})

    def update(self, done: float, words: str) -> None:
        """So much is done by now."""
        left = self._left(done)
        text = ", ".join(filter(None, [words, None if left is None else f"{_duration(left)} left"]))
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=text, refresh=True)
            return
        part = int(PARTS * done / self.total)
        if part > self._part:
            self._part = part
            print(f"{100 * done / self.total:.0f} %: {text}", file=sys.stderr, flush=True)

    def _left(self, done: float) -> float | None:
        now = time.monotonic()
        if self._since is None:
            self._since = now, done
            return None
        began, before = self._since
        if done <= before or done >= self.total:
            return None
        return (now - began) / (done - before) * (self.total - done)


def _duration(seconds: float) -> str:
    """12 s, 3 min, 5 h 2 min."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
