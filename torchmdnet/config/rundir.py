"""The folder of a run: made, cleared of what is in the way, and given its ``input.yaml`` and ``log``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from torchmdnet.config.reader import write_yaml
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.parse import parse_yaml

__all__ = [
    "Tee",
    "check_logs",
    "claim_log_dir",
    "companion",
    "holds_log_dir",
    "is_main_process",
    "move_handlers",
    "other_checkpoint",
    "prepare_log_dir",
    "reclaim_log_dir",
    "redirect",
    "release_log_dir",
    "save_argparse",
    "set_aside",
    "undo_log_dir",
]

logger = logging.getLogger(__name__)

_RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")

#: What a run leaves in its folder.
_OUTPUT = ("epoch=*.ckpt", "last*.ckpt", "best*.ckpt", "metrics*.csv", "errors*.csv", "hparams.yaml", "input.yaml",
           "splits.npz", "log", "potential*.safetensors", "summary.json", "report.html", "learning_curves.png",
           "parity.png", "tensorboard", "wandb")  # fmt: skip

#: What would be replaced by a new run's and gets another name.
_RENAMED = ("metrics.csv", "errors.csv", "last.ckpt", "best.ckpt", "potential.safetensors", "hparams.yaml",
            "input.yaml", "splits.npz", "summary.json", "report.html", "learning_curves.png",
            "parity.png")  # fmt: skip

#: The time in the names of what was renamed.
_STAMP = re.compile(r"_\d{8}-\d{6}(-\d+)?$")


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the first of several."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANKS)


def prepare_log_dir(args: argparse.Namespace) -> None:
    """Make ``args.log_dir`` ready: create it, deal with an earlier run's files, write ``input.yaml``.

    The folder belongs to this process from now on, see :func:`claim_log_dir`. A run that continues in its own folder
    keeps everything. Otherwise the tables, settings, division, results, ``last.ckpt``, ``best.ckpt`` and
    ``potential.safetensors`` of an earlier run are renamed, all with the same time, or, with ``overwrite``, all its
    output is deleted. Only the main process does this.

    Raises:
        ConfigError: The folder cannot be written, or another run is writing to it.
    """
    if not is_main_process():
        return
    folder = Path(args.log_dir)
    try:
        before = _Before.of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        claim_log_dir(folder)
        _before[folder.resolve()] = before
        if not (args.load_model and Path(args.load_model).resolve().parent == folder.resolve()):
            before.renamed.update(_make_room(folder, args))
        save_argparse(args, folder / "input.yaml", exclude=["conf"])
    except OSError as error:
        raise ConfigError(
            f"log_dir: {str(folder)!r} cannot be used ({error}). Choose another with --log-dir."
        ) from error


#: The locks this process holds, by folder: open files, since a lock ends with the file or the process.
_claimed: dict[Path, TextIO] = {}


class _Before(NamedTuple):
    """What was there before a run made its folder ready."""

    made: list[Path]  # folders that were not there, innermost first
    files: frozenset[str]
    settings: bytes | None  # input.yaml, which a run that continues in its folder writes again
    renamed: dict[Path, Path]  # files of an earlier run: new name -> name

    @classmethod
    def of(cls, folder: Path) -> _Before:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        files = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        settings = folder / "input.yaml"
        return cls(made, files, settings.read_bytes() if settings.is_file() else None, {})


#: What was there before, by folder.
_before: dict[Path, _Before] = {}


def undo_log_dir(folder: str | os.PathLike[str]) -> None:
    """Leave nothing of a run that was refused before its first step: its files go, those of an earlier run come back.

    What ``overwrite`` deleted stays deleted.
    """
    folder = Path(folder)
    before = _before.pop(folder.resolve(), None)
    if before is None:
        return
    with contextlib.suppress(OSError):
        for pattern in _OUTPUT:
            for path in folder.glob(pattern):
                if path.is_file() and path.name not in before.files and path not in before.renamed:
                    path.unlink()
        for new, name in before.renamed.items():
            new.replace(name)
        if before.settings is not None and not before.renamed:
            (folder / "input.yaml").write_bytes(before.settings)
        release_log_dir(folder)
        for path in before.made:
            path.rmdir()  # not if another program put something there


def release_log_dir(folder: str | os.PathLike[str]) -> None:
    """Let other processes use a folder again; ``.lock`` goes while it is still held."""
    file = _claimed.pop(Path(folder).resolve(), None)
    if file is not None:
        with contextlib.suppress(OSError):  # a folder that went, or may no longer be written
            os.unlink(file.name)
        file.close()


def claim_log_dir(folder: str | os.PathLike[str], option: str = "log_dir", flag: str = "--log-dir") -> None:
    """Hold ``folder/.lock`` until :func:`release_log_dir`, or until this process ends, however it ends.

    Only the main process of a run holds it, and a forked child does not.

    Args:
        folder: Made if it is not there.
        option: What names it; it opens the message of an error.
        flag: What chooses another.

    Raises:
        ConfigError: Another process holds it.
    """
    folder = Path(folder)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if not is_main_process() or folder.resolve() in _claimed:
        return
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(folder.resolve() / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (open until the run ends)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"{option}: {str(folder)!r} belongs to a run that is still going "
                    f"({holder or 'of an unknown process'}). Wait for it or end it, or choose "
                    f"another folder with {flag}."
                ) from None
            logger.warning("%s cannot be locked (%s): take care that no two runs write to it.", folder, error)
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                break
        file.close()  # the run that held it ended and removed it after it was opened here
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _claimed[folder.resolve()] = file


def holds_log_dir(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder that this process claimed is still where it was; True also where nothing can be locked."""
    file = _claimed.get(Path(folder).resolve())
    if file is None:
        return Path(folder).is_dir()
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError:
        return False


def reclaim_log_dir(folder: str | os.PathLike[str]) -> None:
    """Make a folder that was deleted or renamed again, and hold it.

    Raises:
        ConfigError: Another process holds it by now.
    """
    file = _claimed.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()
    Path(folder).mkdir(parents=True, exist_ok=True)
    claim_log_dir(folder)


def _make_room(folder: Path, args: argparse.Namespace) -> dict[Path, Path]:
    """Rename or delete what an earlier run left; new names and names of what was renamed."""
    earlier = sorted({path for pattern in _OUTPUT for path in folder.glob(pattern)})
    if not any(path.suffix == ".ckpt" or path.name == "metrics.csv" for path in earlier):
        return {}
    needed = {Path(name).resolve() for name in (args.load_weights, args.splits, args.conf) if name}
    if args.overwrite:
        for path in earlier:
            if path.resolve() not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        logger.warning("overwrite: %d files of an earlier run in %s were deleted.", len(earlier), folder)
        return {}
    present = [folder / name for name in _RENAMED if (folder / name).exists()]
    stamp = set_aside([folder / name for name in _RENAMED], keep=needed)
    logger.warning(
        "%s holds an earlier run. Its last.ckpt, best.ckpt, potential.safetensors, tables, settings, splits.npz and "
        "results now have %s in their names, and its other files stay, so checkpoints of both will lie side by side; "
        "--log-dir chooses another folder, --overwrite deletes the earlier run.",
        folder, stamp,
    )  # fmt: skip
    return {path.with_stem(f"{path.stem}_{stamp}"): path for path in present}


def other_checkpoint(path: str | os.PathLike[str]) -> str:
    """Which checkpoint may have been meant where ``path`` is no file, in words; empty if there is none."""
    path = Path(path)
    try:
        if path.is_dir():
            last = path / "last.ckpt"
            return (
                f" It is a folder. Name the checkpoint in it: {str(last)!r}." if last.is_file() else " It is a folder."
            )
        names = sorted(each.name for each in path.parent.glob("*.ckpt"))
    except OSError:
        return ""
    hint = did_you_mean(str(path), [str(path.with_name(name)) for name in names])
    return hint or (f" Beside it: {', '.join(names[:5])}." if names else "")


def companion(path: str | os.PathLike[str], name: str) -> Path:
    """The file ``name`` of the run that wrote ``path``: beside a renamed file, the one renamed with it.

    >>> companion("run/last_20260102-030405.ckpt", "hparams.yaml").as_posix()
    'run/hparams_20260102-030405.yaml'
    >>> companion("run/last.ckpt", "hparams.yaml").as_posix()
    'run/hparams.yaml'
    """
    stamp = _STAMP.search(Path(path).stem)
    plain = Path(path).with_name(name)
    return plain.with_stem(plain.stem + stamp.group()) if stamp else plain


def check_logs(log_dir: str | os.PathLike[str]) -> None:
    """Rename an earlier ``metrics.csv`` to ``metrics_YYYYMMDD-HHMMSS.csv``, with a number if that is taken."""
    set_aside([Path(log_dir) / "metrics.csv"])


def set_aside(paths: Sequence[Path], keep: Collection[Path] = ()) -> str:
    """Put the same time, which no file has yet, in the names of those files that are there; those to keep are copied.

    Returns:
        The time, with a number where files of that second were there.
    """
    present = [path for path in paths if path.exists()]
    stamp = now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    count = 1
    while any(path.with_stem(f"{path.stem}_{stamp}").exists() for path in present):
        count += 1
        stamp = f"{now}-{count}"
    for path in present:
        new = path.with_stem(f"{path.stem}_{stamp}")
        shutil.copy2(path, new) if path.resolve() in keep else path.rename(new)
    return stamp


def save_argparse(
    args: argparse.Namespace, filename: str | os.PathLike[str], exclude: str | Sequence[str] | None = None
) -> None:
    """Write settings as YAML with sorted keys, whole or not at all; JSON text in ``dataset_arg`` is written decoded.

    Args:
        exclude: Key or keys to leave out.

    Raises:
        ValueError: The file name does not end in ``yaml`` or ``yml``.
    """
    if not str(filename).endswith(("yaml", "yml")):
        raise ConfigError(f"{str(filename)!r} does not end in .yaml or .yml. Settings are written as YAML.")
    left_out = {exclude} if isinstance(exclude, str) else set(exclude or ())
    values: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in left_out}
    if isinstance(values.get("dataset_arg"), str):
        values["dataset_arg"] = parse_yaml(values["dataset_arg"], "dataset_arg")
    write_yaml(filename, values)


class Tee:
    """A stream that also writes a log: whole lines at once, without the redraws and colours of a terminal.

    Args:
        stream: The terminal, which still gets everything.
        log: The file, shared by both streams of a program.
    """

    _COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self.stream = stream
        self.log = log
        self._line = ""

    def write(self, text: str) -> int:
        """Write to the terminal at once, and to the log each line that is complete."""
        self.stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log(line + "\n")
        return len(text)

    def _log(self, line: str) -> None:
        # A progress bar draws over itself after each "\r"; its last state is what the reader would have seen.
        shown = line.rstrip("\r\n").rpartition("\r")[2]
        with contextlib.suppress(OSError):  # a full disk stops no words on the terminal, which may be about it
            self.log.write(self._COLOURS.sub("", shown) + "\n")
            self.log.flush()

    def flush(self) -> None:
        """Flush the terminal."""
        self.stream.flush()

    def finish(self) -> None:
        """Log a last line that has no end."""
        if self._line:
            self._log(self._line)
            self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def redirect(log_dir: str | os.PathLike[str]) -> Callable[[], None]:
    """Copy everything that standard output and standard error show to ``log_dir/log``, which is made if need be.

    Log handlers that write to either stream follow.

    Returns:
        A function that puts the streams back and closes the file.
    """
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    log = open(Path(log_dir) / "log", "a", encoding="utf-8", errors="replace")  # noqa: SIM115 (open until the end)
    out, err = sys.stdout, sys.stderr
    tees = Tee(out, log), Tee(err, log)
    sys.stdout, sys.stderr = tees
    move_handlers({id(out): tees[0], id(err): tees[1]})

    def restore() -> None:
        for tee in tees:
            tee.finish()
        sys.stdout, sys.stderr = out, err
        move_handlers({id(tees[0]): out, id(tees[1]): err})
        with contextlib.suppress(OSError):
            log.close()

    return restore


def move_handlers(streams: dict[int, Any]) -> None:
    """Let the log handlers that write to a stream, by its ``id``, write to another."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for each in loggers for handler in each.handlers}:
        if isinstance(handler, logging.StreamHandler) and id(handler.stream) in streams:
            handler.setStream(streams[id(handler.stream)])
