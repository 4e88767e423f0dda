"""Text from outside, YAML or JSON, to plain values: the one reader of settings, wherever they stand.

A settings file, a word of a command line, the settings in a checkpoint and the tables beside data sets all pass here.
What cannot be read is a :class:`~torchmdnet.errors.ConfigError`, or the error of the caller's kind, with the line; so
is what would take unbounded time or memory: a file that is too large, values nested too deeply, and aliases that repeat
one another or contain themselves.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from torchmdnet.errors import ConfigError
from torchmdnet.text import Refusal, flaw_of, shortened

__all__ = [
    "MAX_ALIASED",
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_DIGITS",
    "MAX_VALUES",
    "Loader",
    "check_plain",
    "parse_json",
    "parse_yaml",
    "parse_yaml_mapping",
    "read_text",
]

logger = logging.getLogger(__name__)

#: Largest file of settings, in bytes; a list of fifty thousand file names fits.
MAX_BYTES = 4 * 2**20
#: How deeply lists and mappings may lie within one another.
MAX_DEPTH = 64
#: How many values the aliases of a YAML document may repeat in all.
MAX_ALIASED = 10_000
#: How many values settings may hold.
MAX_VALUES = 2_000_000
#: The longest number, in characters.
MAX_DIGITS = 400

_TIMESTAMP, _BOOL, _FLOAT, _INT, _TUPLE = (
    f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "bool", "float", "int", "python/tuple")
)
#: What a scalar of each kind should have been.
_KINDS = {_TIMESTAMP: "a date", _BOOL: "true or false", _FLOAT: "a number", _INT: "a whole number"}


def _is_misread(text: str) -> bool:
    """Whether YAML takes for octal what looks like a decimal number."""
    return re.fullmatch(r"[-+]?0[0-7_]+", text) is not None and int(text, 8) != int(text.replace("_", ""))


class Loader(yaml.SafeLoader):
    """YAML without code, where ``1e-4`` is a number, dates and ``no`` are text and a repeated key is reported.

    What is too deep, too long or contains itself is refused while it is read, before anything is built from it.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TIMESTAMP, _BOOL)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._aliased = 0
        self._open: set[str] = set()  # anchors of what is being read
        self._extent: dict[int, tuple[int, int]] = {}  # number of values and depth of each node

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise ComposerError(None, None, f"*{event.anchor} contains itself", mark)
            node = super().compose_node(parent, index)
            count, depth = self._extent.get(id(node), (1, 0))
            self._aliased += count
            if self._aliased > MAX_ALIASED:
                problem = f"the aliases (*{event.anchor}) repeat more than {MAX_ALIASED:,} values"
                raise ComposerError(None, None, problem, mark)
            self._check_depth(self._depth + depth, mark)
            return node
        self._check_depth(self._depth, mark)
        if event.anchor is not None:
            self._open.add(event.anchor)
        self._depth += 1
        try:
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
            self._open.discard(event.anchor)
        self._extent[id(node)] = self._measured(node)
        return node

    def _check_depth(self, depth: int, mark: Any) -> None:
        if depth > MAX_DEPTH:
            raise ComposerError(None, None, f"values are nested more than {MAX_DEPTH} deep", mark)

    def _measured(self, node: yaml.Node | None) -> tuple[int, int]:
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        extents = [self._extent.get(id(child), (1, 0)) for child in children]
        return 1 + sum(count for count, _ in extents), max((1 + depth for _, depth in extents), default=0)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a scalar that is not what its form or its tag says is an error with its line."""
        try:
            if isinstance(node, yaml.ScalarNode) and node.tag in (_INT, _FLOAT) and len(node.value) > MAX_DIGITS:
                raise OverflowError
            if isinstance(node, yaml.ScalarNode) and node.tag == _INT and _is_misread(node.value):
                problem = (
                    f"{node.value} is octal in YAML, {int(node.value, 8)}; write that, or the number without the 0"
                )
                raise ConstructorError(None, None, problem, node.start_mark)
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = node.value if isinstance(node, yaml.ScalarNode) else ""
            problem = f"{shortened(text)} is not {_KINDS.get(node.tag, node.tag)}; quotes make it text"
            if isinstance(error, OverflowError):
                problem = f"{shortened(text)} has {len(text):,} digits, more than a number may have ({MAX_DIGITS})"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        problem = flaw_of(value) if isinstance(value, str) else None
        if problem:
            raise ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in lines:
                    first = lines[key.value]
                    logger.warning(
                        "%s: %s stands on line %d and again on line %d; the later value is used.",
                        key.start_mark.name, shortened(key.value), first, line,
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


Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
#: YAML 1.1 takes a number with an exponent for text unless it has a dot and a sign.
EXPONENT = (_FLOAT, re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789."))
Loader.add_implicit_resolver(*EXPONENT)
Loader.add_constructor(_FLOAT, Loader.construct_float)
Loader.add_constructor(_TUPLE, Loader.construct_tuple)


def read_text(path: str | os.PathLike[str], key: str, refusal: Refusal = ConfigError) -> str:
    """The text of a file, UTF-8 with or without a byte order mark.

    Args:
        path: The file.
        key: What names it; it opens the message of an error.
        refusal: Makes the error.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: Or what ``refusal`` makes: it is no file that can be read, too large, or not text in UTF-8.
    """
    content = None
    try:
        if Path(path).is_file() or not Path(path).exists():
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise refusal(f"{key}: {str(path)!r} cannot be read: {error}.") from error
    if content is None:
        raise refusal(f"{key}: {str(path)!r} cannot be read: it is a folder, or no regular file.")
    if len(content) > MAX_BYTES:
        raise refusal(f"{key}: {str(path)!r} is larger than {MAX_BYTES // 2**20} MiB, which is no file of settings.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refusal(
            f"{key}: {path}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8. Save the file as text in "
            "UTF-8."
        ) from error


def parse_yaml(text: str, name: str = "", refusal: Refusal = ConfigError) -> Any:
    """The value that YAML, of which JSON is a part, stands for.

    Args:
        text: One document.
        name: Where it stands, a file or a flag; it opens the message of an error.
        refusal: Makes the error.

    Raises:
        ConfigError: Or what ``refusal`` makes, with the line.
    """
    return _loaded(text, name, refusal, lambda loader: loader.get_single_data(), is_file="\n" in text)


def parse_yaml_mapping(
    text: str, name: str, empty: str, refusal: Refusal = ConfigError
) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML document whose top level is a mapping, and the line of each of its keys.

    Args:
        text: See :func:`parse_yaml`.
        name: See :func:`parse_yaml`.
        empty: What to write; added to the message where there is nothing, or no mapping.
        refusal: See :func:`parse_yaml`.
    """

    def load(loader: Loader) -> tuple[dict[str, Any], dict[str, int]]:
        root = loader.get_single_node()
        if root is None:
            raise refusal(f"{name} is empty. {empty}")
        if not isinstance(root, yaml.MappingNode):
            raise refusal(f"{name} is not a mapping. {empty}")
        values: Any = loader.construct_document(root)
        if not isinstance(values, dict):
            raise refusal(f"{name} is not a mapping. {empty}")
        lines = {str(loader.construct_object(key)): key.start_mark.line + 1 for key, _ in root.value}
        return {str(key): value for key, value in values.items()}, lines

    return _loaded(text, name, refusal, load, is_file=True)


def _loaded(text: str, name: str, refusal: Refusal, load: Callable[[Loader], Any], *, is_file: bool) -> Any:
    where = f"{name}: " if name else ""
    if len(text) > MAX_BYTES:
        raise refusal(f"{where}the text has {len(text):,} characters, more than settings may have ({MAX_BYTES:,}).")
    try:
        loader = Loader(text)
        loader.name = name or "<text>"
        try:
            return load(loader)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise refusal(_described(error, name, is_file)) from error
    except RecursionError:
        raise refusal(f"{where}values are nested too deeply.") from None


def _described(error: yaml.YAMLError, name: str, is_file: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    problem = "an anchor is defined twice" if problem == "second occurrence" else problem
    line = _line_of(error, mark) if mark is not None and is_file else ""
    if isinstance(error, ReaderError):  # it knows the character alone
        code = error.character if isinstance(error.character, int) else ord(error.character)
        problem = f"the character of code 0x{code:02x}, number {error.position + 1} of the file, is not allowed"
    place = ", ".join(filter(None, [name, line]))
    problem = " ".join(str(problem).split())
    if isinstance(error, ConstructorError) and "python/" in problem:
        words = f"{problem}. Settings are plain values; a file that asks for Python objects is refused."
    else:
        words = f"this is not YAML: {problem}."
    return f"{place}: {words}" if place else words


def _line_of(error: yaml.YAMLError, mark: Any) -> str:
    """The line that is wrong: where something begins that never ends, not where that is noticed."""
    context, start = str(getattr(error, "context", None)), getattr(error, "context_mark", None)
    if start is not None and start.line < mark.line and context.startswith(("while scanning", "while parsing a flow")):
        return f"line {start.line + 1}"
    before = (mark.buffer or "").split("\n")[: mark.line]
    if "mapping values are not allowed" in str(error) and before and before[-1].strip() and ":" not in before[-1]:
        return f"line {mark.line}"  # a key without a colon reads on to the colon of the next
    is_late = str(getattr(error, "problem", None)).startswith("expected <block end>")
    return f"{'at or before ' if is_late else ''}line {mark.line + 1}"


def parse_json(
    text: str | bytes,
    name: str,
    refusal: Refusal = ConfigError,
    *,
    object_hook: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """The value that JSON stands for.

    Args:
        text: The whole of it.
        name: Where it stands; it opens the message of an error.
        refusal: Makes the error.
        object_hook: See :func:`json.loads`.

    Raises:
        ConfigError: Or what ``refusal`` makes.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError:
        raise refusal(f"{name}: values are nested too deeply.") from None
    except (ValueError, TypeError, KeyError, MemoryError) as error:
        raise refusal(f"{name}: this is not JSON: {_first_line(error)}.") from error


def check_plain(value: Any, name: str, refusal: Refusal = ConfigError) -> None:
    """Refuse values that contain themselves, are nested too deeply, or hold text or numbers that cannot be written.

    Args:
        value: Settings as they were read, from a checkpoint perhaps; arrays and tensors are looked at from outside.
        name: Where they stand; it opens the message of an error.
        refusal: Makes the error.

    Raises:
        ConfigError: Or what ``refusal`` makes.
    """
    left: list[tuple[Any, int]] = [(value, 0)]
    count = 0
    while left:
        item, depth = left.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise refusal(f"{name}: values are nested more than {MAX_DEPTH} deep, or contain themselves.")
        if count > MAX_VALUES:
            raise refusal(f"{name}: there are more than {MAX_VALUES:,} values, which are no settings.")
        if isinstance(item, argparse.Namespace):
            item = vars(item)
        if isinstance(item, Mapping):
            left.extend((each, depth + 1) for pair in item.items() for each in pair)
        elif isinstance(item, (list, tuple, set, frozenset)):
            left.extend((each, depth + 1) for each in item)
        elif isinstance(item, str):
            problem = flaw_of(item)
            if problem:
                raise refusal(f"{name}: {problem}.")
        elif isinstance(item, int) and item.bit_length() > 4 * MAX_DIGITS:
            raise refusal(f"{name}: a number has more than {MAX_DIGITS} digits.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
