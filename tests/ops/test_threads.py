"""Loops are shared by threads where that is safe."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORK = """
import multiprocessing, numpy as np, torch
torch.set_num_threads(2)
from torchmdnet.ops.kernels import loops

def normalize(_):
    X = np.ones((4000, 9, 128), np.float32)  # PyTorch would fill it with threads that are lost
    out = np.empty_like(X)
    loops.algebra.normalize(8 * X.size, X, out)
    return round(float(out[0, 0, 0]), 6)

def run(_):
    assert normalize(0) == 0.1
    product = torch.ones(1500, 1500) @ torch.ones(1500, 1500)  # PyTorch's own threads
    assert product[0, 0] == 1500
    return torch.get_num_threads()

if __name__ == "__main__":
    print(run(0))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(run, range(4)))
    print(run(0))
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (2,)) as pool:
        print(pool.map(normalize, range(2)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_forked_processes_go_on_with_one_thread() -> None:
    end = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240)
    assert end.returncode == 0, end.stderr
    first, forked, again, later = end.stdout.splitlines()
    assert [first, forked, again] == ["2", "[1, 1, 1, 1]", "2"]
    assert later.count("0.1") == 2  # threads that were used before one was asked for are lost too
    assert 1 <= end.stderr.count("One thread is used, because this process was forked") <= 3  # once a process
