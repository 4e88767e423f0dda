"""What a command is doing and how much is left, on standard error, so that results can be piped."""

from __future__ import annotations

import sys

from torchmdnet.config.rundir import move_handlers

__all__ = ["Steps"]


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
