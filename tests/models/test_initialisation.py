"""A seed gives the weights it gave in torchmd-net 3.1.0, and leaves the random stream where it left it there."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED, shared

from torchmdnet.build import create_model

FILE = SHARED / "interop" / "init_fingerprints.json"
RECORDS = {record["name"]: record for record in json.loads(FILE.read_text())} if FILE.exists() else {}


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", RECORDS or ["(absent)"])
def test_seeded_weights_equal_the_recorded_ones(name: str) -> None:
    shared("interop/init_fingerprints.json")
    record = RECORDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record["seed"])
        model = create_model(record["args"])
        assert float(torch.rand(1)) == pytest.approx(record["next_rand"], abs=1e-7)
    assert [name for name, _ in model.named_parameters()] == record["parameter_names"]
    assert sum(parameter.numel() for parameter in model.parameters()) == record["num_parameters"]
    state = model.state_dict()
    assert state.keys() == record["state"].keys()
    for key, expected in record["state"].items():
        value = state[key]
        assert (list(value.shape), str(value.dtype).removeprefix("torch.")) == (expected["shape"], expected["dtype"])
        assert float(value.double().sum()) == pytest.approx(expected["sum"], rel=1e-5, abs=1e-5), key
        assert float(value.double().square().sum()) == pytest.approx(expected["sumsq"], rel=1e-5, abs=1e-6), key
        assert value.double().flatten()[:3].tolist() == pytest.approx(expected["first"], rel=1e-6, abs=1e-7), key
