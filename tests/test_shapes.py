"""The shapes in the annotations are the shapes of the tensors, on every architecture."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECKED = """
from jaxtyping import install_import_hook

parts = ["graph", "ops.irreps", "ops.messages", "nn", "models", "heads", "priors", "potential"]
parts += [f"neighbors.{name}" for name in ("brute", "cells", "distance", "lattice", "search", "vectors")]
with install_import_hook([f"torchmdnet.{part}" for part in parts], "beartype.beartype"):
    from torchmdnet.models import ARCHITECTURES
    from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

    for name in ARCHITECTURES:
        for systems in (small_molecules(charges=True), cell_of_atoms()):
            model = tiny_model(name).train()
            energy, forces = model(systems.z, systems.pos, systems.batch, box=systems.box, q=systems.q)
            (energy.sum() + forces.square().sum()).backward()
            model.eval()(systems.z, systems.pos, systems.batch, box=systems.box, q=systems.q)
        print(name)
"""


def test_annotated_shapes_hold() -> None:
    pytest.importorskip("jaxtyping")
    pytest.importorskip("beartype")
    from torchmdnet.models import ARCHITECTURES

    environment = {**os.environ, "TORCHMDNET_CHECK_SHAPES": "1"}
    run = subprocess.run([sys.executable, "-c", CHECKED], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == list(ARCHITECTURES)
