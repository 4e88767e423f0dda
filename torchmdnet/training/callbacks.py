"""Beside the loop: checkpoints, continuing from them, stopping politely, and what the terminal shows."""

from __future__ import annotations

import logging
import math
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.config.stopping import STOPS, interrupt_compiling, signals_to
from torchmdnet.errors import CheckpointError, WriteError
from torchmdnet.options import value_of
from torchmdnet.training.files import copy_file

__all__ = ["TOLD_IN_TIME", "Checkpoints", "ContinueRun", "PoliteStop", "StopRequested", "patient_stop"]

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keep the best epochs, the last one, and the best of all.

    - ``epoch=E-val_loss=V-test_loss=T.ckpt`` after every ``every_n_epochs`` epochs, of which the best ``keep`` stay. T
      is ``nan`` in an epoch in which the test set was not evaluated;
    - ``last.ckpt`` after every epoch, and when a run is interrupted inside one;
    - ``best.ckpt``, the epoch with the lowest monitored loss so far, whether or not it was one of the above.

    Args:
        folder: Where the files go.
        monitor: Name of the loss that ranks epochs.
        every_n_epochs: Epochs between ranked checkpoints.
        keep: Number of ranked files; 0 for none.
        mark_test: Whether there is a test set, so that names speak of its loss.
        is_continued: Whether the run continues one in this folder; its later epochs are then written over.
        earlier: Where the best weights of a run that is continued lie, if they are not in this folder.
        look: Called with the trainer before anything is written, to see that the folder is still there.
        before: Called with trainer and module when an epoch has ended, before its files are written.
        then: Called with trainer, module and whether it was the best so far, after an epoch's files are written.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str,
        every_n_epochs: int = 10,
        keep: int = 10,
        *,
        mark_test: bool = True,
        is_continued: bool = False,
        earlier: Path | None = None,
        look: Callable[[Trainer], None] | None = None,
        before: Sequence[Callable[[Trainer, Any], None]] = (),
        then: Sequence[Callable[[Trainer, Any, bool], None]] = (),
    ) -> None:
        self.folder = Path(folder).absolute()
        self.monitor = monitor
        self.every_n_epochs = max(1, every_n_epochs)
        self.keep = keep
        self.mark_test = mark_test
        self.is_continued = is_continued
        self.earlier = earlier
        self.look = look
        self.before = list(before)
        self.then = list(then)
        self.ranked: dict[str, float] = {}  # file name -> loss
        self.best_score = math.inf
        self.best_epoch: int | None = None
        self.saved_step = -1
        #: Whether training stopped because the weights are not finite any more.
        self.is_lost = False

    @property
    def last_path(self) -> Path:
        """Where the latest state is."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where the best state is, if any epoch was ranked."""
        return self.folder / "best.ckpt"

    @property
    def best_model_path(self) -> str:
        """The best state as Lightning names it; empty before the first epoch ends."""
        return str(self.best_path) if self.best_score < math.inf else ""

    @property
    def state_key(self) -> str:
        """The key that Lightning's own checkpoint callback uses, so that either can continue from the other's file."""
        return "ModelCheckpoint" + repr(
            {
                "monitor": self.monitor,
                "mode": "min",
                "every_n_train_steps": 0,
                "every_n_epochs": self.every_n_epochs,
                "train_time_interval": None,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Names and losses of the ranked files, in the form of Lightning's own callback."""
        scores = {
            str(self.folder / name): torch.tensor(score, dtype=torch.float64) for name, score in self.ranked.items()
        }
        worst = max(scores, key=lambda path: float(scores[path]), default="")
        best = min(scores, key=lambda path: float(scores[path]), default="")
        return {
            "monitor": self.monitor,
            "best_model_score": torch.tensor(self.best_score, dtype=torch.float64) if self.best_model_path else None,
            "best_model_path": best,
            "current_score": scores[best] if best else None,
            "dirpath": str(self.folder),
            "best_k_models": scores,
            "kth_best_model_path": worst if len(scores) == self.keep else "",
            "kth_value": scores[worst] if worst else torch.tensor(math.inf, dtype=torch.float64),
            "last_model_path": str(self.last_path),
            "best_epoch": self.best_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on ranking the files that are still in this folder."""
        ranked = {Path(path).name: float(score) for path, score in state_dict.get("best_k_models", {}).items()}
        self.ranked = {name: score for name, score in ranked.items() if (self.folder / name).exists()}
        score, epoch = state_dict.get("best_model_score"), state_dict.get("best_epoch")
        if "best_epoch" in state_dict and score is not None and (self.best_path.exists() or self._take_over(epoch)):
            self.best_score, self.best_epoch = float(score), epoch
        elif self.ranked:  # written by Lightning's own callback, which keeps no best.ckpt
            best = min(self.ranked, key=self.ranked.__getitem__)
            self.best_score = self.ranked[best]
            self.best_epoch = int(found[1]) if (found := re.match(r"epoch=(\d+)", best)) else None
            if _is_main():
                copy_file(self.folder / best, self.best_path)
        elif score is not None and _is_main():
            log.warning(
                "best.ckpt: the best epoch of the run so far%s, with %s %.4g, is not counted, because its weights are "
                "not beside the checkpoint that it continues from; the best is chosen from the epochs to come.",
                "" if epoch is None else f", {epoch}", self.monitor, float(score),
            )  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on ranking also where ``save_interval`` changed, which is part of the key that Lightning looks for."""
        states = checkpoint.get("callbacks") or {}
        if self.state_key in states:
            return
        for key, state in states.items():
            if key.startswith("ModelCheckpoint") and state.get("monitor") == self.monitor:
                self.load_state_dict(state)
                return

    def _take_over(self, epoch: int | None) -> bool:
        """Copy the best weights of the run from the folder that it continues from, if those of this epoch are there."""
        if self.earlier is None or not self.earlier.is_file():
            return False
        try:
            is_same = read_checkpoint(self.earlier).get("epoch") == epoch
        except CheckpointError:
            return False
        if is_same and _is_main():
            copy_file(self.earlier, self.best_path)
        return is_same

    # ------------------------------------------------------------------------------------------ writing

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the epoch and write its files.

        ``last.ckpt`` comes last, after the tables too: a run that is killed in between repeats the epoch and writes the
        others again. Weights that are not finite never become so again: they are not saved, and training ends.
        """
        if self.look is not None:
            self.look(trainer)
        for call in self.before:
            call(trainer, pl_module)
        if not all(bool(torch.isfinite(weights).all()) for weights in pl_module.parameters()):
            self.is_lost = trainer.should_stop = True
            for call in self.then:
                call(trainer, pl_module, False)
            return
        metrics = _measured(trainer, pl_module)
        score = metrics.get(self.monitor, math.nan)
        path, dropped = None, None
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and not math.isnan(score):
            path, dropped = self._rank(self._name(trainer.current_epoch, score, metrics), score)
        is_best = score < self.best_score
        if is_best:
            self.best_score, self.best_epoch = score, trainer.current_epoch
        names = [name for name in (path, self.best_path if is_best else None, self.last_path) if name is not None]
        self._save(trainer, names[0])
        if trainer.is_global_zero:
            for name in names[1:-1]:
                copy_file(names[0], name)
            if dropped is not None:
                dropped.unlink(missing_ok=True)
            if len(names) > 1:
                copy_file(names[0], self.last_path)
        for call in self.then:
            call(trainer, pl_module, is_best)

    def save_inside_epoch(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` between two steps of an epoch."""
        if self.look is not None:
            self.look(trainer)
        self._save(trainer, self.last_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Rescue the steps since the last checkpoint, where the state is consistent and may be continued from."""
        is_updating = getattr(pl_module, "is_updating", False)
        inside = 0 < batches_done(trainer) < _batches(trainer)
        if isinstance(exception, (StopRequested, WriteError)) or trainer.world_size > 1 or not trainer.training:
            return
        if not inside or is_updating or trainer.global_step == self.saved_step or not can_continue_inside(trainer):
            return
        try:
            self._save(trainer, self.last_path)
            log.warning("The state after step %d is saved in %s.", trainer.global_step, self.last_path)
        except Exception as error:
            log.warning("The state after step %d could not be saved (%s).", trainer.global_step, error)

    def forget_lost_files(self) -> bool:
        """Rank no file that is gone; whether ``best.ckpt`` is, so that the next epoch becomes the best."""
        self.ranked = {name: score for name, score in self.ranked.items() if (self.folder / name).exists()}
        is_lost = self.best_score < math.inf and not self.best_path.exists()
        if is_lost:
            self.best_score, self.best_epoch = math.inf, None
        return is_lost

    def _save(self, trainer: Trainer, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        self.saved_step = trainer.global_step

    def _name(self, epoch: int, score: float, metrics: Mapping[str, float]) -> str:
        name = f"epoch={epoch}-{self.monitor.partition('_')[0]}_loss={score:.4f}"
        if self.mark_test:
            name += f"-test_loss={metrics.get('test_total_l1_loss', math.nan):.4f}"
        return name

    def _rank(self, name: str, score: float) -> tuple[Path | None, Path | None]:
        """The file to write for this epoch, if it is among the best, and the file that has to go."""
        dropped = None
        if not self.keep:
            return None, None
        if len(self.ranked) >= self.keep:
            worst = max(self.ranked, key=self.ranked.__getitem__)
            if score >= self.ranked[worst]:
                return None, None
            del self.ranked[worst]
            dropped = self.folder / worst
        path = self._unused(name)
        self.ranked[path.name] = score
        return path, dropped

    def _unused(self, name: str) -> Path:
        path, version = self.folder / f"{name}.ckpt", 0
        while path.exists() and not (self.is_continued and path.name not in self.ranked):
            version += 1
            path = self.folder / f"{name}-v{version}.ckpt"
        return path


def _is_main() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _measured(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """What this epoch measured; a module of another kind may have left older values among its metrics."""
    measured = getattr(module, "epoch_metrics", None)
    return {name: float(value) for name, value in (measured or trainer.callback_metrics).items()}


def batches_done(trainer: Trainer) -> int:
    """Training batches of this epoch whose step is done."""
    return cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current).processed


def _batches(trainer: Trainer) -> float:
    return trainer.num_training_batches


def _batch_sampler(trainer: Trainer) -> Any:
    return getattr(trainer.train_dataloader, "batch_sampler", None)


def can_continue_inside(trainer: Trainer) -> bool:
    """Whether the training batches can be read on from the middle of an epoch."""
    return hasattr(_batch_sampler(trainer), "skip")


# ---------------------------------------------------------------------------------------------- continuing


#: Settings whose change :class:`ContinueRun` tells when it takes effect.
TOLD_IN_TIME = frozenset({"lr", "weight_decay", "lr_factor", "lr_patience", "lr_min", "early_stopping_patience"})


class ContinueRun(Callback):
    """Take up a checkpoint with the options of today.

    Optimizer, scheduler and early stopping come back from a checkpoint with the options of the run that wrote it. An
    option that was changed since takes effect, and says so.

    Args:
        options: The options of this run.
        stored: The options in the checkpoint.
        batches_done: Batches of the running epoch that the checkpoint has behind it; 0 between epochs.
    """

    def __init__(self, options: Mapping[str, Any], stored: Mapping[str, Any], batches_done: int = 0) -> None:
        self.options = options
        self.stored = stored
        self.batches_done = batches_done

    def _changed(self, name: str) -> bool:
        if name not in self.stored or name not in self.options or self.stored[name] == self.options[name]:
            return False
        log.warning("%s: %r from now on (the checkpoint had %r).", name, self.options[name], self.stored[name])
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After everything is restored: apply changed options, and find the place inside the epoch."""
        optimizer = trainer.optimizers[0]
        if self._changed("lr"):
            for group in optimizer.param_groups:
                group["lr"] = float(self.options["lr"])
        elif value_of(self.stored, "lr_schedule") != value_of(self.options, "lr_schedule"):
            for group in optimizer.param_groups:  # told elsewhere; what was planned does not go on
                group["lr"] = float(self.options["lr"])
        if self._changed("weight_decay"):  # the first group is the one that has it
            optimizer.param_groups[0]["weight_decay"] = float(self.options["weight_decay"])
        plateau = getattr(pl_module, "plateau", None)
        if plateau is not None:
            if self._changed("lr_factor"):
                plateau.factor = float(self.options["lr_factor"])
            if self._changed("lr_patience"):
                plateau.patience = int(self.options["lr_patience"])
            if self._changed("lr_min"):
                plateau.min_lrs = [float(self.options["lr_min"])] * len(plateau.min_lrs)
        for stopping in trainer.early_stopping_callbacks:
            stopping = cast(EarlyStopping, stopping)
            self._changed("early_stopping_patience")
            stopping.patience = int(self.options["early_stopping_patience"])
            if stopping.wait_count >= stopping.patience:
                trainer.should_stop = True
        if self.batches_done:
            _batch_sampler(trainer).skip(self.batches_done)


def patient_stop(monitor: str, patience: int) -> EarlyStopping:
    """Stop when the loss has not improved for ``patience`` epochs, or is not a number any more."""
    return EarlyStopping(monitor=monitor, patience=patience, mode="min")


# ---------------------------------------------------------------------------------------------- stopping


#: More than there are signals.
_SIGNALS = 1000


class StopRequested(Exception):
    """The user or the system asked the run to stop, and everything is saved."""


class PoliteStop(Callback):
    """Let Ctrl-C and SIGTERM end a run between two steps, with ``last.ckpt`` up to date; a second one ends it at once.

    Args:
        checkpoints: Writes the file.
    """

    #: Several processes exchange this only once in this many steps.
    ASK_EVERY = 20

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.signal: int | None = None
        #: That another process received; one that comes here later is the first here.
        self.signal_elsewhere: int | None = None
        self.listens = False
        self.is_validating = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals in this block; only the main thread can."""
        with signals_to(self._note) as self.listens:
            try:
                yield
            finally:
                self.listens = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take SIGTERM back: Lightning's own handler waits for the other processes, which may wait for this one."""
        if self.listens:
            for number in STOPS:
                signal.signal(number, self._note)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`setup`."""
        self.setup(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`setup`."""
        self.setup(trainer, pl_module, "fit")

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if not torch.distributed.is_initialized() and interrupt_compiling(KeyboardInterrupt()):
            # it may go on for half a minute, and no step is lost by not waiting for it
            log.warning("%s: stopping while loops are compiled.", signal.Signals(number).name)
            return
        words = "stopping between two steps. Once more stops at once."
        if self.is_validating:
            words = "stopping after this validation. Once more stops at once, and the epoch has to be trained again."
        log.warning("%s: %s", signal.Signals(number).name, words)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here to the end of the validation no state can be saved that another run could go on from."""
        self.is_validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch is about to be saved."""
        self.is_validating = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop inside an epoch."""
        if trainer.world_size > 1 and (batch_idx + 1) % self.ASK_EVERY:
            return
        if self._is_asked(trainer) and batches_done(trainer) < _batches(trainer) and can_continue_inside(trainer):
            self.checkpoints.save_inside_epoch(trainer)
            raise StopRequested

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between epochs, which are saved as they end."""
        if self._is_asked(trainer) and self.checkpoints.saved_step == trainer.global_step:
            raise StopRequested

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether this process, or any of several, was asked to stop: all must stop at the same step."""
        if trainer.world_size == 1:
            return self.signal is not None
        asked = 0 if self.signal is None else self.signal + _SIGNALS * (1 + trainer.global_rank)
        highest = trainer.strategy.reduce(torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max")
        who, number = divmod(int(highest), _SIGNALS)
        if number and self.signal is None and self.signal_elsewhere is None:
            self.signal_elsewhere = number
            log.warning("Process %d received %s: all stop at this step.", who - 1, signal.Signals(number).name)
        return number > 0
