"""What is settled before a run trains: its options, data, checkpoint to continue from, and model."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import numpy as np

from torchmdnet.checkpoint import hyper_parameters_of, read_checkpoint
from torchmdnet.checkpoint.migrations import has_old_tensor_layout
from torchmdnet.config.launcher import check_launcher
from torchmdnet.config.rundir import is_main_process
from torchmdnet.config.settings import hyper_parameters
from torchmdnet.data import DataModule
from torchmdnet.datasets.labels import LARGEST_LABEL, too_large
from torchmdnet.elements import symbols
from torchmdnet.errors import CheckpointError, ConfigError, DataError
from torchmdnet.options import value_of
from torchmdnet.priors.atomref import Atomref
from torchmdnet.priors.named import create_prior_models
from torchmdnet.training.evaluate import SplitFacts, read_batches
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.reach import SYSTEMS, check_reach, reach_of
from torchmdnet.training.start import (
    TOO_FAR,
    Alignment,
    changed_settings,
    check_continued,
    origin_of,
    reference_prior,
    refuse_size,
    start_from,
    tell_changes,
)
from torchmdnet.training.terminal import Units

__all__ = [
    "Resumed",
    "check_data",
    "check_options",
    "checkpoint_to_continue",
    "look_at_cutoffs",
    "make_module",
    "provenance_of",
    "references_of",
    "tell_references",
]

log = logging.getLogger(__name__)


def check_options(args: Namespace) -> None:
    check_launcher(int(args.num_nodes))
    if args.precision == 16:
        raise ConfigError(
            "precision: 16 cannot train a potential: distances and the second derivatives behind force training need "
            "at least 32 bits. Use 32, or 64 for double precision."
        )
    if args.dataset is None:
        raise ConfigError("dataset: none is given. Name one, e.g. dataset: TinyQM.")


def check_data(args: Namespace, data: DataModule, facts: SplitFacts | None) -> None:
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
    hidden = np.flatnonzero(~facts.counts[:, max(0, args.atom_filter + 1) :].any(axis=1) & facts.counts.any(axis=1))
    if len(hidden):
        heaviest = int(np.flatnonzero(facts.counts[hidden[0]])[-1])
        raise ConfigError(
            f"atom_filter: {args.atom_filter} leaves no atom of {len(hidden):,} of {len(facts.counts):,} training "
            f"systems, e.g. of one whose heaviest atom has atomic number {heaviest}. Set it below the atomic number of "
            "the heaviest atom of every system."
        )


def look_at_cutoffs(args: Namespace, data: DataModule) -> None:
    """Compare the cutoffs with the first training systems; the first process alone says what is odd."""
    cutoffs = float(args.cutoff_lower), float(args.cutoff_upper)
    batch = next(iter(read_batches(data.dataset, data.idx_train, size=SYSTEMS)))
    reach = reach_of(batch, *cutoffs, int(args.embedding_dimension))
    if reach is not None and is_main_process():
        check_reach(reach, *cutoffs)


class Resumed:
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


def checkpoint_to_continue(args: Namespace) -> Resumed | None:
    """The checkpoint whose optimizer and counters are taken up, if any."""
    if not args.load_model or args.reset_trainer:
        return None
    checkpoint = read_checkpoint(args.load_model)
    if not checkpoint.get("optimizer_states") or "loops" not in checkpoint:
        raise CheckpointError(
            f"load_model: {args.load_model} holds weights but no optimizer state, so training cannot continue where it "
            "stopped. Add --reset-trainer to start a new training from these weights."
        )
    resumed = Resumed(checkpoint, args.load_model)
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
    decayed = value_of(resumed.options, "weight_decay_on")
    if decayed != args.weight_decay_on:
        raise ConfigError(
            f"weight_decay_on: {args.weight_decay_on!r}, but the run of {args.load_model} had {decayed!r}, and its "
            f"optimizer state is ordered by it. Continue with --weight-decay-on {decayed}; --reset-trainer starts a "
            "new training from its weights."
        )
    state = {key.removeprefix("model."): None for key in checkpoint["state_dict"]}
    if has_old_tensor_layout(state, resumed.options):  # type: ignore[arg-type]
        raise CheckpointError(
            f"load_model: {args.load_model} is in the tensor layout of releases before 3.0. Its weights can be used, "
            "but not its optimizer state. Add --reset-trainer to start a new training from these weights."
        )
    return resumed


def make_module(
    args: Namespace, data: DataModule, resumed: Resumed | None, facts: SplitFacts
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


def provenance_of(data: DataModule) -> dict[str, Any]:
    """Facts about the data that a checkpoint keeps."""
    dataset = data.dataset
    return {
        "units": {"energy": getattr(dataset, "energy_unit", None), "length": getattr(dataset, "length_unit", None)},
        "level_of_theory": getattr(dataset, "level_of_theory", None),
        "citation": getattr(dataset, "citation", None),
        "elements": data.elements("train"),
    }


def references_of(
    module: LNNP, data: DataModule, args: Namespace, resumed: Resumed | None, alignment: Alignment | None
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


def tell_references(module: LNNP, units: Units, alignment: Alignment | None, args: Namespace) -> None:
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
