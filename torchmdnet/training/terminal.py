"""What the person at the terminal sees: a bar for the run, a line per epoch, a summary at the end."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchmdnet.config.rundir import move_handlers
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.metrics import Errors

__all__ = ["Terminal", "Units", "console_for", "duration", "significant"]

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


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 2 min."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def console_for(quiet: bool = False) -> Console:
    """A console on standard output; without a terminal its lines are plain and never wrapped."""
    if sys.stdout.isatty():
        return Console(highlight=False, quiet=quiet)
    return Console(highlight=False, quiet=quiet, width=10_000, no_color=True)


class Terminal(Callback):
    """The progress of a run.

    On a terminal a bar shows how much of the whole run is done, with the batch, the time left and the latest loss and
    errors, and every epoch adds a line to a table. Both fit the width of the terminal: columns that do not are left out
    (``metrics.csv`` and ``errors.csv`` have everything). Elsewhere, in a file or a pipe, each epoch writes one line.

    Epochs are numbered from 0, as in the tables and in the names of checkpoints, so ``epoch 5 of 36`` means that five
    are done.

    Args:
        units: Units of the data.
        console: Where to write.
    """

    def __init__(self, units: Units, console: Console) -> None:
        self.units = units
        self.console = console
        self.live: Live | None = None
        self.seconds_training = 0.0
        self.num_samples = 0
        self._epoch_began = self._drawn = time.monotonic()
        self._train_ended: float | None = None
        self._layout: _Layout | None = None
        self._recent: deque[float] = deque(maxlen=5)  # seconds of the latest epochs
        self._first: tuple[float, float] | None = None  # when the first batch ended, and its part of an epoch
        self._streams: tuple[Any, Any] | None = None  # standard error, and what writes its lines above the bar

    # ------------------------------------------------------------------------------------------ within an epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar, if there is a terminal to show it on."""
        self._epoch_began = time.monotonic()
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        module = cast(LNNP, pl_module)
        module.keep_latest = True
        stderr = sys.stderr
        self.live = Live(console=self.console, transient=True, auto_refresh=False, redirect_stderr=_is_terminal(stderr))
        self.live.start()
        if sys.stderr is not stderr:  # what is logged meanwhile would end up on the line of the bar
            self._streams = stderr, sys.stderr
            move_handlers({id(stderr): sys.stderr})
        self._draw(trainer, module, 0, "")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._epoch_began = self._drawn = time.monotonic()
        self._train_ended = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw, at most twice a second."""
        if self._first is None:
            self._first = time.monotonic(), (batch_idx + 1) / max(float(trainer.num_training_batches), 1.0)
        if self.live is not None and time.monotonic() - self._drawn > REDRAW_SECONDS:
            done = batch_idx + 1
            self._draw(trainer, cast(LNNP, pl_module), done, f"batch {done} of {trainer.num_training_batches}")

    def _draw(self, trainer: Trainer, module: LNNP, done: int, words: str) -> None:
        """Draw the bar: a line about the run, and one with loss and errors of the latest batch."""
        if self.live is None:
            return
        self._drawn = time.monotonic()
        width, epoch, num_epochs = self.console.width, trainer.current_epoch, _num_epochs(trainer)
        part = done / max(float(trainer.num_training_batches), 1.0)
        left = self._seconds_left(trainer, part)
        cells: list[Any] = [
            f"epoch {epoch} of {num_epochs}" if num_epochs else f"epoch {epoch}",
            ProgressBar(num_epochs or 1, epoch + part if num_epochs else part, width=max(4, min(24, width - 56))),
            *([words] if words else []),
            *([] if left is None else [f"{duration(left)} left"]),
        ]
        row = Table.grid(*[""] * len(cells), padding=(0, 2, 0, 0))
        for column in row.columns:
            column.no_wrap = True
        row.add_row(*cells)
        numbers = Text(_as_many_as_fit(self._numbers(module), width), no_wrap=True)
        self.live.update(Group(row, numbers), refresh=True)

    def _seconds_left(self, trainer: Trainer, part: float) -> float | None:
        """Seconds until the last epoch ends, from those of the latest epochs, or of this one if it is the first.

        The first batch, in which loops are compiled, counts as long as the others; None before there are any.
        """
        num_epochs = _num_epochs(trainer)
        limit = getattr(getattr(trainer.lightning_module, "plan", None), "seconds_left", None)
        if self._recent:
            each = sum(self._recent) / len(self._recent)
        elif self._first is not None and part > self._first[1]:
            each = (time.monotonic() - self._first[0]) / (part - self._first[1])
        else:
            return limit
        by_epochs = each * max(0.0, num_epochs - trainer.current_epoch - part) if num_epochs else None
        return min((left for left in (by_epochs, limit) if left is not None), default=None)

    def _seconds_starting(self) -> float:
        """What the first batch of the first epoch took longer than its others, as loops were compiled in it."""
        if self._recent or self._first is None or self._first[1] >= 1 or self._train_ended is None:
            return 0.0
        ended, part = self._first
        return max(0.0, ended - self._epoch_began - (self._train_ended - ended) * part / (1 - part))

    def _numbers(self, module: LNNP) -> list[str]:
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
        return words

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        self._train_ended = time.monotonic()
        if trainer.training:
            self._draw(trainer, cast(LNNP, pl_module), int(trainer.num_training_batches), "validating")

    # ------------------------------------------------------------------------------------------ a line per epoch

    def epoch_line(self, trainer: Trainer, module: LNNP, is_best: bool) -> None:
        """Write the line of the epoch that just ended; to be called when it is known whether it is the best."""
        now = time.monotonic()
        training = max((self._train_ended or now) - self._epoch_began, 1e-9)
        samples = module.epoch_samples * trainer.world_size
        self.seconds_training += training
        self.num_samples += samples
        self._recent.append(now - self._epoch_began - self._seconds_starting())
        if not trainer.is_global_zero:
            return
        metrics, errors = module.epoch_metrics, module.epoch_errors
        columns = {
            "epoch": str(trainer.current_epoch),
            "lr": f"{metrics.get('lr', math.nan):.2e}",
            "train loss": significant(metrics.get(f"train_total_{module.train_loss_name}", math.nan)),
            **self._columns("val", errors.get("val")),
            "time": f"{now - self._epoch_began:.1f} s",
            "samples/s": significant(samples / training),
        }
        after = _sentences(self._columns("test", errors.get("test")))
        if self.console.is_terminal:
            self._table_row(columns, after, is_best)
        else:
            words = [*_sentences(columns), *after, self._whole(trainer), *(["best"] if is_best else [])]
            self._say("  ".join(word for word in words if word))

    def _whole(self, trainer: Trainer) -> str:
        num_epochs, done = _num_epochs(trainer), trainer.current_epoch + 1
        if not num_epochs:
            return ""
        left = self._seconds_left(trainer, 1.0)
        words = f"{done} of {counted(num_epochs, 'epoch')}"
        return words if not left else f"{words}, {duration(left)} left"

    def _columns(self, split: str, errors: Errors | None) -> dict[str, str]:
        if errors is None:
            return {}
        columns = {}
        if "y" in errors.terms:
            columns[f"{split} energy MAE [{self.units.of_energy_per_atom}]"] = self.units.show(errors.y_mae_per_atom)
        if "neg_dy" in errors.terms:
            columns[f"{split} force MAE [{self.units.of_force}]"] = self.units.show(errors.neg_dy_mae)
        for term, (mae, _) in errors.others.items():
            if term in errors.terms:
                unit = self.units.of(term)
                columns[f"{split} {term} MAE" + (f" [{unit}]" if unit else "")] = self.units.show_term(term, mae)
        return columns

    def _table_row(self, columns: Mapping[str, str], after: Sequence[str], is_best: bool) -> None:
        if self._layout is None:
            self._layout = _layout(columns, self.console.width)
            for line in self._layout.header():
                self._say(line, "dim")
        line = self._layout.row(columns)
        mark = "" if not is_best else "  * best" if cell_len(line) + 8 <= self.console.width else "  *"
        rest = "".join(f"  {words}" for words in after)
        style = "bold" if is_best else ""
        if cell_len(line + rest + mark) <= self.console.width:
            self._say(line + rest + mark, style)
        else:
            self._say(line + mark, style)
            self._say(_as_many_as_fit(after, self.console.width), style)

    def _say(self, words: str, style: str = "") -> None:
        if words:
            self.console.print(Text(words, style=style), soft_wrap=True)  # a style of its own leaves the bar alone

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self._streams is not None:
            stderr, above = self._streams
            move_handlers({id(above): stderr})
            self._streams = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the message can be read."""
        self._close()


def counted(number: int, thing: str) -> str:
    """A number of things in words.

    >>> counted(1, "epoch"), counted(1200, "system")
    ('1 epoch', '1,200 systems')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _num_epochs(trainer: Trainer) -> int:
    """Epochs of the whole run; 0 without a limit."""
    return max(0, trainer.max_epochs or 0)


# ------------------------------------------------------------------------------------------------ tables


class _Layout(NamedTuple):
    """The columns of the table of epochs: name -> lines of its heading."""

    headings: Mapping[str, tuple[str, ...]]

    @property
    def widths(self) -> dict[str, int]:
        return {name: max(_LEAST.get(name, 5), *map(cell_len, lines)) for name, lines in self.headings.items()}

    @property
    def width(self) -> int:
        return sum(self.widths.values()) + 2 * (len(self.headings) - 1)

    def header(self) -> list[str]:
        """The lines above the table."""
        rows = zip(*(_padded(lines, self.num_lines) for lines in self.headings.values()), strict=True)
        return [self._joined(dict(zip(self.headings, row, strict=True))) for row in rows]

    @property
    def num_lines(self) -> int:
        return max(len(lines) for lines in self.headings.values())

    def row(self, columns: Mapping[str, str]) -> str:
        """A line of the table; the columns of the layout, by name."""
        return self._joined({name: columns.get(name, "-") for name in self.headings})

    def _joined(self, cells: Mapping[str, str]) -> str:
        widths = self.widths
        return "  ".join(" " * (widths[name] - cell_len(text)) + text for name, text in cells.items())


#: Characters that the numbers of a column need.
_LEAST = {"lr": 8, "train loss": 8, "time": 8}
#: Columns that a narrow terminal goes without, the first of them first.
_DISPENSABLE = ("samples/s", "lr", "time")
#: Characters left free for the mark of the best epoch.
_MARK = len("  * best")


def _layout(columns: Iterable[str], width: int) -> _Layout:
    """The widest layout that fits: headings on two lines, on three, then with fewer columns."""
    layout = _Layout({name: _two_lines(name) for name in columns})
    if layout.width + _MARK <= width:
        return layout
    layout = _Layout({name: _three_lines(name) for name in columns})
    for name in (*_DISPENSABLE, *reversed(list(layout.headings))):
        if layout.width + _MARK <= width or len(layout.headings) == 1:
            break
        layout = _Layout({other: lines for other, lines in layout.headings.items() if other != name})
    return layout


def _as_many_as_fit(words: Sequence[str], width: int) -> str:
    """As many of the words, from the first, as fit on a line of this width."""
    line = ""
    for word in words:
        longer = f"{line}  {word}" if line else word
        if cell_len(longer) > width:
            break
        line = longer
    return line


def _padded(lines: tuple[str, ...], number: int) -> tuple[str, ...]:
    return lines + ("",) * (number - len(lines))


def _sentences(columns: Mapping[str, str]) -> list[str]:
    """``val force MAE 72.1 meV/Å`` for each column."""
    parts = ((*_two_lines(name), text) for name, text in columns.items())
    return [f"{head} {text} {unit}".rstrip() for head, unit, text in parts]


def _two_lines(name: str) -> tuple[str, str]:
    head, _, unit = name.partition(" [")
    return head, unit.removesuffix("]")


def _three_lines(name: str) -> tuple[str, str, str]:
    head, unit = _two_lines(name)
    first, _, last = head.rpartition(" ")
    return (first, last, unit) if first else (last, "", unit)
