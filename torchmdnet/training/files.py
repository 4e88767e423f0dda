"""Files that are whole or not there: every output of a run is written beside its place and moved into it."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.files import draft_of, write_json

__all__ = ["SafeCheckpointIO", "copy_file", "draft_of", "read_table", "write_json", "write_table", "write_text"]

log = logging.getLogger(__name__)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text, UTF-8."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_table(path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV table; what a row lacks is empty."""
    with draft_of(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Rows of a CSV table as text, empty cells left out; an empty list where there is no file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]


def copy_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Let ``target`` be what ``source`` is now: a second name of the same bytes where the file system has them."""
    with draft_of(target) as draft:
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


class SafeCheckpointIO(CheckpointIO):
    """How Lightning writes and reads checkpoints here: whole files only, and no code from a file is run."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; a crash on the way leaves the file that was there."""
        with draft_of(path) as draft:
            torch.save(checkpoint, draft)

    def load_checkpoint(  # type: ignore[override]
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU.

        Raises:
            CheckpointError: If the file is damaged or holds more than tensors and plain values.
        """
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint that fell out of the best."""
        Path(path).unlink(missing_ok=True)
