"""D2 attracts, in any lattice and unit, for the elements it has parameters for."""

from __future__ import annotations

import math

import pytest
import torch

from torchmdnet.checkpoint import load_model
from torchmdnet.priors import PRIORS
from torchmdnet.testing import CHECKS, cell_of_atoms, small_molecules, tiny_model
from torchmdnet.testing.tiny import TINY

D2 = {"cutoff_distance": 6.0, "distance_scale": 1e-10, "energy_scale": 1.602176634e-19}


def added(prior, systems) -> torch.Tensor:
    zero = torch.zeros(systems.num_systems, 1, dtype=torch.float64)
    return prior.post_reduce(zero, systems.z, systems.pos, systems.batch, systems.box)


def test_a_pair_has_the_energy_of_the_formula() -> None:
    prior = PRIORS["D2"](**D2, dtype=torch.float64)
    pos = torch.tensor([[0.0, 0, 0], [3.2, 0, 0]], dtype=torch.float64)
    y = prior.post_reduce(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([6, 8]), pos, torch.zeros(2).long())
    damping = 1 / (1 + math.exp(-20 * (3.2 / (1.452 + 1.342) - 1)))
    joules_per_mole = -math.sqrt(1.75 * 0.70) / 0.32**6 * damping
    assert y.item() == pytest.approx(joules_per_mole / 96485.33212, rel=1e-9)


def test_xenon_is_the_last_element() -> None:
    prior = PRIORS["D2"](**D2)
    pos = torch.tensor([[0.0, 0, 0], [4.0, 0, 0]])
    batch = torch.zeros(2).long()
    assert prior.post_reduce(torch.zeros(1, 1), torch.tensor([54, 54]), pos, batch).item() < 0
    with pytest.raises(ValueError, match=r"there is an atom of 55 \(Cs\)"):
        prior.post_reduce(torch.zeros(1, 1), torch.tensor([54, 55]), pos, batch)
    with pytest.raises(ValueError, match="not an element"):
        prior.post_reduce(torch.zeros(1, 1), torch.tensor([0, 6]), pos, batch)


def test_transition_metals_of_a_row_share_their_parameters() -> None:
    prior = PRIORS["D2"](**D2)
    for row in (range(21, 31), range(39, 49)):
        assert len({(prior.C_6[z].item(), prior.R_r[z].item()) for z in row}) == 1
    assert prior.C_6.shape == prior.R_r.shape == (55,)


def test_systems_without_pairs_have_no_dispersion() -> None:
    systems = small_molecules()  # the last one is a lone atom
    energy = added(PRIORS["D2"](**D2), systems)
    assert energy.shape == (3, 1)
    assert energy[2] == 0
    assert (energy[:2] < 0).all()


def test_a_supercell_has_the_energy_of_its_cells() -> None:
    prior, systems = PRIORS["D2"](**D2), cell_of_atoms()
    assert systems.box is not None
    double = systems._replace(
        z=systems.z.repeat(2),
        pos=torch.cat([systems.pos, systems.pos + systems.box[0]]),
        batch=systems.batch.repeat(2),
        box=systems.box * torch.tensor([[2.0], [1.0], [1.0]]),
    )
    torch.testing.assert_close(added(prior, double), 2 * added(prior, systems), rtol=1e-9, atol=0)
    assert added(prior, systems) < 1.5 * added(prior, systems._replace(box=None))


@pytest.mark.parametrize("systems", [small_molecules(), cell_of_atoms()], ids=["molecules", "cell"])
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "energy_is_smooth_through_the_cutoff"])
def test_a_potential_with_it_meets_the_contract(name: str, systems) -> None:
    CHECKS[name](tiny_model("graph-network", prior_model={"D2": D2}), systems)


def test_models_trained_without_boxes_keep_their_energy(tmp_path) -> None:
    systems = cell_of_atoms()
    options = {**TINY, "model": "graph-network", "prior_model": {"D2": D2}, "prior_args": [D2]}
    model = tiny_model("graph-network", prior_model={"D2": {**D2, "periodic": False}})
    path = tmp_path / "model.ckpt"
    for prior_args, periodic in (([D2], False), ([{**D2, "periodic": True}], True)):
        torch.save(
            {
                "hyper_parameters": {**options, "prior_args": prior_args},
                "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
            },
            path,
        )
        energy, _ = load_model(path)(systems.z, systems.pos, box=systems.box)
        as_trained, _ = model(systems.z, systems.pos, box=systems.box)
        assert torch.allclose(energy, as_trained, rtol=0, atol=1e-9) == (not periodic)
