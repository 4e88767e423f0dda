"""Processes end with the one that started them; those that prepare batches too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

#: A parent whose child watches it, and is busy for a minute.
PLAIN = """
import subprocess, sys, time
code = "from torchmdnet.processes import end_with_parent; end_with_parent(); "
code += "import sys, time; open(sys.argv[1], 'w'); time.sleep(60)"
subprocess.run([sys.executable, "-c", code, sys.argv[1]])
"""
#: A parent with two workers, each busy for a minute with a sample.
LOADER = """
import sys, time
import numpy as np
from torchmdnet.data.loader import EpochBatchSampler, Loader

class Stuck:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        open(sys.argv[1], "w")
        time.sleep(60)

next(iter(Loader(Stuck(), EpochBatchSampler(4, 2), num_workers=2)))
"""


@pytest.mark.parametrize("source", [PLAIN, LOADER], ids=["any process", "workers of a loader"])
def test_children_end_with_a_parent_that_is_killed(source: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    parent = psutil.Popen(
        [sys.executable, "-c", source, str(tmp_path / "begun")], env=os.environ | {"PYTHONPATH": path}
    )
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists():
        assert parent.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    family = parent.children(recursive=True)
    assert family
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_the_end_of_a_thread_is_not_the_end_of_the_parent() -> None:
    """A loader that was made in a thread goes on to work when the thread has ended."""
    code = """
import threading, time
import torch
from torchmdnet.data.loader import EpochBatchSampler, Loader

class Numbers:
    def __len__(self):
        return 6
    def __getitem__(self, index):
        return torch.tensor([index])
    def batch(self, indices):
        return torch.tensor(indices)

loader, found = Loader(Numbers(), EpochBatchSampler(6, 2), num_workers=1), []
first = threading.Thread(target=lambda: found.append(list(loader)))
first.start(); first.join(); time.sleep(1.5)
found.append(list(loader))
print([batch.tolist() for batch in found[1]])
"""
    end = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert end.stdout.strip() == "[[0, 1], [2, 3], [4, 5]]"
