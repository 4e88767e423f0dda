"""``torchmd-net eval``: errors against ones computed by hand, and a page that holds what it shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from torchmdnet.calculators import TMDNETCalculator
from torchmdnet.checkpoint import save_model
from torchmdnet.evaluation import report
from torchmdnet.evaluation.errors import calibration, formula_of, stat, within_compositions
from torchmdnet.scripts.main import main
from torchmdnet.testing import tiny_model

PROVENANCE = {"units": {"energy": "kcal/mol", "length": "Å"}, "elements": [1, 6, 8, 14], "level_of_theory": "made up"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(("first", "second")):
        model = tiny_model("tensornet", seed=seed, precision=32)
        save_model(model, folder / f"{name}.safetensors", provenance=PROVENANCE)
    paths = [str(folder / f"{name}.safetensors") for name in ("first", "second")]
    main(["convert", *paths, str(folder / "both.zip")])
    return [*paths, str(folder / "both.zip")]


def labelled(start: Atoms, model: str, rng: np.random.Generator, kind: str) -> Atoms:
    """A structure with labels beside the predictions of a model: the errors are known."""
    atoms = start.copy()
    atoms.rattle(0.03, rng=rng)
    atoms.calc = TMDNETCalculator(model)
    results = {
        "energy": atoms.get_potential_energy() + 0.01 * len(atoms) * rng.normal(),
        "forces": atoms.get_forces() + 0.1 * rng.normal(size=(len(atoms), 3)),
    }
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress() + 0.001
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["config_type"] = kind
    return atoms


@pytest.fixture(scope="module")
def data(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    frames = [labelled(molecule("H2O"), models[0], rng, "water") for _ in range(6)]
    frames += [labelled(molecule("CH4"), models[0], rng, "methane") for _ in range(5)]
    write(folder / "molecules.extxyz", frames)
    write(folder / "crystal.extxyz", [labelled(bulk("Si"), models[0], rng, "silicon") for _ in range(3)])
    return folder


@pytest.fixture
def no_plots(monkeypatch) -> None:
    for name in ("draw_parity", "draw_errors", "draw_calibration"):
        monkeypatch.setattr(report, name, lambda *args: b"plots")


def by_hand(model: str, paths: list[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of energies per atom, force components and stress, in meV and Å, one structure at a time."""
    calculator = TMDNETCalculator(model, remove_ref_energy=False)
    energies, forces, stress = [], [], []
    for path in paths:
        for atoms in read(path, ":"):
            copy = atoms.copy()
            copy.calc = calculator
            energies.append((copy.get_potential_energy() - atoms.get_potential_energy()) / len(atoms))
            forces.append((copy.get_forces() - atoms.get_forces()).ravel())
            if atoms.pbc.all():
                stress.append((copy.get_stress(voigt=False) - atoms.get_stress(voigt=False)).ravel())
    return tuple(1000 * np.concatenate([np.atleast_1d(x) for x in each]) for each in (energies, forces, stress))


def test_errors_are_those_of_each_structure_by_itself(models, data, tmp_path, capsys, no_plots) -> None:
    paths = [data / "molecules.extxyz", data / "crystal.extxyz"]
    main(["eval", models[1], *map(str, paths), "-o", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    energies, forces, stress = by_hand(models[1], paths)
    for name, values in (("energy per atom", energies), ("force component", forces), ("stress component", stress)):
        row, sizes = model["errors"][name], np.abs(values)
        assert row["number"] == len(values)
        assert row["mae"] == pytest.approx(sizes.mean(), rel=1e-3)
        assert row["rmse"] == pytest.approx(np.sqrt((values**2).mean()), rel=1e-3)
        assert row["p95"] == pytest.approx(np.percentile(sizes, 95), rel=1e-3)
    relative = np.concatenate([energies[:6] - energies[:6].mean(), energies[6:11] - energies[6:11].mean(),
                               energies[11:] - energies[11:].mean()])  # fmt: skip
    row = model["errors"]["energy per atom within a composition"]
    assert row["mae"] == pytest.approx(np.abs(relative).mean(), rel=1e-3)
    groups = model["groups"]
    assert {row["element"]: row["atoms"] for row in groups["element"]} == {"H": 32, "C": 5, "O": 6, "Si": 6}
    assert {row["composition"] for row in groups["composition"]} == {"H2O", "CH4", "Si2"}
    assert {row["kind"]: row["structures"] for row in groups["kind"]} == {"water": 6, "methane": 5, "silicon": 3}
    files = {row["file"]: row for row in groups["file"]}
    assert files["crystal.extxyz"]["energy_mae_meV_atom"] == pytest.approx(np.abs(energies[11:]).mean(), rel=1e-3)


def test_the_worst_structures_have_both_answers(models, data, tmp_path, capsys, no_plots) -> None:
    main(["eval", models[0], str(data / "molecules.extxyz"), "-o", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "11 structures, 43 atoms" in printed
    assert re.search(r"force component +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +meV/Å", printed)
    worst = read(tmp_path / "worst.extxyz", ":")
    errors = [atoms.info["force_mae_meV_per_A"] for atoms in worst]
    assert errors == sorted(errors, reverse=True)
    atoms = worst[0]
    difference = atoms.arrays["predicted_forces"] - atoms.arrays["reference_forces"]
    assert 1000 * np.abs(difference).mean() == pytest.approx(errors[0], rel=1e-3)
    rows = (tmp_path / "errors.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 12
    assert rows[0].startswith("structure,formula,atoms,energy_error_meV_per_atom,force_mae_meV_per_A")


def test_the_page_holds_every_structure_and_needs_no_other_file(models, data, tmp_path) -> None:
    main(["eval", *models[:2], models[2], str(data / "molecules.extxyz"), "-o", str(tmp_path)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert text is not None
    held = json.loads(text[1])
    assert len(held["structures"]) == len(held["names"]) == 11
    assert len(held["models"]) == 3
    assert held["models"][0]["force"] != held["models"][1]["force"]
    assert not re.search(r'(src|href)="(?!data:)', page)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"parity_first.png", "parity_both.png", "errors.png", "calibration_both.png", "worst_second.extxyz"} <= names
    assert (tmp_path / "errors.png").stat().st_size > 20_000


def test_a_part_of_the_data_is_compared_alone(models, data, tmp_path, capsys, no_plots) -> None:
    np.savez(tmp_path / "splits.npz", idx_train=np.arange(8), idx_test=np.array([8, 9, 10]))
    words = ["eval", models[0], str(data / "molecules.extxyz"), "--json"]
    main([*words, "-o", str(tmp_path / "a"), "--splits", str(tmp_path / "splits.npz"), "--split", "test"])
    found = json.loads(capsys.readouterr().out)
    assert found["structures"] == 3
    assert found["elements"] == ["H", "C"]
    main([*words, "-o", str(tmp_path / "b"), "--max", "4"])
    assert json.loads(capsys.readouterr().out)["structures"] == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["MODEL"], "no data are given"),
        (["DATA"], "no model is given"),
        (["MODEL", "UNLABELLED"], "there are no labels, neither energies nor forces"),
        (["MODEL", "DATA", "--split", "test"], "'test' is not a part of"),
        (["MODEL", "DATA", "--splits", "x.npz"], "Name one with --split"),
        (["MODEL", "DATA", "--device", "gpu"], "'gpu' is not available"),
        (["MODEL", "DATA", "--dataset", "QM9"], "one of the two"),
        (["MODEL", "DATA", "--dataset-arg", "[1]"], "should be a mapping"),
        (["MODEL", "none.extxyz"], "none.extxyz"),
        (["MODEL", "DATA", "--split", "test", "--splits", "."], "is a folder, not a file"),
        (
            ["MODEL", "SULPHUR"],
            "has never seen S: it was trained on H, C, O, Si. Its answer is not learned. Pass --allow-unseen",
        ),
        (["CHARGED", "IONS"], "has never seen charge 3: it was trained on -1 to 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    words, told, models, data, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("unlabelled.extxyz", molecule("H2O"))
    for name, charge in (("SH2", 0), ("H2O", 3)):
        atoms = molecule(name)
        atoms.info["charge"] = charge
        atoms.calc = SinglePointCalculator(atoms, energy=0.0)
        write(f"{name}.extxyz", atoms)
    if "CHARGED" in words:
        charged = tiny_model("tensornet", precision=32, charge=True)
        save_model(charged, "charged.safetensors", provenance=PROVENANCE | {"training": {"total_charge": [-1, 1]}})
    names = {"MODEL": models[0], "DATA": str(data / "molecules.extxyz"), "UNLABELLED": "unlabelled.extxyz"}
    names |= {"SULPHUR": "SH2.extxyz", "IONS": "H2O.extxyz", "CHARGED": "charged.safetensors"}
    with pytest.raises(SystemExit):
        main(["eval", *[names.get(word, word) for word in words], "-o", "out"])
    assert told in capsys.readouterr().err
    assert not Path("out").exists()


def test_elements_that_were_not_trained_are_compared_where_that_is_asked_for(
    models, tmp_path, capsys, no_plots, caplog
) -> None:
    atoms = molecule("SH2")
    atoms.calc = SinglePointCalculator(atoms, energy=0.0)
    write(tmp_path / "s.extxyz", atoms)
    main(["eval", models[0], str(tmp_path / "s.extxyz"), "-o", str(tmp_path / "out"), "--json", "--allow-unseen"])
    assert json.loads(capsys.readouterr().out)["structures"] == 1
    assert "has never seen S" in caplog.text


def test_sizes_of_errors() -> None:
    values = np.array([1.0, -2.0, 3.0, np.nan])
    found = stat(values, np.array([0.0, 2.0, 4.0, 5.0]))
    assert (found.number, found.mae, found.largest) == (3, 2.0, 3.0)
    assert found.rmse == pytest.approx(np.sqrt(14 / 3))
    assert found.p95 == pytest.approx(2.9)
    assert found.spread == pytest.approx(np.std([0, 2, 4]))


def test_differences_within_compositions() -> None:
    found = within_compositions(np.array([1.0, 3.0, 5.0, 7.0]), np.array(["a", "b", "a", "c"]))
    np.testing.assert_array_equal(found, [-2.0, np.nan, 2.0, np.nan])
    assert formula_of(np.array([8, 6, 1, 1, 1, 6])) == "C2H3O"
    assert formula_of(np.array([14, 8, 8])) == "O2Si"


def test_a_calibrated_spread_is_found_to_be_one() -> None:
    rng = np.random.default_rng(0)
    spread = rng.uniform(1, 10, 4000)
    found = calibration("energy", "meV", spread, 2 * spread * rng.normal(size=4000))
    assert found is not None
    assert found.factor == pytest.approx(2, rel=0.05)
    assert found.inside == pytest.approx(0.383, abs=0.03)  # of a normal distribution within half a deviation
    assert found.correlation > 0.3
    np.testing.assert_allclose(found.found / found.predicted, 2, rtol=0.2)
    assert calibration("energy", "meV", spread[:5], spread[:5]) is None
