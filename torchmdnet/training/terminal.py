"""What the person at the terminal sees: a bar within an epoch, a line per epoch, a summary at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from torchmdnet.training.lightning import LNNP
from torchmdnet.training.metrics import Errors

__all__ = ["Terminal", "Units", "console_for"]

#: Seconds between two redraws of the bar; only then are numbers fetched from the device.
REDRAW_SECONDS = 0.5


class Units(NamedTuple):
    """How errors are shown: eV as meV, other units as they are, and plain words where the data state none."""

    energy: str | None = None
    length: str | None = None
    others: Mapping[str, str] = {}  # of stress and properties, in the order in which they are shown

    @property
    def scale(self) -> float:
        """Multiply a value in the data's unit by this to show it."""
        return 1000.0 if self.energy == "eV" else 1.0

    @property
    def of_energy(self) -> str:
        """``meV``, the data's unit, or ``energy unit``."""
        return "meV" if self.energy == "eV" else self.energy or "energy unit"

    @property
    def of_force(self) -> str:
        """The unit of energy per length."""
        return f"{self.of_energy}/{self.length or ('Å' if self.energy else 'length unit')}"

    @property
    def of_energy_per_atom(self) -> str:
        """The unit of energy per atom."""
        return f"{self.of_energy}/atom"

    def of(self, term: str) -> str:
        """The unit in which a stress or property is shown; empty where the data state none."""
        return f"{self.of_energy}/{self.length or 'Å'}³" if term == "stress" and self.energy else self.others[term]

    def show_term(self, term: str, value: float) -> str:
        """A stress or property in the data's unit as text, in the unit of :meth:`of`."""
        return self.show(value) if term == "stress" else "-" if math.isnan(value) else significant(value)

    def show(self, value: float) -> str:
        """A value in the data's unit as text, without its unit."""
        if math.isnan(value):
            return "-"
        return significant(value * self.scale)


def significant(value: float, digits: int = 3) -> str:
    """A number with three significant digits: 1234, 72.1, 0.00456."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits - 1}e}"


def console_for(quiet: bool = False) -> Console:
    """A console on standard output; without a terminal its lines are plain and never wrapped."""
    if sys.stdout.isatty():
        return Console(highlight=False, quiet=quiet)
    return Console(highlight=False, quiet=quiet, width=10_000, no_color=True)


class Terminal(Callback):
    """The progress of a run.

    Args:
        units: Units of the data.
        console: Where to write.
    """

    def __init__(self, units: Units, console: Console) -> None:
        self.units = units
        self.console = console
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.seconds_training = 0.0
        self.num_samples = 0
        self._epoch_began = self._drawn = time.monotonic()
        self._train_ended: float | None = None
        self._has_header = False

    # ------------------------------------------------------------------------------------------ within an epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar, if there is a terminal to show it on."""
        self._epoch_began = time.monotonic()
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        module = cast(LNNP, pl_module)
        module.keep_latest = True
        progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            auto_refresh=False,
        )
        progress.start()
        self.progress = progress
        self.task = progress.add_task("", total=None, epoch=trainer.current_epoch, numbers="")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._epoch_began = self._drawn = time.monotonic()
        self._train_ended = None
        if self.progress is not None and self.task is not None:
            self.progress.reset(self.task, total=trainer.num_training_batches, epoch=trainer.current_epoch, numbers="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, at most twice a second."""
        if self.progress is None or self.task is None:
            return
        now = time.monotonic()
        if now - self._drawn > REDRAW_SECONDS:
            self._drawn = now
            self.progress.update(
                self.task,
                completed=batch_idx + 1,
                total=trainer.num_training_batches,
                epoch=trainer.current_epoch,
                numbers=self._numbers(cast(LNNP, pl_module)),
            )
            self.progress.refresh()

    def _numbers(self, module: LNNP) -> str:
        words = []
        loss = module.running_loss()
        if loss is not None:
            words.append(f"loss {significant(loss)}")
        if module.latest is not None:
            latest = {term: (p - label).abs() for term, (p, label, _) in module.latest.pairs().items()}
            if "y" in latest:
                per_atom = latest["y"] / module.latest.atoms_per_molecule
                words.append(f"energy {self.units.show(float(per_atom.mean()))} {self.units.of_energy_per_atom}")
            if "neg_dy" in latest:
                words.append(f"force {self.units.show(float(latest['neg_dy'].mean()))} {self.units.of_force}")
            for term in self.units.others:
                if term in latest and latest[term].numel():
                    shown = self.units.show_term(term, float(latest[term].mean()))
                    words.append(f"{term} {shown} {self.units.of(term)}".rstrip())
        return "  ".join(words)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._train_ended = time.monotonic()

    # ------------------------------------------------------------------------------------------ a line per epoch

    def epoch_line(self, trainer: Trainer, module: LNNP, is_best: bool) -> None:
        """Write the line of the epoch that just ended; to be called when it is known whether it is the best."""
        now = time.monotonic()
        training = max((self._train_ended or now) - self._epoch_began, 1e-9)
        samples = module.epoch_samples * trainer.world_size
        self.seconds_training += training
        self.num_samples += samples
        if not trainer.is_global_zero:
            return
        metrics, errors = module.epoch_metrics, module.epoch_errors
        columns = {
            "epoch": f"{trainer.current_epoch:5d}",
            "lr": f"{metrics.get('lr', math.nan):9.2e}",
            "train loss": f"{significant(metrics.get(f'train_total_{module.train_loss_name}', math.nan)):>10}",
            **self._columns("val", errors.get("val")),
            "time": f"{now - self._epoch_began:6.1f} s",
            "samples/s": f"{significant(samples / training):>9}",
        }
        after = self._columns("test", errors.get("test"))
        is_table = self.console.is_terminal
        if is_table:
            self._header(columns)
            words = [*columns.values(), *_sentences(after)]
        else:
            words = _sentences({**columns, **after})
        if is_best:
            words.append("* best" if is_table else "best")
        self._say("  ".join(words), "bold" if is_best and is_table else "")

    def _columns(self, split: str, errors: Errors | None) -> dict[str, str]:
        if errors is None:
            return {}
        columns = {}
        if not math.isnan(errors.y_mae):
            name = f"{split} energy MAE [{self.units.of_energy_per_atom}]"
            columns[name] = self._cell(name, errors.y_mae_per_atom)
        if not math.isnan(errors.neg_dy_mae):
            name = f"{split} force MAE [{self.units.of_force}]"
            columns[name] = self._cell(name, errors.neg_dy_mae)
        for term, (mae, _) in errors.others.items():
            if not math.isnan(mae):
                unit = self.units.of(term)
                name = f"{split} {term} MAE" + (f" [{unit}]" if unit else "")
                columns[name] = self._cell(name, mae, term)
        return columns

    def _cell(self, name: str, value: float, term: str = "") -> str:
        text = self.units.show_term(term, value) if term else self.units.show(value)
        return f"{text:>{max(map(len, _two_lines(name)))}}"

    def _header(self, columns: dict[str, str]) -> None:
        if self._has_header:
            return
        self._has_header = True
        for row in (0, 1):
            cells = [f"{_two_lines(name)[row]:>{len(text)}}" for name, text in columns.items()]
            self._say("  ".join(cells), "dim")

    def _say(self, words: str, style: str = "") -> None:
        self.console.print(Text(words, style=style), soft_wrap=True)  # a style of its own leaves the bar alone

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = self.task = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the message can be read."""
        self._close()


def _sentences(columns: dict[str, str]) -> list[str]:
    """``val force MAE 72.1 meV/Å`` for each column."""
    parts = ((*_two_lines(name), text.strip()) for name, text in columns.items())
    return [f"{head} {text} {unit}".rstrip() for head, unit, text in parts]


def _two_lines(name: str) -> tuple[str, str]:
    head, _, unit = name.partition(" [")
    return head, unit.removesuffix("]")
