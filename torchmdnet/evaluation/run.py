"""An evaluation from models and data to what was found."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from torchmdnet.calculators.loading import members_of, trained_with, unseen_elements, unseen_states
from torchmdnet.data.labels import targets_of
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.evaluation.data import References, files_of, named_of, part_of
from torchmdnet.evaluation.errors import compare
from torchmdnet.evaluation.predict import Model, open_model, predict_all
from torchmdnet.evaluation.report import Result, summary_of, write_all

__all__ = ["Request", "evaluate", "notes_of", "short_names"]

log = logging.getLogger(__name__)

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclasses.dataclass
class Request:
    """What to compare.

    Args:
        models: Model files.
        files: Files with structures and labels; or a data set by name:
        dataset: Name of its class.
        dataset_root: Its folder or files.
        dataset_arg: Arguments of the class.
        part: ``train``, ``val`` or ``test``; None for all.
        splits: The ``splits.npz`` of a training run that says which structures these are.
        most: Compare this many structures, evenly chosen.
        device: Where to compute.
        dtype: ``float32`` or ``float64``.
        units: Of the models, where their files do not state them.
        allow_unseen: Whether to go on with elements, charges and spins that a model was not trained on.
    """

    models: Sequence[str]
    files: Sequence[str] = ()
    dataset: str | None = None
    dataset_root: str | None = None
    dataset_arg: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str | None = None
    splits: str | None = None
    most: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    units: str | None = None
    allow_unseen: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("eval: no model is given. Name a file that ends in .safetensors, .ckpt or .zip.")
        if bool(self.files) == bool(self.dataset):
            given = "files and a data set are given" if self.files else "no data are given"
            raise ConfigError(f"eval: {given}. Name files of structures with labels, or --dataset: one of the two.")
        if not isinstance(self.dataset_arg, Mapping):
            raise ConfigError(
                f"--dataset-arg: {self.dataset_arg!r} should be a mapping. Write '{{energy_unit: Hartree}}'."
            )
        if self.splits and not self.part:
            raise ConfigError("--splits says which parts there are. Name one with --split train, val or test.")
        here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        if self.device.partition(":")[0] not in here:
            raise ConfigError(f"--device: {self.device!r} is not available. Choose from {', '.join(here)}.")

    def open(self) -> tuple[list[Model], References, dict[str, str]]:
        """The models, the data, and for each property that is compared the name of its label.

        Raises:
            ConfigError: If a model was not trained on the elements, charges or spins of the data.
            DataError: If the data cannot be read or have no labels.
            CheckpointError: If a model cannot be read.
        """
        models = [
            open_model(path, device=self.device, dtype=self.dtype, units=self.units, name=name)
            for path, name in zip(self.models, short_names(self.models), strict=True)
        ]
        targets: dict[str, Any] = {}
        for model in models:
            found = targets_of(getattr(members_of(model.network)[0], "hyper_parameters", {}))
            targets |= {name: each for name, each in found.items() if name in model.properties}
        if self.dataset:
            references = named_of(self.dataset, self.dataset_root or "~/data", self.dataset_arg)
        else:
            shapes = {each.label: each.shape for each in targets.values()}
            references = files_of(self.files, self.dataset_arg, shapes)
        if self.part:
            references = part_of(references, self.splits, self.part)
        if self.most is not None and self.most < len(references):
            references = references.select(np.unique(np.linspace(0, len(references) - 1, self.most).astype(int)))
        if not len(references):
            raise DataError(f"{references.name}: there are no structures in it.")
        there = set(references.frames.fields)
        labels = {
            name: each.label
            for name, each in targets.items()
            if each.label in there and all(name in model.properties for model in models)
        }
        tensors = references.frames.gather(references.rows)
        for model in models:
            for told in unseen(model, tensors):
                if not self.allow_unseen:
                    raise ConfigError(f"{references.name}: {told} Pass --allow-unseen to go on all the same.")
                log.warning("%s: %s", model.name, told)
        return models, references, labels


def unseen(model: Model, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Sentences about elements, charges and spins that a model was not trained on, as far as its file says.

    Args:
        model: The model.
        tensors: Of the structures: ``z`` (N,), and ``q`` and ``s`` (S,) where they are stated.
    """
    told = [unseen_elements(model.network, tensors["z"])]
    states: tuple[tuple[Literal["charge", "spin"], str], ...] = (("charge", "q"), ("spin", "s"))
    for option, key in states:
        if key in tensors and trained_with(model.network, option) is not False:
            told.append(unseen_states(model.network, option, tensors[key].double()))
    return [sentence for sentence in told if sentence]


def short_names(paths: Sequence[str]) -> list[str]:
    """As much of each path as tells it from the others."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(part[-depth:]).replace("/", "").replace(" ", "_") for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}_{part[-1]}" for number, part in enumerate(parts)]


def compared(
    models: Sequence[Model],
    references: References,
    property_labels: dict[str, str],
    tell: Callable[[int, str], None] = lambda done, words: None,
) -> Result:
    """Evaluate every model, and find its errors.

    Args:
        models: The models.
        references: The structures.
        property_labels: For each property that is compared, the name of its label.
        tell: Called with the number of structures done, those of models before included, and words.
    """
    labels = references.labels(list(property_labels.values()))
    size = len(references)
    comparisons = []
    for number, model in enumerate(models):
        predictions = predict_all(
            model,
            references,
            with_stress="stress" in labels,
            tell=lambda done, before=number * size, name=model.name: tell(
                before + done, f"{name}: {done:,} of {size:,} structures"
            ),
        )
        comparisons.append(compare(model, predictions, references, labels, property_labels))
    return Result(references, labels, comparisons, [model.name for model in models], property_labels)


def notes_of(result: Result) -> list[str]:
    """What a reader should know before trusting the numbers."""
    notes = [
        f"{each.model.name} gives energies relative to the elements and its file does not hold their reference "
        "energies, so only energies within a composition are compared."
        for each in result.comparisons
        if not each.model.has_totals
    ]
    stated = result.references.level_of_theory
    for each in summary_of(result)["models"]:
        level = each["level_of_theory"]
        if level and stated and level != stated:
            notes.append(
                f"{each['name']} was trained on {level}, and the data are {stated}: energies may differ by a constant "
                "for each element. Look at energies within a composition."
            )
    return notes


def evaluate(
    models: Files,
    data: Files | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    dataset: str | None = None,
    dataset_root: str | None = None,
    dataset_arg: Mapping[str, Any] | None = None,
    split: str | None = None,
    splits: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    units: str | None = None,
    allow_unseen: bool = False,
) -> dict[str, Any]:
    """Compare models with reference data, as ``torchmd-net eval`` does.

    .. code-block:: python

        found = torchmdnet.evaluate("out/potential.safetensors", "test.extxyz")
        print(found["models"][0]["errors"]["force component"]["mae"], "meV/Å")

    Args:
        models: A model file, or several.
        data: A file with structures and labels, or several; whatever ASE reads.
        folder: Where to write the page, plots and tables; None for nowhere.
        dataset: A data set by name, in place of ``data``.
        dataset_root: Its folder or files.
        dataset_arg: Arguments of the data set.
        split: ``train``, ``val`` or ``test`` alone.
        splits: The ``splits.npz`` of a training run that says which structures these are.
        device: Where to compute.
        dtype: ``float32`` or ``float64``.
        units: Of the models, where their files do not state them.
        allow_unseen: Go on with elements, charges and spins that a model was not trained on.

    Returns:
        What ``summary.json`` holds: ``structures``, ``atoms``, and for each of ``models`` its ``errors`` by quantity,
        which have ``unit``, ``mae``, ``rmse``, ``p95`` and ``largest``, and ``groups``.

    Raises:
        ConfigError: If an argument cannot work, or a model was not trained on such structures.
        DataError: If the data cannot be read or have no labels.
        CheckpointError: If a model cannot be read.
    """
    request = Request(
        _listed(models),
        _listed(data),
        dataset,
        dataset_root,
        dataset_arg or {},
        split,
        None if splits is None else os.fspath(splits),
        None,
        device,
        dtype,
        units,
        allow_unseen,
    )
    result = compared(*request.open())
    if folder is None:
        return summary_of(result)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return write_all(place, result, notes_of(result))


def _listed(files: Files | None) -> list[str]:
    if files is None:
        return []
    return [os.fspath(files)] if isinstance(files, (str, os.PathLike)) else [os.fspath(file) for file in files]
