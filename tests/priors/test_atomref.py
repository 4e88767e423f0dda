"""Reference energies keep their digits, whatever the precision of the network."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.graph import Inputs
from torchmdnet.priors import PRIORS
from torchmdnet.testing import Systems, small_molecules, tiny_model


class Known:
    """A data set of total energies."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.table = -1029.511 * torch.linspace(0.1, 2.0, 20, dtype=dtype)[:, None]

    def get_atomref(self, max_z: int = 100) -> torch.Tensor:
        return self.table


def many_molecules(count: int) -> Systems:
    water = small_molecules().system(0)
    pos = torch.cat([water.pos + 20.0 * n for n in range(count)])
    return Systems(water.z.repeat(count), pos, torch.zeros(3 * count, dtype=torch.long), None, None)


def single_and_double(systems: Systems) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model in single precision, the reference energies alone in double, and what the network adds, in double."""
    model = tiny_model("graph-network", precision=32, prior_model={"Atomref": {"max_z": 20}})
    table = Known().table
    with torch.no_grad():
        model.prior_model[0].atomref.weight.copy_(table)
    found, _ = model(systems.z, systems.pos.float())
    references = table.double()[systems.z].sum(dim=0, keepdim=True)
    bare = tiny_model("graph-network")
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "prior" not in key})
    return found, references, bare(systems.z, systems.pos)[0].detach()


@pytest.mark.parametrize("count", [1, 1000])
def test_large_totals_in_single_precision_are_rounded_once(count: int) -> None:
    found, references, network = single_and_double(many_molecules(count))
    assert found.dtype == torch.float32
    exact = references + network
    spacing = torch.finfo(torch.float32).eps * exact.abs()
    assert ((found.double() - exact).abs() < spacing + 1e-5 * network.abs()).all()


def test_the_atoms_of_a_calculator_keep_the_digits_of_the_network() -> None:
    systems = small_molecules().system(1)
    model = tiny_model("graph-network", precision=32, prior_model={"Atomref": {"max_z": 20}})
    with torch.no_grad():
        model.prior_model[0].atomref.weight.copy_(Known().table)
    found = model.evaluate(Inputs(systems.z, systems.pos.float()), by_atom=True)
    _, references, network = single_and_double(systems)
    assert found.atomic is not None
    assert found.atomic.dtype == found.energy.dtype == torch.float64
    torch.testing.assert_close(found.energy.detach() - references, network, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["Atomref", "LearnableAtomref"])
def test_training_leaves_the_start_as_it_was(kind: str, dtype: torch.dtype) -> None:
    data = Known(dtype)
    given = data.table.clone()
    options = {"trainable": True} if kind == "Atomref" else {}
    prior = PRIORS[kind](dataset=data, **options).to(dtype)
    start = prior.initial_atomref.clone()
    assert torch.equal(start, given if kind == "Atomref" else torch.zeros_like(given))
    systems = small_molecules()
    optimizer = torch.optim.SGD(prior.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        energy = prior.pre_reduce(torch.zeros(len(systems.z), 1, dtype=dtype), systems.z, systems.pos, systems.batch)
        (energy - 1).square().sum().backward()
        optimizer.step()
    assert not torch.equal(prior.atomref.weight, start)
    assert torch.equal(prior.initial_atomref, start)
    assert torch.equal(data.table, given)
    prior.reset_parameters()
    assert torch.equal(prior.atomref.weight, start)
