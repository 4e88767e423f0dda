"""``torchmd-net completion``: scripts with which a shell completes commands, flags and values."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from torchmdnet.errors import ConfigError

__all__ = ["get_parser", "main"]

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the script for one shell; it completes ``torchmd-net`` and ``torchmd-train``.

    Raises:
        ConfigError: If the package that writes the scripts is not installed.
    """
    shell = get_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion: the package shtab is not installed. Run 'pip install shtab'.") from None
    parsers = [_commands(), _train()]
    for parser in parsers:
        _describe(parser, shtab.FILE)
    if shell == "zsh":  # completion is off until compinit has run
        print("(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }")
    for parser in parsers:
        print(shtab.complete(parser, shell))


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net completion``."""
    parser = argparse.ArgumentParser(
        prog="torchmd-net completion",
        description="Print a script with which a shell completes torchmd-net and torchmd-train with the tab key.",
        epilog="Write it to a file, torchmd-net completion bash > ~/.torchmd-completion, and load that in new shells: "
        "'source ~/.torchmd-completion' in ~/.bashrc or ~/.tcshrc, 'eval \"$(<~/.torchmd-completion)\"' in ~/.zshrc.",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to write for")
    return parser


def _commands() -> argparse.ArgumentParser:
    """``torchmd-net`` with all of its commands as one parser."""
    from torchmdnet.scripts.main import COMMANDS

    parser = argparse.ArgumentParser(prog="torchmd-net")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, (what, address) in COMMANDS.items():
        own = importlib.import_module(address.partition(":")[0]).get_parser()
        commands.add_parser(name, help=what, parents=[own], add_help=False)
    return parser


def _train() -> argparse.ArgumentParser:
    """``torchmd-train``, with the values that its options accept."""
    from torchmdnet.config.command_line import get_argparse
    from torchmdnet.options import OPTIONS

    parser = get_argparse()
    for action in parser._actions:
        option = OPTIONS.get(action.dest)
        if option is not None:
            values = ("true", "false") if option.type == "bool" else option.names
            action.choices = [str(value) for value in values] or None
    return parser


def _describe(parser: argparse.ArgumentParser, files: object) -> None:
    """Complete paths wherever no values are listed."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _describe(command, files)
        elif action.choices is None and action.nargs != 0:
            action.complete = files  # type: ignore[attr-defined]
