"""From what a user names to samples: files, a published set, or the data of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmdnet.config.values import with_truths
from torchmdnet.data.arguments import check_arguments
from torchmdnet.data.doctor.samples import Samples
from torchmdnet.data.doctor.sampling import samples_of
from torchmdnet.data.doctor.survey import Fault, Survey, SurveyedASE
from torchmdnet.datasets import DATASETS
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.faults import passing_over_faults
from torchmdnet.datasets.files import find_files
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
    from torchmdnet.data.module import DataModule  # which loads Lightning

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
