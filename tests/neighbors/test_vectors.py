"""Vectors of pairs and edges, and their derivatives, in loops and in tensors."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.neighbors import along_edges, differences
from torchmdnet.testing import derivatives

I, J = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 2, 1, 1])
PAIR, SIGN = torch.tensor([4, 0, 1, 1, 2, 3]), torch.tensor([0, 1, -1, 1, 1, -1], dtype=torch.int8)


@pytest.mark.parametrize("order", [0, 3])
def test_loops_and_tensors_agree(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pos = torch.randn(3, 3, dtype=torch.float64).requires_grad_()
    vec = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    cases = [(lambda x: differences(x, I, J), [pos]), (lambda x: along_edges(x, PAIR, SIGN), [vec])]
    found = [derivatives(function, arguments, order) for function, arguments in cases]
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")
    expected = [derivatives(function, arguments, order) for function, arguments in cases]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_they_are_what_their_formulas_say() -> None:
    pos = torch.randn(3, 3)
    torch.testing.assert_close(differences(pos, I, J), pos[I] - pos[J])
    vec = torch.randn(5, 3)
    torch.testing.assert_close(along_edges(vec, PAIR, SIGN), SIGN[:, None] * vec[PAIR])


def test_nothing_makes_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    pos = torch.randn(3, 3, requires_grad=True)
    assert differences(pos, none, none).shape == (0, 3)
    (gradient,) = torch.autograd.grad(differences(pos, none, none).sum(), pos)
    assert not gradient.any()
