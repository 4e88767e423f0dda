"""Options that must fit together, looked at before any work is done."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torchmdnet.config.rundir import other_checkpoint
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.files import not_a_file
from torchmdnet.heads import HEADS, named_head
from torchmdnet.limits import check_range, is_small
from torchmdnet.options import OPTIONS
from torchmdnet.priors import PRIORS, named_priors

if TYPE_CHECKING:
    from torchmdnet.config.settings import Settings

__all__ = ["check"]

logger = logging.getLogger(__name__)

_MONITORS = ("early_stopping_monitor", "checkpoint_monitor")


def check(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse combinations that cannot work; adapt, with a notice, what plainly follows from another option.

    Args:
        args: The merged settings. Monitors and ``lr_metric`` may be changed.
        settings: Where they come from.

    Raises:
        ConfigError: With the keys, their values, and what to change.
    """
    for look in _CHECKS:
        look(args, settings)


def _data_set(args: argparse.Namespace, settings: Settings) -> None:
    from torchmdnet.datasets import DATASETS

    if args.dataset is None:
        raise ConfigError(
            "dataset is not given. Say where the reference data come from, e.g. '--dataset TinyQM' or a line "
            f"'dataset: TinyQM' in the file of --conf. Choose from {', '.join(DATASETS)}."
        )
    if args.dataset == "Custom":
        missing = [key for key in ("coord_files", "embed_files") if not getattr(args, key)]
        if not (args.energy_files or args.force_files or args.properties):
            missing.append("energy_files or force_files")
        if missing:
            raise ConfigError(f"dataset Custom needs {', '.join(missing)}: globs of .npy files.")


def _input_files(args: argparse.Namespace, settings: Settings) -> None:
    if args.load_model and args.load_weights:
        logger.warning("load_weights=%r is not used: the weights come from load_model.", args.load_weights)
        args.load_weights = None
    if args.reset_trainer and not args.load_model:
        logger.warning("reset_trainer has no effect without load_model.")
    if args.accept_changed_data and not (args.load_model or args.splits):
        logger.warning("accept_changed_data has no effect without load_model or splits.")
    for key in ("load_model", "load_weights", "splits"):
        name = getattr(args, key)
        if name is None or (key == "splits" and name in ("dataset", "random")):
            continue
        wrong = not_a_file(name)
        if wrong is None:
            continue
        hint = (
            "" if key != "splits" else " Give an .npz file, the word 'dataset' for the split it publishes, or 'random'."
        )
        hint = hint or other_checkpoint(name)
        raise ConfigError(f"{_place(settings, key)}: {wrong}{hint}")
    if args.overwrite and args.load_model and args.log_dir and Path(args.load_model).parent == Path(args.log_dir):
        raise ConfigError(
            f"overwrite would delete {args.load_model!r}, which the run continues from. Leave overwrite out, or choose "
            "another log_dir."
        )


def _place(settings: Settings, key: str) -> str:
    """Where an option was written, with its name if that is not part of it."""
    source = settings.source(key)
    return source if source == OPTIONS[key].flag else f"{source}: {key}"


def _sizes(args: argparse.Namespace, settings: Settings) -> None:
    if args.split_gap and args.split_by != "time":
        raise ConfigError(
            f"{settings.source('split_gap')}: split_gap={args.split_gap} is for blocks of time. Set split_by: time, or "
            "leave it out."
        )
    if args.splits not in (None, "random"):
        return
    sizes = {key: getattr(args, key) for key in ("train_size", "val_size", "test_size")}
    for key, size in sizes.items():
        if isinstance(size, float) and size > 1:
            is_whole = size.is_integer()
            count = f"Write {size:.0f} for a count of samples, or " if is_whole else "A count is a whole number, and "
            raise ConfigError(
                f"{settings.source(key)}: {key}={size} is a fraction above 1. {count}"
                f"a fraction {'' if is_whole else 'lies '}between 0 and 1."
            )
    if list(sizes.values()).count(None) > 1:
        open_ends = " and ".join(key for key, size in sizes.items() if size is None)
        raise ConfigError(f"{open_ends} are both None, and only one can take the rest. Give the others a size.")
    fractions = [size for size in sizes.values() if isinstance(size, float)]
    if sum(fractions) > 1 + 1e-6:
        raise ConfigError(
            f"train_size={args.train_size}, val_size={args.val_size} and test_size={args.test_size} are more than the "
            f"whole ({sum(fractions):g}). Make one smaller, or None for the rest."
        )
    if args.train_size is not None and args.train_size == 0:
        raise ConfigError(f"{settings.source('train_size')}: train_size=0 leaves nothing to train on.")


def _loss(args: argparse.Namespace, settings: Settings) -> None:
    from torchmdnet.losses import LOSSES, LossFunction

    loss = LossFunction(LOSSES[args.train_loss], args.train_loss_arg)
    if args.train_loss_arg or ":" in args.train_loss:
        loss.check()
    if args.stress_weight > 0 and not args.derivative:
        raise ConfigError(
            f"{settings.source('stress_weight')}: stress_weight={args.stress_weight:g} needs derivative: the stress is "
            "the derivative of the energy with respect to strain. Set derivative, or stress_weight to 0."
        )
    has_others = args.stress_weight > 0 or _trains_properties(args)
    if args.y_weight == 0 and (args.neg_dy_weight == 0 or not args.derivative) and not has_others:
        why = "neg_dy_weight=0" if args.neg_dy_weight == 0 else "derivative=False, which leaves no forces"
        raise ConfigError(f"y_weight=0 and {why}: there is nothing to train on. Raise a weight, or set derivative.")
    reduce_op = named_head(args.output_model)[1].get("reduce_op", args.reduce_op)
    if args.y_loss_per_atom and reduce_op not in ("add", "sum"):
        raise ConfigError(
            f"{settings.source('y_loss_per_atom')}: y_loss_per_atom=True divides y by the number of atoms, but with "
            f"reduce_op={reduce_op} y is a mean over atoms already. Set y_loss_per_atom to false, or reduce_op to "
            "add."
        )
    default = OPTIONS["neg_dy_weight"].default
    if "neg_dy_weight" in settings and args.neg_dy_weight not in (0, default) and not args.derivative:
        logger.warning(
            "%s: neg_dy_weight=%g has no effect, because derivative is off and no forces are predicted. Set derivative "
            "to train on forces.",
            settings.source("neg_dy_weight"), args.neg_dy_weight,
        )  # fmt: skip


def _trains_properties(args: argparse.Namespace) -> bool:
    """Whether any of ``properties`` has a weight; refuses what cannot be understood."""
    if not args.properties:
        return False
    from torchmdnet.losses import LOSSES
    from torchmdnet.properties import property_specs

    specs = property_specs({"properties": args.properties}).values()
    for spec in specs:
        if spec.loss is not None:
            try:
                LOSSES[spec.loss]
            except ConfigError as error:
                words = str(error).replace("train_loss:", "loss:", 1)
                raise ConfigError(f"properties: {spec.name}: {words}") from error
    return any(spec.weight > 0 for spec in specs)


def _scaling(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse a mean and a standard deviation for heads whose output is no sum of numbers."""
    if not args.standardize:
        return
    from torchmdnet.heads.named import head_for
    from torchmdnet.models import ARCHITECTURES

    name, _ = named_head(args.output_model)
    head = head_for(ARCHITECTURES[args.model], name)
    if not getattr(head, "can_standardize", True):
        raise ConfigError(
            f"{settings.source('standardize')}: standardize=True: output_model {name!r} predicts vectors, "
            "or a length of one, to which a mean cannot be added. Set standardize to false."
        )


def _is_given(key: str, args: argparse.Namespace, settings: Settings) -> bool:
    """Whether an option was chosen for this run: ``input.yaml`` and saved settings hold the defaults of all others."""
    if "load_model" in settings.flags:
        return key in settings.flags
    return key in settings.flags or (key in settings and getattr(args, key) != OPTIONS[key].default)


#: Options of the plateau schedule.
_OF_PLATEAU = ("lr_patience", "lr_factor", "lr_min", "lr_metric")


def _schedule(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse options that the learning rate does not follow; a planned run is not stopped early unless asked to."""
    schedule, is_planned = args.lr_schedule, args.lr_schedule != "plateau"
    for key in _OF_PLATEAU if is_planned else ():
        if _is_given(key, args, settings):
            raise ConfigError(
                f"{settings.source(key)}: {key}={getattr(args, key)} belongs to lr_schedule=plateau; with "
                f"lr_schedule={schedule} the learning rate falls to 0 over the run. Leave {key} out, or set "
                "lr_schedule to plateau."
            )
    if schedule != "warmup-stable-decay" and _is_given("lr_decay_fraction", args, settings):
        raise ConfigError(
            f"{settings.source('lr_decay_fraction')}: lr_decay_fraction={args.lr_decay_fraction:g} belongs to "
            f"lr_schedule=warmup-stable-decay, but lr_schedule is {schedule}. Leave lr_decay_fraction out, or set "
            "lr_schedule to warmup-stable-decay."
        )
    if is_planned and args.num_epochs < 0 and args.max_time is None:
        raise ConfigError(
            f"lr_schedule={schedule} falls to 0 at the end of the run, but num_epochs={args.num_epochs} has no end. "
            "Give num_epochs, or max_time."
        )
    if "weight_decay_on" in settings and args.weight_decay_on != "all" and args.weight_decay == 0:
        logger.warning(
            "%s: weight_decay_on=%s has no effect, because weight_decay is 0.",
            settings.source("weight_decay_on"), args.weight_decay_on,
        )  # fmt: skip
    if not is_planned or args.early_stopping_monitor is None:
        return
    stopping = [key for key in ("early_stopping_patience", "early_stopping_monitor") if _is_given(key, args, settings)]
    if stopping or "load_model" in settings.flags:
        logger.warning(
            "%s: early stopping may end the run before lr_schedule=%s has brought the learning rate to 0; "
            "early_stopping_monitor: null turns it off.",
            settings.source((*stopping, "early_stopping_monitor")[0]), schedule,
        )  # fmt: skip
    else:
        args.early_stopping_monitor = None


def _monitors(args: argparse.Namespace, settings: Settings) -> None:
    """Follow the loss that is trained, and the training set where there is no other."""
    from torchmdnet.losses import loss_name

    loss = loss_name(args.train_loss)
    known = [f"train_total_{loss}", f"val_total_{loss}", "val_total_l1_loss"]
    for key in _MONITORS:
        monitor = getattr(args, key)
        if monitor is None or monitor in known:
            continue
        match = re.fullmatch(r"(train|val)_total_(mse_loss|l1_loss|huber_loss)", monitor)
        if match and (key not in settings or match[2] == "mse_loss"):
            follow = f"{match[1]}_total_{loss}"
            if key in settings:
                logger.warning(
                    "%s: %s=%s is never logged with train_loss=%s; %s is used.",
                    settings.source(key), key, monitor, args.train_loss, follow,
                )  # fmt: skip
            setattr(args, key, follow)
            continue
        raise ConfigError(
            f"{settings.source(key)}: {key}: {monitor!r} is never logged with train_loss={args.train_loss}."
            f"{did_you_mean(monitor, known)} Choose from {', '.join(dict.fromkeys(known))}, or leave it out."
        )
    if args.splits in (None, "random") and args.val_size == 0:
        changed = []
        for key in _MONITORS:
            monitor = getattr(args, key)
            if monitor is not None and monitor.startswith("val_"):
                setattr(args, key, f"train_total_{loss}")
                changed.append(f"{key}=train_total_{loss}")
        if args.lr_metric == "val" and args.lr_schedule == "plateau":
            args.lr_metric = "train"
            changed.append("lr_metric=train")
        if changed:
            logger.warning("val_size is 0, so the training loss is followed: %s.", ", ".join(changed))


def _architecture(args: argparse.Namespace, settings: Settings) -> None:
    if args.atom_filter > -1 and args.derivative:
        raise ConfigError(
            f"atom_filter={args.atom_filter} cannot be combined with derivative: forces need every atom. Set "
            "atom_filter to -1, or derivative to false."
        )
    if args.atom_filter >= args.max_z - 1:
        raise ConfigError(
            f"{settings.source('atom_filter')}: atom_filter={args.atom_filter} hides every atom: atomic numbers are "
            f"below max_z={args.max_z}. Make it smaller than the atomic number of the heaviest atom of every system."
        )
    check_range(args.cutoff_lower, args.cutoff_upper)
    if args.model in ("transformer", "equivariant-transformer") and args.embedding_dimension % args.num_heads:
        raise ConfigError(
            f"embedding_dimension={args.embedding_dimension} cannot be shared evenly by num_heads={args.num_heads}. "
            "Make it a multiple."
        )
    if args.ngpus == 0:
        raise ConfigError("ngpus=0 leaves nothing to run on. Use -1: every GPU, or one process on a machine without.")


def _size(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse a model that does not fit into memory, and settings that an architecture from outside lacks."""
    if is_small(vars(args)) and ":" not in args.model:
        return
    from torchmdnet.build import check_size

    check_size(vars(args), copies=4)


def _charge_and_spin(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse a charge or spin that the model would be given and not use, or would use and not be given."""
    if not (args.charge or args.spin) and args.system_embedding in (None, "auto", "none"):
        return
    from torchmdnet.build import reads_charge, representation_arguments, system_embedding_of
    from torchmdnet.models import ARCHITECTURES

    architecture = ARCHITECTURES[args.model]
    if args.load_model or "system_embedding" not in representation_arguments(architecture):
        return
    kind = system_embedding_of(architecture, vars(args))
    embedded = kind.split("+")
    for option in ("charge", "spin"):
        if option in embedded and not getattr(args, option):
            raise ConfigError(
                f"{settings.source('system_embedding')}: system_embedding={kind} embeds the {option}, but {option} is "
                f"false, so none is given to the model. Set {option}: true, or system_embedding: auto."
            )
    charge_is_read = (
        reads_charge(architecture, vars(args)) or args.properties or named_head(args.output_model)[0] != "Scalar"
    )
    for option, is_read in (("charge", charge_is_read), ("spin", False)):
        if getattr(args, option) and not (is_read or option in embedded):
            raise ConfigError(
                f"{settings.source(option)}: {option}=True has no effect on {args.model} with system_embedding={kind}. "
                f"Set system_embedding: auto, or {option}: false."
            )


def _arguments_of_priors(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse arguments that no data make right."""
    if not args.prior_model:
        return
    from torchmdnet.priors.named import check_priors

    try:
        check_priors(args.prior_model)
    except ConfigError as error:
        raise ConfigError(f"{settings.source('prior_model')}: {error}") from error


def _arguments_of_the_head(args: argparse.Namespace, settings: Settings) -> None:
    """Refuse arguments that the head does not take, and those that contradict an option."""
    name, arguments = named_head(args.output_model)
    if not arguments:
        return
    from torchmdnet.build import check_head
    from torchmdnet.heads.named import head_for, option_behind
    from torchmdnet.models import ARCHITECTURES

    source = settings.source("output_model")
    try:
        check_head(vars(args))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    head = head_for(ARCHITECTURES[args.model], name)
    for argument, value in arguments.items():
        key = option_behind(head, argument)
        if key is not None and key in settings and getattr(args, key) not in (OPTIONS[key].default, value):
            raise ConfigError(
                f"{source}: output_model: {name}: {argument}={value!r} contradicts {key}={getattr(args, key)!r} "
                f"({settings.source(key)}). Leave one of them out."
            )


def _priors(args: argparse.Namespace, settings: Settings) -> None:
    if not args.remove_ref_energy:
        return
    for name, arguments in named_priors(args.prior_model):
        if name in ("Atomref", "LearnableAtomref") and arguments.get("enable", True):
            raise ConfigError(
                f"remove_ref_energy and prior_model: {name} both take the elements' reference energies out of the "
                f"labels, so the model would count them twice. Keep remove_ref_energy (the model learns the rest and "
                f"can add them back), or {name}, not both."
            )


def _trackers(args: argparse.Namespace, settings: Settings) -> None:
    for key, packages in (("wandb_use", ("wandb",)), ("tensorboard_use", ("tensorboard", "tensorboardX"))):
        if getattr(args, key) and not any(map(_is_installed, packages)):
            raise ConfigError(
                f"{settings.source(key)}: {key} is on, but {packages[0]} is not installed. Run 'pip install "
                f"{packages[0]}', or set {key} to false."
            )


def _is_installed(package: str) -> bool:
    """A folder that happens to have the name, such as an earlier run's output, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _addresses(args: argparse.Namespace, settings: Settings) -> None:
    """Find ``my_package.module:Class`` now rather than after the data have been read."""
    from torchmdnet.datasets import DATASETS
    from torchmdnet.models import ARCHITECTURES

    used = [(DATASETS, args.dataset), (ARCHITECTURES, args.model), (HEADS, named_head(args.output_model)[0])]
    used += [(PRIORS, name) for name, _ in named_priors(args.prior_model)]
    for catalogue, name in used:
        if ":" in name:
            _ = catalogue[name]


_CHECKS: tuple[Callable[[argparse.Namespace, Settings], None], ...] = (
    _data_set,
    _input_files,
    _sizes,
    _loss,
    _scaling,
    _schedule,
    _monitors,
    _architecture,
    _charge_and_spin,
    _priors,
    _trackers,
    _addresses,
    _arguments_of_priors,
    _arguments_of_the_head,
    _size,
)
