"""Each check of the data doctor finds the one fault that was planted in clean data, and nothing in the clean data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from conftest import shared
from doctor_data import copies, crystals, diagnose, faults, molecules

from torchmdnet.config import resolve
from torchmdnet.data.doctor import examine, open_configured, open_files, open_named
from torchmdnet.data.doctor.cost import measure_cost
from torchmdnet.data.doctor.neighbours import duplicates, work_between
from torchmdnet.data.doctor.repair import check_copy, plan_repair, write_cleaned
from torchmdnet.data.doctor.samples import Measured, Samples
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.frames import Frames
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.scripts.data import main
from torchmdnet.units import BOHR_TO_ANGSTROM, GPA_PER_EV_A3, energy_factor

Plant = Callable[[list[Atoms]], None]
RNG = np.random.default_rng(3)


def each(change: Callable[[Atoms], None]) -> Plant:
    def plant(frames: list[Atoms]) -> None:
        for atoms in frames:
            change(atoms)

    return plant


def scaled(**factors: float) -> Plant:
    """Labels, or positions, multiplied by numbers."""

    def change(atoms: Atoms) -> None:
        for name, factor in factors.items():
            if name == "positions":
                atoms.positions *= factor
            else:
                atoms.calc.results[name] = np.asarray(atoms.calc.results[name]) * factor

    return each(change)


# ----------------------------------------------------------------------------------------------- clean data


def test_nothing_is_found_in_clean_molecules(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, molecules())
    assert faults(diagnosis) == {}
    assert (diagnosis.lengths.unit, diagnosis.lengths.certainty) == ("Å", "certain")
    assert (diagnosis.energies.unit, diagnosis.energies.certainty) == ("eV", "certain")
    assert diagnosis.forces.unit == "eV/Å"
    assert diagnosis.slope is not None
    assert diagnosis.slope.value == pytest.approx(1.0, abs=0.03)


def test_nothing_is_found_in_clean_crystals(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, crystals())
    assert faults(diagnosis) == {}
    assert any("stress has the right sign" in finding.text for finding in diagnosis.findings)


def test_the_energy_changes_by_the_work_of_the_forces_in_a_known_potential() -> None:
    """Two atoms on a spring in space, turned at random: E = k (r - r0)² / 2."""
    k, lengths = 30.0, np.array([1.00, 1.02, 1.05, 1.07])
    samples = []
    for r in lengths:
        turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
        axis = turn[0]
        force = -k * (r - 1.03) * axis
        pos = np.array([np.zeros(3), r * axis]) + RNG.normal(size=3)
        samples.append(
            {"z": np.array([6, 1]), "pos": pos, "y": k * (r - 1.03) ** 2 / 2, "neg_dy": np.array([-force, force])}
        )
    measured = Measured(Samples("springs", "Frames", Frames.from_samples(samples)))
    pairs = np.array([[0, 1], [0, 3], [1, 2], [2, 3]])
    work = work_between(measured, pairs)
    np.testing.assert_allclose(work.work, work.rise, atol=1e-6)  # the trapezoidal rule is exact here
    np.testing.assert_allclose(work.rise, np.diff((k / 2 * (lengths - 1.03) ** 2)[pairs], axis=1)[:, 0], atol=1e-12)


# -------------------------------------------------------------------------------------------- signs and units


def test_forces_with_the_wrong_sign_are_found(tmp_path: Path) -> None:
    diagnosis = diagnose(tmp_path, molecules(), scaled(forces=-1.0))
    found = faults(diagnosis)
    assert found.keys() == {"force sign"}
    assert found["force sign"].severity == "error"
    assert found["force sign"].evidence["energy over work"] == pytest.approx(-1.0, abs=0.03)
    assert plan_repair(diagnosis).scale == {"neg_dy": -1.0}


def test_the_sign_is_found_without_energies_or_close_samples(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        for atoms in frames:
            atoms.calc.results["forces"] *= -1
            del atoms.calc.results["energy"]

    assert faults(diagnose(tmp_path, molecules(), plant)).keys() == {
        "labels",
        "force sign",
    }  # training asks for an energy


@pytest.mark.parametrize("unit", ["kcal/mol", "Hartree", "kJ/mol"])
def test_energies_and_forces_in_another_unit_are_found(tmp_path: Path, unit: str) -> None:
    factor = energy_factor("eV", unit)
    diagnosis = diagnose(tmp_path, molecules(), scaled(energy=factor, forces=factor))
    finding = faults(diagnosis)["energy unit"]
    assert (finding.severity, finding.evidence["unit"]) == ("error", unit)
    assert plan_repair(diagnosis).scale == pytest.approx({"y": 1 / factor, "neg_dy": 1 / factor})


def test_energies_in_another_unit_than_the_forces_are_found(tmp_path: Path) -> None:
    factor = energy_factor("eV", "kcal/mol")
    diagnosis = diagnose(tmp_path, molecules(), scaled(energy=factor))
    found = faults(diagnosis)
    assert found.keys() == {"energy unit", "force units"}
    assert "energies in kcal/mol with forces in eV/Å" in found["force units"].text
    scale = plan_repair(diagnosis).scale
    assert scale["y"] == pytest.approx(1 / factor)
    assert scale["neg_dy"] == pytest.approx(1.0)


def test_forces_per_bohr_beside_positions_in_angstrom_are_found(tmp_path: Path) -> None:
    factor = energy_factor("eV", "Hartree")
    plant = scaled(energy=factor, forces=factor * BOHR_TO_ANGSTROM)
    found = faults(diagnose(tmp_path, molecules(), plant))
    assert "energies in Hartree with forces in Hartree/Bohr" in found["force units"].text


@pytest.mark.parametrize(("unit", "factor"), [("Bohr", 1 / BOHR_TO_ANGSTROM), ("nm", 0.1), ("pm", 100.0)])
def test_positions_in_another_unit_are_found(tmp_path: Path, unit: str, factor: float) -> None:
    diagnosis = diagnose(tmp_path, molecules(), scaled(positions=factor, forces=1 / factor))
    found = faults(diagnosis)
    assert found.keys() == {"length unit"}
    assert (found["length unit"].severity, found["length unit"].evidence["unit"]) == ("error", unit)
    scale = plan_repair(diagnosis).scale
    assert scale == pytest.approx({"pos": 1 / factor, "neg_dy": factor}, rel=1e-5)


@pytest.mark.parametrize(
    ("factor", "words"), [(-1.0, "opposite sign"), (GPA_PER_EV_A3, "GPa"), (-10 * GPA_PER_EV_A3, "kbar")]
)
def test_a_stress_with_another_sign_or_unit_is_found(tmp_path: Path, factor: float, words: str) -> None:
    diagnosis = diagnose(tmp_path, crystals(), scaled(stress=factor))
    found = faults(diagnosis)
    assert found.keys() == {"stress"}
    assert words in found["stress"].text
    assert plan_repair(diagnosis).scale == pytest.approx({"stress": 1 / factor}, rel=1e-6)


# ---------------------------------------------------------------------------------------- single samples


def test_swapped_columns_of_forces_are_found(tmp_path: Path) -> None:
    def swap(atoms: Atoms) -> None:
        atoms.calc.results["forces"] = atoms.calc.results["forces"][:, [1, 0, 2]]

    assert faults(diagnose(tmp_path, molecules(), each(swap)))["torque"].severity == "error"


def test_a_force_that_is_not_balanced_is_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[17].calc.results["forces"][0] += (3.0, 0.0, 0.0)

    found = faults(diagnose(tmp_path, molecules(), plant))
    assert found["net force"].samples == [17]


def test_atoms_too_close_are_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[5].positions[1] = frames[5].positions[0] + (0.0, 0.0, 0.3)

    diagnosis = diagnose(tmp_path, molecules(), plant)
    finding = faults(diagnosis)["close contacts"]
    assert finding.severity == "error"
    assert finding.samples == [5]
    assert finding.evidence["closest in Å"] == pytest.approx(0.3, abs=1e-6)
    assert diagnosis.samples.where(5).endswith("frames.extxyz, frame 5")


def test_duplicates_are_found_turned_shifted_mirrored_and_reordered(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))  # a rotation or a rotation with a reflection
        for number in (3, 40, 90):
            twin = copies([frames[number]])[0]
            order = RNG.permutation(len(twin))
            moved = Atoms(twin.numbers[order], twin.positions[order] @ turn.T + 2.0)
            moved.info, moved.calc = twin.info, twin.calc
            moved.calc.results["forces"] = twin.calc.results["forces"][order] @ turn.T
            moved.calc.results.pop("dipole", None)
            moved.calc.atoms = moved
            frames.append(moved)

    count = len(molecules())
    diagnosis = diagnose(tmp_path, molecules(), plant)
    found = faults(diagnosis)
    assert found.keys() == {"duplicates"}
    assert sorted(map(tuple, found["duplicates"].evidence["pairs"])) == [(3, count), (40, count + 1), (90, count + 2)]
    assert plan_repair(diagnosis).keep.tolist() == list(range(count))


def test_one_structure_with_two_energies_is_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames += copies(frames[8:9])
        frames[-1].calc.results["energy"] += 0.5

    found = faults(diagnose(tmp_path, molecules(), plant))
    assert found["contradictions"].severity == "error"
    assert found["contradictions"].samples == [len(molecules())]


def test_a_shifted_energy_is_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[33].calc.results["energy"] += 6.0

    found = faults(diagnose(tmp_path, molecules(), plant))
    assert found.keys() == {"odd energies"}
    assert found["odd energies"].samples == [33]


def test_energies_from_two_methods_are_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        for atoms in frames[::3]:
            atoms.calc.results["energy"] += 0.9 * len(atoms)

    finding = faults(diagnose(tmp_path, molecules(), plant))["levels of theory"]
    assert set(finding.samples) <= set(range(0, len(molecules()), 3))
    assert len(finding.samples) >= 5


def test_a_force_far_beyond_the_others_is_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[11].calc.results["forces"] *= 80

    assert faults(diagnose(tmp_path, molecules(), plant))["large forces"].samples == [11]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_all_found(tmp_path: Path, value: float) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[2].calc.results["forces"][1, 2] = value
        frames[9].calc.results["energy"] = value
        frames[20].positions[0, 0] = value

    diagnosis = diagnose(tmp_path, molecules(), plant)
    assert {fault.kind for fault in diagnosis.samples.survey.faults} == {"forces", "energy", "frame"}
    assert len(plan_repair(diagnosis).keep) == len(molecules()) - 3
    assert "frames.extxyz, frame 20" in " ".join(finding.text for finding in diagnosis.findings)
    assert {finding.check for finding in diagnosis.findings if finding.severity == "error"} == {"readable"}


def moved(value: float) -> Plant:
    def plant(frames: list[Atoms]) -> None:
        frames[3].positions[1, 0] = value

    return plant


@pytest.mark.parametrize(
    ("value", "check", "severity", "words"),
    [
        (1e300, "readable", "error", "frame 3: coordinate x of atom 1 is 1e+300; up to 1e+09 is accepted"),
        (1e10, "readable", "error", "frame 3: coordinate x of atom 1 is 1e+10"),
        (1e7, "positions", "error", "1 sample has coordinates up to 1e+07 Å; up to 100000 Å is accepted"),
        (300.0, "positions", "warning", "1 sample has parts that are up to 298.3 Å apart, without a cell"),
    ],
)
def test_an_atom_out_of_the_world_is_found(tmp_path, value, check, severity, words) -> None:
    found = faults(diagnose(tmp_path, molecules(), moved(value)))[check]
    assert found.severity == severity
    assert words in found.text


def test_positions_that_no_frame_refuses_are_found_too(tmp_path: Path) -> None:
    """Of HDF5 files, whose numbers are looked at here alone."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        pos = np.stack([molecules()[0].positions] * 12) + RNG.normal(size=(12, 1, 1)) * 1e-2
        pos[4, 0, 0], pos[5, 0, 0] = 1e20, 1e7
        file["a/pos"], file["a/types"] = pos, molecules()[0].numbers
        file["a/energy"] = np.where(np.arange(12) == 7, 1e30, RNG.normal(size=12))
    found = faults(examine(open_files([str(tmp_path / "a.h5")])))
    assert found["positions"].samples == [4, 5]
    assert found["labels"].severity == "warning"  # the last of that name: no forces
    texts = [f.text for f in examine(open_files([str(tmp_path / "a.h5")])).findings if f.severity == "error"]
    assert any("energy of 1 sample: 1e+30 is more than 1e+15" in text for text in texts)


@pytest.mark.parametrize(("name", "value"), [("energy", 1e30), ("forces", -1e300)])
def test_labels_that_no_unit_explains_are_refused_with_file_and_frame(tmp_path, name, value) -> None:
    def plant(frames: list[Atoms]) -> None:
        wrong = np.array(frames[3].calc.results[name])
        wrong.flat[-1] = value
        frames[3].calc.results[name] = wrong

    diagnosis = diagnose(tmp_path, molecules(), plant)
    assert [finding.check for finding in diagnosis.findings if finding.severity == "error"] == ["readable"]
    assert f"frame 3: {name}: {abs(value):.0e} is more than 1e+15" in diagnosis.findings[0].text
    assert diagnosis.findings[0].samples == [3]
    with pytest.raises(DataError, match=f"frame 3: {name}: {abs(value):.0e}".replace("+", r"\+")):
        ASE(tmp_path / "frames.extxyz", cache=False)


@pytest.mark.parametrize("plant", [moved(1e300), moved(1e10), scaled(forces=1e299), scaled(energy=1e299)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_beyond_bounds_are_findings_and_no_warnings_of_numpy(tmp_path: Path, plant: Plant, capsys) -> None:
    frames = molecules()[:30]
    plant(frames)
    write(tmp_path / "a.extxyz", frames)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "a.extxyz")])
    assert ended.value.code == 1
    assert "Warning" not in capsys.readouterr().err


def test_forces_that_are_all_zero_or_absent_are_told(tmp_path: Path) -> None:
    found = faults(diagnose(tmp_path, molecules(), scaled(forces=0.0)))["labels"]
    assert found.severity == "error"
    assert "Every force is zero, in all 140 samples" in found.text
    found = faults(diagnose(tmp_path, crystals(), scaled(forces=0.0)))["labels"]
    assert found.severity == "warning"  # symmetry may make them so

    def some(frames: list[Atoms]) -> None:
        for atoms in frames[:5]:
            atoms.calc.results["forces"] *= 0

    assert faults(diagnose(tmp_path, molecules(), some))["labels"].samples == [0, 1, 2, 3, 4]

    def none(frames: list[Atoms]) -> None:
        for atoms in frames:
            del atoms.calc.results["forces"]

    found = faults(diagnose(tmp_path, molecules(), none))["labels"]
    assert (found.severity, found.text) == ("warning", "There are no forces, only energies are learnt.")
    found = faults(diagnose(tmp_path, molecules(), scaled(energy=0.0)))["labels"]
    assert "Every energy is 0" in found.text or "Every energy is -0" in found.text


def test_what_a_cleaned_copy_still_has_is_told(tmp_path: Path, capsys) -> None:
    frames = molecules()
    for atoms in frames:
        atoms.calc.results["forces"] *= 0
    frames[3].calc.results["energy"] = 1e30
    write(tmp_path / "a.extxyz", frames)
    words = [str(tmp_path / "a.extxyz"), "--fix", str(tmp_path / "b.extxyz"), "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    told = "".join(capsys.readouterr().out.split())  # lines end where they have to
    assert "1sampleleftout:readable" in told
    assert f"notmended,sostillin{tmp_path / 'b.extxyz'}:labels:Everyforceiszero" in told
    assert told.count("notmended") == 1  # the energy is
    with pytest.raises(SystemExit):
        main([*words[:2], str(tmp_path / "c.extxyz"), "--json"])
    assert [left["check"] for left in json.loads(capsys.readouterr().out)["left"]] == ["labels"]


def test_missing_labels_are_found_also_in_the_first_frame(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        for number in (0, 7):
            del frames[number].calc.results["forces"]
        del frames[4].calc.results["energy"]

    diagnosis = diagnose(tmp_path, molecules(), plant)
    noted = {(fault.kind, fault.sample) for fault in diagnosis.samples.survey.faults}
    assert noted == {("forces", 0), ("forces", 7), ("energy", 4)}


def test_a_file_that_ends_early_is_examined_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "cut.extxyz"
    write(path, molecules()[:50])
    path.write_text("\n".join(path.read_text().splitlines()[:-3]))
    diagnosis = examine(open_files([str(path)]))
    assert len(diagnosis.samples) == 49
    assert "frame 49: the file ends after" in faults(diagnosis)["readable"].text


def test_charges_and_dipoles_that_do_not_fit_are_found(tmp_path: Path) -> None:
    data = open_named("TinyQM", None, {"level": "gfn2", "split": "test"})
    clean = examine(data)
    assert not {"charges", "dipoles", "charge and spin"} & faults(clean).keys()
    data.frames.systems["dp"] = data.frames.systems["dp"] * np.float32(4.803)
    data.frames.systems["q"] = data.frames.systems["q"] + np.float32(1)
    data.frames._prepare()
    found = faults(examine(data))
    assert "Debye" in found["dipoles"].text
    assert len(found["charges"].samples) == len(data)
    assert len(found["charge and spin"].samples) == len(data)


def test_isolated_atoms_of_another_level_of_theory_are_found(tmp_path: Path) -> None:
    def lonely(energy: float) -> Plant:
        def plant(frames: list[Atoms]) -> None:
            elements = {int(z) for atoms in frames for z in atoms.numbers}
            free = {1: -13.6, 6: -1028.5, 7: -1484.0, 8: -2041.0}
            for z in elements:
                atoms = Atoms([z], [[0, 0, 0]])
                atoms.info["energy"] = free[z] + energy
                frames.append(atoms)

        return plant

    right = diagnose(tmp_path, molecules(), lonely(0.0))
    assert faults(right) == {}
    assert any("bound by" in finding.text for finding in right.findings)
    assert "isolated atoms" in faults(diagnose(tmp_path, molecules(), lonely(900.0)))


def test_repeats_across_a_split_are_found(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames += copies(frames[:4])
        for number, atoms in enumerate(frames):
            atoms.info["split"] = "train" if number < len(frames) - 4 else "test"

    finding = faults(diagnose(tmp_path, molecules(), plant))["split"]
    assert finding.evidence["same"] == 4


def test_elements_that_hardly_occur_are_named(tmp_path: Path) -> None:
    def plant(frames: list[Atoms]) -> None:
        frames[0].numbers[np.flatnonzero(frames[0].numbers == 8)[:1]] = 16
        frames[0].numbers[-1] = 9

    diagnosis = diagnose(tmp_path, molecules(), plant)
    assert any("F (1)" in finding.text for finding in diagnosis.findings if finding.check == "elements")


def test_dimers_far_apart_ask_for_a_longer_cutoff() -> None:
    pair = np.array([[0.0, 0, 0], [1, 0, 0], [7.3, 0, 0], [8.3, 0, 0]])  # nearest atoms 6.3 Å apart
    frames = Frames.from_samples({"z": np.ones(4, int), "pos": pair, "y": 0.0} for _ in range(5))
    cost = measure_cost(Samples("pairs", "Frames", frames), 1.0)
    assert cost.suggested == 7.0
    assert (cost.apart[6.0], cost.apart[7.0]) == (1.0, 0.0)
    assert cost.edges[5.0] == 1.0
    assert cost.edges[7.0] == pytest.approx(6 / 4)


# ------------------------------------------------------------------------------------------------ other sources


def test_numpy_files_are_examined_past_their_faults(tmp_path: Path) -> None:
    ethanol = [atoms for atoms in molecules() if atoms.numbers.tolist() == molecules()[0].numbers.tolist()]
    energy = np.array([atoms.get_potential_energy() for atoms in ethanol])
    forces = np.array([atoms.get_forces() for atoms in ethanol])
    energy[1], forces[3, 0] = np.nan, np.inf
    np.save(tmp_path / "coords.npy", [atoms.positions for atoms in ethanol])
    np.save(tmp_path / "embed.npy", ethanol[0].numbers)
    np.save(tmp_path / "energies.npy", energy)
    np.save(tmp_path / "forces.npy", forces)
    diagnosis = examine(open_files([str(tmp_path / "*.npy")]))
    assert diagnosis.samples.kind == "Custom"
    assert sorted(i for f in diagnosis.findings if f.check == "labels" for i in f.samples) == [1, 3]
    assert "energies.npy, frame 1" in faults(diagnosis)["readable"].text


def test_hdf5_files_are_examined_and_their_units_told(tmp_path: Path) -> None:
    import h5py

    first = molecules()[0].numbers.tolist()
    alike = [atoms for atoms in molecules() if atoms.numbers.tolist() == first]
    with h5py.File(tmp_path / "set.h5", "w") as file:
        group = file.create_group("molecule")
        group["pos"] = [atoms.positions for atoms in alike]
        group["types"] = alike[0].numbers
        group["energy"] = np.array([atoms.get_potential_energy() for atoms in alike]) * energy_factor("eV", "Hartree")
    diagnosis = examine(open_files([str(tmp_path / "set.h5")]))
    assert diagnosis.samples.energy_unit is None
    assert (diagnosis.energies.unit, diagnosis.energies.certainty) == ("Hartree", "certain")
    assert [finding.text for finding in faults(diagnosis).values()] == [
        "There are no forces, only energies are learnt."
    ]


@pytest.mark.parametrize(
    ("stated", "unit"), [("Hartree", "eV"), ("kJ/mol", "eV"), ("eV", "kcal/mol"), (None, "kJ/mol")]
)
@pytest.mark.parametrize("total", [True, False])
def test_a_wrong_stated_unit_is_named_with_the_right_one(tmp_path: Path, stated: str | None, unit: str, total: bool):
    frames = molecules()
    for atoms in frames:  # relative energies cannot be compared with those of free atoms
        shift = (
            0.0 if total else -sum({1: -13.6, 6: -1030.0, 7: -1486.0, 8: -2042.0}.get(z, 0.0) for z in atoms.numbers)
        )
        atoms.calc.results["energy"] += shift
    scaled(energy=energy_factor("eV", unit), forces=energy_factor("eV", unit))(frames)
    write(tmp_path / "a.extxyz", frames)
    diagnosis = examine(open_files([str(tmp_path / "a.extxyz")], {"energy_unit": stated} if stated else {}))
    assert (diagnosis.energies.unit, diagnosis.forces.unit) == (unit, f"{unit}/Å")
    found = faults(diagnosis)["energy unit"]
    assert f"in {unit}, not in {stated or 'eV'}" in found.text
    assert f"energy_unit: {unit}." in found.advice
    if total:
        assert plan_repair(diagnosis).scale["y"] == pytest.approx(energy_factor(unit, stated or "eV"))


def test_files_that_state_other_units_are_examined_apart(tmp_path: Path) -> None:
    half = len(molecules()) // 2
    write(tmp_path / "a.extxyz", molecules()[:half])
    write(tmp_path / "b.extxyz", molecules()[half:])
    named = [{"path": str(tmp_path / "a.extxyz")}, {"path": str(tmp_path / "b.extxyz"), "energy_unit": "Hartree"}]
    found = faults(examine(open_named("ASE", None, {"files": named})))["energy unit"]
    assert "certainly in eV, not in Hartree as stated (energy_unit: Hartree)" in found.text
    del named[1]["energy_unit"]
    assert "energy unit" not in faults(examine(open_named("ASE", None, {"files": named})))


def test_a_configuration_is_examined_as_training_would_see_it(tmp_path: Path) -> None:
    from torchmdnet.config import resolve

    path = tmp_path / "set.extxyz"
    factor = energy_factor("eV", "Hartree")
    frames = molecules()
    scaled(energy=factor, forces=factor)(frames)
    write(path, frames)
    (tmp_path / "my.yaml").write_text(
        f"dataset: ASE\ndataset_root: {path}\ndataset_arg: {{energy_unit: Hartree}}\nmodel: tensornet\n"
        f"train_size: 0.6\nlog_dir: {tmp_path / 'run'}\n"
    )
    diagnosis = examine(open_configured(vars(resolve(["--conf", str(tmp_path / "my.yaml")])), "my.yaml"))
    assert faults(diagnosis) == {}
    assert diagnosis.energies.unit == "Hartree"
    assert len(diagnosis.samples.splits["train"]) == int(0.6 * len(frames))
    assert not (tmp_path / "run" / "splits.npz").exists()


# ------------------------------------------------------------------------------------------------------- fixing


@pytest.mark.parametrize("suffix", ["extxyz", "h5"])
def test_the_cleaned_copy_is_clean_and_the_original_is_untouched(tmp_path: Path, suffix: str) -> None:
    def plant(frames: list[Atoms]) -> None:
        scaled(forces=-1.0)(frames)
        frames[4].positions[1] = frames[4].positions[0] + (0.0, 0.0, 0.2)
        frames[6].calc.results["forces"][0, 0] = np.nan
        frames += copies(frames[20:23])

    diagnosis = diagnose(tmp_path, molecules(), plant)
    original = (tmp_path / "frames.extxyz").read_bytes()
    target = tmp_path / f"clean.{suffix}"
    written = write_cleaned(diagnosis, plan_repair(diagnosis), target)
    assert written == len(molecules()) - 2
    assert (tmp_path / "frames.extxyz").read_bytes() == original
    again = examine(open_files([str(target)]))
    assert faults(again) == {}
    assert len(again.samples) == written
    if suffix == "extxyz":
        frames = read(target, ":")
        np.testing.assert_allclose(frames[0].get_forces(), molecules()[0].get_forces(), atol=1e-6)
        assert frames[4].info["source_frame"] == 5


def test_the_original_is_never_the_target(tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    path.write_text("")
    with pytest.raises(ConfigError, match="is the original, which is never changed"):
        check_copy(path, [path])
    with pytest.raises(ConfigError, match="does not end in"):
        check_copy(tmp_path / "clean.json", [path])


# --------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "unit", "slope"),
    [
        ("molecular/methanol_train.extxyz.gz", "eV", 1.0),
        ("raw/md17/md17_ethanol_2000.npz", "kcal/mol", 1.0),
    ],
)
def test_units_of_real_data_are_told(name: str, unit: str, slope: float) -> None:
    diagnosis = examine(open_files([str(shared(f"data/{name}"))]))
    assert (diagnosis.lengths.unit, diagnosis.energies.unit) == ("Å", unit)
    assert diagnosis.slope is not None
    assert diagnosis.slope.is_certain
    assert diagnosis.slope.value == pytest.approx(slope, rel=0.2)
    assert set(faults(diagnosis)) == (
        {"energy unit", "force units"} & set(faults(diagnosis)) if unit != "eV" else set()
    )


def test_the_published_coupled_cluster_set_of_aspirin_has_three_frames_twice() -> None:
    path = shared("data/molecular/aspirin_ccsd_train.extxyz.gz")
    found_in = open_files([str(path)])
    found = duplicates(Measured(found_in))
    pairs = np.stack([found.original, found.sample], axis=1)[found.is_same]
    assert len(pairs) == 3
    frames = found_in.frames
    starts, size = frames.ptr[pairs], 21
    pos = np.asarray(frames["pos"])
    assert all(np.array_equal(pos[a : a + size], pos[b : b + size]) for a, b in starts)


def test_everything_found_can_be_written_as_json(tmp_path: Path) -> None:
    from torchmdnet.files import plain

    diagnosis = diagnose(tmp_path, molecules()[:60], scaled(forces=-1.0))
    told = json.loads(json.dumps(plain(diagnosis.as_dict()), allow_nan=False))
    assert told["samples"] == 60
    assert told["findings"][0]["severity"] == "error"


# ------------------------------------------------------------------------------------- what training would stop at


def test_an_energy_that_is_no_number_is_an_error_as_in_training(tmp_path: Path) -> None:
    """Forces are fine, but training asks for an energy and refuses the file."""

    def plant(frames: list[Atoms]) -> None:
        for atoms in frames:
            del atoms.calc.results["energy"]
            atoms.info["E_scf"] = "a b"

    found = faults(diagnose(tmp_path, molecules()[:20], plant))["labels"]
    assert found.severity == "error"
    assert "No frame has an energy under a known name. The frames hold E_scf (text)" in found.text
    conf = tmp_path / "conf.yaml"
    for weight, severity in ((1.0, "error"), (0.0, None)):
        settings = {"dataset": "ASE", "dataset_root": str(tmp_path / "frames.extxyz"), "derivative": True}
        conf.write_text(json.dumps({**settings, "model": "tensornet", "y_weight": weight}))
        samples = open_configured(vars(resolve(["--conf", str(conf)])), "conf.yaml")
        said = [f.severity for f in examine(samples).findings if "an energy under a known name" in f.text]
        assert said == ([severity] if severity else [])


NO_FRAME = {
    "dummy.extxyz": (
        "2\nenergy=1 Properties=species:S:1:pos:R:3\nH 0 0 0\nX 0 0 1\n" * 3,
        "frame 0: atom 1 has atomic number 0",
    ),
    "one.extxyz": ("1\nenergy=1 Properties=species:S:1:pos:R:3\nX 0 0 0\n", "frame 0: atom 0 has atomic number 0"),
    "nan.extxyz": ("1\nenergy=1 Properties=species:S:1:pos:R:3\nH nan 0 0\n", "frame 0: positions is nan"),
    "void.extxyz": ("0\nenergy=1 Properties=species:S:1:pos:R:3\n", "frame 0: the frame has no atoms"),
    "empty.extxyz": ("", "the file is empty"),
    "torn.extxyz": ("3\nenergy=1 Properties=species:S:1:pos:R:3\nH 0 0 0\n", "frame 0: the file ends"),
}


@pytest.mark.parametrize("name", NO_FRAME)
def test_a_file_without_a_frame_of_use_is_one_line_and_status_1(tmp_path, capsys, name):
    text, reason = NO_FRAME[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([str(path)])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith(f"error: {path}")
    assert reason in said
    assert said.count("\n") == 1


def test_hdf5_groups_without_samples_are_told_with_their_file(tmp_path, capsys):
    path = tmp_path / "void.h5"
    with h5py.File(path, "w") as file:
        file["a/pos"], file["a/types"] = np.zeros((0, 3, 3)), np.zeros((0, 3), dtype=int)
        file["a/energy"] = np.zeros(0)
    with pytest.raises(SystemExit) as ended:
        main([str(path)])
    assert ended.value.code == 1
    assert f"{path}: there are no samples in the groups." in capsys.readouterr().err
