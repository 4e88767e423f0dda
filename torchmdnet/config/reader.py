"""Reading YAML settings: plain values only, each with the line it stands on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from torchmdnet.errors import ConfigError
from torchmdnet.files import draft_of, expanded
from torchmdnet.parse import EXPONENT, parse_yaml_mapping, read_text
from torchmdnet.text import check_text

__all__ = ["FALSE_WORDS", "TRUE_WORDS", "Setting", "plain", "read_yaml", "write_yaml"]

#: Words that YAML 1.1 takes for true and false wherever they stand, so that nobelium (``No``) is false. Here they are
#: text, and become true and false where a setting is one of these two.
TRUE_WORDS, FALSE_WORDS = ("yes", "Yes", "YES", "on", "On", "ON"), ("no", "No", "NO", "off", "Off", "OFF")


class Setting(NamedTuple):
    """A value and where it was written, ``"conf.yaml, line 3"`` or ``"--lr"``."""

    value: Any
    source: str


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`torchmdnet.parse.Loader` reads back: text that looks like a number gets quotes."""


_Dumper.add_implicit_resolver(*EXPONENT)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Setting]:
    """Read a YAML file whose top level is a mapping.

    Returns:
        Each key with its value and its place. The values of scalars written as text stay text.

    Raises:
        ConfigError: The file is missing, empty, not a mapping, not YAML, or asks for more than plain values.
    """
    path = expanded(check_text(str(path), "conf"))
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"conf: {str(path)!r} does not end in .yaml or .yml. Settings are read from YAML files.")
    try:
        text = read_text(path, "conf")
    except FileNotFoundError:
        nearby = sorted(p.name for p in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        hint = f" Beside it: {', '.join(nearby)}." if nearby else ""
        raise ConfigError(f"conf: there is no file {str(path)!r}.{hint}") from None
    values, lines = parse_yaml_mapping(text, str(path), "Write one 'key: value' a line, e.g. 'dataset: QM9'.")
    return {key: Setting(value, f"{path}, line {lines.get(key, 1)}") for key, value in values.items()}


def write_yaml(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a YAML file with sorted keys, whole or not at all."""
    text = yaml.dump(plain(values), Dumper=_Dumper, default_flow_style=False, width=120, allow_unicode=True)
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """The same value in numbers, text, lists and dictionaries; arrays and tensors become lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
