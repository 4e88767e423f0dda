"""One batched call for an ensemble of small systems against one call for each member.

python benchmarks/ensembles.py

Prints the time of energy and forces of four members, both ways, and their ratio. The number of edges up to which the
batched call wins is what ``torchmdnet.stacking.BATCHED_EDGES`` says.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch

from torchmdnet import stacking
from torchmdnet.build import create_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.models import ARCHITECTURES

SETTINGS = {
    "embedding_dimension": 64,
    "num_layers": 2,
    "num_rbf": 32,
    "cutoff_upper": 5.0,
    "output_model": "Scalar",
    "derivative": True,
}


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def compare(name: str, num_atoms: int, members: int, repeats: int) -> tuple[int, float, float]:
    """Edges of all members together, and the times in turn and batched."""
    torch.manual_seed(0)
    models = [create_model({**SETTINGS, "model": name}).eval().requires_grad_(False) for _ in range(members)]
    ensemble = Ensemble(models)
    pos = (num_atoms / 0.1) ** (1 / 3) * torch.rand(num_atoms, 3)  # atoms as dense as in water
    z = torch.randint(1, 9, (num_atoms,))
    edges = members * int(models[0].representation_model.graph(z, pos).edge_index.shape[1])
    times = []
    for limit in (0, math.inf):
        stacking.BATCHED_EDGES["cpu"] = limit  # type: ignore[assignment]
        times.append(milliseconds(lambda: ensemble(z, pos), repeats))
    return edges, times[0], times[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[name for name in ARCHITECTURES if name != "transformer"])
    parser.add_argument("--atoms", nargs="+", type=int, default=[3, 6, 9, 12, 16, 24])
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.processor() or 'CPU'}")
    print(f"times in ms for {options.members} members")
    print(f"{'model':>24} {'atoms':>6} {'edges':>6} {'in turn':>9} {'batched':>9}   ratio")
    for name in options.models:
        for num_atoms in options.atoms:
            edges, in_turn, batched = compare(name, num_atoms, options.members, options.repeats)
            print(f"{name:>24} {num_atoms:6} {edges:6} {in_turn:9.2f} {batched:9.2f}   {in_turn / batched:5.2f}")
