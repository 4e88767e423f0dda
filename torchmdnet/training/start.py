r"""Starting from a model that was trained before: what is taken from its file, and what the data of this run decide.

The network comes from the file: representation, heads, mean and standard deviation. What describes the data comes from
the data: reference energies, the other priors and the box. Reference energies are those of the file, shifted so that
the network and they together fit the new energies,

.. math:: e_k = e_k^\mathrm{file} + \Delta_k, \qquad
    \Delta = \arg\min_\Delta \sum_s \Big(y_s - \hat y_s - \sum_k n_{sk} \Delta_k\Big)^2

with :math:`\hat y_s` the prediction of the file's model for training system s, and :math:`n_{sk}` its atoms of element
k. Elements that the new data do not hold keep the energy of the file.

A run that is continued keeps everything, so the data must be those of the run.
"""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.build import representation_arguments
from torchmdnet.checkpoint import hyper_parameters_of, migrate, read_checkpoint
from torchmdnet.checkpoint.load import load_weights
from torchmdnet.config.reader import plain
from torchmdnet.data import DataModule
from torchmdnet.data.digest import differences
from torchmdnet.data.loader import collect
from torchmdnet.data.module import count_atoms
from torchmdnet.datasets.reference_energies import fit_energies
from torchmdnet.elements import symbols
from torchmdnet.errors import CheckpointError, ConfigError
from torchmdnet.models import ARCHITECTURES
from torchmdnet.options import OPTIONS
from torchmdnet.priors import named_priors
from torchmdnet.priors.atomref import Atomref, LearnableAtomref
from torchmdnet.training.callbacks import TOLD_IN_TIME
from torchmdnet.training.evaluate import SplitFacts
from torchmdnet.training.lightning import LNNP
from torchmdnet.units import normalise_unit

__all__ = [
    "Alignment",
    "Origin",
    "changed_settings",
    "check_continued",
    "check_same_data",
    "origin_of",
    "reference_prior",
    "refuse_size",
    "start_from",
    "tell_changes",
]

log = logging.getLogger(__name__)

#: Training systems whose energies are compared with the predictions of the file's model.
MAX_SYSTEMS = 500
#: Systems looked for that hold an element, so that rare ones count too.
PER_ELEMENT = 10
#: A shift of reference energies above this many times the spread of the energies means other data.
TOO_FAR = 10.0

#: Settings of the run rather than of the model, though constructors take them.
_NOT_COMPARED = {"box_vecs", "system_embedding", "static_shapes", "max_num_neighbors", "max_z", "output_charges"}

#: Settings that change what a network computes, but not the shapes of its weights.
_WITHOUT_SIZE = {"activation", "attn_activation", "aggr", "atom_filter", "charge", "cutoff_lower", "cutoff_upper",
                 "derivative", "max_num_neighbors", "radial", "reduce_op", "spin", "static_shapes",
                 "vector_cutoff"}  # fmt: skip


class Origin(NamedTuple):
    """What a file that training starts from says of itself."""

    path: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]  # units, elements, level_of_theory, references
    state: Mapping[str, Tensor]

    @property
    def table(self) -> Tensor | None:
        """Its energy of each element as the model adds it or the labels lack it, (max_z, 1), if it has any."""
        tables = [name for name in self.state if name.startswith("prior_model.") and name.endswith("atomref.weight")]
        return self.state[max(tables)] if tables else None


class Alignment(NamedTuple):
    """Energies of a file's model beside those of the new data, all per atom in the unit of the data."""

    before: float  # mean absolute error
    after: float  # the same with reference energies, or the mean, fitted to the data
    num_systems: int
    spread: float  # root mean square of what the energies of the elements leave of the labels


def origin_of(checkpoint: Mapping[str, Any], path: str | Path) -> Origin:
    """What the new data have to agree with in the content of a checkpoint or native file."""
    options = hyper_parameters_of(checkpoint, path) if checkpoint.get("hyper_parameters") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old layout is told when the weights are loaded
        state, options = migrate(checkpoint["state_dict"], options)
    facts = {key: value for key, value in (checkpoint.get("torchmdnet") or {}).items() if key != "state"}
    return Origin(str(path), options, facts, state)


def reference_prior(model: Any) -> Atomref | None:
    """The prior that holds the energies of the elements."""
    found = [prior for prior in model.prior_model or () if isinstance(prior, Atomref)]
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------------ a new training


def start_from(module: LNNP, path: str | Path, data: DataModule, args: Namespace) -> Alignment | None:
    """Give a new module the network of a file, and reference energies that fit it to the data.

    Args:
        module: Made for the data of this run; changed in place.
        path: A checkpoint or native file of the same architecture.
        data: The data of this run, after ``setup``.
        args: The settings of this run.

    Returns:
        The errors of the energies before and after; None where the data have no energies.

    Raises:
        ConfigError: If the data contradict the file in a way that cannot be mended here.
        CheckpointError: If the file cannot be used.
    """
    origin = origin_of(read_checkpoint(path), path)
    _check_units(origin, data.dataset)
    _warn_of_elements(origin, data)
    _compare_options(origin, args)
    load_weights(module.model, path, network_only=True)
    module.note_handedness()
    prior = reference_prior(module.model)
    if prior is not None:
        _set_table(prior, origin.table)
    alignment = _align(module, prior, data, shifts_mean=bool(args.standardize))
    module.data_transform = module.make_data_transform()
    return alignment


def _set_table(prior: Atomref, table: Tensor | None) -> None:
    """Start from the energies of the file; elements it does not know start from zero."""
    with torch.no_grad():
        start = torch.zeros_like(prior.initial_atomref)
        if table is not None:
            rows = min(len(table), len(start))
            start[:rows] = table.reshape(-1, 1)[:rows].to(start)
        prior.atomref.weight.copy_(start)
        if not isinstance(prior, LearnableAtomref):
            prior.initial_atomref.copy_(start)


def _align(module: LNNP, prior: Atomref | None, data: DataModule, *, shifts_mean: bool) -> Alignment | None:
    """Shift the energies of the elements, or else the mean, by what the predictions are off on average."""
    rows = _choose(data)
    compared = _compare(module, prior, data, rows)
    if compared is None:
        return None
    labels, predicted, counts = compared
    residual = labels - predicted
    atoms = np.maximum(counts.sum(axis=1), 1)
    before = float(np.abs(residual / atoms).mean())
    if prior is not None:
        elements = np.flatnonzero(counts.any(axis=0))
        shift = fit_energies(counts[:, elements], elements, residual)
        with torch.no_grad():
            for z, energy in shift.items():
                prior.atomref.weight[z] += energy
                if not isinstance(prior, LearnableAtomref):
                    prior.initial_atomref[z] = prior.atomref.weight[z]
        residual = residual - counts @ np.array([shift.get(z, 0.0) for z in range(counts.shape[1])])
    elif shifts_mean:
        with torch.no_grad():
            module.model.mean += float(residual.mean())
        residual = residual - residual.mean()
    elements = np.flatnonzero(counts.any(axis=0))
    table = fit_energies(counts[:, elements], elements, labels)
    rest = labels - counts[:, elements] @ np.array([table[z] for z in elements.tolist()])
    spread = float(np.sqrt(np.mean((rest / atoms) ** 2)))
    return Alignment(before, float(np.abs(residual / atoms).mean()), len(residual), spread)


def _choose(data: DataModule) -> np.ndarray:
    """Training samples, evenly chosen, with some of every element."""
    rows = data.idx_train.numpy()
    chosen = rows if len(rows) <= MAX_SYSTEMS else rows[np.linspace(0, len(rows) - 1, MAX_SYSTEMS).astype(np.int64)]
    frames: Any = getattr(data.dataset, "frames", None)
    if len(chosen) == len(rows) or not hasattr(frames, "composition"):
        return chosen
    counts, _ = frames.composition(rows)
    rare = [rows[np.flatnonzero(column)[:PER_ELEMENT]] for column in counts.T]
    return np.unique(np.concatenate([chosen, *rare]))


def _compare(
    module: LNNP, prior: Atomref | None, data: DataModule, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Labels and predictions of total energies, (S,), and the atoms of each element, (S, Z); None without labels."""
    model = module.model
    had_forces, was_training = model.derivative, module.training
    size = int(data.options["inference_batch_size"] or data.options["batch_size"])
    labels, predictions, counts = [], [], []
    module.eval()
    model.derivative = False
    try:
        with torch.no_grad():
            for first in range(0, len(rows), size):
                batch: Any = collect(data.dataset, rows[first : first + size])
                if "y" not in batch:
                    return None
                number = int(batch.num_graphs)
                label = batch.y.double().reshape(number, -1)[:, 0].clone()  # (S,), before anything is taken off
                atoms = count_atoms(batch)
                predicted = module.predict_step(batch)[0].double().reshape(number, -1)[:, 0]
                if prior is not None and not prior.enable:  # the model leaves out what the labels hold
                    energies = prior.initial_atomref.double().flatten()
                    predicted = predicted + torch.from_numpy(atoms[:, : len(energies)]).double() @ energies
                labels.append(label.numpy())
                predictions.append(predicted.numpy())
                counts.append(atoms)
    finally:
        model.derivative = had_forces
        module.train(was_training)
    label, predicted, composition = (np.concatenate(parts) for parts in (labels, predictions, counts))
    fine = np.isfinite(label) & np.isfinite(predicted)
    return (label[fine], predicted[fine], composition[fine]) if fine.any() else None


# ------------------------------------------------------------------------------------------------ contradictions


def _check_units(origin: Origin, dataset: Any) -> None:
    """Refuse data in other units than the network predicts.

    Raises:
        ConfigError: Naming both.
    """
    stated = origin.facts.get("units") or {}
    for kind in ("energy", "length"):
        before, now = stated.get(kind), getattr(dataset, f"{kind}_unit", None)
        if before and now and _unit(before, kind) != _unit(now, kind):
            raise ConfigError(
                f"{origin.path} was trained on data with {kind} in {before}, but these data have {kind} in {now}. "
                f"Convert the data to {before}; if the file states it wrongly, state it with `torchmd-net convert "
                f"{origin.path} NEW --units`."
            )


def _unit(unit: str, kind: str) -> str:
    try:
        return normalise_unit(unit, kind)
    except ConfigError:
        return unit


def _warn_of_elements(origin: Origin, data: DataModule) -> None:
    known = set(origin.facts.get("elements") or ())
    new = sorted(set(data.elements("train")) - known) if known else []
    if new:
        log.warning(
            "%s was not trained on %s, which the data hold: what the network knows of %s starts from nothing.",
            origin.path, symbols(new), "it" if len(new) == 1 else "them",
        )  # fmt: skip


def _compare_options(origin: Origin, args: Namespace) -> None:
    """Warn of settings of the model that weights of the same shape were not trained with."""
    options, run = origin.options, vars(args)
    for key in sorted(_shaping(args.model) & options.keys() & run.keys()):
        if options[key] != run[key]:
            log.warning(
                "%s: %s was trained with %r and is trained on with %r; the network computes something else.",
                key, origin.path, options[key], run[key],
            )  # fmt: skip
    if _box(options.get("box_vecs")) != _box(run.get("box_vecs")):
        log.warning(
            "box_vecs: %s has %s; this run has %s.",
            origin.path, options.get("box_vecs") or "no box", run.get("box_vecs") or "none",
        )  # fmt: skip
    before, now = (_other_priors(prior) for prior in (options.get("prior_model"), run.get("prior_model")))
    if options and before != now:
        log.warning(
            "prior_model: %s was trained beside %s, this run has %s; the network has to learn the difference.",
            origin.path, ", ".join(before) or "none", ", ".join(now) or "none",
        )  # fmt: skip


def changed_settings(origin: Origin, args: Namespace) -> dict[str, tuple[Any, Any]]:
    """Settings of the network, the loss and the steps that a run that is continued had otherwise: before, and now."""
    run = vars(args)
    kept = {key for key, option in OPTIONS.items() if option.group in ("Architecture", "Optimisation")}
    kept |= {"batch_size", "precision", "remove_ref_energy", "standardize"} | _shaping(args.model)
    changes = {}
    for key in sorted(kept & run.keys() - {"prior_model", "prior_args", "box_vecs", "system_embedding"}):
        if key in origin.options:
            before = origin.options[key]
        elif origin.options and key in OPTIONS and not OPTIONS[key].established:
            before = OPTIONS[key].default  # files leave such settings out where they have their default
        else:
            continue
        if plain(before) != plain(run[key]):
            changes[key] = (before, run[key])
    return changes


def tell_changes(changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Log what is otherwise from here on, but for what tells so itself when it takes effect."""
    for key, (before, now) in changes.items():
        if key not in TOLD_IN_TIME:
            log.warning("%s: %r from now on (the checkpoint had %r).", key, now, before)


def refuse_size(changes: Mapping[str, tuple[Any, Any]], path: str, error: CheckpointError) -> ConfigError | None:
    """The error that names the settings which made weights not fit, if any did."""
    sizes = {
        key: change
        for key, change in changes.items()
        if key in OPTIONS and OPTIONS[key].group == "Architecture" and key not in _WITHOUT_SIZE
    }
    if not sizes:
        return None
    told = "; ".join(f"{key}: {now!r}, but the run of {path} had {before!r}" for key, (before, now) in sizes.items())
    fix = " ".join(f"{key}: {before!r}" for key, (before, _) in sizes.items())
    return ConfigError(
        f"{told}. Its weights do not fit another network. Continue with {fix}, or train a new network without "
        f"--load-model. ({error})"
    )


def _shaping(model: str) -> set[str]:
    return set(representation_arguments(ARCHITECTURES[model])) - _NOT_COMPARED | {"charge", "spin", "reduce_op"}


def _other_priors(prior_model: Any) -> list[str]:
    return [name for name, _ in named_priors(prior_model) if name not in ("Atomref", "LearnableAtomref")]


def _box(box: Any) -> list[list[float]] | None:
    return None if box is None or not np.any(box) else np.asarray(box, dtype=np.float64).tolist()


def check_same_data(before: Mapping[str, Any] | None, data: DataModule, args: Namespace) -> None:
    """See that the systems of a run that is continued, their labels and their order are those it began with.

    Args:
        before: The digest in its checkpoint; None in files of earlier versions, which are not compared.
        data: The data of this run; they need not be divided yet.
        args: The settings.

    Raises:
        ConfigError: Saying what differs, unless ``accept_changed_data`` is set.
    """
    changed = differences(before, data.digest()) if before else ""
    if changed and args.accept_changed_data:
        log.warning("accept_changed_data: the run of %s goes on with other data: %s.", args.load_model, changed)
    elif changed:
        raise ConfigError(
            f"load_model: the data are no longer those of the run of {args.load_model}: {changed}. Systems that were "
            "trained on could become test systems. Restore the data, or continue all the same with "
            "--accept-changed-data. To train its network on other data, use --load-weights."
        )


def check_continued(origin: Origin, data: DataModule, args: Namespace, table: Tensor | None, facts: SplitFacts) -> None:
    """See that the data of a run that is continued are still those of the run.

    Args:
        origin: The checkpoint.
        data: The data, after ``setup``.
        args: The settings.
        table: Energies of the elements that the data ask for, (max_z, 1).
        facts: What is known of the training set.

    Raises:
        ConfigError: Naming what the checkpoint and the data disagree in.
    """
    _check_units(origin, data.dataset)
    _warn_of_elements(origin, data)
    advice = "To train its network on other data, use --load-weights, or --reset-trainer beside --load-model."
    before, now = origin.facts.get("level_of_theory"), getattr(data.dataset, "level_of_theory", None)
    if before and now and before != now:
        raise ConfigError(
            f"load_model: {origin.path} was trained on {before}, but these data are {now}. A run continues on its own "
            f"data. {advice}"
        )
    run = vars(args)
    for key in ("charge", "spin"):
        if key in origin.options and bool(origin.options[key]) != bool(run[key]):
            raise ConfigError(
                f"{key}: {str(run[key]).lower()}, but the run of {origin.path} had {str(origin.options[key]).lower()}. "
                f"A run continues with the inputs it had. {advice}"
            )
    if "box_vecs" in origin.options and _box(origin.options["box_vecs"]) != _box(run.get("box_vecs")):
        raise ConfigError(
            f"box_vecs: {run.get('box_vecs')}, but the run of {origin.path} had {origin.options['box_vecs']}. {advice}"
        )
    _check_energies(origin, data, table, facts, advice)


def _check_energies(origin: Origin, data: DataModule, table: Tensor | None, facts: SplitFacts, advice: str) -> None:
    """Refuse energies that lie elsewhere than those the reference energies or the mean of a checkpoint are for."""
    if facts.y is None:
        return
    counts, y, atoms = facts.counts, facts.y, np.maximum(facts.atoms, 1)
    elements = np.asarray(facts.elements)
    fit = fit_energies(counts[:, elements], elements, y)
    rest = y - counts @ np.array([fit.get(z, 0.0) for z in range(counts.shape[1])])
    spread = float(np.sqrt(np.mean((rest / atoms) ** 2))) + 1e-6 * float(np.abs(y / atoms).max())
    unit = getattr(data.dataset, "energy_unit", None) or "energy unit"
    if table is not None and origin.table is not None:
        difference = np.zeros(counts.shape[1])
        old, new = origin.table.double().flatten().numpy(), table.double().flatten().numpy()
        difference[: len(old)] += old
        difference[: len(new)] -= new
        shift = float(np.abs(counts @ difference / atoms).mean())
        what = "reference energies"
    elif data.mean is not None and "mean" in origin.state:
        shift = float(np.abs(float(origin.state["mean"]) - float(data.mean)) / atoms.mean())
        what = "mean energy"
    else:
        return
    if shift > TOO_FAR * spread:
        raise ConfigError(
            f"load_model: the {what} in {origin.path} are {shift:.4g} {unit}/atom off these data, whose energies vary "
            f"by {spread:.2g} {unit}/atom: these are other data. A run continues on its own data. {advice}"
        )
