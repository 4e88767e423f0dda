"""From what a user names to samples: files, a published set, or the data of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmdnet.config.values import with_truths
from torchmdnet.data.doctor.samples import Samples, Stated
from torchmdnet.data.doctor.survey import Fault, Survey, SurveyedASE
from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.faults import passing_over_faults
from torchmdnet.datasets.files import find_files
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import ConfigError, DataError

__all__ = ["open_configured", "open_files", "open_named"]

HDF5_SUFFIXES = (".h5", ".hdf5")
#: Words in the names of NumPy files, and the argument of :class:`Custom` they stand for.
NUMPY_WORDS = {
    "coordglob": ("coord", "pos", "xyz"),
    "embedglob": ("embed", "atomic_number", "numbers", "types", "_z", "species"),
    "energyglob": ("energ",),
    "forceglob": ("force",),
}


def open_files(paths: Sequence[str], arguments: Mapping[str, Any] | None = None) -> Samples:
    """The data in files, of whichever kind they are.

    Args:
        paths: Paths or patterns: whatever :class:`~torchmdnet.datasets.ase.ASE` reads, HDF5 files, or the ``.npy``
            files of :class:`~torchmdnet.datasets.custom.Custom`.
        arguments: Arguments of the data set class, as ``dataset_arg`` has them.

    Raises:
        ConfigError: If files of several kinds are named.
        DataError: If there is no such file, or nothing in it can be used.
    """
    files = find_files(list(paths), "data")
    kinds = {_kind_of(path) for path in files}
    name = ", ".join(paths) if len(paths) < 4 else f"{paths[0]} and {len(paths) - 1} more"
    if len(kinds) > 1:
        raise ConfigError(f"data: {name} are files of several kinds ({', '.join(sorted(kinds))}). Name them apart.")
    kind = kinds.pop()
    if kind == "Custom":
        return open_named("Custom", None, {**_numpy_arguments(files), **(arguments or {})}, name)
    return open_named(kind, [os.fspath(path) for path in files], arguments or {}, name)


def open_named(dataset: str, root: Any, arguments: Mapping[str, Any], name: str | None = None) -> Samples:
    """A data set by the name of its class.

    Args:
        dataset: A name of :data:`~torchmdnet.datasets.DATASETS`, or an address.
        root: The ``dataset_root``; None where the class takes none.
        arguments: Its further arguments.
        name: What to call it.
    """
    from torchmdnet.data.module import check_arguments

    kind = DATASETS[dataset]
    places = [] if root is None else [root]
    check_arguments(dataset, kind, places, arguments)
    return open_dataset(kind, places, with_truths(kind, arguments), dataset, name)


def open_configured(options: Mapping[str, Any], name: str) -> Samples:
    """The data that training with these settings would see, with its division into parts.

    Args:
        options: Settings of a run; nothing is written to its ``log_dir``.
        name: What to call it.

    Raises:
        ConfigError: If the settings do not name a data set.
        DataError: If nothing in it can be used.
    """
    from torchmdnet.data.module import DataModule

    module = DataModule({**options, "log_dir": None, "load_model": None})
    module.is_examined = True
    kind, places, arguments = module.source()
    samples = open_dataset(kind, places, arguments, str(options["dataset"]), name)
    module.dataset = samples.dataset
    samples.learnt = frozenset(module.asked_labels())
    try:
        module.setup()
    except (ConfigError, DataError) as error:
        samples.survey = samples.survey or Survey()
        if not samples.survey.faults:
            samples.survey.faults.append(Fault("refused", str(error), None))
    if hasattr(module, "idx_train"):
        parts = (("train", module.idx_train), ("val", module.idx_val), ("test", module.idx_test))
        samples.splits = {part: rows.numpy() for part, rows in parts}
    return samples


def open_dataset(
    kind: Callable[..., Any], places: Sequence[Any], arguments: Mapping[str, Any], class_name: str, name: str | None
) -> Samples:
    """Build a data set, past its faults where that is possible."""
    label = name or class_name
    if kind is ASE:
        return _open_structures(places, dict(arguments), label)
    survey = None
    try:
        data = kind(*places, **arguments)
    except DataError as error:
        with passing_over_faults():
            data = kind(*places, **arguments)
        survey = Survey(faults=[Fault("refused", str(error), None)])
    return samples_of(data, class_name, label, survey)


def samples_of(data: Any, class_name: str, name: str, survey: Survey | None = None) -> Samples:
    """Any data set as samples; one without arrays is read sample by sample."""
    frames = getattr(data, "frames", None)
    if frames is None:
        frames = Frames.from_samples(dict(data[i].items()) for i in range(len(data)))
    provenance = {key: getattr(data, key, None) for key in ("level_of_theory", "citation", "licence")}
    return Samples(
        name=name,
        kind=class_name,
        frames=frames,
        dataset=data,
        energy_unit=getattr(data, "energy_unit", None),
        length_unit=getattr(data, "length_unit", None) or ("Å" if getattr(data, "energy_unit", None) else None),
        survey=survey,
        splits=_splits(data),
        reference_energies=getattr(data, "reference_energies", None) or {},
        stated=_stated(data),
        provenance={key: str(value) for key, value in provenance.items() if value},
        keys=dict(getattr(data, "keys", None) or {}) if isinstance(data, ASE) else {},
    )


def _stated(data: Any) -> Stated:
    """The units that samples were converted from, where they are the same for all."""
    kinds = {units for units, _ in getattr(data, "stated_units", ())}
    return Stated(*kinds.pop()) if len(kinds) == 1 else Stated()


def _open_structures(places: Sequence[Any], arguments: dict[str, Any], name: str) -> Samples:
    refused = None
    try:
        data = SurveyedASE(*places, **arguments)
    except DataError as error:  # the spin is settled at the end, for all frames together
        if not any(word in str(error) for word in ("spin", "counts cannot be told")):
            raise
        refused = Fault("spin", str(error), None)
        data = SurveyedASE(*places, **{**arguments, "spin_key": False})
    if refused is not None:
        data.survey.faults.append(refused)
    samples = samples_of(data, "ASE", name, data.survey)
    samples.place = data.survey.place
    samples.isolated = data.survey.isolated
    return samples


def _splits(data: Any) -> dict[str, np.ndarray]:
    parts = getattr(data, "splits", None)
    if not isinstance(parts, Mapping):
        return {}
    return {str(key).removeprefix("idx_"): np.asarray(rows) for key, rows in parts.items()}


def _kind_of(path: Path) -> str:
    if path.suffix in HDF5_SUFFIXES:
        return "HDF5"
    return "Custom" if path.suffix == ".npy" else "ASE"


def _numpy_arguments(files: Sequence[Path]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for path in files:
        stem = path.stem.lower()
        kind = next((kind for kind, words in NUMPY_WORDS.items() if any(word in stem for word in words)), None)
        if kind is None:
            raise ConfigError(
                f"data: {path} could hold anything. Name NumPy files after their content (coords, embed, energies, "
                "forces), or write their patterns into a configuration and pass --conf."
            )
        found.setdefault(kind, []).append(os.fspath(path))
    for kind in ("coordglob", "embedglob"):
        if kind not in found:
            raise ConfigError(
                f"data: none of the NumPy files holds {'coordinates' if kind == 'coordglob' else 'atomic numbers'}, "
                f"by its name. Name one after {' or '.join(NUMPY_WORDS[kind][:2])}."
            )
    return {kind: ";".join(names) for kind, names in found.items()}
