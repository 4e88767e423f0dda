"""A potential gives the same answers from a list of edges as from positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchmdnet.graph import as_boxes, edges_within, graph_of_edges
from torchmdnet.models import ARCHITECTURES
from torchmdnet.testing import cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.systems import Systems

MOLECULES, CELL = small_molecules(charges=True), cell_of_atoms()
SYSTEMS = {"molecules": MOLECULES, "cell": CELL}
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
SCALES = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}


def list_of_edges(systems: Systems, cutoff: float = 4.0, pos: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every pair in both directions, in no order at all."""
    pos = systems.pos if pos is None else pos
    box = as_boxes(systems.box, systems.num_systems, pos.dtype, pos.device)
    edges = edges_within(pos, systems.batch, box, systems.num_systems, cutoff_upper=cutoff)
    order = torch.randperm(edges.vec.shape[0], generator=torch.Generator().manual_seed(2))
    return edges.edge_index[:, order], edges.vec[order]


def asked(model, systems: Systems, **options):
    index, vec = list_of_edges(systems, options.pop("cutoff", 4.0))
    return model.from_edges(systems.z, index, vec, systems.batch, systems.box, systems.q, **options)


@pytest.mark.parametrize("systems", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_edges_give_the_energies_forces_and_stress_of_positions(name: str, systems: Systems) -> None:
    model = tiny_model(name)
    found = asked(model, systems)
    expected = model(
        systems.z, systems.pos, systems.batch, systems.box, systems.q, stress=systems.box is not None, properties=True
    )
    torch.testing.assert_close(found.energy, expected.energy.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.forces, expected.forces, rtol=1e-9, atol=1e-9)
    if systems.box is not None:
        torch.testing.assert_close(found.stress, expected.stress, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"equivariance_invariance_group": "SO(3)"},
        {"cutoff_lower": 1.2},
        {"radial": "exact"},
        {"prior_model": {"Atomref": {"max_z": 20}}},
        {"model": "tensornet2", "repulsion": True},
        {"model": "graph-network", "atom_filter": 1, "derivative": False},
        {"model": "graph-network", "neighbor_embedding": False},
        {"model": "equivariant-transformer", "vector_cutoff": False},
    ],
)
def test_options_do_not_matter(options: dict) -> None:
    model = tiny_model(**{"model": "tensornet", **options})
    system = MOLECULES.system(1) if "atom_filter" in options else MOLECULES
    expected = model(system.z, system.pos, system.batch, q=system.q)
    found = asked(model, system)
    torch.testing.assert_close(found.energy, expected.energy.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.forces, expected.forces, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["tensornet", "tensornet2", "equivariant-transformer"])
def test_the_gradient_in_each_edge_is_the_slope_of_the_energy(name: str) -> None:
    model = tiny_model(name, radial="exact") if name == "tensornet" else tiny_model(name)
    index, vec = list_of_edges(CELL)
    gradient = model.from_edges(CELL.z, index, vec).edge_gradient
    generator, h = torch.Generator().manual_seed(4), 1e-5
    for edge in torch.randint(len(vec), (4,), generator=generator).tolist():
        for axis in range(3):
            step = torch.zeros_like(vec)
            step[edge, axis] = h
            up, down = (model.from_edges(CELL.z, index, vec + sign * step, derivative=False) for sign in (1, -1))
            slope = float(up.energy.detach() - down.energy.detach()) / (2 * h)
            assert float(gradient[edge, axis]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_virial_is_the_slope_of_the_energy_under_strain(name: str) -> None:
    model = tiny_model(name)
    index, vec = list_of_edges(MOLECULES)
    virial = model.from_edges(MOLECULES.z, index, vec, MOLECULES.batch).virial
    h = 1e-5
    for a, b in ((0, 0), (0, 1), (2, 1)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] += h / 2
        strain[b, a] += h / 2
        energies = [
            model.from_edges(MOLECULES.z, index, vec @ (torch.eye(3) + sign * strain), MOLECULES.batch).energy
            for sign in (1, -1)
        ]
        torch.testing.assert_close(virial[:, a, b], (energies[0] - energies[1])[:, 0] / (2 * h), rtol=1e-5, atol=1e-6)


def test_contributions_of_atoms_add_up_to_the_energy() -> None:
    model = tiny_model("tensornet", prior_model={"Atomref": {"max_z": 20}})
    found = asked(model, MOLECULES)
    assert found.atomic is not None
    expected = model.per_atom(MOLECULES.z, MOLECULES.pos, MOLECULES.batch, q=MOLECULES.q)
    torch.testing.assert_close(found.atomic, expected.detach(), rtol=1e-9, atol=1e-9)
    total = torch.zeros_like(found.energy).index_add(0, MOLECULES.batch, found.atomic)
    torch.testing.assert_close(total, found.energy)


def test_properties_come_along() -> None:
    model = tiny_model("tensornet", properties={"charges": None, "polarizability": None})
    found = asked(model, MOLECULES, properties=True).properties
    expected = model(MOLECULES.z, MOLECULES.pos, MOLECULES.batch, q=MOLECULES.q, properties=True).properties
    assert found.keys() == expected.keys() == {"charges", "polarizability"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-9, atol=1e-9)


def test_lists_with_a_skin_and_with_self_loops_are_cut_at_the_cutoff() -> None:
    model = tiny_model("tensornet")
    index, vec = list_of_edges(CELL, cutoff=5.5)
    atoms = torch.arange(len(CELL.z))
    index, vec = torch.cat([index, torch.stack([atoms, atoms])], dim=1), torch.cat([vec, torch.zeros(len(atoms), 3)])
    found = model.from_edges(CELL.z, index, vec)
    torch.testing.assert_close(found.energy, asked(model, CELL).energy)
    assert found.edge_gradient.shape == vec.shape
    assert not found.edge_gradient[vec.norm(dim=1) >= 4.0].any()
    assert not found.edge_gradient[-len(atoms) :].any()


@pytest.mark.parametrize("name", ["tensornet", "tensornet2", "graph-network"])
def test_domains_that_look_at_atoms_of_others_give_the_whole(name: str) -> None:
    """One layer deep: each domain computes its own atoms and only looks at their neighbours."""
    layers = 0 if name.startswith("tensornet") else 1
    model = tiny_model(name, num_layers=layers, neighbor_embedding=False)

    index, vec = list_of_edges(CELL)
    whole = model.from_edges(CELL.z, index, vec)
    assert whole.atomic is not None
    forces, total = torch.zeros_like(whole.forces), torch.zeros_like(whole.energy)
    for own in (torch.arange(len(CELL.z)) < 3, torch.arange(len(CELL.z)) >= 3):
        seen = own[index[0]]
        part, slopes = _energy_of(model, index[:, seen], vec[seen], own)
        total += part
        forces.index_add_(0, index[0, seen], -slopes).index_add_(0, index[1, seen], slopes)
    torch.testing.assert_close(total, whole.energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forces, whole.forces, rtol=1e-9, atol=1e-10)


def _energy_of(model, index: Tensor, vec: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of the atoms of a domain and its gradient in the edges, from autograd of the engine."""
    vec = vec.clone().requires_grad_()
    atomic = model.from_edges(CELL.z, index, vec, derivative=False).atomic
    energy = atomic[own].sum().reshape(1, 1)
    return energy.detach(), torch.autograd.grad(energy.sum(), vec)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_edge_without_partner_counts_in_its_own_direction(name: str) -> None:
    model = tiny_model(name)
    z = torch.tensor([8, 1])
    index, vec = torch.tensor([[0], [1]]), torch.tensor([[0.3, 0.9, -0.2]], dtype=torch.float64)
    atomic = model.from_edges(z, index, vec).atomic
    alone = model.from_edges(z, index[:, :0], vec[:0]).atomic
    torch.testing.assert_close(atomic[1], alone[1])
    assert abs(float(atomic[0] - alone[0])) > 1e-6


def test_forces_can_be_trained_on() -> None:
    model = tiny_model("tensornet").train()
    index, vec = list_of_edges(CELL)
    model.from_edges(CELL.z, index, vec).forces.square().sum().backward()
    from_edges = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(CELL.z, CELL.pos, box=CELL.box).forces.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(from_edges[name], parameter.grad, rtol=1e-7, atol=1e-8)


def test_without_derivative_the_energy_can_be_differentiated_by_the_engine() -> None:
    model = tiny_model("tensornet")
    pos = CELL.pos.clone().requires_grad_()
    index, vec = list_of_edges(CELL, pos=pos)
    found = model.from_edges(CELL.z, index, vec, derivative=False)
    assert found.forces.shape == found.edge_gradient.shape == (0,)
    (gradient,) = torch.autograd.grad(found.energy.sum(), pos)
    torch.testing.assert_close(-gradient, model(CELL.z, CELL.pos, box=CELL.box).forces, rtol=1e-9, atol=1e-9)


def test_nothing_is_asked_of_autograd_outside(monkeypatch) -> None:
    model = tiny_model("tensornet")
    index, vec = list_of_edges(CELL)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model.from_edges(CELL.z, index, vec)
        assert not found.energy.requires_grad
        assert found.forces.any()
    assert not vec.requires_grad


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"output_model": "DipoleMoment", "derivative": False}, "DipoleMoment"),
        ({"output_model": "ElectronicSpatialExtent", "derivative": False}, "ElectronicSpatialExtent"),
        ({"model": "equivariant-transformer", "output_model": "DipoleMoment", "derivative": False}, "DipoleMoment"),
        (
            {"model": "tensornet2", "output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0, 1.0, 1.0]},
            "ScalarPlusWeightedCoulomb",
        ),
        ({"prior_model": {"ZBL": {"cutoff_distance": 4.0, **SCALES}}}, "ZBL"),
        ({"prior_model": {"D2": {"cutoff_distance": 9.0, **SCALES}}}, "D2"),
        ({"properties": {"dipole": None}}, "Dipole"),
    ],
)
def test_parts_that_need_positions_are_refused_by_name(options: dict, part: str) -> None:
    model = tiny_model(**{"model": "tensornet", **options})
    with pytest.raises(ValueError, match=rf"from_edges: \w*{part} needs the positions"):
        asked(model, MOLECULES, properties=True)


@pytest.mark.parametrize(
    ("index", "vec", "words"),
    [
        (torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 3), r"edge_index must hold two integers"),
        (torch.zeros(2, 2), torch.zeros(2, 3), r"edge_index must hold two integers"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(3, 3), r"edge_vec has shape \(3, 3\) but .* 2 edges"),
        (torch.tensor([[0], [2]]), torch.ones(1, 3), r"names atom 2, but z holds 2 atoms, 0 to 1"),
        (torch.tensor([[0], [-1]]), torch.ones(1, 3), r"names atom -1"),
        (torch.tensor([[0], [1]]), torch.ones(1, 3), r"between atoms of two systems"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(index: Tensor, vec: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        graph_of_edges(torch.tensor([1, 1]), index, vec, torch.tensor([0, 1]), cutoff_upper=4.0)


def test_unknown_elements_are_named() -> None:
    with pytest.raises(ValueError, match=r"z holds 92 \(U\)"):
        tiny_model("tensornet").from_edges(torch.tensor([92]), torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3))


@pytest.mark.parametrize("radial", ["grid", "exact"])
def test_lists_that_lack_edges_give_what_ordinary_layers_give(monkeypatch: pytest.MonkeyPatch, radial: str) -> None:
    """As in a domain whose outer atoms send and do not receive, in evaluation and in training."""
    model = tiny_model("tensornet", radial=radial)
    index, vec = list_of_edges(CELL)
    kept = torch.rand(len(vec), generator=torch.Generator().manual_seed(1)) < 0.6

    def answers() -> list[Tensor]:
        found = model.eval().from_edges(CELL.z, index[:, kept], vec[kept])
        values = [found.energy, found.edge_gradient]
        model.train().zero_grad()
        model.from_edges(CELL.z, index[:, kept], vec[kept]).forces.square().sum().backward()
        return values + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    fused = answers()
    monkeypatch.setattr(type(model.representation_model), "_call", lambda *_: None)
    for value, expected in zip(fused, answers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
