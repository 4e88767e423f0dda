"""``torchmd-net bench``: the speed of one's own model, and how exact each way to it is."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.scripts.argument_types import CommandParser, finite, index, positive
from torchmdnet.scripts.progress import Steps

if TYPE_CHECKING:
    from ase import Atoms
    from rich.console import Console
    from rich.table import Table

    from torchmdnet.timing.measure import Measured, Subject
    from torchmdnet.timing.routes import Route

__all__ = ["get_parser", "main"]

#: Part of the wall-clock time that one thread may be without a processor on an idle machine.
IDLE = 0.2
#: Part of the free memory that a larger system may be expected to need.
FILL = 0.8
#: Bytes of an atom, without a model.
LEAST = 200


def main(argv: Sequence[str] | None = None) -> None:
    """Time every route from positions to forces, and print a table, or with ``--json`` all that was found.

    Raises:
        FileNotFoundError: If the model or the structure is missing.
        ConfigError: If an argument cannot work, or the model cannot compute the structure.
        DataError: If the structure cannot be read.
        CheckpointError: If the model cannot be read.
    """
    args = get_parser().parse_args(argv)
    request = _Request(args)

    from torchmdnet.timing.machine import about_machine

    about = about_machine()
    found: list[dict[str, Any]] = []
    with _each_once():
        structures = _structures(args)
        with Steps(len(structures) * (len(request.routes) + len(request.replicate))) as steps:
            for name, atoms in structures.items():
                subject = request.subject(atoms)
                rows = request.measure_all(subject, steps, name)
                found.append({"name": name, "atoms": atoms, "rows": rows, "growth": [], "stopped": None})
            for entry in found:
                entry["growth"], entry["stopped"] = request.measure_growth(entry["atoms"], steps, entry["name"])
    notes = _notes(found)
    if args.json:
        print(json.dumps(_plain(args, about, found, notes), indent=2, ensure_ascii=False))
    else:
        _print(args, about, found, notes)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net bench``."""
    parser = CommandParser(
        prog="torchmd-net bench",
        description="Time a model on every route from positions to forces, each compared with exact float64.",
    )
    parser.add_argument("model", help="a native file (.safetensors), a checkpoint (.ckpt), or a .zip of either")
    parser.add_argument(
        "structure",
        nargs="?",
        help="any file ASE reads (default: a molecule and a box of water, as far as the model knows their elements)",
    )
    parser.add_argument("--index", type=index, default=-1, help="which frame of the file (default: the last)")
    parser.add_argument("--charge", type=finite, help="total charge in e, if not the one in the file")
    parser.add_argument("--spin", type=finite, help="spin, in the convention of the training data")
    parser.add_argument(
        "--through", help="call, ase, external, graph (default: call,ase; on CUDA all of them); commas between several"
    )
    parser.add_argument(
        "--dtype", default="float32,float64",
        help="float32, float64, or float32 with matrix products in tf32 or bf16 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--radial", default="grid,exact", help="how radial filters are evaluated (default: %(default)s)"
    )
    parser.add_argument("--threads", help="numbers of threads, 1,2,4 (default: 1 and the cores of the machine)")
    parser.add_argument("--device", help="cpu, cuda (default: both, as far as they are there)")
    parser.add_argument(
        "--timestep", type=positive, default=1.0, help="length of a step in fs, for ns/day (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=2.0,
        help="how long each route is timed, warm-up apart (default: %(default)s)",
    )
    parser.add_argument(
        "--replicate", help="1,2,3 repeats a periodic structure so often along each of its periodic vectors: how time "
        "and memory grow with the number of atoms, on the first route"
    )  # fmt: skip
    parser.add_argument("--units", help="of the model, such as kcal/mol, if its file does not state them")
    parser.add_argument(
        "--differentiate", action="store_true", help="time the gradient of a model that was trained without forces"
    )
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    return parser


class _Request:
    """The arguments, read and checked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        for name in ("seconds", "timestep"):
            if getattr(args, name) > 1e6:
                raise ConfigError(f"--{name}: {getattr(args, name):g} is not available. Give a number up to 1e6.")
        dtypes = _choices("dtype", args.dtype, ("float32", "float64", "tf32", "bf16"))
        radial = _choices("radial", args.radial, ("grid", "exact"))
        self.replicate = _counts("replicate", args.replicate) if args.replicate else []
        threads = _counts("threads", args.threads) if args.threads else None

        import torch

        from torchmdnet.timing.machine import physical_cores
        from torchmdnet.timing.routes import THROUGH, routes

        has_cuda = torch.cuda.is_available()
        devices = _choices("device", args.device, ("cpu", "cuda")) if args.device else ["cpu", *["cuda"] * has_cuda]
        asked = _choices("through", args.through, tuple(THROUGH)) if args.through else None
        threads = threads or sorted({1, physical_cores()})
        self.routes: list[Route] = []
        for device in devices:
            through = asked or (["call", "ase"] if device == "cpu" else list(THROUGH))
            if asked and len(devices) > 1 and device == "cpu":
                through = [way for way in asked if way != "graph"]
            if through:
                self.routes += routes(through, dtypes, radial, threads, [device])

    def subject(self, atoms: Atoms) -> Subject:
        """The model with atoms."""
        from torchmdnet.timing.measure import Subject

        return Subject(self.args.model, atoms, units=self.args.units, differentiate=self.args.differentiate)

    def measure_all(self, subject: Subject, steps: Steps, name: str) -> list[Measured]:
        """All routes, one after the other."""
        from torchmdnet.timing.measure import measure

        options = {"seconds": self.args.seconds, "timestep": self.args.timestep}
        rows = []
        for route in self.routes:
            steps.begin(f"{name}: {route}")
            rows.append(measure(subject, route, **options))
        return rows

    def measure_growth(self, unit: Atoms, steps: Steps, name: str) -> tuple[list[Measured], str | None]:
        """The first route on more and more copies of a structure; and why it ended early, if it did."""
        from torchmdnet.memory import available_memory
        from torchmdnet.timing.measure import measure

        rows: list[Measured] = []
        options = {"seconds": self.args.seconds, "timestep": self.args.timestep, "compare": False}
        for count in self.replicate:
            number = len(unit) * count ** int(unit.pbc.sum())
            steps.begin(f"{name}: {number} atoms")
            free, needed = available_memory(), float(number * LEAST)
            if rows and rows[-1].working_memory and self.routes[0].device == "cpu":
                needed = max(needed, rows[-1].working_memory * number / rows[-1].num_atoms)
            if free is not None and needed > FILL * free:
                return rows, (
                    f"{number} atoms are left out: they would need about {needed / 2**30:,.1f} GiB, and "
                    f"{free / 2**30:.1f} GiB are free."
                )
            rows.append(measure(self.subject(_repeated(unit, count)), self.routes[0], **options))
        return rows, None


def _choices(name: str, text: str, available: Sequence[str]) -> list[str]:
    words = list(dict.fromkeys(text.replace(",", " ").split()))
    for word in words:
        if word not in available:
            raise ConfigError(
                f"--{name}: {word!r} is not available.{did_you_mean(word, available)} "
                f"Choose from {', '.join(available)}, with commas between several."
            )
    if not words:
        raise ConfigError(f"--{name} is empty. Choose from {', '.join(available)}.")
    return words


def _counts(name: str, text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() and len(word) < 5 and int(word) for word in words):
        raise ConfigError(f"--{name}: {text!r} is not available. Give positive numbers with commas between: 1,2.")
    return sorted({int(word) for word in words})


def _structures(args: argparse.Namespace) -> dict[str, Atoms]:
    """What to time the model on, by name."""
    from torchmdnet.calculators.structures import default_structures, known_elements, read_structure

    if args.structure is not None:
        structures = {args.structure: read_structure(args.structure, args.index)}
    else:
        from torchmdnet.calculators.loading import trained_with
        from torchmdnet.checkpoint import load_model

        model = load_model(args.model)
        heads = [getattr(module, "output_model", None) for module in model.modules()]
        is_periodic = not any(head is not None and getattr(head, "coulomb_cutoff", 0.0) is None for head in heads)
        structures = default_structures(known_elements(model), is_periodic=is_periodic)
        for atoms in structures.values():
            atoms.info |= {option: 0 for option in ("charge", "spin") if trained_with(model, option)}
    for atoms in structures.values():
        atoms.info |= {name: getattr(args, name) for name in ("charge", "spin") if getattr(args, name) is not None}
    if args.replicate:
        structures = {name: atoms for name, atoms in structures.items() if atoms.pbc.any()}
        if not structures:
            raise ConfigError(
                f"--replicate: {args.structure or 'the structure'} is not periodic. Name a file with a cell and pbc, "
                "or leave --replicate out."
            )
    return structures


def _repeated(atoms: Atoms, count: int) -> Atoms:
    """As many cells along each periodic vector."""
    copy = atoms.repeat([count if periodic else 1 for periodic in atoms.pbc])
    if "charge" in copy.info:
        copy.info["charge"] = copy.info["charge"] * (len(copy) // len(atoms))
    return copy


@contextlib.contextmanager
def _each_once() -> Iterator[None]:
    """Show what is logged or warned of once, although the model is loaded for every route."""
    handlers = [*logging.getLogger("torchmdnet").handlers, *logging.getLogger().handlers]
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not (said in told or told.add(said))

    for handler in handlers:
        handler.addFilter(is_new)
    show = warnings.showwarning

    def show_new(message: Warning | str, *where: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            show(message, *where)

    warnings.showwarning = show_new
    try:
        yield
    finally:
        warnings.showwarning = show
        for handler in handlers:
            handler.removeFilter(is_new)


# ----------------------------------------------------------------------------------------------------------- printing


def _notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    told = []
    rows = [(entry["name"], row) for entry in found for row in (*entry["rows"], *entry["growth"])]
    shares = [
        row.processor_share for _, row in rows if row.wall and (row.route.threads, row.route.device) == (1, "cpu")
    ]
    waited = [share for share in shares if share < 1 - IDLE]
    if waited:
        told.append(
            f"The machine was busy: on {len(waited)} of {len(shares)} routes a single thread had to wait for the "
            f"processor, which it had for {min(waited):.0%} of the time at the worst. Repeat this on an idle machine; "
            "until then the fastest step (min) is the better guide."
        )
    seen: dict[str, list[str]] = {}
    for name, row in rows:
        if row.note:
            seen.setdefault(row.note, []).append(f"{name}: {row.route}")
    told += [f"{note[0].upper()}{note[1:]} ({'; '.join(dict.fromkeys(where))})." for note, where in seen.items()]
    return told + [entry["stopped"] for entry in found if entry["stopped"]]


def _plain(
    args: argparse.Namespace, about: dict[str, Any], found: Sequence[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    return {
        "model": str(args.model),
        "timestep_fs": args.timestep,
        "seconds_per_route": args.seconds,
        "machine": about,
        "structures": [
            {
                "name": entry["name"],
                "formula": entry["atoms"].get_chemical_formula(),
                "num_atoms": len(entry["atoms"]),
                "pbc": entry["atoms"].pbc.tolist(),
                "routes": [row.as_json(args.timestep) for row in entry["rows"]],
                "growth": [row.as_json(args.timestep) for row in entry["growth"]],
            }
            for entry in found
        ],
        "notes": notes,
    }


def _print(args: argparse.Namespace, about: dict[str, Any], found: Sequence[dict[str, Any]], notes: list[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from torchmdnet.timing.routes import THROUGH

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=80, no_color=True)
    for entry in found:
        atoms, rows = entry["atoms"], entry["rows"]
        kind = "periodic" if atoms.pbc.any() else "open"
        title = f"{entry['name']}: {atoms.get_chemical_formula()}, {len(atoms)} atoms, {kind}"
        console.print(Text(title, "bold"), soft_wrap=True)
        console.print(_that_fits(console, rows, args.timestep))
        if entry["growth"]:
            console.print(Text(f"growth: {entry['growth'][0].route}", "bold"), soft_wrap=True)
            console.print(_table_of_growth(entry["growth"]))
    ways = dict.fromkeys(row.route.through for entry in found for row in entry["rows"])
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    hardware = f"{about['cpu']}, {about['physical_cores']} cores" + (f", {about['gpu']}" if about["gpu"] else "")
    lines = [
        "; ".join(f"{way}: {THROUGH[way]}" for way in ways) + ".",
        f"Times are those of one step; ns/day with steps of {args.timestep:g} fs, one evaluation each. Memory is what "
        "a step holds at its worst moment, beyond model and program.",
        "Deviations are the largest over three configurations, from the model called in float64 with exact filters.",
        f"{hardware}, {about['system']}; load {about['load']} at the start. {versions}.",
        *notes,
    ]
    for line in lines:
        console.print(Text(line))


#: Columns that a narrow terminal goes without, the first of them first: what they say follows from the others.
_DISPENSABLE = ("steps/s", "min\nms", "ns/day", "memory\nMiB")


def _that_fits(console: Console, rows: Sequence[Measured], timestep: float) -> Table:
    """The table of routes without as many dispensable columns as it takes to fit the width of the console."""
    for number in range(len(_DISPENSABLE)):
        table = _table_of_routes(rows, timestep, _DISPENSABLE[:number])
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            return table
    return _table_of_routes(rows, timestep, _DISPENSABLE)


def _table_of_routes(rows: Sequence[Measured], timestep: float, leave_out: Sequence[str] = ()) -> Table:
    names = ("median\nms", "min\nms", "steps/s", "ns/day", "memory\nMiB", "ΔE\neV/atom", "ΔF\neV/Å")
    table = _table("through", "dtype", "radial", "threads")
    for name in names:
        if name not in leave_out:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        route = row.route
        times = ["-"] * 4
        if row.wall:
            values = (1e3 * row.seconds, 1e3 * min(row.wall), 1 / row.seconds, row.ns_per_day(timestep))
            times = [_digits(value) for value in values]
        errors = ["-" if value is None else f"{value:.0e}" for value in (row.energy_error, row.force_error)]
        numbers = dict(zip(names, (*times, _mebibytes(row.working_memory), *errors), strict=True))
        table.add_row(
            route.through,
            route.dtype,
            route.radial,
            str(route.threads) if route.device == "cpu" else route.device,
            *(text for name, text in numbers.items() if name not in leave_out),
        )
    return table


def _table_of_growth(rows: Sequence[Measured]) -> Table:
    table = _table()
    for name in ("atoms", "median\nms", "min\nms", "µs/atom", "memory\nMiB", "\nKiB/atom"):
        table.add_column(name, justify="right")
    for row in rows:
        times = ["-"] * 3
        if row.wall:
            times = [_digits(1e3 * t) for t in (row.seconds, min(row.wall))] + [
                _digits(1e6 * row.seconds / row.num_atoms)
            ]
        each = "-" if row.working_memory is None else _digits(row.working_memory / 1024 / row.num_atoms)
        table.add_row(str(row.num_atoms), *times, _mebibytes(row.working_memory), each)
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.1f}"


def _digits(value: float) -> str:
    """Three of them."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
