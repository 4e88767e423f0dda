"""Neural network potentials for molecular and materials simulation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchmdnet._version import __version__

if TYPE_CHECKING:
    from torchmdnet.checkpoint import load_model

__all__ = ["__version__", "load_model"]

#: Public names that are imported on first use, so that ``import torchmdnet`` stays quick: name -> its module.
_LAZY = {"load_model": "torchmdnet.checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
