"""Models made or called under ``torch.inference_mode`` give what they give elsewhere, then and later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from torchmdnet.calculators import External, TMDNETCalculator
from torchmdnet.ensemble import Ensemble
from torchmdnet.models import ARCHITECTURES
from torchmdnet.ops.inference import outside_modes
from torchmdnet.testing import cell_of_atoms, tiny_model

CELL = cell_of_atoms()
UNITS = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
PRIORS = {
    "none": None,
    "ZBL": {"ZBL": {"cutoff_distance": 4.0, **UNITS}},
    "D2": {"D2": {"cutoff_distance": 6.0, **UNITS}},
    "D3": {"D3": {"functional": "pbe", "cutoff_distance": 6.0, **UNITS}},
    "Atomref": {"Atomref": {"max_z": 20}},
}


def call(model):
    return model(CELL.z, CELL.pos, CELL.batch, CELL.box)


@pytest.mark.parametrize("radial", ["auto", "grid"])
@pytest.mark.parametrize(
    ("name", "prior"), [(name, "none") for name in ARCHITECTURES] + [("tensornet", prior) for prior in PRIORS]
)
def test_made_or_called_inside(name: str, prior: str, radial: str) -> None:
    options = {"prior_model": PRIORS[prior], "radial": radial}
    outside = tiny_model(name, **options)
    expected = call(tiny_model(name, **options))
    with torch.inference_mode():
        made = tiny_model(name, **options)
        copies = [x.clone() for x in (CELL.z, CELL.pos, CELL.batch, CELL.box)]
        inside = [call(made), outside(*copies)]
        atomic = outside.per_atom(*copies)
    for found in (*inside, call(made), call(outside), outside(*copies)):
        torch.testing.assert_close(found, expected)
    assert not any(x.requires_grad for found in inside for x in found)
    assert torch.isfinite(atomic).all()
    made.train()
    call(made).forces.square().sum().backward()  # its weights can still be trained
    made.eval()
    made.derivative = False
    with torch.inference_mode():  # what is made from the weights and kept
        call(made)
    made.derivative = True
    torch.testing.assert_close(call(made), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_calculators_and_ensembles_inside(name: str) -> None:
    energy, forces = call(tiny_model(name))
    atoms = Atoms(CELL.z.numpy(), CELL.pos.numpy(), cell=CELL.box.numpy(), pbc=True)
    with torch.inference_mode():
        atoms.calc = TMDNETCalculator(tiny_model(name), dtype="float64", units="eV/A")
        assert atoms.get_potential_energy() == pytest.approx(float(energy))
        np.testing.assert_allclose(atoms.get_forces(), forces.numpy(), rtol=1e-7, atol=1e-9)
        external = External(tiny_model(name), CELL.z[None], dtype="float64")
        found = external.calculate(CELL.pos.clone()[None], CELL.box.clone())
        torch.testing.assert_close(found[1][0], forces)
        ensemble = Ensemble([tiny_model(name), tiny_model(name)])
        torch.testing.assert_close(call(ensemble)[1], forces)
    atoms.positions += 0.01
    assert np.isfinite(atoms.get_forces()).all()
    torch.testing.assert_close(external.calculate(CELL.pos[None], CELL.box)[1][0], forces)


def test_values_inside_containers_are_copied() -> None:
    @outside_modes
    def seen(*args, **kwargs):
        return args, kwargs

    with torch.inference_mode():
        x = torch.ones(2)
    plain = torch.zeros(1)
    (a, (b, c)), kwargs = seen(x, (x, plain), extra={"x": x})
    assert c is plain
    assert not any(value.is_inference() for value in (a, b, kwargs["extra"]["x"]))


@pytest.mark.parametrize("architecture", ["tensornet", "equivariant-transformer", "graph-network"])
@pytest.mark.parametrize("width", [6, 16])
def test_autocast_rounds_nothing_in_a_potential(architecture: str, width: int) -> None:
    model = tiny_model(architecture, embedding_dimension=width, num_heads=2).float()
    z, pos = torch.tensor([8, 1, 1, 6]), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    wanted = model(z, pos)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(z, pos)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
