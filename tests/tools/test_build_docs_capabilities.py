"""The page of what goes with what is what its tool writes."""

from __future__ import annotations

from types import ModuleType

import pytest
from conftest import load_tool

from torchmdnet.testing import product


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("build_docs_capabilities.py")


def test_the_page_is_up_to_date(tool) -> None:
    """Combinations are built here; that they hold is what tests/test_product.py tries."""
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.page(try_all=False), "run: python tools/build_docs_capabilities.py"


def test_a_statement_that_fails_shows(tool, monkeypatch) -> None:
    one = {"tensornet": product.ARCHITECTURES_TRIED["tensornet"]}
    monkeypatch.setattr(tool, "ARCHITECTURES_TRIED", one)
    monkeypatch.setattr(tool, "HEADS", {"Scalar": None})
    monkeypatch.setattr(tool, "PRIORS_TRIED", {"none": None})
    monkeypatch.setattr(tool, "untrue_of", lambda options: {"forces_are_slopes_of_the_energy": "1 is not 2"})
    told: list[str] = []
    page = tool.page(try_all=True, tell=told.append)
    assert "| `Scalar` | ✗ |" in page
    assert told == ["tensornet, Scalar, none: forces are slopes of the energy: 1 is not 2"]
