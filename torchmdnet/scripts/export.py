"""``torchmd-net export``: a model as a file that runs without this package, or that an engine loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchmdnet.errors import ConfigError
from torchmdnet.files import check_target
from torchmdnet.scripts.argument_types import CommandParser
from torchmdnet.scripts.progress import Steps

__all__ = ["get_parser", "main"]

#: Formats, and how their files end.
FORMATS = {"package": ".pt2", "torchscript": ".pt", "metatomic": ".pt", "lammps": ".pkl"}
#: Options that only some formats read, and their values unless they are given.
OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "inputs": (("package",), "edges"),
    "interface": (("torchscript",), "model"),
    "structure": (("torchscript",), None),
    "style": (("lammps",), "metal"),
    "charge": (("torchscript", "metatomic", "lammps"), 0.0),
    "spin": (("torchscript", "metatomic", "lammps"), None),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write a file and say what it takes and returns.

    Raises:
        ConfigError: If an argument cannot work, or the model has parts that look for pairs themselves.
        CheckpointError: If the model cannot be read.
    """
    args = get_parser().parse_args(argv)
    target = check_target(args.package, "package")
    if target.exists() and not args.overwrite:
        raise ConfigError(f"{target} exists. Pass --overwrite to replace it, or choose another name.")
    for name, (formats, default) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.format not in formats:
            raise ConfigError(f"--{name}: --format {args.format} does not read it, but {', '.join(formats)}.")

    import torch

    from torchmdnet.checkpoint import load_model
    from torchmdnet.potential import TorchMD_Net

    with Steps(3 if args.format == "package" else 2, ticking=True) as steps:
        steps.begin(f"reading {args.model}")
        model = load_model(args.model, device=args.device)
        if not isinstance(model, TorchMD_Net):
            raise ConfigError(f"{args.model} is an ensemble. Export its members one by one.")
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        lines = _WRITERS[args.format](model, target, args, dtype, steps)
    print("\n".join(lines))


def _package(model: Any, target: Path, args: argparse.Namespace, dtype: Any, steps: Steps) -> list[str]:
    from torchmdnet.export import INPUTS, OUTPUTS, export_model

    card = export_model(model, target, inputs=args.inputs, dtype=dtype, device=args.device, begin=steps.begin)
    lines = [
        f"{target}: {card['architecture']}, {card['dtype']}, {card['device']}, cutoff {card['cutoff']} Å",
        f"in {card['energy_unit']} and {card['length_unit']}; any number of atoms, edges and systems",
    ]
    for title, entries in (("takes", INPUTS[args.inputs]), ("returns", OUTPUTS)):
        lines += ["", f"{title}, in this order", *(f"  {name:<13}  {what}" for name, what in entries.items())]
    return lines


def _torchscript(model: Any, target: Path, args: argparse.Namespace, dtype: Any, steps: Steps) -> list[str]:
    from torchmdnet.scripting import INTERFACES, export_torchscript

    if (args.structure is None) != (args.interface != "openmm"):
        raise ConfigError("--structure: needed for --interface openmm, which passes positions alone, and for no other.")
    numbers = None
    if args.structure is not None:
        from torchmdnet.calculators.structures import read_structure

        numbers = read_structure(args.structure).numbers.tolist()
    steps.begin("scripting it")
    export_torchscript(
        model,
        target,
        interface=args.interface,
        numbers=numbers,
        charge=args.charge,
        spin=args.spin,
        dtype=dtype,
        device=args.device,
    )
    return [f"{target}: TorchScript, any number of atoms, any box", f"called with {INTERFACES[args.interface]}"]


def _lammps(model: Any, target: Path, args: argparse.Namespace, dtype: Any, steps: Steps) -> list[str]:
    from torchmdnet.calculators.lammps import export_lammps

    steps.begin("writing it")
    written = export_lammps(model, target, style=args.style, dtype=dtype, charge=args.charge, spin=args.spin)
    elements = " ".join(written.element_types[:12]) + (" ..." if len(written.element_types) > 12 else "")
    return [
        f"{target}: for pair_style mliap unified, cutoff {2 * written.rcutfac:g} Å, total charge {written.charge:g}",
        f"elements {elements}",
        "",
        f"  units       {written.style}",
        "  newton      on",
        f"  pair_style  mliap unified {target.name} 0",
        "  pair_coeff  * * ELEMENT ...   # one for each atom type",
    ]


def _metatomic(model: Any, target: Path, args: argparse.Namespace, dtype: Any, steps: Steps) -> list[str]:
    try:
        from torchmdnet.calculators.metatomic import export_metatomic
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("metatomic", "metatensor"):
            raise
        raise ConfigError('--format metatomic: pip install "torchmd-net[metatomic]" first.') from None

    steps.begin("scripting it")
    written = export_metatomic(model, target, dtype=dtype, charge=args.charge, spin=args.spin)
    about = written.capabilities()
    unit = about.outputs["energy"].unit
    return [
        f"{target}: metatomic, {about.dtype}, energies of systems and atoms in {unit}, lengths in {about.length_unit}",
        f"interaction range {about.interaction_range:g}, total charge {args.charge:g}",
    ]


_WRITERS = {"package": _package, "torchscript": _torchscript, "metatomic": _metatomic, "lammps": _lammps}


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net export``."""
    parser = CommandParser(
        prog="torchmd-net export",
        description="Write a model as a file for other programs. package: machine code (AOTInductor) for edges that "
        "its caller finds, in Python or C++; writing it takes minutes and a C++ compiler. torchscript: finds "
        "neighbours itself, for OpenMM-Torch, GROMACS and C++. metatomic: for the engines it serves. lammps: for "
        "pair_style mliap unified on any number of ranks.",
    )
    parser.add_argument("model", help="a native file (.safetensors) or a checkpoint (.ckpt)")
    endings = ", ".join(f"{ending} ({name})" for name, ending in FORMATS.items() if name in _WRITERS)
    parser.add_argument("package", help=f"the file to write, ends in {endings}")
    parser.add_argument("--format", choices=tuple(_WRITERS), default="package", help="what to write (default: package)")
    parser.add_argument(
        "--inputs",
        choices=("edges", "positions"),
        help="whether a package takes edge vectors, or positions and shifts (default: edges)",
    )
    parser.add_argument(
        "--interface",
        choices=("model", "openmm", "gromacs"),
        help="how TorchScript is called: as the model is, or as one of these programs does (default: model)",
    )
    parser.add_argument("--structure", help="a file with the atoms, whose elements --interface openmm needs")
    parser.add_argument("--style", choices=("metal", "real"), help="units of LAMMPS (default: metal)")
    parser.add_argument("--charge", type=float, help="total charge of the system in e, kept in the file (default: 0)")
    parser.add_argument("--spin", type=float, help="its spin in the convention of the training data")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="precision; by default that of the model")
    parser.add_argument("--device", default="cpu", help="where the package will run (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace the package if it exists")
    return parser
