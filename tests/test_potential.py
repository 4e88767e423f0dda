"""Representation, head and priors come together in the documented order."""

from __future__ import annotations

import logging

import pytest
import torch

from torchmdnet.build import create_model
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Inputs, sum_to_atoms, sum_to_systems
from torchmdnet.heads.base import OutputModel
from torchmdnet.models.base import Features, Representation
from torchmdnet.models.tensornet import TensorNet
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.atomref import Atomref, LearnableAtomref
from torchmdnet.priors.base import BasePrior
from torchmdnet.priors.named import create_prior_models
from torchmdnet.tape.replay import Recording
from torchmdnet.tape.tape import Tape
from torchmdnet.testing import Systems, cell_of_atoms, mixed_boxes, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

SYSTEMS = small_molecules()
TABLE = torch.linspace(-3, 5, 20, dtype=torch.float64)[:, None]


class References:
    """A data set that knows its atoms."""

    def get_atomref(self, max_z: int = 100) -> torch.Tensor:
        return TABLE


class Squared(BasePrior):
    """Written for older releases: overrides the established hooks."""

    def pre_reduce(self, x, z, pos, batch, extra_args=None):
        return x.square()

    def post_reduce(self, y, z, pos, batch, box=None, extra_args=None):
        return y + extra_args["offset"]


class CountNeighbours(Representation):
    """An architecture from another package."""

    def __init__(self, cutoff_upper: float = 4.0, max_z: int = 20) -> None:
        super().__init__(cutoff_lower=0.0, cutoff_upper=cutoff_upper, max_z=max_z, loop=False)

    def reset_parameters(self) -> None: ...

    def encode(self, graph) -> Features:
        count = torch.bincount(graph.edge_index[0], minlength=graph.num_atoms)
        return Features(count[:, None].to(graph.pos.dtype))


class FirstFeature(OutputModel):
    """A head from another package."""

    def __init__(self, hidden_channels: int) -> None:
        super().__init__()

    def per_atom(self, features, graph):
        return features.x[:, :1]


def energy_of(model, **kwargs) -> torch.Tensor:
    return model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, **kwargs)[0].detach()


def sums_of(table: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, 1, dtype=torch.float64).index_add(0, SYSTEMS.batch, table[SYSTEMS.z])


def test_atomref_adds_exactly_its_table() -> None:
    plain = tiny_model("tensornet")
    model = create_model({**TINY, "model": "tensornet"}, prior_model=Atomref(dataset=References()))
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(energy_of(model), energy_of(plain) + sums_of(TABLE))


def test_a_disabled_atomref_adds_nothing() -> None:
    plain = tiny_model("tensornet")
    model = create_model({**TINY, "model": "tensornet"}, prior_model=[Atomref(dataset=References(), enable=False)])
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    torch.testing.assert_close(energy_of(model), energy_of(plain))


def test_training_atomref_leaves_the_reference_alone() -> None:
    prior = Atomref(dataset=References(), trainable=True)
    with torch.no_grad():
        prior.atomref.weight.add_(1.0)
    torch.testing.assert_close(prior.initial_atomref, TABLE)
    prior.reset_parameters()
    torch.testing.assert_close(prior.atomref.weight.detach(), TABLE)
    assert TABLE[0] == -3


@pytest.mark.parametrize("prior", [Atomref(max_z=12, trainable=True), LearnableAtomref(max_z=9), Atomref(max_z=5)])
def test_priors_are_rebuilt_from_their_arguments(prior) -> None:
    (rebuilt,) = create_prior_models({"prior_model": type(prior).__name__, "prior_args": [prior.get_init_args()]})
    assert type(rebuilt) is type(prior)
    assert rebuilt.get_init_args() == prior.get_init_args()


def test_mean_and_std_act_before_priors_on_sums_and_atoms() -> None:
    plain = tiny_model("tensornet")
    model = create_model(
        {**TINY, "model": "tensornet"},
        prior_model=Atomref(dataset=References()),
        mean=torch.tensor(0.7),
        std=torch.tensor(2.0),
    )
    weights = {k: v for k, v in plain.state_dict().items() if k not in ("mean", "std")}
    model.load_state_dict({**model.state_dict(), **weights})
    torch.testing.assert_close(energy_of(model), 2 * energy_of(plain) + 0.7 + sums_of(TABLE), rtol=1e-6, atol=1e-6)


def test_priors_written_for_older_releases_still_work() -> None:
    plain = tiny_model("tensornet", derivative=False)
    model = create_model({**TINY, "model": "tensornet", "derivative": False}, prior_model=Squared())
    model.load_state_dict(plain.state_dict())
    offset = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    graph = plain.representation_model.graph(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    atomic = plain.output_model.per_atom(plain.representation_model.encode(graph), graph)
    expected = torch.zeros(3, 1, dtype=torch.float64).index_add(0, SYSTEMS.batch, atomic.square()) + offset
    torch.testing.assert_close(energy_of(model, extra_args={"offset": offset}), expected.detach())


def test_parts_of_other_packages_are_used_by_address() -> None:
    model = create_model(
        {
            **TINY,
            "model": f"{__name__}:CountNeighbours",
            "output_model": f"{__name__}:FirstFeature",
            "prior_model": {f"{__name__}:Squared": None},
        }
    )
    neighbours = (torch.cdist(SYSTEMS.pos, SYSTEMS.pos) < 4.0) & (SYSTEMS.batch[:, None] == SYSTEMS.batch[None])
    squares = (neighbours.sum(1) - 1.0).square().double()[:, None]
    expected = torch.zeros(3, 1, dtype=torch.float64).index_add(0, SYSTEMS.batch, squares)
    energy, forces = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, extra_args={"offset": torch.zeros(3, 1)})
    torch.testing.assert_close(energy, expected)
    assert (forces == 0).all()


def test_a_representation_of_older_releases_is_called_with_separate_tensors() -> None:
    class Old(torch.nn.Module):
        def reset_parameters(self) -> None: ...

        def forward(self, z, pos, batch, box=None, q=None, s=None):
            return pos.square().sum(1, keepdim=True), None, z, pos, batch

    energy, forces = TorchMD_Net(Old(), FirstFeature(1), derivative=True, dtype=torch.float64)(
        SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch
    )
    assert energy.shape == (3, 1)
    torch.testing.assert_close(forces, -2 * SYSTEMS.pos)


def test_an_element_outside_the_embedding_is_named() -> None:
    with pytest.raises(ValueError, match=r"z holds 79 \(Au\).*max_z=20"):
        tiny_model("tensornet")(torch.tensor([1, 79]), torch.zeros(2, 3, dtype=torch.float64))


def test_forces_of_a_forceless_potential_are_empty() -> None:
    energy, forces = tiny_model("tensornet", derivative=False)(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    assert energy.shape == (3, 1)
    assert forces.shape == (0,)


def test_training_mode_keeps_forces_differentiable() -> None:
    model = tiny_model("tensornet")
    assert not model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[1].requires_grad
    assert model.train()(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)[1].requires_grad


def test_systems_without_atoms_have_the_mean_energy() -> None:
    model = tiny_model("tensornet")
    energy, _ = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch * 2, num_systems=6)
    assert energy.shape == (6, 1)
    assert energy[1] == energy[3] == energy[5] == 0
    torch.testing.assert_close(energy[::2].detach(), energy_of(model))


def test_an_all_zero_box_is_no_box() -> None:
    model = tiny_model("tensornet")
    for shape in ((3, 3), (3, 3, 3)):
        torch.testing.assert_close(energy_of(model, box=torch.zeros(shape, dtype=torch.float64)), energy_of(model))


def test_priors_a_head_does_not_allow_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    head = FirstFeature(1)
    head.allow_prior_model = False
    with caplog.at_level(logging.WARNING):
        model = TorchMD_Net(CountNeighbours(), head, prior_model=[Atomref(max_z=5)])
    assert model.prior_model is None
    assert "does not allow prior models; dropping Atomref" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tensor-net"}, "model: 'tensor-net' is not available. Did you mean 'tensornet'"),
        ({"output_model": "Scaler"}, "output_model: 'Scaler' is not available. Did you mean 'Scalar'"),
        ({"prior_model": "AtomRef"}, "prior_model: 'AtomRef' is not available. Did you mean 'Atomref'"),
        ({"prior_model": {"Atomref": {"maxz": 3}}}, "Atomref has no argument 'maxz'. Did you mean 'max_z'"),
        ({"precision": 48}, "precision: 48 is not available. Choose from 32, 64"),
        ({"rbf_type": "bessel"}, "rbf_type: 'bessel'"),
        ({"activation": "relu"}, "activation: 'relu'"),
        ({"equivariance_invariance_group": "E(3)"}, "equivariance_invariance_group: 'E"),
        ({"reduce_op": "median"}, "reduce_op: 'median'"),
        ({"box_vecs": [1, 2, 3]}, r"box_vecs: shape \(3,\)"),
        ({"prior_model": ["Atomref"], "prior_args": [{}, {}]}, "prior_args: 2 given for 1 priors"),
        ({"atom_filter": 3}, "atom_filter: cannot be combined with derivative"),
    ],
)
def test_bad_options_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model({**TINY, "model": "tensornet", **changes})


def test_options_are_not_modified() -> None:
    args = {**TINY, "model": "tensornet"}
    before = dict(args)
    create_model(args)
    assert args == before


class Stiffer(BasePrior):
    """Reads the edges of the network, and changes what its head says."""

    needs_positions = False

    def pre_reduce(self, x, z, pos, batch, extra_args=None):
        return x * (1 + x)

    def per_system(self, graph):
        return sum_to_systems(sum_to_atoms(graph.edge_dist.square().sin() + graph.edge_vec.prod(dim=1), graph), graph)[
            :, None
        ]


def both_ways(model: TorchMD_Net, systems: Systems, monkeypatch: pytest.MonkeyPatch, **asked) -> list[list]:
    """All that a potential finds by derivatives that are written out, which has to be possible, and by autograd."""
    inputs = Inputs(systems.z, systems.pos, systems.batch, systems.box, systems.q, num_systems=systems.num_systems)
    backward, repeat, calls = Tape.backward, Recording.backward, []
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "backward", lambda *args: calls.append(1) or backward(*args))
        patch.setattr(Recording, "backward", lambda *args: calls.append(1) or repeat(*args))
        ours = model.evaluate(inputs, **asked)
        assert calls
    with monkeypatch.context() as patch:
        patch.setattr(TensorNet, "direct", lambda *args: None)
        theirs = model.evaluate(inputs, **asked)
    return [
        [found.energy, found.forces, found.virial, *found.properties.values(), found.atomic] for found in (ours, theirs)
    ]


@pytest.mark.parametrize("systems", [small_molecules(charges=True), cell_of_atoms(), mixed_boxes()])
@pytest.mark.parametrize("prior", [None, Atomref(dataset=References(), trainable=True), Stiffer()])
@pytest.mark.parametrize("options", [{}, {"equivariance_invariance_group": "SO(3)", "output_mlp_num_layers": 2}])
def test_derivatives_written_out_are_those_of_autograd(options, prior, systems, monkeypatch) -> None:
    properties = {"dipole": None}
    model = create_model(
        {**TINY, "model": "tensornet", "properties": properties, **options}, prior, std=torch.tensor(1.7)
    ).eval()
    for virial in (False, True):
        asked = {"virial": virial, "properties": virial, "by_atom": virial and not isinstance(prior, Stiffer)}
        for ours, theirs in zip(*both_ways(model, systems, monkeypatch, **asked), strict=True):
            torch.testing.assert_close(ours, None if theirs is None else theirs.detach(), rtol=1e-10, atol=1e-11)


def test_what_is_written_out_follows_every_weight(monkeypatch) -> None:
    model = tiny_model("tensornet")
    representation, head = model.representation_model, model.output_model.output_network.layers[0]

    def in_place(weight: torch.nn.Parameter) -> None:
        with torch.no_grad():
            weight.mul_(1.5)

    def other_data(weight: torch.nn.Parameter) -> None:
        weight.data = 1.5 * weight.data

    def assigned(weight: torch.nn.Parameter) -> None:
        state = {name: x.clone() for name, x in model.state_dict().items()}
        (name,) = [name for name, x in model.named_parameters() if x is weight]
        model.load_state_dict({**state, name: 1.5 * state[name]}, assign=True)

    for change in (in_place, other_data, assigned):
        for of in (head, representation.linear, representation.out_norm, representation.layers[0].linears_tensor[1]):
            before, _ = both_ways(model, SYSTEMS, monkeypatch)
            change(of.weight)
            after, expected = both_ways(model, SYSTEMS, monkeypatch)
            assert not torch.allclose(before[1], after[1])
            torch.testing.assert_close(after[1], expected[1], rtol=1e-10, atol=1e-11)


def test_hooks_are_called_whether_derivatives_are_written_out_or_not() -> None:
    model = tiny_model("tensornet")
    expected = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    seen = []
    for part in (model.representation_model.out_norm, model.output_model.output_network):
        part.register_forward_hook(lambda module, args, output: seen.append(module))
    found = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    assert seen == [model.representation_model.out_norm, model.output_model.output_network]
    # layers with hooks run in PyTorch, the others in loops, which add up in another order
    torch.testing.assert_close(found.energy.detach(), expected.energy.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found.forces, expected.forces)


def test_positions_made_in_inference_mode_are_welcome() -> None:
    model = tiny_model("tensornet")
    expected = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)
    with torch.inference_mode():
        found = model(SYSTEMS.z, SYSTEMS.pos.clone(), SYSTEMS.batch)
    assert not found.forces.is_inference()
    torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=0)
