"""Reading YAML settings: plain values only, each with the line it stands on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from torchmdnet.errors import ConfigError

__all__ = ["FALSE_WORDS", "TRUE_WORDS", "Loader", "Setting", "plain", "read_yaml", "write_yaml"]

logger = logging.getLogger(__name__)

_TIMESTAMP, _BOOL, _FLOAT, _TUPLE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "bool", "float", "python/tuple")
)

#: Words that YAML 1.1 takes for true and false wherever they stand, so that nobelium (``No``) is false. Here they are
#: text, and become true and false where a setting is one of these two.
TRUE_WORDS, FALSE_WORDS = ("yes", "Yes", "YES", "on", "On", "ON"), ("no", "No", "NO", "off", "Off", "OFF")


class Setting(NamedTuple):
    """A value and where it was written, ``"conf.yaml, line 3"`` or ``"--lr"``."""

    value: Any
    source: str


class Loader(yaml.SafeLoader):
    """YAML without code, where ``1e-4`` is a number, dates and ``no`` are text and a repeated key is reported."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TIMESTAMP, _BOOL)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    logger.warning(
                        "%s: %r stands on line %d and again on line %d; the later value is used.",
                        key.start_mark.name, key.value, first, line,
                    )  # fmt: skip
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_float(self, node: yaml.ScalarNode) -> float | int:
        """``1e3`` is the count 1000, as it is on the command line; ``1000.0`` stays a float."""
        value = self.construct_yaml_float(node)
        return int(value) if "e" in node.value.lower() and value.is_integer() else value

    def construct_tuple(self, node: yaml.SequenceNode) -> list[Any]:
        """Tuples are saved by name; as settings they are lists."""
        return self.construct_sequence(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads back: text that looks like a number gets quotes."""


Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

# YAML 1.1 takes a number with an exponent for text unless it has a dot and a sign.
for _class in (Loader, _Dumper):
    _class.add_implicit_resolver(
        _FLOAT, re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789.")
    )
Loader.add_constructor(_FLOAT, Loader.construct_float)
Loader.add_constructor(_TUPLE, Loader.construct_tuple)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Setting]:
    """Read a YAML file whose top level is a mapping.

    Returns:
        Each key with its value and its place. The values of scalars written as text stay text.

    Raises:
        ConfigError: The file is missing, empty, not a mapping, not YAML, or asks for more than plain values.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"conf: {str(path)!r} does not end in .yaml or .yml. Settings are read from YAML files.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(p.name for p in path.parent.glob("*.y*ml"))[:5] if path.parent.is_dir() else []
        hint = f" Beside it: {', '.join(nearby)}." if nearby else ""
        raise ConfigError(f"conf: there is no file {str(path)!r}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"conf: {str(path)!r} cannot be read: {error}.") from error
    try:
        return _parse(text, str(path))
    except yaml.YAMLError as error:
        raise ConfigError(_describe(error, str(path))) from error


def _parse(text: str, name: str) -> dict[str, Setting]:
    loader = Loader(text)
    loader.name = name
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{name} is empty. Write one 'key: value' a line, e.g. 'dataset: QM9'.")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{name} is not a mapping. Write one 'key: value' a line, e.g. 'dataset: QM9'.")
        values = loader.construct_document(root)
        places = {loader.construct_object(key): key.start_mark.line + 1 for key, _ in root.value}
    finally:
        loader.dispose()
    return {str(key): Setting(value, f"{name}, line {places.get(key, 1)}") for key, value in values.items()}


def _describe(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{name}, line {mark.line + 1}" if mark is not None else name
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, yaml.constructor.ConstructorError) and "python/" in problem:
        return f"{place}: {problem}. Settings are plain values; a file that asks for Python objects is refused."
    return f"{place}: this is not YAML: {problem}."


def write_yaml(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Write a YAML file with sorted keys, whole or not at all."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(
            yaml.dump(plain(values), Dumper=_Dumper, default_flow_style=False, width=120, allow_unicode=True),
            encoding="utf-8",
        )
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


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
