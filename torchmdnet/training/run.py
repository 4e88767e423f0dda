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

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from torchmdnet._version import __version__
from torchmdnet.checkpoint import hyper_parameters_of, read_checkpoint
from torchmdnet.checkpoint.card import count_parameters
from torchmdnet.checkpoint.migrations import has_old_tensor_layout
from torchmdnet.config.launcher import check_launcher
from torchmdnet.config.rundir import claim_log_dir, companion, is_main_process, release_log_dir, undo_log_dir
from torchmdnet.config.settings import add_reference_prior, hyper_parameters
from torchmdnet.config.stopping import Stopped, stop_signals
from torchmdnet.data import DataModule
from torchmdnet.data.digest import data_digest
from torchmdnet.datasets.labels import LARGEST_LABEL, too_large
from torchmdnet.elements import symbols
from torchmdnet.errors import CheckpointError, ConfigError, DataError, DivergenceError, ResultError, WriteError
from torchmdnet.files import STORAGE_ERRORS
from torchmdnet.losses import loss_name
from torchmdnet.options import OPTIONS
from torchmdnet.priors.atomref import Atomref
from torchmdnet.priors.named import create_prior_models
from torchmdnet.training.callbacks import Checkpoints, ContinueRun, PoliteStop, StopRequested, patient_stop
from torchmdnet.training.distributed import (
    BoundedDDPStrategy,
    World,
    choose_strategy,
    choose_world,
    end_with_launcher,
)
from torchmdnet.training.evaluate import Evaluation, SplitFacts, composition_baseline, evaluate, facts_of, read_batches
from torchmdnet.training.files import SafeCheckpointIO
from torchmdnet.training.folder import RunFolder, command, potential_so_far
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.logger import FINAL_TEST, RunLogger
from torchmdnet.training.potential_file import FILE_NAME, write_potential
from torchmdnet.training.reach import SYSTEMS, check_reach, reach_of
from torchmdnet.training.report import (
    RunFacts,
    error_table,
    trivial_words,
    write_report,
    write_summary,
)
from torchmdnet.training.start import (
    TOO_FAR,
    Alignment,
    changed_settings,
    check_continued,
    check_same_data,
    origin_of,
    reference_prior,
    refuse_size,
    start_from,
    tell_changes,
)
from torchmdnet.training.terminal import Terminal, Units, console_for, counted, duration, significant

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
    began = time.monotonic()
    if not is_main_process():
        setattr(rank_zero_only, "rank", 1)  # noqa: B010 (the true number is known when the processes have met)
    args = Namespace(**vars(args))
    folder = Path(args.log_dir)
    _check(args)
    world = choose_world(int(args.ngpus), int(args.num_nodes))
    resumed = _checkpoint_to_continue(args)
    seed_everything(args.seed, workers=True, verbose=False)

    if args.remove_ref_energy:
        args.prior_model = add_reference_prior(args.prior_model)
    for start in filter(None, (args.load_weights, args.load_model)):
        hyper_parameters_of(read_checkpoint(start), start)  # a file that cannot be used is refused before data are read
    data = DataModule(hyper_parameters(args))
    data.prepare_data()
    if resumed is not None:
        check_same_data(resumed.data_digest, data, args)  # before its division is written
    data.setup("fit")
    train_facts = facts_of(read_batches(data.dataset, data.idx_train), data.targets)
    _check_data(args, data, train_facts)
    _look_at_cutoffs(args, data)
    assert train_facts is not None

    module, alignment = _module(args, data, resumed, train_facts)
    module.complete = data.complete
    if is_main_process():
        module.data_digest = data.digest()
    energy, length = (getattr(data.dataset, name, None) for name in ("energy_unit", "length_unit"))
    units = Units(energy, length, {term: target.unit(energy, length) for term, target in data.targets.items()})
    module.provenance = {**_provenance(data), **_references(module, data, args, resumed, alignment)}

    _tell_references(module, units, alignment, args)

    splits = {name: len(getattr(data, f"idx_{name}")) for name in ("train", "val", "test")}
    monitor = _monitor(args.checkpoint_monitor, args, splits["val"] > 0)
    stop_monitor = _monitor(args.early_stopping_monitor, args, splits["val"] > 0)
    is_continued = resumed is not None and Path(args.load_model).resolve().parent == folder.resolve()

    logger = RunLogger(folder, keep_until=resumed.next_epoch if is_continued and resumed is not None else 0)
    terminal = Terminal(units, console_for())
    checkpoints = Checkpoints(
        folder,
        monitor or f"val_total_{module.train_loss_name}",
        every_n_epochs=args.save_interval,
        keep=args.keep_checkpoints,
        mark_test=splits["test"] > 0,
        is_continued=is_continued,
        earlier=companion(args.load_model, "best.ckpt") if resumed is not None else None,
        look=watched.look,
        before=[_write_tables(logger)],
        then=[terminal.epoch_line],
    )
    watched.data, watched.logger, watched.checkpoints = data, logger, checkpoints
    polite = PoliteStop(checkpoints)
    callbacks = [terminal, polite, checkpoints]
    if stop_monitor is not None:
        callbacks.append(patient_stop(stop_monitor, args.early_stopping_patience))
    if resumed is not None:
        callbacks.append(ContinueRun(vars(args), resumed.options, resumed.batches_done))
    if args.test_interval > 0 and splits["test"]:
        log.info("The test set is evaluated every %d epochs, which takes time.", args.test_interval)

    trainer = Trainer(
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
        plugins=[SafeCheckpointIO()],
        inference_mode=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1 if args.test_interval > 0 else 0,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2**62,
    )
    if trainer.is_global_zero:
        _clear_drafts(folder)
        _introduce(terminal, args, data, splits, module, trainer)
    with _explained(trainer, checkpoints):
        stopped, is_lost = _fit(trainer, module, data, args.load_model if resumed else None, polite, watched)
        watched.stage = "in the final test"
        watched.look(trainer)
        tested, tested_epoch, tested_step = _load_best(trainer, module, checkpoints)
        evaluation = _evaluate(trainer, module, data, train_facts, splits)

    # ------------------------------------------------------------------------------------------ tell
    if not trainer.is_global_zero:
        return folder
    if evaluation is not None and evaluation.split == "test":
        _log_test(trainer, module, evaluation, tested_epoch, tested_step)
    watched.stage = "while its results were written"
    watched.look(trainer)
    facts = RunFacts(
        folder=folder,
        options=hyper_parameters(args),
        units=units,
        splits=splits,
        train_facts=train_facts,
        evaluation=evaluation,
        provenance=module.provenance,
        monitor=checkpoints.monitor,
        best_score=checkpoints.best_score,
        tested=tested,
        tested_epoch=tested_epoch,
        num_epochs=trainer.current_epoch,
        num_parameters=count_parameters(module.model),
        device=_device_name(trainer),
        seconds=time.monotonic() - began,
        samples_per_second=terminal.num_samples / terminal.seconds_training if terminal.seconds_training else math.nan,
        stopped=stopped,
        epochs_before=0 if resumed is None else resumed.next_epoch,
    )
    _tell(terminal, facts)
    is_sound = _is_sound(module, evaluation)
    _write_all(terminal, facts, logger, args, checkpoints, module, data, with_potential=is_sound)
    if is_lost or not is_sound:
        _tell_lost(facts, module, is_sound)
    return folder


# ------------------------------------------------------------------------------------------------ before


def _quiet_lightning() -> None:
    """Lightning's advice concerns people who write training loops; what our users need to know we say ourselves."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\.utils\.data.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r"Grad strides do not match bucket view strides")


def _check(args: Namespace) -> None:
    check_launcher(int(args.num_nodes))
    if args.precision == 16:
        raise ConfigError(
            "precision: 16 cannot train a potential: distances and the second derivatives behind force training need "
            "at least 32 bits. Use 32, or 64 for double precision."
        )
    if args.dataset is None:
        raise ConfigError("dataset: none is given. Name one, e.g. dataset: TinyQM.")


def _check_data(args: Namespace, data: DataModule, facts: SplitFacts | None) -> None:
    """Refuse, before any step, options that the data cannot serve.

    Raises:
        ConfigError: Naming the option and what the data hold.
    """
    if facts is None:
        raise ConfigError("train_size: the training set is empty. Raise train_size, or lower val_size and test_size.")
    held = ", ".join(facts.fields)
    for option, name, what in (("charge", "q", "total charges"), ("spin", "s", "spins")):
        if getattr(args, option) and name not in facts.fields:
            raise ConfigError(
                f"{option}: true needs {what} ({name!r}), but the data hold {held}. Set {option} to false, or use data "
                f"with {name!r}."
            )
    uses_forces = args.derivative and "neg_dy" in facts.fields
    if "y" not in facts.fields and not uses_forces and not data.targets:
        raise ConfigError(
            f"The data hold {held}, but no energies (y)"
            + (", and no forces (neg_dy) either." if args.derivative else "; forces are used with derivative: true.")
        )
    if args.derivative and "neg_dy" not in facts.fields and args.neg_dy_weight > 0:
        log.warning("derivative: the data hold no forces (neg_dy), so only energies are trained.")
    heads = {target.head for target in data.targets.values()}
    if facts.charged and not args.charge and heads & {"Dipole", "PartialCharges"}:
        log.warning(
            "charge: some systems have a total charge, but the model is not told, and its partial charges add up to 0. "
            "Set charge: true."
        )
    largest = {"y": None if facts.y is None else float(np.abs(facts.y).max()), "neg_dy": facts.force_max}
    for name, size in largest.items():
        if size is not None and size > LARGEST_LABEL:
            raise DataError(f"{name}: {too_large(size)}")
    for term in data.targets:
        if term in facts.labels and not len(facts.labels[term].values):
            raise ConfigError(
                f"{term}: every label in the training set is missing (NaN). Choose other data or leave it."
            )
    elements = facts.elements
    if max(elements) >= args.max_z:
        raise ConfigError(
            f"max_z: {args.max_z} is too small, the data hold atomic number {max(elements)}. "
            f"Set max_z to {max(elements) + 1} or more."
        )


def _look_at_cutoffs(args: Namespace, data: DataModule) -> None:
    """Compare the cutoffs with the first training systems; the first process alone says what is odd."""
    cutoffs = float(args.cutoff_lower), float(args.cutoff_upper)
    batch = next(iter(read_batches(data.dataset, data.idx_train, size=SYSTEMS)))
    reach = reach_of(batch, *cutoffs, int(args.embedding_dimension))
    if reach is not None and is_main_process():
        check_reach(reach, *cutoffs)


class _Resumed:
    """What has to be known of a checkpoint before training continues from it."""

    def __init__(self, checkpoint: Mapping[str, Any], path: str) -> None:
        self.options = hyper_parameters_of(checkpoint, path) if checkpoint.get("hyper_parameters") else {}
        self.origin = origin_of(checkpoint, path)
        state = (checkpoint.get("torchmdnet") or {}).get("state") or {}
        #: What told its data from others; None in files of earlier versions.
        self.data_digest: Mapping[str, Any] | None = state.get("data_digest")
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        epochs = loop.get("epoch_progress", {}).get("current", {"ready": 0, "processed": 0})
        batches = loop.get("epoch_loop.batch_progress", {})
        #: The first epoch that is not complete.
        self.next_epoch = int(epochs["processed"])
        is_inside_epoch = epochs["ready"] > epochs["processed"] and not batches.get("is_last_batch", True)
        self.batches_done = int(batches["current"]["processed"]) if is_inside_epoch else 0


def _checkpoint_to_continue(args: Namespace) -> _Resumed | None:
    """The checkpoint whose optimizer and counters are taken up, if any."""
    if not args.load_model or args.reset_trainer:
        return None
    checkpoint = read_checkpoint(args.load_model)
    if not checkpoint.get("optimizer_states") or "loops" not in checkpoint:
        raise CheckpointError(
            f"load_model: {args.load_model} holds weights but no optimizer state, so training cannot continue where it "
            "stopped. Add --reset-trainer to start a new training from these weights."
        )
    resumed = _Resumed(checkpoint, args.load_model)
    if 0 <= args.num_epochs < resumed.next_epoch:
        raise ConfigError(
            f"num_epochs: {args.num_epochs}, but {args.load_model} has {resumed.next_epoch} epochs behind it. Give the "
            f"number of all epochs, {resumed.next_epoch + 1} or more, to train on; --reset-trainer starts a new "
            "training from its weights."
        )
    size = resumed.options.get("batch_size", args.batch_size)
    if resumed.batches_done and size != args.batch_size:
        raise ConfigError(
            f"batch_size: {args.batch_size}, but {args.load_model} stands in the middle of an epoch of batches of "
            f"{size}. Continue with --batch-size {size}, or change it from the checkpoint of an epoch's end; "
            "--reset-trainer starts a new training from its weights."
        )
    state = {key.removeprefix("model."): None for key in checkpoint["state_dict"]}
    if has_old_tensor_layout(state, resumed.options):  # type: ignore[arg-type]
        raise CheckpointError(
            f"load_model: {args.load_model} is in the tensor layout of releases before 3.0. Its weights can be used, "
            "but not its optimizer state. Add --reset-trainer to start a new training from these weights."
        )
    return resumed


def _module(
    args: Namespace, data: DataModule, resumed: _Resumed | None, facts: SplitFacts
) -> tuple[LNNP, Alignment | None]:
    """The model to train; started from a file, also how far its energies are off."""
    start = args.load_weights or (args.load_model if resumed is None else None)
    priors = create_prior_models(vars(args), data.prior_source)
    args.prior_args = [prior.get_init_args() for prior in priors]
    options = hyper_parameters(args)
    if resumed is not None:
        references = [prior.initial_atomref for prior in priors if isinstance(prior, Atomref)]
        check_continued(resumed.origin, data, args, references[-1] if references else None, facts)
        changes = changed_settings(resumed.origin, args)
        try:
            module = LNNP(options)
        except CheckpointError as error:
            raise refuse_size(changes, args.load_model, error) or error from None
        tell_changes(changes)
        return module, None
    module = LNNP(
        {**options, "load_model": None},
        prior_model=priors,
        mean=getattr(data, "mean", None),
        std=getattr(data, "std", None),
    )
    return module, start_from(module, start, data, args) if start else None


def _provenance(data: DataModule) -> dict[str, Any]:
    """Facts about the data that a checkpoint keeps."""
    dataset = data.dataset
    return {
        "units": {"energy": getattr(dataset, "energy_unit", None), "length": getattr(dataset, "length_unit", None)},
        "level_of_theory": getattr(dataset, "level_of_theory", None),
        "citation": getattr(dataset, "citation", None),
        "elements": data.elements("train"),
    }


def _references(
    module: LNNP, data: DataModule, args: Namespace, resumed: _Resumed | None, alignment: Alignment | None
) -> dict[str, Any]:
    """What energies are relative to, or contain, for the card: where the energies of the elements come from."""
    if resumed is not None:
        return {key: value for key, value in resumed.origin.facts.items() if key in ("references", "started_from")}
    start = args.load_weights or args.load_model
    facts: dict[str, Any] = {"started_from": str(start)} if start else {}
    prior = reference_prior(module.model)
    if prior is None:
        return facts
    if prior.atomref.weight.requires_grad:
        return {**facts, "references": {"source": "learned with the network"}}
    source = "stated by the data" if data.states_energies else "fitted to the training energies"
    if start:
        source = "of the model that training started from" + (", fitted to the new energies" if alignment else "")
    table = prior.initial_atomref.double().flatten().tolist()
    known = [z for z in data.elements("train") if z < len(table)]
    return {**facts, "references": {"source": source, "energies": {symbols([z]): table[z] for z in known}}}


def _tell_references(module: LNNP, units: Units, alignment: Alignment | None, args: Namespace) -> None:
    """Log the energies of the elements that are used, and how well a model that training starts from fits."""
    if not is_main_process():
        return
    references = module.provenance.get("references") or {}
    unit = units.energy or "energy unit"
    if references.get("energies"):
        table = ", ".join(f"{name} {energy:.4f}" for name, energy in references["energies"].items())
        log.info("Reference energies [%s], %s: %s", unit, references["source"], table)
    if alignment is None:
        return
    before, after = (f"{units.show(error)} {units.of_energy_per_atom}" for error in alignment[:2])
    log.info(
        "Energies of the model that training starts from are %s off on %d training systems%s.",
        after, alignment.num_systems,
        "" if before == after else f" ({before} with its own reference energies or mean)",
    )  # fmt: skip
    is_far = alignment.spread and alignment.after > TOO_FAR * alignment.spread
    if is_far and before == after and args.y_weight > 0:
        log.warning(
            "The training energies vary by %s %s, much less than that: they and the model have other reference "
            "energies. Set remove_ref_energy: true or prior_model: Atomref, which fit them to the data.",
            units.show(alignment.spread), units.of_energy_per_atom,
        )  # fmt: skip


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
        "digest of the data": data_digest(data.dataset, parts),
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
            logger.log_errors(_error_row(trainer.current_epoch, split, errors))

    return write


def _error_row(epoch: int | None, split: str, errors: Any) -> dict[str, Any]:
    return {"epoch": epoch, "split": split, **errors.labelled()}


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
        number = polite.signal or signal.SIGTERM
        if trainer.is_global_zero:
            log.warning("Stopped. Continue with: %s", command(checkpoints.last_path))
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
    advice = "; try a lower lr, or gradient_clipping"
    stoppings = cast("list[EarlyStopping]", trainer.early_stopping_callbacks)
    for stopping in stoppings:
        if not math.isfinite(module.epoch_metrics.get(stopping.monitor, 0.0)):
            return f"stopped: {stopping.monitor} is not a number any more{advice}", True
    if checkpoints.is_lost:
        return f"stopped: the weights are not numbers any more{advice}", True
    if trainer.current_epoch >= cast(int, trainer.max_epochs) >= 0:
        return "", False
    for stopping in stoppings:
        if stopping.wait_count >= stopping.patience:
            return (
                f"stopped early: {stopping.monitor} no longer improved "
                f"(early_stopping_patience: {stopping.patience} epochs)"
            ), False
    return "", False


# ------------------------------------------------------------------------------------------------ after


def _load_best(trainer: Trainer, module: LNNP, checkpoints: Checkpoints) -> tuple[str, int | None, int]:
    """Put the best weights into the module; name, epoch and last step of what it now holds."""
    found: tuple[Any, str, int | None, int] = (None, "current weights", None, trainer.global_step - 1)
    if trainer.is_global_zero and checkpoints.best_model_path and checkpoints.best_path.exists():
        checkpoint = read_checkpoint(checkpoints.best_path)
        step = int(checkpoint["global_step"]) - 1
        found = (checkpoint["state_dict"], checkpoints.best_path.name, int(checkpoint["epoch"]), step)
    if trainer.world_size > 1:
        found = trainer.strategy.broadcast(found)
    weights, name, epoch, step = found
    if weights is not None:
        module.load_state_dict(weights)
    elif trainer.current_epoch:
        epoch = trainer.current_epoch - 1
    return name, epoch, step


def _evaluate(
    trainer: Trainer, module: LNNP, data: DataModule, train_facts: SplitFacts | None, splits: Mapping[str, int]
) -> Evaluation | None:
    """Errors on the test set, or on the validation set where there is no other, beside those of a trivial guess."""
    split = "test" if splits["test"] else "val"
    if not splits[split]:
        return None
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    loader = loader[0] if isinstance(loader, (list, tuple)) else loader
    evaluation = evaluate(
        module,
        loader,
        split,
        device=trainer.strategy.root_device,
        reduce=lambda sums: trainer.strategy.reduce(sums, reduce_op="sum"),  # type: ignore[arg-type, return-value]
    )
    facts = facts_of(read_batches(data.dataset, getattr(data, f"idx_{split}")), data.targets)
    if facts is not None:
        evaluation.baseline = composition_baseline(train_facts, facts)
    return evaluation


def _is_sound(module: LNNP, evaluation: Evaluation | None) -> bool:
    """Whether the weights that were tested, and what they predict, are numbers."""
    has_numbers = all(bool(torch.isfinite(weights).all()) for weights in module.model.parameters())
    return has_numbers and (evaluation is None or evaluation.errors.are_finite)


def _tell_lost(facts: RunFacts, module: LNNP, is_sound: bool) -> None:
    """End a run that diverged, after all that is known of it is written.

    Raises:
        DivergenceError: With the first batch whose loss was not finite, what there is, and advice.
    """
    first = module.first_lost_batch
    where = (
        "" if first is None else f" The first loss that is not finite was that of batch {first[1]} of epoch {first[0]}."
    )
    if is_sound:
        left = f"{FILE_NAME} holds the best weights before, those of epoch {facts.tested_epoch}."
    else:
        left = f"No {FILE_NAME} is written: the predictions of the {facts.tested} are not numbers."
    raise DivergenceError(
        f"the training diverged.{where} {left} Try a lower lr, gradient_clipping, or lr_warmup_steps; torchmd-net data "
        "looks for wrong labels and atoms that are too close."
    )


def _log_test(trainer: Trainer, module: LNNP, evaluation: Evaluation, epoch: int | None, step: int) -> None:
    """Add a row with the test errors, under the epoch and step of the tested weights."""
    errors = evaluation.errors
    y_mae = errors.y_mae_per_atom if module.hparams.get("y_loss_per_atom") else errors.y_mae
    means = {"y": y_mae, "neg_dy": errors.neg_dy_mae, **{term: mae for term, (mae, _) in errors.others.items()}}
    means = {term: means[term] for term in errors.terms if module.term_weight[term] > 0}
    row = {"epoch": float(epoch if epoch is not None else 0)}
    row |= {f"test_{term}_l1_loss": mean for term, mean in means.items()}
    row["test_total_l1_loss"] = sum(module.term_weight[term] * mean for term, mean in means.items())
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.log_metrics(row, step=step)
            logger.log_errors(_error_row(epoch, FINAL_TEST, errors))
        else:  # trackers want steps in ascending order
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()


def _write_all(
    terminal: Terminal,
    facts: RunFacts,
    logger: RunLogger,
    args: Namespace,
    checkpoints: Checkpoints,
    module: LNNP,
    data: DataModule,
    *,
    with_potential: bool,
) -> None:
    """Potential, summary, plots and report, each named on the terminal when it is there.

    Raises:
        ResultError: Naming the files that could not be written; all others are.
    """
    folder = facts.folder
    steps: list[tuple[str, Callable[[], object]]] = [
        (FILE_NAME, lambda: write_potential(module, facts, read_batches(data.dataset, data.idx_train))),
        ("summary.json", lambda: write_summary(facts)),
    ]
    steps = steps if with_potential else steps[1:]
    if args.report:
        from torchmdnet.training.plots import draw_learning_curves, draw_parity

        loss = loss_name(args.train_loss)
        curves = folder / "learning_curves.png"
        steps.append(
            (
                curves.name,
                lambda: draw_learning_curves(
                    curves, logger.metrics, logger.errors, loss, facts.units, checkpoints.best_epoch
                ),
            )
        )
        if facts.evaluation is not None:
            evaluation, parity = facts.evaluation, folder / "parity.png"
            is_relative = bool(args.remove_ref_energy)
            steps.append(("parity.png", lambda: draw_parity(parity, evaluation, facts.units, relative=is_relative)))
        defaults = {key: option.default for key, option in OPTIONS.items()}
        steps.append(("report.html", lambda: write_report(facts, defaults)))
    failed: dict[str, Exception] = {}
    for name, write in steps:
        try:
            write()
        except Exception as error:
            log.debug("%s could not be written.", name, exc_info=True)
            failed[name] = error
            continue
        if name in _TOLD:
            terminal.console.print(f"{_TOLD[name]}: {folder / name}", soft_wrap=True, markup=False)
    if failed:
        told = "; ".join(f"{name} ({type(error).__name__}: {error})" for name, error in failed.items())
        best = checkpoints.best_path if checkpoints.best_path.exists() else checkpoints.last_path
        raise ResultError(
            f"The training is complete, but not all of its results could be written: {told}. The weights are in {best}."
        ) from next(iter(failed.values()))


#: Results that the terminal names, and how.
_TOLD = {FILE_NAME: "potential", "report.html": "report"}


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = trainer.world_size
    return kind if processes == 1 else f"{processes} × {kind}"


def _introduce(
    terminal: Terminal, args: Namespace, data: DataModule, splits: Mapping[str, int], module: LNNP, trainer: Trainer
) -> None:
    parameters = count_parameters(module.model)
    say = terminal.console.print
    say(
        f"{args.model}, {parameters:,} parameters, {args.precision} bit, on {_device_name(trainer)}; "
        f"{args.dataset}: {counted(splits['train'], 'system')} to train, {splits['val']} to validate, "
        f"{splits['test']} to test",
        markup=False,
    )
    say(f"everything goes to {args.log_dir}", soft_wrap=True, markup=False)


def _tell(terminal: Terminal, facts: RunFacts) -> None:
    """The last lines on the terminal."""
    say = terminal.console.print
    say("", soft_wrap=True)
    epochs = f"{facts.epochs_in_words} in {duration(facts.seconds)}"
    stopped = facts.stopped or "all epochs done"
    say(f"{epochs}. {stopped[0].upper()}{stopped[1:]}.", soft_wrap=True, markup=False)
    if math.isfinite(facts.best_score):
        say(
            f"best: {facts.folder / 'best.ckpt'}, epoch {facts.tested_epoch}, {facts.monitor} "
            f"{significant(facts.best_score, 4)}",
            soft_wrap=True,
            markup=False,
        )
    rows = error_table(facts)
    if rows and facts.evaluation is not None:
        split = {"test": "test set", "val": "validation set"}[facts.evaluation.split]
        say(f"errors of {facts.tested} on the {split}:", soft_wrap=True, markup=False)
        header = ("", "MAE", "RMSE", "trivial MAE", "")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(5)]
        for row in [header, *rows]:
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
            say("  " + "  ".join(cells).rstrip(), soft_wrap=True, markup=False)
        say(f"  (trivial: {trivial_words(facts)})", markup=False)
