"""What holds for every prior: gradients, frames, batches, images, units, both precisions, and files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.graph import Graph, bare_graph
from torchmdnet.priors import PRIORS
from torchmdnet.priors.named import create_prior_models
from torchmdnet.testing import Systems, cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

EV = 1.602176634e-19
UNITS = {"distance_scale": 1e-10, "energy_scale": EV}
SWITCH = {"lower_switch_distance": 0.05, "upper_switch_distance": 0.2}
SPECIFICATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Atomref": ("Atomref", {"max_z": 20}),
    "LearnableAtomref": ("LearnableAtomref", {"max_z": 20}),
    "ZBL": ("ZBL", {"cutoff_distance": 5.0, **UNITS}),
    "D2": ("D2", {"cutoff_distance": 6.0, **UNITS}),
    "D3": ("D3", {"functional": "pbe", "cutoff_distance": 7.0, **UNITS}),
    "D3, zero damping": ("D3", {"functional": "pbe", "damping": "zero", "cutoff_distance": 7.0, **UNITS}),
    "Coulomb": ("Coulomb", {**SWITCH, **UNITS}),
    "Coulomb, Ewald": ("Coulomb", {**SWITCH, "lattice_sum": "ewald", "cutoff_distance": 5.0, **UNITS}),
    "Coulomb, shifted": ("Coulomb", {**SWITCH, "lattice_sum": "damped-shifted", "cutoff_distance": 6.0, **UNITS}),
}


def slab() -> Systems:
    cell = cell_of_atoms()
    assert cell.box is not None
    return cell._replace(box=cell.box * torch.tensor([[1.0], [1.0], [0.0]]))


def mixed() -> Systems:
    """A cell, a molecule in the open, a pair across a boundary, and a lone atom last."""
    cell, water = cell_of_atoms(num_atoms=4), small_molecules().system(0)
    assert cell.box is not None
    small = torch.diag(torch.tensor([3.1, 3.4, 2.9], dtype=torch.float64))
    return Systems(
        torch.cat([cell.z, water.z, torch.tensor([6, 8]), torch.tensor([7])]),
        torch.cat([cell.pos, water.pos, torch.tensor([[0.1, 0, 0], [2.0, 0.3, 0.2], [5.0, 5, 5]]).double()]),
        torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3]),
        torch.stack([cell.box, torch.zeros(3, 3).double(), small, torch.zeros(3, 3).double()]),
        None,
    )


SYSTEMS = {"molecules": small_molecules(), "cell": cell_of_atoms(), "slab": slab(), "mixed": mixed()}
CASES = [
    pytest.param(name, which, id=f"{name} - {which}")
    for name in SPECIFICATIONS
    for which in SYSTEMS
    if not (name == "Coulomb, Ewald" and which == "slab")  # refused with words, see test_coulomb_prior
]


def charges_of(systems: Systems) -> torch.Tensor:
    """Charges that go with the element, so that they follow the atoms through every rearrangement."""
    return torch.tensor([{1: 0.4, 6: -0.3, 7: 0.2, 8: -0.7}[int(z)] for z in systems.z], dtype=torch.float64)


def build(name: str):
    kind, options = SPECIFICATIONS[name]
    torch.manual_seed(0)
    prior = PRIORS[kind](**options).double()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter)
    return prior


def graph_of(systems: Systems) -> Graph:
    extra = {"partial_charges": charges_of(systems).to(systems.pos.dtype)}
    return bare_graph(systems.z, systems.pos, systems.batch, systems.box, extra, systems.num_systems)


def energy(prior, systems: Systems, **changes: Any) -> torch.Tensor:
    graph = graph_of(systems._replace(**changes))
    atoms = prior.add_to_atoms(graph.pos.new_zeros(graph.num_atoms, 1), graph)
    sums = graph.pos.new_zeros(graph.num_systems, 1).index_add(0, graph.batch, atoms)
    return prior.add_to_systems(sums, graph)


@pytest.mark.parametrize(("name", "which"), CASES)
def test_forces_and_stress_are_gradients_to_second_order(name: str, which: str) -> None:
    prior, systems = build(name), SYSTEMS[which]

    def strained(pos: torch.Tensor, strain: torch.Tensor) -> torch.Tensor:
        box = None if systems.box is None else systems.box @ strain
        return energy(prior, systems, pos=pos @ strain, box=box)

    # one displacement pattern for all atoms at once, and the six strains
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randn(3, *systems.pos.shape, generator=generator, dtype=torch.float64)

    def along(amount: torch.Tensor, strain: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(3, dtype=torch.float64)
        return strained(systems.pos + torch.einsum("k,knx->nx", amount, pattern), identity + (strain + strain.T) / 2)

    inputs = (torch.zeros(3).double().requires_grad_(), torch.zeros(3, 3).double().requires_grad_())
    assert torch.autograd.gradcheck(along, inputs, eps=1e-5, atol=2e-6, rtol=1e-5)
    if energy(prior, systems, pos=systems.pos.clone().requires_grad_()).requires_grad:
        assert torch.autograd.gradgradcheck(along, inputs, eps=1e-5, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_called_alone_values_keep_their_shape(name: str) -> None:
    prior, systems = build(name), SYSTEMS["molecules"]
    extra = {"partial_charges": charges_of(systems)}
    graph, S = graph_of(systems), systems.num_systems
    expected = energy(prior, systems)[:, 0]
    sums = graph.pos.new_zeros(S).index_add(
        0, systems.batch, prior.pre_reduce(graph.pos.new_zeros(graph.num_atoms), *graph[:3], extra)
    )
    for shape in ((S, 1), (S,)):
        y = prior.post_reduce(sums.reshape(shape), *graph[:3], systems.box, extra)
        assert y.shape == shape
        torch.testing.assert_close(y.flatten(), expected)
        assert prior.add_to_systems(sums.reshape(shape), graph).shape == shape
    one = systems.system(0)
    y = prior.post_reduce(torch.zeros((), dtype=torch.float64), *one[:3], None, {"partial_charges": charges_of(one)})
    assert y.shape == ()
    if prior.per_atom(graph) is None:
        torch.testing.assert_close(y, expected[0])


@pytest.mark.parametrize(("name", "which"), CASES)
def test_the_frame_the_order_and_the_cell_an_atom_is_written_in_do_not_matter(name: str, which: str) -> None:
    prior, systems = build(name), SYSTEMS[which]
    expected = energy(prior, systems)
    assert expected.shape == (systems.num_systems, 1)
    assert torch.isfinite(expected).all()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    box = None if systems.box is None else systems.box @ rotation.T
    turned = energy(prior, systems, pos=systems.pos @ rotation.T + 1.3, box=box)
    torch.testing.assert_close(turned, expected, rtol=1e-9, atol=1e-9)
    order = torch.randperm(len(systems.z), generator=torch.Generator().manual_seed(3))
    shuffled = energy(prior, systems, z=systems.z[order], pos=systems.pos[order], batch=systems.batch[order])
    torch.testing.assert_close(shuffled, expected, rtol=1e-10, atol=1e-10)
    if systems.box is not None:
        boxes = systems.box.expand(systems.num_systems, 3, 3)[systems.batch]
        counts = torch.randint(-2, 3, systems.pos.shape, generator=torch.Generator().manual_seed(4)).double()
        moved = energy(prior, systems, pos=systems.pos + torch.einsum("nk,nkx->nx", counts, boxes))
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "which"), CASES)
def test_a_batch_equals_its_systems_one_by_one(name: str, which: str) -> None:
    prior, systems = build(name), SYSTEMS[which]
    together = energy(prior, systems)
    for number in range(systems.num_systems):
        torch.testing.assert_close(energy(prior, systems.system(number))[0], together[number], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", ["cell", "slab"])
@pytest.mark.parametrize("name", [name for name in SPECIFICATIONS if name != "Coulomb"])
def test_a_supercell_has_the_energy_of_its_cells(name: str, which: str) -> None:
    """All but the Coulomb energy of nearest images, which is not the energy of a crystal."""
    if (name, which) == ("Coulomb, Ewald", "slab"):
        which = "cell"
    prior, systems = build(name), SYSTEMS[which]
    assert systems.box is not None
    double = systems._replace(
        z=systems.z.repeat(2),
        pos=torch.cat([systems.pos, systems.pos + systems.box[0]]),
        batch=systems.batch.repeat(2),
        box=systems.box * torch.tensor([[2.0], [1.0], [1.0]]),
    )
    tolerance = 1e-6 if name == "Coulomb, Ewald" else 1e-10
    torch.testing.assert_close(energy(prior, double), 2 * energy(prior, systems), rtol=tolerance, atol=1e-10)


@pytest.mark.parametrize(("name", "which"), CASES)
def test_single_precision_agrees_with_double(name: str, which: str) -> None:
    prior, systems = build(name), SYSTEMS[which]
    exact = energy(prior, systems)
    single = energy(prior.to(torch.float32), systems.to(torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_systems_without_pairs_have_no_pair_energy(name: str) -> None:
    prior, z = build(name), torch.tensor([7, 8, 1])
    pos = 60.0 * torch.eye(3, dtype=torch.float64)
    lone = Systems(z, pos, torch.tensor([0, 1, 2]), None, None)
    value = energy(prior, lone)
    single = SPECIFICATIONS[name][0].endswith("Atomref")
    alone = energy(prior, Systems(z[:1], pos[:1] * 0, torch.zeros(1).long(), None, None))
    torch.testing.assert_close(value[:1], alone)
    if not single and name != "Coulomb, shifted":  # whose charges keep their self energy
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_what_is_kept_rebuilds_it_through_a_text_file(name: str) -> None:
    prior, systems = build(name), SYSTEMS["mixed"]
    kept = json.loads(json.dumps(prior.get_init_args()))
    (again,) = create_prior_models({"prior_model": SPECIFICATIONS[name][0], "prior_args": [kept]})
    again = again.double()
    again.load_state_dict(prior.state_dict())
    assert again.get_init_args() == prior.get_init_args()
    assert torch.equal(energy(again, systems), energy(prior, systems))


def test_all_at_once_add_up_and_come_back_from_a_file(tmp_path) -> None:
    names = ["Atomref", "ZBL", "D2", "D3", "Coulomb, Ewald"]
    options = {**TINY, "model": "graph-network", "prior_model": [dict([SPECIFICATIONS[name]]) for name in names]}
    model = tiny_model("graph-network", prior_model=options["prior_model"])
    torch.nn.init.normal_(model.prior_model[0].atomref.weight)
    bare = tiny_model("graph-network")
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "prior" not in key})
    systems = SYSTEMS["mixed"]
    call = {"box": systems.box, "extra_args": {"partial_charges": charges_of(systems)}}
    total, forces = model(systems.z, systems.pos, systems.batch, **call)
    expected = bare(systems.z, systems.pos, systems.batch, **call).energy
    for prior in model.prior_model:
        expected = expected + energy(prior, systems)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-10)

    kept = [prior.get_init_args() for prior in model.prior_model]
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"hyper_parameters": {**options, "prior_args": kept}, "state_dict": state}, tmp_path / "model.ckpt")
    again = load_model(tmp_path / "model.ckpt")
    assert [prior.get_init_args() for prior in again.prior_model] == kept
    found, found_forces = again(systems.z, systems.pos, systems.batch, **call)
    torch.testing.assert_close(found, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_forces, forces, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPECIFICATIONS)
@pytest.mark.parametrize("which", ["molecules", "cell"])
def test_torch_func_finds_the_same_hessian(name: str, which: str) -> None:
    prior, systems = build(name), SYSTEMS[which]

    def total(pos: torch.Tensor) -> torch.Tensor:
        return energy(prior, systems, pos=pos).sum()

    gradient = torch.func.grad(total)
    direction = torch.randn(systems.pos.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (product,) = torch.func.vmap(torch.func.vjp(gradient, systems.pos)[1])(direction[None])
    ahead, behind = (gradient(systems.pos + step * direction) for step in (1e-5, -1e-5))
    torch.testing.assert_close(product[0], (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-6)
