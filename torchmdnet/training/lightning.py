"""One step of training, what is measured on the way, and what a checkpoint remembers."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchmdnet import __version__
from torchmdnet.build import PRECISIONS, create_model
from torchmdnet.checkpoint import hyper_parameters_of, load_model, migrate, read_checkpoint
from torchmdnet.checkpoint.migrations import fill_boxes
from torchmdnet.checkpoint.sound import check_finite, check_weights
from torchmdnet.compiled import CompiledPotential
from torchmdnet.config.reader import read_yaml
from torchmdnet.data.labels import Target, targets_of
from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.losses import LOSSES, LossFunction, l1_loss, loss_name
from torchmdnet.ops.kernels.threads import cores
from torchmdnet.options import OPTIONS, defaults_of, value_of
from torchmdnet.training.averaging import WeightAverage
from torchmdnet.training.comparison import NAMED_FIELDS, Comparison, compare, flags_of, labels_of
from torchmdnet.training.metrics import Errors, ErrorSums, RunningMean, accumulator_dtype
from torchmdnet.training.parameter_groups import parameter_groups
from torchmdnet.training.schedules import RunPlan

__all__ = ["LNNP", "Comparison", "EnergyRefRemover", "FloatCastDatasetWrapper", "LossFunction"]

log = logging.getLogger(__name__)

NamedLoss = tuple[str, Callable[[Tensor, Tensor], Tensor]]


class LNNP(LightningModule):
    r"""A potential in training.

    .. math:: L = w_y\, \ell(y, y^\mathrm{ref}) + w_F\, \ell(F, F^\mathrm{ref})
        + w_\sigma\, \ell(\sigma, \sigma^\mathrm{ref}) + \sum_p w_p\, \ell_p(p, p^\mathrm{ref}),
        \qquad F = -\nabla y

    with the stress if ``stress_weight`` is above 0, and a term for each of ``properties``. A stress or property that
    is NaN in the data is missing and counts neither in the loss nor in its mean. Where samples have weights, each
    multiplies the training loss of its sample, in training and validation; errors are never weighted.

    With ``y_loss_per_atom`` the losses of energies are those of energies per atom,
    :math:`\ell(y / n, y^\mathrm{ref} / n)` with n atoms in the system, in every stage.

    With ``0 < ema_alpha < 1`` each term is smoothed over steps, :math:`\alpha L + (1 - \alpha) E`, where E is the
    previous smoothed value. The gradient of a smoothed term is :math:`\alpha` times the plain one, and what is logged
    and monitored is smoothed too; test errors never are.

    With ``model_ema_decay`` the weights are averaged over steps, see :mod:`torchmdnet.training.averaging`: the model
    holds the average in validation and after the training, and ``state_dict`` in checkpoints is the average.

    Means over an epoch are weighted by molecules (``y``) or atoms (``neg_dy``), so a short last batch counts for what
    it holds.

    Args:
        hparams: Options by name, a mapping or a Namespace; it is copied. Missing training options take their defaults.
        prior_model: Prior or priors of the model. None: rebuilt from ``prior_model`` and ``prior_args`` in ``hparams``.
        mean: Added to every prediction, in the data's unit of energy.
        std: Factor of the atoms' contributions.

    Raises:
        ConfigError: If ``train_loss`` is unknown or ``train_loss_arg`` does not fit it.
    """

    def __init__(
        self,
        hparams: Mapping[str, Any] | Namespace,
        prior_model: Any = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        super().__init__()
        hparams = with_defaults(hparams)  # under this name it is saved as the argument `hparams`
        self.save_hyperparameters(hparams)
        if hparams["load_model"]:
            self.model = load_model(hparams["load_model"], args=hparams).train()
        else:
            self.model = create_model(hparams, prior_model, mean, std)
        self.note_handedness()
        #: With ``compile``, what training steps go through, kept apart from the modules whose weights are saved.
        self.compiled = [CompiledPotential(self.model)] if value_of(hparams, "compile") else []

        self.train_loss_name = loss_name(hparams["train_loss"])
        self.train_loss_fn = LossFunction(LOSSES[hparams["train_loss"]], hparams["train_loss_arg"])
        #: What is learnt beside energies and forces, by name.
        self.targets: dict[str, Target] = targets_of(hparams)
        #: Those whose labels are known to be nowhere missing; the others are looked through in every batch.
        self.complete: frozenset[str] = frozenset()
        self.term_weight = {term: float(hparams[f"{term}_weight"]) for term in ("y", "neg_dy")}
        self.term_weight |= {name: target.weight for name, target in self.targets.items()}
        self.term_loss = {
            name: LossFunction(LOSSES[target.loss])
            for name, target in self.targets.items()
            if target.loss not in (None, hparams["train_loss"])
        }
        self.term_alpha = {term: float(hparams[f"ema_alpha_{term}"]) for term in ("y", "neg_dy")}
        self.data_transform = self.make_data_transform()

        #: Smoothed losses: stage -> term -> loss name -> last value.
        self.ema: dict[str, dict[str, dict[str, Tensor]]] = {}
        #: Sums of the running epoch: stage -> term -> loss name.
        self.losses: dict[str, dict[str, dict[str, RunningMean]]] = {}
        self.errors: dict[str, ErrorSums] = {}
        #: What the last finished epoch measured, by column name, and its errors per stage.
        self.epoch_metrics: dict[str, float] = {}
        self.epoch_errors: dict[str, Errors] = {}
        self.epoch_samples = 0
        #: Predictions and labels of the latest training batch, for a display that sets ``keep_latest``.
        self.latest: Comparison | None = None
        self.keep_latest = False
        #: Facts about the data that travel with the weights: units, elements, level of theory.
        self.provenance: dict[str, Any] = {}
        #: What tells the data from others, for a run that continues.
        self.data_digest: dict[str, Any] | None = None
        #: Whether a parameter update has begun whose step is not yet counted; such a state must not be saved.
        self.is_updating = False
        self.plateau: ReduceLROnPlateau | None = None
        #: The learning rate of each step, and the end by the clock.
        self.plan = RunPlan(hparams)
        #: The average of the weights, from the first step on, with ``model_ema_decay``.
        self.average: WeightAverage | None = None
        self._first_lost: Tensor | None = None  # (2,) epoch and batch, -1 before there is one
        self._restored: dict[str, Any] = {}
        self._continued_epoch: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the name of every hook it enters here, some forty times a step; a plain string need not pass
        # through the registration of parameters and modules.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool = True,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> LNNP:
        """Rebuild a module from a checkpoint of any release, without running code from it.

        Args:
            checkpoint_path: The file.
            map_location: Device to put the module on.
            hparams_file: YAML file with the options, for a checkpoint that has none.
            strict: Whether every weight must be in the file.
            weights_only: See :func:`torchmdnet.checkpoint.read_checkpoint`.
            **kwargs: Options to change. The file the module was itself started from is not needed.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        checkpoint = read_checkpoint(checkpoint_path, weights_only=weights_only)
        if hparams_file is None:
            options = hyper_parameters_of(checkpoint, checkpoint_path)
        else:
            options = {key: setting.value for key, setting in read_yaml(hparams_file).items()}
        _, options = migrate(checkpoint["state_dict"], options)
        module = cls({**options, "load_model": None, **kwargs})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        return module if map_location is None else module.to(map_location)

    def note_handedness(self) -> None:
        """Keep the handedness of an SO(3) model of an old file with the options: new files have the new layout."""
        handedness = getattr(self.model, "hyper_parameters", {}).get("handedness")
        if handedness is not None:
            self.hparams["handedness"] = handedness

    def make_data_transform(self) -> Callable[[Any], Any]:
        """What batches go through first: the cast to the precision, after taking off reference energies if asked to.

        To be made again, as :attr:`data_transform`, after the reference energies of the model were changed.
        """
        from torch_geometric.transforms import Compose

        from torchmdnet.calculators.loading import can_be_moved

        dtype = PRECISIONS[int(self.hparams["precision"])]
        cast = FloatCastDatasetWrapper(dtype, brings_home=can_be_moved(self.model))
        if not self.hparams["remove_ref_energy"]:
            return cast
        priors = getattr(self.model, "prior_model", None)
        atomref = getattr(priors[-1], "initial_atomref", None) if priors else None
        if atomref is None:
            raise ConfigError(
                "remove_ref_energy: the last prior of the model must be an Atomref, whose energies are subtracted. "
                'Append {"Atomref": {"enable": False}} to prior_model.'
            )
        return Compose([EnergyRefRemover(atomref), cast])

    # ------------------------------------------------------------------------------------------ optimization

    def configure_optimizers(self) -> tuple[list[AdamW], list[dict[str, Any]]]:  # type: ignore[override]
        """AdamW, and a scheduler that lowers the learning rate on a plateau of ``{lr_metric}_total_{train_loss}``.

        With another ``lr_schedule`` :meth:`optimizer_step` sets the learning rate.
        """
        lr, weight_decay = float(self.hparams["lr"]), float(self.hparams["weight_decay"])
        groups = parameter_groups(self.model, weight_decay, value_of(self.hparams, "weight_decay_on"))
        try:
            optimizer = AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        except RuntimeError:  # a device or dtype without fused kernels
            optimizer = AdamW(groups, lr=lr, weight_decay=weight_decay)
        if self.plan.is_planned:
            return [optimizer], []
        self.plateau = ReduceLROnPlateau(
            optimizer,
            mode="min",
            factor=float(self.hparams["lr_factor"]),
            patience=int(self.hparams["lr_patience"]),
            min_lr=float(self.hparams["lr_min"]),
        )
        scheduler = {
            "scheduler": self.plateau,
            "strict": True,
            "monitor": self.plateau_monitor,
            "interval": "epoch",
            "frequency": 1,
        }
        return [optimizer], [scheduler]

    @property
    def plateau_monitor(self) -> str:
        """The metric that lowers the learning rate. Without a validation set it is the training loss."""
        stage = str(self.hparams["lr_metric"])
        if stage == "val" and self._trainer is not None and not any(self.trainer.num_val_batches):
            stage = "train" if self.trainer.training else stage
        return f"{stage}_total_{self.train_loss_name}"

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's turn comes after checkpoints are written and is left out on some resumes: see `_step_plateau`."""
        if scheduler is not self.plateau:
            super().lr_scheduler_step(scheduler, metric)

    def _step_plateau(self) -> None:
        if self.plateau is not None:
            metric = self.epoch_metrics.get(self.plateau_monitor)
            if metric is not None:
                self.plateau.step(metric)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of the weights alone: through the forces the loss depends on positions too."""
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        if kwargs.get("inputs") is None and weights:
            kwargs["inputs"] = weights
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate, in the warm-up or as it is planned, step, and average the weights."""
        self.plan.begin_step(self.trainer.is_last_batch, self._largest_over_processes)
        lr = self.plan.learning_rate(self.trainer.global_step)
        for group in optimizer.param_groups if lr is not None else ():
            group["lr"] = lr

        def closure() -> Any:
            loss = optimizer_closure() if optimizer_closure is not None else None
            self.is_updating = True
            return loss

        with cores.for_all():
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad()
        if self.average is not None:
            self.average.update()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing is left to do: gradients are dropped after every step."""

    # ------------------------------------------------------------------------------------------ one step

    def forward(
        self,
        z: Tensor,
        pos: Tensor,
        batch: Tensor | None = None,
        box: Tensor | None = None,
        q: Tensor | None = None,
        s: Tensor | None = None,
        extra_args: dict[str, Tensor] | None = None,
        num_systems: int | None = None,
        **flags: bool,
    ) -> Any:
        """Predictions (S, 1) and minus their gradients (N, 3) of the model; ``flags`` are its further arguments."""
        model = self.compiled[0] if self.compiled and self.training else self.model
        return model(z, pos, batch=batch, box=box, q=q, s=s, extra_args=extra_args, num_systems=num_systems, **flags)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Loss of one batch."""
        loss = self.step(batch, [(self.train_loss_name, self.train_loss_fn)], "train")
        if self._first_lost is None or self._first_lost.device != loss.device:
            self._first_lost = torch.full((2,), -1, dtype=torch.long, device=loss.device)
        here = loss.new_tensor([self.current_epoch, batch_idx], dtype=torch.long)
        is_first = ~loss.detach().isfinite() & (self._first_lost[0] < 0)
        self._first_lost = torch.where(is_first, here, self._first_lost)  # without waiting for the device
        return loss

    @property
    def first_lost_batch(self) -> tuple[int, int] | None:
        """Epoch and batch, from 0, of the first training loss on this process that was not finite, if there was one."""
        if self._first_lost is None or int(self._first_lost[0]) < 0:
            return None
        epoch, batch = self._first_lost.tolist()
        return epoch, batch

    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Losses of one validation batch, or of one test batch when the second loader is read."""
        if dataloader_idx == 1:
            self.step(batch, [("l1_loss", l1_loss)], "test")
        elif self.train_loss_name == "l1_loss":
            self.step(batch, [("l1_loss", self.train_loss_fn)], "val")
        else:
            self.step(batch, [("l1_loss", l1_loss), (self.train_loss_name, self.train_loss_fn)], "val")

    def test_step(self, batch: Any, batch_idx: int = 0) -> None:
        """Absolute errors of one test batch."""
        self.step(batch, [("l1_loss", l1_loss)], "test")

    def predict_step(self, batch: Any, batch_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Predictions (S, 1) and forces (N, 3), empty without ``derivative``."""
        return self._predict(self.data_transform(batch), with_grad=bool(self.hparams["derivative"]))

    def step(self, batch: Any, loss_fn_list: Sequence[NamedLoss], stage: str) -> Tensor:
        """Compare one batch with its labels and add the losses to the running epoch.

        Args:
            batch: A ``torch_geometric`` batch; it is transformed in place.
            loss_fn_list: Names and functions of the losses to record.
            stage: ``train``, ``val`` or ``test``.

        Returns:
            The total of the last loss in the list, ().
        """
        comparison = self.compare(batch, stage)
        counts = not self._is_sanity_check()
        if stage == "train":
            self.epoch_samples += comparison.y.shape[0]
            self.latest = comparison.detach() if self.keep_latest else None
        pairs = {term: pair for term, pair in comparison.pairs().items() if self.term_weight[term] > 0}
        if value_of(self.hparams, "y_loss_per_atom") and "y" in pairs:
            y, label, weight = pairs["y"]
            pairs["y"] = (y / comparison.atoms_per_molecule, label / comparison.atoms_per_molecule, weight)
        shares = self._shares(pairs) if stage == "train" else None
        total: Tensor | None = None
        for name, loss_fn in loss_fn_list:
            total = None
            for term, (prediction, label, weight) in pairs.items():
                own = self._own_loss(stage, term, name)
                loss = _loss(own or loss_fn, prediction, label, comparison.weights.get(term))
                if counts:
                    loss = self._smooth(loss, stage, term, name)
                    self._mean_of(stage, term, name).update(loss, weight)
                part = self.term_weight[term] * (loss if shares is None else shares[term] * loss)
                total = part if total is None else total + part
        if stage != "train" and counts:
            comparison.add_to(self.errors.setdefault(stage, ErrorSums(self.targets)))
        if total is None:
            return comparison.y.sum() * 0
        if stage == "train" and self.targets and "y" not in pairs:
            total = total + 0 * comparison.y.sum()  # every parameter takes part in the gradient reduction
        return total

    def _shares(self, pairs: Mapping[str, tuple[Tensor, Tensor, int]]) -> dict[str, Tensor] | None:
        r"""Factors of the terms of this process, so that the gradients of all processes average to that of their batch.

        Each process has a mean over its own labels, n of them, and gradients are averaged over the W processes. Times
        :math:`n W / \sum_w n_w` they add up to the mean over all labels, however these are spread. None for one
        process.
        """
        num_processes = 1 if self._trainer is None else self.trainer.world_size
        if num_processes == 1 or not pairs:
            return None
        here = next(iter(pairs.values()))[0]
        counts = torch.tensor([label.numel() for _, label, _ in pairs.values()], dtype=torch.float64)
        counts = counts.to(device=here.device, dtype=accumulator_dtype(here.device))
        everywhere = self._sum_over_processes(counts.clone())
        shares = counts * num_processes / everywhere.clamp(min=1)
        return dict(zip(pairs, shares.to(here.dtype), strict=True))

    def _own_loss(self, stage: str, term: str, name: str) -> LossFunction | None:
        """The loss of a property that is trained with another one, where ``name`` stands for the training loss."""
        return self.term_loss.get(term) if stage != "test" and name == self.train_loss_name else None

    def _column(self, stage: str, term: str, name: str) -> str:
        own = self._own_loss(stage, term, name)
        return f"{stage}_{term}_{name if own is None else loss_name(self.targets[term].loss or name)}"

    def compare(self, batch: Any, stage: str) -> Comparison:
        """Predict a batch and lay its labels beside.

        Raises:
            DataError: If there is nothing to compare with, or a label has another shape than its prediction.
        """
        batch = self.data_transform(batch)
        learns, forces = stage == "train", bool(self.hparams["derivative"])
        labels = labels_of(batch, self.targets, self.complete)
        prediction = self._predict(batch, with_grad=learns or forces, **flags_of(labels, self.targets))
        return compare(batch, prediction, labels, self.targets, forces=forces, learns=learns)

    def _predict(self, batch: Any, with_grad: bool, **flags: bool) -> Any:
        fields = batch.to_dict()
        for name, option in (("q", "charge"), ("s", "spin")):
            if self.hparams[option] and name not in fields:
                raise DataError(
                    f"{option}: true needs {name!r} in the data, which holds {', '.join(sorted(fields))}. "
                    f"Set {option}: false, or use a data set with {name!r}."
                )
        with torch.set_grad_enabled(with_grad):
            return self(
                fields["z"],
                fields["pos"],
                batch=fields.get("batch"),
                box=fields.get("box"),
                q=fields["q"] if self.hparams["charge"] else None,
                s=fields["s"] if self.hparams["spin"] else None,
                extra_args={name: value for name, value in fields.items() if name not in NAMED_FIELDS},
                num_systems=batch.num_graphs if "ptr" in fields else None,
                **flags,
            )

    def _smooth(self, loss: Tensor, stage: str, term: str, name: str) -> Tensor:
        alpha = self.term_alpha.get(term, 1.0)
        if stage == "test" or not 0 < alpha < 1:
            return loss
        memory = self.ema.setdefault(stage, {}).setdefault(term, {})
        if name in memory:
            loss = alpha * loss + (1 - alpha) * memory[name].to(loss)
        memory[name] = loss.detach()
        return loss

    def _mean_of(self, stage: str, term: str, name: str) -> RunningMean:
        return self.losses.setdefault(stage, {}).setdefault(term, {}).setdefault(name, RunningMean())

    def running_loss(self) -> float | None:
        """Mean training loss of the epoch so far on this process; fetched from the device."""
        means = [
            self.term_weight[term] * by_name[self.train_loss_name].mean()
            for term, by_name in self.losses.get("train", {}).items()
            if self.train_loss_name in by_name and by_name[self.train_loss_name].weight
        ]
        return sum(means) if means else None

    def _is_sanity_check(self) -> bool:
        return self._trainer is not None and self._trainer.sanity_checking

    # ------------------------------------------------------------------------------------------ end of an epoch

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is complete: its state may be saved again. By the clock it may have been the last one."""
        self.is_updating = False
        self.plan.end_step()
        if self.plan.is_over:
            self.trainer.should_stop = True  # after a validation

    def on_train_epoch_start(self) -> None:
        """Forget what the last epoch measured."""
        if self.current_epoch == self._continued_epoch:  # some releases of Lightning restart a continued epoch
            return
        self.plan.begin_epoch()
        self.losses.clear()
        self.errors.clear()
        self.epoch_samples = 0
        self.epoch_metrics, self.epoch_errors = {}, {}

    def on_validation_start(self) -> None:
        """The average is validated, if there is one."""
        self._hold_average(not self._is_sanity_check())

    def on_validation_end(self) -> None:
        """Training goes on with the weights it had."""
        self._hold_average(False)

    def on_train_end(self) -> None:
        """The average is the result, if there is one."""
        self._hold_average(True)

    def _hold_average(self, is_held: bool) -> None:
        if self.average is not None:
            self.average.swap(into_model=is_held)

    def on_validation_epoch_end(self) -> None:
        """Log the means of everything collected since the epoch began."""
        if self._is_sanity_check():
            return
        self._log_epoch(("train", "val", "test"))

    def on_train_epoch_end(self) -> None:
        """Log the training losses of an epoch without validation; adapt the learning rate before files are written."""
        if "train" in self.losses:
            self._log_epoch(("train",))
        self._step_plateau()

    def on_test_epoch_end(self) -> None:
        """Log the test errors."""
        self.log_dict(self._take_means("test"), sync_dist=True)

    def _log_epoch(self, stages: Sequence[str]) -> None:
        metrics = {"epoch": float(self.current_epoch)}
        optimizers = self.trainer.optimizers
        if optimizers:
            metrics["lr"] = float(optimizers[0].param_groups[0]["lr"])
        for stage in stages:
            metrics |= self._take_means(stage)
        self.epoch_metrics = metrics
        self.log_dict(metrics, sync_dist=True)

    def _take_means(self, stage: str) -> dict[str, float]:
        """Means over the epoch by column name, over all processes, and a fresh start for the next epoch."""
        leaves = [
            (term, name, mean)
            for term, by_name in self.losses.pop(stage, {}).items()
            for name, mean in by_name.items()
            if mean.total is not None
        ]
        errors = self.errors.pop(stage, ErrorSums()).sums
        if errors is not None:
            sums = self._sum_over_processes(errors).tolist()
            self.epoch_errors[stage] = Errors.from_sums(sums, self.targets)
        if not leaves:
            return {}
        totals = torch.stack([mean.total for *_, mean in leaves])  # type: ignore[arg-type]
        table = torch.stack([totals, totals.new_tensor([mean.weight for *_, mean in leaves])])  # (2, leaves)
        columns: dict[str, float] = {}
        for (term, name, _), total, weight in zip(leaves, *self._sum_over_processes(table).tolist(), strict=True):
            if not weight:  # no system had the label
                continue
            mean = total / weight
            columns[self._column(stage, term, name)] = mean
            column = f"{stage}_total_{name}"
            columns[column] = columns.get(column, 0.0) + self.term_weight[term] * mean
        return columns

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self._trainer is None:
            return values
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # type: ignore[return-value]

    def _largest_over_processes(self, values: Tensor) -> Tensor:
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        values = values.to(device=self.device, dtype=accumulator_dtype(self.device))
        return self.trainer.strategy.reduce(values, reduce_op="max")  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add, under our own key, the facts about the data and what an exact continuation needs."""
        _count_this_batch(checkpoint)
        if self.average is not None:
            averaged = {f"model.{name}": weight.detach() for name, weight in self.average.averaged.items()}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}
        to_cpu = _map_tensors(lambda value: value.detach().cpu().clone())
        checkpoint["torchmdnet"] = {
            "version": __version__,
            **self.provenance,
            "state": {
                "ema": to_cpu(self.ema),
                "train_losses": {
                    term: {name: mean.state_dict(self._sum_over_processes) for name, mean in by_name.items()}
                    for term, by_name in self.losses.get("train", {}).items()
                },
                "data_digest": self.data_digest,
                "plan": self.plan.state_dict(),
                "model_ema": None if self.average is None else self.average.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device).cpu() if self.device.type == "cuda" else None,
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up our own state; files without it, and of older layouts, load all the same."""
        stored = checkpoint["state_dict"]
        ours = {name: value for name, value in stored.items() if name.startswith("model.")}
        state, _ = migrate(ours, {**self.hparams, **_options_of(checkpoint)})
        state = fill_boxes(state, self.model)
        path = self.hparams.get("load_model") or "the checkpoint"
        check_weights(state, self.model.state_dict(), path)
        check_finite(checkpoint.get("optimizer_states"), "optimizer_states", path)
        state = {f"model.{name}": value for name, value in state.items()}
        checkpoint["state_dict"] = {**{name: stored[name] for name in stored.keys() - ours.keys()}, **state}
        extra = checkpoint.get("torchmdnet") or {}
        self._restored = extra.get("state") or {}
        facts = {key: value for key, value in extra.items() if key not in ("version", "state")}
        self.provenance = {**facts, **self.provenance}
        check_finite(self._restored.get("ema"), "ema", path)
        self.ema = _map_tensors(lambda value: value.to(self.device))(self._restored.get("ema", {}))
        raw = (self._restored.get("model_ema") or {}).get("weights")
        if raw is not None:
            check_weights({**self.model.state_dict(), **raw}, self.model.state_dict(), path)

    def on_train_start(self) -> None:
        """Continue inside an epoch and restore clock, average and random state of a resumed run."""
        state, self._restored = self._restored, {}
        epochs = math.inf if self.trainer.max_epochs in (None, -1) else self.trainer.max_epochs
        self.plan.begin(epochs * self.trainer.num_training_batches, state.get("plan"))
        if (self.plan.is_planned or self.plan.max_time is not None) and self.global_rank == 0:
            log.info("Learning rate: %s.", self.plan)
        if self.plan.is_over:
            self.trainer.should_stop = True
        self._begin_average(state.get("model_ema"))
        self._continued_epoch = self.current_epoch if state.get("train_losses") else None
        for term, by_name in state.get("train_losses", {}).items() if self.global_rank == 0 else ():
            for name, mean in by_name.items():
                means = self.losses.setdefault("train", {}).setdefault(term, {})
                means[name] = RunningMean.from_state(mean, self.device)
        if state.get("rng") is not None:
            torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _begin_average(self, state: Mapping[str, Any] | None) -> None:
        """Start an average of the weights, or go on with that of a checkpoint, whose weights the model now holds."""
        decay = float(value_of(self.hparams, "model_ema_decay"))
        self.average = WeightAverage(self.model, decay) if decay or state else None
        if self.average is None or not state:
            return
        self.average.resume(state)
        if not decay:
            self.average = None


def _loss(function: Callable[..., Tensor], prediction: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
    """A loss, of which only the one that is trained is weighted; of no rows at all it is zero."""
    if not label.shape[0]:
        return prediction.sum() * 0
    if weight is None or not isinstance(function, LossFunction):
        return function(prediction, label)
    return function(prediction, label, weight)


def with_defaults(hparams: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """A copy of the options with the missing training options filled in."""
    given = dict(vars(hparams)) if isinstance(hparams, Namespace) else dict(hparams)
    options = {**defaults_of("training", established=True), **given}
    options["precision"] = int(options["precision"])
    if options["precision"] not in OPTIONS["precision"].names:
        raise ConfigError(f"precision: {options['precision']} is not available. Choose from 32, 64.")
    return options


def _options_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return hyper_parameters_of(checkpoint) if checkpoint.get("hyper_parameters") else {}


def _count_this_batch(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint written in the last hook of a batch say that the batch is done, which Lightning notes later."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    for kind in ("total", "current"):
        if kind in progress:
            progress[kind]["completed"] = progress[kind]["processed"]
    if len(checkpoint.get("optimizer_states", ())) == 1 and "epoch_loop.state_dict" in loop:
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def _map_tensors(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return {key: apply(item) for key, item in value.items()}

    return apply
