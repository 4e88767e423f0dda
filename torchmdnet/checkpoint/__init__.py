"""Reading and writing model files."""

from __future__ import annotations

from typing import Any

_HOMES = {
    "hyper_parameters_of": "torchmdnet.checkpoint.read",
    "read_checkpoint": "torchmdnet.checkpoint.read",
    "migrate": "torchmdnet.checkpoint.migrations",
    "load_model": "torchmdnet.checkpoint.load",
    "load_ensemble": "torchmdnet.checkpoint.load",
    "save_model": "torchmdnet.checkpoint.save",
    "Example": "torchmdnet.checkpoint.golden",
    "describe": "torchmdnet.checkpoint.facts",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
