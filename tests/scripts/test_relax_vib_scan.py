"""``torchmd-net relax``, ``vib`` and ``scan`` against what ASE finds with the same potential."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.io import read, write
from ase.vibrations import Vibrations as AseVibrations

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.checkpoint import save_model
from torchmdnet.errors import DataError
from torchmdnet.scripts import progress, relax, scan, vib
from torchmdnet.scripts.main import main
from torchmdnet.simulation.relaxation import Relaxation
from torchmdnet.simulation.relaxation import relax as go_down
from torchmdnet.simulation.scans import moved_part, pairs_of
from torchmdnet.simulation.vibrations import KM_PER_MOL, hessian_of, thermochemistry, vibrations
from torchmdnet.testing import tiny_model

PROVENANCE = {"units": {"energy": "eV", "length": "Å"}, "elements": [1, 6, 8, 14]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vib") / "tiny.safetensors"
    save_model(tiny_model("tensornet"), path, provenance=PROVENANCE)
    return str(path)


@pytest.fixture
def argon(monkeypatch):
    """Commands run with a Lennard-Jones or Morse potential, of which everything is known, in place of a network."""

    def use(calculator) -> None:
        for command in (relax, vib):
            monkeypatch.setattr(command, "calculator_of", lambda *args: calculator)
            monkeypatch.setattr(command, "check_fits", lambda *args, **options: None)

    return use


def status(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


# --------------------------------------------------------------------------------------------------------- relax


def test_a_pair_of_atoms_is_brought_to_its_minimum(argon, tmp_path, capsys) -> None:
    argon(LennardJones(sigma=3.4, epsilon=0.01, rc=20.0))
    write(tmp_path / "pair.extxyz", [Atoms("Ar2", [[0, 0, 0], [0, 0, d]]) for d in (3.6, 4.2)])
    main(["relax", "none.ckpt", str(tmp_path / "pair.extxyz"), "--index", ":", "--fmax", "1e-5", "--json", "-o",
          str(tmp_path / "out")])  # fmt: skip
    found = json.loads(capsys.readouterr().out)["structures"]
    assert [each["converged"] for each in found] == [True, True]
    for atoms in read(tmp_path / "out" / "relaxed.extxyz", ":"):
        assert atoms.get_distance(0, 1) == pytest.approx(2 ** (1 / 6) * 3.4, abs=1e-3)
        assert atoms.info["converged"]
    assert found[0]["energy_change_eV"] < 0
    steps = (tmp_path / "out" / "steps.csv").read_text(encoding="utf-8").splitlines()
    assert len(steps) == 1 + sum(each["steps"] + 1 for each in found)
    assert "<canvas" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_cell_is_relaxed_under_pressure(argon, tmp_path, capsys) -> None:
    from ase.build import bulk

    argon(LennardJones(sigma=3.4, epsilon=0.01, rc=8.0, smooth=True))
    atoms = bulk("Ar", a=5.6)
    atoms.rattle(0.02, seed=0)
    atoms.write(tmp_path / "ar.extxyz")
    volumes = []
    for pressure in ("0", "0.5"):
        out = tmp_path / pressure
        main(["relax", "none.ckpt", str(tmp_path / "ar.extxyz"), "--cell", "--pressure", pressure, "--fmax", "1e-4",
              "-o", str(out), "--json"])  # fmt: skip
        (found,) = json.loads(capsys.readouterr().out)["structures"]
        assert found["largest_stress_GPa"] < 0.01
        volumes.append(found["volume_A3"])
    assert volumes[1] < volumes[0]


def test_what_does_not_get_there_ends_with_status_1(argon, tmp_path, capsys) -> None:
    argon(LennardJones(sigma=3.4, epsilon=0.01, rc=20.0))
    write(tmp_path / "pair.extxyz", Atoms("Ar2", [[0, 0, 0], [0, 0, 3.6]]))
    words = ["relax", "none.ckpt", str(tmp_path / "pair.extxyz"), "-o", str(tmp_path / "out")]
    assert status(*words, "--steps", "1", "--fmax", "1e-6") == 1
    assert "1 of 1 did not reach 1e-06 eV/Å" in capsys.readouterr().out
    assert status(*words, "--overwrite", "--cell") == 2
    assert "has no periodic cell" in capsys.readouterr().err
    assert status(*words, "--overwrite", "--optimizer", "newton") == 2
    assert status(*words, "--overwrite", "--pressure", "1") == 2


def test_a_signal_keeps_what_there_is(argon, tmp_path, capsys, monkeypatch) -> None:
    argon(LennardJones(sigma=3.4, epsilon=0.01, rc=20.0))
    write(tmp_path / "pair.extxyz", [Atoms("Ar2", [[0, 0, 0], [0, 0, 3.6]])] * 3)
    once = iter([signal.SIGINT])
    monkeypatch.setattr(progress.Meter, "update", lambda *args: [signal.raise_signal(number) for number in once])
    words = ["relax", "none.ckpt", str(tmp_path / "pair.extxyz"), "--index", ":", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        relax.main(words[1:])
    assert stop.value.code == 128 + signal.SIGINT
    assert "stopped after 1 of 3 structures" in capsys.readouterr().err
    assert len(read(tmp_path / "out" / "relaxed.extxyz", ":")) == 1


def test_atoms_that_run_into_each_other_are_told() -> None:
    attractive = LennardJones(sigma=0.3, epsilon=5.0, rc=20.0)
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.5]])
    atoms.calc = attractive
    each = Relaxation("pair", atoms)
    go_down(each, fmax=1e-4, steps=200)
    assert not each.converged
    assert "Å apart" in str(each.reason)


def test_atoms_that_are_too_near_to_each_other_are_moved_apart(argon, tmp_path, capsys) -> None:
    argon(LennardJones(sigma=1.0, epsilon=1.0, rc=20.0))
    write(tmp_path / "pair.extxyz", Atoms("C2", [[0, 0, 0], [0, 0, 0.6]]))
    main(["relax", "none.ckpt", str(tmp_path / "pair.extxyz"), "-o", str(tmp_path / "out"), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["structures"]
    assert found["converged"]
    assert read(tmp_path / "out" / "relaxed.extxyz").get_distance(0, 1) == pytest.approx(2 ** (1 / 6), abs=1e-3)
    argon(LennardJones(sigma=0.5, epsilon=1.0, rc=20.0))  # whose minimum is where atoms of carbon clash
    words = ["relax", "none.ckpt", str(tmp_path / "pair.extxyz"), "-o", str(tmp_path / "near")]
    assert status(*words) == 1
    told = capsys.readouterr().out
    assert "Å apart after " in told
    assert "which more --steps do not mend" in told
    assert "Take more --steps" not in told


@pytest.mark.parametrize(
    ("atoms", "told"),
    [
        (Atoms("C2", [[0, 0, 0], [0, 0, 0]]), "(C) are 0 Å apart, nearer than 5e-05 Å. Remove one of the two."),
        (Atoms("C2", [[0, 0, 0], [0, 0, 1e-8]]), "(C) are 1e-08 Å apart, nearer than 5e-05 Å. Remove one of the two."),
        (Atoms("C2", [[0, 0, 0], [0, 0, 4]], cell=[4, 4, 4], pbc=True), "Remove one of the two, or check the cell: its "
                                                                       "lattice vectors are 4, 4, 4 Å long."),
        (Atoms("C", cell=[0.5, 0.5, 0.5], pbc=True), "atom 0 (C) and its periodic image are 0.500 Å apart. Check the "
                                                     "cell: its lattice vectors are 0.5, 0.5, 0.5 Å long."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["relax", "md", "vib", "scan"])
def test_what_no_relaxation_mends_is_refused_before_any_work(
    command, atoms, told, model, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("atoms.traj", atoms)
    assert status(command, model, "atoms.traj", *(["--bond", "0", "1"] * (command == "scan")), "-o", "out") == 1
    said = capsys.readouterr().err
    assert told in said
    assert "Relax it first" not in said
    assert not Path("out").exists()


# ----------------------------------------------------------------------------------------------------------- vib


def test_the_hessian_by_derivatives_is_that_of_finite_differences(model) -> None:
    atoms = molecule("H2O")
    atoms.calc = TMDNETCalculator(model, dtype="float64")
    exact, slopes, method = hessian_of(atoms, [0, 1, 2])
    assert method == "derivatives of the model"
    assert slopes is None
    numerical, _, told = hessian_of(atoms, [0, 1, 2], numerical=True)
    assert "finite differences" in told
    np.testing.assert_allclose(exact, exact.T, atol=1e-9)
    np.testing.assert_allclose(exact, numerical, atol=2e-3 * np.abs(exact).max())
    part, *_ = hessian_of(atoms, [0, 2])
    np.testing.assert_allclose(part, exact[np.ix_([0, 1, 2, 6, 7, 8], [0, 1, 2, 6, 7, 8])], atol=1e-12)


def test_the_dipole_is_differentiated(tmp_path) -> None:
    potential = tiny_model("tensornet", properties={"dipole": {"head": "Dipole", "label": "dipole"}})
    atoms = molecule("H2O")
    atoms.calc = TMDNETCalculator(potential, dtype="float64", units="eV")
    _, exact, _ = hessian_of(atoms, [0, 1, 2])
    _, numerical, _ = hessian_of(atoms, [0, 1, 2], numerical=True)
    assert exact is not None
    assert numerical is not None
    assert np.abs(exact).max() > 1e-6
    np.testing.assert_allclose(exact, numerical, atol=1e-3 * np.abs(exact).max())
    assert pytest.approx(42.2561 * (1 / 0.2081943) ** 2, rel=1e-4) == KM_PER_MOL  # km/mol of (D/Å)²/u


def test_wavenumbers_are_those_of_ase(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    atoms = Atoms("HO", [[0, 0, 0], [0, 0, 1.0]])
    atoms.calc = MorsePotential(epsilon=4.6, r0=0.97, rho0=2.2 * 0.97, rcut1=8.0, rcut2=9.0)
    each = Relaxation("OH", atoms)
    go_down(each, fmax=1e-6, steps=100, optimizer="bfgs")
    found = vibrations(atoms, numerical=True)
    assert len(found.wavenumbers) == 1  # three translations and two rotations are left out
    theirs = AseVibrations(atoms, delta=0.005)
    theirs.run()
    assert found.wavenumbers[-1] == pytest.approx(theirs.get_frequencies()[-1].real, rel=1e-4)
    first, second = atoms.get_masses()
    reduced = first * second * (first + second) / (first**2 + second**2)  # of displacements of length 1
    assert found.masses[0] == pytest.approx(reduced, rel=1e-3)
    heat = thermochemistry(found, temperature=298.15, pressure=1.0, symmetry=1, spin=0.5)
    assert heat["zero_point_energy_eV"] == pytest.approx(found.wavenumbers[0] * 1.2398e-4 / 2, rel=1e-3)
    assert "linear" in heat["kind"]
    assert heat["entropy_eV_K"] * 96485.332 == pytest.approx(183.7 - 5.8, abs=1.0)
    # J/K/mol of the OH radical, as measured without the R ln 2 of its orbital
    assert not len(found.imaginary)


def test_modes_are_printed_written_and_shown(argon, tmp_path, capsys) -> None:
    argon(MorsePotential(epsilon=4.6, r0=0.97, rho0=2.2 * 0.97, rcut1=8.0, rcut2=9.0))
    write(tmp_path / "oh.xyz", Atoms("HO", [[0, 0, 0], [0, 0, 1.0]]))
    words = ["vib", "none.ckpt", str(tmp_path / "oh.xyz"), "--numerical"]
    main([*words, "--relax", "-o", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "mode  wavenumber [1/cm]" in printed
    assert "zero-point energy" in printed
    assert "Gibbs energy" in printed
    (mode,) = read(tmp_path / "out" / "modes.extxyz", ":")
    assert np.abs(mode.arrays["mode"][0, 2] / mode.arrays["mode"][1, 2]) == pytest.approx(15.999 / 1.008, rel=1e-3)
    assert mode.info["wavenumber_per_cm"] > 2000
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "mode 0" in page
    assert (tmp_path / "out" / "plots.png").stat().st_size > 5000
    assert status(*words, "-o", tmp_path / "again") == 2
    assert "Pass --relax" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_saddle_point_has_an_imaginary_mode_and_status_1(argon, tmp_path, capsys) -> None:
    argon(LennardJones(sigma=1.0, epsilon=1.0, rc=20.0))
    distance = 2 ** (1 / 6)
    row = Atoms("H3", [[0, 0, 0], [0, 0, 0.9986 * distance], [0, 0, 2 * 0.9986 * distance]])
    row.calc = LennardJones(sigma=1.0, epsilon=1.0, rc=20.0)
    each = Relaxation("row", row)
    go_down(each, fmax=1e-7, steps=100, optimizer="bfgs")
    write(tmp_path / "row.xyz", each.frames[-1])
    words = ["vib", "none.ckpt", tmp_path / "row.xyz", "--numerical", "-o", tmp_path / "out", "--json"]
    assert status(*words) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["wavenumbers_per_cm"]) == 4
    assert found["num_imaginary"] == 2  # it bends in two directions
    assert found["wavenumbers_per_cm"][0] == pytest.approx(found["wavenumbers_per_cm"][1], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("phonopy") is None, reason="phonopy is not installed")
def test_phonons_of_a_crystal_are_real_and_start_at_zero(argon, tmp_path, capsys) -> None:
    from ase.build import bulk

    argon(LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0, smooth=True))
    write(tmp_path / "ar.extxyz", bulk("Ar", a=5.26))
    main(["vib", "none.ckpt", str(tmp_path / "ar.extxyz"), "--supercell", "3", "--mesh", "6", "-o",
          str(tmp_path / "out"), "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["num_imaginary"] == 0
    assert 1.5 < found["highest_THz"] < 2.5  # 2.0 THz is measured
    assert (tmp_path / "out" / "phonopy.yaml").exists()
    assert (tmp_path / "out" / "plots.png").stat().st_size > 10_000


@pytest.mark.skipif(importlib.util.find_spec("phonopy") is not None, reason="phonopy is installed")
def test_phonons_without_phonopy_say_what_to_install(argon, tmp_path, capsys) -> None:
    from ase.build import bulk

    argon(LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0))
    write(tmp_path / "ar.extxyz", bulk("Ar", a=5.26))
    assert status("vib", "none.ckpt", tmp_path / "ar.extxyz", "-o", tmp_path / "out") == 2
    assert "torchmd-net[phonons]" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- scan


def test_pairs_of_atoms_are_smooth_at_the_cutoff(model, tmp_path, capsys) -> None:
    main(["scan", model, "--dimer", "H-O,C-C", "--points", "20", "-o", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["cutoff_A"] == 4.0
    assert [each["name"] for each in found["curves"]] == ["H-O", "C-C"]
    for each in found["curves"]:
        assert each["largest_mismatch_of_forces_meV_A"] < 1.0
        assert each["energy_jump_at_cutoff_meV"] < 1.0
        assert each["energies_eV"][-1] == pytest.approx(each["energies_eV"][-2], abs=1e-9)  # beyond the cutoff
    rows = (tmp_path / "out" / "curves.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 41


def test_a_torsion_is_turned_and_comes_back(model, tmp_path, capsys) -> None:
    write(tmp_path / "ethanol.xyz", molecule("CH3CH2OH"))
    main(["scan", model, str(tmp_path / "ethanol.xyz"), "--torsion", "0", "1", "2", "3", "--bond", "0", "1",
          "--points", "7", "-o", str(tmp_path / "out"), "--json"])  # fmt: skip
    bond, torsion = json.loads(capsys.readouterr().out)["curves"]
    assert torsion["energies_eV"][0] == pytest.approx(torsion["energies_eV"][-1], abs=1e-6)
    assert torsion["barrier_eV"] > 0
    assert bond["unit"] == "Å"
    frames = read(tmp_path / "out" / "scan_0.extxyz", ":")
    assert [atoms.get_distance(0, 1) for atoms in frames] == pytest.approx(bond["places"])
    assert frames[3].get_potential_energy() == pytest.approx(bond["energies_eV"][3])


def test_the_side_of_the_last_atom_moves() -> None:
    atoms = molecule("CH3CH2OH")
    assert 1 in moved_part(atoms, [0, 1])
    assert 0 not in moved_part(atoms, [0, 1])
    with pytest.raises(DataError, match="in a ring"):
        moved_part(molecule("C6H6"), [0, 1])
    with pytest.raises(DataError, match="without being bonded"):
        moved_part(atoms, [1, 0, 2, 3])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dimer", "H_O"], "no pair of elements"),
        (["--dimer", "H-S"], "has never seen S"),
        (["--torsion", "0", "1", "2", "3"], "no structure is given"),
        (["ETHANOL"], "give --bond, --angle or --torsion"),
        (["ETHANOL", "--bond", "0", "0"], "not different atoms"),
        (["ETHANOL", "--bond", "0", "77"], "not different atoms"),
        (["ETHANOL", "--bond", "0", "1", "--from", "2", "--to", "1"], "are no range"),
        (["--relax"], "nothing else to relax"),
    ],
)
def test_what_cannot_be_scanned_is_refused(words, told, model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("ethanol.xyz", molecule("CH3CH2OH"))
    assert status("scan", model, *["ethanol.xyz" if word == "ETHANOL" else word for word in words], "-o", "out") == 2
    assert told in capsys.readouterr().err
    assert not Path("out").exists()


def test_pairs_of_a_few_elements_are_all_pairs() -> None:
    assert pairs_of([], [1, 8]) == [("H", "H"), ("H", "O"), ("O", "O")]
    assert pairs_of(["H-O", "C-C"], [1]) == [("H", "O"), ("C", "C")]
    assert scan.ROUGH[0] > 0
