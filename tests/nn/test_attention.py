"""Attention layers refuse what cannot work, and one product makes both filters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchmdnet.errors import ConfigError
from torchmdnet.nn.attention import check_attention, radial_filters


def test_heads_must_share_the_channels_evenly() -> None:
    with pytest.raises(ConfigError, match=r"embedding_dimension=10 .* num_heads=4"):
        check_attention(10, 4, "both")


def test_an_unknown_influence_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'keys'"):
        check_attention(8, 4, "key")


@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize("has_values", [False, True])
def test_filters_equal_separate_layers(has_keys: bool, has_values: bool) -> None:
    keys = nn.Linear(5, 8) if has_keys else None
    values = nn.Linear(5, 24) if has_values else None
    rbf = torch.rand(7, 5)
    found = radial_filters(rbf, keys, values, nn.SiLU(), num_heads=2, head_dim=4)
    assert found.shape == (7, 4, 8)
    of_keys = torch.ones(7, 8) if keys is None else nn.functional.silu(keys(rbf))
    of_values = torch.ones(7, 24) if values is None else nn.functional.silu(values(rbf))
    torch.testing.assert_close(found[:, 0], of_keys)
    for head in range(2):
        for part in range(3):
            start = 4 * (3 * head + part)
            torch.testing.assert_close(found[:, 1 + part, 4 * head : 4 * head + 4], of_values[:, start : start + 4])
