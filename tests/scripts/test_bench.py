"""``torchmd-net bench`` times what a user would run, compares it with exact arithmetic, and refuses in one line."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

from torchmdnet import memory
from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.calculators.structures import default_structures, known_elements, water_box
from torchmdnet.checkpoint import load_model, save_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.errors import ConfigError
from torchmdnet.scripts.main import main
from torchmdnet.testing import tiny_model
from torchmdnet.timing import machine
from torchmdnet.timing import measure as measure_module
from torchmdnet.timing.machine import Memory, physical_cores
from torchmdnet.timing.measure import Measured, Subject, measure
from torchmdnet.timing.routes import Route, routes

QUICK = ["--seconds", "0.02", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "tiny.safetensors"
    provenance = {"units": {"energy": "kcal/mol", "length": "Å"}, "elements": [1, 6, 8]}
    save_model(tiny_model("tensornet", precision=32), path, provenance=provenance)
    return str(path)


@pytest.fixture(scope="module")
def crystal(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bench") / "crystal.extxyz"
    atoms = Atoms("CO", [[0.1, 0, 0], [1.4, 1.5, 1.6]], cell=[3.1, 3.2, 3.3], pbc=[True, True, False])
    write(path, [Atoms("H2", [[0, 0, 0], [0, 0, 0.8]]), atoms])
    return str(path)


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main(["bench", *words, *QUICK, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def every_route(model, crystal) -> dict[str, Any]:
    """What is said of the crystal when nothing else is asked for."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["bench", model, crystal, *QUICK, "--json"])
    return json.loads(out.getvalue())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main(["bench", *words, *QUICK])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


# ------------------------------------------------------------------------------------------------------- what is found


def test_every_route_is_timed_and_compared(every_route) -> None:
    (structure,) = every_route["structures"]
    assert (structure["formula"], structure["num_atoms"], structure["pbc"]) == ("CO", 2, [True, True, False])
    rows = structure["routes"]
    assert [(row["through"], row["dtype"], row["radial"]) for row in rows] == [
        (through, dtype, radial)
        for through in ("call", "ase")
        for dtype in ("float32", "float64")
        for radial in ("grid", "exact")
    ]
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms_median"]
        assert row["steps_per_second"] == pytest.approx(1000 / row["ms_median"])
        assert row["num_steps"] >= 1


def test_exact_float64_deviates_by_nothing_and_every_route_by_the_rounding_of_its_precision(every_route) -> None:
    for row in every_route["structures"][0]["routes"]:
        limit = 1e-4 if row["dtype"] == "float32" else 1e-9
        for error in (row["energy_error_ev_per_atom"], row["force_error_ev_per_angstrom"]):
            assert error <= limit
        if (row["dtype"], row["radial"]) == ("float64", "exact"):
            assert row["force_error_ev_per_angstrom"] < 1e-13
        elif row["dtype"] == "float32":
            assert row["force_error_ev_per_angstrom"] > 1e-13


def test_the_reference_is_what_the_calculator_says_of_the_structure_in_ev(model) -> None:
    atoms = molecule("CH3OH")
    first = Subject(model, atoms).reference()[0]
    load_options = {"precision": 64, "derivative": True}
    potential = load_model(model, **load_options)
    potential.representation_model.radial.mode = "exact"
    energy, forces = potential(torch.tensor(atoms.numbers), torch.tensor(atoms.positions))
    in_ev = 4184 / 96485.33212331  # J/mol in a kcal/mol, and in an eV a particle
    assert first.energy == pytest.approx(in_ev * energy.item(), rel=1e-9)
    np.testing.assert_allclose(first.forces, in_ev * forces.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("through", ["call", "ase", "external"])
def test_a_wrong_answer_of_a_route_shows_as_its_deviation(model, through, monkeypatch) -> None:
    subject = Subject(model, molecule("H2O"))
    right = subject.reference()
    subject._reference = [measure_module.Answer(a.energy + 0.3, a.forces + np.array([0.0, 0.5, 0.0])) for a in right]
    row = measure(subject, Route(through, "float64", "exact"), seconds=0.01)
    assert row.energy_error == pytest.approx(0.1)  # three atoms
    assert row.force_error == pytest.approx(0.5)


def test_dynamics_takes_one_evaluation_a_step_of_the_length_asked_for(model, monkeypatch) -> None:
    seen: list[np.ndarray] = []
    calculate = TMDNETCalculator.calculate

    def listen(self, atoms, *args, **kwargs):
        seen.append(atoms.positions.copy())
        calculate(self, atoms, *args, **kwargs)

    subject = Subject(model, molecule("H2O"))
    monkeypatch.setattr(TMDNETCalculator, "calculate", listen)
    trial = measure_module.Dynamics(subject, Route("ase", "float64"), timestep=0.1)
    for _ in range(2 * measure_module.STRETCH):
        trial.prepare()
        before = len(seen)
        trial.step()
        assert len(seen) == before + 1
        assert 0 < np.abs(seen[-1] - seen[-2]).max() < 0.02  # Å in 0.1 fs from 300 K
    assert sum(np.array_equal(positions, subject.atoms.positions) for positions in seen) == 2  # it starts again


def test_ns_per_day_is_the_time_of_the_steps_of_a_day() -> None:
    row = Measured(Route("ase"), 3, wall=[0.001, 0.002, 0.009])
    assert row.seconds == 0.002
    assert row.ns_per_day(timestep=0.5) == pytest.approx(86400 / 0.002 * 0.5e-6)


def test_a_model_that_falls_apart_is_timed_up_to_there(model, monkeypatch) -> None:
    subject = Subject(model, molecule("H2O"))
    step, count = measure_module.Dynamics.step, []

    def fall(self):
        count.append(1)
        if len(count) > 2:
            raise ValueError("the structure has fallen apart")
        step(self)

    monkeypatch.setattr(measure_module.Dynamics, "step", fall)
    row = measure(subject, Route("ase"), seconds=5)
    assert len(row.wall) == 2
    assert row.note == "stopped after 2 steps: the structure has fallen apart"


def test_a_grid_that_is_not_used_is_said_instead_of_timed(model, monkeypatch) -> None:
    monkeypatch.setattr("torchmdnet.nn.filters.fit", lambda *args: (None, 1.0))
    row = measure(Subject(model, molecule("H2O")), Route("call", "float32", "grid"), seconds=0.01)
    assert not row.wall
    assert row.note is not None
    assert row.note.startswith("no grid is used")


def test_threads_are_those_asked_for_and_are_put_back(model, monkeypatch) -> None:
    during = []
    step = measure_module.ModelCall.step
    monkeypatch.setattr(
        measure_module.ModelCall, "step", lambda self: (during.append(torch.get_num_threads()), step(self))
    )
    before = torch.get_num_threads()
    measure(Subject(model, molecule("H2O")), Route("call", threads=3), seconds=0.01)
    assert set(during) == {3}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_cheaper_matrix_products_are_asked_for_during_a_route_and_its_deviation_is_told(dtype, model, monkeypatch):
    during = []
    step = measure_module.ModelCall.step

    def note(self) -> None:
        during.append((torch.get_float32_matmul_precision(), next(self.model.parameters()).dtype))
        step(self)

    monkeypatch.setattr(measure_module.ModelCall, "step", note)
    found = measure(Subject(model, molecule("H2O")), Route("call", dtype), seconds=0.01)
    assert set(during) == {({"tf32": "high", "bf16": "medium"}[dtype], torch.float32)}
    assert torch.get_float32_matmul_precision() == "highest"
    assert found.force_error is not None
    assert 0 < found.force_error < 0.1  # whether the device has such products or not


def test_time_is_bounded_for_slow_steps(model, monkeypatch) -> None:
    clock = iter(range(0, 1000, 10))  # every look at it takes 10 s
    monkeypatch.setattr(measure_module.time, "perf_counter", lambda: float(next(clock)))
    row = measure(Subject(model, molecule("H2O")), Route("call"), seconds=1)
    assert row.wall == [10.0]


def test_memory_of_a_step_is_what_it_holds_at_its_worst() -> None:
    memory = Memory()
    memory.start()
    if memory.before is None:  # a kernel that does not keep it
        assert memory.used() is None
        return
    held = np.ones(50 * 2**20 // 8)
    del held
    used = memory.used()
    assert used is not None
    assert 45 * 2**20 < used < 100 * 2**20


def test_physical_cores_count_threads_of_a_core_once(monkeypatch) -> None:
    blocks = [f"processor : {n}\nphysical id : 0\ncore id : {n // 2}\n" for n in range(8)]
    monkeypatch.setattr(machine, "_cpuinfo", lambda: "\n".join(blocks))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert physical_cores() == 3
    monkeypatch.setattr(machine, "_cpuinfo", lambda: "")
    assert physical_cores() == 6


def test_growth_repeats_along_the_periodic_vectors(model, crystal, capsys) -> None:
    words = ["--through", "call", "--dtype", "float32", "--radial", "exact", "--replicate", "1,3"]
    found = bench(capsys, model, crystal, *words)
    growth = found["structures"][0]["growth"]
    assert [row["num_atoms"] for row in growth] == [2, 18]
    assert all(row["ms_median"] > 0 for row in growth)


@pytest.mark.slow
def test_growth_ends_where_memory_would(model, crystal, capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(machine.Memory, "used", lambda self: 900)
    words = ["--through", "call", "--dtype", "float32", "--radial", "exact", "--replicate", "1,2,3"]
    found = bench(capsys, model, crystal, *words)
    assert [row["num_atoms"] for row in found["structures"][0]["growth"]] == [2]
    assert found["notes"][-1].startswith("8 atoms are left out")


def test_ensembles_are_timed_as_one(tmp_path, crystal, capsys) -> None:
    save_model(Ensemble([tiny_model("tensornet", seed=seed) for seed in range(2)]), tmp_path / "two.zip")
    words = ["--radial", "exact", "--dtype", "float32", "--units", "eV"]
    rows = bench(capsys, str(tmp_path / "two.zip"), crystal, *words)
    errors = [row["force_error_ev_per_angstrom"] for row in rows["structures"][0]["routes"]]
    assert max(errors) < 1e-4


def test_the_table_says_how_and_on_what(model, crystal, capsys) -> None:
    few = ["--through", "ase", "--dtype", "float32", "--radial", "exact"]
    main(["bench", model, crystal, *QUICK, *few, "--timestep", "0.25", "--replicate", "1"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("CO, 2 atoms, periodic", "eV/atom", "steps of 0.25 fs", "µs/atom", torch.__version__, "cores"):
        assert words in printed


def test_the_table_fits_a_narrow_terminal_and_a_pipe_without_a_word_cut(model, crystal, monkeypatch, capsys) -> None:
    """On 80 columns ``steps/s`` goes; progress is written to standard error, a line for each route."""
    words = ["bench", model, crystal, *QUICK, "--through", "call,external", "--timestep", "0.25", "--radial", "exact"]
    rows: list[Measured] = []
    monkeypatch.setattr(
        measure_module, "measure", lambda *args, **options: rows.append(measure(*args, **options)) or rows[-1]
    )
    main(words)
    printed = capsys.readouterr()
    assert re.findall(r"^(\d) of 4: .*(float32|float64), exact, 1 thread$", printed.err, re.MULTILINE)[-1][0] == "4"
    assert " of 4: " not in printed.out
    assert "…" not in printed.out
    replay = iter(2 * rows)
    monkeypatch.setattr(measure_module, "measure", lambda *args, **options: next(replay))  # only the width changes
    assert re.search(r"through +dtype +radial +threads .*ns/day", " ".join(printed.out.split()))
    assert max(len(line) for line in printed.out.splitlines() if crystal not in line) <= 80
    for width in (80, 60):
        monkeypatch.setattr(rich.console.Console, "size", rich.console.ConsoleDimensions(width, 40))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        main(words)
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
        table = [line for line in lines if re.search(r"through|float(32|64) +exact ", line)]
        assert len(table) == 5
        assert max(map(len, table)) <= width
        assert not [line for line in lines if "…" in line]
        assert sum("external" in line for line in table) == 2


def test_what_is_logged_is_shown_once(tmp_path, crystal, capsys) -> None:
    save_model(tiny_model("tensornet"), tmp_path / "m.ckpt")
    logger = logging.getLogger("torchmdnet")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        bench(capsys, str(tmp_path / "m.ckpt"), crystal, "--replicate", "1,2", "--radial", "exact", "--through", "call")
    finally:
        logger.removeHandler(handler)
    assert sum("does not state its units" in message for message in heard) == 1
    assert not handler.filters


def test_a_busy_machine_is_told(capsys) -> None:
    from torchmdnet.scripts.bench import _notes

    rows = [Measured(Route("call"), 3, [1.0, 1.0], [0.5, 0.5]), Measured(Route("ase"), 3, [1.0], [0.99])]
    (told,) = _notes([{"name": "water", "rows": rows, "growth": [], "stopped": None}])
    assert "busy: on 1 of 2 routes a single thread had to wait for the processor, which it had for 50%" in told
    assert _notes([{"name": "water", "rows": rows[1:], "growth": [], "stopped": None}]) == []


def test_what_is_warned_of_is_shown_once() -> None:
    from torchmdnet.scripts.bench import _each_once

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with _each_once():
            for message in ("an old layout", "an old layout", "no units"):
                warnings.warn(message)
        warnings.warn("an old layout")
    assert [str(warning.message) for warning in shown] == ["an old layout", "no units", "an old layout"]


# ------------------------------------------------------------------------------------------------- default structures


@pytest.mark.slow
def test_structures_at_hand_have_elements_the_model_knows(model, capsys) -> None:
    names = [entry["name"] for entry in bench(capsys, model, "--through", "call", "--radial", "exact")["structures"]]
    assert names == ["ethanol", "water box"]
    assert known_elements(load_model(model)) == {1, 6, 8}
    assert known_elements(tiny_model("tensornet", max_z=5)) == {1, 2, 3, 4}
    for elements in ({1, 6}, {1, 8}, {14, 1}, {7}, {29, 47}):
        for atoms in default_structures(elements).values():
            assert set(atoms.numbers) <= elements
    assert list(default_structures({1, 6, 8}, is_periodic=False)) == ["ethanol"]
    with pytest.raises(ConfigError, match="no built-in structure is made of Xe alone"):
        default_structures({54}, is_periodic=False)


def test_the_water_box_is_liquid_water() -> None:
    box = water_box()
    assert len(box) == 192
    grams = box.get_masses().sum() / 6.02214076e23
    assert grams / (box.get_volume() * 1e-24) == pytest.approx(1.0, abs=0.01)
    distances = box.get_all_distances(mic=True)
    same = np.arange(192)[:, None] // 3 == np.arange(192) // 3
    assert distances[~same].min() > 1.1
    np.testing.assert_allclose(distances[same & (distances > 0)].min(), 0.9686, atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- CUDA


def test_without_cuda_its_routes_are_absent_and_asking_for_them_is_refused(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "graph needs CUDA" in refused(capsys, model, "--through", "graph")
    assert "cuda is not available here" in refused(capsys, model, "--device", "cuda")


def test_with_cuda_graphs_are_replayed_there_alone_and_threads_do_not_matter(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = routes(["call", "graph"], ["float32"], ["grid"], [1, 2], ["cpu", "cuda"])
    assert [(r.through, r.device, r.threads) for r in found] == [
        ("call", "cpu", 1),
        ("call", "cpu", 2),
        ("call", "cuda", 1),
        ("graph", "cuda", 1),
    ]
    with pytest.raises(ConfigError, match="graph runs on CUDA alone"):
        routes(["graph"], ["float32"], ["grid"], [1], ["cpu"])


# ------------------------------------------------------------------------------------------------- what cannot be done


def test_missing_files_are_named(model, tmp_path: Path, capsys) -> None:
    assert "nowhere.ckpt" in refused(capsys, str(tmp_path / "nowhere.ckpt"))
    assert "nowhere.xyz does not exist" in refused(capsys, model, "nowhere.xyz")
    (tmp_path / "noise.xyz").write_text("what is this\n")
    assert "noise.xyz, frame 0: line 1 should be a number of atoms" in refused(
        capsys, model, str(tmp_path / "noise.xyz")
    )


def test_a_frame_that_is_not_there_is_refused_with_how_many_there_are(model, crystal, capsys) -> None:
    assert "holds 2 structures. Choose from 0 to 1" in refused(capsys, model, crystal, "--index", "7")
    found = bench(capsys, model, crystal, "--index", "0", "--through", "call", "--radial", "exact")
    assert found["structures"][0]["formula"] == "H2"


def test_an_element_outside_the_embedding_is_named(model, tmp_path: Path, capsys) -> None:
    write(tmp_path / "gold.xyz", Atoms("Au2", [[0, 0, 0], [0, 0, 2.5]]))
    message = refused(capsys, model, str(tmp_path / "gold.xyz"))
    assert "cannot compute Au2: z holds 79 (Au)" in message


def test_a_model_trained_without_forces_is_refused_unless_told(tmp_path: Path, crystal, capsys) -> None:
    path = str(tmp_path / "energies.ckpt")
    save_model(tiny_model("tensornet", derivative=False), path)
    assert "trained without forces" in refused(capsys, path, crystal)
    words = ["--differentiate", "--through", "call", "--radial", "exact", "--units", "eV"]
    assert bench(capsys, path, crystal, *words)["structures"][0]["routes"][0]["ms_median"] > 0


def test_a_model_without_energies_is_refused(tmp_path: Path, crystal, capsys) -> None:
    path = str(tmp_path / "vectors.ckpt")
    save_model(tiny_model("equivariant-transformer", output_model="VectorOutput"), path)
    assert "predicts 3 numbers a system (EquivariantVectorOutput), no energy" in refused(capsys, path, crystal)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--through", "cal"], "--through: 'cal' is not available. Did you mean 'call'?"),
        (["--dtype", "float16"], "--dtype: 'float16' is not available."),
        (["--radial", ","], "--radial is empty. Choose from grid, exact."),
        (["--replicate", "1,x"], "--replicate: '1,x' is not available. Give positive numbers"),
        (["--timestep", "1e7"], "--timestep: 1e+07 is not available. Give a number up to 1e6."),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_is_loaded(words, message, capsys) -> None:
    assert message in refused(capsys, "nowhere.ckpt", *words)


def test_open_structures_are_not_repeated(model, crystal, capsys) -> None:
    assert "is not periodic" in refused(capsys, model, crystal, "--index", "0", "--replicate", "2")
