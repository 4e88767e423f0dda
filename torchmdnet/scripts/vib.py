"""``torchmd-net vib``: vibrations of molecules, phonons of crystals."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import draft_of, plain, write_json
from torchmdnet.scripts.argument_types import count, non_negative, positive
from torchmdnet.scripts.folder import MARK, add_folder_options, results_folder
from torchmdnet.scripts.potential import (
    MODEL,
    add_potential_options,
    add_state_options,
    calculator_of,
    check_fits,
    hold,
    structures_of,
)
from torchmdnet.scripts.progress import Meter

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["get_parser", "main"]

OUTPUTS = ("modes.extxyz", "hessian.npy", "minimum.extxyz", "modes.csv", "bands.csv", "plots.png", "report.html",
           "summary.json", "phonopy.yaml", MARK)  # fmt: skip
#: Largest force of a structure at its minimum, in eV/Å.
STATIONARY = 0.02
KJ_PER_MOL = 96.48533212331


def main(argv: Sequence[str] | None = None) -> None:
    """Vibrations of one structure: print them, and write a folder.

    Raises:
        ConfigError: If an argument cannot work, or the structure is not at a minimum.
        DataError: If the file cannot be read, or its minimum cannot be reached.
        SystemExit: With 1 where modes are imaginary.
    """
    args = get_parser().parse_args(argv)
    structures = structures_of([args.structure], args)
    if len(structures) > 1:
        raise ConfigError(f"--index: {args.index} are {len(structures)} structures. Choose one.")
    name, start = structures[0]
    if args.no_constraints:
        start.set_constraint()
    hold(start, args.fix, name)
    calculator = calculator_of(args.model, args)
    check_fits(calculator, start, name, allow_unseen=args.allow_unseen)

    from torchmdnet.simulation.dynamics import prepared

    atoms = prepared(start, calculator)
    is_crystal = bool(atoms.pbc.all()) and not args.gamma
    if is_crystal:
        _check_phonopy()
        if atoms.constraints:
            raise ConfigError("vib: phonons take no atoms that are held in place. Pass --no-constraints, or --gamma.")
    if not args.relax:
        _check_stationary(atoms, name)
    with results_folder(args.out, overwrite=args.overwrite, outputs=OUTPUTS) as folder:
        write_json(folder / MARK, {"command": "vib", **{k: v for k, v in vars(args).items() if k != "json"}})
        relaxed = _to_minimum(atoms, name, folder, args)
        if is_crystal:
            summary = _phonons(atoms, name, folder, args)
        else:
            summary = _modes(atoms, name, folder, args)
        summary = {"name": name, "formula": atoms.get_chemical_formula(), **relaxed, **summary, "folder": str(folder)}
        write_json(folder / "summary.json", summary)
    if args.json:
        print(json.dumps(plain(summary), indent=2, ensure_ascii=False))
    else:
        _print(summary, folder)
    if summary["num_imaginary"]:
        raise SystemExit(1)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net vib``."""
    parser = argparse.ArgumentParser(
        prog="torchmd-net vib",
        description="Vibrations of a molecule by second derivatives of the model, phonons of a crystal by phonopy.",
        epilog="The structure has to be at its minimum; --relax brings it there. Ends with status 1 if modes are "
        "imaginary.",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("structure", help="any file ASE reads")
    add_folder_options(parser, "vib")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    modes = parser.add_argument_group("vibrations")
    modes.add_argument("--relax", action="store_true", help="relax the atoms first, to 0.0005 eV/Å")
    modes.add_argument("--numerical", action="store_true", help="take finite differences of forces for the Hessian")
    modes.add_argument(
        "--fix", action="append", default=[], metavar="ATOMS",
        help="hold atoms in place: numbers from 0 and ranges, 0,5-9, or elements, Cu; may be given several times",
    )  # fmt: skip
    modes.add_argument("--no-constraints", action="store_true", help="ignore constraints that the file has")
    heat = parser.add_argument_group("thermochemistry")
    heat.add_argument("-t", "--temperature", type=positive, default=298.15, help="in K (default: %(default)s)")
    heat.add_argument("--pressure", type=positive, default=1.0, help="of the gas, in bar (default: %(default)s)")
    heat.add_argument(
        "--symmetry", type=count, default=1, help="symmetry number: 1 without, 2 for water, 12 for methane and benzene "
        "(default: %(default)s)"
    )  # fmt: skip
    heat.add_argument(
        "--unpaired", type=non_negative, default=0, help="unpaired electrons, for the entropy of the spin (default: 0)"
    )
    crystals = parser.add_argument_group("crystals")
    crystals.add_argument("--gamma", action="store_true", help="vibrations of the cell alone, as for molecules")
    crystals.add_argument(
        "--supercell", type=count, nargs="+", metavar="N", help="repeats along each vector, one number or three "
        "(default: as many as make 10 Å)"
    )  # fmt: skip
    crystals.add_argument(
        "--mesh", type=count, default=16, help="points of the density of states (default: %(default)s)"
    )
    add_state_options(parser)
    add_potential_options(parser, "float64")
    return parser


def _check_phonopy() -> None:
    from importlib.util import find_spec

    if find_spec("phonopy") is None:
        raise ConfigError(
            "vib: phonons of a crystal need the package phonopy, which is not installed. Run 'pip install "
            "torchmd-net[phonons]', or pass --gamma for the vibrations of the cell alone."
        )


def _to_minimum(atoms: Atoms, name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Relax if that is asked for, and refuse what is not at a stationary point."""
    from ase.io import write

    from torchmdnet.simulation.relaxation import Relaxation, relax

    steps = 0
    if args.relax:
        each = Relaxation(name, atoms)
        relax(each, fmax=5e-4, steps=2000, optimizer="bfgs" if len(atoms) < 100 else "lbfgs")
        steps = len(each.energies) - 1
        if not each.converged:
            told = (
                each.reason or f"no force below 0.0005 eV/Å after {steps} steps; the largest is {each.forces[-1]:.2g}"
            )
            raise DataError(f"{name}: the minimum is not reached: {told}.")
    largest = _check_stationary(atoms, name)
    copy = atoms.copy()
    with draft_of(folder / "minimum.extxyz") as draft:
        write(draft, copy, format="extxyz")
    return {"relaxation_steps": steps, "largest_force_eV_A": largest, "energy_eV": float(atoms.get_potential_energy())}


def _check_stationary(atoms: Atoms, name: str) -> float:
    """The largest force, in eV/Å; refused where modes mean nothing."""
    largest = float(np.linalg.norm(atoms.get_forces(), axis=1).max())
    if largest > STATIONARY:
        raise ConfigError(
            f"{name}: the largest force is {largest:.3g} eV/Å, so the structure is at no minimum, and its modes mean "
            "nothing. Pass --relax."
        )
    return largest


def _modes(atoms: Atoms, name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from ase.io import write

    from torchmdnet.page import cards, document, escape, grid, image
    from torchmdnet.page import table as table_of
    from torchmdnet.simulation.vibrations import draw_vibrations, thermochemistry, vibrations
    from torchmdnet.viewer import oscillation_of, player

    with Meter(3 * len(atoms)) as meter:
        found = vibrations(
            atoms,
            lambda done, total: meter.update(3 * len(atoms) * done / total, f"{done} of {total} rows of the Hessian"),
            numerical=args.numerical,
        )
    heat = thermochemistry(
        found,
        temperature=args.temperature,
        pressure=args.pressure,
        symmetry=args.symmetry,
        spin=args.unpaired / 2,
    )
    frames = []
    for number, (wavenumber, mode) in enumerate(zip(found.wavenumbers, found.modes, strict=True)):
        frame = atoms.copy()
        frame.set_constraint()
        frame.arrays["mode"] = mode
        frame.info |= {"mode_number": number, "wavenumber_per_cm": float(wavenumber)}
        if found.intensities is not None:
            frame.info["intensity_km_per_mol"] = float(found.intensities[number])
        frames.append(frame)
    with draft_of(folder / "modes.extxyz") as draft:
        write(draft, frames, format="extxyz")
    rows = [
        (number, f"{wavenumber:.1f}" if wavenumber >= 0 else f"{-wavenumber:.1f} i", f"{mass:.3f}",
         *([] if found.intensities is None else [f"{found.intensities[number]:.2f}"]))
        for number, (wavenumber, mass) in enumerate(zip(found.wavenumbers, found.masses, strict=True))
    ]  # fmt: skip
    header = ["mode", "wavenumber [1/cm]", "reduced mass [u]"]
    header += [] if found.intensities is None else ["infrared intensity [km/mol]"]
    plots = draw_vibrations(found)
    with draft_of(folder / "plots.png") as draft:
        draft.write_bytes(plots)
    words = {key.replace("_", " "): value for key, value in heat.items()}
    sets = {
        f"mode {row[0]}, {row[1]} 1/cm": oscillation_of(atoms, mode)
        for row, mode in zip(rows, found.modes, strict=True)
    }
    imaginary = len(found.imaginary)
    parts = [
        f"<h1>Vibrations of {escape(atoms.get_chemical_formula())}</h1>",
        f'<p class="sub">{escape(name)} · {escape(args.model)} · Hessian by {escape(found.method)}</p>',
        cards([
            (f"{heat['zero_point_energy_eV']:.4f} eV", "zero-point energy"),
            (str(imaginary), "imaginary modes: a minimum has none, a transition state one"),
            (f"{found.largest_force:.1g} eV/Å", "largest force"),
        ]),
        f"<h2>Spectrum</h2>{image(plots, 'Spectrum')}",
        "<h2>Modes</h2>" + player(sets, atoms.numbers) + grid(header, rows, 0),
        f"<h2>Thermochemistry at {args.temperature:g} K</h2>" + table_of(words.items()),
    ]  # fmt: skip
    with draft_of(folder / "report.html") as draft:
        draft.write_text(document(f"Vibrations: {name}", parts), encoding="utf-8")
    return {
        "kind": "modes",
        "method": found.method,
        "wavenumbers_per_cm": found.wavenumbers,
        "reduced_masses_u": found.masses,
        "intensities_km_per_mol": found.intensities,
        "num_imaginary": imaginary,
        "thermochemistry": heat,
    }


def _phonons(atoms: Atoms, name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from torchmdnet.page import cards, document, escape, image
    from torchmdnet.simulation.vibrations import draw_phonons, phonons

    lengths = atoms.cell.lengths()
    supercell = args.supercell or [max(1, int(np.ceil(10 / length))) for length in lengths]
    if len(supercell) not in (1, 3):
        raise ConfigError(f"--supercell: {len(supercell)} numbers are given. Give one or three.")
    repeats = (supercell[0], supercell[len(supercell) // 2], supercell[-1])
    with Meter(1) as meter:
        found = phonons(
            atoms,
            repeats,
            folder,
            lambda done, total: meter.update(done / total, f"{done} of {total} supercells"),
            mesh=args.mesh,
        )
    plots = draw_phonons(found)
    with draft_of(folder / "plots.png") as draft:
        draft.write_bytes(plots)
    with draft_of(folder / "bands.csv") as draft:
        columns = ",".join(["distance_per_A", *(f"band_{n}_THz" for n in range(found.frequencies.shape[1]))])
        rows = np.column_stack([found.distances, found.frequencies])
        np.savetxt(draft, rows, delimiter=",", header=columns, comments="", fmt="%.6g")
    lowest = float(found.frequencies.min())
    imaginary = int((found.frequencies < -0.1).any(axis=0).sum())
    thermal = found.thermal
    at = int(np.abs(thermal["temperatures"] - args.temperature).argmin())
    heat = {
        "temperature_K": float(thermal["temperatures"][at]),
        "free_energy_kJ_mol": float(thermal["free_energy"][at]),
        "entropy_J_K_mol": float(thermal["entropy"][at]),
        "heat_capacity_J_K_mol": float(thermal["heat_capacity"][at]),
    }
    parts = [
        f"<h1>Phonons of {escape(atoms.get_chemical_formula())}</h1>",
        f'<p class="sub">{escape(name)} · {escape(args.model)} · supercell {" × ".join(map(str, repeats))}</p>',
        cards([
            (f"{found.frequencies.max():.2f} THz", "highest frequency"),
            (f"{lowest:.2f} THz", "lowest on the path; below -0.1 the crystal is not at a minimum"),
            (f"{heat['heat_capacity_J_K_mol']:.1f} J/K/mol", f"heat capacity of a cell at {heat['temperature_K']:g} K"),
        ]),
        image(plots, "Phonons"),
    ]  # fmt: skip
    with draft_of(folder / "report.html") as draft:
        draft.write_text(document(f"Phonons: {name}", parts), encoding="utf-8")
    return {
        "kind": "phonons",
        "supercell": repeats,
        "highest_THz": float(found.frequencies.max()),
        "lowest_THz": lowest,
        "num_imaginary": imaginary,
        "thermochemistry": heat,
    }


def _print(summary: dict[str, Any], folder: Path) -> None:
    print(f"{summary['name']}: {summary['formula']}, energy {summary['energy_eV']:.6f} eV")
    heat = summary["thermochemistry"]
    if summary["kind"] == "phonons":
        print(f"phonons from {summary['lowest_THz']:.3f} to {summary['highest_THz']:.3f} THz")
        print(f"{summary['num_imaginary']} bands with imaginary frequencies")
    else:
        intensities = summary["intensities_km_per_mol"]
        print("mode  wavenumber [1/cm]" + ("" if intensities is None else "  intensity [km/mol]"))
        for number, wavenumber in enumerate(summary["wavenumbers_per_cm"]):
            value = f"{wavenumber:.1f}  " if wavenumber >= 0 else f"{-wavenumber:.1f} i"
            more = "" if intensities is None else f"{intensities[number]:20.2f}"
            print(f"{number:4d}{value:>19}{more}")
        if summary["num_imaginary"]:
            first = ", ".join(f"mode {n}" for n in range(summary["num_imaginary"]))
            print(f"{summary['num_imaginary']} imaginary: {first}. The structure is a saddle point, not a minimum.")
        zero = heat["zero_point_energy_eV"]
        print(f"zero-point energy {zero:.4f} eV ({zero * KJ_PER_MOL:.2f} kJ/mol)")
        for key, words in (("enthalpy_eV", "enthalpy"), ("gibbs_energy_eV", "Gibbs energy"),
                           ("helmholtz_energy_eV", "Helmholtz energy")):  # fmt: skip
            if key in heat:
                print(f"{words} {heat[key]:.4f} eV at {heat['temperature_K']:g} K ({heat['kind']})")
        print(f"entropy {heat['entropy_eV_K'] * KJ_PER_MOL * 1000:.2f} J/K/mol at {heat['temperature_K']:g} K")
    print(f"page: {folder / 'report.html'}")
