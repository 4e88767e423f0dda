"""Casting and the removal of reference energies, on samples and on batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch_geometric.data import Batch, Data

from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper
from torchmdnet.testing import cell_of_atoms, tiny_model

ATOMREF = torch.zeros(10, 1)
ATOMREF[[1, 6, 8], 0] = torch.tensor([-13.5, -1030.25, -2042.75])


def molecules():
    return [
        Data(z=torch.tensor([8, 1, 1]), pos=torch.zeros(3, 3), y=torch.tensor([[-2080.0]], dtype=torch.float64)),
        Data(z=torch.tensor([6, 1]), pos=torch.zeros(2, 3), y=torch.tensor([[-1044.0]], dtype=torch.float64)),
    ]


EXPECTED = [-2080.0 + 2042.75 + 27.0, -1044.0 + 1030.25 + 13.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_are_cast_and_integers_are_not(dtype):
    data = FloatCastDatasetWrapper(dtype)(Batch.from_data_list(molecules()))
    assert data.pos.dtype == data.y.dtype == dtype
    assert data.z.dtype == data.batch.dtype == torch.int64


def test_the_default_type_is_double():
    assert FloatCastDatasetWrapper()(molecules()[0]).pos.dtype == torch.float64


def test_reference_energies_leave_each_molecule():
    batch = EnergyRefRemover(ATOMREF)(Batch.from_data_list(molecules()))
    assert batch.y.shape == (2, 1)
    assert batch.y.dtype == torch.float64
    assert batch.y.reshape(-1).tolist() == EXPECTED


def test_one_sample_and_flat_labels_work_too():
    assert EnergyRefRemover(ATOMREF)(molecules()[0]).y.tolist() == [[EXPECTED[0]]]
    flat = Batch.from_data_list(molecules())
    flat.y = flat.y.reshape(-1)
    assert EnergyRefRemover(ATOMREF.reshape(-1))(flat).y.tolist() == EXPECTED


def test_data_without_energies_pass_unchanged():
    batch = Batch.from_data_list([Data(z=torch.tensor([1]), pos=torch.zeros(1, 3), neg_dy=torch.ones(1, 3))])
    assert "y" not in EnergyRefRemover(ATOMREF)(batch)


def test_the_data_that_are_passed_in_are_not_changed():
    batch = Batch.from_data_list(molecules())
    before = copy.deepcopy(batch)
    FloatCastDatasetWrapper(torch.float32)(EnergyRefRemover(ATOMREF)(batch))
    assert torch.equal(batch.y, before.y)
    assert batch.pos.dtype == before.pos.dtype


def test_transforms_can_be_sent_to_workers():
    again = pickle.loads(pickle.dumps(EnergyRefRemover(ATOMREF)))
    assert again(molecules()[0]).y.tolist() == [[EXPECTED[0]]]


CELL = cell_of_atoms()
assert CELL.box is not None
FAR = {"open": 1.0e5 + 0.0 * CELL.box, "cell": 10_000 * CELL.box, "slab": 10_000 * CELL.box}


def sample(kind: str, shift: float) -> Data:
    box = CELL.box.clone()
    if kind == "slab":
        box[2] = 0.0
    offset = shift * (FAR[kind][0] + FAR[kind][1])
    return Data(z=CELL.z, pos=CELL.pos + offset, **({} if kind == "open" else {"box": box[None]}))


def results(data: Data, model) -> list[torch.Tensor]:
    return list(model(data.z, data.pos, data.get("batch"), data.get("box"))[:2])


@pytest.mark.parametrize("kind", FAR)
def test_forces_far_away_are_those_near_by(kind: str) -> None:
    double = tiny_model("tensornet")
    model = copy.deepcopy(double).float()
    cast = FloatCastDatasetWrapper(torch.float32, brings_home=True)
    here, there = sample(kind, 0.0), sample(kind, 1.0)
    expected = results(here.clone(), double)
    mixed = Batch.from_data_list([here.clone(), there])
    moved = cast(mixed.clone())
    assert moved.pos.dtype == torch.float32
    num = len(CELL.z)
    assert torch.equal(moved.pos[:num], here.pos.float())  # beside a system that is moved
    assert torch.equal(cast(here.clone()).pos, here.pos.float())
    energy, forces = results(moved, model)
    for k in range(2):
        torch.testing.assert_close(energy[k : k + 1].double(), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(forces[k * num : (k + 1) * num].double(), expected[1], rtol=1e-4, atol=2e-4)
    rounded = FloatCastDatasetWrapper(torch.float32)(mixed.clone())
    assert torch.equal(rounded.pos, mixed.pos.float())


def test_double_precision_is_left_alone() -> None:
    data = sample("cell", 1.0)
    assert torch.equal(FloatCastDatasetWrapper(torch.float64, brings_home=True)(data.clone()).pos, data.pos)
