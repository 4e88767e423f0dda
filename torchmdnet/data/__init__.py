"""From a data set to batches: splits, loaders, transforms and the Lightning data module."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmdnet.data.loader import EpochBatchSampler, Loader
    from torchmdnet.data.module import DataModule
    from torchmdnet.data.splits import make_splits, train_val_test_split
    from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper

__all__ = [
    "DataModule",
    "EnergyRefRemover",
    "EpochBatchSampler",
    "FloatCastDatasetWrapper",
    "Loader",
    "make_splits",
    "train_val_test_split",
]

_HOMES = {
    "DataModule": "module",
    "EnergyRefRemover": "transforms",
    "EpochBatchSampler": "loader",
    "FloatCastDatasetWrapper": "transforms",
    "Loader": "loader",
    "make_splits": "splits",
    "train_val_test_split": "splits",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"torchmdnet.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
