"""``torchmd-train``: from a configuration to a trained potential."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmdnet._version import __version__
from torchmdnet.config.command_line import get_argparse
from torchmdnet.config.stopping import Stopped, stop_signals
from torchmdnet.errors import CheckpointError, ConfigError, DataError, PeerError, ResultError, shown
from torchmdnet.files import ensure_home
from torchmdnet.switches import is_on

__all__ = ["fix_state_dict", "get_argparse", "get_args", "main", "train"]


def get_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, make ``log_dir`` with ``input.yaml`` in it, and with ``redirect`` start its ``log``.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Raises:
        ConfigError: With the place, the key, the value, and the accepted values. Nothing has been written then.
    """
    from torchmdnet.config.command_line import resolve
    from torchmdnet.config.launcher import check_environment, check_launcher
    from torchmdnet.config.rundir import is_main_process, prepare_log_dir, redirect, undo_log_dir

    check_environment()
    args = resolve(argv)
    check_launcher(args.num_nodes)
    from torchmdnet.training.distributed import choose_world

    choose_world(args.ngpus, args.num_nodes)
    try:
        prepare_log_dir(args)
    except ConfigError:
        undo_log_dir(args.log_dir)
        raise
    if args.redirect and is_main_process():
        atexit.register(redirect(args.log_dir))
    return args


def train(settings: str | os.PathLike[str] | Mapping[str, Any] | None = None, /, **options: Any) -> Path:
    """Train a potential, as ``torchmd-train`` does.

    .. code-block:: python

        folder = torchmdnet.train("my.yaml", log_dir="out", num_epochs=50)
        folder = torchmdnet.train(dataset="TinyQM", model="tensornet", derivative=True, log_dir="out")

    Args:
        settings: A YAML file, or a mapping of options to values; None for defaults.
        **options: Options that win over ``settings``.

    Returns:
        The folder of the run, with ``potential.safetensors`` and ``report.html``.

    Raises:
        ConfigError: If settings cannot work together or with the data; nothing is trained then.
        DataError: If the data cannot be used.
        CheckpointError: If a checkpoint to start from cannot be used.
        SystemExit: After Ctrl-C or SIGTERM, with the status that shells expect.
    """
    from torchmdnet.config.reader import write_yaml
    from torchmdnet.parse import parse_yaml_mapping, read_text
    from torchmdnet.training.run import train as train_with

    given: Mapping[str, Any] = {}
    if isinstance(settings, Mapping):
        given = settings
    elif settings is not None:
        name = os.fspath(settings)
        given, _ = parse_yaml_mapping(read_text(name, name), name, "Write dataset: TinyQM, for example.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.yaml"
        write_yaml(path, {**given, **options})
        args = get_args(["--conf", str(path)])
    args.conf = None
    return train_with(args)


def fix_state_dict(ckpt: Mapping[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` of a checkpoint without the prefix ``model.``, and with the names that heads have today."""
    from torchmdnet.checkpoint.migrations import rename_head_layers, strip_module_prefix

    state, _ = rename_head_layers(*strip_module_prefix(dict(ckpt["state_dict"]), {}))
    return state


def main(argv: Sequence[str] | None = None) -> None:
    """Train.

    An error is printed in one line, ``error: ...``, and ends the program: with status 2 for settings, 1 for data and
    model files, for results that a finished run could not write, and for lost processes. ``TORCHMDNET_TRACEBACK=1``
    shows where it was found.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        get_argparse().print_help()  # before anything that takes time to load
        return
    if words == ["--version"]:
        print(f"torchmd-train {__version__}")
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `model: my_nets:MyNet` finds my_nets.py here
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # lost connections are told in one line, without C++ frames
    streams = sys.stdout, sys.stderr
    _show_notices()
    try:
        with stop_signals():
            ensure_home()
            args = get_args(words)

            from torchmdnet.training.run import train as train_with

            train_with(args)
    except (ConfigError, DataError, CheckpointError, PeerError, ResultError, OSError, MemoryError) as error:
        if is_on("TORCHMDNET_TRACEBACK"):
            raise
        print(f"error: {shown(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None
    except KeyboardInterrupt as stop:
        if is_on("TORCHMDNET_TRACEBACK"):
            raise
        stop = stop if isinstance(stop, Stopped) else Stopped()
        print(f"{stop.name}: stopped before anything was saved. Start the same command again.", file=sys.stderr)
        raise SystemExit(stop.status) from None
    finally:
        sys.stdout, sys.stderr = streams


def _show_notices() -> None:
    """Show what the package logs, from the first of several processes."""
    from torchmdnet.config.rundir import is_main_process

    logger = logging.getLogger("torchmdnet")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)


if __name__ == "__main__":
    main()
