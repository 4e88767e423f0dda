"""Force training differentiates twice: gradients of the parameters equal those recorded from torchmd-net 3.1.0."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SHARED, shared

from torchmdnet.checkpoint import load_model

CASES = sorted(path.parent.name for path in (SHARED / "interop").glob("*/case.json"))


@pytest.mark.filterwarnings("ignore:The file is in the tensor layout")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("case", CASES or ["(absent)"])
def test_recorded_gradient_norms_are_reproduced(case: str) -> None:
    folder = shared(f"interop/{case}")
    meta = json.loads((folder / "case.json").read_text())
    arrays = np.load(folder / "data.npz")
    recorded = [name for name in meta["scenarios"] if f"{name}/grad_names" in arrays.files]
    if not recorded:
        pytest.skip("no gradients recorded")
    options = dict(meta["load_kwargs"])
    if meta.get("so3") == "mirror":
        options["handedness"] = "legacy"  # gradients were recorded in that convention
    model = load_model(folder / meta.get("files", "model.ckpt"), precision=64, **options).train()
    for scenario in recorded:
        z, pos, batch, box, q = (
            torch.tensor(arrays[f"{scenario}/{name}"]) if f"{scenario}/{name}" in arrays.files else None
            for name in ("z", "pos", "batch", "box", "q")
        )
        model.zero_grad()
        energy, forces = model(z, pos, batch, box=box, q=q)
        (energy.square().sum() + forces.square().sum()).backward()
        norms = {
            name: 0.0 if parameter.grad is None else float(parameter.grad.norm())
            for name, parameter in model.named_parameters()
        }
        names = [str(name) for name in arrays[f"{scenario}/grad_names"]]
        assert names
        tolerance = 1e-6 if meta.get("loose64") else 1e-8
        for name, expected in zip(names, arrays[f"{scenario}/grad_norms64"], strict=True):
            assert norms[name] == pytest.approx(expected, rel=tolerance, abs=1e-10), (scenario, name)
