"""The graph network gathers neighbours as its equation says, and stores its filters under both of their names."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.errors import ConfigError
from torchmdnet.graph import build_graph
from torchmdnet.models.torchmd_gn import TorchMD_GN
from torchmdnet.testing import small_molecules

OPTIONS: dict = {
    "hidden_channels": 8,
    "num_filters": 6,
    "num_layers": 1,
    "num_rbf": 5,
    "cutoff_upper": 3.0,
    "max_z": 10,
    "neighbor_embedding": False,
    "dtype": torch.float64,
}


def network(**options) -> TorchMD_GN:
    torch.manual_seed(0)
    model = TorchMD_GN(**{**OPTIONS, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("aggr", ["add", "mean", "max", "average", "maximum"])
def test_one_layer_is_the_equation(aggr: str) -> None:
    model = network(aggr=aggr)
    systems = small_molecules()
    block = model.interactions[0]
    x = model.embedding.weight[systems.z]
    gathered = torch.zeros(len(x), 6, dtype=torch.float64)
    for i in range(len(x)):
        messages = []
        for j in range(len(x)):
            r = (systems.pos[i] - systems.pos[j]).norm()
            if i != j and systems.batch[i] == systems.batch[j] and r < 3.0:
                envelope = 0.5 * (torch.cos(torch.pi * r / 3.0) + 1)
                messages.append(envelope * block.mlp(model.distance_expansion(r)) * block.conv.lin1(x[j]))
        if not messages:
            continue
        stack = torch.stack(messages)
        gathered[i] = {
            "add": stack.sum(0),
            "mean": stack.sum(0) / (len(stack) + 1),
            "max": stack.amax(0).clamp(min=0),
            "average": stack.mean(0),
            "maximum": stack.amax(0),
        }[aggr]
    expected = x + block.lin(torch.nn.functional.silu(block.conv.lin2(gathered)))
    result, v, *_ = model(systems.z, systems.pos, systems.batch)
    assert v is None
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_files_hold_the_filter_network_twice_and_training_once() -> None:
    model = network()
    state = model.state_dict()
    torch.testing.assert_close(state["interactions.0.conv.net.0.weight"], state["interactions.0.mlp.0.weight"])
    assert "interactions.0.mlp.0.weight" in dict(model.named_parameters())
    assert "interactions.0.conv.net.0.weight" not in dict(model.named_parameters())


def test_atoms_send_no_message_to_themselves() -> None:
    graph = network().graph(torch.tensor([6, 8]), torch.tensor([[0.0, 0, 0], [1.0, 0, 0]], dtype=torch.float64))
    assert (graph.edge_index[0] != graph.edge_index[1]).all()


def test_the_filter_depends_on_distance_alone() -> None:
    model = network(num_layers=2)
    graph = build_graph(*small_molecules(), cutoff_upper=3.0)
    rbf = model.distance_expansion(graph.edge_dist)
    weight = model.interactions[1].conv.radial(rbf)
    order = torch.randperm(len(rbf))
    torch.testing.assert_close(model.interactions[1].conv.radial(rbf[order]), weight[order])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggr": "sum"}, "aggr: 'sum'"),
        ({"rbf_type": "gaus"}, "Did you mean 'gauss'"),
        ({"activation": "relu"}, "activation: 'relu'"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchMD_GN(**{**OPTIONS, **options})
