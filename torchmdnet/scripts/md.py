"""``torchmd-net md``: molecular dynamics that survives being killed."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmdnet._version import __version__
from torchmdnet.config.stopping import Stopped, interrupt_compiling, signals_to
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import not_a_file, plain, write_json
from torchmdnet.scripts.argument_types import count, non_negative, positive, seed
from torchmdnet.scripts.folder import MARK, add_folder_options, checked, held, mark_part, results_folder
from torchmdnet.scripts.potential import (
    MODEL,
    add_potential_options,
    add_state_options,
    calculator_of,
    check_fits,
    closest_of,
    digest_of,
    hold,
    structures_of,
)

if TYPE_CHECKING:
    from ase import Atoms

    from torchmdnet.simulation.dynamics import Progress, Simulation
    from torchmdnet.simulation.ensembles import Protocol

__all__ = ["get_parser", "main"]

STRUCTURE = "structure.json"
#: What a simulation leaves in its folder.
OUTPUTS = (
    "trajectory.extxyz", "trajectory.traj", "log.csv", "velocities.f32", "state.npz", "start.json", STRUCTURE,
    "stopped.extxyz", "final.extxyz", "summary.json", "report.html", "plots.png", MARK,
)  # fmt: skip
#: Steps of all simulations together; more would never end.
MOST_STEPS = 10**10


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, or go on with a simulation, and print what came of it.

    Raises:
        ConfigError: If an argument cannot work, or the model was not trained on such structures.
        DataError: If a file cannot be read, or belongs to another simulation.
        SystemExit: With 1 where a structure fell apart, 128 + the number of the signal after one.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.resume:
        _resume(args, parser)
    else:
        _start(args)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net md``."""
    from torchmdnet.simulation.ensembles import ENSEMBLES

    parser = argparse.ArgumentParser(
        prog="torchmd-net md",
        description="Molecular dynamics with a potential, on the integrators of ASE.",
        epilog="It can be stopped or killed at any moment: torchmd-net md --resume --out FOLDER goes on, with the same "
        "numbers as if nothing had happened. Ends with status 1 if a structure falls apart.",
    )
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument("structures", nargs="*", help="files that ASE reads, or patterns; one simulation for each")
    add_folder_options(parser, "md")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder; --time may be longer")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    motion = parser.add_argument_group("motion")
    kinds = "; ".join(f"{name}: {each.words}" for name, each in ENSEMBLES.items())
    motion.add_argument("-e", "--ensemble", default="langevin", metavar="NAME", help=f"{kinds} (default: %(default)s)")
    motion.add_argument("--time", type=positive, help="how long to simulate, in ps (default: 10)")
    motion.add_argument("--steps", type=count, help="the same as a number of steps")
    motion.add_argument("--timestep", type=positive, default=0.5, help="in fs (default: %(default)s)")
    motion.add_argument(
        "-t", "--temperature", type=non_negative, nargs="+", default=[300.0], metavar="K",
        help="in K; two values: a linear ramp from one to the other (default: 300)",
    )  # fmt: skip
    motion.add_argument(
        "-p", "--pressure", type=_real, nargs="+", default=[1.0], metavar="BAR",
        help="in bar; two values: a linear ramp (default: 1)",
    )  # fmt: skip
    motion.add_argument("--friction", type=positive, default=0.01, help="of Langevin, in 1/fs (default: %(default)s)")
    motion.add_argument(
        "--thermostat-time", type=positive, default=100.0, help="of bussi, npt, npt-berendsen, in fs (default: "
        "%(default)s)"
    )  # fmt: skip
    motion.add_argument("--barostat-time", type=positive, default=1000.0, help="in fs (default: %(default)s)")
    motion.add_argument(
        "--compressibility", type=positive, default=0.46, help="for npt-berendsen, in 1/GPa (default: %(default)s, "
        "water)"
    )  # fmt: skip
    motion.add_argument("--seed", type=seed, default=0, help="of velocities and thermostat (default: %(default)s)")
    motion.add_argument(
        "--replicas", type=count, default=1, help="simulations of each structure, with other random numbers (default: "
        "%(default)s)"
    )  # fmt: skip
    motion.add_argument(
        "--keep-velocities", action="store_true", help="start with those in the file, where it has them"
    )
    motion.add_argument(
        "--fix", action="append", default=[], metavar="ATOMS",
        help="hold atoms in place: numbers from 0 and ranges, 0,5-9, or elements, Cu; may be given several times",
    )  # fmt: skip
    motion.add_argument("--no-constraints", action="store_true", help="ignore constraints that the file has")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--interval", type=positive, default=10.0, help="between frames of the trajectory, in fs (default: %(default)s)"
    )
    output.add_argument(
        "--log-interval", type=positive, default=10.0, help="between rows of log.csv, in fs (default: %(default)s)"
    )
    output.add_argument("--traj", action="store_true", help="write trajectory.traj of ASE too, at the end")
    safety = parser.add_argument_group("when to stop")
    safety.add_argument("--max-temperature", type=positive, help="in K (default: ten times the temperature, and 1000)")
    safety.add_argument("--max-force", type=positive, default=100.0, help="on an atom, in eV/Å (default: %(default)s)")
    safety.add_argument(
        "--stop-if-uncertain", type=positive, metavar="EV_PER_A", help="standard deviation of a force component over "
        "an ensemble of models, in eV/Å"
    )  # fmt: skip
    add_state_options(parser)
    add_potential_options(parser, "float32")
    return parser


def _real(text: str) -> float:
    from torchmdnet.scripts.argument_types import finite

    return finite(text)


# -------------------------------------------------------------------------------------------------------- starting


def _start(args: argparse.Namespace) -> None:
    from torchmdnet.simulation.dynamics import prepared
    from torchmdnet.simulation.ensembles import check_protocol, ensemble_of
    from torchmdnet.simulation.state import write_atoms

    if args.model is None or not args.structures:
        raise ConfigError("md: name a model and a structure: torchmd-net md MODEL STRUCTURE.")
    ensemble_of(args.ensemble)
    protocol = _protocol(args)
    structures = structures_of(args.structures, args)
    for name, atoms in structures:
        if args.no_constraints:
            atoms.set_constraint()
        hold(atoms, args.fix, name)
        check_protocol(protocol, atoms, name)
    if protocol.steps * len(structures) * args.replicas > MOST_STEPS:
        raise ConfigError(f"{_flag(args)}: {protocol.steps:,} steps for each simulation are more than can be done.")
    calculator = calculator_of(args.model, args)
    _check_uncertainty(calculator, protocol)
    runs = []
    for number, (name, atoms) in enumerate(structures):
        check_fits(calculator, atoms, name, allow_unseen=args.allow_unseen)
        _look(prepared(atoms, calculator), protocol, name)
        for replica in range(args.replicas):
            words = f"{name}, replica {replica}" if args.replicas > 1 else name
            runs.append({"name": words, "folder": "", "number": [number, replica]})
    for run, folder in zip(runs, _folders(runs), strict=True):
        run["folder"] = folder
    settings = {
        "command": "md",
        "version": __version__,
        "model": str(Path(args.model).expanduser().absolute()),
        "sha256": digest_of(args.model),
        "structures": args.structures,
        "potential": {name: getattr(args, name) for name in ("dtype", "device", "units", "total_energies")},
        "traj": args.traj,
        "protocol": asdict(protocol),
        "runs": runs,
    }
    with results_folder(args.out, overwrite=args.overwrite, outputs=OUTPUTS) as folder:
        for run in runs:
            place = folder / run["folder"]
            if place != folder:
                mark_part(place)
            write_atoms(place / STRUCTURE, prepared(structures[run["number"][0]][1], None))
        write_json(folder / MARK, settings)  # from here on it can be resumed
        with _resumable(folder, settings) as summaries:
            _run_all(folder, settings, calculator, args, summaries)


def _protocol(args: argparse.Namespace) -> Protocol:
    from torchmdnet.simulation.ensembles import Protocol

    if args.time is not None and args.steps is not None:
        raise ConfigError("--time and --steps both say how long to simulate. Give one of them.")
    for name in ("temperature", "pressure"):
        if len(getattr(args, name)) > 2:
            raise ConfigError(f"--{name}: {len(getattr(args, name))} values are given. Give one, or two for a ramp.")
    if args.timestep > 20:
        raise ConfigError(f"--timestep: {args.timestep:g} fs is longer than any vibration. Give 0.25 to 2 fs.")

    def every(femtoseconds: float) -> int:
        return max(1, round(femtoseconds / args.timestep))

    return Protocol(
        ensemble=args.ensemble,
        steps=_steps(args, args.timestep),
        timestep=args.timestep,
        temperature=(args.temperature[0], args.temperature[-1]),
        pressure=(args.pressure[0], args.pressure[-1]),
        friction=args.friction,
        thermostat_time=args.thermostat_time,
        barostat_time=args.barostat_time,
        compressibility=args.compressibility,
        seed=args.seed,
        interval=every(args.interval),
        log_interval=every(args.log_interval),
        velocity_interval=every(4.0),
        keep_velocities=args.keep_velocities,
        max_temperature=args.max_temperature,
        max_force=args.max_force,
        stop_if_uncertain=args.stop_if_uncertain,
    )


def _steps(args: argparse.Namespace, timestep: float) -> int:
    steps = args.steps if args.steps is not None else (10.0 if args.time is None else args.time) * 1000 / timestep
    if steps > MOST_STEPS:
        raise ConfigError(f"{_flag(args)}: {steps:.2g} steps of {timestep:g} fs are more than can be done.")
    return max(1, round(steps))


def _flag(args: argparse.Namespace) -> str:
    """The flag that says how long to simulate."""
    return "--time" if args.steps is None else "--steps"


def _check_uncertainty(calculator: Any, protocol: Protocol) -> None:
    if protocol.stop_if_uncertain is not None and "forces_std" not in calculator.implemented_properties:
        raise ConfigError(
            "--stop-if-uncertain: the model is one network and does not say how sure it is. Give an ensemble, a .zip "
            "of several model files."
        )


def _look(atoms: Atoms, protocol: Protocol, name: str) -> None:
    """Refuse a start that would explode in its first steps."""
    from torchmdnet.simulation.sanity import clash_of, what_is_wrong

    if clash := clash_of(atoms, closest_of(atoms.calc)):
        raise DataError(f"{name}: {clash.told}")
    wrong = what_is_wrong(
        atoms,
        forces=atoms.get_forces(apply_constraint=False),
        energy=float(atoms.get_potential_energy()),
        max_force=protocol.max_force,
    )
    if wrong:
        raise DataError(f"{name}: {wrong}. Relax it first, torchmd-net relax, or look at its units and coordinates.")


def _folders(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A folder for each simulation, below that of the command: the folder itself for one alone."""
    if len(runs) == 1:
        return ["."]
    width = len(str(len(runs) - 1))
    names = []
    for number, run in enumerate(runs):
        stem = re.sub(r"[^\w.-]+", "_", Path(run["name"].partition(",")[0].partition(":")[0]).stem)[:40]
        names.append(f"{number:0{width}}_{stem}")
    return names


# ---------------------------------------------------------------------------------------------------------- resuming


def _resume(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    given = [
        action.option_strings[-1] if action.option_strings else action.dest
        for action in parser._actions
        if action.dest not in ("resume", "out", "json", "time", "steps", "help")
        and getattr(args, action.dest) not in (action.default, [])
    ]
    if given:
        raise ConfigError(
            f"--resume goes on as the simulation began, so it takes no {', '.join(given)}. Leave it out; only --time "
            "or --steps can be longer."
        )
    folder = checked(args.out)
    if not (folder / MARK).is_file():
        raise ConfigError(f"--resume: {str(folder)!r} holds no simulation. Name its folder with --out.")
    settings = _read_settings(folder / MARK)
    model = settings["model"]
    if wrong := not_a_file(model):
        raise FileNotFoundError(f"model: {wrong} The simulation in {folder} began with it; bring it back.")
    if digest_of(model) != settings["sha256"]:
        raise DataError(
            f"{model} has changed since the simulation in {folder} began, so it cannot go on. Bring the file back, or "
            "start again."
        )
    if args.time is not None and args.steps is not None:
        raise ConfigError("--time and --steps both say how long to simulate. Give one of them.")
    protocol = settings["protocol"]
    if args.time is not None or args.steps is not None:
        steps = _steps(args, protocol["timestep"])
        if steps < protocol["steps"]:
            raise ConfigError(
                f"{_flag(args)}: the simulation has {protocol['steps']:,} steps, and {steps:,} would be fewer. Give "
                f"more, or leave {_flag(args)} out."
            )
        if steps != protocol["steps"] and any(len(set(protocol[name])) > 1 for name in ("temperature", "pressure")):
            raise ConfigError(
                f"{_flag(args)}: a ramp ends where it was meant to. Start another simulation from final.extxyz."
            )
        protocol["steps"] = steps
    with _resumable(folder, settings) as summaries:
        calculator = calculator_of(model, argparse.Namespace(**settings["potential"]))
        with held(folder):
            write_json(folder / MARK, settings)
            _run_all(folder, settings, calculator, args, summaries)


def _read_settings(path: Path) -> dict[str, Any]:
    from torchmdnet.parse import parse_json

    settings = parse_json(path.read_text(encoding="utf-8"), str(path), DataError)
    if not isinstance(settings, dict) or settings.get("command") != "md" or "runs" not in settings:
        raise DataError(f"{path} was not written by torchmd-net md. Name the folder of a simulation with --out.")
    for name in ("temperature", "pressure"):
        settings["protocol"][name] = tuple(settings["protocol"][name])
    return settings


# ----------------------------------------------------------------------------------------------------------- running


def _run_all(
    folder: Path,
    settings: dict[str, Any],
    calculator: Any,
    args: argparse.Namespace,
    summaries: list[dict[str, Any]],
) -> None:
    """Simulate one after the other; their summaries are added to ``summaries`` as they come."""
    from torchmdnet.simulation.dynamics import Simulation
    from torchmdnet.simulation.ensembles import Protocol
    from torchmdnet.simulation.report import finish
    from torchmdnet.simulation.state import read_atoms

    protocol = Protocol(**settings["protocol"])
    shown = {name: settings[name] for name in ("model", "structures")} | settings["potential"]
    for run in settings["runs"]:
        place = folder / run["folder"]
        atoms = read_atoms(place / STRUCTURE)
        atoms.calc = calculator
        simulation = Simulation(place, atoms, protocol, tuple(run["number"]))
        try:
            _run(simulation, f"{run['name']}: " if len(settings["runs"]) > 1 else "")
            if settings["traj"]:
                _convert(place)
            summaries.append(finish(simulation, run["name"], shown))
        except KeyboardInterrupt:
            if simulation.reason is not None:
                print(f"{run['name']}: {_stopped(simulation.reason, place)}", file=sys.stderr)
            raise
        if not args.json:
            _print(summaries[-1], place)
    if len(summaries) > 1:
        write_json(folder / "summary.json", {"runs": summaries})
    if args.json:
        print(json.dumps(plain({"folder": str(folder), "runs": summaries}), indent=2, ensure_ascii=False))
    if any(summary["stopped"] for summary in summaries):
        raise SystemExit(1)


@contextlib.contextmanager
def _resumable(folder: Path, settings: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Say after a signal what is saved, and how to go on. Yields a list to which each simulation adds its summary.

    Raises:
        SystemExit: Then, with 128 + the number of the signal.
    """
    summaries: list[dict[str, Any]] = []
    try:
        yield summaries
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped()
        print(
            f"{stopped.name}: stopped with {_saved(folder, settings, len(summaries))}. Go on with: torchmd-net md "
            f"--resume --out {folder}",
            file=sys.stderr,
        )
        raise SystemExit(stopped.status) from None


def _saved(folder: Path, settings: dict[str, Any], done: int) -> str:
    """How far the simulations in a folder are, in words; ``done`` of them have their page."""
    from torchmdnet.simulation.dynamics import STATE
    from torchmdnet.simulation.state import State

    protocol, runs = settings["protocol"], settings["runs"]
    total = f"{protocol['steps'] * protocol['timestep'] / 1000:.6g} ps"
    of = f"{done} of {len(runs)} simulations finished and " if len(runs) > 1 else ""
    if done == len(runs):
        return f"{of}all of {total} saved"
    state = folder / runs[done]["folder"] / STATE
    step = State.read(state).step if state.is_file() else 0
    if step >= protocol["steps"]:
        return f"{of}all of {total} saved, before the page was written"
    return f"{of}{step * protocol['timestep'] / 1000:.6g} of {total} saved"


def _run(simulation: Simulation, name: str) -> None:
    """Simulate.

    Raises:
        Stopped: After a signal asked for an end and the state was saved; a second one ends it at once.
    """
    from torchmdnet.scripts.progress import Meter

    stops: list[Stopped] = []

    def stop(number: int, frame: Any) -> None:
        if stops and not interrupt_compiling(Stopped(number)):
            raise Stopped(number)
        stops.append(Stopped(number))
        simulation.should_stop = True

    with Meter(simulation.protocol.steps, simulation.step) as meter, signals_to(stop):
        simulation.run(lambda progress: meter.update(progress.step, name + _words(progress, simulation)))
    if stops:
        raise stops[0]


def _words(progress: Progress, simulation: Simulation) -> str:
    """What is going on: time, temperature, pressure, drift, speed."""
    timestep = simulation.protocol.timestep
    words = [
        f"{progress.step * timestep / 1000:.4g} of {progress.steps * timestep / 1000:.4g} ps",
        f"{progress.temperature:.0f} K",
    ]
    if progress.pressure is not None:
        words.append(f"{progress.pressure:.3g} GPa")
    if progress.drift is not None:
        words.append(f"drift {progress.drift:.2g} meV/atom/ps")
    if progress.uncertainty is not None:
        words.append(f"spread {1000 * progress.uncertainty:.3g} meV/Å")
    if progress.ns_per_day is not None:
        words.append(f"{progress.ns_per_day:.3g} ns/day")
    return ", ".join(words)


def _convert(folder: Path) -> None:
    """The trajectory as one of ASE."""
    from ase.io import iread
    from ase.io.trajectory import TrajectoryWriter

    from torchmdnet.files import draft_of

    with draft_of(folder / "trajectory.traj") as draft, TrajectoryWriter(str(draft), "w") as trajectory:
        for frame in iread(folder / "trajectory.extxyz", index=":", format="extxyz"):
            trajectory.write(frame)


def _stopped(reason: str, folder: Path) -> str:
    return f"stopped: {reason}. The structure is in {folder / 'stopped.extxyz'}."


def _print(summary: dict[str, Any], folder: Path) -> None:
    words = [f"{summary['time_ps']:.6g} ps"]
    if summary.get("mean_temperature_K") is not None:
        words.append(f"mean temperature {summary['mean_temperature_K']:.1f} K")
    if summary.get("mean_pressure_GPa") is not None:
        words.append(f"mean pressure {summary['mean_pressure_GPa']:.3g} GPa")
    if summary["drift_meV_per_atom_per_ps"] is not None:
        words.append(f"drift {summary['drift_meV_per_atom_per_ps']:.2g} meV/atom/ps")
    if summary["ns_per_day"] is not None:
        words.append(f"{summary['ns_per_day']:.3g} ns/day")
    print(f"{summary['name']}: {', '.join(words)}")
    if summary["stopped"]:
        print(_stopped(summary["stopped"], folder))
        print("Take a shorter --timestep, relax first (torchmd-net relax), or train on structures like it.")
    print(f"page with plots: {folder / 'report.html'}")
