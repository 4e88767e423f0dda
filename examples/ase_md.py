"""Relax a structure with a trained potential, then simulate it at constant energy and report the drift.

python examples/ase_md.py MODEL.ckpt STRUCTURE --steps 500 --timestep 0.5
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.io.trajectory import Trajectory
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from torchmdnet.calculators import TMDNETCalculator


def main(arguments: list[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    atoms = read(args.structure)
    assert isinstance(atoms, Atoms)
    if args.charge is not None:
        atoms.info["charge"] = args.charge
    atoms.calc = TMDNETCalculator(
        args.model, device=args.device, dtype=args.dtype, compile=args.compile, units=args.units
    )
    args.output.mkdir(parents=True, exist_ok=True)

    relax(atoms, args.relax, args.relax_cell)
    set_temperature(atoms, args.temperature, args.seed)
    femtoseconds, energies, seconds = simulate(atoms, args.steps, args.timestep, args.output / "trajectory.traj")

    drift, noise = drift_of(femtoseconds, energies, len(atoms))
    speed = args.steps * args.timestep * 1e-6 / (seconds / 86400)
    print(f"energy drift {milli(drift, 'eV/atom/ps')}, fluctuation {milli(noise, 'eV/atom')}")
    milliseconds = digits(1000 * seconds / args.steps, 3)
    print(f"{digits(speed, 3)} ns/day, {milliseconds} ms a step, {len(atoms)} atoms on {args.device}")
    plot(femtoseconds, energies, len(atoms), drift, args.output / "energy.png")
    summary = {
        "atoms": len(atoms),
        "steps": args.steps,
        "timestep_fs": args.timestep,
        "drift_meV_per_atom_per_ps": drift,
        "fluctuation_meV_per_atom": noise,
        "ns_per_day": speed,
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint")
    parser.add_argument("structure", help="any file ASE reads; of several structures the last")
    parser.add_argument("--steps", type=int, default=500, help="steps of dynamics (default: %(default)s)")
    parser.add_argument("--timestep", type=float, default=0.5, help="length of a step in fs (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=300.0, help="to start from, in K (default: %(default)s)")
    parser.add_argument("--charge", type=float, help="total charge in e, if not the one in the file")
    parser.add_argument("--relax", type=int, default=100, help="steps of relaxation before (default: %(default)s)")
    parser.add_argument("--relax-cell", action="store_true", help="relax the cell too")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"], help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile the model first")
    parser.add_argument("--units", help="of the model, such as kcal/mol, if its file does not state them")
    parser.add_argument("--seed", type=int, default=1, help="of the velocities (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("md"), help="folder for results (default: %(default)s)")
    return parser


def relax(atoms: Atoms, steps: int, relax_cell: bool) -> None:
    """Go downhill until the largest force is below 0.05 eV/Å, or for as many steps."""
    before = atoms.get_potential_energy()
    optimizer = FIRE(FrechetCellFilter(atoms) if relax_cell else atoms, logfile=None)
    optimizer.run(fmax=0.05, steps=steps)
    force = np.abs(atoms.get_forces()).max()
    change = atoms.get_potential_energy() - before
    print(f"relaxed: energy changed by {milli(1000 * change, 'eV')}, largest force component {digits(force, 2)} eV/Å")


def set_temperature(atoms: Atoms, kelvin: float, seed: int) -> None:
    """Draw velocities from the Maxwell-Boltzmann distribution, without motion of the whole."""
    normal = np.random.default_rng(seed).standard_normal((len(atoms), 3))
    atoms.set_momenta(normal * np.sqrt(atoms.get_masses() * units.kB * kelvin)[:, None])
    Stationary(atoms)


def simulate(atoms: Atoms, steps: int, timestep: float, path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Run at constant energy; times in fs, total energies in eV, both (steps + 1,), and the seconds it took.

    Ten lines with time, energies and temperature are printed on the way.
    """
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs, logfile="-", loginterval=max(1, steps // 10))
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    with Trajectory(path, "w", atoms) as trajectory:
        dynamics.attach(trajectory.write, interval=max(1, steps // 100))
        start = time.perf_counter()
        dynamics.run(steps)
        seconds = time.perf_counter() - start
    return timestep * np.arange(len(energies)), np.array(energies), seconds


def drift_of(femtoseconds: np.ndarray, energies: np.ndarray, num_atoms: int) -> tuple[float, float]:
    """Slope of the total energy in meV/atom/ps, and its rms deviation from the line in meV/atom."""
    picoseconds, per_atom = femtoseconds / 1000, 1000 * energies / num_atoms
    slope, offset = np.polyfit(picoseconds, per_atom, 1)
    return float(slope), float(np.std(per_atom - (slope * picoseconds + offset)))


def digits(value: float, number: int = 2) -> str:
    """A number with ``digits`` significant digits, never in powers of ten: 1230, 0.31, -0.000042."""
    if value == 0:
        return "0"
    return np.format_float_positional(float(f"{value:.{number - 1}e}"), trim="-")


def milli(value: float, unit: str) -> str:
    """A value in thousandths of a unit, or in millionths where it is small: ``-0.31 meV``, ``-4.2 µeV``."""
    return f"{digits(value)} m{unit}" if abs(value) >= 0.01 else f"{digits(1000 * value)} µ{unit}"


def plot(femtoseconds: np.ndarray, energies: np.ndarray, num_atoms: int, drift: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(femtoseconds, 1000 * (energies - energies[0]) / num_atoms, lw=1)
    axes.set_xlabel("time / fs")
    axes.set_ylabel("change of the total energy / (meV/atom)")
    axes.set_title(f"drift {milli(drift, 'eV/atom/ps')}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
