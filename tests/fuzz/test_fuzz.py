"""Settings, structures and model files of any content end in a right result or in an error of the package.

A few inputs of each kind here, always the same, and every failure that was found by ``make fuzz``, which tries more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")  # of the extra "test"
sys.path.insert(0, str(Path(__file__).parent))

import inputs
import targets
from hypothesis import HealthCheck, Phase, given, settings

SHORT = settings(
    max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import logging

    monkeypatch.setenv("TORCHMDNET_CACHE", "unused")  # put back afterwards; every input has its own
    monkeypatch.delenv("TORCHMDNET_LOG_DIR", raising=False)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@SHORT
@given(inputs.settings)
def test_any_settings_file_is_read_or_refused(content):
    targets.settings(content)


@SHORT
@given(inputs.command_lines())
def test_any_command_line_is_read_or_refused(words):
    targets.words(words)


@SHORT
@given(inputs.structures())
def test_any_file_of_structures_is_examined_or_refused(given_file):
    targets.structures(*given_file)


@SHORT
@given(inputs.checkpoints())
def test_any_model_file_is_loaded_or_refused(given_file):
    targets.checkpoint(*given_file)


#: What was found once; the text of a valid file stays itself where a part of it is replaced.
STRUCTURES = [
    (b"-3" + targets.XYZ.encode()[1:], ".xyz"),
    (b"9" * 400 + b"\nc\n", ".xyz"),
    (targets.EXTXYZ.replace("0.7 -0.5", "1e300 1e300").encode(), ".extxyz"),
    (targets.EXTXYZ.replace("0.7 -0.5", "1e30 1e30").encode(), ".extxyz"),
    (targets.EXTXYZ.replace("R:3", "R:²").encode().rstrip(), ".extxyz"),
    (targets.EXTXYZ.replace("7.0", "1e-3").encode(), ".extxyz"),
    (b"0\n\n", ".xyz"),
    (b"", ".h5"),
    (targets.hdf5(pos=targets.arrays()["R"], types=targets.arrays()["z"])[:900], ".h5"),
    (targets.npz(z=targets.arrays()["z"], R=targets.arrays()["R"], pbc=targets.arrays()["R"]), ".npz"),
    (targets.npz(z=targets.arrays()["z"], R=targets.arrays()["R"] * 1e30), ".npz"),
]


@pytest.mark.parametrize(("content", "suffix"), STRUCTURES, ids=range(len(STRUCTURES)))
def test_a_file_of_structures_that_was_trouble_is_examined_or_refused(content, suffix):
    targets.structures(content, suffix)


HYPER_PARAMETERS: list[Any] = [
    ["num_layers"], ["embedding_dimension"], ["model"], ["output_model"], ["num_rbf", "cutoff_upper"], 3, "text", None,
    [],     {"num_layers": 10**9}, {"embedding_dimension": 10**9}, {"embedding_dimension": "a"}, {"num_layers": None},
    {"activation": []}, {"num_rbf": {}}, {"cutoff_upper": float("nan")}, {"cutoff_upper": "x"}, {"atom_filter": []},
    {"precision": "x"}, {"prior_model": 3}, {"prior_model": [{"ZBL": 3}]}, {"box_vecs": "x"}, {"model": []},
    {"model": "os:system"}, {"output_model": {}}, {"properties": [3]}, {"max_z": -1}, {"reduce_op": None},
]  # fmt: skip


@pytest.mark.parametrize("changed", HYPER_PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_checkpoint_with_wrong_options_is_refused(changed):
    targets.checkpoint(targets.with_hyper_parameters(changed), ".ckpt")


@pytest.mark.slow
def test_half_a_minute_of_other_inputs_finds_nothing():
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, str(script), "--seconds", "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
