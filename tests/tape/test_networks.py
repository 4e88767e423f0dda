"""The four passes of a network on every edge are those of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_steps import CUTOFF, atoms, graph_of, radial_of

from torchmdnet.models import tensornet2
from torchmdnet.models.tensornet2 import EdgeNetworkMessage, Interaction
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import edge_network, kernels
from torchmdnet.testing import check_step

#: The definition does not read what distances bring from a grid, so the grid is fine.
GRIDS = {"grid": Spline(0.0, CUTOFF, 1536), "pairs": None}


def check_network(
    spline: Spline | None, channels: int, q_dim: int = 3, activation: str = "silu", constant: tuple[int, ...] = ()
) -> None:
    torch.manual_seed(0)
    sizes: Any = {"num_rbf": 6, "hidden_channels": channels, "q_dim": q_dim}
    layer = Interaction(**sizes, activation=activation, group="O(3)", dtype=torch.float64)
    for weight in layer.linears_scalar.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    graph = graph_of(True)
    radial, of_basis = radial_of(graph, spline)
    with torch.no_grad():
        parts = layer.charge_parts(atoms(graph, q_dim, seed=1))
    step = EdgeNetworkMessage(layer, RadialFunction(layer, "radial_part"))
    weights = [*layer.linears_scalar.parameters(), *of_basis]
    inputs = [atoms(graph, 9, channels), parts]
    check_step(step, inputs, graph, radial, weights, constant=constant, handedness=-1.0)


@pytest.mark.parametrize("spline", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("channels", "q_dim"), [(4, 3), (7, 3), (16, 0), (20, 3)])
def test_networks_on_edges(spline: Spline | None, channels: int, q_dim: int) -> None:
    check_network(spline, channels, q_dim)


@pytest.mark.parametrize("constant", [(0,), (1,), (0, 1)])
def test_what_does_not_depend_on_the_geometry_does_not_change(constant: tuple[int, ...]) -> None:
    check_network(None, 8, constant=constant)


@pytest.mark.parametrize("activation", ["tanh", "ssp", "sigmoid"])
def test_any_activation(activation: str) -> None:
    check_network(None, 8, activation=activation)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_blocks_whose_activations_are_kept_or_made_again(kept: int, activation: str, monkeypatch) -> None:
    monkeypatch.setattr(tensornet2, "KEPT", kept)
    monkeypatch.setattr(edge_network, "BLOCK", 40)
    monkeypatch.setattr(edge_network, "SHARED", 40)
    check_network(None, 10, activation=activation)


def test_threads_share_networks(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check_network(GRIDS["grid"], 20)
