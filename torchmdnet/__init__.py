"""Neural network potentials for molecular and materials simulation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchmdnet._version import __version__

if TYPE_CHECKING:
    from torchmdnet.calculators import TMDNETCalculator as Calculator
    from torchmdnet.checkpoint import load_model
    from torchmdnet.evaluation.run import evaluate
    from torchmdnet.scripts.train import train

__all__ = ["Calculator", "__version__", "evaluate", "load_model", "train"]

#: Public names that are imported on first use, so that ``import torchmdnet`` stays quick: name -> where it is.
_LAZY = {
    "Calculator": "torchmdnet.calculators:TMDNETCalculator",
    "evaluate": "torchmdnet.evaluation.run:evaluate",
    "load_model": "torchmdnet.checkpoint:load_model",
    "train": "torchmdnet.scripts.train:train",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, found = _LAZY[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), found)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
