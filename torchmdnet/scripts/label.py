"""``torchmd-net label``: energies and forces for structures."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import ConfigError
from torchmdnet.scripts.argument_types import CommandParser, limit, positive, processes

if TYPE_CHECKING:
    from torchmdnet.labelling.label import Summary
    from torchmdnet.labelling.methods import Method

__all__ = ["add_calculator_options", "bytes_of", "get_parser", "interruptible", "main", "method_of", "tell_failed"]


def main(argv: Sequence[str] | None = None) -> None:
    """Compute labels and write them; what failed is told and left out.

    Raises:
        ConfigError: If an argument or the calculator cannot work.
        DataError: If a file cannot be read or written, or no structure could be labelled.
    """
    args = get_parser().parse_args(argv)
    method = method_of(args)

    from torchmdnet.labelling.label import journal_of, label

    with interruptible():
        summary = label(
            args.structures,
            args.output,
            method,
            properties=args.properties.replace(",", " ").split(),
            processes=args.processes,
            retry=args.retry,
            timeout=args.timeout,
            memory=bytes_of(args.memory),
        )
    print(f"{args.output}: {summary.written} structures with {method.level_of_theory}, {summary.computed} of them new")
    tell_failed(summary, str(journal_of(args.output)), args.allow_failed)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net label``."""
    parser = CommandParser(
        prog="torchmd-net label",
        description="Compute energies and forces for structures, in parallel. Run the same command again after an "
        "interruption, or when structures have been added: only what is missing is computed.",
    )
    parser.add_argument("structures", nargs="+", help="files that ASE reads, or patterns")
    parser.add_argument("-o", "--output", required=True, type=Path, help="file to write: .extxyz, or .h5 (HDF5)")
    add_calculator_options(parser, required=True, timeout=86400.0, piece="a structure")
    parser.add_argument(
        "--properties", default="", help="what to compute: energy,forces,stress,dipole,charges (default: energy and "
        "forces, the stress of cells, and dipole and charges where they come with the rest)"
    )  # fmt: skip
    return parser


def add_calculator_options(parser: argparse.ArgumentParser, *, required: bool, timeout: float, piece: str) -> None:
    """The arguments that ``label`` and ``sample`` share.

    Args:
        parser: Gets the arguments.
        required: Whether a calculator has to be given.
        timeout: Default of the time for each piece of work, in seconds.
        piece: What a piece of work is.
    """
    parser.add_argument(
        "-c", "--calculator", required=required, help="gfn2-xtb, gfn1-xtb (both by tblite), emt, lj, or "
        "package.module:factory, a function or class that returns an ASE calculator"
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="keyword argument of the calculator; may be "
        "given several times"
    )  # fmt: skip
    parser.add_argument("--level-of-theory", help="what to call it in the data (default: name and options)")
    parser.add_argument(
        "-p", "--processes", type=processes, default=1, help="how many structures at once; 0: one for each core "
        "(default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument(
        "--allow-failed", action="store_true", help="end with status 0 although some failed (default: status 1, once "
        "the rest is written)"
    )  # fmt: skip
    days = f"{timeout / 86400:g} {'day' if timeout == 86400 else 'days'}"
    parser.add_argument(
        "--timeout", type=limit, default=timeout, metavar="SECONDS", help=f"after which {piece} counts as "
        f"failed; inf: never (default: {timeout:.0f}, {days})"
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=positive, metavar="GB", help="that all processes may use together; beyond, the largest one "
        f"is ended and its work, {piece}, counts as failed (default: nine tenths of what is available at the start)"
    )  # fmt: skip


def method_of(args: argparse.Namespace) -> Method:
    """The calculator that the arguments name."""
    from torchmdnet.labelling.methods import Method

    return Method(args.calculator, _options(args.option), args.level_of_theory)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """``accuracy=0.1`` as ``{"accuracy": 0.1}``; values as in YAML."""
    from torchmdnet.parse import parse_yaml
    from torchmdnet.text import check_text

    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--option {word}: should be KEY=VALUE, such as accuracy=0.1.")
        options[key] = parse_yaml(check_text(value, "--option"), f"--option {key}")
        try:
            json.dumps(options[key], allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"--option {word}: the value is not made of text, finite numbers, true, false, lists and mappings."
            ) from None
    return options


def bytes_of(gigabytes: float | None) -> float | None:
    """The value of ``--memory`` in bytes."""
    return None if gigabytes is None else gigabytes * 1e9


def tell_failed(summary: Summary, journal: str, allowed: bool) -> None:
    """Say what failed, where first, and how to go on.

    Args:
        summary: What has become of the structures.
        journal: Where failures are listed.
        allowed: Whether the command ends with status 0 all the same.

    Raises:
        SystemExit: With status 1 if something failed and that is not allowed.
    """
    failed = summary.failed
    if not failed:
        return
    print(f"{failed.total()} failed and are left out; --retry tries them again. They are named in {journal}.")
    for message, count in failed.most_common(5):
        print(f"  {count} × {message} ({'first: ' if count > 1 else ''}{summary.where[message]})")
    if len(failed) > 5:
        print(f"  and {len(failed) - 5} other errors")
    if not allowed:
        print("The rest is written. --allow-failed makes this status 0.")
        raise SystemExit(1)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Say what an interruption means."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
