"""Train on the data set that comes with the package, then simulate a molecule with the result.

python examples/quickstart.py --output runs/quickstart

What it leaves in the output folder: the potential (best.ckpt), report.html with plots, and md/ with a trajectory.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # matrices this small gain nothing from more, and lose on a busy machine

import ase_md
from ase.build import molecule
from ase.io import write

from torchmdnet.scripts.train import main as torchmd_train

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2000, help="steps of dynamics (default: %(default)s)")
    args, options = parser.parse_known_args(arguments)
    output: Path = args.output

    settings = ["--conf", str(HERE / "quickstart.yaml"), "--log-dir", str(output), "--overwrite"]
    torchmd_train([*settings, *options])

    print(f"\nEthanol at 300 K, {args.steps} steps of 0.5 fs at constant energy:")
    simulation = output / "md"
    simulation.mkdir(exist_ok=True)
    write(simulation / "start.xyz", molecule("CH3CH2OH"))
    ase_md.main(
        [
            *(str(output / "best.ckpt"), str(simulation / "start.xyz")),
            *("--steps", str(args.steps), "--charge", "0", "--output", str(simulation)),
        ]
    )

    trained = json.loads((output / "summary.json").read_text())
    simulated = json.loads((simulation / "summary.json").read_text())
    drift = ase_md.milli(simulated["drift_meV_per_atom_per_ps"], "eV/atom/ps")
    force, trivial = (1000 * trained[which]["neg_dy_mae"] for which in ("errors", "baseline"))
    print(
        f"\nIn short: a force error of {force:.0f} meV/Å on structures not trained on, where predicting no force "
        f"at all errs by {trivial:.0f};\nan energy drift of {drift}."
        f"\nLook at {output / 'report.html'} and {simulation / 'energy.png'}."
    )


if __name__ == "__main__":
    main()
