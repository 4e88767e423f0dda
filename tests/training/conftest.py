"""A finished toy run that many tests look at."""

from __future__ import annotations

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from toy_runs import train_toy


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Four epochs with forces, tested every second epoch; what it wrote and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train_toy(folder, test_interval=2, report=True)
    return SimpleNamespace(folder=folder, said=said.getvalue())


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in one order, so that runs can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
