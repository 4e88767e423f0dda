"""What a name in a file is taken for: words of a comment, names in capitals, virials, free energies, isotopes."""

from __future__ import annotations

import json
import logging
import zlib

import ase.db
import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_masses

from torchmdnet.data import DataModule
from torchmdnet.data.doctor import examine, open_files
from torchmdnet.datasets import ASE, HDF5, Custom
from torchmdnet.datasets.structure_files import ALL, read_structures
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import energy_factor


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))


def write_xyz(path, *comments, atoms="O 0 0 0\nH 0 0 1\nH 0 1 0\n"):
    path.write_text("".join(f"{atoms.count(chr(10))}\n{comment}\n{atoms}" for comment in comments))
    return path


def water(seed=0, **results):
    atoms = molecule("H2O")
    atoms.rattle(0.05, seed=seed)
    forces = np.random.default_rng(seed).normal(size=(3, 3))
    atoms.calc = SinglePointCalculator(atoms, **{"energy": -10.0 - seed, "forces": forces, **results})
    return atoms


def save(path, frames):
    ase.io.write(path, frames)
    return path


def ready(path, root=None, **options):
    settings = {"dataset": "ASE", "dataset_root": str(path), "train_size": None, "val_size": 1, "test_size": 1}
    module = DataModule({**settings, "num_workers": 0, "y_weight": 1.0, "neg_dy_weight": 1.0, **options})
    module.setup()
    return module


# ------------------------------------------------------------------------------------------------ words in a comment


@pytest.mark.parametrize(
    ("comment", "energy"),
    [
        ("Coordinates from ORCA-job water E -76.4", -76.4),
        ("E: -76.4 charge 0", -76.4),
        ("i = 12, time = 6.000, E = -17.16", -17.16),
        ("energy -3.5 eV, relaxed", -3.5),
        ("title 'energy 5' energy -2", -2.0),
    ],
)
def test_a_word_before_a_number_is_its_name(tmp_path, comment, energy):
    assert ASE(write_xyz(tmp_path / "a.xyz", comment))[0].y.item() == energy


def test_charge_and_spin_may_be_words_before_numbers(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", "charge 1 multiplicity 2 energy=-3", "energy=-4 charge -1 multiplicity 2")
    data = ASE(path)
    assert [data[i].q.item() for i in range(2)] == [1, -1]
    assert [data[i].s.item() for i in range(2)] == [1, 1]
    weighted = ASE(write_xyz(tmp_path / "b.xyz", "config_weight 3.0 energy=-1"))
    assert weighted[0].config_weight.item() == 3.0


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("E -76.4 Hartree", r"E is True, which is no number\. .*write E=NUMBER"),
        ("E -3 4", "E is True"),
        ("energy 1 energy 2", "energy is True"),
        ("lowest energy of all", "energy is True.*energy_key: false"),
        ("energy=T", "energy is True"),
        ("energy=F", "energy is False, which is no number"),
        ("energy=-1 charge", "charge is True.*charge_key: false"),
        ("energy=-1 q", "q is True"),
        ("energy=-1 config_weight", "config_weight is True"),
        ("energy=none", "energy is 'none' instead of a number"),
    ],
)
def test_words_without_a_number_are_no_labels(tmp_path, comment, message):
    with pytest.raises(DataError, match=rf"a\.xyz, frame 0: {message}"):
        ASE(write_xyz(tmp_path / "a.xyz", comment))


def test_a_word_in_place_of_a_number_in_a_later_frame_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.xyz, frame 1: energy is True, which is no number"):
        ASE(write_xyz(tmp_path / "a.xyz", "energy=-1", "lowest energy"))


def test_the_doctor_finds_words_taken_for_energies(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", *["E -76.4"] * 3, "E -76.4 Hartree")
    diagnosis = examine(open_files([str(path)]))
    (finding,) = [finding for finding in diagnosis.findings if finding.check == "readable"]
    assert finding.severity == "error"
    assert list(finding.samples) == [3]
    assert "frame 3: E is True" in finding.text


@pytest.mark.parametrize("kind", ["parquet", "lmdb", "npz", "db"])
def test_true_and_false_are_no_labels_in_tables(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    rows = {"numbers": [1, 1], "positions": [[0.0, 0, 0], [0, 0, 1]], "energy": -1.0, "charge": True}
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({k: [v] for k, v in rows.items()}), path)
    elif kind == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(path), subdir=False, map_size=2**20) as env, env.begin(write=True) as transaction:
            transaction.put(b"1", zlib.compress(json.dumps(rows).encode()))
            transaction.put(b"nextid", zlib.compress(b"2"))
    elif kind == "npz":
        np.savez(path, z=[1, 1], R=[rows["positions"]], E=[-1.0], charge=[True])
    else:
        with ase.db.connect(path) as database:
            database.write(Atoms("H2", rows["positions"]), data={"energy": -1.0, "charge": True})
    with pytest.raises(DataError, match=rf"a\.{kind}, frame 0: charge is True, which is no number"):
        ASE(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ma.masked_array([1.0], mask=[True]), "charge is nan"),
        (np.array([1 + 1j]), "charge holds complex numbers"),
        ("one", "charge is 'one' instead of a number"),
    ],
)
def test_values_that_are_no_numbers_are_no_labels(tmp_path, value, message, monkeypatch):
    atoms = water()
    atoms.info["charge"] = value
    path = save(tmp_path / "a.extxyz", water())
    monkeypatch.setattr("torchmdnet.datasets.structure_labels.read_structures", lambda *_: [(0, atoms)])
    with pytest.raises(DataError, match=f"frame 0: {message}"):
        ASE(path, cache=False)


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_an_energy_may_be_an_array_of_one_number(tmp_path, shape):
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(molecule("H2O"), data={"energy": np.full(shape, -2.5)})
    assert ASE(tmp_path / "a.db")[0].y.item() == -2.5


# ------------------------------------------------------------------------------------------------- names of labels


def renamed(name, kind="energy", number=6):
    frames = [water(seed) for seed in range(number)]
    for atoms in frames:
        value = atoms.calc.results.pop(kind)
        (atoms.info if kind == "energy" else atoms.arrays)[name] = value
    return frames


@pytest.mark.parametrize("name", ["ENERGY", "Total_Energy", "dft_Energy"])
def test_capitals_do_not_hide_a_label(tmp_path, name, caplog):
    with caplog.at_level(logging.INFO):
        data = ASE(save(tmp_path / "a.extxyz", renamed(name)))
    assert data[2].y.item() == -12.0
    assert f"energy_key: {name!r} is taken for the energy" in caplog.text


def test_two_names_that_differ_in_capitals_alone_are_refused(tmp_path):
    frames = renamed("ENERGY")
    for atoms in frames:
        atoms.info["eNeRgY"] = 0.0
    with pytest.raises(DataError, match=r"frame 0: 'ENERGY', 'eNeRgY' could all be the energy.*energy_key"):
        ASE(save(tmp_path / "a.extxyz", frames))


@pytest.mark.parametrize(
    ("name", "key"), [("energy_pot", "energy_pot"), ("E_scf", "E_scf"), ("enthalpy", "energy_key")]
)
def test_a_weight_without_its_label_is_refused_with_what_there_is(tmp_path, name, key):
    path = save(tmp_path / "a.extxyz", renamed(name))
    assert "y" not in ASE(path)[0]
    with pytest.raises(
        DataError, match=rf"y_weight=1 asks for an energy.*{name} \(number\), forces .*{key}.*y_weight: 0"
    ):
        ready(path)
    ready(path, y_weight=0.0, derivative=True)
    ready(path, dataset_arg={"energy_key": name})
    ready(path, dataset_arg={"energy_key": False})


def test_an_energy_of_several_numbers_is_shown(tmp_path):
    frames = renamed("energies_of_states")
    for atoms in frames:
        atoms.info["energies_of_states"] = np.array([1.0, 2.0])
    with pytest.raises(DataError, match=r"y_weight=1 asks for an energy.*energies_of_states \(2\)"):
        ready(save(tmp_path / "a.extxyz", frames))


def test_forces_that_a_weight_asks_for_are_missed(tmp_path):
    path = save(tmp_path / "a.extxyz", renamed("my_gradient", "forces"))
    ready(path)  # without derivative there are none to learn
    with pytest.raises(DataError, match=r"Did you mean dataset_arg: {forces_key: '-my_gradient'}\? Set derivative: "):
        ready(path, derivative=True)


def test_missing_forces_are_told_in_a_sentence(tmp_path):
    path = save(tmp_path / "a.extxyz", renamed("v", "forces"))
    with pytest.raises(DataError) as refused:
        ready(path, derivative=True)
    assert str(refused.value) == (
        "neg_dy_weight=1 asks for forces, but no frame has forces under a known name. The frames hold energy (number), "
        "v (atoms × 3). Name it: dataset_arg: {forces_key: NAME}. Set derivative: false to train on energies alone."
    )


def test_data_known_to_lack_a_label_are_warned_of_unless_its_weight_was_chosen(tmp_path, caplog):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "coords.npy", rng.normal(size=(6, 3, 3)))
    np.save(tmp_path / "embed.npy", np.array([8, 1, 1]))
    np.save(tmp_path / "forces.npy", rng.normal(size=(6, 3, 3)))
    files = {f"{what}_files": str(tmp_path / f"{name}.npy") for what, name in (("coord", "coords"), ("embed", "embed"))}
    options = {"dataset": "Custom", **files, "force_files": str(tmp_path / "forces.npy"), "derivative": True}
    ready("unused", **options)
    assert "y_weight=1 asks for an energy" in caplog.text
    with pytest.raises(DataError, match=r"y_weight=0\.5 asks for an energy"):
        ready("unused", **options, y_weight=0.5)


@pytest.mark.parametrize("first", [True, False])
def test_energies_that_some_frames_lack_are_counted(tmp_path, first):
    frames = [water(seed) for seed in range(6)]
    for atoms in frames[:2] if first else frames[4:]:
        del atoms.calc.results["energy"]
    path = save(tmp_path / "a.extxyz", frames)
    message = (
        r"frame 2: 'energy' is the energy, but .*frame 0 has none; 4 of 6 frames have one"
        if first
        else r"frame 4: 'energy' is missing, although .*frame 0 has it.* 2 of 6 frames lack the energy"
    )
    with pytest.raises(DataError, match=message):
        ASE(path)
    assert "y" not in ASE(path, energy_key=False)[0]


def test_charges_that_only_later_frames_have_are_told_of(tmp_path, caplog):
    frames = [water(seed) for seed in range(4)]
    frames[2].info["charge"] = 0
    assert "q" not in ASE(save(tmp_path / "a.extxyz", frames))[0]
    assert "frame 2: 'charge' is the charge, but" in caplog.text
    assert "1 of 4 frames have one. It is not read." in caplog.text


# ------------------------------------------------------------------------------------------ one atom, or the system


def crystal(size, seed=0):
    atoms = bulk("Cu", "sc", a=2.5) * (size, 1, 1)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * size, forces=np.ones((size, 3)))
    return atoms


def test_a_column_of_a_single_atom_is_no_number_of_the_system(tmp_path):
    frames = [crystal(1), crystal(3)]
    for atoms in frames:
        atoms.arrays["q"] = 0.1 * np.arange(len(atoms))
    data = ASE(save(tmp_path / "a.extxyz", frames), extra_keys={"partial_charges": "q"})
    assert "q" not in data[0]
    np.testing.assert_allclose(data[1].partial_charges, [0, 0.1, 0.2], atol=1e-7)


def table(path, frames, **columns):
    """A Parquet file in which every quantity is a list."""
    pyarrow = pytest.importorskip("pyarrow")
    rows = {
        "numbers": [atoms.numbers.tolist() for atoms in frames],
        "positions": [atoms.positions.tolist() for atoms in frames],
        "cell": [atoms.cell.tolist() for atoms in frames],
        "energy": [atoms.calc.results["energy"] for atoms in frames],
    }
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({**rows, **columns}), path)
    return path


def test_other_frames_tell_what_one_atom_leaves_open(tmp_path):
    frames = [crystal(1), crystal(1, 1), crystal(3), crystal(2)]
    of_atoms = table(tmp_path / "a.parquet", frames, q=[[0.5], [0.6], [0.1, 0.2, 0.3], [0.1, 0.2]])
    data = ASE(of_atoms, extra_keys={"partial": "q"})
    assert "q" not in data[0]
    assert [data[i].partial.tolist() for i in range(3)] == [[0.5], [0.6], [0.1, 0.2, 0.3]]
    of_systems = table(tmp_path / "b.parquet", frames, q=[[1.0], [0.0], [2.0], [3.0]])
    assert [ASE(of_systems)[i].q.item() for i in range(4)] == [1, 0, 2, 3]


def test_three_numbers_of_three_atoms_are_a_vector_where_others_have_three_too(tmp_path):
    frames = [crystal(3), crystal(3, 1), crystal(2), crystal(1)]
    vectors = np.arange(12.0).reshape(4, 3)
    data = ASE(table(tmp_path / "a.parquet", frames, m=vectors.tolist()), extra_keys={"m": "m"})
    assert data[3].m.shape == (1, 3)
    np.testing.assert_array_equal(data.batch([0, 1, 2, 3]).m, vectors)


# ------------------------------------------------------------------------------------------------ virials, free energy


def strained(seed):
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell * rng.uniform(0.95, 1.06) + rng.normal(scale=0.05, size=(3, 3)), scale_atoms=True)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    return atoms


def virial_by_strain(atoms, step=1e-5):
    """Minus the derivative of the energy in the strain, by finite differences: (3, 3) eV."""
    virial = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            energies = []
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[i, j] += sign * step / 2
                strain[j, i] += sign * step / 2
                twin = atoms.copy()
                twin.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
                twin.calc = EMT()
                energies.append(twin.get_potential_energy())
            virial[i, j] = -(energies[0] - energies[1]) / (2 * step)
    return virial


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("virial", {"stress_key": "virial"}),
        ("REF_virials", {"stress_key": "REF_virials"}),
        ("W", {"virial_key": "W"}),
        ("minus", {"virial_key": "-minus"}),
    ],
)
def test_a_virial_is_minus_the_stress_times_the_volume(tmp_path, name, arguments):
    frames = [strained(seed) for seed in range(2)]
    expected = [atoms.get_stress(voigt=False) for atoms in frames]
    for atoms in frames:
        atoms.info[name] = virial_by_strain(atoms) * (-1 if name == "minus" else 1)
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    path = save(tmp_path / "a.extxyz", frames)
    data = ASE(path, **arguments)
    for sample, stress in zip((data[0], data[1]), expected, strict=True):
        np.testing.assert_allclose(sample.stress[0], stress, rtol=1e-5, atol=1e-8)
    assert "stress" not in ASE(path)[0]


def test_a_virial_is_converted_with_the_units_of_the_file(tmp_path):
    atoms = strained(0)
    expected = atoms.get_stress(voigt=False)
    ev, angstrom = 1 / 27.211386245988, 1 / 0.529177210903  # in Hartree and Bohr
    twin = Atoms(atoms.numbers, atoms.positions * angstrom, cell=atoms.cell * angstrom, pbc=True)
    twin.info = {"energy": atoms.get_potential_energy() * ev, "virial": -expected * atoms.get_volume() * ev}
    path = save(tmp_path / "a.extxyz", twin)
    data = ASE(path, energy_unit="Hartree", length_unit="Bohr", virial_key="virial")
    np.testing.assert_allclose(data[0].stress[0], expected, rtol=1e-5)


def test_a_virial_is_pointed_at_where_a_stress_is_asked_for(tmp_path):
    frames = [strained(seed) for seed in range(4)]
    for atoms in frames:
        atoms.info["virial"] = np.eye(3)
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    path = save(tmp_path / "a.extxyz", frames)
    with pytest.raises(
        DataError, match=r"stress_weight: no frame has a stress.*Did you mean dataset_arg: {virial_key: virial}\?"
    ):
        ready(path, stress_weight=0.1, derivative=True)
    diagnosis = examine(open_files([str(path)]))
    assert any("No stress is read, although there is 'virial'" in finding.text for finding in diagnosis.findings)
    with pytest.raises(ConfigError, match="virial_key: 'virial' beside stress_key: 'stress'"):
        ASE(path, stress_key="stress", virial_key="virial")


def test_a_stress_times_the_volume_of_unknown_sign_is_read_when_its_sign_is_stated(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    atoms = crystal(2)
    row = {
        "atomic_numbers": [atoms.numbers.tolist()],
        "positions": [atoms.positions.tolist()],
        "cell": [atoms.cell.tolist()],
        "energy": [-1.0],
        "cauchy_stress": [np.eye(3).tolist()],
        "cauchy_stress_volume_normalized": [False],
    }
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(row), path)
    name = "cauchy_stress_times_volume"
    with pytest.raises(DataError, match=f"does not state its sign. Set virial_key: {name}"):
        ASE(path, stress_key=name)
    expected = np.eye(3) / atoms.get_volume()
    np.testing.assert_allclose(ASE(path, virial_key=f"-{name}")[0].stress[0], expected, rtol=1e-6)


def test_the_free_energy_that_goes_with_the_forces_is_told_of_and_can_be_chosen(tmp_path, caplog):
    frames = [water(seed, free_energy=-10.0 - seed - 0.01 * seed) for seed in range(4)]
    path = save(tmp_path / "a.extxyz", frames)
    data = ASE(path)
    assert data[3].y.item() == -13.0
    assert "3 of 4 frames have a free_energy that is not their energy, by up to 0.03 eV" in caplog.text
    assert "energy_key: free_energy" in caplog.text
    assert any("free_energy" in finding.text for finding in examine(open_files([str(path)])).findings)
    caplog.clear()
    ASE(path)  # from the cache
    assert "by up to 0.03 eV" in caplog.text
    caplog.clear()
    assert ASE(path, energy_key="free_energy")[3].y.item() == pytest.approx(-13.03)
    assert ASE(path, energy_key="energy")[3].y.item() == -13.0
    assert "free_energy" not in caplog.text


def test_a_free_energy_that_is_the_energy_is_not_mentioned(tmp_path, caplog):
    ASE(save(tmp_path / "a.extxyz", [water(seed, free_energy=-10.0 - seed) for seed in range(2)]))
    assert "free_energy" not in caplog.text


# ----------------------------------------------------------------------------------------------- isotopes, no elements


def test_deuterium_and_tritium_are_hydrogen_of_other_mass(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", "energy=-1", atoms="O 0 0 0\nD 0 0 1\nT 0 1 0\n")
    path.write_text(path.read_text() + "2\nProperties=pos:R:3:species:S:1 energy=-2\n0 0 0 H\n0 0 1 d\n")
    data = ASE(path)
    assert [data[i].z.tolist() for i in range(2)] == [[8, 1, 1], [1, 1]]
    (_, first), (_, second) = read_structures(path, ALL)
    np.testing.assert_allclose(first.get_masses(), [atomic_masses[8], 2.014101778, 3.01604928], rtol=1e-8)
    np.testing.assert_allclose(second.get_masses(), [atomic_masses[1], 2.014101778], rtol=1e-8)
    np.testing.assert_array_equal(second.positions, [[0, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("Hh", r"frame 0: 'Hh' is not an element\. Did you mean 'H'\?$"),
        ("X", r"frame 0: atom 1 has atomic number 0, which is not an element"),
    ],
)
def test_what_is_no_element_is_refused(tmp_path, symbol, message):
    with pytest.raises(DataError, match=message):
        ASE(write_xyz(tmp_path / "a.xyz", "energy=-1", atoms=f"O 0 0 0\n{symbol} 0 0 1\n"))


def test_reference_energies_of_isotopes_and_of_nobelium_are_understood(tmp_path):
    path = write_xyz(tmp_path / "a.xyz", "energy=-1")
    with pytest.raises(ConfigError, match=r"atomref: 'D' is an isotope of H\. Write 'H' here"):
        ASE(path, atomref={"D": -13.0})
    settings = tmp_path / "conf.yaml"
    settings.write_text(f"dataset: ASE\ndataset_root: {path}\ndataset_arg: {{atomref: {{No: -7.5, H: 1, O: 2}}}}\n")
    from torchmdnet.config.command_line import resolve

    module = DataModule(vars(resolve(["--conf", str(settings), "--log-dir", str(tmp_path / "log")])))
    kind, positional, keywords = module.source()
    assert kind(*positional, **keywords).reference_energies == {102: -7.5, 1: 1.0, 8: 2.0}


# ------------------------------------------------------------------------------------------- structures to predict


def test_structures_without_labels_load_and_are_not_trained_on(tmp_path, caplog):
    import h5py

    rng = np.random.default_rng(0)
    pos = rng.normal(size=(4, 3, 3))
    np.save(tmp_path / "coords.npy", pos)
    np.save(tmp_path / "embed.npy", np.array([8, 1, 1]))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["water/pos"], file["water/types"] = pos, np.tile([8, 1, 1], (4, 1))
    frames = [molecule("H2O") for _ in range(4)]
    for atoms, row in zip(frames, pos, strict=True):
        atoms.positions = row
    coords, embed = str(tmp_path / "coords.npy"), str(tmp_path / "embed.npy")
    sets = [Custom(coords, embed), HDF5(tmp_path / "a.h5"), ASE(save(tmp_path / "a.extxyz", frames))]
    assert "no energy and no forces were found" in caplog.text
    for data in sets:
        assert sorted(data[2].keys()) == ["pos", "z"]
        np.testing.assert_allclose(data.batch([1, 2]).pos, pos[1:3].reshape(-1, 3), atol=1e-6)
        module = DataModule({"train_size": 2, "val_size": 1, "test_size": 1, "y_weight": 0.0}, dataset=data)
        with pytest.raises(DataError, match="neither y nor neg_dy"):
            module.setup()


def test_datasets_of_other_names_in_hdf5_are_pointed_at(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["water/pos"], file["water/types"] = np.zeros((6, 3, 3)), np.array([8, 1, 1])
        file["water/forces"], file["water/Energies"] = np.ones((6, 3, 3)), np.zeros(6)
    with pytest.raises(DataError, match=r"y_weight=1 .*Energies.*Is 'Energies' the energy\?"):
        ready(tmp_path / "a.h5", dataset="HDF5")


@pytest.mark.parametrize("name", ["ASE", "HDF5"])
def test_files_that_are_not_named_are_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"dataset_root is not set, and its default, ~/data, .*dataset {name}"):
            ready("~/data", dataset=name)
        (tmp_path / "data").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("derivative", "weight", "warns"), [(False, 1.0, True), (True, 1.0, False), (False, 0.0, False)]
)
def test_forces_that_are_not_trained_are_warned_of(tmp_path, caplog, derivative, weight, warns):
    path = save(tmp_path / "a.extxyz", [water(seed) for seed in range(12)])
    ready(path, derivative=derivative, neg_dy_weight=weight)
    assert caplog.text.count("neg_dy_weight: 1 has no effect without derivative: true") == int(warns)


# ------------------------------------------------------------------------------------- energies of no stated unit


def orca(path, unit="Hartree"):
    """Total energies of water, all electrons counted (-76.4 Hartree), as ORCA writes them in comments."""
    energy = -76.4 * energy_factor("Hartree", unit)
    lines = []
    for seed in range(12):
        atoms = water(seed)
        rows = [f"{s} {x:.6f} {y:.6f} {z:.6f}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
        lines += [str(len(atoms)), f"Coordinates from ORCA-job water E {energy - 1e-3 * seed:.6f}", *rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("unit", ["Hartree", "kcal/mol"])
def test_total_energies_in_another_unit_are_warned_of_with_the_setting_that_states_it(tmp_path, caplog, unit):
    path = orca(tmp_path / "water.xyz", unit)
    ready(path)
    told = f"Energies look like {unit}, but are taken as eV"
    assert told in caplog.text
    assert f"dataset_arg: {{energy_unit: {unit}}}, which converts energies and forces alike" in caplog.text
    assert "forces that are in eV/Å already would become wrong" in caplog.text
    for stated in (unit, "eV"):
        caplog.clear()
        ready(path, dataset_arg={"energy_unit": stated})
        assert "Energies look like" not in caplog.text


def test_energies_in_ev_and_those_that_are_no_totals_are_not_warned_of(tmp_path, caplog):
    ready(orca(tmp_path / "water.xyz", "eV"))
    ready(save(tmp_path / "a.extxyz", [water(seed) for seed in range(12)]))
    assert "Energies look like" not in caplog.text


@pytest.mark.parametrize("stated", [None, "Hartree"])
def test_a_hdf5_file_is_warned_of_unless_it_states_its_unit(tmp_path, caplog, stated):
    path = tmp_path / "water.h5"
    with h5py.File(path, "w") as file:
        rng = np.random.default_rng(0)
        file["water/pos"], file["water/types"] = rng.normal(size=(12, 3, 3)), np.array([8, 1, 1])
        file["water/energy"] = -76.4 + 0.01 * rng.normal(size=12)
        if stated is not None:
            file.attrs["energy_unit"] = stated
    ready(path, dataset="HDF5")
    assert ("Energies look like Hartree:" in caplog.text) == (stated is None)
    assert ("energy_unit = 'Hartree'" in caplog.text) == (stated is None)
