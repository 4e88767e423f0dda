"""The page of faults counts the tries that the tests make."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from conftest import REPOSITORY, load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("build_docs_faults.py")


def test_the_page_is_up_to_date(tool) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/build_docs_faults.py"


def test_a_test_that_is_gone_is_noticed(tool) -> None:
    with pytest.raises(LookupError, match="has no test test_gone"):
        tool.tries_of("test_whole_files.py", "test_gone")


@pytest.mark.slow
def test_tries_are_what_pytest_collects(tool) -> None:
    tests = {
        (f, n) for faults in tool.FAULTS.values() for row in faults for f, names in row.tests.items() for n in names
    }
    files = sorted({f"tests/{file}" for file, _ in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "slow or not slow", *files]
    lines = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    collected = [line.partition("[")[0] for line in lines]
    wrong = {
        (file, name): (tool.tries_of(file, name), collected.count(f"tests/{file}::{name}"))
        for file, name in tests
        if tool.tries_of(file, name) != collected.count(f"tests/{file}::{name}")
    }
    assert not wrong
