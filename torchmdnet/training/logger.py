"""``metrics.csv`` and ``hparams.yaml``: the tables of a run, whole at any moment."""

from __future__ import annotations

import csv
import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from torchmdnet.config.reader import write_yaml
from torchmdnet.config.rundir import is_main_process, set_aside
from torchmdnet.training.files import read_table, write_table

__all__ = ["FINAL_TEST", "RunLogger"]

log = logging.getLogger(__name__)

#: The split under which ``errors.csv`` files the test of the best checkpoint.
FINAL_TEST = "final test"


class RunLogger(Logger):
    """Keep one row per epoch.

    ``metrics.csv`` has the columns ``epoch``, ``lr``, ``step`` (the 0-based number of the last optimizer step) and the
    mean losses, in alphabetical order. ``errors.csv`` holds the errors of each split in the units of the data. A
    continued run keeps the rows up to the epoch it continues from, so the table reads as if nothing had happened. A
    damaged table stays under another name.

    Args:
        folder: Where the files go.
        keep_until: Keep the rows of epochs below this of tables that are already there; 0 starts new tables.
    """

    def __init__(self, folder: str | Path, keep_until: int = 0) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.hparams: dict[str, Any] | None = None
        self.metrics = _earlier(self.folder / "metrics.csv", keep_until)
        self.errors = _earlier(self.folder / "errors.csv", keep_until)

    @property
    def name(self) -> str:
        """No subfolder."""
        return ""

    @property
    def version(self) -> str:
        """No subfolder."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the files."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """Folder of the files."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write ``hparams.yaml``."""
        self.hparams = dict(vars(params) if isinstance(params, Namespace) else params)
        self.write_hyperparams()

    def write_hyperparams(self) -> bool:
        """Write ``hparams.yaml``, if there is something to write; whether there was."""
        if self.hparams is not None:
            write_yaml(self.folder / "hparams.yaml", self.hparams)
        return self.hparams is not None

    def write_metrics(self) -> bool:
        """Write ``metrics.csv``, if there is something to write; whether there was."""
        if self.metrics:
            _write(self.folder / "metrics.csv", self.metrics)
        return bool(self.metrics)

    def write_errors(self) -> bool:
        """Write ``errors.csv``, if there is something to write; whether there was."""
        if self.errors:
            _write(self.folder / "errors.csv", self.errors, sort=False)
        return bool(self.errors)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row to ``metrics.csv``; one of the same epoch, step and columns as the last replaces it."""
        row = {"step": step, **metrics}
        if self.metrics and _place(self.metrics[-1]) == _place(row):
            self.metrics.pop()
        self.metrics.append(row)
        self.write_metrics()

    @rank_zero_only
    def log_errors(self, row: Mapping[str, Any]) -> None:
        """Add a row to ``errors.csv``."""
        self.errors.append(dict(row))
        self.write_errors()


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("epoch"), row.get("step"), set(row)


def _earlier(path: Path, keep_until: int) -> list[dict[str, Any]]:
    """The rows to keep of a table; one that is damaged gets another name, and a new one begins."""
    if keep_until <= 0:
        return []
    try:
        rows = read_table(path)
        for row in rows:
            for name, text in row.items():
                if name != "split":
                    float(text)
    except (ValueError, csv.Error) as error:
        if is_main_process():
            stamp = set_aside([path])
            log.warning(
                "%s is damaged (%s), so its rows are not continued: it is now %s.",
                path, error, path.with_stem(f"{path.stem}_{stamp}").name,
            )  # fmt: skip
        return []
    kept: list[dict[str, Any]] = []
    for row in rows:
        epoch = float(row.get("epoch", "nan"))
        if epoch < keep_until and not _is_final_test(row):  # the run is not at its end any more
            kept.append(dict(row))
    return kept


def _is_final_test(row: Mapping[str, str]) -> bool:
    if "split" in row:
        return row["split"] == FINAL_TEST
    measured = [name for name in row if name not in ("epoch", "step")]
    return bool(measured) and all(name.startswith("test_") for name in measured)


def _write(path: Path, rows: list[dict[str, Any]], sort: bool = True) -> None:
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    write_table(path, sorted(columns) if sort else list(columns), rows)
