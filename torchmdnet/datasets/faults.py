"""Whether readers refuse numbers that are not finite, as training needs, or pass them on to be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["faults_are_refused", "passing_over_faults"]

_refuse: ContextVar[bool] = ContextVar("refuse_faults", default=True)


def faults_are_refused() -> bool:
    """Whether a reader should raise at a number that is not finite."""
    return _refuse.get()


@contextmanager
def passing_over_faults() -> Iterator[None]:
    """Let readers hand out NaN and infinity, so that all of them can be found."""
    token = _refuse.set(False)
    try:
        yield
    finally:
        _refuse.reset(token)
