"""The benchmarks run, take turns fairly and write what they found; no time is judged here."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # its scripts find one another there, under any interpreter

import compare
import report
import run
import sides
import systems
import workloads

TINY = {**workloads.OPTIONS["tensornet"], "embedding_dimension": 8, "num_layers": 1, "num_rbf": 4}
QUICK = compare.Schedule(rounds=2, seconds=0.01, timeout=120)


@pytest.fixture
def tiny_options(monkeypatch):
    monkeypatch.setitem(workloads.OPTIONS, "tensornet", TINY)


@pytest.fixture
def twins():
    """Two sides that run the same package."""
    return [sides.ours(), sides.Side("reference", sys.executable, str(REPOSITORY))]


def row_of(ours, reference, cpu=1.0, threads=1, **kwargs):
    """A row with the given wall-clock seconds, of which the processor worked the part ``cpu``."""
    times = {
        "ours": compare.Times(wall=ours, cpu=[cpu * t for t in ours], peak_memory=2**20),
        "reference": compare.Times(wall=reference, cpu=[cpu * t for t in reference], peak_memory=2**21),
    }
    return compare.Row("tensornet/benzene/forces", threads, times, **kwargs)


# Systems


def test_every_workload_has_a_name_of_its_own_and_a_system_that_exists():
    found = workloads.all_workloads()
    assert len({workload.name for workload in found}) == len(found)
    assert {workload.order["system"] for workload in found if "system" in workload.order} == set(systems.SYSTEMS)


def test_names_of_systems_count_their_atoms():
    assert len(systems.benzenes(1).z) == 12
    batch = systems.SYSTEMS["32-benzenes"]()
    assert batch.num_systems == 32
    assert len(batch.z) == len(batch.pos) == len(batch.batch) == 384
    for copies, name in enumerate(("192-water", "1536-water"), start=1):
        box = systems.SYSTEMS[name]()
        assert len(box.z) == len(box.pos) == int(name.split("-")[0])
        assert box.box[0] == (copies * 12.42, 0.0, 0.0)


def test_water_molecules_keep_their_shape_and_their_distance():
    water = systems.water()
    for first in range(0, 192, 3):
        oxygen, *hydrogens = water.pos[first : first + 3]
        assert [math.dist(oxygen, hydrogen) for hydrogen in hydrogens] == pytest.approx([0.9572, 0.9572])
        assert math.dist(*hydrogens) == pytest.approx(2 * 0.9572 * math.sin(math.radians(52.26)))
    gaps = (
        math.sqrt(sum(((a - b + 6.21) % 12.42 - 6.21) ** 2 for a, b in zip(water.pos[i], water.pos[j], strict=True)))
        for i, j in itertools.combinations(range(192), 2)
        if i // 3 != j // 3
    )
    assert min(gaps) > 1.1


def test_systems_are_the_same_each_time_and_frames_are_not():
    assert systems.water() == systems.water()
    water = systems.water()
    assert water.frame(0) == water.frame(0) != water.frame(1)
    assert max(map(math.dist, water.frame(0), water.pos)) < 0.02 * math.sqrt(3)


# What is made of the numbers


def test_ratios_pair_the_rounds():
    row = row_of(ours=[1.0, 2.0, 4.0], reference=[3.0, 4.0, 20.0])
    assert row.ratios() == [3.0, 2.0, 5.0]
    assert report.table_line(row).split("|")[3:5] == [" 3.00             ", " 2.00 – 5.00     "]


def test_a_side_that_failed_midway_keeps_the_rounds_it_has():
    row = row_of(ours=[1.0, 1.0], reference=[3.0])
    row.sides["reference"].failed = "out of memory"
    assert row.ratios() == [3.0]
    assert report.warnings([row]) == ["tensornet/benzene/forces: reference failed: out of memory"]


@pytest.mark.parametrize(("cpu", "told"), [(0.7, "machine was busy"), (1.5, "more than one processor"), (0.95, None)])
def test_clocks_that_disagree_are_pointed_out(cpu, told):
    found = report.warnings([row_of([1.0], [1.0], cpu=cpu)])
    assert [told in warning for warning in found] == ([True] if told else [])
    assert report.warnings([row_of([1.0], [1.0], cpu=cpu, threads=2)]) == []


def test_deviations_are_relative_to_the_largest_value():
    found = compare.deviations({"energy": [1.0, -4.0]}, {"energy": [1.2, -4.0]})
    assert found == {"energy": pytest.approx(0.05)}
    assert not row_of([1.0], [1.0], deviations=found).agrees


@pytest.mark.parametrize("other", [[1.0], [1.0, math.nan], []])
def test_predictions_that_cannot_be_compared_do_not_agree(other):
    assert compare.deviations({"energy": [1.0, 2.0]}, {"energy": other}) == {"energy": math.inf}


def test_sides_take_turns_until_the_budget_is_spent():
    order = []
    answer = {"wall": [1.0], "cpu": [1.0], "peak_memory": 1}
    measure = {side: lambda _, side=side: order.append(side) or answer for side in ("ours", "reference")}
    row = row_of([], [])
    compare.take_turns(measure, row, compare.Schedule(rounds=5, budget=0.0))
    assert order == ["ours", "reference"] * 2
    assert row.ratios() == [1.0, 1.0]


# Processes


@pytest.mark.parametrize("task", ["forces", "train"])
def test_equal_packages_agree_exactly(task, tiny_options, twins, tmp_path):
    row = compare.compare_workload(workloads.computing("tensornet", "benzene", task), 1, twins, QUICK, tmp_path)
    assert [times.failed for times in row.sides.values()] == [None, None]
    assert len(row.ratios()) == len(row.ratios("cpu")) == 2
    expected = {"energy", "forces", "gradient"} if task == "train" else {"energy", "forces"}
    assert row.deviations == dict.fromkeys(expected, 0.0)
    assert all(times.peak_memory > 2**20 for times in row.sides.values())
    assert row.facts["ours"]["num_atoms"] == 12
    json.dumps(row.as_json())


def test_loaders_serve_every_sample(tmp_path):
    row = compare.compare_workload(workloads.loading(256), 1, [sides.ours()], QUICK, tmp_path)
    assert row.sides["ours"].failed is None
    assert row.facts["ours"]["num_samples"] == 4000
    assert "samples/s" in report.table_line(row)


def test_a_workload_that_cannot_run_says_why(tiny_options, twins, tmp_path):
    (tmp_path / "tensornet.ckpt").write_bytes(b"not a checkpoint")
    workload = workloads.computing("tensornet", "benzene", "forces")
    row = compare.compare_workload(workload, 1, twins[:1], QUICK, tmp_path)
    assert "CheckpointError" in row.sides["ours"].failed
    assert "failed" in report.table_line(row)


def test_a_worker_that_does_not_answer_is_ended(tiny_options, tmp_path):
    order = workloads.computing("tensornet", "benzene", "forces").order | {"folder": str(tmp_path)}
    with pytest.raises(sides.Failure, match="no answer within"):
        sides.Worker(sides.ours(), order | {"threads": 1, "memory_limit": None}, timeout=0.1)


def test_start_up_measures_the_processor_time_of_the_process():
    times = sides.ours().start_up(["-c", "sum(range(10**7))"], timeout=60)
    assert 0.0 < times["cpu"][0] < 2 * times["wall"][0]
    with pytest.raises(sides.Failure, match="ZeroDivisionError"):
        sides.ours().start_up(["-c", "1/0"], timeout=60)
    with pytest.raises(sides.Failure, match="not finished within"):
        sides.ours().start_up(["-c", "import time; time.sleep(30)"], timeout=0.2)


# The command


def test_the_command_without_a_reference_explains_how_to_get_one_and_writes_results(tmp_path):
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks/run.py"),
        "--only",
        "startup/import,tensornet/benzene/forces",
    ]
    command += ["--rounds", "2", "--seconds", "0.01", "--out", str(tmp_path)]
    end = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0, end.stdout + end.stderr
    assert "pip install torchmd-net==3.1.0" in end.stdout
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert [row["name"] for row in results["rows"]] == ["startup/import", "tensornet/benzene/forces"]
    assert all(len(row["sides"]["ours"]["wall"]) == 2 for row in results["rows"])
    assert results["machine"]["cpu"]
    assert results["machine"]["cores"] >= 1
    assert results["rows"][1]["facts"]["ours"]["torch"]
    assert "tensornet/benzene/forces" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "tensornet/methane/*"], "nothing is called 'tensornet/methane/*'"),
        (["--threads", "many"], "'many' are not numbers"),
        (["--reference", "/nowhere/python"], "is not a Python interpreter"),
        (["--rounds", "0"], "a positive number is needed"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_listing_leaves_the_optional_workloads_to_those_who_ask(capsys):
    assert run.main(["--list"]) == 0
    usual = capsys.readouterr().out.split()
    assert run.main(["--list", "--all"]) == 0
    everything = capsys.readouterr().out.split()
    assert set(usual) < set(everything)
    assert "tensornet/192-water/train" in usual
    assert "graph-network/192-water/train" in set(everything) - set(usual)
