"""A training run from settings to report."""

from __future__ import annotations

import inspect
import logging
import math
import signal
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from torchmdnet._version import __version__
from torchmdnet.checkpoint.card import count_parameters
from torchmdnet.checkpoint.load import check_start
from torchmdnet.config.rundir import claim_log_dir, companion, is_main_process, release_log_dir, undo_log_dir
from torchmdnet.config.settings import add_reference_prior, hyper_parameters
from torchmdnet.config.stopping import Stopped, stop_signals
from torchmdnet.data import DataModule
from torchmdnet.data.digest import data_digest
from torchmdnet.errors import CheckpointError, ConfigError, DataError, ResultError, WriteError
from torchmdnet.files import STORAGE_ERRORS
from torchmdnet.losses import loss_name
from torchmdnet.training.callbacks import Checkpoints, ContinueRun, PoliteStop, StopRequested, patient_stop
from torchmdnet.training.distributed import (
    BoundedDDPStrategy,
    World,
    choose_strategy,
    choose_world,
    cluster_environment,
    end_with_launcher,
)
from torchmdnet.training.evaluate import SplitFacts, facts_of, read_batches
from torchmdnet.training.files import SafeCheckpointIO
from torchmdnet.training.folder import RunFolder, command, potential_so_far
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.logger import RunLogger
from torchmdnet.training.preparing import (
    Resumed,
    check_data,
    check_options,
    checkpoint_to_continue,
    look_at_cutoffs,
    make_module,
    provenance_of,
    references_of,
    tell_references,
)
from torchmdnet.training.report import RunFacts
from torchmdnet.training.results import (
    device_name,
    error_row,
    evaluate_split,
    introduce,
    is_sound,
    load_best,
    log_test,
    tell,
    tell_lost,
    write_all,
)
from torchmdnet.training.start import check_same_data
from torchmdnet.training.terminal import Terminal, Units, console_for, duration

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(args: Namespace) -> Path:
    """Train a potential, test it, and write everything about it.

    Args:
        args: A value for every option, see :data:`torchmdnet.options.OPTIONS`; not modified.

    Returns:
        The folder with the checkpoints, tables, plots and the report.

    Raises:
        ConfigError: If settings cannot work together or with the data; nothing is trained then.
        CheckpointError: If a checkpoint to start from cannot be used.
        DataError: If the data cannot be used.
        ResultError: If a file the run promises could not be written, at the end or, as on a full disk, before it.
        DivergenceError: If the loss or the weights are not numbers any more; what is known is written then.
        PeerError: If another process of the same run is gone or no longer answers.
        SystemExit: After Ctrl-C or SIGTERM, with the status that shells expect.
    """
    end_with_launcher()
    claim_log_dir(args.log_dir)
    folder = RunFolder(args)
    try:
        with warnings.catch_warnings(), stop_signals():
            _quiet_lightning()
            return _train(args, folder)
    except Stopped as stop:
        if is_main_process():
            log.warning("%s: stopped %s. %s", stop.name, folder.stage, folder.how_to_continue)
        raise SystemExit(stop.status) from None
    except (ConfigError, DataError, CheckpointError) as error:
        if is_main_process() and (folder.is_at_start or (folder.is_unsaved and isinstance(error, ConfigError))):
            undo_log_dir(args.log_dir)
        raise
    except OSError as error:
        if not isinstance(error, WriteError) and error.errno not in STORAGE_ERRORS:
            raise
        raise ResultError(f"The run ended {folder.stage}: {error} {folder.how_to_continue}") from error
    finally:
        release_log_dir(args.log_dir)


def _train(args: Namespace, watched: RunFolder) -> Path:
    """Prepare, train, test and write, each by functions of its own."""
    began = time.monotonic()
    if not is_main_process():
        setattr(rank_zero_only, "rank", 1)  # noqa: B010 (the true number is known when the processes have met)
    args = Namespace(**vars(args))
    check_options(args)
    world = choose_world(int(args.ngpus), int(args.num_nodes))
    resumed = checkpoint_to_continue(args)
    seed_everything(args.seed, workers=True, verbose=False)
    data, train_facts = _load_data(args, resumed)
    module, units = _load_module(args, data, resumed, train_facts)
    splits = {name: len(getattr(data, f"idx_{name}")) for name in ("train", "val", "test")}

    terminal = Terminal(units, console_for())
    logger, checkpoints = _records(args, module, splits, resumed, terminal, watched)
    watched.data, watched.logger, watched.checkpoints = data, logger, checkpoints
    polite = PoliteStop(checkpoints)
    callbacks = [terminal, polite, checkpoints, *_other_callbacks(args, splits, resumed)]
    trainer = _trainer(args, data, world, callbacks, logger)
    if trainer.is_global_zero:
        _clear_drafts(Path(args.log_dir))
        introduce(terminal, args, data, splits, module, trainer)
    with _explained(trainer, checkpoints):
        stopped, is_lost = _fit(trainer, module, data, args.load_model if resumed else None, polite, watched)
        watched.stage = "in the final test"
        watched.look(trainer)
        tested = load_best(trainer, module, checkpoints)
        evaluation = evaluate_split(trainer, module, data, train_facts, splits)
    if not trainer.is_global_zero:
        return Path(args.log_dir)

    if evaluation is not None and evaluation.split == "test":
        log_test(trainer, module, evaluation, tested)
    watched.stage = "while its results were written"
    watched.look(trainer)
    facts = RunFacts(
        folder=Path(args.log_dir),
        options=hyper_parameters(args),
        units=units,
        splits=splits,
        train_facts=train_facts,
        evaluation=evaluation,
        provenance=module.provenance,
        monitor=checkpoints.monitor,
        best_score=checkpoints.best_score,
        tested=tested.name,
        tested_epoch=tested.epoch,
        num_epochs=trainer.current_epoch,
        num_parameters=count_parameters(module.model),
        device=device_name(trainer),
        seconds=time.monotonic() - began,
        samples_per_second=terminal.num_samples / terminal.seconds_training if terminal.seconds_training else math.nan,
        stopped=stopped,
        epochs_before=0 if resumed is None else resumed.next_epoch,
    )
    tell(terminal, facts)
    has_numbers = is_sound(module, evaluation)
    write_all(terminal, facts, logger, args, checkpoints, module, data, with_potential=has_numbers)
    if is_lost or not has_numbers:
        tell_lost(facts, module, has_numbers)
    return facts.folder


# ------------------------------------------------------------------------------------------------ before


def _load_data(args: Namespace, resumed: Resumed | None) -> tuple[DataModule, SplitFacts]:
    """The data, divided, and facts about those to train on, which are checked against the options."""
    if args.remove_ref_energy:
        args.prior_model = add_reference_prior(args.prior_model)
    for start in filter(None, (args.load_weights, args.load_model)):
        check_start(start)
    data = DataModule(hyper_parameters(args))
    data.prepare_data()
    if resumed is not None:
        check_same_data(resumed.data_digest, data, args)  # before its division is written
    data.setup("fit")
    facts = facts_of(read_batches(data.dataset, data.idx_train), data.targets)
    check_data(args, data, facts)
    look_at_cutoffs(args, data)
    assert facts is not None
    return data, facts


def _load_module(args: Namespace, data: DataModule, resumed: Resumed | None, facts: SplitFacts) -> tuple[LNNP, Units]:
    """The model to train, which knows its data, and the units of what it predicts."""
    module, alignment = make_module(args, data, resumed, facts)
    module.complete = data.complete
    if is_main_process():
        module.data_digest = data.digest()
    energy, length = (getattr(data.dataset, name, None) for name in ("energy_unit", "length_unit"))
    units = Units(energy, length, {term: target.unit(energy, length) for term, target in data.targets.items()})
    module.provenance = {**provenance_of(data), **references_of(module, data, args, resumed, alignment)}
    tell_references(module, units, alignment, args)
    return module, units


def _records(
    args: Namespace,
    module: LNNP,
    splits: Mapping[str, int],
    resumed: Resumed | None,
    terminal: Terminal,
    watched: RunFolder,
) -> tuple[RunLogger, Checkpoints]:
    """What keeps the tables and the checkpoints of a run in its folder, beside those of a run that it continues."""
    folder = Path(args.log_dir)
    is_continued = resumed is not None and Path(args.load_model).resolve().parent == folder.resolve()
    logger = RunLogger(folder, keep_until=resumed.next_epoch if is_continued and resumed is not None else 0)
    checkpoints = Checkpoints(
        folder,
        _monitor(args.checkpoint_monitor, args, splits["val"] > 0) or f"val_total_{module.train_loss_name}",
        every_n_epochs=args.save_interval,
        keep=args.keep_checkpoints,
        mark_test=splits["test"] > 0,
        is_continued=is_continued,
        earlier=companion(args.load_model, "best.ckpt") if resumed is not None else None,
        look=watched.look,
        before=[_write_tables(logger)],
        then=[terminal.epoch_line],
    )
    return logger, checkpoints


def _other_callbacks(args: Namespace, splits: Mapping[str, int], resumed: Resumed | None) -> list[Callback]:
    """Early stopping, and what a continued run takes up, where they are wanted."""
    callbacks: list[Callback] = []
    stop_monitor = _monitor(args.early_stopping_monitor, args, splits["val"] > 0)
    if stop_monitor is not None:
        callbacks.append(patient_stop(stop_monitor, args.early_stopping_patience))
    if resumed is not None:
        callbacks.append(ContinueRun(vars(args), resumed.options, resumed.batches_done))
    if args.test_interval > 0 and splits["test"]:
        log.info("The test set is evaluated every %d epochs, which takes time.", args.test_interval)
    return callbacks


def _trainer(args: Namespace, data: DataModule, world: World, callbacks: list[Callback], logger: RunLogger) -> Trainer:
    folder = Path(args.log_dir)
    return Trainer(
        accelerator=world.accelerator,
        devices=world.devices,
        num_nodes=world.num_nodes,
        strategy=choose_strategy(world, _shared_facts(args, data, world)),
        precision="64-true" if args.precision == 64 else "32-true",
        max_epochs=args.num_epochs,
        gradient_clip_val=args.gradient_clipping or None,
        default_root_dir=str(folder),
        callbacks=callbacks,
        logger=[logger, *_trackers(args, folder)],
        plugins=[SafeCheckpointIO(), cluster_environment()],
        inference_mode=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1 if args.test_interval > 0 else 0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2**62,
    )


def _quiet_lightning() -> None:
    """Lightning's advice concerns people who write training loops; what our users need to know we say ourselves."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r"Grad strides do not match bucket view strides")


def _monitor(monitor: str | None, args: Namespace, has_val: bool) -> str | None:
    """The metric to follow: without a validation set, the training loss."""
    if monitor is not None and monitor.startswith("val_") and not has_val:
        return f"train_total_{loss_name(args.train_loss)}"
    return monitor


def _trackers(args: Namespace, folder: Path) -> list[Any]:
    trackers: list[Any] = []
    if args.wandb_use:
        from lightning.pytorch.loggers import WandbLogger

        resume = {"id": args.wandb_resume_from_id, "resume": "must"} if args.wandb_resume_from_id else {}
        trackers.append(WandbLogger(project=args.wandb_project, name=args.wandb_name, save_dir=str(folder), **resume))
    if args.tensorboard_use:
        from lightning.pytorch.loggers import TensorBoardLogger

        trackers.append(
            TensorBoardLogger(save_dir=str(folder), name="tensorboard", version="", default_hp_metric=False)
        )
    return trackers


def _clear_drafts(folder: Path) -> None:
    """Remove what a run that was killed while writing left behind."""
    for pattern in (".*.tmp", ".splits.npz-*.npz", ".*.yaml.[0-9]*"):  # the last two as earlier versions named them
        for draft in folder.glob(pattern):
            draft.unlink(missing_ok=True)


#: Options that may differ between nodes: where things lie, and what only the first process does.
_LOCAL_OPTIONS = frozenset(
    {"conf", "log_dir", "dataset_root", "dataset_arg", "coord_files", "embed_files", "energy_files", "force_files"}
    | {"load_model", "load_weights", "splits", "ngpus", "num_nodes", "num_workers", "dataset_preload_limit"}
    | {"redirect", "overwrite", "report", "tensorboard_use", "wandb_use", "wandb_project", "wandb_name"}
    | {"wandb_resume_from_id", "prior_args"}
)


def _shared_facts(args: Namespace, data: DataModule, world: World) -> dict[str, Any]:
    """What the processes of a run have to agree on: settings, data and versions."""
    if world.devices * world.num_nodes == 1:
        return {}
    parts = {name: getattr(data, f"idx_{name}") for name in ("train", "val", "test")}
    return {
        **{key: value for key, value in sorted(vars(args).items()) if key not in _LOCAL_OPTIONS},
        "version of torchmdnet": __version__,
        "version of PyTorch": torch.__version__.partition("+")[0],
        "data (the content of dataset_root or other files, or their order; digest)": data_digest(data.dataset, parts),
    }


@contextmanager
def _explained(trainer: Trainer, checkpoints: Checkpoints) -> Iterator[None]:
    """Say which process is missing, and how to go on, instead of what the library for messages says."""
    try:
        yield
    except RuntimeError as error:
        strategy = trainer.strategy
        lost = strategy.explained(error) if isinstance(strategy, BoundedDDPStrategy) else error
        if lost is error:
            raise
        advice = "Nothing is saved yet; start all of them again."
        if trainer.is_global_zero and checkpoints.last_path.exists():
            advice = f"Start all of them again with: {command(checkpoints.last_path)}"
        elif not trainer.is_global_zero:
            advice = (
                "Start all of them again, with --load-model and the last.ckpt that process 0 keeps, if there is one."
            )
        raise type(lost)(f"{lost} {advice}") from error


# ------------------------------------------------------------------------------------------------ during


def _write_tables(logger: RunLogger) -> Callable[[Trainer, LNNP], None]:
    """Write the rows of an epoch; Lightning itself logs an epoch without validation after its checkpoints."""

    def write(trainer: Trainer, module: LNNP) -> None:
        if not any(trainer.num_val_batches):
            logged = trainer.logged_metrics
            metrics = {name: float(logged[name]) for name in module.epoch_metrics if name in logged}
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        for split, errors in module.epoch_errors.items():
            logger.log_errors(error_row(trainer.current_epoch, split, errors))

    return write


def _fit(
    trainer: Trainer,
    module: LNNP,
    data: DataModule,
    checkpoint: str | None,
    polite: PoliteStop,
    watched: RunFolder,
) -> tuple[str, bool]:
    """Train; returns in words why it ended before the last epoch, or nothing, and whether it diverged.

    Raises:
        SystemExit: After Ctrl-C or SIGTERM, with the status that shells expect.
    """
    # Older releases of Lightning read checkpoints by themselves; since 2.6 they want to be told, though ours decides.
    options = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    checkpoints = polite.checkpoints
    watched.stage = "in the training"
    try:
        with polite.listening():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, **options)
    except StopRequested:
        number = polite.signal or polite.signal_elsewhere or signal.SIGTERM
        if trainer.is_global_zero:
            log.warning("Stopped. Continue with: %s", command(checkpoints.last_path))
            if trainer.num_nodes > 1:
                log.warning("Start it on every node, with the same variables in the environment as before.")
            for line in potential_so_far(checkpoints.last_path):
                log.warning("%s", line)
        raise SystemExit(128 + number) from None
    except (KeyboardInterrupt, SystemExit):  # asked a second time; Lightning makes an exit of it
        if polite.signal is None:
            raise
        if trainer.is_global_zero:
            log.warning("Stopped at once. %s", watched.how_to_continue)
        raise SystemExit(128 + polite.signal) from None
    return _why_stopped(trainer, module, checkpoints)


def _why_stopped(trainer: Trainer, module: LNNP, checkpoints: Checkpoints) -> tuple[str, bool]:
    """Why training ended before ``num_epochs``, in words, empty where all epochs are done; and whether it diverged."""
    advice, plan = "; try a lower lr, or gradient_clipping", module.plan
    stoppings = cast("list[EarlyStopping]", trainer.early_stopping_callbacks)
    for stopping in stoppings:
        if not math.isfinite(module.epoch_metrics.get(stopping.monitor, 0.0)):
            return f"stopped: {stopping.monitor} is not a number any more{advice}", True
    if checkpoints.is_lost:
        return f"stopped: the weights are not numbers any more{advice}", True
    if plan.is_over and plan.max_time is not None:
        rate = float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else plan.lr
        annealed = f"; the learning rate fell to {rate:.2g}" if plan.is_planned else ""
        return f"stopped: max_time, {duration(plan.max_time)}, is over{annealed}", False
    if trainer.current_epoch >= cast(int, trainer.max_epochs) >= 0:
        return "", False
    for stopping in stoppings:
        if stopping.wait_count >= stopping.patience:
            return (
                f"stopped early: {stopping.monitor} no longer improved "
                f"(early_stopping_patience: {stopping.patience} epochs)"
            ), False
    return "", False
