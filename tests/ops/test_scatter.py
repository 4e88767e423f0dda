"""Reductions keep the zero that takes part."""

from __future__ import annotations

import pytest
import torch

from torchmdnet.ops.scatter import scatter

SRC = torch.tensor([[2.0], [4.0], [-6.0]])
INDEX = torch.tensor([0, 0, 2])


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("sum", [6.0, 0.0, -6.0]),
        ("add", [6.0, 0.0, -6.0]),
        ("mean", [2.0, 0.0, -3.0]),
        ("max", [4.0, 0.0, 0.0]),
        ("min", [0.0, 0.0, -6.0]),
        ("mul", [0.0, 0.0, 0.0]),
    ],
)
def test_stored_models_were_trained_with_these_numbers(reduce: str, expected: list[float]) -> None:
    assert scatter(SRC, INDEX, reduce=reduce)[:, 0].tolist() == expected
    assert scatter(SRC.T, INDEX, dim=-1, dim_size=3, reduce=reduce)[0].tolist() == expected


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("average", [3.0, 0.0, -6.0]),
        ("maximum", [4.0, 0.0, -6.0]),
        ("minimum", [2.0, 0.0, -6.0]),
        ("product", [8.0, 0.0, -6.0]),
    ],
)
def test_long_words_mean_what_they_say(reduce: str, expected: list[float]) -> None:
    assert scatter(SRC, INDEX, reduce=reduce)[:, 0].tolist() == expected


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduce: 'median'"):
        scatter(SRC, INDEX, reduce="median")
