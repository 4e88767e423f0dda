"""The command line, made from the option table."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torchmdnet._version import __version__
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.options import OPTIONS, RENAMED, RETIRED, SYNONYMS, Option

__all__ = ["TrainParser", "build_parser"]

logger = logging.getLogger(__name__)

_MANY_WORDS = ("head", "mapping", "properties", "prior_args", "box", "weights")

_EPILOG = """\
Settings come from the defaults, then from files (--conf, and the settings saved beside --load-model; a later file
wins over an earlier one), then from flags. A flag wins over every file, wherever it stands; of two equal flags the
later one wins. Names can be shortened while they stay unique. True/false options are written
--derivative, --derivative false or --no-derivative.

  torchmd-train --conf examples/quickstart.yaml
  torchmd-train --conf examples/TensorNet-QM9.yaml --batch-size 64 --log-dir runs/qm9
  torchmd-train --load-model runs/qm9/last.ckpt --num-epochs 500
"""


class _Collect(argparse.Action):
    """Note what a flag said; the values are read and merged once all of them are known."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, TrainParser)
        assert option_string is not None
        if option_string.startswith("--no-"):
            if values is not True:
                parser.error(f"{option_string} takes no value")
            values = False
        parser.given.append((self.dest, values, option_string))


class _SetAside(argparse.Action):
    """A flag of an earlier release: accepted, with a warning."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        logger.warning("%s is set aside: %s.", option_string, RETIRED[str(self.const)])


class TrainParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that merges flags with YAML files and checks every value.

    Args:
        program: Called with the flags, in order, as ``(key, value, flag)``; returns the value of every option.

    Raises:
        ConfigError: From ``parse_args``, for anything that cannot be used. ``torchmd-train`` shows it without a
            traceback and ends with status 2.
    """

    def __init__(self, *args: Any, program: Callable[[Sequence[tuple[str, Any, str]]], dict[str, Any]], **kwargs: Any):
        self.given: list[tuple[str, Any, str]] = []
        self.program = program
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See torchmd-train --help.")

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(_unknown(unknown[0]))
        return namespace

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        self.given = []
        words = self._in_full(list(sys.argv[1:] if args is None else args))
        namespace, unknown = super().parse_known_args(words, namespace)
        vars(namespace).update(self.program(self.given))
        return namespace, unknown

    def _in_full(self, words: list[str]) -> list[str]:
        """Spell flags with dashes and in full: ``--num_e`` becomes ``--num-epochs``."""
        stop = words.index("--") if "--" in words else len(words)
        return [self._full(word) for word in words[:stop]] + words[stop:]

    def _full(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return word
        flag = name.replace("_", "-")
        old = RENAMED.get(flag[2:].replace("-", "_"))
        if old:
            logger.warning("%s is now spelt %s.", name, OPTIONS[old].flag)
            return OPTIONS[old].flag + equals + value
        if flag not in self._option_string_actions:
            # Shortenings that were unique before an option was added keep their meaning.
            for options in ([o for o in OPTIONS.values() if o.established], OPTIONS.values()):
                matches = [option.flag for option in options if option.flag.startswith(flag)]
                if matches:
                    break
            if len(matches) != 1 or any(own.startswith(name) for own in self._own_flags()):
                return word
            flag = matches[0]
        return flag + equals + value

    def _own_flags(self) -> list[str]:
        """Flags that a script added to this parser."""
        known = {"--version", *(flag for option in OPTIONS.values() for flag in _flags(option))}
        return [flag for flag in self._option_string_actions if flag not in known]


def build_parser(program: Callable[[Sequence[tuple[str, Any, str]]], dict[str, Any]]) -> TrainParser:
    """The parser of ``torchmd-train``; ``program`` turns flags into the value of every option."""
    parser = TrainParser(
        prog="torchmd-train",
        description="Train a neural network potential.",
        usage="torchmd-train --conf FILE [--option value ...]\n       torchmd-train --load-model CHECKPOINT [...]",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        program=program,
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS.values():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        words: dict[str, Any] = {}
        if option.type == "bool":
            words = {"nargs": "?", "const": True}
        elif option.type == "priors":
            words = {"nargs": "*"}
        elif option.type == "paths" or option.type in _MANY_WORDS:
            words = {"nargs": "+"}
        groups[option.group].add_argument(
            *_flags(option),
            dest=option.key,
            action=_Collect,
            default=option.default,
            metavar=_metavar(option),
            help=_help(option),
            **words,
        )
    parser.add_argument("--version", action="version", version=f"torchmd-train {__version__}", help="print the version")
    for key in RETIRED:
        flag = "--" + key.replace("_", "-")
        parser.add_argument(
            flag, action=_SetAside, nargs="?", const=key, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the flag and its value once: ``--lr FLOAT``, ``-c, --conf PATH``."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, **kwargs})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Collect):
            return super()._format_action_invocation(action)
        flags = ", ".join(flag for flag in action.option_strings if not flag.startswith("--no-"))
        return f"{flags} {self._format_args(action, str(action.metavar))}"


def _flags(option: Option) -> list[str]:
    flags = ([option.short] if option.short else []) + [option.flag]
    return flags + ([f"--no-{option.flag[2:]}"] if option.type == "bool" else [])


def _metavar(option: Option) -> str:
    if option.choices and isinstance(option.choices, tuple):
        return "{" + ",".join(map(str, option.choices)) + "}"
    if option.takes_address:
        return "NAME"
    words = {"paths": "PATH", "mapping": "KEY=VALUE", "properties": "NAME"}
    return words.get(option.type, option.type.upper())


def _help(option: Option) -> str:
    choices = f" One of {', '.join(map(str, option.names))}." if option.takes_address else ""
    default = "" if option.default in (None, []) else f" (default: {option.default})"
    return (option.help + choices + default).replace("%", "%%")


def _unknown(word: str) -> str:
    name = word.partition("=")[0]
    if not name.startswith("-"):
        hint = f" Did you mean '--conf {word}'?" if word.endswith((".yaml", ".yml")) else ""
        return f"{word!r} belongs to no flag.{hint} See torchmd-train --help."
    key = name.lstrip("-").replace("-", "_")
    if key.startswith("no_") and key[3:] in OPTIONS:
        option = OPTIONS[key[3:]]
        return f"{name}: {option.key} is not a true/false option. It takes {option.expects}."
    if key in SYNONYMS:
        return f"unknown option {name}. Did you mean {OPTIONS[SYNONYMS[key]].flag!r}? See torchmd-train --help."
    near = did_you_mean("--" + key.replace("_", "-"), [option.flag for option in OPTIONS.values()])
    return f"unknown option {name}.{near} See torchmd-train --help."
