"""Tables of numbers outlive the call that asks for them first."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchmdnet.ops.constants import Constant
from torchmdnet.testing import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_is_made_once_for_each_precision(dtype):
    table = Constant([1.0, 2.5])
    like = torch.zeros(1, dtype=dtype)
    assert table(like) is table(like)
    assert table(like).dtype == dtype
    assert table(like).tolist() == [1.0, 2.5]


def test_what_is_made_without_values_is_not_kept():
    table = Constant([1.0, 2.5])
    with FakeTensorMode(allow_non_fake_inputs=True):
        table(torch.zeros(1, dtype=torch.float16))
    assert table(torch.zeros(1, dtype=torch.float16)).tolist() == [1.0, 2.5]


def test_scripting_an_evaluated_model_leaves_other_models_as_they_were():
    z, pos = torch.tensor([8, 1, 1]), torch.eye(3)
    model = tiny_model("graph-network", precision=32, derivative=False)
    model(z, pos)
    torch.jit.script(model)
    energy, forces = tiny_model("equivariant-transformer", precision=32)(z, pos)
    assert torch.isfinite(energy).all()
    assert torch.isfinite(forces).all()


def test_positions_in_another_precision_are_refused():
    with pytest.raises(ValueError, match=r"pos is torch.float64, but the model computes in torch.float32"):
        tiny_model("equivariant-transformer", precision=32)(torch.tensor([8, 1, 1]), torch.eye(3).double())
