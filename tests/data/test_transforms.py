"""Casting and the removal of reference energies, on samples and on batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch_geometric.data import Batch, Data

from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper

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
