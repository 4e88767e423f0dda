"""Helpers by their established names; each lives where it belongs, or at the end of this file."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

_HOMES = {
    "ATOMIC_NUMBERS": "torchmdnet.elements",
    "LoadFromCheckpoint": "torchmdnet.config.actions",
    "LoadFromFile": "torchmdnet.config.actions",
    "atomic_masses": "torchmdnet.elements",
    "check_logs": "torchmdnet.config.rundir",
    "make_splits": "torchmdnet.data.splits",
    "number": "torchmdnet.config.values",
    "save_argparse": "torchmdnet.config.rundir",
    "train_val_test_split": "torchmdnet.data.splits",
}

__all__ = [*_HOMES, "MissingEnergyException", "deprecated_class", "write_as_hdf5"]  # pyright: ignore[reportUnsupportedDunderAll]

_Class = TypeVar("_Class", bound=type)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class MissingEnergyException(Exception):
    """Data without energies where some are needed."""


def deprecated_class(cls: _Class) -> _Class:
    """Class decorator: making an instance gives a ``DeprecationWarning``."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            f"{cls.__name__} is deprecated and will be removed in a future version.", DeprecationWarning, stacklevel=2
        )
        original(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def write_as_hdf5(
    files: Mapping[str, Sequence[str | os.PathLike[str]]],
    hdf5_dataset: str | os.PathLike[str],
    tile_embed: bool = True,
) -> None:
    """Collect ``.npy`` files, one set per molecule, in one HDF5 file that the ``HDF5`` data set reads.

    Args:
        files: Lists of file names, of equal length: ``pos`` (n, N, 3) and ``z`` (N,), and, where there are any, ``y``
            (n,) or (n, 1) and ``neg_dy`` (n, N, 3).
        hdf5_dataset: The file to write. Group ``"0"`` holds the first molecule, and so on.
        tile_embed: Whether to repeat ``z`` for every sample, (n, N), rather than to store it once, (N,).

    Raises:
        DataError: The lists differ in length, or the arrays of a molecule do not fit together.
    """
    import h5py
    import numpy as np

    from torchmdnet.errors import DataError

    names = {"pos": "pos", "z": "types", "y": "energy", "neg_dy": "forces"}
    counts = {key: len(files[key]) for key in names if key in files}
    if not {"pos", "z"} <= counts.keys() or len(set(counts.values())) != 1:
        raise DataError(f"write_as_hdf5 needs as many files for 'z' as for 'pos', 'y' and 'neg_dy'; got {counts}.")
    with h5py.File(hdf5_dataset, "w") as h5:
        for index in range(counts["pos"]):
            arrays = {key: np.load(files[key][index]) for key in counts}
            num_samples, num_atoms = arrays["pos"].shape[:2]
            fits = {"pos": (num_samples, num_atoms, 3), "z": (num_atoms,), "neg_dy": (num_samples, num_atoms, 3)}
            for key, array in arrays.items():
                if array.shape[: 1 if key == "y" else 3] != fits.get(key, (num_samples,)):
                    raise DataError(
                        f"{files[key][index]}: {key} has shape {array.shape}, but {files['pos'][index]} has "
                        f"{num_samples} samples of {num_atoms} atoms."
                    )
            if tile_embed:
                arrays["z"] = np.tile(arrays["z"], (num_samples, 1))
            group = h5.create_group(str(index))
            for key, array in arrays.items():
                group[names[key]] = array
