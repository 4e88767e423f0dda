"""``torchmd-net sample``: structures around given ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torchmdnet.errors import ConfigError
from torchmdnet.scripts.argument_types import CommandParser, count, non_negative, positive, seed
from torchmdnet.scripts.label import add_calculator_options, bytes_of, interruptible, method_of, tell_failed

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Sample structures and write them; what failed is told and left out.

    Raises:
        ConfigError: If an argument or the calculator cannot work.
        DataError: If a file cannot be read or written, or nothing could be sampled.
    """
    args = get_parser().parse_args(argv)
    if args.calculator is None and (args.option or args.level_of_theory):
        raise ConfigError("calculator: none is given to take --option or --level-of-theory. Pass --calculator.")
    method = method_of(args) if args.calculator is not None else None

    from torchmdnet.labelling.label import journal_of
    from torchmdnet.labelling.sample import Sampling, sample

    sampling = Sampling(
        method=args.method,
        count=args.count,
        seed=args.seed,
        temperatures=tuple(args.temperature),
        relax=args.relax,
        timestep=args.timestep,
        friction=args.friction,
        interval=args.interval,
        equilibration=args.equilibration,
        stdev=args.stdev,
        strain=args.strain,
        min_distance=args.min_distance,
    )
    with interruptible():
        summary = sample(
            args.structures,
            args.output,
            sampling,
            method,
            processes=args.processes,
            retry=args.retry,
            timeout=args.timeout,
            memory=bytes_of(args.memory),
        )
    print(f"{args.output}: {summary.written} structures by {args.method}")
    if summary.dropped:
        print(f"{summary.dropped.total()} structures were out of bounds and are left out:")
        for reason, number in summary.dropped.most_common(5):
            print(f"  {number} × {reason}")
    tell_failed(summary, str(journal_of(args.output)), args.allow_failed)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net sample``."""
    parser = CommandParser(
        prog="torchmd-net sample",
        description="Sample structures around given ones, for torchmd-net label to compute. The same seed gives the "
        "same structures with any number of processes.",
    )
    parser.add_argument("structures", nargs="+", help="files that ASE reads, or patterns")
    parser.add_argument("-o", "--output", required=True, type=Path, help="file to write, .extxyz")
    parser.add_argument(
        "-m", "--method", required=True, help="md: Langevin dynamics; modes: along normal modes; rattle: random "
        "displacements"
    )  # fmt: skip
    parser.add_argument(
        "-n", "--count", type=count, default=10, help="structures for each one given and each temperature (default: "
        "%(default)s)"
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--relax", action="store_true", help="relax the atoms first, as modes always does")
    parser.add_argument(
        "--min-distance", type=non_negative, default=0.6, help="of two atoms, as a fraction of the sum of their "
        "covalent radii; modes and rattle (default: %(default)s)"
    )  # fmt: skip
    heat = parser.add_argument_group("md and modes")
    heat.add_argument(
        "-t", "--temperature", type=positive, nargs="+", default=[300.0], help="one or more, in K (default: 300)"
    )
    motion = parser.add_argument_group("md")
    motion.add_argument("--timestep", type=positive, default=0.5, help="in fs (default: %(default)s)")
    motion.add_argument(
        "--interval", type=positive, default=50.0, help="between structures, in fs (default: %(default)s)"
    )
    motion.add_argument(
        "--equilibration", type=non_negative, default=200.0, help="before the first one, in fs (default: %(default)s)"
    )
    motion.add_argument("--friction", type=positive, default=0.02, help="in 1/fs (default: %(default)s)")
    random = parser.add_argument_group("rattle")
    random.add_argument(
        "--stdev", type=positive, default=0.05, help="standard deviation along each axis, in Å (default: %(default)s)"
    )
    random.add_argument(
        "--strain",
        type=non_negative,
        default=0.0,
        help="standard deviation of the strain of cells (default: %(default)s)",
    )
    add_calculator_options(parser, required=False, timeout=604800.0, piece="a starting structure at a temperature")
    return parser
