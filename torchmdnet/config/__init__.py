"""Settings: the option table, the command line and YAML files made from it, and the folder of a run."""

from __future__ import annotations

import importlib
from typing import Any

from torchmdnet.options import OPTIONS, Option

_HOMES = {
    "add_reference_prior": "torchmdnet.config.settings",
    "get_argparse": "torchmdnet.config.command_line",
    "hyper_parameters": "torchmdnet.config.settings",
    "is_main_process": "torchmdnet.config.rundir",
    "options_markdown": "torchmdnet.config.reference",
    "prepare_log_dir": "torchmdnet.config.rundir",
    "resolve": "torchmdnet.config.command_line",
}

__all__ = ["OPTIONS", "Option", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
