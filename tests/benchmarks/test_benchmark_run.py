"""The benchmarks run, take turns fairly and write what they found; no time is judged here."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))  # its scripts find one another there, under any interpreter

import compare
import floors
import plot
import precision
import report
import run
import scaling
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


def test_the_models_of_rows_with_priors_can_be_built():
    from torchmdnet.build import create_model

    names = [workload.name for workload in workloads.all_workloads()]
    for name, options in workloads.WITH_PRIORS.items():
        assert f"{name}/192-water/forces" in names
        model = create_model({**options, "embedding_dimension": 8, "num_layers": 1})
        assert [type(prior).__name__ for prior in model.prior_model] == ["ZBL"]


def test_names_of_systems_count_their_atoms():
    assert len(systems.benzenes(1).z) == 12
    batch = systems.SYSTEMS["32-benzenes"]()
    assert batch.num_systems == 32
    assert len(batch.z) == len(batch.pos) == len(batch.batch) == 384
    for sites, name in ((4, "192-water"), (8, "1536-water"), (9, "2187-water")):
        box = systems.SYSTEMS[name]()
        assert len(box.z) == len(box.pos) == int(name.split("-")[0])
        assert box.box[0] == pytest.approx((sites * 3.105, 0.0, 0.0))


def test_the_dipeptide_has_the_bonds_and_the_handedness_of_alanine():
    from ase import Atoms
    from ase.data import covalent_radii

    molecule = systems.dipeptide()
    atoms = Atoms(numbers=molecule.z, positions=molecule.pos)
    assert atoms.get_chemical_formula() == "C6H12N2O2"
    radii = covalent_radii[atoms.numbers]
    bonded = atoms.get_all_distances() < 1.2 * (radii[:, None] + radii)
    assert bonded.sum() - len(atoms) == 2 * 21  # a molecule without rings
    assert [atoms.get_dihedral(*four) for four in ((1, 3, 5, 6), (3, 5, 6, 13))] == pytest.approx([210, 150])
    assert [atoms.get_dihedral(*four) for four in ((0, 1, 3, 5), (5, 6, 13, 15))] == pytest.approx([180, 180])
    n, c, beta = (atoms.get_distance(5, other, vector=True) for other in (3, 6, 8))
    assert np.cross(-n, c) @ beta < 0  # L


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


def test_the_table_tells_how_many_cores_were_at_work():
    name = next(
        place for place, column in enumerate(report.table_header().splitlines()[0].split("|")) if "cores" in column
    )
    assert report.table_line(row_of([1.0], [1.0], cpu=1.75, threads=2)).split("|")[name].strip() == "1.75"
    assert report.table_line(row_of([], [])).split("|")[name].strip() == "–"


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


@pytest.mark.parametrize("task", ["forces", pytest.param("train", marks=pytest.mark.slow)])
def test_equal_packages_agree_exactly(task, tiny_options, twins, tmp_path):
    row = compare.compare_workload(workloads.computing("tensornet", "benzene", task), 1, twins, QUICK, tmp_path)
    assert [times.failed for times in row.sides.values()] == [None, None]
    assert len(row.ratios()) == len(row.ratios("cpu")) == 2
    expected = {"energy", "forces", "gradient"} if task == "train" else {"energy", "forces"}
    assert row.deviations == dict.fromkeys(expected, 0.0)
    assert all(times.peak_memory > 2**20 for times in row.sides.values())
    assert row.facts["ours"]["num_atoms"] == 12
    json.dumps(row.as_json())


@pytest.mark.slow
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
    order = workloads.computing("tensornet", "benzene", "forces").order | {"folder": str(tmp_path), "device": "cpu"}
    with pytest.raises(sides.Failure, match="no answer within"):
        sides.Worker(sides.ours(), order | {"threads": 1, "memory_limit": None}, timeout=0.1)


def test_start_up_measures_the_processor_time_of_the_process():
    times = sides.ours().start_up(["-c", "sum(range(10**7))"], timeout=60)
    assert 0.0 < times["cpu"][0] < 2 * times["wall"][0]
    with pytest.raises(sides.Failure, match="ZeroDivisionError"):
        sides.ours().start_up(["-c", "1/0"], timeout=60)
    with pytest.raises(sides.Failure, match="not finished within"):
        sides.ours().start_up(["-c", "import time; time.sleep(30)"], timeout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dynamics", "external"])
def test_equal_packages_agree_exactly_through_calculators(task, tiny_options, twins, tmp_path):
    row = compare.compare_workload(workloads.computing("tensornet", "dipeptide", task), 1, twins, QUICK, tmp_path)
    assert [times.failed for times in row.sides.values()] == [None, None]
    assert row.deviations == {"energy": 0.0, "forces": 0.0}
    assert row.facts["ours"]["num_atoms"] == 22


# Growth


@pytest.mark.slow
def test_growth_is_told_for_each_size(tiny_options, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "MANY_ATOMS", 100)  # memory of few atoms tells nothing
    sizes = ("dipeptide", "192-water")
    points = list(scaling.grow(sides.ours(), sizes, 1, "cpu", QUICK, tmp_path))
    assert [point.num_atoms for point in points] == [22, 192]
    assert all(point.wall and point.memory > 0 for point in points)
    lines = [line.split(" | ") for line in scaling.table(points).splitlines()[2:4]]
    assert [line[2] for line in lines] == ["22", "192"]
    assert [line[6] == "– |" for line in lines] == [True, False]


def point_of(num_atoms, seconds, memory=0):
    return scaling.Point("ours", 1, "water", num_atoms, wall=[seconds], cpu=[seconds], memory=memory)


def test_growth_ends_before_steps_that_would_take_too_long_or_too_much():
    assert scaling._would_take(None, 10**9, 1) == ""
    assert scaling._would_take(point_of(1536, 1.0), 12288, None) == ""
    assert scaling._would_take(point_of(1536, 8.0), 12288, None) == "a step would take 64 s"
    assert scaling._would_take(point_of(1536, 1.0, 3 * 10**9), 12288, 10**10) == "it would need 24 GB"


def test_other_packages_are_found_by_what_their_environment_has(tmp_path, monkeypatch):
    (tmp_path / "torchani.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [(side.name, side.package) for side in sides.others(sys.executable)] == [("TorchANI", "torchani")]
    monkeypatch.setattr(sides, "OTHERS", {"no_such_package": "None"})
    with pytest.raises(FileNotFoundError, match="has none of no_such_package"):
        sides.others(sys.executable)


# Precision


def test_single_precision_is_close_to_double_and_sums_in_double_are_exact():
    rows = precision.deviations("192-water", "cpu")
    assert [row["way"] for row in rows] == list(precision.WAYS)
    assert rows[0]["force"] == 0.0
    assert 0 < rows[1]["force"] < 1e-4 * rows[1]["largest_force"]
    one_by_one, returned, exact = (row["error"] for row in precision.sums(1000))
    assert one_by_one > returned
    assert exact == 0.0
    assert returned <= 2043 * 3000 * 2**-24


# Floors

MACHINE = floors.Machine(1e9, {"second cache": 4e9, "third cache": 2e9, "memory": 1e9})


def test_a_floor_is_set_by_arithmetic_memory_or_gathering():
    arrays = {"out": np.zeros(10**6, np.float32)}
    assert floors.floors("mix", 10**6, arrays, MACHINE) == {"arithmetic": 2e-3, "third cache": 2e-3}
    arrays |= {
        "sender": np.zeros(1000, np.int64),
        "table": np.zeros((10, 25), np.float32),
        "coef": np.zeros((500, 6), np.float32),
        "X": np.zeros((20, 50), np.float32),
    }
    found = floors.floors("message_sum", 10**6, arrays, MACHINE)
    assert found["gathering"] == pytest.approx(1000 * (6 * 100 + 200) / 4e9)


def test_loops_and_matrix_products_of_an_evaluation_are_watched(tiny_options):
    seconds, kernels = floors.profile("tensornet", "192-water", MACHINE)
    assert {"message_sum", "message_backward", "embed_sum", "embed_backward", "matrix products"} <= set(kernels)
    assert sum(kernel.seconds for name, kernel in kernels.items() if name != "matrix products") < seconds
    assert all(kernel.floor > 0 and kernel.flops > 0 for kernel in kernels.values())
    text = floors.table(MACHINE, {"tensornet/192-water": (seconds, kernels)})
    assert "message_backward" in text


def test_machines_are_asked_for_their_speeds():
    found = floors.probe()
    assert found.flops > 1e8
    assert min(found.bandwidth.values()) > 1e7
    assert [found.level(size) for size in (1, 2**20, 2**30)] == ["second cache", "third cache", "memory"]


# Figures


def test_figures_are_drawn_of_what_the_results_hold(tmp_path):
    results = {
        "machine": {"cpu": "a processor", "gpu": None},
        "date": "2026-01-01T00:00",
        "rows": [row_of([1.0, 1.0], [3.0, 4.0]).as_json()],
        "data": {"growth": [point_of(n, n * 1e-4, n * 10**5).as_json() for n in (22, 1536, 12288)]},
    }
    assert [path.name for path in plot.draw(results, tmp_path)] == [
        "speed-ratios.png",
        "speed-growth.png",
        "speed-memory.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert plot.draw(results | {"rows": [], "data": {}}, tmp_path) == []


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
        (["--reference", "/nowhere/python"], "--reference: /nowhere/python is not a Python interpreter"),
        (["--others", "/nowhere/python"], "--others: /nowhere/python is not a Python interpreter"),
        (["--rounds", "0"], "a positive number is needed"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_command_for_each_device_holds_every_comparison(device, capsys):
    assert run.main(["--list", "--all", "--device", device]) == 0
    found = capsys.readouterr().out.split()
    assert {"growth", "precision"} <= set(found)
    for architecture in workloads.OPTIONS:
        assert any(name.startswith(f"{architecture}/") and name.endswith("/forces") for name in found)
        assert any(name.startswith(f"{architecture}/") and name.endswith("/train") for name in found)


@pytest.mark.parametrize(("is_there", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_device_that_is_found_is_timed(is_there, device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: is_there)
    assert run.parse_arguments([]).device == device
    assert run.parse_arguments(["--device", "cpu"]).device == "cpu"


def test_listing_leaves_the_optional_workloads_to_those_who_ask(capsys):
    assert run.main(["--list"]) == 0
    usual = capsys.readouterr().out.split()
    assert run.main(["--list", "--all"]) == 0
    everything = capsys.readouterr().out.split()
    assert run.main(["--list", "--only", "*"]) == 0
    assert set(usual) < set(everything) < set(capsys.readouterr().out.split())
    assert "tensornet/192-water/train" in usual
    assert "graph-network/192-water/train" in set(everything) - set(usual)
