"""``torchmd-net data``: what is in a data set, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import check_target, draft_of, plain
from torchmdnet.parse import parse_yaml

if TYPE_CHECKING:
    from rich.console import Console

    from torchmdnet.data.doctor import Diagnosis, Finding, Samples
from torchmdnet.scripts.argument_types import CommandParser

__all__ = ["get_parser", "main"]

_SIGNS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "note": ("·", "dim")}


def main(argv: Sequence[str] | None = None) -> None:
    """Examine a data set, print what was found, and end with a status that scripts can use.

    Raises:
        ConfigError: If the arguments do not fit each other.
        SystemExit: With 1 where there are errors or nothing can be read, and for warnings under ``--strict``.
    """
    args = get_parser().parse_args(argv)
    _check(args)
    html = check_target(args.html, "--html") if args.html else None
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"--html: there is no folder {html.absolute().parent}.")
    if args.fix is not None:
        check_target(args.fix, "--fix")
    level = logging.getLogger("torchmdnet").level
    logging.getLogger("torchmdnet").setLevel(logging.WARNING)  # the tables say it all
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about numbers that are findings
                samples = _open(args)
        except MemoryError as error:
            what = ", ".join(args.paths) or args.conf or args.dataset
            raise MemoryError(f"{what}: there is not enough memory for the data ({error}).") from error
        except DataError as error:
            raise SystemExit(_unreadable(args, error)) from None

        from torchmdnet.data.doctor import examine
        from torchmdnet.data.doctor.repair import check_copy, plan_repair, write_cleaned
        from torchmdnet.data.doctor.report import html_report

        target = None if args.fix is None else check_copy(args.fix, _sources(samples))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about numbers that are findings
            diagnosis = examine(samples)
        lines: list[str] = []
        left: tuple[Finding, ...] = ()
        if target is not None:
            plan = plan_repair(diagnosis)
            number = write_cleaned(diagnosis, plan, target)
            lines, left = [*plan.words(), f"{number:,} samples written to {target}"], plan.left
        if html is not None:
            with draft_of(html) as draft:
                draft.write_text(html_report(diagnosis), encoding="utf-8")
        if args.json:
            print(
                json.dumps(
                    plain({**diagnosis.as_dict(), "fix": lines, "left": _short(left)}), indent=2, ensure_ascii=False
                )
            )
        else:
            _print(diagnosis, lines, left, args)
    finally:
        logging.getLogger("torchmdnet").setLevel(level)
    if diagnosis.count("error") or (args.strict and diagnosis.count("warning")):
        raise SystemExit(1)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net data``."""
    parser = CommandParser(
        prog="torchmd-net data",
        description="Say what is in a data set and what is wrong with it.",
        epilog="Ends with status 0 if there are no errors, 1 if there are, if nothing can be read, or if there are "
        "warnings and --strict is given, 2 if the arguments do not fit.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="structures that ASE reads, LMDB, Parquet, .npz, HDF5 or .npy files; "
        "patterns in quotes"
    )  # fmt: skip
    parser.add_argument("--conf", help="a configuration: examine the data that training with it would see")
    parser.add_argument("--dataset", help="a data set by name, such as QM9, with --dataset-root")
    parser.add_argument("--dataset-root", help="its folder or files")
    parser.add_argument(
        "--dataset-arg", action=_DatasetArg, type=_dataset_arg, default={}, metavar="JSON",
        help='arguments of the data set: \'{"energy_key": "scf_energy", "energy_unit": "Hartree"}\', or '
        "energy_key=scf_energy; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--fix", metavar="FILE", help="write a cleaned copy (.extxyz, .xyz, .h5, .hdf5); the original stays"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with all findings and plots")
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if there are warnings")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser


class _DatasetArg(argparse.Action):
    """Mappings that are given one after the other count together; what is no mapping is refused later."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if isinstance(before, Mapping):
            setattr(namespace, self.dest, {**before, **values} if isinstance(values, Mapping) else values)


def _dataset_arg(text: str) -> Any:
    key, equals, value = text.partition("=")
    if equals and key.strip().isidentifier():  # as torchmd-train takes it
        return {key.strip(): parse_yaml(value, f"--dataset-arg {key.strip()}")}
    return parse_yaml(text, "--dataset-arg")


def _check(args: argparse.Namespace) -> None:
    ways = [name for name in ("paths", "conf", "dataset") if getattr(args, name)]
    if len(ways) != 1:
        given = f"{' and '.join(ways)} are given" if ways else "nothing is given"
        raise ConfigError(f"data: {given}. Name files, or --conf, or --dataset: one of the three.")
    if args.dataset_root and not args.dataset:
        raise ConfigError("--dataset-root belongs to --dataset. Name the files themselves, or the data set.")
    if args.conf and args.dataset_arg:
        raise ConfigError("--dataset-arg: a configuration has its own dataset_arg. Change it there.")
    if not isinstance(args.dataset_arg, Mapping):
        key, equals, value = str(args.dataset_arg).partition("=")
        like = f"{{{key}: {value}}}" if equals and key.isidentifier() else "{energy_unit: Hartree}"
        raise ConfigError(
            f"--dataset-arg: {args.dataset_arg!r} should be a mapping of arguments to values. Write '{like}'."
        )


def _open(args: argparse.Namespace) -> Samples:
    from torchmdnet.data.doctor import open_configured, open_files, open_named

    if args.conf:
        from torchmdnet.config import resolve

        return open_configured(vars(resolve(["--conf", args.conf])), args.conf)
    if args.dataset:
        return open_named(args.dataset, args.dataset_root or "~/data", args.dataset_arg)
    if len(args.paths) == 1 and args.paths[0].endswith((".yaml", ".yml")):
        raise ConfigError(f"data: {args.paths[0]} is a configuration. Pass it as --conf {args.paths[0]}.")
    try:
        return open_files(args.paths, args.dataset_arg)
    except DataError as error:
        if any(path.endswith((".h5", ".hdf5")) for path in args.paths):
            raise DataError(f"{error} A published set has a layout of its own: pass --dataset NAME.") from None
        raise


def _unreadable(args: argparse.Namespace, error: DataError) -> int:
    """Say that nothing can be read, in the way asked for."""
    import sys

    if args.json:
        finding = {"check": "readable", "severity": "error", "text": str(error)}
        print(json.dumps({"name": ", ".join(args.paths) or args.conf or args.dataset, "findings": [finding]}, indent=2))
    print(f"error: {error}", file=sys.stderr)
    return 1


def _sources(samples: Samples) -> list[Path]:
    found = list(samples.survey.files) if samples.survey is not None else []
    files = getattr(samples.dataset, "files", None)
    groups = files.values() if isinstance(files, Mapping) else [files or []]
    return found + [Path(path) for group in groups for path in group]


def _short(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [{"check": f.check, "severity": f.severity, "text": f.text} for f in findings]


# ------------------------------------------------------------------------------------------------------ terminal


def _print(diagnosis: Diagnosis, lines: Sequence[str], left: Sequence[Finding], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    if not args.quiet:
        console.print(Text.assemble((diagnosis.samples.name, "bold"), (f"  {diagnosis.samples.kind}", "dim")))
        _print_tables(console, diagnosis)
        console.print()
    _print_findings(console, diagnosis, args.quiet)
    for line in lines:
        console.print(Text.assemble(("→ ", "green"), line))
    for finding in left:
        sign, style = _SIGNS[finding.severity]
        told = f"not mended, so still in {args.fix}: {finding.check}: {finding.text}"
        console.print(Text.assemble((f"{sign} ", style), told))
    if args.html:
        console.print(Text.assemble(("→ ", "green"), f"page with plots: {args.html}"))


def _print_tables(console: Console, diagnosis: Diagnosis) -> None:
    from rich.table import Table

    def start(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for column in columns:
            justify = "right" if column in right else "left"
            table.add_column(column, justify=justify, header_style="dim", overflow="fold", ratio=None)
        return table

    table = start("", "", "")
    table.show_header = False
    for name, text in diagnosis.facts().items():
        table.add_row(f"[cyan]{name}[/]", _escape(text))
    console.print(table)
    if names := diagnosis.names():
        table = start("\nQuantities of the source", "name", "taken as", "shape", "frames")
        for row in names[:30]:
            table.add_row(*map(_escape, row), style="dim" if row[1] == "–" else "")
        console.print(table)
    table = start("\nUnits, by what the numbers say", "quantity", "unit", "how sure", "evidence")
    for guess in diagnosis.guesses():
        table.add_row(
            guess.quantity, guess.unit or "–", guess.certainty if guess.unit else "–", _escape(guess.evidence)
        )
    console.print(table)
    right = ("cutoff", "edges per atom", "edges per epoch", "samples in separate parts")
    table = start("\nCutoff and cost", *right, right=right)
    cost = diagnosis.cost
    for cutoff, edges in cost.edges.items():
        style = "bold" if cutoff == cost.suggested else ""
        row = (f"{cutoff:g} Å", f"{edges:.1f}", f"{edges * cost.num_atoms:,.0f}", f"{cost.apart[cutoff]:.0%}")
        table.add_row(*row, style=style)
    console.print(table)


def _print_findings(console: Console, diagnosis: Diagnosis, quiet: bool) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from torchmdnet.data.doctor.report import places

    for finding in diagnosis.findings:
        if quiet and finding.severity == "note":
            continue
        sign, style = _SIGNS[finding.severity]
        console.print(Text.assemble((f"{sign} ", style), (f"{finding.check}: ", style), finding.text))
        details = []
        if where := places(diagnosis, finding):
            details.append(Text(where, "dim"))
        if finding.advice and finding.severity != "note":
            details.append(Text(finding.advice + (" --fix does it." if finding.repair is not None else ""), "italic"))
        elif finding.advice:
            details.append(Text(finding.advice, "dim italic"))
        for detail in details:
            console.print(Padding(detail, (0, 0, 0, 2)))
    errors, warnings = diagnosis.count("error"), diagnosis.count("warning")
    tell = [f"{n} {word}{'s' if n != 1 else ''}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
    style = "bold red" if errors else "bold yellow" if warnings else "bold green"
    console.print(Text(" and ".join(tell) if tell else "No errors, no warnings.", style))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
