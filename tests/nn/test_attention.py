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
    of_keys, of_values = radial_filters(rbf, keys, values, nn.SiLU())
    for result, linear in ((of_keys, keys), (of_values, values)):
        if linear is None:
            assert result is None
        else:
            torch.testing.assert_close(result, nn.functional.silu(linear(rbf)))
