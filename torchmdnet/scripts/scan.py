"""``torchmd-net scan``: energies of pairs of atoms, and along distances, angles and torsions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmdnet.errors import ConfigError
from torchmdnet.files import draft_of, plain, write_json
from torchmdnet.scripts.argument_types import count, finite, index, positive
from torchmdnet.scripts.folder import MARK, add_folder_options, results_folder
from torchmdnet.scripts.potential import (
    MODEL,
    add_potential_options,
    add_state_options,
    calculator_of,
    check_fits,
    structures_of,
)
from torchmdnet.scripts.progress import Meter

__all__ = ["get_parser", "main"]

OUTPUTS = ("curves.csv", "scan*.extxyz", "plots.png", "report.html", "summary.json", MARK)
#: At the cutoff larger steps than these are told: meV and meV/Å.
ROUGH = (1.0, 10.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Scan, print what was found, and write a folder.

    Raises:
        ConfigError: If an argument cannot work.
        DataError: If the file cannot be read, or a relaxation does not come to its end.
    """
    args = get_parser().parse_args(argv)
    asked = [name for name in ("bond", "angle", "torsion") if getattr(args, name)]
    if args.structure is None and asked:
        raise ConfigError(f"--{asked[0]}: no structure is given. Name one after the model.")
    if args.structure is not None and (not asked or args.dimer):
        raise ConfigError("scan: with a structure, give --bond, --angle or --torsion; --dimer needs none.")
    calculator = calculator_of(args.model, args)
    if args.structure is None:
        curves, cutoff = _dimers(calculator, args)
    else:
        cutoff = None
        curves = _coordinates(calculator, asked, args)
    with results_folder(args.out, overwrite=args.overwrite, outputs=OUTPUTS) as folder:
        write_json(folder / MARK, {"command": "scan", **{k: v for k, v in vars(args).items() if k != "json"}})
        summary = _write(folder, curves, cutoff, args)
    if args.json:
        print(json.dumps(plain(summary), indent=2, ensure_ascii=False))
    else:
        _print(summary, folder)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net scan``."""
    parser = argparse.ArgumentParser(
        prog="torchmd-net scan",
        description="Energies of pairs of atoms, or of a structure along distances, angles and torsions.",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("structure", nargs="?", help="any file ASE reads; without one: pairs of atoms")
    add_folder_options(parser, "scan")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    what = parser.add_argument_group("what to scan")
    what.add_argument(
        "--dimer", action="append", default=[], metavar="A-B", help="pairs of elements: H-O,C-C (default: all)"
    )
    for name, number, words in (("bond", 2, "a distance"), ("angle", 3, "an angle"), ("torsion", 4, "a torsion")):
        letters = tuple("IJKL"[:number])
        what.add_argument(
            f"--{name}", type=index, nargs=number, action="append", metavar=letters,
            help=f"{words} of these atoms, numbered from 0; the side of the last one moves; may be given several times",
        )  # fmt: skip
    what.add_argument("--from", dest="first", type=finite, help="in Å or degrees (default: what makes sense)")
    what.add_argument("--to", dest="last", type=finite, help="in Å or degrees")
    what.add_argument("--points", type=count, help="number of values (default: 200 for pairs, 37 otherwise)")
    what.add_argument("--relax", action="store_true", help="relax everything else at each value")
    what.add_argument(
        "--fmax", type=positive, default=0.02, help="largest force after that, in eV/Å (default: %(default)s)"
    )
    add_state_options(parser)
    add_potential_options(parser, "float64")
    return parser


def _dimers(calculator: Any, args: argparse.Namespace) -> tuple[list[Any], float | None]:
    from ase import Atoms

    from torchmdnet.calculators.loading import members_of, trained_with
    from torchmdnet.calculators.structures import known_elements
    from torchmdnet.simulation.scans import dimer_curve, pairs_of

    if args.relax:
        raise ConfigError("--relax: a pair of atoms has nothing else to relax. Leave it out.")
    model = calculator.model
    pairs = pairs_of(args.dimer, sorted(known_elements(model)))
    info = {name: getattr(args, name) for name in ("charge", "spin") if getattr(args, name) is not None}
    if trained_with(model, "charge"):
        info.setdefault("charge", 0)
    for pair in pairs:
        check_fits(calculator, Atoms(list(pair), [[0, 0, 0], [0, 0, 1]], info=info), "-".join(pair),
                   allow_unseen=args.allow_unseen)  # fmt: skip
    cutoffs = [getattr(getattr(each, "representation_model", None), "cutoff_upper", None) for each in members_of(model)]
    cutoff = None if not cutoffs or cutoffs[0] is None else float(cutoffs[0]) * calculator.units.in_angstrom
    first = 0.5 if args.first is None else args.first
    last = (cutoff or 6.0) + 0.5 if args.last is None else args.last
    _check_range(first, last, lowest=0.0)
    points = args.points or 200
    curves = []
    with Meter(len(pairs) * points) as meter:
        for number, pair in enumerate(pairs):
            curves.append(
                dimer_curve(
                    pair, calculator, first=first, last=last, points=points, cutoff=cutoff, info=info,
                    tell=lambda done, number=number, pair=pair: meter.update(number * points + done, "-".join(pair)),
                )
            )  # fmt: skip
    return curves, cutoff


def _coordinates(calculator: Any, asked: Sequence[str], args: argparse.Namespace) -> list[Any]:
    from torchmdnet.simulation.dynamics import prepared
    from torchmdnet.simulation.scans import moved_part, scan

    structures = structures_of([args.structure], args)
    if len(structures) > 1:
        raise ConfigError(f"--index: {args.index} are {len(structures)} structures. Choose one.")
    name, start = structures[0]
    check_fits(calculator, start, name, allow_unseen=args.allow_unseen)
    atoms = prepared(start, calculator)
    jobs = []
    for kind in asked:
        for indices in getattr(args, kind):
            wrong = [each for each in indices if not 0 <= each < len(atoms)]
            if wrong or len(set(indices)) < len(indices):
                raise ConfigError(
                    f"--{kind}: {' '.join(map(str, indices))} are not different atoms of {name}, 0 to {len(atoms) - 1}."
                )
            moved_part(atoms, indices)
            jobs.append((indices, _places(atoms, kind, indices, args)))
    curves = []
    with Meter(sum(len(places) for _, places in jobs)) as meter:
        before = 0
        for indices, places in jobs:
            curves.append(
                scan(atoms, indices, places, relaxed=args.relax, fmax=args.fmax,
                     tell=lambda done, before=before: meter.update(before + done, "scanning"))
            )  # fmt: skip
            before += len(places)
    return curves


def _places(atoms: Any, kind: str, indices: Sequence[int], args: argparse.Namespace) -> np.ndarray:
    now = {
        "bond": lambda: atoms.get_distance(*indices),
        "angle": lambda: atoms.get_angle(*indices),
        "torsion": lambda: atoms.get_dihedral(*indices),
    }[kind]()
    usual = {
        "bond": (0.8 * now, 1.6 * now),
        "angle": (max(now - 30, 10.0), min(now + 30, 170.0)),
        "torsion": (-180.0, 180.0),
    }[kind]
    first = usual[0] if args.first is None else args.first
    last = usual[1] if args.last is None else args.last
    _check_range(first, last, lowest=0.0 if kind == "bond" else None)
    return np.linspace(first, last, args.points or 37)


def _check_range(first: float, last: float, lowest: float | None) -> None:
    if not first < last or (lowest is not None and first <= lowest):
        raise ConfigError(
            f"--from {first:g} and --to {last:g} are no range. Give a smaller value first, above zero in Å."
        )


def _write(folder: Path, curves: Sequence[Any], cutoff: float | None, args: argparse.Namespace) -> dict[str, Any]:
    import csv

    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    from torchmdnet.page import document, escape, grid, image
    from torchmdnet.simulation.scans import draw_curves, draw_dimers
    from torchmdnet.viewer import player, structure_of

    is_dimers = args.structure is None
    plots = draw_dimers(curves, cutoff) if is_dimers else draw_curves(curves)
    with draft_of(folder / "plots.png") as draft:
        draft.write_bytes(plots)
    with draft_of(folder / "curves.csv") as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["curve", "value", "unit", "energy_eV", "slope_eV_A"])
        for curve in curves:
            slopes = curve.slopes if curve.slopes is not None else [""] * len(curve.places)
            for row in zip(curve.places, curve.energies, slopes, strict=True):
                writer.writerow([curve.name, row[0], curve.unit, row[1], row[2]])
    summary: dict[str, Any] = {"folder": str(folder), "cutoff_A": cutoff, "curves": [c.summary() for c in curves]}
    write_json(folder / "summary.json", summary)
    sets = {}
    if not is_dimers:
        for number, curve in enumerate(curves):
            for frame, place, energy in zip(curve.frames, curve.places, curve.energies, strict=True):
                frame.info["value"] = float(place)
                frame.calc = SinglePointCalculator(frame, energy=float(energy))
            name = "scan.extxyz" if len(curves) == 1 else f"scan_{number}.extxyz"
            with draft_of(folder / name) as draft:
                write(draft, curve.frames, format="extxyz")
            lowest = curve.energies.min()
            sets[curve.name] = [
                structure_of(frame) | {"words": f"{place:.2f} {curve.unit}, {1000 * (energy - lowest):.1f} meV"}
                for frame, place, energy in zip(curve.frames, curve.places, curve.energies, strict=True)
            ]
    header, rows = _table(summary)
    title = "Pairs of atoms" if is_dimers else f"Scan of {curves[0].frames[0].get_chemical_formula()}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(args.model)}</p>',
        image(plots, "Plots"),
        "<h2>Numbers</h2>" + grid(header, rows, 1),
        "<h2>Structures</h2>" + player(sets, curves[0].frames[0].numbers) if sets else "",
    ]
    with draft_of(folder / "report.html") as draft:
        draft.write_text(document(title, parts), encoding="utf-8")
    return summary


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    curves = summary["curves"]
    if "largest_mismatch_of_forces_meV_A" in curves[0]:
        header = ["pair", "lowest at [Å]", "depth [eV]", "force against energy [meV/Å]", "step at the cutoff [meV]",
                  "step of the force [meV/Å]"]  # fmt: skip
        rows = []
        for each in curves:
            depth = each["energies_eV"][-1] - each["lowest_energy_eV"]
            steps = [each.get(key) for key in ("energy_jump_at_cutoff_meV", "force_jump_at_cutoff_meV_A")]
            rows.append([each["name"], f"{each['lowest_at']:.3f}", f"{depth:.3f}",
                         f"{each['largest_mismatch_of_forces_meV_A']:.2g}",
                         *("" if step is None else f"{step:.2g}" for step in steps)])  # fmt: skip
        return header, rows
    header = ["coordinate", "lowest at", "highest at", "unit", "barrier [meV]"]
    return header, [
        [c["name"], f"{c['lowest_at']:.2f}", f"{c['highest_at']:.2f}", c["unit"], f"{1000 * c['barrier_eV']:.1f}"]
        for c in curves
    ]


def _print(summary: dict[str, Any], folder: Path) -> None:
    header, rows = _table(summary)
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    rough = [
        each["name"]
        for each in summary["curves"]
        if each.get("energy_jump_at_cutoff_meV", 0) > ROUGH[0] or each.get("force_jump_at_cutoff_meV_A", 0) > ROUGH[1]
    ]
    if rough:
        print(f"not smooth at the cutoff of {summary['cutoff_A']:g} Å: {', '.join(rough)}")
    elif summary["cutoff_A"] is not None:
        print(f"smooth at the cutoff of {summary['cutoff_A']:g} Å: steps below {ROUGH[0]:g} meV and {ROUGH[1]:g} meV/Å")
    print(f"page: {folder / 'report.html'}")
