"""``torchmd-net relax``: structures at their minimum of energy."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchmdnet.config.stopping import Stopped, signals_to
from torchmdnet.errors import ConfigError
from torchmdnet.files import draft_of, plain, write_json
from torchmdnet.scripts.argument_types import count, finite, positive
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

__all__ = ["get_parser", "main"]

OUTPUTS = ("relaxed.extxyz", "steps.csv", "path*.extxyz", "plots.png", "report.html", "summary.json", MARK)


def main(argv: Sequence[str] | None = None) -> None:
    """Relax structures, print where they end, and write a folder.

    Raises:
        ConfigError: If an argument cannot work, or the model was not trained on such structures.
        DataError: If a file cannot be read.
        SystemExit: With 1 where a structure did not reach its minimum, 128 + the number of the signal after one.
    """
    args = get_parser().parse_args(argv)

    from torchmdnet.simulation.dynamics import prepared
    from torchmdnet.simulation.relaxation import Relaxation, optimizer_of, relax

    optimizer_of(args.optimizer)
    structures = structures_of(args.structures, args)
    calculator = calculator_of(args.model, args)
    for name, atoms in structures:
        if args.no_constraints:
            atoms.set_constraint()
        hold(atoms, args.fix, name)
        check_fits(calculator, atoms, name, allow_unseen=args.allow_unseen)
        if args.cell and (not atoms.pbc.any() or atoms.cell.rank < 3):
            raise ConfigError(f"--cell: {name} has no periodic cell of three vectors. Leave it out.")
    if args.pressure and not args.cell:
        raise ConfigError("--pressure acts on the cell. Add --cell.")
    relaxations, stops = [], []

    def stop(number: int, frame: Any) -> None:
        if stops:
            raise Stopped(number)
        stops.append(Stopped(number))

    with results_folder(args.out, overwrite=args.overwrite, outputs=OUTPUTS) as folder:
        write_json(folder / MARK, {"command": "relax", **{k: v for k, v in vars(args).items() if k != "json"}})
        with Meter(len(structures)) as meter, signals_to(stop):
            for number, (name, start) in enumerate(structures):
                if stops:
                    break
                each = Relaxation(name, prepared(start, calculator))

                def tell(now: Relaxation, number: int = number) -> bool:
                    words = f"{now.name}: step {len(now.energies) - 1}, largest force {now.forces[-1]:.3g} eV/Å"
                    meter.update(number, words)
                    return not stops

                relax(
                    each,
                    fmax=args.fmax,
                    steps=args.steps,
                    optimizer=args.optimizer,
                    cell=args.cell,
                    pressure=args.pressure,
                    tell=tell,
                )
                relaxations.append(each)
                meter.update(number + 1, name)
        try:
            summaries = _write(folder, relaxations, args)
        except KeyboardInterrupt:
            kept = "with" if (folder / "relaxed.extxyz").is_file() else "without"
            print(f"{folder} was not finished: it was left {kept} relaxed.extxyz.", file=sys.stderr)
            raise
    if args.json:
        print(json.dumps(plain({"folder": str(folder), "structures": summaries}), indent=2, ensure_ascii=False))
    else:
        _print(summaries, folder, args)
    if stops:
        print(
            f"{stops[0].name}: stopped after {len(relaxations)} of {len(structures)} structures, saved as they are now."
            f" Go on with: torchmd-net relax {args.model} {folder / 'relaxed.extxyz'} --index :",
            file=sys.stderr,
        )
        raise SystemExit(stops[0].status)
    if not all(summary["converged"] for summary in summaries):
        raise SystemExit(1)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net relax``."""
    from torchmdnet.simulation.relaxation import OPTIMIZERS

    parser = argparse.ArgumentParser(
        prog="torchmd-net relax",
        description="Bring structures to their minimum of energy, with the optimisers of ASE.",
        epilog="Ends with status 1 if a structure did not reach its minimum.",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument("structures", nargs="+", help="files that ASE reads, or patterns")
    add_folder_options(parser, "relax")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    motion = parser.add_argument_group("relaxation")
    motion.add_argument(
        "--fmax",
        type=positive,
        default=0.01,
        help="largest force on an atom at the end, in eV/Å (default: %(default)s)",
    )
    motion.add_argument("--steps", type=count, default=1000, help="at most, for each structure (default: %(default)s)")
    motion.add_argument(
        "--optimizer", default="lbfgs", metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (default: %(default)s)"
    )
    motion.add_argument("--cell", action="store_true", help="relax the cell too")
    motion.add_argument("--pressure", type=finite, default=0.0, help="on the cell, in GPa (default: %(default)s)")
    motion.add_argument(
        "--fix", action="append", default=[], metavar="ATOMS",
        help="hold atoms in place: numbers from 0 and ranges, 0,5-9, or elements, Cu; may be given several times",
    )  # fmt: skip
    motion.add_argument("--no-constraints", action="store_true", help="ignore constraints that the file has")
    add_state_options(parser)
    add_potential_options(parser, "float64")
    return parser


def _write(folder: Path, relaxations: Sequence[Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    from torchmdnet.page import cards, document, escape, grid, image
    from torchmdnet.simulation.relaxation import draw_relaxations
    from torchmdnet.viewer import frames_of, player

    done = [each for each in relaxations if each.frames]
    last = []
    for number, each in enumerate(done):
        atoms = each.frames[-1].copy()
        atoms.calc = SinglePointCalculator(atoms, energy=each.energies[-1], forces=each.atoms.get_forces())
        atoms.info["converged"] = each.converged
        last.append(atoms)
        name = "path.extxyz" if len(done) == 1 else f"path_{number:0{len(str(len(done) - 1))}}.extxyz"
        with draft_of(folder / name) as draft:
            write(draft, each.frames, format="extxyz")
    with draft_of(folder / "relaxed.extxyz") as draft:
        write(draft, last, format="extxyz")
    with draft_of(folder / "steps.csv") as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["structure", "step", "energy_eV", "largest_force_eV_A", "largest_stress_GPa"])
        for each in done:
            for step, (energy, force) in enumerate(zip(each.energies, each.forces, strict=True)):
                stress = each.stresses[step] if each.stresses else ""
                writer.writerow([each.name, step, energy, force, stress])
    summaries = [each.summary() for each in done]
    write_json(folder / "summary.json", {"structures": summaries})
    plots = draw_relaxations(done, args.fmax)
    with draft_of(folder / "plots.png") as draft:
        draft.write_bytes(plots)
    reached = sum(each.converged for each in done)
    shown = [(f"{reached} of {len(done)}", f"at their minimum: no force above {args.fmax:g} eV/Å")]
    if len(done) == 1:
        shown.append((f"{summaries[0]['energy_change_eV']:.4f} eV", "change of the energy"))
        shown.append((f"{summaries[0]['largest_force_eV_A']:.2g} eV/Å", "largest force"))
    header = ("structure", "formula", "reached", "steps", "energy [eV]", "change [eV]", "largest force [eV/Å]")
    rows = [
        (s["name"], s["formula"], "yes" if s["converged"] else s["stopped"] or "no", s["steps"],
         f"{s['energy_eV']:.6f}", f"{s['energy_change_eV']:.6f}", f"{s['largest_force_eV_A']:.2g}")
        for s in summaries
    ]  # fmt: skip
    numbers = sorted({int(z) for each in done for z in each.atoms.numbers})
    sets = {f"{n}: {each.name}" if len(done) > 1 else each.name: frames_of(each.frames, 60_000)
            for n, each in enumerate(done[:50])}  # fmt: skip
    parts = [
        f"<h1>Relaxed: {escape(', '.join(dict.fromkeys(s['formula'] for s in summaries)))}</h1>",
        f'<p class="sub">{escape(args.model)}, {escape(args.optimizer)}</p>',
        cards(shown),
        f"<h2>Way down</h2>{image(plots, 'Plots')}",
        "<h2>Structures</h2>" + player(sets, numbers),
        grid(header, rows, 3),
    ]
    with draft_of(folder / "report.html") as draft:
        draft.write_text(document("Relaxation", parts), encoding="utf-8")
    return summaries


def _print(summaries: Sequence[dict[str, Any]], folder: Path, args: argparse.Namespace) -> None:
    for summary in summaries:
        state = "minimum reached" if summary["converged"] else summary["stopped"] or "no minimum"
        words = [
            f"{state} after {summary['steps']} steps",
            f"energy {summary['energy_eV']:.6f} eV ({summary['energy_change_eV']:+.6f} eV)",
            f"largest force {summary['largest_force_eV_A']:.2g} eV/Å",
        ]
        if "largest_stress_GPa" in summary:
            words += [
                f"largest stress {summary['largest_stress_GPa']:.2g} GPa",
                f"volume {summary['volume_A3']:.3f} Å³",
            ]
        print(f"{summary['name']}: {', '.join(words)}")
    lost = sum(summary["stopped"] is not None for summary in summaries)
    if lost:
        print(
            f"{lost} of {len(summaries)} left the range in which energies mean anything, which more --steps do not "
            "mend. Move atoms that are too near to each other apart, or train on structures like these."
        )
    missing = sum(not summary["converged"] for summary in summaries) - lost
    if missing:
        told = f"{missing} of {len(summaries)} did not reach {args.fmax:g} eV/Å."
        print(f"{told} Take more --steps, or another --optimizer.")
    print(f"structures: {folder / 'relaxed.extxyz'}; page: {folder / 'report.html'}")
