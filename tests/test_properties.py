"""The table ``properties``: how it is read, and several heads on one representation."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.build import create_model
from torchmdnet.errors import ConfigError
from torchmdnet.heads.atom_scalar import AtomScalar
from torchmdnet.heads.base import OutputModel
from torchmdnet.heads.charges import PartialCharges
from torchmdnet.heads.dipole import Dipole
from torchmdnet.potential import Outputs, Prediction
from torchmdnet.properties import PropertySpec, property_specs
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

SYSTEMS = small_molecules()


class Counting(OutputModel):
    """A head from another package: how many atoms there are."""

    def __init__(self, hidden_channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def per_atom(self, features, graph):
        return self.scale * torch.ones_like(features.x[:, :1])


def test_names_have_usual_heads() -> None:
    specs = property_specs({"properties": {"dipole": None, "charges": {}, "polarizability": None}})
    assert [spec.head for spec in specs.values()] == ["Dipole", "PartialCharges", "Polarizability"]
    assert specs["dipole"] == PropertySpec("dipole", "Dipole", 1.0, None, "dipole", {})


def test_everything_can_be_said() -> None:
    entry = {"head": "AtomScalar", "weight": 3, "loss": "huber_loss", "label": "hirshfeld", "num_layers": 2}
    (spec,) = property_specs({"properties": {"volume": entry}}).values()
    assert spec == PropertySpec("volume", "AtomScalar", 3.0, "huber_loss", "hirshfeld", {"num_layers": 2})
    assert entry["head"] == "AtomScalar", "the table was changed"


@pytest.mark.parametrize("table", [None, {}])
def test_no_table_is_no_properties(table) -> None:
    assert property_specs({"properties": table}) == property_specs({}) == {}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (["dipole"], r"properties: \['dipole'\] is not a table"),
        ({"mu": None}, "properties: mu needs a head. Choose from Scalar"),
        ({"mu": "Dipol"}, "properties: mu: 'Dipol' is not available. Did you mean 'Dipole'"),
        ({"mu": 3}, "properties: mu: 3 is neither a head nor a table"),
        ({"dipole": {"wieght": 2}}, "properties: dipole: 'wieght' is unknown. Did you mean 'weight'"),
        ({"dipole": {"hidden_channels": 2}}, "'hidden_channels' is unknown"),
        ({"dipole": {"weight": -1}}, "weight: -1 is not a number of 0 or more"),
        ({"dipole": {"weight": True}}, "weight: True is not"),
        ({"dipole": {"loss": 2}}, "loss: 2 is not a name"),
        ({"dipole": {"label": ""}}, "label: '' is not a name"),
        ({"energy": "Scalar"}, "properties: energy already has another meaning"),
        ({"stress": "Polarizability"}, "properties: stress already has another meaning"),
        ({"my dipole": "Dipole"}, "properties: my dipole cannot be a name"),
        ({"keys": "AtomScalar"}, "properties: keys cannot be a name"),
        ({"mu": "torch.nn:Linear"}, "is no subclass of torchmdnet.heads.base.OutputModel"),
        ({"e": "ScalarPlusWeightedCoulomb"}, "properties: e: 'ScalarPlusWeightedCoulomb' can only be the output_model"),
    ],
)
def test_what_cannot_be_is_named(table, message) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model({**TINY, "model": "tensornet2", "properties": table})


def test_values_of_atoms_and_a_filter_of_atoms_contradict_each_other() -> None:
    options = {**TINY, "model": "tensornet", "derivative": False, "atom_filter": 1}
    with pytest.raises(ConfigError, match="properties: charges is a value of each atom, but atom_filter hides"):
        create_model({**options, "properties": {"charges": None}})
    model = create_model({**options, "properties": {"dipole": None}})
    heavy = SYSTEMS.z > 1
    found = model(SYSTEMS.z[heavy], SYSTEMS.pos[heavy], SYSTEMS.batch[heavy], properties=True)
    assert found.properties["dipole"].shape == (3, 3)


def test_heads_are_built_by_name_and_see_their_keywords() -> None:
    model = tiny_model(
        "tensornet",
        properties={"dipole": None, "charges": None, "chi": {"head": "AtomScalar", "num_layers": 2}},
    )
    heads = model.property_heads
    assert [type(head) for head in heads.values()] == [Dipole, PartialCharges, AtomScalar]
    assert len(heads["chi"].output_network.layers) == len(heads["charges"].output_network.layers) + 4


def test_a_head_of_another_package_can_be_a_property() -> None:
    model = tiny_model("graph-network", properties={"size": {"head": f"{__name__}:Counting", "scale": 2.0}})
    found = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, properties=True)
    assert found.properties["size"].flatten().tolist() == [6.0, 12.0, 2.0]


def test_without_properties_nothing_is_added_to_the_weights() -> None:
    args = {**TINY, "model": "tensornet"}
    torch.manual_seed(1)
    plain = create_model(args).state_dict()
    torch.manual_seed(1)
    same = create_model({**args, "properties": {}}).state_dict()
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[key], same[key]) for key in plain)
    assert not any("property" in key for key in plain)
    several = create_model({**args, "properties": {"dipole": None}}).state_dict()
    assert {key.split(".")[1] for key in several.keys() - plain.keys()} == {"dipole"}


def test_a_call_returns_two_results_unless_asked_for_more() -> None:
    model = tiny_model("tensornet", properties={"dipole": None})
    assert type(model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch)) is Prediction
    found = model(SYSTEMS.z, SYSTEMS.pos, SYSTEMS.batch, properties=True)
    assert type(found) is Outputs
    assert found.stress is None
    assert list(found.properties) == ["dipole"]
    cell = cell_of_atoms()
    only_stress = model(cell.z, cell.pos, cell.batch, cell.box, stress=True)
    assert only_stress.stress.shape == (1, 3, 3)
    assert only_stress.properties == {}


def test_the_energy_is_the_same_whatever_else_is_asked() -> None:
    model, cell = tiny_model("tensornet", properties={"dipole": None}), cell_of_atoms()
    energy, forces = model(cell.z, cell.pos, cell.batch, cell.box)
    more = model(cell.z, cell.pos, cell.batch, cell.box, stress=True, properties=True)
    torch.testing.assert_close(more.energy, energy, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(more.forces, forces, rtol=1e-12, atol=1e-12)


def test_properties_and_stress_need_no_forces() -> None:
    model, cell = tiny_model("tensornet", properties={"dipole": None}), cell_of_atoms()
    full = model(cell.z, cell.pos, cell.batch, cell.box, stress=True, properties=True)
    model.derivative = False
    found = model(cell.z, cell.pos, cell.batch, cell.box, stress=True, properties=True)
    assert found.forces.shape == (0,)
    torch.testing.assert_close(found.stress, full.stress)
    torch.testing.assert_close(found.properties["dipole"], full.properties["dipole"])


def test_properties_can_be_differentiated_in_positions() -> None:
    model = tiny_model("graph-network", properties={"dipole": None}, derivative=False).requires_grad_(False)

    def dipole(pos):
        return model(SYSTEMS.z, pos, SYSTEMS.batch, properties=True).properties["dipole"]

    found = torch.func.jacrev(dipole)(SYSTEMS.pos)
    step = torch.zeros_like(SYSTEMS.pos)
    step[1, 2] = 1e-5
    numeric = (dipole(SYSTEMS.pos + step) - dipole(SYSTEMS.pos - step)) / 2e-5
    torch.testing.assert_close(found[:, :, 1, 2], numeric, rtol=1e-6, atol=1e-8)
