"""Arguments of a class that a configuration sets: which there are, and of which kind their values are."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torchmdnet.errors import ConfigError, did_you_mean

__all__ = ["arguments_of", "check_kinds", "check_names", "takes_any"]

#: Kinds of values by the annotation of a parameter, and what to call them.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((numbers.Integral,), "a whole number"),
    "float": ((numbers.Real,), "a finite number"),
    "str": ((str,), "text"),
    "bool": ((bool, numbers.Integral), "true or false"),
}


def arguments_of(part: Callable[..., Any], given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function, but for those that it is given in any case."""
    return {
        name: parameter
        for name, parameter in inspect.signature(part).parameters.items()
        if name not in given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def takes_any(part: Callable[..., Any]) -> bool:
    """Whether a class or function takes keywords of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(part).parameters.values())


def check_names(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse an argument that a part does not take.

    Args:
        what: The part, as it opens the message: ``"prior_model: ZBL"``.
        names: The arguments.
        known: Those that it takes.

    Raises:
        ConfigError: With the nearest name, and all there are.
    """
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{what} has no argument {name!r}.{did_you_mean(name, known)} It takes {', '.join(known) or 'none'}."
            )


def check_kinds(
    parameters: Mapping[str, inspect.Parameter],
    values: Mapping[str, Any],
    *,
    what: str = "",
    takes_none: Callable[[str], bool] = lambda name: False,
) -> None:
    """Refuse values of another kind than the annotation of their parameter says; other annotations are left alone.

    Args:
        parameters: The parameters by name.
        values: Values of some of them.
        what: The part, as it opens the message; empty where the name alone says enough.
        takes_none: Whether None is a value of a parameter whose annotation does not say so.

    Raises:
        ConfigError: Naming the argument, with what it takes.
    """
    for name, parameter in parameters.items():
        annotation = getattr(parameter.annotation, "__name__", parameter.annotation)
        words = [word.strip() for word in str(annotation).split("|")]
        if name not in values or not all(word in _KINDS or word == "None" for word in words):
            continue
        value = values[name]
        if value is None and ("None" in words or takes_none(name)):
            continue
        kinds = tuple(kind for word in words if word in _KINDS for kind in _KINDS[word][0])
        is_float = isinstance(value, float)
        fits = isinstance(value, kinds) and (not is_float or math.isfinite(value))
        fits = fits or (is_float and value.is_integer() and "int" in words)
        if not fits or (isinstance(value, bool) and "bool" not in words):
            expected = " or ".join(_KINDS[word][1] for word in words if word in _KINDS)
            raise ConfigError(
                f"{f'{what}: ' * bool(what)}{name}: {str(value)[:60]!r} is not valid. It takes {expected}."
            )
