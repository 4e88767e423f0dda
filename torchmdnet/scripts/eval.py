"""``torchmd-net eval``: how far the predictions of models are from reference data."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchmdnet.files import plain, write_json
from torchmdnet.parse import parse_yaml
from torchmdnet.scripts.argument_types import count
from torchmdnet.scripts.folder import MARK, add_folder_options, results_folder
from torchmdnet.scripts.potential import add_unseen_option
from torchmdnet.scripts.progress import Meter

__all__ = ["get_parser", "main"]

MODEL_ENDS = (".safetensors", ".ckpt", ".zip")
OUTPUTS = ("summary.json", "report.html", "errors.csv", "errors.png", "parity*.png", "calibration*.png",
           "worst*.extxyz", MARK)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Compare models with reference data, print their errors, and write a folder with a page.

    Raises:
        ConfigError: If an argument cannot work, or a model was not trained on such structures.
        DataError: If the data cannot be read or have no labels.
        CheckpointError: If a model cannot be read.
    """
    args = get_parser().parse_args(argv)
    models = [word for word in args.models_and_data if word.endswith(MODEL_ENDS)]

    from torchmdnet.evaluation.report import write_all
    from torchmdnet.evaluation.run import Request, compared, notes_of

    request = Request(
        models,
        [word for word in args.models_and_data if word not in models],
        args.dataset,
        args.dataset_root,
        args.dataset_arg,
        args.split,
        args.splits,
        args.max,
        args.device,
        args.dtype,
        args.units,
        args.allow_unseen,
    )
    opened, references, labels = request.open()
    with results_folder(args.out, overwrite=args.overwrite, outputs=OUTPUTS) as folder:
        paths = [str(Path(path).absolute()) for path in models]
        write_json(folder / MARK, {"command": "eval", "models": paths, "data": references.name})
        began = time.monotonic()
        with Meter(len(references) * len(opened)) as meter:
            result = compared(opened, references, labels, meter.update)
        seconds = time.monotonic() - began
        notes = notes_of(result)
        summary = write_all(folder, result, notes)
    summary |= {"folder": str(folder), "seconds": seconds, "notes": notes}
    if args.json:
        print(json.dumps(plain(summary), indent=2, ensure_ascii=False))
    else:
        _print(summary, folder, notes)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net eval``."""
    parser = argparse.ArgumentParser(
        prog="torchmd-net eval",
        description="Compare predictions of one or more models with reference data.",
        epilog="Ends with status 0 when the comparison is made, whatever the errors, 1 if files cannot be used, 2 if "
        "the arguments do not fit.",
    )
    parser.add_argument(
        "models_and_data", nargs="+", metavar="MODEL... DATA...",
        help="models (.safetensors, .ckpt, or .zip for an ensemble), then structures with labels: any file ASE reads, "
        "LMDB, Parquet, .npz, HDF5; patterns in quotes",
    )  # fmt: skip
    add_folder_options(parser, "eval")
    parser.add_argument("--json", action="store_true", help="print everything that was found as JSON")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="a data set by name, such as QM9, in place of files")
    data.add_argument("--dataset-root", help="its folder or files")
    data.add_argument(
        "--dataset-arg", type=lambda text: parse_yaml(text, "--dataset-arg"), default={}, metavar="JSON",
        help='arguments of the data set: \'{"energy_key": "REF_energy", "energy_unit": "Hartree"}\'',
    )  # fmt: skip
    data.add_argument("--split", metavar="PART", help="compare train, val or test alone")
    data.add_argument(
        "--splits", metavar="FILE", help="splits.npz of a training run that says which structures these are"
    )
    add_unseen_option(data)
    data.add_argument("--max", type=count, metavar="NUMBER", help="compare this many structures, evenly chosen")
    potential = parser.add_argument_group("potential")
    potential.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="precision (default: %(default)s)"
    )
    potential.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    potential.add_argument("--units", help="of the models, such as kcal/mol, if their files do not state them")
    return parser


def _print(summary: dict[str, Any], folder: Path, notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120, no_color=True)
    title = f"{summary['data']}: {summary['structures']:,} structures, {summary['atoms']:,} atoms"
    console.print(Text(title, "bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    several = len(summary["models"]) > 1
    for column in ("quantity", *(["model"] if several else [])):
        table.add_column(column, header_style="dim")
    for column in ("MAE", "RMSE", "95 %", "largest"):
        table.add_column(column, header_style="dim", justify="right")
    table.add_column("unit", header_style="dim")
    for name in summary["models"][0]["errors"]:
        for model in summary["models"]:
            if name not in model["errors"]:
                continue
            each = model["errors"][name]
            numbers = [f"{each[kind]:.3g}" for kind in ("mae", "rmse", "p95", "largest")]
            table.add_row(name, *([model["name"]] if several else []), *numbers, each["unit"])
    console.print(table)
    for note in notes:
        console.print(Text(note, "yellow"), soft_wrap=True)
    worst = summary["models"][0]["worst"]
    if worst:
        console.print(Text(f"worst: {'; '.join(worst[:3])}", "dim"), soft_wrap=True)
    for model in summary["models"]:
        for each in model["calibration"]:
            console.print(
                Text(
                    f"{model['name']}: {each['inside']:.0%} of the errors of the {each['name']} are within one "
                    f"standard deviation (68 % if calibrated), Spearman {each['correlation']:.2f}"
                ),
                soft_wrap=True,
            )
    console.print(f"page, click on points to see structures: {folder / 'report.html'}", soft_wrap=True)
