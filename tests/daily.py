"""Which of many alike cases ``make test`` tries; ``make test-slow`` tries the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["daily", "rarely"]


def daily(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """The values of a parametrization, all but the chosen ones marked slow.

    Raises:
        ValueError: If a chosen one is not among them.
    """
    values = list(values)
    if missing := [value for value in chosen if value not in values]:
        raise ValueError(f"{missing} are not among {values}")
    return [value if value in chosen else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def rarely(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """The values of a parametrization, the chosen ones marked slow."""
    values = list(values)
    if missing := [value for value in chosen if value not in values]:
        raise ValueError(f"{missing} are not among {values}")
    return daily(values, *(value for value in values if value not in chosen))
