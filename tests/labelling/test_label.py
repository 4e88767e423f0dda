"""``torchmd-net label``: the numbers of the calculator, whatever happens on the way."""

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
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import read, write

from torchmdnet.datasets import ASE, HDF5
from torchmdnet.errors import DataError
from torchmdnet.labelling.journal import Journal
from torchmdnet.labelling.label import key_of, label
from torchmdnet.labelling.methods import Method, charge_and_unpaired
from torchmdnet.scripts.main import main

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def hard_calculators(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def clusters(number: int, seed: int = 0) -> list[Atoms]:
    """Five atoms of argon each, no two alike."""
    rng = np.random.default_rng(seed)
    places = np.array([[0, 0, 0], [3.5, 0, 0], [0, 3.5, 0], [0, 0, 3.5], [3.5, 3.5, 3.5]])
    return [Atoms("Ar5", places + rng.normal(0, 0.1, (5, 3))) for _ in range(number)]


def alloys(number: int) -> list[Atoms]:
    frames = []
    for seed in range(number):
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[0] = "Au"
        atoms.rattle(0.1, seed=seed)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("name", ["labelled.extxyz", "labelled.h5"])
def test_labels_of_molecules_and_crystals_are_those_of_the_calculator(tmp_path, name):
    frames = [*alloys(3), molecule("CO"), *alloys(5)[3:]]
    write(tmp_path / "in.extxyz", frames)
    summary = label([tmp_path / "in.extxyz"], tmp_path / name, Method("emt"), processes=2)
    assert (summary.written, summary.computed, summary.failed.total()) == (6, 6, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"in.extxyz", name, f"{name}.journal"}
    data = ASE(tmp_path / name, cache=False) if name.endswith("xyz") else HDF5(tmp_path / name)
    assert (data.energy_unit, data.length_unit, data.level_of_theory) == ("eV", "Å", "EMT")
    expected = {}
    for atoms in read(tmp_path / "in.extxyz", ":"):
        atoms.calc = EMT()
        expected[round(atoms.get_potential_energy(), 6)] = atoms
    assert len(expected) == len(data)
    for i in range(len(data)):
        sample = data[i]
        atoms = expected[round(sample.y.item(), 6)]
        np.testing.assert_allclose(sample.pos, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(sample.neg_dy, atoms.get_forces(), atol=2e-6)
        np.testing.assert_allclose(sample.box[0], np.where(atoms.pbc[:, None], atoms.cell.array, 0.0), atol=1e-6)
        assert sample.q.item() == 0
        if name.endswith("xyz") and atoms.pbc.all():
            np.testing.assert_allclose(sample.stress[0], atoms.get_stress(voigt=False), atol=1e-6)
    if name.endswith("xyz"):  # the order is kept too
        np.testing.assert_allclose(np.ravel(data.frames["y"]), list(expected), atol=1e-6)


def test_stress_in_hdf5_is_missing_where_there_is_no_cell(tmp_path):
    from torchmdnet.datasets.labels import LabelShape

    write(tmp_path / "in.extxyz", [*alloys(1), molecule("CO")])
    label([tmp_path / "in.extxyz"], tmp_path / "out.h5", Method("emt"))
    data = HDF5(tmp_path / "out.h5", labels={"stress": LabelShape("system", (3, 3))})
    crystal, lone = sorted((data[i] for i in range(2)), key=lambda sample: -len(sample.z))
    atoms = read(tmp_path / "in.extxyz", 0)
    atoms.calc = EMT()
    np.testing.assert_allclose(crystal.stress[0], atoms.get_stress(voigt=False), atol=1e-6)
    assert lone.stress.isnan().all()


def command(tmp_path: Path, *words: str) -> list[str]:
    start = [sys.executable, "-m", "torchmdnet.scripts.main", "label", str(tmp_path / "in.extxyz")]
    return [*start, "-o", str(tmp_path / "out.extxyz"), "-c", "hard_calculators:slow", "--option", "sigma=3.4", *words]


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    frames = clusters(60)
    write(tmp_path / "in.extxyz", frames)
    environment = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command(tmp_path, "-p", "2"), env=environment, start_new_session=True)
    journal, deadline = tmp_path / "out.extxyz.journal", time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.extxyz").exists()
    done = journal.read_bytes().count(b"\n") - 1
    assert 7 <= done < 60
    with open(journal, "ab") as file:
        file.write(b'{"key": "0123", "result": {"energy": 1')  # what a death in the middle of a line leaves
    end = subprocess.run(command(tmp_path), env=environment, capture_output=True, text=True, check=True)
    assert f"60 structures with hard_calculators:slow (sigma=3.4), {60 - done} of them new" in end.stdout
    for old, new in zip(frames, read(tmp_path / "out.extxyz", ":"), strict=True):
        copy = read_again(old, tmp_path)
        copy.calc = LennardJones(sigma=3.4)
        assert new.get_potential_energy() == pytest.approx(copy.get_potential_energy(), abs=1e-12)
        np.testing.assert_allclose(new.get_forces(), copy.get_forces(), atol=1e-8)


def read_again(atoms: Atoms, folder: Path) -> Atoms:
    """A structure with the positions that a file holds of it."""
    write(folder / "one.extxyz", atoms)
    return read(folder / "one.extxyz")


def test_structures_that_fail_are_noted_left_out_and_tried_again_when_asked(tmp_path, capsys):
    frames = clusters(6)
    for atoms, mood in zip(frames, ["", "raise", "crash", "sick", "hang", ""], strict=True):
        atoms.info["mood"] = mood or "good"
    write(tmp_path / "in.extxyz", frames)
    words = ["label", str(tmp_path / "in.extxyz"), "-o", str(tmp_path / "out.extxyz"), "-c", "hard_calculators:Moody"]
    with pytest.raises(SystemExit, match="1"):  # a script notices
        main([*words, "--timeout", "2"])
    said = capsys.readouterr().out
    assert "2 structures with hard_calculators:Moody, 2 of them new" in said
    assert "4 failed and are left out" in said
    for error in ("the density does not converge", "was ended by SIGABRT", "forces is not finite", "no result after 2"):
        assert error in said
    assert f"1 × forces is not finite ({tmp_path / 'in.extxyz'}, frame 3)" in said
    entries = [json.loads(line) for line in (tmp_path / "out.extxyz.journal").read_text().splitlines()[1:]]
    sources = {entry["source"].rpartition("/")[2] for entry in entries if "error" in entry}
    assert sources == {f"in.extxyz, frame {number}" for number in (1, 2, 3, 4)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchmdnet.labelling.label.run", lambda work, pieces, **_: [pytest.fail(k) for k, _ in pieces])
        main([*words, "--allow-failed"])  # nothing is computed again
    for atoms in frames:
        atoms.info["mood"] = "good"
    write(tmp_path / "in.extxyz", frames)
    main([*words, "--retry"])
    assert "6 structures with hard_calculators:Moody, 4 of them new" in capsys.readouterr().out
    assert len(read(tmp_path / "out.extxyz", ":")) == 6


def test_the_memory_of_all_processes_has_a_bound(tmp_path, capsys):
    write(tmp_path / "in.extxyz", clusters(2))
    words = ["label", str(tmp_path / "in.extxyz"), "-o", str(tmp_path / "out.extxyz"), "-c", "hard_calculators:slow"]
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--memory", "0.001"])
    assert "more than the allowed 0.001 GB (--memory), before it could begin" in capsys.readouterr().err
    assert not (tmp_path / "out.extxyz").exists()


def test_structures_that_are_added_are_computed_and_others_are_not(tmp_path):
    write(tmp_path / "a.extxyz", clusters(3))
    assert label([tmp_path / "a.extxyz"], tmp_path / "out.extxyz", Method("lj")).computed == 3
    write(tmp_path / "b.extxyz", clusters(5)[::-1])
    files = [tmp_path / "b.extxyz", tmp_path / "a.extxyz"]
    assert label(files, tmp_path / "out.extxyz", Method("lj"))[:2] == (8, 2)


def test_charge_and_multiplicity_reach_the_calculator_and_the_file(tmp_path):
    states = [
        {},
        {"total_charge": 1},
        {"charge": -1, "spin_multiplicity": 4},
        {"spin": 2},
        {"spin": 3},
        {"n_unpaired": 4},
    ]
    frames = []
    for number, state in enumerate(states):
        atoms = molecule("O2")
        atoms.positions += number / 100
        atoms.info.update(state, REF_energy=7.0)
        frames.append(atoms)
    write(tmp_path / "in.extxyz", frames)
    label([tmp_path / "in.extxyz"], tmp_path / "out.extxyz", Method("hard_calculators:Charged"))
    energies = [atoms.get_potential_energy() for atoms in read(tmp_path / "out.extxyz", ":")]
    np.testing.assert_allclose(energies, [0.1, 1.2, -0.6, 0.3, 0.3, 0.5])
    data = ASE(tmp_path / "out.extxyz", cache=False)
    assert [int(data[i].q) for i in range(6)] == [0, 1, -1, 0, 0, 0]
    assert [int(data[i].s) for i in range(6)] == [0, 1, 3, 2, 2, 4]
    np.testing.assert_allclose(np.ravel(data.frames["y"]), energies)  # not those that were there before


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"total_charge": 0.5}, "0.5, which is no whole number"),
        ({"spin_multiplicity": 2}, "spin_multiplicity = 2 is not possible with 16 electrons"),
        ({"total_charge": 1, "n_unpaired": 2}, "n_unpaired = 2 is not possible with 15 electrons"),
        ({"spin": -1}, "spin = -1 is not possible"),
    ],
)
def test_charge_and_spin_that_cannot_be_are_refused(info, words):
    atoms = molecule("O2")
    atoms.info.update(info)
    with pytest.raises(DataError, match=words):
        charge_and_unpaired(atoms)


def test_a_charge_is_refused_by_calculators_that_know_none(tmp_path):
    ion = molecule("CO")
    ion.info["total_charge"] = 1
    write(tmp_path / "in.extxyz", ion)
    with pytest.raises(DataError, match=r"1 times: the structure has total charge \+1, which emt knows nothing of"):
        label([tmp_path / "in.extxyz"], tmp_path / "out.extxyz", Method("emt"))


def test_the_key_tells_apart_what_a_calculation_depends_on():
    start = molecule("O2")
    changes = [lambda a: a.positions.__iadd__(1e-12), lambda a: a.set_cell([9, 9, 9]), lambda a: a.set_pbc(True)]
    changes += [
        lambda a: a.info.update(charge=2),
        lambda a: a.info.update(spin=2),
        lambda a: a.set_atomic_numbers([8, 7]),
    ]
    keys = {key_of(start)}
    for change in changes:
        atoms = start.copy()
        change(atoms)
        keys.add(key_of(atoms))
    assert len(keys) == 7
    start.info["name"] = "anything"
    assert key_of(start) in keys


def test_results_of_other_settings_are_not_mixed_in(tmp_path):
    write(tmp_path / "in.extxyz", clusters(1))
    label([tmp_path / "in.extxyz"], tmp_path / "out.extxyz", Method("lj", {"sigma": 3.4}))
    with pytest.raises(DataError, match=r"has results with options \{'sigma': 3.4\}, but now it is \{'sigma': 3.5\}"):
        label([tmp_path / "in.extxyz"], tmp_path / "out.extxyz", Method("lj", {"sigma": 3.5}))


def test_errors_alone_do_not_bind_to_their_settings(tmp_path):
    same = Atoms("Ar2", [[0, 0, 0], [0, 0, 1e-9]])
    write(tmp_path / "in.traj", [same])
    for options in ({"sigma": 3.4}, {"sigma": 3.5}):
        with pytest.raises(DataError, match=r"no structure could be labelled; 1 times: atom 0 \(Ar\) and .* 1e-09 Å"):
            label([tmp_path / "in.traj"], tmp_path / "out.extxyz", Method("lj", options))
    with Journal(tmp_path / "j", {"options": 1}) as journal:
        journal.append("a", {"error": "no"})
    with Journal(tmp_path / "j", {"options": 1}) as journal:
        assert "a" in journal  # and is not tried again
    with Journal(tmp_path / "j", {"options": 2}) as journal:
        assert "a" not in journal
        journal.append("a", {"result": {"energy": 1.0}})
    with pytest.raises(DataError, match="has results with options 2, but now it is 1"):
        Journal(tmp_path / "j", {"options": 1})


def test_two_runs_do_not_write_to_one_journal(tmp_path):
    with Journal(tmp_path / "j", {}), pytest.raises(DataError, match="another process is writing to it"):
        Journal(tmp_path / "j", {})


def test_a_full_disk_keeps_what_was_computed(tmp_path):
    script = (
        "import resource, sys; from torchmdnet.labelling.journal import Journal\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "with Journal(__import__('pathlib').Path(sys.argv[1]), {}) as journal:\n"
        "    for i in range(100): journal.append(str(i), {'result': {'energy': float(i)}})\n"
    )
    end = subprocess.run([sys.executable, "-c", script, str(tmp_path / "j")], capture_output=True, text=True)
    assert "cannot grow, the disk is full" in end.stderr
    with Journal(tmp_path / "j", {}) as journal:
        kept = next(i for i in range(100) if str(i) not in journal)
        assert kept >= 5
        assert [journal[str(i)]["result"]["energy"] for i in range(kept)] == list(range(kept))
        journal.append("new", {"result": {"energy": 1.0}})
        assert journal.succeeded("new")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "emtt"], "calculator: 'emtt' is not available. Did you mean 'emt'?"),
        (["-c", "lj", "--option", "sgma=3"], "option: 'sgma' is not known to the calculator. Did you mean 'sigma'?"),
        (["-c", "lj", "--option", "sigma"], "--option sigma: should be KEY=VALUE"),
        (["-c", "lj", "--properties", "energies"], "properties: 'energies' is not available"),
        (["-c", "hard_calculators:unable"], "the calculator cannot be made: OSError: there is no licence server"),
        (["-c", "os:getcwd"], "os:getcwd returned str, which is no ASE calculator"),
        (["-c", "lj", "-o", "out.npz"], "out.npz ends in none of"),
        (["-c", "lj", "-o", "in.extxyz"], "is one of the files to read"),
        (["-c", "lj", "-o", "other.extxyz"], "exists, without the journal"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write("in.extxyz", clusters(1))
    write("other.extxyz", clusters(1))
    with pytest.raises(SystemExit) as end:
        main(["label", "in.extxyz", *(["-o", "out.extxyz"] if "-o" not in words else []), *words])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not Path("out.extxyz").exists()


def test_gfn2_gives_what_tblite_gives_alone(tmp_path):
    tblite = pytest.importorskip("tblite.ase", reason="tblite is not installed")
    radical = molecule("NO2")
    water = molecule("H2O")
    write(tmp_path / "in.extxyz", [water, radical])
    label([tmp_path / "in.extxyz"], tmp_path / "out.extxyz", Method("gfn2-xtb", {"accuracy": 0.1}))
    for atoms, multiplicity in zip(read(tmp_path / "out.extxyz", ":"), (1, 2), strict=True):
        alone = atoms.copy()
        alone.calc = tblite.TBLite(method="GFN2-xTB", accuracy=0.1, multiplicity=multiplicity, verbosity=0)
        assert atoms.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), atol=1e-5)
        np.testing.assert_allclose(atoms.get_dipole_moment(), alone.get_dipole_moment(), atol=1e-5)
        np.testing.assert_allclose(atoms.get_charges(), alone.get_charges(), atol=1e-5)
        assert atoms.info["spin_multiplicity"] == multiplicity
