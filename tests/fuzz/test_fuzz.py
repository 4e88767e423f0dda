"""Settings, files, commands and environments of any kind end in a right result or in an error of the package.

A few inputs of each kind here, always the same, and every failure that was found by ``make fuzz``, which tries more.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")  # of the extra "test"
sys.path.insert(0, str(Path(__file__).parent))

import inputs
import program_inputs
import programs
import targets
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from isolate import isolated


def few(number: int) -> settings:
    """A number of inputs, always the same."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


SHORT = few(12)


@pytest.fixture(autouse=True, scope="module")
def _files() -> None:
    """Make what is damaged later, which draws random numbers, before hypothesis draws its own."""
    programs.finished_run()
    programs.cache_files()
    for suffix in (".ckpt", ".safetensors", ".zip"):
        targets.model_bytes(suffix)


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


def _holds(target: Callable[..., bool], *given_input: Any) -> None:
    """Call a target in a process of its own."""
    outcome = isolated(functools.partial(target, *given_input))
    assert not outcome.failed, f"{outcome.kind} {outcome.place}\n{outcome.text}"


@few(10)
@given(program_inputs.commands())
def test_any_command_ends_with_a_result_or_a_message(line):
    _holds(programs.command, *line)


@few(5)
@given(program_inputs.trainings())
def test_any_small_training_ends_with_a_result_or_a_message(run):
    _holds(programs.training, *run)


@few(4)
@given(program_inputs.runs())
def test_any_folder_of_a_run_is_continued_or_refused(run):
    _holds(programs.continued, *run)


@few(12)
@given(program_inputs.caches())
def test_any_damage_to_the_cache_leaves_the_data_as_they_are(damaged):
    _holds(programs.cache, damaged)


@few(4)
@given(program_inputs.surroundings().map(lambda found: (*found[:2], False)))
def test_any_environment_is_taken_or_refused(surroundings):
    _holds(programs.environment, *surroundings)


@pytest.mark.parametrize("name", ["a b", "-é\n[*]"])
def test_a_run_may_be_in_a_folder_of_any_name(name):
    _holds(programs.named, name)


def _settings(**changes: Any) -> bytes:
    return yaml.safe_dump({**programs.TRAINING, **changes}).encode()


#: What was found once: a target and its input.
FOUND: list[tuple[Callable[..., bool], tuple[Any, ...]]] = [
    (programs.command, (["convert", "model.zip", "model.zip", "new.zip"], {}, {}, False)),
    (programs.training, (_settings(max_z=10**9), {}, {})),
    (
        programs.training,
        (
            _settings(
                model="tensornet2",
                output_model="ScalarPlusWeightedCoulomb",
                q_dim=1,
                q_weights=[1, 1],
                coulomb_cutoff=1e-300,
            ),
            {},
            {},
        ),
    ),
    (programs.command, (["data", "water.xyz", "water.extxyz"], {}, {}, False)),
    (programs.training, (_settings(atom_filter=6), {}, {})),
    (programs.continued, ("run", {"errors.csv": b"\xff\xfe"}, [], {})),
    (programs.continued, ("~", {}, [], {})),
    (programs.command, (["export", "model.safetensors", "a/../b.pt2"], {}, {}, False)),
    (programs.training, (_settings(dataset_root=int("9" * 400)), {}, {})),
    (
        programs.command,
        (["bench", "model.ckpt", "--seconds=0.01", "--threads=1", "--replicate", "9999"], {}, {}, False),
    ),
    (programs.command, (["convert", "model.zip", "new.zip", "--level-of-theory", "\ud800"], {}, {}, False)),
]


@pytest.mark.parametrize(("target", "given_input"), FOUND, ids=range(len(FOUND)))
def test_a_program_that_failed_once_ends_with_a_result_or_a_message(target, given_input):
    _holds(target, *given_input)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: bytearray(8 * 2**30), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "status -11"),
        (lambda: [][1], "IndexError"),
        (lambda: sys.exit(0), "SystemExit"),
        (lambda: subprocess.Popen(["sleep", "60"]) and True, "Outlived"),
    ],
)
def test_what_a_call_does_to_its_process_is_a_failure(call, kind, monkeypatch):
    monkeypatch.setattr("isolate.LINGER", 0.2)
    assert isolated(call).kind == kind


def test_a_call_that_waits_for_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr("isolate.IDLE", 0.6)
    assert isolated(lambda: time.sleep(60) or True).kind == "idle for 0.6 s"


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
def test_two_minutes_of_other_inputs_find_nothing():
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, str(script), "--seconds", "120"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
