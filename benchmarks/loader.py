#!/usr/bin/env python
"""How many systems per second reach the model: our loader against torch_geometric's, both in one process.

    python benchmarks/loader.py                 # TinyQM, and 20,000 made-up molecules mapped from disk
    python benchmarks/loader.py --batch-size 16 64 512 --rounds 7

torch_geometric's ``DataLoader`` (``num_workers=0``) is given its best case, a list of ``Data`` objects that exist
already, and the usual one, samples cut from the same arrays as ours. The three take turns; a ratio is formed within
each round, and the table shows the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_geometric.loader import DataLoader

from torchmdnet.data.loader import EpochBatchSampler, Loader
from torchmdnet.datasets import TinyQM
from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import FrameBuilder


class OneByOne(Dataset):
    """The same arrays without the means to gather a batch."""

    def __init__(self, dataset: FramesDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[int(index)]


def made_up_molecules(folder: Path, count: int) -> FramesDataset:
    """Molecules of 10 to 60 atoms with energies and forces, in files."""
    rng = np.random.default_rng(0)
    builder = FrameBuilder(folder)
    for size in rng.integers(10, 61, count):
        numbers = rng.normal(size=(2, size, 3))
        builder.append({"z": rng.integers(1, 10, size), "pos": numbers[0], "neg_dy": numbers[1], "y": rng.normal()})
    return FramesDataset(builder.finish())


def measure(loader: Callable[[], Iterable], limit: float) -> float:
    """Systems per second over about ``limit`` seconds."""
    systems, start = 0, time.perf_counter()
    while True:
        for batch in loader():
            systems += batch.num_graphs
            if time.perf_counter() - start > limit:
                return systems / (time.perf_counter() - start)


def compare(dataset: FramesDataset, size: int, rounds: int, seconds: float) -> list[list[float]]:
    """Rates of the three ways in each round."""
    exists = [dataset[i] for i in range(len(dataset))]
    sampler = EpochBatchSampler(len(dataset), size, shuffle=True)
    ours = Loader(dataset, sampler)
    objects = DataLoader(exists, batch_size=size, shuffle=True)
    arrays = DataLoader(OneByOne(dataset), batch_size=size, shuffle=True)
    rates: list[list[float]] = []
    for turn in range(rounds + 1):
        sampler.set_epoch(turn)
        rates.append([measure(lambda one=one: iter(one), seconds) for one in (ours, objects, arrays)])
    return rates[1:]  # the first warms up


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn")
    parser.add_argument("--systems", type=int, default=20_000, help="made-up molecules")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| data | batch | ours, systems/s | times torch_geometric's list of Data | times its samples from arrays |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sets = {"TinyQM (in memory)": TinyQM(), "made up (mapped)": made_up_molecules(Path(folder), args.systems)}
        for name, dataset in sets.items():
            for size in args.batch_size:
                rates = compare(dataset, size, args.rounds, args.seconds)
                ours = statistics.median(rate[0] for rate in rates)
                ratios = [statistics.median(rate[0] / rate[other] for rate in rates) for other in (1, 2)]
                print(f"| {name} | {size} | {ours:,.0f} | {ratios[0]:.1f} | {ratios[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
