"""Compiled loops by what they compute. A module of them is imported, and Numba with it, when it is first used."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchmdnet.ops.kernels.loops import (
        activation,
        algebra,
        attention_atoms,
        attention_form,
        attention_keys,
        attention_values,
        blocks,
        dense,
        edge_network,
        embedding,
        embedding_form,
        filters,
        geometry,
        message,
        message_form,
        mixing,
    )

__all__ = [
    "activation",
    "algebra",
    "attention_atoms",
    "attention_form",
    "attention_keys",
    "attention_values",
    "blocks",
    "dense",
    "edge_network",
    "embedding",
    "embedding_form",
    "filters",
    "geometry",
    "message",
    "message_form",
    "mixing",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
