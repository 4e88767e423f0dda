"""What a run leaves: the best weights, their errors, and files and lines that tell of them."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.checkpoint.card import count_parameters
from torchmdnet.data import DataModule
from torchmdnet.errors import DivergenceError, ResultError
from torchmdnet.losses import loss_name
from torchmdnet.options import OPTIONS
from torchmdnet.training.callbacks import Checkpoints
from torchmdnet.training.evaluate import Evaluation, SplitFacts, composition_baseline, evaluate, facts_of, read_batches
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.logger import FINAL_TEST, RunLogger
from torchmdnet.training.potential_file import FILE_NAME, write_potential
from torchmdnet.training.report import (
    RunFacts,
    error_table,
    trivial_words,
    worse_than_trivial,
    write_report,
    write_summary,
)
from torchmdnet.training.terminal import Terminal, counted, duration, significant

__all__ = [
    "Tested",
    "device_name",
    "error_row",
    "evaluate_split",
    "introduce",
    "is_sound",
    "load_best",
    "log_test",
    "tell",
    "tell_lost",
    "write_all",
]

log = logging.getLogger(__name__)


def introduce(
    terminal: Terminal, args: Namespace, data: DataModule, splits: Mapping[str, int], module: LNNP, trainer: Trainer
) -> None:
    parameters = count_parameters(module.model)
    say = terminal.console.print
    say(
        f"{args.model}, {parameters:,} parameters, {args.precision} bit, on {device_name(trainer)}; "
        f"{args.dataset}: {counted(splits['train'], 'system')} to train, {splits['val']} to validate, "
        f"{splits['test']} to test",
        markup=False,
    )
    say(f"everything goes to {args.log_dir}", soft_wrap=True, markup=False)


def device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    processes = trainer.world_size
    return kind if processes == 1 else f"{processes} × {kind}"


class Tested(NamedTuple):
    """What the module holds when it is tested."""

    name: str
    epoch: int | None
    step: int


def load_best(trainer: Trainer, module: LNNP, checkpoints: Checkpoints) -> Tested:
    """Put the best weights into the module."""
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
    return Tested(name, epoch, step)


def evaluate_split(
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


def is_sound(module: LNNP, evaluation: Evaluation | None) -> bool:
    """Whether the weights that were tested, and what they predict, are numbers."""
    has_numbers = all(bool(torch.isfinite(weights).all()) for weights in module.model.parameters())
    return has_numbers and (evaluation is None or evaluation.errors.are_finite)


def error_row(epoch: int | None, split: str, errors: Any) -> dict[str, Any]:
    return {"epoch": epoch, "split": split, **errors.labelled()}


def log_test(trainer: Trainer, module: LNNP, evaluation: Evaluation, tested: Tested) -> None:
    """Add a row with the test errors, under the epoch and step of the tested weights."""
    errors = evaluation.errors
    y_mae = errors.y_mae_per_atom if module.hparams.get("y_loss_per_atom") else errors.y_mae
    means = {"y": y_mae, "neg_dy": errors.neg_dy_mae, **{term: mae for term, (mae, _) in errors.others.items()}}
    means = {term: means[term] for term in errors.terms if module.term_weight[term] > 0}
    row = {"epoch": float(tested.epoch or 0)}
    row |= {f"test_{term}_l1_loss": mean for term, mean in means.items()}
    row["test_total_l1_loss"] = sum(module.term_weight[term] * mean for term, mean in means.items())
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.log_metrics(row, step=tested.step)
            logger.log_errors(error_row(tested.epoch, FINAL_TEST, errors))
        else:  # trackers want steps in ascending order
            logger.log_metrics(row, step=trainer.global_step)
            logger.save()


def tell(terminal: Terminal, facts: RunFacts) -> None:
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
        if worse := worse_than_trivial(facts):
            say(
                f"warning: for {' and '.join(worse)} the model is worse than the trivial prediction. Train for longer, "
                "or with a smaller lr; see learning_curves.png.",
                markup=False,
            )


def write_all(
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


def tell_lost(facts: RunFacts, module: LNNP, has_numbers: bool) -> None:
    """End a run that diverged, after all that is known of it is written.

    Raises:
        DivergenceError: With the first batch whose loss was not finite, what there is, and advice.
    """
    first = module.first_lost_batch
    where = (
        "" if first is None else f" The first loss that is not finite was that of batch {first[1]} of epoch {first[0]}."
    )
    if has_numbers:
        left = f"{FILE_NAME} holds the best weights before, those of epoch {facts.tested_epoch}."
    else:
        left = f"No {FILE_NAME} is written: the predictions of the {facts.tested} are not numbers."
    raise DivergenceError(
        f"the training diverged.{where} {left} Try a lower lr, gradient_clipping, or lr_warmup_steps; torchmd-net data "
        "looks for wrong labels and atoms that are too close."
    )
