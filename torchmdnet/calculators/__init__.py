"""Calculators: how simulation engines ask a potential for energies, forces and stress.

:class:`External` serves TorchMD and any code that brings batches of positions, :class:`TMDNETCalculator` serves ASE
and everything that speaks to it. Nothing is imported until it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmdnet.calculators.ase import TMDNETCalculator
    from torchmdnet.calculators.external import External
    from torchmdnet.calculators.units import Units, tranforms, transforms

__all__ = ["External", "TMDNETCalculator", "Units", "tranforms", "transforms"]

_HOMES = {
    "External": "torchmdnet.calculators.external",
    "TMDNETCalculator": "torchmdnet.calculators.ase",
    "Units": "torchmdnet.calculators.units",
    "tranforms": "torchmdnet.calculators.units",  # the established spelling
    "transforms": "torchmdnet.calculators.units",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
