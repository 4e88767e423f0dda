"""The folder of a run while it runs: what is in it, what to do if it goes, and how a run that ends there continues."""

from __future__ import annotations

import logging
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer

from torchmdnet.config.rundir import holds_log_dir, reclaim_log_dir
from torchmdnet.data import DataModule
from torchmdnet.training.callbacks import Checkpoints
from torchmdnet.training.files import draft_of
from torchmdnet.training.logger import RunLogger

__all__ = ["RunFolder"]

log = logging.getLogger(__name__)


class RunFolder:
    """Watch over ``log_dir``.

    A folder that was deleted or renamed under a run is made again, with its settings, division and tables; checkpoints
    come with the epoch. Missing files are written again likewise.

    Args:
        args: The settings of the run.
    """

    #: The stage in which a run has read its data, but trained on none of them.
    FIRST_STAGE = "before the first step"

    def __init__(self, args: Namespace) -> None:
        self.path = Path(args.log_dir)
        self.load_model: str | None = args.load_model
        #: What the run is doing, in words.
        self.stage = self.FIRST_STAGE
        self.checkpoints: Checkpoints | None = None
        self.logger: RunLogger | None = None
        self.data: DataModule | None = None
        settings = self.path / "input.yaml"
        self._settings = settings.read_bytes() if settings.is_file() else None

    @property
    def is_at_start(self) -> bool:
        """Whether nothing is trained yet."""
        return self.stage == self.FIRST_STAGE

    @property
    def is_unsaved(self) -> bool:
        """Whether there is no checkpoint of this run yet."""
        return self.checkpoints is None or self.checkpoints.saved_step < 0

    @property
    def how_to_continue(self) -> str:
        """What is saved, and the command that goes on, in words."""
        if self.checkpoints is not None and self.checkpoints.saved_step >= 0 and self.checkpoints.last_path.exists():
            last = self.checkpoints.last_path
            told = f"{last} holds the state after step {self.checkpoints.saved_step}. Continue with: " + command(last)
            return told + "".join(f"\n{line}" for line in potential_so_far(last))
        if self.load_model:
            return f"Nothing new is saved, and {self.load_model} is as it was: start the same command again."
        return "Nothing is saved yet: start the same command again."

    def look(self, trainer: Trainer) -> None:
        """Write again what is missing from the folder.

        Raises:
            WriteError: If that is impossible.
            ConfigError: If another run has the folder by now.
        """
        if not trainer.is_global_zero or self.data is None or self.logger is None or self.checkpoints is None:
            return
        is_gone = not holds_log_dir(self.path)
        if is_gone:
            reclaim_log_dir(self.path)
        written = [name for name, write in self._contents().items() if not (self.path / name).exists() and write()]
        is_best_lost = self.checkpoints.forget_lost_files()
        if is_gone or written or is_best_lost:
            log.warning(
                "log_dir: %s %s while the run was going%s%s.",
                self.path,
                "was deleted or renamed" if is_gone else "lost files",
                f"; {', '.join(written)} are written again" if written else "",
                "; best.ckpt cannot be, and the best epoch is chosen from those to come" if is_best_lost else "",
            )

    def _contents(self) -> dict[str, Callable[[], bool]]:
        assert self.data is not None
        assert self.logger is not None
        data, logger = self.data, self.logger

        def settings() -> bool:
            if self._settings is not None:
                with draft_of(self.path / "input.yaml") as draft:
                    draft.write_bytes(self._settings)
            return self._settings is not None

        def division() -> bool:
            data.write_splits(self.path / "splits.npz")
            return True

        return {
            "input.yaml": settings,
            "splits.npz": division,
            "hparams.yaml": logger.write_hyperparams,
            "metrics.csv": logger.write_metrics,
            "errors.csv": logger.write_errors,
        }


def potential_so_far(checkpoint: Path) -> list[str]:
    """The command that makes a potential of the best epoch beside a checkpoint, in a line; none without one."""
    best = checkpoint.with_name("best.ckpt")
    if not best.exists():
        return []
    target = shlex.quote(str(best.with_name("potential.safetensors")))
    return [f"A potential of the best epoch so far: torchmd-net convert {shlex.quote(str(best))} {target}"]


def command(checkpoint: Path) -> str:
    """The command that continues a run."""
    return f"torchmd-train --load-model {checkpoint}"
