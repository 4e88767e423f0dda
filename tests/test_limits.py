"""Sizes that no model has are refused before anything is allocated."""

import math

import pytest
import torch

from torchmdnet import build, limits
from torchmdnet.build import check_size, create_model
from torchmdnet.config import resolve
from torchmdnet.errors import ConfigError
from torchmdnet.limits import LARGEST, check_limits
from torchmdnet.options import OPTIONS

TINY = {"model": "tensornet", "output_model": "Scalar", "embedding_dimension": 8, "num_layers": 1, "num_rbf": 4,
        "max_z": 10, "cutoff_lower": 0.0, "cutoff_upper": 5.0}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_dimension", "1e9"), ("num_layers", "1e9"), ("num_rbf", "1e9"), ("num_heads", "1e9"),
        ("batch_size", "1e9"), ("num_workers", "1e9"), ("ngpus", "1e9"), ("inference_batch_size", "1e9"),
        ("q_dim", "1e9"), ("output_mlp_num_layers", "1e9"), ("cutoff_upper", "1e308"), ("cutoff_upper", "1e-300"),
        ("cutoff_upper", "1e5"), ("cutoff_upper", "0"), ("cutoff_upper", "nan"), ("cutoff_upper", "inf"),
        ("cutoff_lower", "1e308"), ("cutoff_lower", "-1"), ("cutoff_lower", "nan"), ("lr", "1e300"), ("lr", "-1"),
        ("lr", "nan"), ("lr", "inf"),
        ("coulomb_cutoff", "1e-300"), ("coulomb_cutoff", "1e308"), ("coulomb_epsilon_solvent", "1e308"),
        ("max_z", "1e12"), ("num_epochs", "1e30"), ("weight_decay", "1e300"), ("y_weight", "1e300"),
    ],
)  # fmt: skip
def test_settings_have_bounds(key, value):
    flag = OPTIONS[key].flag
    with pytest.raises(ConfigError, match=f"{flag}: {key}='{value}' is not valid.*It takes a (whole )?number"):
        resolve(["--dataset", "TinyQM", flag, value])


def test_the_bound_of_a_number_without_one_is_told():
    with pytest.raises(ConfigError, match=r"num_epochs='1e30' is not valid \(the largest value is 1,000,000,000\)"):
        resolve(["--dataset", "TinyQM", "--num-epochs", "1e30"])


@pytest.mark.parametrize("key", sorted(key for key in LARGEST if key in OPTIONS))
@pytest.mark.parametrize("value", [10**12, 10**350, -1])
def test_a_configuration_is_bounded_like_the_command_line(key, value):
    if value < 0 and "neighbors" in key:
        return
    with pytest.raises(ConfigError, match=rf"{key}: {str(value)[:10]}\d* is (too large|not valid)"):
        check_limits({key: value})
    with pytest.raises(ConfigError, match=key):
        create_model({**TINY, key: value})


@pytest.mark.parametrize("cutoffs", [(5.0, 5.0), (4.999, 5.0), (0.0, 1e-300), (0.0, math.nan)])
def test_cutoffs_without_room_between_them_are_refused(cutoffs):
    with pytest.raises(ConfigError, match="is not below cutoff_upper"):
        check_limits(dict(zip(("cutoff_lower", "cutoff_upper"), cutoffs, strict=True)))


def test_a_coulomb_cutoff_without_room_is_refused():
    with pytest.raises(ConfigError, match=r"coulomb_cutoff: 1e-300 is not valid. It takes a number of 0\.01 or more"):
        check_limits({"coulomb_cutoff": 1e-300})


def test_a_model_beyond_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(build, "available_memory", lambda: 10**9)
    large = {**TINY, "embedding_dimension": 4000, "num_layers": 2}
    with pytest.raises(ConfigError, match=r"embedding_dimension=4000, num_layers=2.*parameters.*1 GB are available"):
        create_model(large)
    with pytest.raises(ConfigError, match=r"to train .weights, gradients and the moments of AdamW."):
        resolve(["--dataset", "TinyQM", "--embedding-dimension", "4000"])


@pytest.mark.parametrize(
    "model", ["graph-network", "transformer", "equivariant-transformer", "tensornet", "tensornet2"]
)
def test_weights_are_counted_without_being_made(model, monkeypatch):
    options = {**vars(resolve(["--dataset", "TinyQM", "--model", model, "--num-layers", "1", "--max-z", "10"]))}
    expected = sum(weights.numel() for weights in create_model(options).parameters())
    monkeypatch.setattr(limits, "FEW_WEIGHTS", 0)
    monkeypatch.setattr(build, "available_memory", lambda: 0)
    with pytest.raises(ConfigError, match=f"the model has {expected:,} parameters"):
        check_size(options)
    assert torch.get_default_device().type == "cpu"
