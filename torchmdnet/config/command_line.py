"""The command line of ``torchmd-train``: its parser, and the settings of a run that it leads to.

What reads and checks values is loaded when there are some, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchmdnet.config.parser import TrainParser, build_parser

__all__ = ["get_argparse", "resolve"]

logger = logging.getLogger(__name__)


def get_argparse() -> TrainParser:
    """The parser of ``torchmd-train``.

    Its ``parse_args`` returns the settings of a run: files merged, every value checked by itself.
    :func:`resolve` also checks that they fit together.
    """

    def program(given: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
        from torchmdnet.config.settings import merge

        return merge(given).values()

    return build_parser(program)


def resolve(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line and everything it refers to.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.

    Returns:
        A value for every key of the option table, checked one by one and together. ``log_dir`` and
        ``inference_batch_size`` are filled in.

    Raises:
        ConfigError: With the place, the key, the value, and the accepted values.
    """
    from torchmdnet.config.checks import check
    from torchmdnet.config.settings import Settings, merge

    settings = Settings()

    def program(given: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
        nonlocal settings
        settings = merge(given)
        return settings.values()

    args = build_parser(program).parse_args(argv)
    check(args, settings)
    if args.inference_batch_size is None:
        args.inference_batch_size = args.batch_size
    if args.log_dir is None:
        args.log_dir = _fresh_log_dir(args)
        logger.info("Everything this run writes goes to %s (--log-dir chooses another folder).", args.log_dir)
    return args


def _fresh_log_dir(args: argparse.Namespace) -> str:
    """``runs/<dataset>-<model>-<time>``, not used before and the same for every process of this run."""
    inherited = os.environ.get("TORCHMDNET_LOG_DIR")
    if inherited and os.environ.get("LOCAL_RANK", "0") != "0":
        return inherited
    parts = [re.sub(r"\W+", "_", str(word).rpartition(":")[2]) for word in (args.dataset, args.model)]
    job = os.environ.get("SLURM_JOB_ID") if int(os.environ.get("SLURM_NTASKS") or 1) > 1 else None
    stamp = f"job{job}" if job else datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path("runs", "-".join([*parts, stamp]))
    number_of_try = 1
    while path.exists() and not job:
        number_of_try += 1
        path = path.with_name("-".join([*parts, stamp, str(number_of_try)]))
    # Lightning starts the other processes of a node from this one.
    os.environ["TORCHMDNET_LOG_DIR"] = str(path)
    return str(path)
