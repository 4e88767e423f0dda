"""Any file that ASE reads, checked against ASE's own reading of it."""

from __future__ import annotations

import gzip
import logging
import re
import time
import tracemalloc

import ase.db
import ase.io
import ase.units
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import shared

from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.structure_files import ALL, read_structures
from torchmdnet.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))


def labelled(atoms: Atoms, rng: np.random.Generator, *, stress: bool = False, **info) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(0.05, rng=rng)
    results = {"energy": rng.normal() - 10.0 * len(atoms), "forces": rng.normal(size=(len(atoms), 3))}
    if stress:
        results["stress"] = rng.normal(size=6) * 0.01
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info.update(info)
    return atoms


@pytest.fixture
def frames() -> list[Atoms]:
    rng = np.random.default_rng(3)
    names = ["H2O", "CH4", "NH3", "C6H6", "CO", "H2O", "CH3OH"]
    return [labelled(molecule(name), rng, charge=i % 3 - 1) for i, name in enumerate(names)]


def write(path, frames, **kwargs):
    ase.io.write(path, frames, **kwargs)
    return path


def edit(path, pattern, replacement, count=1):
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, count=count)
    assert changed != text
    path.write_text(changed)
    return path


def assert_same(dataset, frames):
    assert len(dataset) == len(frames)
    for data, atoms in zip((dataset[i] for i in range(len(frames))), frames, strict=True):
        np.testing.assert_array_equal(data.z, atoms.numbers)
        np.testing.assert_allclose(data.pos, atoms.positions, atol=1e-7)
        assert data.y.shape == (1, 1)
        assert data.y.item() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(data.neg_dy, atoms.get_forces(), atol=1e-6)


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz", "a.extxyz.gz", "a.traj", "a.db", "a.json"])
def test_every_format_gives_what_ase_reads(tmp_path, frames, name):
    assert_same(ASE(write(tmp_path / name, frames)), frames)


def test_a_batch_holds_molecules_of_different_sizes(tmp_path, frames):
    batch = ASE(write(tmp_path / "a.extxyz", frames)).batch([3, 0])
    np.testing.assert_array_equal(batch.z, np.concatenate([frames[3].numbers, frames[0].numbers]))
    np.testing.assert_array_equal(batch.batch, [0] * 12 + [1] * 3)
    assert batch.y.shape == (2, 1)
    assert batch.q.tolist() == [-1.0, -1.0]


def test_root_may_be_a_list_or_a_pattern_in_natural_order(tmp_path, frames, monkeypatch):
    for number in (10, 9, 1):
        write(tmp_path / f"part_{number}.extxyz", frames[number % 7])
    expected = [frames[1], frames[2], frames[3]]
    assert_same(ASE(str(tmp_path / "part_*.extxyz")), expected)
    assert_same(ASE([tmp_path / "part_9.extxyz", str(tmp_path / "part_1*.extxyz")]), [frames[2], frames[1], frames[3]])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(ASE("~/part_*.extxyz"), expected)


@pytest.mark.parametrize(("index", "expected"), [(":", slice(None)), ("2:5", slice(2, 5)), ("::-3", slice(0, None, 3))])
@pytest.mark.parametrize("name", ["a.extxyz", "a.db"])
def test_index_selects_frames(tmp_path, frames, index, expected, name):
    assert_same(ASE(write(tmp_path / name, frames), index=index), frames[expected])


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj", "a.db"])
def test_a_single_index_selects_one_frame(tmp_path, frames, name):
    assert_same(ASE(write(tmp_path / name, frames), index=-1), frames[-1:])


def test_labels_are_found_under_their_usual_names(tmp_path, frames, caplog):
    caplog.set_level(logging.INFO)
    for atoms in frames:
        atoms.info["REF_energy"] = atoms.get_potential_energy() - 5.0
        atoms.arrays["REF_forces"] = atoms.get_forces() * 2
    dataset = ASE(write(tmp_path / "a.extxyz", frames))
    assert dataset[1].y.item() == pytest.approx(frames[1].info["REF_energy"])
    np.testing.assert_allclose(dataset[1].neg_dy, frames[1].arrays["REF_forces"], atol=1e-6)
    assert dataset.keys["energy"] == "REF_energy"
    assert "'REF_energy' is used; the frames also have energy" in caplog.text


def test_keys_choose_labels(tmp_path, frames):
    for atoms in frames:
        atoms.info["ccsd"] = 1.25
        atoms.arrays["my_gradient"] = np.ones((len(atoms), 3))
    path = write(tmp_path / "a.extxyz", frames)
    dataset = ASE(path, energy_key="ccsd", forces_key="-my_gradient", charge_key=False)
    assert dataset[4].y.item() == 1.25
    assert (dataset[4].neg_dy == -1).all()
    assert "q" not in dataset[4]
    with pytest.raises(ConfigError, match="'-my_gradient'"):
        ASE(path, forces_key="my_gradient")


def test_energies_alone_and_forces_alone_are_enough(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    assert "neg_dy" not in ASE(path, forces_key=False)[0]
    assert "y" not in ASE(path, energy_key=False)[0]
    assert sorted(ASE(path, energy_key=False, forces_key=False)[0].keys()) == ["pos", "q", "z"]


def test_gradients_are_not_taken_for_forces(tmp_path, frames):
    for atoms in frames:
        atoms.arrays["gradients"] = atoms.get_forces()
        atoms.calc = None
    data = ASE(write(tmp_path / "a.extxyz", frames))
    assert "neg_dy" not in data[0]
    assert "Did you mean dataset_arg: {forces_key: '-gradients'}?" in data.absent_label("forces").reason


def test_a_database_gives_its_key_value_pairs_and_data(tmp_path, frames):
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        for i, atoms in enumerate(frames):
            database.write(atoms, total_charge=i - 2, data={"dft_forces": np.full((len(atoms), 3), i)})
    dataset = ASE(path)
    assert [dataset[i].q.item() for i in range(7)] == [-2, -1, 0, 1, 2, 3, 4]
    assert (dataset[5].neg_dy == 5).all()


def test_units_are_converted_when_they_are_given(tmp_path):
    rng = np.random.default_rng(0)
    atoms = labelled(bulk("NaCl", "rocksalt", a=5.6), rng, stress=True)
    data = ASE(write(tmp_path / "a.extxyz", atoms), energy_unit="Hartree", length_unit="Bohr")[0]
    assert data.y.item() == pytest.approx(atoms.get_potential_energy() * ase.units.Hartree, rel=1e-7)
    np.testing.assert_allclose(data.pos, atoms.positions * ase.units.Bohr, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(data.box[0], atoms.cell.array * ase.units.Bohr, rtol=1e-7)
    np.testing.assert_allclose(data.neg_dy, atoms.get_forces() * ase.units.Hartree / ase.units.Bohr, rtol=1e-4)
    expected = atoms.get_stress(voigt=False) * ase.units.Hartree / ase.units.Bohr**3
    np.testing.assert_allclose(data.stress[0], expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="energy_unit"):
        ASE(tmp_path / "a.extxyz", energy_unit="eVs")


def test_boxes_and_stresses_belong_to_each_frame(tmp_path):
    rng = np.random.default_rng(0)
    crystals = [labelled(bulk("Cu", cubic=True) * (1, 1, n), rng, stress=True) for n in (1, 2, 3)]
    dataset = ASE(write(tmp_path / "a.extxyz", crystals))
    for i, atoms in enumerate(crystals):
        np.testing.assert_allclose(dataset[i].box, atoms.cell.array[None], atol=1e-12)
        np.testing.assert_allclose(dataset[i].stress, atoms.get_stress(voigt=False)[None], rtol=1e-5)
    assert dataset.batch([0, 2]).stress.shape == (2, 3, 3)


@pytest.mark.parametrize("form", ["voigt", "matrix", "flat"])
def test_a_stress_may_be_written_in_three_ways(tmp_path, form):
    atoms = bulk("Cu", cubic=True)
    full = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
    atoms.info["energy"] = 0.0
    atoms.info["my_stress"] = {"voigt": np.array([1, 2, 3, 0.4, 0.5, 0.6]), "matrix": full, "flat": full.ravel()}[form]
    np.testing.assert_allclose(ASE(write(tmp_path / "a.extxyz", atoms), stress_key="my_stress")[0].stress[0], full)


def test_an_open_direction_has_a_zero_row_in_the_box(tmp_path):
    rng = np.random.default_rng(0)
    slab = labelled(fcc111("Cu", (2, 2, 2), vacuum=8.0), rng)
    wire = labelled(Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]], cell=[9, 9, 5], pbc=(False, False, True)), rng)
    gas = labelled(molecule("H2O"), rng)
    dataset = ASE(write(tmp_path / "a.extxyz", [slab, wire, gas]))
    box = dataset[0].box[0].numpy()
    np.testing.assert_allclose(box[:2], slab.cell.array[:2], atol=1e-12)
    np.testing.assert_array_equal(box[2], 0)
    np.testing.assert_array_equal(dataset[1].box[0], np.diag([0, 0, 5.0]))
    np.testing.assert_array_equal(dataset[2].box[0], 0)
    assert "box" not in ASE(write(tmp_path / "b.extxyz", gas))[0]


@pytest.mark.parametrize(
    ("key", "values", "convention", "expected"),
    [
        ("spin_multiplicity", [1, 3, 2], None, [0, 2, 1]),
        ("n_unpaired", [0, 2, 1], None, [0, 2, 1]),
        ("spin", [1, 3, 2], None, [0, 2, 1]),
        ("spin", [0, 2, 1], None, [0, 2, 1]),
        ("spin", [0, 1, 0.5], None, [0, 2, 1]),
        ("my_spin", [0, 1, 0.5], "total_spin", [0, 2, 1]),
    ],
)
def test_spin_is_the_number_of_unpaired_electrons(tmp_path, key, values, convention, expected):
    rng = np.random.default_rng(0)
    frames = [
        labelled(molecule("CH2_s1A1d"), rng, total_charge=0),
        labelled(molecule("CH2_s3B1d"), rng, total_charge=0),
        labelled(molecule("H2O"), rng, total_charge=1),
    ]
    for atoms, value in zip(frames, values, strict=True):
        atoms.info[key] = value
    arguments = {"spin_key": key, "spin_convention": convention} if convention else {}
    dataset = ASE(write(tmp_path / "a.extxyz", frames), **arguments)
    assert [dataset[i].s.item() for i in range(3)] == expected


def test_an_undecidable_spin_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    frames = [labelled(molecule("H2O"), rng, spin=0), labelled(molecule("H2O"), rng, spin=1)]
    path = write(tmp_path / "a.extxyz", frames)
    with pytest.raises(DataError, match="spin_convention"):
        ASE(path)
    assert "s" not in ASE(path, spin_key=False)[0]


def test_a_spin_that_does_not_fit_the_electrons_is_reported(tmp_path, caplog):
    rng = np.random.default_rng(0)
    ASE(write(tmp_path / "a.extxyz", labelled(molecule("H2O"), rng, spin_multiplicity=2)))
    assert "1 unpaired electrons do not go with 10 electrons" in caplog.text


def test_warnings_of_a_file_come_with_every_start(tmp_path, caplog):
    rng = np.random.default_rng(0)
    atoms = labelled(molecule("H2O"), rng, spin_multiplicity=2)
    atoms.positions[2] = atoms.positions[1] + (0, 0, 0.05)
    path = write(tmp_path / "a.extxyz", atoms)
    for _ in ("read", "from the cache"):
        caplog.clear()
        ASE(path)
        assert "frame 0: 1 unpaired electrons do not go with 10 electrons" in caplog.text
        assert "frame 0: atoms 1 and 2 are 0.050 Å apart" in caplog.text


def test_the_unit_of_forces_may_be_another(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    plain, own = ASE(path)[0], ASE(path, energy_unit="Hartree", forces_unit="kcal/mol/Bohr")[0]
    torch.testing.assert_close(own.y, plain.y * 27.211386245988)
    factor = 0.0433641042418009 / 0.529177210903
    torch.testing.assert_close(own.neg_dy, (plain.neg_dy.double() * factor).float())
    listed = ASE(files=[{"path": str(path), "forces_unit": "kcal/mol/Bohr"}])[0]
    torch.testing.assert_close(listed.neg_dy, own.neg_dy)
    with pytest.raises(ConfigError, match=r"forces_unit: 'eV' is not known. Write an energy .* such as eV/Å"):
        ASE(path, forces_unit="eV")


def test_an_unknown_argument_is_refused_with_the_nearest(tmp_path, frames):
    with pytest.raises(
        ConfigError, match=r"ASE has no argument 'energykey'. Did you mean 'energy_key'\? It takes root, "
    ):
        ASE(tmp_path / "a.extxyz", energykey="x")


def test_extra_quantities_come_along(tmp_path, frames):
    for atoms in frames:
        atoms.arrays["mulliken"] = np.arange(float(len(atoms)))
        atoms.info["dipole_qm"] = np.array([1.0, 2.0, 3.0])
    path = write(tmp_path / "a.extxyz", frames)
    batch = ASE(path, extra_keys={"partial_charges": "mulliken", "dp": "dipole_qm"}).batch([0, 1])
    np.testing.assert_array_equal(batch.partial_charges, [0, 1, 2, 0, 1, 2, 3, 4])
    assert batch.dp.shape == (2, 3)
    with pytest.raises(ConfigError, match="'pos'"):
        ASE(path, extra_keys=["pos"])


# --------------------------------------------------------------------------------------------- reference energies


def with_energy(atoms, energy, **info):
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    atoms.info.update(info)
    return atoms


def test_isolated_atoms_give_the_reference_energies(tmp_path):
    truth = {"H": -13.6, "O": -2043.0}
    atoms = [with_energy(Atoms(symbol), energy) for symbol, energy in truth.items()]
    atoms.append(with_energy(Atoms("O"), -2060.0, total_charge=-1))
    for single in atoms[:2]:
        single.info["total_charge"] = 0
    water = labelled(molecule("H2O"), np.random.default_rng(0), total_charge=0)
    dataset = ASE(write(tmp_path / "a.extxyz", [atoms[0], water, *atoms[1:]]), atomref="isolated")
    assert len(dataset) == 1
    table = dataset.get_atomref(20)
    assert table.shape == (20, 1)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table[[1, 8], 0], list(truth.values()), rtol=1e-6)
    assert table.count_nonzero() == 2


def test_a_set_of_nothing_but_single_atoms_keeps_them(tmp_path):
    dataset = ASE(write(tmp_path / "a.extxyz", [with_energy(Atoms("H"), -13.6), with_energy(Atoms("O"), -2043.0)]))
    assert len(dataset) == 2
    assert dataset[1].y.item() == -2043.0


def test_missing_reference_energies_are_fitted(tmp_path):
    truth = {1: -13.0, 6: -1030.0, 8: -2040.0}
    names = ["H2O", "CH4", "CO2", "CH3OH", "C6H6", "CO"]
    frames = [with_energy(m := molecule(name), sum(truth[z] for z in m.numbers)) for name in names]
    table = ASE(write(tmp_path / "a.extxyz", frames)).get_atomref()
    np.testing.assert_allclose(table[[1, 6, 8], 0], list(truth.values()), rtol=1e-6)
    # hydrogen given, and deliberately off: the others make up for it as well as they can
    partly = ASE(tmp_path / "a.extxyz", atomref={"H": -12.0}).get_atomref()
    assert partly[1].item() == -12.0
    assert partly[6].item() == pytest.approx(-1030.0, abs=4.0)
    # single atoms are no samples, so they do not enter the fit either
    frames.append(with_energy(Atoms("H"), -12.0))
    path = write(tmp_path / "b.extxyz", frames)
    np.testing.assert_allclose(ASE(path).get_atomref()[1], -13.0, rtol=1e-5)
    with pytest.raises(DataError, match="no single atom of C, O"):
        ASE(path, atomref="isolated")


def test_reference_energies_may_be_given(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    given = {"H": -1.0, "C": -2.0, "N": -3.0, "O": -4.0}
    np.testing.assert_array_equal(ASE(path, atomref=given).get_atomref()[[1, 6, 7, 8], 0], [-1, -2, -3, -4])
    with pytest.raises(ConfigError, match="'Hh' is not an element"):
        ASE(path, atomref={"Hh": 1.0})


# ------------------------------------------------------------------------------------------------------- splits


def test_files_may_be_set_aside_for_validation_and_testing(tmp_path, frames):
    parts = {"a": frames[:3], "b": frames[3:5], "c": frames[5:]}
    train, val, test = (write(tmp_path / f"{name}.extxyz", part) for name, part in parts.items())
    splits = ASE(train, val=val, test=test).splits
    assert {name: rows.tolist() for name, rows in splits.items()} == {
        "idx_train": [0, 1, 2],
        "idx_val": [3, 4],
        "idx_test": [5, 6],
    }
    assert ASE(train).splits is None
    assert set(ASE(train, test=test).splits) == {"idx_train", "idx_test"}
    with pytest.raises(DataError, match="both the train and the test"):
        ASE(train, test=train)


def test_a_split_named_in_the_frames_is_used(tmp_path, frames):
    for atoms, part in zip(frames, ["train", "val", "train", "test", "train", "train", "test"], strict=True):
        atoms.info["split"] = part
    splits = ASE(write(tmp_path / "a.extxyz", frames)).splits
    assert splits["idx_val"].tolist() == [1]
    assert splits["idx_test"].tolist() == [3, 6]


# ---------------------------------------------------------------------------------------------------- bad input


def refused(path, message, **kwargs):
    with pytest.raises(DataError, match=message):
        ASE(path, **kwargs)
    cache = path.parent / "cache" if hasattr(path, "parent") else None
    if cache is not None and cache.exists():
        assert not [p for p in cache.rglob("*") if p.is_file()], "something was written"


def test_a_missing_label_is_refused_with_file_frame_and_what_there_is(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    refused(path, r"a\.extxyz, frame 0: 'dft' is missing.*charge, energy, forces", energy_key="dft")
    frames[4].calc.results.pop("forces")
    refused(
        write(path, frames), r"a\.extxyz, frame 4: 'forces' is missing, although .*frame 0 has it.*forces_key: false"
    )
    assert len(ASE(path, forces_key=False)) == 7


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, frames, value):
    path = write(tmp_path / "a.extxyz", frames)
    energy = f"{frames[2].get_potential_energy()}"
    refused(edit(path, f"energy={energy}", f"energy={value}"), rf"a\.extxyz, frame 2: energy is {value}")
    path = write(tmp_path / "a.extxyz", frames)
    number = f"{frames[3].get_forces()[1, 2]:.8f}"
    refused(edit(path, number, value), rf"a\.extxyz, frame 3: forces is {value} at \(1, 2\)")
    number = f"{frames[3].positions[1, 2]:.8f}"
    refused(edit(write(path, frames), number, value), rf"a\.extxyz, frame 3: positions is {value} at \(1, 2\)")


def test_a_wrong_shape_is_refused(tmp_path, frames):
    frames[2].info["my_energy"] = np.array([1.0, 2.0])
    for atoms in frames:
        atoms.info.setdefault("my_energy", 1.0)
    refused(write(tmp_path / "a.extxyz", frames), r"frame 2: my_energy has shape \(2,\)", energy_key="my_energy")
    frames[1].arrays["my_forces"] = np.zeros((5, 2))
    for atoms in frames:
        atoms.arrays.setdefault("my_forces", np.zeros((len(atoms), 3)))
    refused(write(tmp_path / "a.extxyz", frames), r"frame 1: my_forces has shape \(5, 2\)", forces_key="my_forces")


def test_a_label_that_is_no_number_is_refused(tmp_path, frames):
    for atoms in frames:
        atoms.info["level"] = "dft"
    refused(write(tmp_path / "a.extxyz", frames), "frame 0: level is 'dft' instead of a number", energy_key="level")


def test_an_unknown_element_is_refused(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    refused(edit(path, r"\nO  ", "\nQq "), r"a\.extxyz, frame 0: 'Qq' is not an element")
    refused(edit(write(path, frames), r"\nN  ", "\nX  "), r"a\.extxyz, frame 2: atom 0 has atomic number 0")


def test_a_truncated_file_is_refused(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    lines = path.read_text().splitlines(keepends=True)
    for keep in range(1, len(frames[-1]) + 2):
        path.write_text("".join(lines[: len(lines) - keep]))
        refused(path, r"a\.extxyz, frame 6: the file ends after \d of 6 atoms")
    path.write_text("".join(lines)[:-60])
    refused(path, r"a\.extxyz, frame 6")


@pytest.mark.parametrize("cut", [1, 3, 20, 40, 60])
def test_a_file_cut_inside_its_last_line_is_refused_by_line(tmp_path, frames, cut):
    path = write(tmp_path / "a.extxyz", frames)
    text = path.read_text()
    assert text.endswith("\n")
    path.write_text(text.rstrip("\n"))
    assert len(ASE(path)) == len(frames)  # only the line end is missing
    path.write_text(text.rstrip()[:-cut])
    number = text.count("\n")
    with pytest.raises(
        DataError, match=rf"a\.extxyz, frame {len(frames) - 1}: line {number}, the last one, is cut off"
    ):
        ASE(path)


def test_a_cut_line_of_no_fixed_width_is_refused_where_a_number_is_missing_or_broken(tmp_path):
    text = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.0\nH 0 0 0 0.5 0.25 0.125\nH 0 0 1 0.5 0.25 -1e-3"
    (tmp_path / "whole.extxyz").write_text(text)
    assert len(ASE(tmp_path / "whole.extxyz")) == 1
    for cut in (1, 2, 4, 5, 6):  # "-1e-", "-1e", "-", "" and the space before it
        (tmp_path / "cut.extxyz").write_text(text[:-cut])
        with pytest.raises(
            DataError, match=r"cut\.extxyz, frame 0: line 4, the last one, is cut off: 'H 0 0 1 0\.5 0\.2"
        ):
            ASE(tmp_path / "cut.extxyz")


def test_a_truncated_compressed_file_is_refused(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    packed = tmp_path / "b.extxyz.gz"
    packed.write_bytes(gzip.compress(path.read_bytes() * 30)[:-30])
    refused(packed, r"b\.extxyz\.gz, frame \d+: the file cannot be read on")


@pytest.mark.parametrize("name", ["a.traj", "a.db"])
def test_a_truncated_binary_file_is_refused(tmp_path, frames, name):
    path = write(tmp_path / name, frames)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refused(path, rf"{name}")


@pytest.mark.parametrize(("name", "text", "told"), [
    ("a.json", '{"1": {"numbers": [1], "positions": [[0, 0, 0]]}, "ids": [1], "nextid": 2}',
     "a.json, frame 0: cannot be read as ASE JSON database ('unique_id' is missing)."),
    ("b.json", "[1, 2",
     "b.json: cannot be read as ASE JSON database (Expecting ',' delimiter: line 1 column 6 (char 5))."),
    ("c.traj", "no trajectory", "c.traj: cannot be read as ASE trajectory (This is not an ULM formatted file)."),
    ("POSCAR", "x\n1.0\n1 0 0\n0 1 0\n0 0 1\nH\n2\nDirect\n0 0 0\n",
     "POSCAR: cannot be read as VASP POSCAR/CONTCAR (could not broadcast input array from shape (0,) into shape "
     "(3,))."),
])  # fmt: skip
def test_what_another_package_cannot_read_is_told_without_the_names_of_its_code(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_structures(tmp_path / name, ALL))
    assert str(caught.value) == f"{tmp_path}/{told}"


def test_blank_lines_lose_no_frames(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    path.write_text(path.read_text().replace("\n5\n", "\n\n5\n") + "\n\n")
    assert_same(ASE(path), frames)


def test_cell_vectors_may_follow_the_atoms(tmp_path):
    path = tmp_path / "a.xyz"
    frame = "2\nE\nH 0 0 0\nH 0 0 0.7\nVEC1 5 0 0\nVEC2 0 6 0\nVEC3 0 0 7\n"
    path.write_text(frame + frame.replace("VEC3 0 0 7", "VEC3 0 0 8"))
    frames = list(read_structures(path, ALL))
    assert [atoms.cell.lengths().tolist() for _, atoms in frames] == [[5, 6, 7], [5, 6, 8]]


def test_text_between_frames_is_refused(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    refused(edit(path, r"\n5\n", "\n# five\n5\n"), r"frame 1: line 6 should be a number of atoms, but it is '# five'")


ATOM = "\nH 0 0 0\n"
HOSTILE = {
    "columns": ("1\nProperties=species:S:1:pos:R:99999999999" + ATOM, r"line 2: .* '99999999999' columns for 'pos'"),
    "quoted": ('1\nProperties = "species:S:1:pos:R:9_999_999_999"' + ATOM, r"line 2: .* '9_999_999_999' columns"),
    "second": (
        "1\nProperties=species:S:1:pos:R:3 Properties={species:S:1:pos:R:+99999999999}" + ATOM,
        r"line 2: .* '\+99999999999' columns for 'pos'. A number from 1 to 100,000 is accepted",
    ),
    "no atoms": ("0\nProperties=species:S:1:pos:R:99999999999\n", r"line 2: .* '99999999999' columns"),
    "many": ("0\nProperties=species:S:1:pos:R:3:a:R:99999\n", "lists 100,003 columns, but no line may have more"),
    "more": ("1\nProperties=species:S:1:pos:R:3:f:R:9000" + ATOM, "lists 9,004 columns, but the first atom has 4"),
    "no kind": ("1\nProperties=species:S:1:pos:R" + ATOM, "Properties is 'species:S:1:pos:R'. It should have"),
    "no pos": ("1\nProperties=species:S:1:Pos:R:3" + ATOM, "Properties has no positions, only species, Pos"),
    "count": ("99999999999\n" + ATOM, "line 1 should be a number of atoms, but it is '99999999999'. A number from 0"),
    "negative": ("-3\n" + ATOM, "line 1 should be a number of atoms, but it is '-3'"),
    "long line": ("1" * (2**23 + 1), "line 1 has more than 8,388,608 characters"),
    "long comment": ("1\n" + "1" * (2**23 + 1) + ATOM, "line 2 has more than 8,388,608 characters"),
    "no lines": ("3\n\nH 0 0 0\n\n\n", "line 4 is empty after 1 of 3 atoms. Correct the number in line 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_asks_for_more_than_the_file_holds_is_refused_before_it_is_parsed(tmp_path, name, monkeypatch):
    def parse(_):
        raise AssertionError("the frame was handed to ASE")

    monkeypatch.setattr("torchmdnet.datasets.structure_files._parse_extxyz", parse)
    (tmp_path / "a.xyz").write_text(HOSTILE[name][0])
    refused(tmp_path / "a.xyz", r"a\.xyz.*" + HOSTILE[name][1])


@pytest.mark.parametrize("content", [b"0" * 2**26, b"9000000\n\n" + b"\n" * 2**26])
def test_a_small_file_that_unpacks_to_much_is_not_unpacked_whole(tmp_path, content):
    (tmp_path / "a.xyz.gz").write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    try:
        refused(tmp_path / "a.xyz.gz", r"line 1 has more than|line 4 is empty")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


COUNTED = {
    "a.lammpstrj": "ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n99999999999\nITEM: BOX BOUNDS pp pp pp\n0 1\n",
    "a.vasp": "x\n1.0\n5 0 0\n0 5 0\n0 0 5\nH O\n1 99999999999\nDirect\n0 0 0\n",
    "b.vasp": "H\n1.0\n5 0 0\n0 5 0\n0 0 5\n99999999999\nDirect\n0 0 0\n",
    "a.gro": "x\n99999999999\n    1H       H    1   0.000   0.000   0.000\n 1 1 1\n",
    "a.gen": "99999999999 C\nH\n1 1 0 0 0\n",
    "a.cube": "x\ny\n99999999999 0 0 0\n1 1 0 0\n",
    "a.xsf": "CRYSTAL\nPRIMVEC\n1 0 0\n0 1 0\n0 0 1\nPRIMCOORD\n99999999999 1\nH 0 0 0\n",
    "a.lammps-data": "x\n99999999999 atoms\n1 atom types\n",
    "a.cfg": "Number of particles = 99999999999\nA = 1\n",
}


@pytest.mark.parametrize("name", COUNTED)
def test_more_atoms_than_bytes_are_refused_in_other_formats(tmp_path, name):
    (tmp_path / name).write_text(COUNTED[name])
    refused(tmp_path / name, r"line \d states .*99999999999 atoms, more than the file has bytes")


CIF = """data_é
_cell_length_a 9
_cell_length_b 9
_cell_length_c 9
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_symmetry_equiv_pos_as_xyz
{operations}
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
{atoms}
"""


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_symmetry_that_would_take_hours_is_refused_with_the_number_of_sites(tmp_path, suffix):
    def cif(number, operations):
        return CIF.format(
            operations="\n".join(f"'x+{k}/{operations},y,z'" for k in range(operations)),
            atoms="\n".join(f"C{k} 0 {k / number:.4f} 0" for k in range(number)),
        ).encode("latin-1")

    def write_file(content):
        path = tmp_path / f"a.cif{suffix}"
        path.write_bytes(gzip.compress(content) if suffix else content)
        return path

    small, large = cif(3, 2), cif(2000, 192)
    refused(write_file(large), r"2,000 x 192 = 384,000 sites\. At most 4,000 are read.*extended XYZ")
    refused(write_file(small + large), r"2,000 x 192 = 384,000 sites")
    ((_, atoms),) = read_structures(write_file(small), ALL)
    assert len(atoms) == 6


@pytest.mark.parametrize("name", ["a.vasp", "a.gro", "a.gen", "a.xsf"])
def test_counts_of_atoms_that_are_right_are_accepted(tmp_path, name):
    atoms = Atoms("OH2", [[0, 0, 0], [0, 0.7, 0.5], [0, -0.7, 0.5]], cell=[5, 6, 7], pbc=True)
    ((_, found),) = read_structures(write(tmp_path / name, atoms), ALL)
    assert sorted(found.numbers) == [1, 1, 8]


def test_a_unit_that_a_file_states_wrongly_is_an_error_of_the_data(tmp_path, frames):
    frames[0].info["energy_unit"] = "bananas"
    refused(write(tmp_path / "a.extxyz", frames), r"a\.extxyz, frame 0: energy_unit: 'bananas' is not known")


def test_words_in_a_comment_that_closes_no_bracket_take_no_time_worth_telling(tmp_path):
    (tmp_path / "a.xyz").write_text("1\ncharge 1 " + "a={ " * 50_000 + ATOM)
    began = time.monotonic()
    assert len(list(read_structures(tmp_path / "a.xyz", ALL))) == 1
    assert time.monotonic() - began < 10  # a minute if every bracket is looked for to the end


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "a.extxyz"
    path.write_text("")
    refused(path, "the file is empty")
    path.write_text("\n\n")
    refused(path, "there are no frames")


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"dataset_root: There is no file"):
        ASE(tmp_path / "nothing.xyz")
    with pytest.raises(DataError, match=r"No file matches the pattern .*\*\.xyz"):
        ASE(str(tmp_path / "*.xyz"))
    with pytest.raises(DataError, match=r"is a folder.*\*\.extxyz"):
        ASE(tmp_path)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "a.quux"
    path.write_text("hello\n")
    refused(path, r"a\.quux: ASE does not know this kind of file")


def test_a_file_given_twice_is_refused(tmp_path, frames):
    path = write(tmp_path / "a.extxyz", frames)
    with pytest.raises(DataError, match="listed twice"):
        ASE([path, str(path)])


def test_periodic_frames_need_a_cell(tmp_path):
    atoms = labelled(Atoms("H2", [[0, 0, 0], [0, 0, 1]], pbc=True), np.random.default_rng(0))
    refused(write(tmp_path / "a.traj", atoms), r"frame 0: pbc is \[True, True, True\]")


def test_a_stress_without_a_full_cell_is_refused(tmp_path):
    slab = labelled(fcc111("Cu", (1, 1, 2), vacuum=8.0), np.random.default_rng(0), stress=True)
    path = write(tmp_path / "a.extxyz", slab)
    refused(path, "stress_key: false")
    assert "stress" not in ASE(path, stress_key=False)[0]


@pytest.mark.parametrize("kind", ["open", "across the boundary"])
def test_atoms_on_top_of_each_other_are_reported(tmp_path, caplog, kind):
    if kind == "open":
        atoms = Atoms("H2O", [[0, 0, 0], [1, 0, 0], [1, 0, 0.05]])
    else:
        atoms = Atoms(
            "H2O", [[5, 3, 9.97], [1, 0, 0], [5, 3, 0.02]], cell=[[10, 0, 0], [1, 9, 0], [0, 0, 10]], pbc=True
        )
    atoms.info["energy"] = 0.0
    ASE(write(tmp_path / "a.extxyz", atoms))
    assert re.search(r"frame 0: atoms [012] and 2 are 0\.050 Å apart", caplog.text)


def test_what_no_model_takes_is_refused_with_its_frame(tmp_path):
    near = Atoms("H2O", [[0, 0, 0], [1, 0, 0], [1, 0, 1e-6]])
    flat = Atoms("H", [[0, 0, 0]], cell=[5, 5, 1e-3], pbc=True)
    for atoms, told in (
        (near, r"frame 0: atoms 1 and 2 are 1e-06 Å apart"),
        (flat, r"frame 0: pbc is .* does not span"),
    ):
        atoms.info["energy"] = 0.0
        with pytest.raises(DataError, match=told):
            ASE(write(tmp_path / "a.extxyz", atoms))


def test_ordinary_molecules_and_crystals_do_not_overlap(tmp_path, frames, caplog):
    rng = np.random.default_rng(0)
    crystals = [labelled(bulk("Cu"), rng), labelled(fcc111("Cu", (2, 2, 2), vacuum=5), rng)]
    ASE(write(tmp_path / "a.extxyz", [*frames, *crystals]), charge_key=False)
    assert "apart" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": "a:b"}, "index: 'a:b'"),
        ({"index": "::0"}, "step of zero"),
        ({"energy_key": 3}, "energy_key: 3"),
        ({"spin_convention": "2S"}, "spin_convention: '2S'"),
        ({"atomref": "fitted"}, "atomref: 'fitted'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path, frames, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ASE(write(tmp_path / "a.extxyz", frames), **arguments)


# -------------------------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize(
    "name", ["embedded/gfn1_periodic", "molecular/carbene_singlet_triplet", "periodic/mlearn_Li_train"]
)
def test_published_files_agree_with_ase(name):
    path = shared(f"data/{name}.extxyz.gz")
    with gzip.open(path, "rt") as file:
        frames = ase.io.read(file, index=":20", format="extxyz")
    dataset = ASE(path, index=":20")
    assert_same(dataset, frames)
    for data, atoms in zip((dataset[i] for i in range(20)), frames, strict=True):
        if "stress" in data:
            np.testing.assert_allclose(data.stress[0], atoms.get_stress(voigt=False), rtol=1e-5, atol=1e-9)
        if "s" in data:
            assert data.s.item() == atoms.info["spin_multiplicity"] - 1


def test_units_and_level_of_theory_in_the_header_of_the_frames_are_taken(tmp_path, frames):
    for atoms in frames:
        atoms.info.update(energy_unit="Hartree", length_unit="Bohr", level_of_theory="PBE/def2-SVP")
    ase.io.write(tmp_path / "a.extxyz", frames)
    data = ASE(tmp_path / "a.extxyz")
    assert data.level_of_theory == "PBE/def2-SVP"
    energies = [atoms.get_potential_energy() * ase.units.Hartree for atoms in frames]
    np.testing.assert_allclose(np.ravel(data.frames["y"]), energies, rtol=1e-7)
    np.testing.assert_allclose(data[0].pos, frames[0].positions * ase.units.Bohr, atol=1e-6)
    np.testing.assert_allclose(data[0].neg_dy, frames[0].get_forces() * ase.units.Hartree / ase.units.Bohr, atol=1e-5)


def test_frames_that_state_different_units_are_refused(tmp_path, frames):
    for atoms in frames:
        atoms.info["energy_unit"] = "eV"
    frames[3].info["energy_unit"] = "kcal/mol"
    ase.io.write(tmp_path / "a.extxyz", frames)
    with pytest.raises(DataError, match="frame 3: energy_unit is 'kcal/mol', although it is 'eV' in"):
        ASE(tmp_path / "a.extxyz")


def test_frames_of_several_levels_of_theory_have_none_in_common(tmp_path, frames, caplog):
    for number, atoms in enumerate(frames):
        atoms.info["level_of_theory"] = "PBE" if number < 5 else "B3LYP"
    ase.io.write(tmp_path / "a.extxyz", frames)
    with caplog.at_level(logging.INFO):
        assert ASE(tmp_path / "a.extxyz").level_of_theory is None
    assert "frame 5 has another than" in caplog.text
