#!/usr/bin/env python3
"""Compare the answers to checkpoints of torchmd-net 3.1.0 with the numbers that release gave.

The cases lie in ``interop/`` of the folder named by ``TORCHMDNET_SHARED_DATA``, else ``../shared``: a folder each, with
checkpoints, ``case.json`` and ``data.npz``. A table and the worst relative deviation are printed; the exit status is 1
if any case is off.

    python tools/interop.py [CASE ...] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from torchmdnet.checkpoint import describe, load_model

__all__ = ["Comparison", "cases_in", "compare", "load_case", "shared_data"]

#: Largest deviation relative to 1 + max|reference|: (energy, forces).
TOLERANCE = {64: (1e-10, 1e-10), 32: (5e-6, 3e-5)}
LOOSE_64 = (1e-7, 1e-6)  # where the reference itself rounds constants to single precision


class Comparison(NamedTuple):
    """One array of one case, ours against the reference."""

    case: str
    scenario: str
    name: str  # y, f, ystd or fstd: energies, forces, and their standard deviations
    precision: int
    deviation: float  # relative to 1 + max|reference|
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether it is within the tolerance."""
        return self.deviation <= self.allowed


class Case(NamedTuple):
    """A checkpoint, or several, and what the reference said."""

    name: str
    meta: dict[str, Any]
    arrays: Any  # of data.npz, by "<scenario>/<name>"
    files: Path | list[Path]


def shared_data() -> Path:
    """Where the reference data lie."""
    return Path(os.environ.get("TORCHMDNET_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared"))


def cases_in(data: Path) -> list[str]:
    """Names of the cases there are."""
    return sorted(path.parent.name for path in (data / "interop").glob("*/case.json"))


def load_case(folder: Path) -> Case:
    """Read everything of a case but its models."""
    meta = json.loads((folder / "case.json").read_text())
    files = meta.get("files", "model.ckpt")
    paths = folder / files if isinstance(files, str) else [folder / name for name in files]
    return Case(folder.name, meta, np.load(folder / "data.npz"), paths)


def compare(case: Case, precision: int) -> Iterator[Comparison]:
    """Load the models of a case and compare every answer that the reference gave in this precision."""
    dtype = {64: torch.float64, 32: torch.float32}[precision]
    model = load_model(case.files, precision=precision, **case.meta["load_kwargs"])
    without = None  # the same without the reference energies of a delta-learned model
    allowed = LOOSE_64 if precision == 64 and case.meta.get("loose64") else TOLERANCE[precision]
    for scenario in case.meta["scenarios"]:
        given = {key.removeprefix(f"{scenario}/"): key for key in case.arrays.files if key.startswith(f"{scenario}/")}

        def stored(name: str, given: dict[str, str] = given) -> torch.Tensor | None:
            if name not in given:
                return None
            value = torch.tensor(case.arrays[given[name]])
            return value.to(dtype) if value.is_floating_point() else value

        extra = {name.removeprefix("extra/"): stored(name) for name in given if name.startswith("extra/")}
        inputs = (stored("z"), stored("pos"), stored("batch"), stored("box"), stored("q"), None, extra or None)
        output = model(*inputs)
        for index, (name, result) in enumerate(zip(("y", "f", "ystd", "fstd"), output, strict=False)):
            plain = f"{name}{precision}"
            if plain not in given:
                continue
            exact = f"{plain}_mirror" if case.meta.get("so3") == "mirror" else f"{plain}_py"
            reference = case.arrays[given.get(exact, given[plain])]
            yield Comparison(case.name, scenario, name, precision, deviation(result, reference), allowed[index % 2])
        if f"y{precision}_removed" in given:
            options = {**case.meta["load_kwargs"], "remove_ref_energy": True}
            without = without or load_model(case.files, precision=precision, **options)
            found = deviation(without(*inputs)[0], case.arrays[given[f"y{precision}_removed"]])
            limit = max(allowed[0], LOOSE_64[0])  # from the path of the reference that rounds
            yield Comparison(case.name, scenario, "y_removed", precision, found, limit)


def deviation(result: torch.Tensor, reference: np.ndarray) -> float:
    """Largest difference relative to 1 + max|reference|; infinite where shapes differ or something is no number."""
    if tuple(result.shape) != reference.shape:
        return float("inf")
    found = float(np.abs(result.detach().numpy() - reference).max() / (1 + np.abs(reference).max()))
    return found if np.isfinite(found) else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare with the numbers of torchmd-net 3.1.0.")
    parser.add_argument("cases", nargs="*", help="names of cases; all without any")
    parser.add_argument("--data", type=Path, default=shared_data(), help="folder that holds interop/")
    args = parser.parse_args(argv)
    names = args.cases or cases_in(args.data)
    if not names:
        print(f"no cases in {args.data / 'interop'}; name the folder with --data or TORCHMDNET_SHARED_DATA")
        return 2
    logging.getLogger("torchmdnet").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results = []
    columns = [(precision, name) for precision in (64, 32) for name in ("y", "f")]
    print(f"{'case':<20} {'architecture':<24} {'energy 64':>10} {'forces 64':>10} {'energy 32':>10} {'forces 32':>10}")
    for name in names:
        case = load_case(args.data / "interop" / name)
        found = [row for precision in (64, 32) for row in compare(case, precision)]
        worst = {
            column: max(
                (row.deviation for row in found if (row.precision, row.name[0]) == column), default=float("nan")
            )
            for column in columns
        }
        numbers = " ".join(f"{'-' if np.isnan(value) else f'{value:.1e}':>10}" for value in worst.values())
        verdict = "" if all(row.agrees for row in found) else "  OFF"
        print(f"{name:<20} {architecture_of(case):<24} {numbers}{verdict}", flush=True)
        results += found
    print(summary(results, len(names)))
    return 0 if all(row.agrees for row in results) else 1


def architecture_of(case: Case) -> str:
    """Name of the architecture, and how many members there are."""
    if isinstance(case.files, list):
        return f"{describe(case.files[0])['architecture']} x {len(case.files)}"
    card = describe(case.files)
    return (
        f"{card['members'][0]['architecture']} x {len(card['members'])}" if "members" in card else card["architecture"]
    )


def summary(results: Sequence[Comparison], num_cases: int) -> str:
    """The worst of all comparisons, in one line."""
    words = []
    for precision in (64, 32):
        worst = max((row for row in results if row.precision == precision), key=lambda row: row.deviation)
        words.append(f"{worst.deviation:.1e} in {precision} bit ({worst.case}, {worst.scenario}, {worst.name})")
    off = len({row.case for row in results if not row.agrees})
    verdict = f"{off} off" if off else "all within tolerance"
    return f"worst relative deviation of {len(results)} comparisons in {num_cases} cases: {'; '.join(words)}; {verdict}"


if __name__ == "__main__":
    sys.exit(main())
