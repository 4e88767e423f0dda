"""``torchmd-net``: what one does before and after training."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from torchmdnet._version import __version__
from torchmdnet.config.stopping import Stopped, stop_signals
from torchmdnet.errors import CheckpointError, ConfigError, DataError, did_you_mean, shown
from torchmdnet.files import ensure_home, reader_may_end
from torchmdnet.switches import check_switches, is_on

__all__ = ["COMMANDS", "main"]

#: Name -> what it does, and the function that takes its arguments; imported when asked for.
COMMANDS = {
    "data": ("say what is in a data set and what is wrong with it", "torchmdnet.scripts.data:main"),
    "info": ("say what is in a model file", "torchmdnet.scripts.info:main"),
    "convert": ("bring a model file into another format, and verify it", "torchmdnet.scripts.convert:main"),
    "sample": (
        "sample structures by dynamics, along normal modes or at random",
        "torchmdnet.scripts.sample:main",
    ),
    "label": ("compute energies and forces for structures with any ASE calculator", "torchmdnet.scripts.label:main"),
    "md": ("run molecular dynamics that can be killed and goes on", "torchmdnet.scripts.md:main"),
    "relax": ("bring structures to their minimum of energy", "torchmdnet.scripts.relax:main"),
    "vib": ("vibrations, infrared spectra, thermochemistry, phonons", "torchmdnet.scripts.vib:main"),
    "scan": ("energies of pairs of atoms, along distances, angles and torsions", "torchmdnet.scripts.scan:main"),
    "eval": ("compare models with reference data, on a page that shows structures", "torchmdnet.scripts.eval:main"),
    "export": ("write a file for C++, OpenMM-Torch, GROMACS or LAMMPS", "torchmdnet.scripts.export:main"),
    "bench": (
        "time a model on every route to its forces, each compared with exact float64",
        "torchmdnet.scripts.bench:main",
    ),
    "completion": (
        "print a script with which a shell completes commands and flags",
        "torchmdnet.scripts.completion:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    An error is printed in one line, ``error: ...``, and ends the program: with status 2 for arguments, 1 for
    files. ``TORCHMDNET_TRACEBACK=1`` shows where it was found.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"torchmd-net {__version__}")
        return
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(
                f"command: {words[0]!r} is not available.{did_you_mean(words[0], COMMANDS)} "
                f"Choose from {', '.join(COMMANDS)}."
            )
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # `model: my_nets:MyNet` finds my_nets.py here
        check_switches()
        _show_notices()
        ensure_home()
        _check_words(words)
        module, _, function = COMMANDS[words[0]][1].partition(":")
        with reader_may_end(), stop_signals():
            getattr(importlib.import_module(module), function)(words[1:])
    except (ConfigError, DataError, CheckpointError, OSError, MemoryError) as error:
        if is_on("TORCHMDNET_TRACEBACK"):
            raise
        print(f"error: {shown(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt as stop:
        if is_on("TORCHMDNET_TRACEBACK"):
            raise
        stop = stop if isinstance(stop, Stopped) else Stopped()
        print(f"{stop.name}: stopped before the end.", file=sys.stderr)
        raise SystemExit(stop.status) from None


def _check_words(words: Sequence[str]) -> None:
    """Refuse arguments without a character: a variable of a shell that is not set, mostly."""
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and equals:
            name, text = flag, value
        else:
            before = words[number - 1]
            name, text = before if before.startswith("-") else f"argument {number} of torchmd-net {words[0]}", word
        if not text.strip():
            raise ConfigError(f"{name} is empty. Give it a value, or leave it out.")


def usage() -> str:
    """The table of commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name.ljust(width)}  {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: torchmd-net COMMAND ...",
            "",
            *rows,
            "",
            "torchmd-net COMMAND --help says more. To train, use torchmd-train.",
        ]
    )


def _show_notices() -> None:
    """Show what the package logs."""
    logger = logging.getLogger("torchmdnet")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
