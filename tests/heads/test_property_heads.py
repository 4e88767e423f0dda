"""Dipoles, charges and polarisabilities against their formulas, and what they must be whatever the weights."""

from __future__ import annotations

import logging

import pytest
import torch

from torchmdnet.elements import atomic_masses
from torchmdnet.errors import ConfigError
from torchmdnet.graph import bare_graph
from torchmdnet.heads.polarizability import Polarizability
from torchmdnet.models.base import Features
from torchmdnet.ops.irreps import to_matrix
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model

ARCHITECTURES = ("graph-network", "transformer", "equivariant-transformer", "tensornet", "tensornet2")
WITH_VECTORS = ARCHITECTURES[2:]
NEUTRAL, CHARGED = small_molecules(), small_molecules(charges=True)


def predict(model, systems=NEUTRAL, **changes):
    systems = systems._replace(**changes)
    found = model(systems.z, systems.pos, systems.batch, systems.box, systems.q, properties=True)
    return {name: value.detach() for name, value in found.properties.items()}


def sum_systems(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(3, *x.shape[1:], dtype=x.dtype).index_add(0, NEUTRAL.batch, x)


@pytest.mark.parametrize("systems", [NEUTRAL, CHARGED], ids=["neutral", "charged"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_charges_add_up_to_the_total_charge(name, systems) -> None:
    charges = predict(tiny_model(name, properties={"charges": None}), systems)["charges"]
    assert charges.shape == (10, 1)
    expected = torch.zeros(3, 1, dtype=torch.float64) if systems.q is None else systems.q[:, None]
    torch.testing.assert_close(sum_systems(charges), expected, rtol=0, atol=1e-12)
    assert charges.std() > 1e-3


def test_charges_differ_from_the_network_by_the_same_for_all_atoms_of_a_system() -> None:
    model = tiny_model("tensornet", properties={"charges": None, "raw": "AtomScalar"})
    model.property_heads["raw"].load_state_dict(model.property_heads["charges"].state_dict())
    found = predict(model, CHARGED)
    shift = found["charges"] - found["raw"]
    for number in range(3):
        of_system = shift[CHARGED.batch == number]
        torch.testing.assert_close(of_system, of_system[:1].expand_as(of_system))


@pytest.mark.parametrize("name", ["graph-network", "transformer"])
def test_a_dipole_without_vectors_is_that_of_the_charges(name) -> None:
    model = tiny_model(name, properties={"dipole": None, "charges": None})
    model.property_heads["charges"].load_state_dict(model.property_heads["dipole"].charges.state_dict())
    found = predict(model, CHARGED)
    mass = torch.as_tensor(atomic_masses, dtype=torch.float64)[NEUTRAL.z][:, None]
    centre = (sum_systems(mass * NEUTRAL.pos) / sum_systems(mass))[NEUTRAL.batch]
    torch.testing.assert_close(found["dipole"], sum_systems(found["charges"] * (NEUTRAL.pos - centre)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_dipole_of_a_neutral_system_does_not_depend_on_masses(name) -> None:
    model = tiny_model(name, properties={"dipole": None})
    dipole = predict(model)["dipole"]
    assert dipole.shape == (3, 3)
    assert dipole[0].norm() > 1e-3
    model.property_heads["dipole"].atomic_mass[1] = 50.0
    torch.testing.assert_close(predict(model)["dipole"], dipole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(predict(model, CHARGED)["dipole"], dipole)


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_atoms_have_dipoles_of_their_own_where_there_are_vectors(name) -> None:
    model = tiny_model(name, properties={"dipole": None, "vector": "VectorOutput", "charges": None})
    heads = model.property_heads
    heads["vector"].load_state_dict(heads["dipole"].atomic_dipoles.state_dict())
    heads["charges"].load_state_dict(heads["dipole"].charges.state_dict())
    found = predict(model)
    of_charges = sum_systems(found["charges"] * NEUTRAL.pos)
    torch.testing.assert_close(found["dipole"], of_charges + found["vector"], rtol=1e-10, atol=1e-12)
    assert found["vector"][:2].norm() > 1e-5


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_dipoles_are_polar_and_polarisabilities_even_under_inversion(name) -> None:
    model = tiny_model(name, properties={"dipole": None, "polarizability": None, "charges": None})
    here, there = predict(model), predict(model, pos=-NEUTRAL.pos)
    torch.testing.assert_close(there["dipole"], -here["dipole"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there["polarizability"], here["polarizability"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there["charges"], here["charges"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WITH_VECTORS)
def test_polarisabilities_are_symmetric_and_not_all_isotropic(name) -> None:
    alpha = predict(tiny_model(name, properties={"polarizability": None}))["polarizability"]
    assert alpha.shape == (3, 3, 3)
    torch.testing.assert_close(alpha, alpha.mT)
    mean = alpha.diagonal(dim1=1, dim2=2).mean(dim=1)
    anisotropic = alpha - mean[:, None, None] * torch.eye(3, dtype=torch.float64)
    assert (anisotropic[:2].flatten(1).norm(dim=1) > 1e-4).all()
    assert anisotropic[2].norm() < 1e-10, "a lone atom has a direction"
    assert mean.abs().min() > 1e-4


@pytest.mark.parametrize("has_tensors", [True, False])
def test_the_anisotropic_part_is_the_gated_sum_of_traceless_tensors(has_tensors) -> None:
    torch.manual_seed(0)
    head = Polarizability(6, dtype=torch.float64, has_tensors=has_tensors)
    x, v, S = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((6,), (3, 6), (5, 6)))
    graph = bare_graph(torch.tensor([1, 6]), torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 0]))
    found = head.per_atom(Features(x, v, S=S), graph)
    scalars = head.output_network(x)
    for atom in range(2):
        if has_tensors:
            nine = torch.cat([torch.zeros(4, 6, dtype=torch.float64), S[atom]])
            tensors = to_matrix(nine[None])[0] @ head.mixtures[0].weight.T
        else:
            u, w = (v[atom] @ mix.weight.T for mix in head.mixtures)
            outer = torch.einsum("ac,bc->abc", u, w)
            tensors = (outer + outer.transpose(0, 1)) / 2
            tensors = tensors - torch.einsum("aac,ij->ijc", tensors, torch.eye(3, dtype=torch.float64)) / 3
        expected = scalars[atom, 0] * torch.eye(3, dtype=torch.float64) + tensors @ scalars[atom, 1:]
        torch.testing.assert_close(found[atom], expected)


def test_a_polarisability_without_the_features_it_reads_is_refused() -> None:
    graph = bare_graph(NEUTRAL.z, NEUTRAL.pos, NEUTRAL.batch)
    x = torch.randn(10, 8, dtype=torch.float64)
    for has_tensors in (True, False):
        with pytest.raises(ValueError, match="features, and the architecture has none"):
            Polarizability(8, dtype=torch.float64, has_tensors=has_tensors).per_atom(Features(x), graph)
    with pytest.raises(ConfigError, match=r"properties: alpha: 'Polarizability' needs vector .*'graph-network'"):
        tiny_model("graph-network", properties={"alpha": "Polarizability"})


@pytest.mark.parametrize("head", ["PartialCharges", "AtomScalar"])
def test_a_head_for_atoms_cannot_be_the_output(head) -> None:
    with pytest.raises(ConfigError, match=rf"'{head}' gives a value of each atom.*properties: {{my_label: {head}}}"):
        tiny_model("tensornet", output_model=head)


@pytest.mark.parametrize(("head", "shape"), [("Dipole", (3, 3)), ("Polarizability", (3, 3, 3))])
def test_dipoles_and_polarisabilities_can_be_the_output(head, shape) -> None:
    y, _ = tiny_model("tensornet", output_model=head, derivative=False)(NEUTRAL.z, NEUTRAL.pos, NEUTRAL.batch)
    assert y.shape == shape


def test_repulsion_is_not_added_to_a_dipole() -> None:
    options = {"output_model": "Dipole", "derivative": False}
    with_repulsion, without = (tiny_model("tensornet2", repulsion=r, **options) for r in (True, False))
    without.load_state_dict(with_repulsion.state_dict(), strict=False)
    first, second = (m(NEUTRAL.z, NEUTRAL.pos, NEUTRAL.batch)[0] for m in (with_repulsion, without))
    torch.testing.assert_close(first, second)


def test_heads_beside_a_coulomb_head_do_not_see_its_charges() -> None:
    coulomb = {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 1.0, 1.0], "coulomb_cutoff": 5.0}
    model = tiny_model("tensornet2", properties={"dipole": None, "polarizability": None}, **coulomb)
    plain = tiny_model("tensornet2", properties={"dipole": None, "polarizability": None})
    plain.load_state_dict(model.state_dict(), strict=False)
    for name, value in predict(plain, CHARGED).items():
        torch.testing.assert_close(predict(model, CHARGED)[name], value)


def test_a_dipole_in_a_box_says_that_it_depends_on_images(caplog) -> None:
    from torchmdnet.heads import dipole

    dipole._warned.clear()
    model, cell = tiny_model("tensornet", properties={"dipole": None}), cell_of_atoms()
    with caplog.at_level(logging.WARNING):
        predict(model, cell)
        predict(model, cell)
    assert caplog.text.count("depends on which image") == 1
