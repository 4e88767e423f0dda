"""The potential a run leaves behind, as one file that says what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchmdnet._version import __version__
from torchmdnet.checkpoint import save_model
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.report import RunFacts

__all__ = ["FILE_NAME", "training_ranges", "write_potential"]

FILE_NAME = "potential.safetensors"


def write_potential(module: LNNP, facts: RunFacts, batches: Iterable[Any]) -> Path:
    """Write the weights a module holds as ``potential.safetensors``, with a card of the run.

    Args:
        module: Holds the best weights.
        facts: What is known of the run.
        batches: The training set, or an even choice of it, for the ranges it covers.

    Returns:
        The file.
    """
    path = facts.folder / FILE_NAME
    of_epoch = "" if facts.tested_epoch is None else f" of epoch {facts.tested_epoch}, counted from 0"
    training: dict[str, Any] = {
        "dataset": str(facts.options["dataset"]),
        "systems": {name: number for name, number in facts.splits.items() if number},
        **training_ranges(batches),
        "epochs": facts.num_epochs,
        "weights": f"{facts.tested}{of_epoch}",
    }
    if facts.evaluation is not None:
        errors = facts.evaluation.errors.table()
        training["errors"] = {
            "split": facts.evaluation.split,
            **{name: value for name, value in errors.items() if not math.isnan(value)},
        }
    if module.provenance.get("started_from"):
        training["started_from"] = module.provenance["started_from"]
    provenance = {**module.provenance, "trained_by": f"torchmd-net {__version__}", "training": training}
    save_model(module.model, path, hyper_parameters=dict(module.hparams), provenance=provenance)
    return path


def training_ranges(batches: Iterable[Any]) -> dict[str, Any]:
    """Smallest and largest of what a potential was shown; outside of it there is nothing it has learned.

    Returns:
        ``atoms`` of a system, ``energy_per_atom`` and ``largest_force`` where there are labels, ``total_charge`` and
        ``spin`` where they are given, each ``[smallest, largest]`` but the force, and whether systems are ``periodic``:
        none, some or all of them.
    """
    found: dict[str, tuple[float, float]] = {}
    boxes = [0, 0]  # systems with a lattice vector, and without

    def widen(name: str, values: torch.Tensor) -> None:
        values = values[values.isfinite()]
        if values.numel():
            low, high = found.get(name, (math.inf, -math.inf))
            found[name] = (min(low, float(values.min())), max(high, float(values.max())))

    for batch in batches:
        sizes = (batch.ptr[1:] - batch.ptr[:-1]).double()
        held = batch.to_dict()
        widen("atoms", sizes)
        if "y" in held and held["y"].numel() == sizes.numel():
            widen("energy_per_atom", held["y"].double().flatten() / sizes.clamp(min=1))
        if "neg_dy" in held:
            widen("largest_force", held["neg_dy"].double().norm(dim=-1))
        if "q" in held:
            widen("total_charge", held["q"].double())
        if "s" in held:
            widen("spin", held["s"].double())
        has_box = held["box"].reshape(-1, 9).any(dim=1) if "box" in held else torch.zeros(len(sizes), dtype=torch.bool)
        boxes[0] += int(has_box.sum())
        boxes[1] += int((~has_box).sum())
    return {**_plain(found), "periodic": "some" if all(boxes) else bool(boxes[0])}


def _plain(found: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    ranges: dict[str, Any] = {name: list(limits) for name, limits in found.items()}
    if "atoms" in ranges:
        ranges["atoms"] = [int(number) for number in ranges["atoms"]]
    if "largest_force" in ranges:
        ranges["largest_force"] = ranges["largest_force"][1]
    return ranges
