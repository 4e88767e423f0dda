"""Which parameters have weight decay."""

import torch
from torch import nn
from toy_runs import train_toy

from torchmdnet.build import create_model
from torchmdnet.checkpoint import read_checkpoint
from torchmdnet.training.parameter_groups import parameter_groups


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm((5, 2))
        self.widths = nn.Parameter(torch.ones(6))


def test_matrices_are_the_weights_that_multiply_features():
    model = Small()
    decayed, spared = parameter_groups(model, 0.1, "matrices")
    assert [list(group) for group in (decayed, spared)] == [["params", "weight_decay"]] * 2
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert [names[id(weight)] for weight in decayed["params"]] == ["linear.weight"]
    assert [names[id(weight)] for weight in spared["params"]] == [
        "widths",
        "table.weight",
        "linear.bias",
        "norm.weight",
        "norm.bias",
    ]


def test_all_parameters_are_one_group_in_their_order():
    model = Small()
    (group,) = parameter_groups(model, 0.1)
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in model.parameters()]


def test_the_reference_energies_and_elements_of_a_model_are_spared():
    options = {
        "model": "tensornet",
        "embedding_dimension": 8,
        "num_layers": 1,
        "num_rbf": 4,
        "max_z": 10,
        "output_model": "Scalar",
        "reduce_op": "add",
        "precision": 32,
        "derivative": True,
    }
    model = create_model({**options, "prior_model": [{"LearnableAtomref": {"max_z": 10}}]})
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, spared = ([names[id(w)] for w in group["params"]] for group in parameter_groups(model, 0.1, "matrices"))
    assert all(name.endswith("weight") and "norm" not in name and "emb." not in name for name in decayed)
    assert {"prior_model.0.atomref.weight"} <= set(spared)
    assert sorted(decayed + spared) == sorted(names.values())


def test_a_run_decays_matrices_alone(tmp_path):
    """With a learning rate of almost nothing, weights change by the decay alone."""
    options = {"num_epochs": 1, "lr": 1e-7, "weight_decay": 1000.0}
    start = read_checkpoint(train_toy(tmp_path / "start", **{**options, "lr": 0.0}) / "last.ckpt")["state_dict"]
    folder = train_toy(tmp_path / "run", **options, weight_decay_on="matrices")
    state = read_checkpoint(folder / "last.ckpt")["state_dict"]
    steps = read_checkpoint(folder / "last.ckpt")["global_step"]
    matrix, bias = "model.output_model.output_network.layers.0.weight", "model.representation_model.out_norm.weight"
    torch.testing.assert_close(state[matrix], start[matrix] * (1 - 1e-4) ** steps, rtol=0, atol=2e-6)
    assert (state[matrix] - start[matrix]).abs().max() > 1e-5
    torch.testing.assert_close(state[bias], start[bias], rtol=0, atol=2e-6)
