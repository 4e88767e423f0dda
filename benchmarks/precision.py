#!/usr/bin/env python
"""How far single precision is from double precision, and from cheaper matrix products, for 12,288 water atoms.

python benchmarks/precision.py [--system 12288-water] [--device cuda]

Prints a table. The last lines sum the energies of as many atoms as they say in three ways; atoms bring energies as
large as those of all-electron calculations, which is where a sum in single precision loses the digits that matter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from systems import SYSTEMS
from workloads import OPTIONS

from torchmdnet.models.model import create_model

#: Energy of an atom in eV, by element, as all-electron calculations give it.
ATOMIC_ENERGIES = {1: -13.6, 8: -2041.8}
#: What is compared: a name, the precision of numbers, and PyTorch's precision of matrix products.
WAYS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "float32, TF32 products": (torch.float32, "high"),
    "float32, bf16 products": (torch.float32, "medium"),
}


def deviations(system: str, device: str) -> list[dict[str, Any]]:
    """Largest deviation of energy and forces from float64, and the time of a call, for each way."""
    found, exact = [], None
    for name, (dtype, products) in WAYS.items():
        torch.manual_seed(0)
        model = create_model({**OPTIONS["tensornet"], "precision": 32}).to(dtype).to(device).eval()
        torch.set_float32_matmul_precision(products)
        energy, forces, seconds = ask(model, system, dtype, device)
        exact = (energy, forces) if exact is None else exact
        found.append(
            {
                "way": name,
                "seconds": seconds,
                "energy_per_atom": abs(energy - exact[0]) / len(forces),
                "force": float((forces - exact[1]).abs().max()),
                "largest_force": float(exact[1].abs().max()),
            }
        )
    torch.set_float32_matmul_precision("highest")
    return found


def ask(model: Any, name: str, dtype: torch.dtype, device: str) -> tuple[float, torch.Tensor, float]:
    """Energy, forces (N, 3) in double precision, and seconds of the second call."""
    system = SYSTEMS[name]()
    z = torch.tensor(system.z, device=device)
    pos = torch.tensor(system.pos, dtype=dtype, device=device)
    box = None if system.box is None else torch.tensor(system.box, dtype=dtype, device=device)
    model(z, pos, box=box)
    start = time.perf_counter()
    energy, forces = model(z, pos, box=box)
    value = float(energy.detach())
    seconds = time.perf_counter() - start
    return value, forces.detach().double().cpu(), seconds


def sums(num_molecules: int) -> list[dict[str, Any]]:
    """Error in eV of the energy of many atoms, for a sum in float32, one in float64, and the latter in float32."""
    rng = torch.Generator().manual_seed(0)
    atomic = torch.tensor([ATOMIC_ENERGIES[z] for z in (8, 1, 1)] * num_molecules, dtype=torch.float64)
    atomic = (atomic + torch.randn(len(atomic), generator=rng, dtype=torch.float64)).float()
    exact = atomic.double().sum()
    one_by_one = torch.zeros(1).index_add(0, torch.zeros(len(atomic), dtype=torch.long), atomic)
    ways = {
        "atom by atom in float32": one_by_one.double()[0],
        "in float64, returned in float32, as by a model in float32": exact.float().double(),
        "in float64, as by the calculators": exact,
    }
    return [
        {"way": way, "error": float((value - exact).abs()), "num_atoms": len(atomic)} for way, value in ways.items()
    ]


def table(rows: Sequence[dict[str, Any]], totals: Sequence[dict[str, Any]], system: str) -> str:
    """Both as markdown."""
    lines = [
        f"TensorNet, 128 channels, 2 layers, {system}; largest force {rows[0]['largest_force']:.2g}, in units of which "
        "the deviations are, too",
        "",
        "| arithmetic | s a call | deviation of the energy, per atom | largest deviation of a force |",
        "|---|---|---|---|",
    ]
    for row in rows:
        deviations = ("–", "–") if row is rows[0] else (f"{row['energy_per_atom']:.1e}", f"{row['force']:.1e}")
        lines.append(f"| {row['way']} | {row['seconds']:.2f} | {deviations[0]} | {deviations[1]} |")
    lines += ["", f"| sum of {totals[0]['num_atoms']:,} atoms' energies | error, eV |", "|---|---|"]
    lines += [f"| {row['way']} | {row['error']:.1e} |" for row in totals]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="12288-water", choices=SYSTEMS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print values instead")
    options = parser.parse_args(argv)
    rows, totals = deviations(options.system, options.device), sums(98304 // 3)
    data = {"deviations": rows, "sums": totals}
    print(json.dumps({"table": table(rows, totals, options.system), "data": data}) if options.json else
          table(rows, totals, options.system))  # fmt: skip


if __name__ == "__main__":
    main()
