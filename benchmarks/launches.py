#!/usr/bin/env python
"""Launches, waits of the host and the largest array of calls on a GPU, counted on the CPU.

python benchmarks/launches.py [--json FILE]

Nothing is timed and no GPU is needed; see :mod:`torchmdnet.testing.launches` for what counts as a launch. Every kind of
call is made twice, and the second time is counted, since the first makes tables of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before the import: the search for neighbours has to run

import torch
from systems import SYSTEMS, System, dipeptide, water
from workloads import OPTIONS

from torchmdnet.calculators.fixed import FixedStep
from torchmdnet.graph import Inputs
from torchmdnet.models.model import create_model
from torchmdnet.neighbors import device
from torchmdnet.testing.launches import Counts, counting

#: Atoms of each molecule of the batch for training, and their number.
MOLECULES = (32, 20)
BOXES = 64


device.TILES.update(atoms=256, candidates=16, edges=4096, block=4096)  # the interpreter's time is that of programs


def inputs_of(system: System, copies: int = 1) -> Inputs:
    """The same system several times, as one batch."""
    z, pos = torch.tensor(system.z), torch.tensor(system.pos, dtype=torch.float32)
    batch = torch.arange(copies).repeat_interleave(len(z))
    box = None if system.box is None else torch.tensor(system.box, dtype=torch.float32).expand(copies, 3, 3)
    return Inputs(z.repeat(copies), pos.repeat(copies, 1), batch, box, num_systems=copies)


def molecules() -> Inputs:
    """A batch for training: all atoms but two of the dipeptide, moved a little."""
    copies, atoms = MOLECULES
    whole = dipeptide()
    inputs = inputs_of(System(whole.z[:atoms], whole.pos[:atoms]), copies)
    noise = torch.randn(inputs.pos.shape, generator=torch.Generator().manual_seed(0))
    return inputs._replace(pos=inputs.pos + 0.02 * noise)


def model_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_model({**OPTIONS[name], **options})


def called(name: str, inputs: Inputs) -> Callable[[], Any]:
    """Energy and forces."""
    model = model_of(name).eval()

    def call() -> None:
        with torch.no_grad():
            model(*inputs[:8])

    return call


def captured(name: str, inputs: Inputs) -> Callable[[], Any]:
    """What a CUDA graph of a step holds."""
    step = FixedStep(model_of(name).eval(), None)  # type: ignore[arg-type]
    step.make_room(inputs)
    return lambda: step.step(inputs)


def trained(name: str, inputs: Inputs) -> Callable[[], Any]:
    """Gradients of a loss of energies and forces, without the optimizer."""
    model = model_of(name).train()
    energies, forces = torch.zeros(inputs.num_systems or 1, 1), torch.zeros_like(inputs.pos)

    def step() -> None:
        model.zero_grad()
        energy, force = model(*inputs[:8])
        loss = (energy - energies).square().mean() + (force - forces).square().mean()
        loss.backward()

    return step


ROWS: dict[str, Callable[[], Callable[[], Any]]] = {
    "22 atoms, open, captured": lambda: captured("tensornet", inputs_of(dipeptide())),
    "192 atoms, periodic, captured": lambda: captured("tensornet", inputs_of(water(4))),
    "22 atoms, open, called": lambda: called("tensornet", inputs_of(dipeptide())),
    "192 atoms, periodic, called": lambda: called("tensornet", inputs_of(water(4))),
    "training step, 32 × 20 atoms": lambda: trained("tensornet", molecules()),
    "64 boxes of 192 atoms, called": lambda: called("tensornet", inputs_of(SYSTEMS["192-water"](), BOXES)),
}


def count(row: str) -> Counts:
    """The counts of one row."""
    with counting() as first:
        call = ROWS[row]()
        call()
    del first
    with counting() as counts:
        call()
    return counts


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--names", action="store_true", help="print what was launched and waited for, too")
    parser.add_argument("--json", type=Path, help="write all counts to a file")
    args = parser.parse_args()
    found = {}
    print(f"{'':32s} {'launches':>9s} {'waits':>6s} {'sent':>5s} {'largest array':>14s}")
    for row in ROWS:
        if args.only and args.only not in row:
            continue
        counts = count(row)
        sent = counts.copies.total()
        print(f"{row:32s} {counts.num_launches:9d} {counts.num_waits:6d} {sent:5d} {counts.largest / 1e6:11.1f} MB")
        if args.names:
            for what in (counts.launches, counts.waits, counts.copies):
                print("    ", ", ".join(f"{name} {number}" for name, number in what.most_common()))
        found[row] = {
            "launches": dict(counts.launches),
            "waits": dict(counts.waits),
            "copies": dict(counts.copies),
            "largest_array": counts.largest,
        }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
