"""From what people write, on a command line or in YAML, to the value of an option."""

from __future__ import annotations

import errno
import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from torchmdnet.config.reader import FALSE_WORDS, TRUE_WORDS, plain
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.files import expanded
from torchmdnet.heads import HEADS, named_head
from torchmdnet.options import OPTIONS, Option
from torchmdnet.parse import check_plain, parse_yaml
from torchmdnet.priors import PRIORS, named_priors
from torchmdnet.text import shortened

__all__ = ["NONE_WORDS", "as_truth", "coerce", "number", "with_truths"]

#: Words for no value, where an option takes none.
NONE_WORDS = ("None", "none", "null", "~")


def number(text: Any) -> int | float | None:
    """Read the size of a split: a count, a fraction, or None for the rest.

    ``"20"`` and ``"1e3"`` are counts, ``"0.2"`` and ``"1.0"`` (all of it) are fractions.

    Raises:
        ValueError: The text is no finite number.
    """
    if text is None or text in NONE_WORDS:
        return None
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return text
    word = str(text).strip()
    percent = re.fullmatch(r"(\d+\.?\d*) *%", word)
    if percent:
        raise ValueError(f"write {float(percent[1]) / 100:g} for {word}")
    try:
        return int(word)
    except ValueError:
        try:
            value = float(word)
        except ValueError:
            raise ValueError(f"{shortened(word)} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return int(value) if "e" in word.lower() and value.is_integer() else value


def as_truth(value: Any) -> Any:
    """True and false for the words that YAML 1.1 has for them (``yes``, ``off``); anything else as it is."""
    return (value in TRUE_WORDS) if isinstance(value, str) and value in (*TRUE_WORDS, *FALSE_WORDS) else value


def with_truths(kind: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a class, with ``yes``, ``no``, ``on`` and ``off`` as booleans where it takes booleans.

    Args:
        kind: What the arguments are for; its annotations and defaults tell which of them may be true or false.
        arguments: As they were read; mappings in a list are looked at too, by the same names.
    """
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return dict(arguments)

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [
                {k: convert(k, v) for k, v in item.items()} if isinstance(item, Mapping) else item for item in value
            ]
        return as_truth(value) if name in parameters and takes_truth(parameters[name], kind) else value

    return {name: convert(name, value) for name, value in arguments.items()}


def takes_truth(parameter: inspect.Parameter, kind: Callable[..., Any]) -> bool:
    """Whether an argument may be true or false, by its annotation and its default."""
    annotation = parameter.annotation
    if isinstance(annotation, str):  # perhaps the name of an alias
        annotation = getattr(sys.modules.get(kind.__module__), annotation, annotation)
    return isinstance(parameter.default, bool) or any(word in str(annotation) for word in ("bool", "Literal[False]"))


def _integer(value: Any) -> Any:
    """Accept ``5.0`` and ``"1e3"`` for a whole number; true and false are none."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str):
        value = number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    return value


def _duration(value: Any) -> Any:
    """Seconds of ``00:10:00``, or of ``10:00`` for minutes and seconds, which YAML without quotes has as seconds."""
    if isinstance(value, str) and ":" in value:
        parts = value.strip().split(":")
        if len(parts) > 3 or not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
            raise ValueError("write hours:minutes:seconds, 01:30:00 for one hour and a half")
        if any(int(part) >= 60 for part in parts[1:]):
            raise ValueError("minutes and seconds after a colon are below 60")
        return sum(int(part) * 60**power for power, part in enumerate(reversed(parts)))
    return _real(value)


def _truth(value: Any) -> Any:
    """An empty word is false, as it has always been on the command line."""
    return False if value == "" else value


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float, Path)) else value


def _path(value: Any) -> Any:
    return _usable(str(expanded(value))) if isinstance(value, (str, Path)) and str(value) else value


def _usable(path: str) -> str:
    """A path, refused if no file system has names as long."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"a path of {len(path)} characters is too long") from None
    return path


def _paths(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (str, int, float, Path)):
                raise ValueError(f"{item!r} in the list is no path")
        words = [_usable(str(item)) for item in value]
        return words[0] if len(words) == 1 else words
    text = _text(value)
    return _usable(text) if isinstance(text, str) else text


def _structure(value: Any) -> Any:
    """Read text as JSON or YAML; words ``key=value`` as a mapping."""
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, Sequence) and words and all(isinstance(word, str) for word in words)):
        return plain(value)
    if all("=" in word and word.lstrip()[:1] not in ("{", "[") for word in words):
        pairs = (word.split("=", 1) for word in words)
        return {key.strip(): parse_yaml(text) for key, text in pairs}
    try:
        return parse_yaml(" ".join(words))
    except ConfigError as error:
        raise ValueError(f"it is neither JSON nor YAML ({str(error).rstrip('.')})") from error


def _properties(value: Any) -> Any:
    """Names, or a mapping of names to heads or settings, as a mapping."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = _structure(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        words = list(value)
        if words and all(isinstance(word, str) for word in words) and any(c in "={" for c in "".join(words)):
            return _structure(words)
        merged: dict[str, Any] = {}
        for item in words:
            if not isinstance(item, (str, Mapping)):
                raise ValueError(f"{item!r} is neither a name nor a mapping")
            merged |= _properties(item)
        return merged
    return {value: None} if isinstance(value, str) else plain(value)


def _priors(value: Any) -> Any:
    """A name, a mapping, or a list of both; in text, names and JSON may stand side by side."""
    if isinstance(value, str):
        return _structure(value) if value.lstrip()[:1] in ("{", "[") else value
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, Sequence):
        found: list[Any] = []
        for item in map(_priors, value):
            found.extend(item if isinstance(item, list) else [item])
        return found
    return value


def _head(value: Any) -> Any:
    """A name, or a mapping of one name to arguments; without any, the name alone."""
    words = value if isinstance(value, list) else [value]
    text = " ".join(words) if words and all(isinstance(word, str) for word in words) else value
    found = _structure(text) if isinstance(text, str) and text.lstrip()[:1] in ("{", "[") else plain(text)
    name, arguments = named_head(found)
    return {name: arguments} if arguments else name


def _check_priors(value: Any) -> Any:
    if not isinstance(value, (str, Mapping, list)):
        raise ValueError("it is neither a name nor a mapping")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Mapping):
            for name, arguments in item.items():
                if not (arguments is None or isinstance(arguments, Mapping)):
                    raise ValueError(f"the arguments of {name} are {arguments!r}, not a mapping")
        elif not isinstance(item, str):
            raise ValueError(f"{item!r} is neither a name nor a mapping")
    return value


def _is_truth_word(value: Any) -> bool:
    return isinstance(value, str) and as_truth(value) is not value


def _prior_truths(value: Any) -> Any:
    """``prior_model`` with booleans where the arguments of a prior are booleans."""
    if isinstance(value, list):
        return [_prior_truths(item) for item in value]
    if not isinstance(value, Mapping) or not any(
        _is_truth_word(word) for arguments in value.values() for word in (arguments or {}).values()
    ):
        return value
    return {name: with_truths(PRIORS[name], arguments or {}) for name, arguments in value.items()}


def _property_truths(value: Any) -> dict[str, Any]:
    """``properties`` with booleans where the arguments of a head are booleans."""

    def convert(name: str, given: Any) -> Any:
        if not isinstance(given, Mapping) or not any(map(_is_truth_word, given.values())):
            return given
        from torchmdnet.properties import DEFAULT_HEADS

        return _with_truths_of(given.get("head") or DEFAULT_HEADS.get(name), given)

    return {name: convert(name, given) for name, given in value.items()}


def _head_truths(value: Any) -> Any:
    """``output_model`` with booleans where the arguments of a head are booleans."""
    name, arguments = named_head(value)
    return {name: _with_truths_of(name, arguments)} if any(map(_is_truth_word, arguments.values())) else value


def _with_truths_of(head: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return with_truths(HEADS[head], arguments) if isinstance(head, str) and head in HEADS else arguments


#: The longest lattice vector, in Å.
LONGEST = 1e6
#: The smallest distance of opposite faces of a cell, in Å: less than that of any two atoms.
LOWEST = 0.1


def _check_box(rows: list[list[float]]) -> list[list[float]]:
    if len(rows) != 3 or any(len(row) != 3 for row in rows):
        raise ValueError(f"it has {len(rows)} rows of {', '.join(str(len(row)) for row in rows)} numbers")
    if any(abs(number) > LONGEST for row in rows for number in row):
        raise ValueError(f"no lattice vector is longer than {LONGEST:,.0f} Å")
    vectors = [row for row in rows if any(row)]
    lengths = [math.hypot(*row) for row in vectors]
    (a, b, c) = rows
    faces = [_cross(b, c), _cross(c, a), _cross(a, b)]
    volume = abs(sum(x * y for x, y in zip(a, faces[0], strict=True)))
    if len(vectors) == 3 and volume < 1e-6 * math.prod(lengths):
        raise ValueError("its three vectors lie in a plane")
    heights = [volume / math.hypot(*face) for face in faces] if len(vectors) == 3 else lengths
    if min(heights, default=LOWEST) < LOWEST:
        raise ValueError(f"its opposite faces are {min(heights):.3g} Å apart")
    return rows


def _cross(a: list[float], b: list[float]) -> list[float]:
    return [a[i - 2] * b[i - 1] - a[i - 1] * b[i - 2] for i in range(3)]


_Mapping = Annotated[dict[str, Any], BeforeValidator(_structure)]

#: How each type of the option table is read and checked.
_TYPES: dict[str, Any] = {
    "int": Annotated[int, BeforeValidator(_integer)],
    "float": Annotated[float, BeforeValidator(_real)],
    "duration": Annotated[float, BeforeValidator(_duration)],
    "bool": Annotated[bool, BeforeValidator(_truth)],
    "text": Annotated[str, BeforeValidator(_text)],
    "path": Annotated[str, BeforeValidator(_path), Field(min_length=1)],
    "paths": Annotated[str | list[str], BeforeValidator(_paths)],
    "size": Annotated[int | float, BeforeValidator(number)],
    "mapping": _Mapping,
    "properties": Annotated[dict[str, Any], BeforeValidator(_properties)],
    "head": Annotated[str | dict[str, Any], BeforeValidator(_head)],
    "priors": Annotated[Any, BeforeValidator(_check_priors), BeforeValidator(_priors)],
    "prior_args": Annotated[dict[str, Any] | list[dict[str, Any] | None], BeforeValidator(_structure)],
    "box": Annotated[list[list[float]], BeforeValidator(_structure)],
    "weights": Annotated[list[float | list[float]], BeforeValidator(_structure)],
}


def _zero_or_more(value: float, least: float) -> float:
    """A number that is 0, or not much smaller than any use."""
    if value and value < least:
        raise ValueError
    return value


#: How the names in a value of a type are found, where it is more than a name.
_NAMES_IN: dict[str, Callable[[Any], list[str]]] = {
    "head": lambda value: [named_head(value)[0]],
    "priors": lambda value: [name for name, _ in named_priors(value)],
}


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    option = OPTIONS[key]
    limits = {"ge": option.ge, "le": option.most, "lt": option.lt}
    bounds: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    annotation: Any = _TYPES[option.type]
    if bounds:
        annotation = Annotated[annotation, Field(**bounds)]
    if option.least is not None:
        annotation = Annotated[annotation, AfterValidator(functools.partial(_zero_or_more, least=option.least))]
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def coerce(key: str, value: Any, source: str) -> Any:
    """Turn what was written for option ``key`` into its value.

    Args:
        source: Where it was written; it opens the error message.

    Raises:
        ConfigError: The value does not fit; the message lists the accepted values.
    """
    option = OPTIONS[key]
    check_plain(value, f"{source}: {key}")
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or (isinstance(word, str) and option.takes_none and word in NONE_WORDS):
        if option.takes_none:
            return None
        raise ConfigError(
            f"{source}: {key} has no value. It takes {option.expects}; "
            f"leave it out for the default, {option.default!r}."
        )
    try:
        result = _adapter(key).validate_python(value)
        if option.type == "box":
            result = _check_box(result)
    except ValidationError as error:
        raise _refusal(option, value, source, _reasons(error, option)) from error
    except ValueError as error:
        raise _refusal(option, value, source, str(error)) from error
    if option.type == "priors":
        result = _prior_truths(result)
    elif option.type == "properties":
        result = _property_truths(result)
    elif option.type == "head":
        result = _head_truths(result)
    named = _NAMES_IN[option.type](result) if option.type in _NAMES_IN else [result]
    for name in named:
        _check_name(option, name, source)
    return result


def _reasons(error: ValidationError, option: Option) -> str:
    """What our own readers said; what pydantic says is clear from what the option expects."""
    found = [(item["type"], item.get("ctx", {})) for item in error.errors()]
    own = [str(context.get("error")) for kind, context in found if kind == "value_error"]
    if option.le is None and any(kind == "less_than_equal" for kind, _ in found):
        own.append(f"the largest value is {option.most:,.10g}")
    return "; ".join(dict.fromkeys(own))


def _refusal(option: Option, value: Any, source: str, reason: str) -> ConfigError:
    shown = " ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else value
    why = f" ({reason})" if reason else ""
    return ConfigError(f"{source}: {option.key}={_cut(shown)} is not valid{why}. It takes {option.expects}.")


def _cut(value: Any, most: int = 300) -> str:
    """A value as Python writes it, of which a very long one does not fill the screen."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _check_name(option: Option, name: Any, source: str) -> None:
    names = option.names
    if not names or name in names or (option.takes_address and isinstance(name, str) and ":" in name):
        return
    listed = ", ".join(map(str, names)) + (", or give 'my_package.module:Class'" if option.takes_address else "")
    raise ConfigError(
        f"{source}: {option.key}: {_cut(name)} is not available.{did_you_mean(name, map(str, names))} "
        f"Choose from {listed}."
    )
