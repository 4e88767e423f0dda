"""``torchmd-net export``: a model as a package that runs without this one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target
from torchmdnet.scripts.argument_types import CommandParser
from torchmdnet.scripts.progress import Steps

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Write a package and say what it takes and returns.

    Raises:
        ConfigError: If an argument cannot work, or the model has parts that look for pairs themselves.
        CheckpointError: If the model cannot be read.
    """
    args = get_parser().parse_args(argv)
    target = check_target(args.package, "package")
    if target.exists() and not args.overwrite:
        raise ConfigError(f"{target} exists. Pass --overwrite to replace it, or choose another name.")

    import torch

    from torchmdnet.checkpoint import load_model
    from torchmdnet.export import INPUTS, OUTPUTS, export_model
    from torchmdnet.potential import TorchMD_Net

    with Steps(3, ticking=True) as steps:
        steps.begin(f"reading {args.model}")
        model = load_model(args.model, device=args.device)
        if not isinstance(model, TorchMD_Net):
            raise ConfigError(f"{args.model} is an ensemble. Export its members one by one.")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        card = export_model(model, target, inputs=args.inputs, dtype=dtype, device=args.device, begin=steps.begin)
    print(f"{target}: {card['architecture']}, {card['dtype']}, {card['device']}, cutoff {card['cutoff']} Å")
    print(f"in {card['energy_unit']} and {card['length_unit']}; any number of atoms, edges and systems")
    for title, entries in (("takes", INPUTS[args.inputs]), ("returns", OUTPUTS)):
        print(f"\n{title}, in this order")
        for name, what in entries.items():
            print(f"  {name:<13}  {what}")


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net export``."""
    parser = CommandParser(
        prog="torchmd-net export",
        description="Write a package (AOTInductor) that gives energies, forces and virials for edges that its caller "
        "finds. It is loaded by PyTorch alone, from Python or C++. Writing it takes minutes and a C++ compiler.",
    )
    parser.add_argument("model", help="a native file (.safetensors) or a checkpoint (.ckpt)")
    parser.add_argument("package", help="the file to write, ends in .pt2")
    parser.add_argument(
        "--inputs",
        choices=("edges", "positions"),
        default="edges",
        help="whether the package takes edge vectors, or positions and shifts (default: edges)",
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision; by default that of the model")
    parser.add_argument("--device", default="cpu", help="where the package will run (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace the package if it exists")
    return parser
