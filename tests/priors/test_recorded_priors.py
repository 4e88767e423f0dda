"""ZBL, D2 and Coulomb give the energies and forces recorded from torchmd-net 3.1.0."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import shared

from torchmdnet.priors import PRIORS

#: Relative to the largest number.
TOLERANCE = {"ZBL": 1e-6, "D2": 1e-7, "Coulomb": 1e-7}
CASES = [("ZBL", name) for name in ("vac", "conn", "pbc", "pbcbatch")] + [("D2", "conn"), ("Coulomb", "conn")]


@pytest.mark.parametrize("precision", [64, 32])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_recorded_numbers_are_reproduced(name: str, case: str, precision: int) -> None:
    arrays = np.load(shared("interop/priors.npz"))
    dtype = {64: torch.float64, 32: torch.float32}[precision]
    prior = PRIORS[name](**json.loads(str(arrays["meta_json"]))[name]).to(dtype)

    def given(key: str) -> torch.Tensor | None:
        if f"{case}/{key}" not in arrays.files:
            return None
        value = torch.tensor(arrays[f"{case}/{key}"])
        return value.to(dtype) if value.is_floating_point() else value

    z, pos, batch, box, charges = (given(key) for key in ("z", "pos", "batch", "box", "partial_charges"))
    assert z is not None
    assert pos is not None
    assert batch is not None
    assert charges is not None
    pos.requires_grad_()
    y = prior.post_reduce(
        torch.zeros(int(batch.max()) + 1, 1, dtype=dtype), z, pos, batch, box, {"partial_charges": charges}
    )
    (gradient,) = torch.autograd.grad(y.sum(), pos)
    for result, key in ((y.detach(), "y"), (-gradient, "f")):
        expected = arrays[f"{name}/{case}/{key}{precision}"]
        tolerance = TOLERANCE[name] if precision == 64 else 2e-6
        assert np.abs(result.numpy() - expected).max() <= tolerance * np.abs(expected).max(), key
