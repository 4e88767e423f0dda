"""The check for a GPU runs through on a CPU, ends stages that take too long, and finds what is off."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, load_tool

sys.path.insert(0, str(REPOSITORY / "tools"))
import gpu_check
import gpu_pack
import gpu_stages

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def dry_run(stage: str, folder: Path) -> list[dict[str, Any]]:
    results = folder / "results.jsonl"
    gpu_stages.run(gpu_stages.At(stage, results, None, is_dry=True, until=600))
    lines = lines_of(results)
    assert [line for line in lines if not line.get("ok", True)] == []
    return lines


@pytest.fixture
def tool() -> ModuleType:
    return load_tool("gpu_check.py")


# -------------------------------------------------------------------------------------------------- every stage, small


def test_the_machine_is_described(tmp_path) -> None:
    found = {line["fact"]: line["value"] for line in dry_run("environment", tmp_path)}
    assert found["compiled loops run"] is True
    assert found["copy, GB/s"] > 0.1


@pytest.mark.slow
def test_a_kernel_is_compiled_and_its_registers_are_counted(tmp_path) -> None:
    pytest.importorskip("triton.compiler")
    (row,) = dry_run("kernels", tmp_path)
    assert row["kernel"] == "edges.message"
    assert 16 < row["registers"] <= 255


def test_tests_are_run_and_counted(tmp_path) -> None:
    fact, check = dry_run("tests", tmp_path)
    assert "failed: none" in fact["value"]
    assert int(fact["value"].split()[0]) >= 2
    assert check["ok"]


@pytest.mark.parametrize("architecture", gpu_check.ARCHITECTURES)
def test_numbers_are_compared_with_those_of_the_cpu(architecture: str, tmp_path) -> None:
    checks = [line["check"] for line in dry_run(f"golden:{architecture}", tmp_path)]
    for told in ("grid, float64, gradients", "exact, float32, forces", "captured, energy", "calls with other forces"):
        assert any(told in check for check in checks), told
    assert any(check.startswith(f"{architecture}, 32-benzenes, 128 channels, float64") for check in checks)


def test_numbers_of_the_definitions_are_compared_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHMDNET_PLAIN_OPS", "1")
    monkeypatch.setattr("torchmdnet.ops.kernels.support._HAS_NUMBA", False)
    checks = [line["check"] for line in dry_run("definitions", tmp_path)]
    assert {check.partition(",")[0] for check in checks} == set(gpu_check.ARCHITECTURES)


@pytest.mark.slow
def test_what_the_sanitizer_looks_at_runs(tmp_path) -> None:
    results = tmp_path / "results.jsonl"
    gpu_stages.run(gpu_stages.At("sanitizer", results, None, is_dry=True, until=600))
    gpu_stages.run(gpu_stages.At("small", results, None, is_dry=True))
    assert not results.exists()


@pytest.mark.parametrize("stage", ["evaluation", "training", "others"])
def test_calls_are_timed(stage: str, tmp_path) -> None:
    rows = dry_run(stage, tmp_path)
    assert all(row["ms"] > 0 and row["atoms"] in (12, 22) for row in rows)
    assert {row.get("way") for row in rows} == ({None} if stage == "training" else {"call", "captured"})


def test_tiles_are_timed(tmp_path) -> None:
    pytest.importorskip("triton.language")
    (row,) = dry_run("sweep", tmp_path)
    assert all(row[name] > 0 for name in ("sum, ms", "gradients, ms", "table, ms"))


def test_every_stage_is_among_these() -> None:
    names = {stage.name.partition(":")[0] for stage in gpu_check.STAGES}
    assert names | {"small"} == set(gpu_stages.RUN)


def test_all_rounds_together_fit_into_eight_minutes() -> None:
    rounds = {stage.round for stage in gpu_check.STAGES}
    longest = [max(stage.limit for stage in gpu_check.STAGES if stage.round == number) for number in rounds]
    assert sum(longest) < 480


# ------------------------------------------------------------------------------------------------------------- failures


def test_numbers_that_are_off_are_found(tmp_path, monkeypatch) -> None:
    frozen = dict(np.load(gpu_stages.REPOSITORY / "tests/gates/frozen.npz"))
    frozen["tensornet/grid/ion/forces"] = 1.001 * frozen["tensornet/grid/ion/forces"]
    monkeypatch.setattr(gpu_stages.np, "load", lambda *_: frozen)
    results = tmp_path / "results.jsonl"
    gpu_stages.frozen_numbers(gpu_stages.At("golden:tensornet", results, None, is_dry=True), "tensornet")
    wrong = [line["check"] for line in lines_of(results) if not line["ok"]]
    assert wrong == ["tensornet, grid, float64, forces", "tensornet, grid, float32, forces"]


def test_a_part_that_fails_leaves_the_others(tmp_path) -> None:
    at = gpu_stages.At("evaluation", tmp_path / "results.jsonl", None, is_dry=True)
    with at.surviving("98304-water"):
        raise RuntimeError("out of memory\nand more")
    at.check("no number is no agreement", float("nan"), 1.0)
    failed, check = lines_of(at.results)
    assert failed["end"] == "98304-water failed"
    assert failed["tail"] == "RuntimeError: out of memory"
    assert check["ok"] is False


def run_stages(tool: ModuleType, folder: Path, *stages: Any, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
    results = folder / "results.jsonl"
    tool.run_all(stages, results, None, time.monotonic() + seconds, is_dry=False)
    return {line["stage"]: line for line in lines_of(results)}


def test_stages_are_ended_when_their_time_is_up_and_others_go_on(tool, tmp_path, monkeypatch) -> None:
    (tmp_path / "gpu_stages.py").write_text(
        "import sys, time\nprint('began', flush=True)\n"
        "time.sleep(600 if sys.argv[1] == 'slow' else 0)\nsys.exit(sys.argv[1] == 'wrong')\n"
    )
    monkeypatch.setattr(tool, "TOOLS", tmp_path)
    stages = [tool.Stage("slow", 2.0, 0), tool.Stage("wrong", 60.0, 0), tool.Stage("right", 60.0, 1)]
    found = run_stages(tool, tmp_path, *stages)
    assert {name: line["end"] for name, line in found.items()} == {
        "slow": "out of time",
        "wrong": "failed with 1",
        "right": "done",
    }
    assert found["slow"]["tail"] == "began"
    left = run_stages(tool, tmp_path, tool.Stage("late", 60.0, 0), seconds=1.0)
    assert left["late"]["end"] == "left out"


def test_the_command_writes_a_table_and_fails_without_a_gpu(tool, tmp_path, capsys) -> None:
    assert tool.main(["--only", "environment", "--out", str(tmp_path), "--dry-run"]) == 0
    text = (tmp_path / "gpu-check.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| environment | done |" in text
    wrong = [{"stage": "a", "check": "forces", "value": 0.5, "allowed": 0.1, "ok": False}]
    assert "- a: forces: 0.5, allowed 0.1" in tool.report([*wrong, {"stage": "a", "table": "T", "x": 1.23456}], 1.0)
    assert "| 1.235 |" in tool.report([{"stage": "a", "table": "T", "x": 1.23456}], 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "timing"], "no stage is called timing"),
        (["--pack", "/nowhere"], "/nowhere is no folder"),
        (["--install"], "there is no pack to install from"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tool, arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the pack


def test_missing_packages_are_installed_from_the_pack_and_no_others(tool, tmp_path, monkeypatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("numpy-9.9-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        (wheels / name).touch()
    commands = []
    monkeypatch.setattr(tool.subprocess, "run", lambda command, **_: commands.append(command))
    tool.install(tmp_path)
    assert [command[-1] for command in commands] == [str(wheels / "no_such_package-1.0-py3-none-any.whl")]
    assert "--no-index" in commands[0]


def test_numbers_of_the_pack_are_read(tmp_path) -> None:
    np.savez(tmp_path / "golden.npz", **{"tensornet/192-water/energy": np.ones(1)})
    assert gpu_pack.golden_numbers(tmp_path, ["tensornet"])["tensornet/192-water/energy"] == 1


def test_packages_of_the_pack_are_ones_that_this_one_needs() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text().lower()
    of_pydantic = {"pydantic-core", "annotated-types", "typing-inspection"}
    assert all(name in of_pydantic or f'"{name}>=' in text for name in gpu_pack.WHEELS)
