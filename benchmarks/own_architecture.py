"""How fast the network of docs/own-architecture.md is: as a program in loops, and layer by layer in PyTorch.

    python benchmarks/own_architecture.py

Each way runs in a process of its own, on one thread: energy and forces of 192 water atoms, and a training step on them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "own-architecture.md"
#: Options of the network.
OPTIONS = {
    "model": "my_nets:PairNet",
    "embedding_dimension": 128,
    "num_layers": 2,
    "num_rbf": 32,
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 100,
    "output_model": "Scalar",
    "activation": "silu",
    "reduce_op": "sum",
    "derivative": True,
    "precision": 32,
}


def timed(call: Callable[[], object], repeats: int = 25) -> float:
    """Median time of a call, in milliseconds."""
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def measure() -> list[float]:
    """Milliseconds of an evaluation and of a training step."""
    import torch
    from systems import water

    from torchmdnet.build import create_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, system = create_model(OPTIONS), water(4)
    z, pos, box = torch.tensor(system.z), torch.tensor(system.pos).float(), torch.tensor(system.box).float()

    def train() -> None:
        model.zero_grad()
        energy, forces = model(z, pos, box=box)
        (1e-3 * energy.sum() + forces.square().mean()).backward()

    model.eval()
    evaluation = timed(lambda: model(z, pos, box=box))
    model.train()
    return [evaluation, timed(train)]


def main() -> None:
    """Print a table."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        text = re.search(r'title="my_nets.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
        assert text is not None
        Path(folder, "my_nets.py").write_text(text[1], encoding="utf-8")
        for way, plain in (("PyTorch, layer by layer", "1"), ("program in loops", "")):
            paths = os.pathsep.join([folder, str(HERE)])
            environment = {**os.environ, "PYTHONPATH": paths, "TORCHMDNET_PLAIN_OPS": plain, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(HERE / "own_architecture.py"), "measure"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    slow = found["PyTorch, layer by layer"]
    print("| | energy and forces | training step |\n|---|---|---|")
    for way, times in found.items():
        ratios = [f"{ms:.1f} ms ({before / ms:.1f} ×)" for ms, before in zip(times, slow, strict=True)]
        print(f"| {way} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        print(json.dumps(measure()))
    else:
        main()
