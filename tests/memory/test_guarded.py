"""No compiled loop reads or writes beside its arrays; each runs in a process that may die of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import torchmdnet
from torchmdnet.ops.kernels.loops import algebra

HERE = Path(__file__).parent
KERNELS = Path(torchmdnet.__file__).parent / "ops" / "kernels"
#: What glibc offers to find writes beside the memory that loops ask for themselves; elsewhere it is ignored.
CHECKED_MEMORY = {"LD_PRELOAD": "libc_malloc_debug.so.0", "GLIBC_TUNABLES": "glibc.malloc.check=3"}


def run(*command: str, timeout: int = 1200, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", **variables}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def drive(*, variables: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """The summary of :mod:`guarded`."""
    variables = CHECKED_MEMORY if variables is None else variables
    done = run(str(HERE / "guarded.py"), json.dumps(options), **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_loop_stays_within_its_arrays_and_makes_the_numbers_of_its_definition() -> None:
    found = drive(widths=[16], precisions=[64])
    assert found["missing"] == []
    assert found["refused"] == []
    assert found["comparisons"] > 1000


@pytest.mark.slow
def test_so_do_two_threads() -> None:
    assert drive(widths=[9], precisions=[64], num_threads=2, neighbors=False)["refused"] == []


@pytest.mark.slow
def test_rows_shorter_than_a_vector_are_refused_before_anything_is_written() -> None:
    found = drive(widths=[3], precisions=[32], is_narrow=True, models=["tensornet"], neighbors=False)
    assert {
        "algebra.normalize",
        "algebra.gate",
        "message_form.message_features",
        "edge_network.join",
        "attention_form.contract_edges",
    } <= {".".join(name.split(".")[-2:]) for name in found["refused"]}


@pytest.mark.slow
def test_models_of_rows_that_fill_no_vector_give_the_numbers_of_the_definitions() -> None:
    assert drive(widths=[1, 3, 17], precisions=[32], operators=False, neighbors=False)["comparisons"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 41, 8))
def test_all_widths(first: int) -> None:
    assert drive(widths=[*range(first, first + 8)], both_ends=True)["refused"] == []


@pytest.mark.slow
@pytest.mark.parametrize("widths", [[63, 65], [127, 130]], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_wide_rows(widths: list[int], num_threads: int) -> None:
    assert drive(widths=widths, both_ends=True, num_threads=num_threads)["refused"] == []


@pytest.mark.slow
def test_all_narrow_widths_are_refused() -> None:
    drive(widths=[*range(1, 8)], is_narrow=True, both_ends=True)


@pytest.mark.slow
def test_no_loop_reaches_beyond_an_array_where_every_access_is_checked() -> None:
    assert drive(variables={"TORCHMDNET_CHECK_LOOPS": "1"}, widths=[9, 16])["missing"] == []


def test_checked_loops_raise_beyond_the_end_of_an_array() -> None:
    program = """
import numpy as np
from torchmdnet.ops.kernels.loops import algebra, filters
X, few = np.ones((2, 9, 8)), np.ones((1, 24))
calls = (
    lambda: algebra.part_norms(0, X, few),  # stores
    lambda: algebra.part_norms_backward(0, X, few, X.copy()),  # loads
    lambda: filters.fold(np.ones((2, 3)), np.array([0, 4]), np.ones((3, 3))),  # looks up
)
for call in calls:
    try:
        call()
    except IndexError:
        print("refused")
"""
    done = run("-c", program, TORCHMDNET_CHECK_LOOPS="1")
    assert done.stdout.split() == ["refused"] * 3, done.stderr


@pytest.mark.parametrize("channels", [1, 3])
def test_a_loop_says_that_a_row_is_too_short(channels: int) -> None:
    X, out = np.ones((2, 9, channels)), np.zeros((2, 9, channels))
    with pytest.raises(IndexError, match="shorter than the vectors"):
        algebra.normalize(0, X, out)
    assert not out.any()


def test_only_one_place_decides_where_vectors_begin_and_how_many_numbers_they_hold() -> None:
    for path in KERNELS.rglob("*.py"):
        text = path.read_text()
        if path.name != "simd.py":
            assert not re.search(r"min\([^()]*-[^()]*\b(W|lanes|many)\b", text), path.name
        for function in re.split(r"(?m)^(?=@)", text):
            if re.match(r"@compiled", function) and re.search(r"\bfit\(", function):
                assert "lanes_that_fit(" in function, function.splitlines()[1]
