"""The argparse actions of earlier releases, for scripts with parsers of their own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torchmdnet.config.reader import Setting, read_yaml
from torchmdnet.config.settings import read_saved_settings
from torchmdnet.config.values import as_truth
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.options import OPTIONS

__all__ = ["LoadFromCheckpoint", "LoadFromFile"]


class LoadFromFile(argparse.Action):
    """Set the values of a YAML file where its flag stands: ``add_argument("--conf", type=open, action=LoadFromFile)``.

    Later flags change them again. A ``load_model`` that was given before stays.

    Raises:
        ConfigError: A key is no argument of the parser, or the file cannot be used.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, (str, os.PathLike)):
            path = values
        else:
            path = values.name
            values.close()
        found = _values(read_yaml(path))
        _refuse_unknown(found, namespace, "config file")
        if getattr(namespace, "load_model", None):
            found.pop("load_model", None)
        vars(namespace).update(found)


class LoadFromCheckpoint(argparse.Action):
    """Set the settings saved with a checkpoint where its flag stands, and the checkpoint itself as the flag's value.

    Raises:
        ConfigError: A key is no argument of the parser, or there are no settings.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        settings, _ = read_saved_settings(values)
        found = _values(settings)
        _refuse_unknown([key for key in found if key != "prior_args"], namespace, "the model checkpoint")
        vars(namespace).update(found)
        setattr(namespace, self.dest, values)


def _values(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Values for a parser that is not known here: ``no`` is false unless an option of that name takes text."""
    is_text = {key for key, option in OPTIONS.items() if option.type != "bool"}
    return {k: setting.value if k in is_text else as_truth(setting.value) for k, setting in settings.items()}


def _refuse_unknown(keys: Iterable[str], namespace: argparse.Namespace, where: str) -> None:
    for key in keys:
        if key not in namespace:
            raise ConfigError(f"Unknown argument in {where}: {key}.{did_you_mean(key, vars(namespace))}")
