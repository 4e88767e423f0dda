"""Arguments of a data set that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torchmdnet.datasets.base import check_keywords
from torchmdnet.errors import ConfigError

__all__ = ["check_arguments"]


def check_arguments(name: str, kind: Any, positional: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Refuse arguments that a data set does not take, with the nearest name and all there are.

    Raises:
        ConfigError: Naming the argument.
    """
    try:
        signature = inspect.signature(kind)
    except (TypeError, ValueError):
        return
    known = signature.parameters
    try:
        check_keywords(name, kind, keywords)
    except ConfigError as error:
        raise ConfigError(f"dataset_arg: {error}") from None
    given = list(known)[: len(positional)]
    for word in given:
        if word in keywords:
            raise ConfigError(
                f"dataset_arg: {word!r} of {name} is given twice. It is set by dataset_root; leave it out."
            )
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in known.values() if p.kind in plain and p.default is inspect.Parameter.empty]
    absent = [word for word in needed if word not in (*given, *keywords)]
    if absent:
        raise ConfigError(f"dataset_arg: {name} needs {', '.join(absent)} as well.")
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        raise ConfigError(f"dataset_arg: the arguments do not fit {name} ({error}).") from error
