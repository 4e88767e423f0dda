"""The folder of a command: everything it writes is in there, and nothing that was there is lost unasked."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchmdnet.config.rundir import claim_log_dir, release_log_dir
from torchmdnet.errors import ConfigError
from torchmdnet.files import expanded
from torchmdnet.text import check_text

__all__ = ["MARK", "add_folder_options", "checked", "held", "mark_part", "results_folder"]

#: Says what a command was asked for.
MARK = "settings.json"
#: Says that a folder is part of the one around it.
PART = ".part-of-results"


def add_folder_options(parser: argparse.ArgumentParser, default: str) -> None:
    """``--out`` and ``--overwrite``."""
    parser.add_argument(
        "-o", "--out", default=default, metavar="FOLDER", help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the folder")


@contextlib.contextmanager
def results_folder(path: str, *, overwrite: bool, outputs: Sequence[str]) -> Iterator[Path]:
    """An empty folder, held against other processes.

    Args:
        path: Where; made if it is not there.
        overwrite: Whether to delete what an earlier run left there.
        outputs: Patterns of the files that a run leaves. Folders that :func:`mark_part` marked go as well.

    Raises:
        ConfigError: If it holds something already, or cannot be written.
    """
    folder = checked(path)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with held(folder):
        there = sorted(each.name for each in folder.iterdir() if each.name != ".lock")
        if there and not overwrite:
            listed = ", ".join(there[:4]) + (f" and {len(there) - 4} more" if len(there) > 4 else "")
            raise ConfigError(
                f"--out: {str(folder)!r} is not empty ({listed}). Choose another folder, or pass --overwrite to delete "
                "what an earlier run left there."
            )
        _clear(folder, outputs)
        yield folder
    with contextlib.suppress(OSError):  # where nothing was written
        for each in made:
            each.rmdir()


def checked(path: str) -> Path:
    """A path that is a folder, or can become one."""
    folder = expanded(check_text(path, "--out"))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {str(folder)!r} is a file. Name a folder.")
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder, held against other processes while the block runs."""
    try:
        claim_log_dir(folder, "--out", "--out")
    except OSError as error:
        raise ConfigError(f"--out: {str(folder)[:200]!r} cannot be used ({error.strerror or error}).") from error
    try:
        yield
    finally:
        release_log_dir(folder)


def _clear(folder: Path, outputs: Sequence[str]) -> None:
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and (path / PART).is_file():
            shutil.rmtree(path)
        elif path.is_file() and any(path.match(pattern) for pattern in outputs):
            path.unlink()


def mark_part(folder: Path) -> None:
    """Make a folder inside that of a command, which ``--overwrite`` deletes with it."""
    folder.mkdir(exist_ok=True)
    (folder / PART).touch()
