"""``torchmd-net md``: the same trajectory however often it is killed, and a stop with a reason where it must stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.io import read, write
from conftest import REPOSITORY

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.checkpoint import save_model
from torchmdnet.scripts import progress
from torchmdnet.scripts.main import main
from torchmdnet.simulation import dynamics, report
from torchmdnet.testing import tiny_model

FILES = ("trajectory.extxyz", "log.csv", "velocities.f32")
PROVENANCE = {
    "units": {"energy": "eV", "length": "Å"},
    "elements": [1, 6, 8, 14],
    "training": {"total_charge": [-1, 1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("md") / "tiny.safetensors"
    save_model(tiny_model("tensornet", precision=32, charge=True), path, provenance=PROVENANCE)
    return str(path)


@pytest.fixture(scope="module")
def ethanol(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("md") / "ethanol.xyz"
    atoms = molecule("CH3CH2OH")
    atoms.positions += 47.0  # far enough to be moved before it is rounded to single precision
    write(path, atoms)
    return str(path)


@pytest.fixture(scope="module")
def silicon(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("md") / "silicon.xyz"
    atoms = bulk("Si", cubic=True) * (2, 2, 2)
    atoms.rattle(0.03, seed=1)
    write(path, atoms)
    return str(path)


@pytest.fixture(autouse=True)
def _no_plots(request, monkeypatch) -> None:
    """Plots take most of the time of a short simulation; one test draws them."""
    if "page" not in request.node.name:
        monkeypatch.setattr(report, "draw_simulation", lambda *args, **options: b"plots")


def md(*words: str) -> None:
    main(["md", *map(str, words)])


def status(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        md(*words)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def expect_same_files(folder: Path, whole: Path) -> None:
    """Fail with the place and size of the first difference, which bytes would not tell."""
    numbers = [np.fromfile(here / "velocities.f32", dtype="<f4") for here in (folder, whole)]
    assert len(numbers[0]) == len(numbers[1])
    away = np.abs(numbers[0] - numbers[1])
    assert not away.any(), (
        f"velocities differ from number {np.flatnonzero(away)[0]} of {len(away)} on, there by "
        f"{away[np.flatnonzero(away)[0]]:.1e}, at most by {away.max():.1e}"
    )
    for name in FILES:
        lines = [(here / name).read_bytes().split(b"\n") for here in (folder, whole)]
        assert [n for n, (x, y) in enumerate(zip(*lines, strict=True)) if x != y] == [], name


DRIVER = """
import sys
from torchmdnet.simulation import dynamics, report
dynamics.SAVE_SECONDS = 0.02
from torchmdnet.scripts.main import main
main(sys.argv[1:])
"""


def killed_after(folder: Path, rows: int, *words: str) -> bool:
    """Run the command in another process and kill it when its log has as many rows; whether it was still running."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "md", *words, "-o", str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = folder / "log.csv", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") > rows:
            break
        time.sleep(0.005)
    was_running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return was_running


def test_a_simulation_that_was_killed_gives_the_same_files(model, ethanol, tmp_path) -> None:
    words = [model, ethanol, "-e", "bussi", "--steps", "200", "--interval", "1", "--log-interval", "1"]
    assert killed_after(tmp_path / "killed", 40, *words)
    md("--resume", "-o", tmp_path / "killed")
    md(*words, "-o", tmp_path / "whole")
    expect_same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_simulation_that_was_killed_many_times_gives_the_same_files(model, silicon, tmp_path) -> None:
    rng = np.random.default_rng()
    words = [model, silicon, "-e", "npt", "--steps", "300", "-t", "100", "--interval", "1", "--log-interval", "0.5",
             "--max-force", "1e4"]  # fmt: skip
    rows = 20
    assert killed_after(tmp_path / "killed", rows, *words)
    for _ in range(6):
        rows += int(rng.integers(1, 40))
        assert killed_after(tmp_path / "killed", rows, "--resume")
    md("--resume", "-o", tmp_path / "killed")
    md(*words, "-o", tmp_path / "whole")
    expect_same_files(tmp_path / "killed", tmp_path / "whole")


def test_a_signal_saves_and_says_how_to_go_on(model, ethanol, tmp_path, capsys, monkeypatch) -> None:
    words = [model, ethanol, "--steps", "4000", "--interval", "100", "--log-interval", "100"]
    update = progress.Meter.update

    def stopping(self, done: float, text: str) -> None:
        update(self, done, text)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Meter, "update", stopping)
        assert status(*words, "-o", tmp_path / "md") == 128 + signal.SIGTERM
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("SIGTERM: stopped with 0.0")
    assert f"--resume --out {tmp_path / 'md'}" in told
    assert status(*words, "-o", tmp_path / "md") == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_signal_while_the_page_is_written_tells_the_reason_and_how_to_go_on(
    model, ethanol, tmp_path, capsys, monkeypatch
) -> None:
    def interrupted(*args, **options) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b"plots"

    words = [model, ethanol, "--steps", "4"]
    monkeypatch.setattr(report, "draw_simulation", interrupted)
    assert status(*words, "-o", tmp_path / "hot", "--max-temperature", "20") == 128 + signal.SIGINT
    reason, told = capsys.readouterr().err.splitlines()[-2:]
    assert "stopped: it reached " in reason
    assert told.startswith("SIGINT: stopped with 0 of 0.002 ps saved. Go on with: torchmd-net md --resume --out ")
    assert status(*words, "-o", tmp_path / "all", "--replicas", "2") == 128 + signal.SIGINT
    told = capsys.readouterr().err.splitlines()[-1]
    assert "0 of 2 simulations finished and all of 0.002 ps saved, before the page was written. Go on with" in told
    monkeypatch.setattr(report, "draw_simulation", lambda *args, **options: b"plots")
    md("--resume", "--out", tmp_path / "all")
    assert len(json.loads((tmp_path / "all" / "summary.json").read_text())["runs"]) == 2


def test_a_signal_in_the_last_step_ends_the_simulations_that_follow_too(
    model, ethanol, tmp_path, capsys, monkeypatch
) -> None:
    update = progress.Meter.update

    def stopping(self, done: float, text: str) -> None:
        update(self, done, text)
        if done == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(progress.Meter, "update", stopping)
    assert status(model, ethanol, "--steps", "4", "--replicas", "2", "-o", tmp_path / "md") == 128 + signal.SIGTERM
    assert "0 of 2 simulations finished and all of 0.002 ps saved" in capsys.readouterr().err


def test_results_are_printed_as_json_and_written_to_a_page(model, ethanol, tmp_path, capsys) -> None:
    words = ["--steps", "200", "--replicas", "2", "--traj", "--json", "-o", tmp_path / "md", "-e", "nve"]
    md(model, ethanol, *words, "--interval", "5", "--log-interval", "1")
    found = json.loads(capsys.readouterr().out)
    first, second = found["runs"]
    assert first["name"].endswith("replica 0")
    assert first["num_atoms"] == 9
    assert first["time_ps"] == pytest.approx(0.1)
    assert abs(first["drift_meV_per_atom_per_ps"]) < 20
    assert first["mean_temperature_K"] != second["mean_temperature_K"]
    for run in found["runs"]:
        folder = Path(run["folder"])
        assert len(read(folder / "trajectory.traj", ":")) == len(read(folder / "trajectory.extxyz", ":")) == 21
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "<canvas" in page
        assert 'src="http' not in page
        assert (folder / "plots.png").stat().st_size > 10_000
    rows = dynamics.read_log(Path(first["folder"]) / "log.csv")
    assert rows[0]["temperature_K"] == pytest.approx(300)
    total = [row["total_energy_eV"] for row in rows]
    assert np.std(total) < 0.2 * np.std([row["potential_energy_eV"] for row in rows])


def test_energies_and_forces_of_frames_are_those_of_the_model(model, ethanol, tmp_path) -> None:
    md(model, ethanol, "--steps", "10", "-o", tmp_path, "--interval", "2.5")
    frame = read(tmp_path / "trajectory.extxyz", 1)
    forces = frame.get_forces()
    frame.info["charge"] = 0
    frame.calc = TMDNETCalculator(model)
    np.testing.assert_allclose(forces, frame.get_forces(), atol=2e-3)  # of positions with eight decimals, 50 Å away


def test_what_the_structure_leaves_ends_it_with_a_reason(model, ethanol, tmp_path, capsys) -> None:
    assert status(model, ethanol, "--steps", "50", "--max-temperature", "20", "-o", tmp_path) == 1
    told = capsys.readouterr().out
    assert "stopped: it reached " in told
    stopped = read(tmp_path / "stopped.extxyz")
    assert stopped.info["stopped"].startswith("it reached ")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["stopped"] == stopped.info["stopped"]
    assert not summary["is_done"]
    assert "Stopped at" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_uncertain_ensemble_stops(model, ethanol, tmp_path, capsys) -> None:
    other = tmp_path / "other.safetensors"
    save_model(tiny_model("tensornet", seed=1, precision=32, charge=True), other, provenance=PROVENANCE)
    main(["convert", model, str(other), str(tmp_path / "both.zip")])
    both = tmp_path / "both.zip"
    assert status(both, ethanol, "--steps", "20", "--stop-if-uncertain", "1e-6", "-o", tmp_path / "md") == 1
    assert "the models of the ensemble differ by" in capsys.readouterr().out
    md(both, ethanol, "--steps", "20", "--stop-if-uncertain", "1e6", "-o", tmp_path / "fine")
    rows = dynamics.read_log(tmp_path / "fine" / "log.csv")
    assert rows[-1]["largest_force_std_eV_A"] > 0
    assert status(model, ethanol, "--stop-if-uncertain", "0.1", "-o", tmp_path / "one") == 2
    assert "does not say how sure it is" in capsys.readouterr().err


def test_atoms_are_held_in_place(model, tmp_path) -> None:
    atoms = molecule("CH3CH2OH")
    atoms.set_constraint(FixAtoms([0]))
    write(tmp_path / "start.traj", atoms)
    md(model, tmp_path / "start.traj", "--steps", "20", "--fix", "2,O", "--fix", "4-5", "-o", tmp_path / "md")
    moved = np.abs(read(tmp_path / "md" / "final.extxyz").positions - atoms.positions).max(axis=1) > 1e-6
    assert np.flatnonzero(~moved).tolist() == [0, 2, 4, 5]
    md(model, tmp_path / "start.traj", "--steps", "20", "--no-constraints", "-o", tmp_path / "free")
    assert (np.abs(read(tmp_path / "free" / "final.extxyz").positions - atoms.positions).max(axis=1) > 1e-6).all()


def test_temperature_and_pressure_follow_a_ramp(model, silicon, tmp_path) -> None:
    md(model, silicon, "-e", "npt-isotropic", "--steps", "20", "-t", "100", "200", "-p", "0", "1e4", "-o", tmp_path,
       "--log-interval", "0.5", "--max-force", "1e4")  # fmt: skip
    rows = dynamics.read_log(tmp_path / "log.csv")
    assert [row["target_temperature_K"] for row in rows[::10]] == pytest.approx([100, 150, 200])
    assert rows[0]["volume_A3"] != rows[-1]["volume_A3"]


def test_a_simulation_can_become_longer(model, ethanol, tmp_path, capsys) -> None:
    md(model, ethanol, "--steps", "10", "--log-interval", "1", "-o", tmp_path / "parts")
    md("--resume", "--steps", "30", "-o", tmp_path / "parts")
    md(model, ethanol, "--steps", "30", "--log-interval", "1", "-o", tmp_path / "whole")
    positions = [read(tmp_path / name / "final.extxyz").positions for name in ("parts", "whole")]
    np.testing.assert_array_equal(*positions)
    assert status("--resume", "--steps", "20", "-o", tmp_path / "parts") == 2
    assert "--steps: the simulation has 30 steps, and 20 would be fewer" in capsys.readouterr().err
    assert status("--resume", "--time", "0.01", "-o", tmp_path / "parts") == 2
    assert "--time: the simulation has 30 steps, and 20 would be fewer" in capsys.readouterr().err
    assert status("--resume", "--time", "1", "--steps", "50", "-o", tmp_path / "parts") == 2
    assert "Give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["MODEL"], "name a model and a structure"),
        (["MODEL", "ETHANOL", "-e", "nvt"], "'nvt' is not available"),
        (["MODEL", "ETHANOL", "-e", "npt"], "periodic along 0 of three directions"),
        (["MODEL", "ETHANOL", "-e", "nve", "-t", "100", "200"], "nve cannot change it on the way"),
        (["MODEL", "ETHANOL", "-t", "0"], "needs one above 0 K"),
        (["MODEL", "ETHANOL", "-t", "1", "2", "3"], "3 values are given"),
        (["MODEL", "ETHANOL", "--time", "1", "--steps", "3"], "Give one of them"),
        (["MODEL", "ETHANOL", "--timestep", "50"], "longer than any vibration"),
        (["MODEL", "ETHANOL", "--fix", "9"], "not among the atoms"),
        (["MODEL", "ETHANOL", "--fix", "Cu"], "neither numbers of atoms nor an element"),
        (["MODEL", "ETHANOL", "--fix", "0-8"], "all atoms"),
        (["MODEL", "ETHANOL", "--charge", "3"], "has never seen charge 3"),
        (["MODEL", "ETHANOL", "--index", "x"], "is not understood"),
        (["MODEL", "ETHANOL", "--device", "gpu"], "'gpu' is not available"),
        (["MODEL", "SULPHUR"], "has never seen S"),
        (["MODEL", "CLASH"], "0.100 Å apart. Relax it first, torchmd-net relax, or look at its units"),
        (["MODEL", "ETHANOL", "--steps", "1000000000", "--replicas", "20"], "--steps: 1,000,000,000 steps for each"),
        (["MODEL", "NONE.xyz"], "NONE.xyz"),
        (["--resume"], "holds no simulation"),
        (["--resume", "--timestep", "1"], "takes no --timestep"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    words, told, model, ethanol, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("s.xyz", molecule("SH2") if "SULPHUR" in words else Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]))
    names = {"MODEL": model, "ETHANOL": ethanol, "SULPHUR": "s.xyz", "CLASH": "s.xyz"}
    assert status(*[names.get(word, word) for word in words], "-o", "out") in (1, 2)
    assert told in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_simulation_does_not_go_on_with_another_model(model, ethanol, tmp_path, capsys) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(Path(model).read_bytes())
    md(mine, ethanol, "--steps", "5", "-o", tmp_path / "md")
    save_model(tiny_model("tensornet", precision=32), mine, provenance=PROVENANCE)
    assert status("--resume", "--steps", "9", "-o", tmp_path / "md") == 1
    assert "has changed since" in capsys.readouterr().err


def test_overwrite_deletes_what_a_run_left_and_nothing_else(model, ethanol, tmp_path) -> None:
    md(model, ethanol, "--steps", "5", "--replicas", "2", "-o", tmp_path / "md")
    (tmp_path / "md" / "notes.txt").write_text("mine")
    md(model, ethanol, "--steps", "5", "-o", tmp_path / "md", "--overwrite")
    names = {path.name for path in (tmp_path / "md").iterdir()}
    assert "notes.txt" in names
    assert not any(path.is_dir() for path in (tmp_path / "md").iterdir())
