"""Stress of a potential: sign, boxes a model carries, systems that have none."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.models.wrappers import AtomFilter
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.base import BasePrior
from torchmdnet.testing import cell_of_atoms, mixed_boxes, small_molecules, tiny_model

CELL = cell_of_atoms()


class Springs(BasePrior):
    """Energy k V, whose stress is k in every direction: a constant pressure of -k."""

    def __init__(self, k: float = 0.3, dataset=None) -> None:
        super().__init__()
        self.k = k

    def per_system(self, graph):
        assert graph.box is not None
        return self.k * torch.linalg.det(graph.box).abs()[:, None]


def stress_of(model, systems=CELL, **changes):
    z, pos, batch, box, q = systems._replace(**changes)
    return model(z, pos, batch, box, q, stress=True).stress.detach()


def test_tension_is_positive() -> None:
    model, with_springs = tiny_model("tensornet"), tiny_model("tensornet", prior_model=[f"{__name__}:Springs"])
    difference = stress_of(with_springs) - stress_of(model)
    torch.testing.assert_close(difference[0], 0.3 * torch.eye(3, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_a_box_the_model_carries_counts() -> None:
    model = tiny_model("tensornet", box_vecs=CELL.box.tolist())
    torch.testing.assert_close(stress_of(model, box=None), stress_of(tiny_model("tensornet")))


def test_a_box_counts_when_atoms_are_filtered() -> None:
    model = tiny_model("tensornet", box_vecs=CELL.box.tolist(), derivative=False)
    filtered = TorchMD_Net(AtomFilter(model.representation_model, 0), model.output_model, dtype=torch.float64)
    torch.testing.assert_close(stress_of(filtered, box=None), stress_of(model))


def test_a_stored_box_is_where_coulomb_energies_are_found_too() -> None:
    options = {"output_model": "ScalarPlusWeightedCoulomb", "q_weights": [1.0] * 3, "coulomb_cutoff": 5.0}
    here = stress_of(tiny_model("tensornet2", **options))
    stored = stress_of(tiny_model("tensornet2", box_vecs=CELL.box.tolist(), **options), box=None)
    torch.testing.assert_close(stored, here)


@pytest.mark.parametrize("box", [None, torch.zeros(3, 3, dtype=torch.float64)], ids=["none", "zeros"])
def test_molecules_have_no_stress(box) -> None:
    with pytest.raises(ValueError, match="stress: no system of the batch has three lattice vectors"):
        stress_of(tiny_model("tensornet"), small_molecules(), box=box)


def test_open_systems_of_a_mixed_batch_have_none() -> None:
    stress = stress_of(tiny_model("tensornet"), mixed_boxes())
    assert torch.isfinite(stress[0]).all()
    assert stress[1:].isnan().all()


def test_a_box_of_the_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"box has shape \(2, 3, 3\) but batch holds 1 systems"):
        stress_of(tiny_model("tensornet"), box=torch.stack([CELL.box, CELL.box]))


def test_a_stress_that_is_missing_does_not_spoil_gradients_in_training() -> None:
    model, systems = tiny_model("tensornet").train(), mixed_boxes()
    stress = model(systems.z, systems.pos, systems.batch, systems.box, systems.q, stress=True).stress
    stress[~stress.isnan()].square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


def test_a_representation_of_older_releases_has_a_stress() -> None:
    class Old(torch.nn.Module):
        def reset_parameters(self) -> None: ...

        def forward(self, z, pos, batch, box=None, q=None, s=None):
            return (pos[:1] - pos).square().sum(1, keepdim=True), None, z, pos, batch

    from torchmdnet.heads.base import OutputModel

    class FirstFeature(OutputModel):
        def per_atom(self, features, graph):
            return features.x[:, :1]

    model = TorchMD_Net(Old(), FirstFeature(), dtype=torch.float64)
    d = CELL.pos[:1] - CELL.pos
    torch.testing.assert_close(stress_of(model)[0], 2 * d.T @ d / torch.linalg.det(CELL.box).abs())
