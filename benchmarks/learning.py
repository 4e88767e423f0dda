"""Train every architecture on the data that come with the package, and draw how the force error falls.

    python benchmarks/learning.py                     # about ten minutes on one thread
    python benchmarks/learning.py --only tensornet --epochs 3 --out /tmp/learning

The data are the 2,940 molecules, ions and clusters of ``TinyQM`` (GFN2-xTB) in their published division. All
architectures get the same batches, loss and learning rates; their sizes are such that an epoch takes seconds, so the
curves show that each of them learns, not which of them is the best that it can be.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

#: What all runs share; the rest are defaults.
SHARED: dict[str, Any] = {
    "dataset": "TinyQM",
    "dataset_arg": {"level": "GFN2-xTB"},
    "splits": "dataset",
    "remove_ref_energy": True,
    "charge": True,
    "derivative": True,
    "num_rbf": 16,
    "cutoff_upper": 5.0,
    "max_z": 10,
    "y_weight": 0.05,
    "neg_dy_weight": 1.0,
    "batch_size": 16,
    "inference_batch_size": 128,
    "lr": 3e-3,
    "lr_warmup_steps": 100,
    "lr_patience": 2,
    "lr_factor": 0.5,
    "gradient_clipping": 10,
    "report": False,
    "ngpus": 1,
}

#: Options of each architecture. GN, T and ET do not read the total charge.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tensornet": {"embedding_dimension": 32, "num_layers": 1},
    "tensornet2": {"embedding_dimension": 32, "num_layers": 1, "q_dim": 4},
    "equivariant-transformer": {"embedding_dimension": 32, "num_layers": 2, "num_heads": 4, "vector_cutoff": True},
    "transformer": {"embedding_dimension": 64, "num_layers": 3, "num_heads": 4},
    "graph-network": {"embedding_dimension": 64, "num_layers": 3},
}

COLOURS = ("#2f6fb0", "#4aa3a2", "#d9822b", "#8a8f98", "#a0518d")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each run (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="MODEL", help="only these architectures")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default %(default)s)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of the json")
    parser.add_argument("--figure", type=Path, help="also draw the curves into this file")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the curves of an earlier result")
    args = parser.parse_args(argv)
    if args.draw is not None:
        draw(json.loads(args.draw.read_text()), args.figure or args.draw.with_suffix(".png"))
        return 0
    runs = {name: learn(name, args.epochs, args.threads) for name in args.only or ARCHITECTURES}
    result = {"date": datetime.date.today().isoformat(), "about": about(args.threads), "shared": SHARED, "runs": runs}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result['date']}-learning.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    if args.figure is not None:
        draw(result, args.figure)
    print(table(result))
    return 0


def learn(name: str, epochs: int, threads: int) -> dict[str, Any]:
    """Train one architecture in a process of its own.

    Returns:
        Its options, errors over the epochs on the validation set, and those of the best epoch on the test set.
    """
    options = {**SHARED, "model": name, **ARCHITECTURES[name], "num_epochs": epochs}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        conf, log_dir = Path(folder) / "conf.yaml", Path(folder) / "run"
        conf.write_text(json.dumps({**options, "log_dir": str(log_dir)}))  # JSON is YAML
        code = "from torchmdnet.scripts.train import main; main()"
        subprocess.run([sys.executable, "-c", code, "--conf", str(conf)], check=True, env=environment, cwd=REPOSITORY)
        summary = json.loads((log_dir / "summary.json").read_text())
        with open(log_dir / "errors.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    return {
        "options": {**ARCHITECTURES[name], "num_epochs": epochs},
        "parameters": summary["parameters"],
        "seconds": summary["seconds"],
        "samples_per_second": summary["samples_per_second"],
        "force_mae": [float(row["neg_dy_mae"]) for row in rows],  # eV/Å, validation set
        "energy_mae_per_atom": [float(row["y_mae_per_atom"]) for row in rows],  # eV
        "test": {key: summary["errors"][key] for key in ("neg_dy_mae", "y_mae_per_atom")},
        "trivial": {key: summary["baseline"][key] for key in ("neg_dy_mae", "y_mae_per_atom")},
    }


def about(threads: int) -> dict[str, Any]:
    """Where and with what the numbers were obtained."""
    import platform

    import torch

    import torchmdnet

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "threads": threads,
        "load": [round(value, 1) for value in os.getloadavg()],
        "torch": torch.__version__,
        "torchmd-net": torchmdnet.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def table(result: dict[str, Any]) -> str:
    """The result as a table in markdown, errors of the test set."""
    lines = [
        "| `model` | parameters | force MAE [meV/Å] | energy MAE [meV/atom] |",
        "|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        test = run["test"]
        force, energy = 1000 * test["neg_dy_mae"], 1000 * test["y_mae_per_atom"]
        lines.append(f"| `{name}` | {run['parameters']:,} | {force:.0f} | {energy:.1f} |")
    trivial = next(iter(result["runs"].values()))["trivial"]
    force, energy = 1000 * trivial["neg_dy_mae"], 1000 * trivial["y_mae_per_atom"]
    lines.append(f"| no network | – | {force:.0f} | {energy:.1f} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Force errors on the validation set against epochs, with the trivial prediction as a line."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from torchmdnet.training.plots import STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.8), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for (name, run), colour in zip(result["runs"].items(), COLOURS, strict=False):
            errors = [1000 * error for error in run["force_mae"]]
            axis.plot(range(1, len(errors) + 1), errors, color=colour, linewidth=1.8, label=name)
        trivial = 1000 * next(iter(result["runs"].values()))["trivial"]["neg_dy_mae"]
        axis.axhline(trivial, color="black", linewidth=1, linestyle="--", label="no force at all")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlim(left=1)
        axis.set_xlabel("epoch")
        axis.set_ylabel("force MAE, validation set [meV/Å]")
        figure.legend(loc="outside right upper")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
