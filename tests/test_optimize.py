"""A graph network runs in NNPOps unchanged; a stand-in with its documented formula takes its place here."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from torchmdnet.optimize import TorchMD_GN_optimized, optimize
from torchmdnet.testing import small_molecules, tiny_model

SUPPORTED = {"rbf_type": "gauss", "trainable_rbf": False, "activation": "ssp", "neighbor_embedding": False}


class Neighbors(nn.Module):
    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def build(self, positions: Tensor) -> None:
        distance = torch.cdist(positions.detach(), positions.detach())
        self.i, self.j = ((distance < self.cutoff) & ~torch.eye(len(positions), dtype=torch.bool)).nonzero().T


class Convolution(nn.Module):
    """Continuous-filter convolution with weights stored (in, out) and Gaussians one width apart, from zero."""

    def __init__(self, gaussianWidth, activation, weights1, biases1, weights2, biases2) -> None:
        super().__init__()
        assert activation == "ssp"
        self.width, self.layers = gaussianWidth, (weights1, biases1, weights2, biases2)

    def forward(self, neighbors: Neighbors, positions: Tensor, input: Tensor) -> Tensor:
        i, j = neighbors.i, neighbors.j
        w1, b1, w2, b2 = self.layers
        r = (positions[i] - positions[j]).norm(dim=1)
        centres = self.width * torch.arange(len(w1), dtype=r.dtype)
        basis = torch.exp(-0.5 * ((r[:, None] - centres) / self.width) ** 2)
        hidden = nn.functional.softplus(basis @ w1 + b1) - torch.log(torch.tensor(2.0))
        filters = (hidden @ w2 + b2) * 0.5 * (torch.cos(torch.pi * r / neighbors.cutoff) + 1)[:, None]
        return torch.zeros_like(input).index_add(0, i, filters * input[j])


@pytest.fixture
def nnpops(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, parts in {
        "NNPOps": {},
        "NNPOps.CFConv": {"CFConv": Convolution},
        "NNPOps.CFConvNeighbors": {"CFConvNeighbors": Neighbors},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("nnpops")
def test_energy_and_forces_stay_the_same() -> None:
    systems = small_molecules().system(1)
    expected = tiny_model("graph-network", **SUPPORTED)(systems.z, systems.pos)
    model = tiny_model("graph-network", **SUPPORTED)
    assert optimize(model) is model
    assert isinstance(model.representation_model, TorchMD_GN_optimized)
    assert repr(model.representation_model).startswith("Optimized: ")
    for result, reference in zip(model(systems.z, systems.pos), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("nnpops")
def test_batches_and_boxes_are_refused() -> None:
    model, systems = optimize(tiny_model("graph-network", **SUPPORTED)), small_molecules()
    with pytest.raises(ValueError, match="one system at a time"):
        model(systems.z, systems.pos, systems.batch)
    with pytest.raises(ValueError, match="takes no box"):
        model(systems.z, systems.pos, box=torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rbf_type": "expnorm"}, "rbf_type: gauss"),
        ({"trainable_rbf": True}, "trainable_rbf: false"),
        ({"activation": "silu"}, "activation: ssp"),
        ({"neighbor_embedding": True}, "neighbor_embedding: false"),
        ({"cutoff_lower": 0.5}, "cutoff_lower: 0"),
        ({"aggr": "mean"}, "aggr: add"),
    ],
)
@pytest.mark.usefixtures("nnpops")
def test_options_nnpops_does_not_know_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"differs in .*{message}"):
        optimize(tiny_model("graph-network", **{**SUPPORTED, **change}))


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="supports model: graph-network, not TensorNet"):
        optimize(tiny_model("tensornet"))
    with pytest.raises(TypeError, match="takes a TorchMD_Net"):
        optimize(nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


def test_without_nnpops_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "NNPOps", None)
    with pytest.raises(ImportError, match="conda install"):
        optimize(tiny_model("graph-network", **SUPPORTED))
