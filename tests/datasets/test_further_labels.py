"""Labels beside energies and forces, asked for by name: dipoles, charges, tensors; some are missing."""

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from torchmdnet.datasets import ASE, HDF5, Custom
from torchmdnet.datasets.labels import USUAL_LABELS, LabelShape, find_label
from torchmdnet.errors import ConfigError, DataError

DIPOLE, CHARGES, TENSOR = LabelShape("system", (3,)), LabelShape("atom", (1,)), LabelShape("system", (3, 3))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))


def frame(name="H2O", seed=0, **results):
    atoms = molecule(name)
    rng = np.random.default_rng(seed)
    atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)), **results)
    return atoms


def saved(path, *frames):
    write(path, list(frames))
    return path


# ------------------------------------------------------------------------------------------------ ASE


def test_a_calculators_dipole_and_charges_are_read_when_asked_for(tmp_path):
    water = frame(dipole=np.array([0.1, 0.2, 0.3]), charges=np.array([-0.6, 0.3, 0.3]))
    path = saved(tmp_path / "a.extxyz", water)
    assert "dipole" not in ASE(path)[0]
    data = ASE(path, labels={"dipole": DIPOLE, "charges": CHARGES})
    np.testing.assert_allclose(data[0].dipole, [[0.1, 0.2, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(data[0].charges, [-0.6, 0.3, 0.3], rtol=1e-6)
    assert data.batch([0, 0]).dipole.shape == (2, 3)


@pytest.mark.parametrize(("plain", "usual"), [(plain, name) for plain, names in USUAL_LABELS.items() for name in names])
def test_a_plain_name_finds_the_usual_ones(plain, usual):
    assert find_label(plain, ["energy", usual]) == usual
    assert find_label("my_" + plain, ["energy", usual]) is None


def test_labels_come_from_headers_and_columns_under_usual_names_and_names_of_ones_own(tmp_path):
    water = frame()
    water.info |= {"dipole_moment": np.array([1.0, 0.0, 2.0]), "my_alpha": np.arange(9.0).reshape(3, 3)}
    water.arrays["partial_charges"] = np.array([-0.4, 0.2, 0.2])
    labels = {"dipole": DIPOLE, "charges": CHARGES, "my_alpha": TENSOR}
    data = ASE(saved(tmp_path / "a.extxyz", water), labels=labels)
    np.testing.assert_allclose(data[0].dipole[0], [1, 0, 2])
    np.testing.assert_allclose(data[0].charges, [-0.4, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(data[0].my_alpha[0], np.arange(9.0).reshape(3, 3))
    assert data.keys["dipole"] == "dipole_moment"


def test_a_frame_without_the_label_has_nan_and_a_notice_counts_it(tmp_path, caplog):
    caplog.set_level("INFO")
    path = saved(tmp_path / "a.extxyz", frame(), frame("CH4", 1, dipole=np.ones(3)), frame("NH3", 2))
    data = ASE(path, labels={"dipole": DIPOLE})
    assert [bool(np.isnan(sample.dipole).all()) for sample in data] == [True, False, True]
    assert "dipole: 2 of 3 frames have none" in caplog.text


def test_a_label_that_no_frame_has_is_refused_with_what_there_is(tmp_path):
    path = saved(tmp_path / "a.extxyz", frame(dipole=np.ones(3)))
    with pytest.raises(DataError, match=r"no frame has 'dipol'.*dipole, energy, forces.*Did you mean 'dipole'.*label"):
        ASE(path, labels={"dipol": DIPOLE})


def test_a_label_of_another_shape_is_refused_with_file_and_frame(tmp_path):
    water = frame()
    water.info["dipole"] = np.ones(2)
    with pytest.raises(DataError, match=r"a.extxyz, frame 0: dipole has shape \(2,\) instead of \(3,\)"):
        ASE(saved(tmp_path / "a.extxyz", water), labels={"dipole": DIPOLE})


def test_an_infinite_label_is_refused(tmp_path):
    water = frame(dipole=np.array([1.0, np.inf, 0.0]))
    with pytest.raises(DataError, match=r"frame 0: dipole is inf at \(1,\)"):
        ASE(saved(tmp_path / "a.extxyz", water), labels={"dipole": DIPOLE})


def test_energies_are_not_needed_when_another_label_is_asked_for(tmp_path):
    water = molecule("H2O")
    water.info["dipole"] = np.ones(3)
    path = saved(tmp_path / "a.extxyz", water)
    assert sorted(ASE(path, labels={"dipole": DIPOLE})[0].keys()) == ["dipole", "pos", "z"]
    assert sorted(ASE(path)[0].keys()) == ["pos", "z"]  # structures to predict


def cell(seed, stress=True):
    atoms = bulk("Cu", cubic=True)
    rng = np.random.default_rng(seed)
    results = {"stress": rng.normal(size=6)} if stress else {}
    atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(4, 3)), **results)
    return atoms


def test_molecules_and_cells_mix_and_only_cells_have_a_stress(tmp_path):
    water, full, bare = frame(), cell(1), cell(2, stress=False)
    data = ASE(saved(tmp_path / "a.extxyz", water, full, bare))
    np.testing.assert_allclose(data[1].stress[0], full.get_stress(voigt=False), rtol=1e-5)
    assert np.isnan(data[0].stress).all()
    assert np.isnan(data[2].stress).all()
    assert "stress" not in ASE(saved(tmp_path / "b.extxyz", water, bare))[0]


def test_a_stress_key_that_no_frame_has_is_refused(tmp_path):
    path = saved(tmp_path / "a.extxyz", cell(1))
    with pytest.raises(DataError, match=r"no frame has 'virial'.*Set stress_key"):
        ASE(path, stress_key="virial")


def test_what_was_asked_for_is_part_of_the_name_of_the_cache(tmp_path):
    path = saved(tmp_path / "a.extxyz", frame(dipole=np.ones(3)))
    assert "dipole" not in ASE(path)[0]
    assert "dipole" in ASE(path, labels={"dipole": DIPOLE})[0]
    assert "dipole" not in ASE(path)[0]


def test_an_ase_database_keeps_arrays_as_labels(tmp_path):
    from ase.db import connect

    with connect(tmp_path / "a.db") as database:
        for seed in range(3):
            database.write(frame(seed=seed), data={"dipole": np.full(3, float(seed))})
    data = ASE(tmp_path / "a.db", labels={"dipole": DIPOLE})
    np.testing.assert_allclose(data.frames["dipole"], np.arange(3.0)[:, None].repeat(3, axis=1))


# ------------------------------------------------------------------------------------------------ HDF5, Custom


@pytest.fixture
def arrays():
    rng = np.random.default_rng(3)
    return {
        "pos": rng.normal(size=(4, 3, 3)).astype(np.float32),
        "types": np.array([8, 1, 1]),
        "energy": rng.normal(size=4).astype(np.float32),
        "dipole": rng.normal(size=(4, 3)).astype(np.float32),
        "charges": rng.normal(size=(4, 3)).astype(np.float32),
    }


def hdf5(path, arrays, **changes):
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in {**arrays, **changes}.items():
            if array is not None:
                file[f"water/{name}"] = array
    return path


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "from the file"])
def test_hdf5_labels_of_systems_and_atoms(tmp_path, arrays, limit):
    arrays["dipole"][1] = np.nan
    path = hdf5(tmp_path / "a.h5", arrays, mbis_charges=arrays["charges"], charges=None)
    data = HDF5(path, dataset_preload_limit=limit, labels={"dipole": DIPOLE, "charges": CHARGES})
    batch = data.batch([3, 1])
    np.testing.assert_array_equal(batch.dipole, arrays["dipole"][[3, 1]])
    np.testing.assert_array_equal(batch.charges, arrays["charges"][[3, 1]].ravel())
    assert data[0].dipole.shape == (1, 3)
    assert data[0].charges.shape == (3,)


def test_hdf5_groups_without_a_label_or_with_another_shape_are_refused(tmp_path, arrays):
    with pytest.raises(DataError, match=r"group 'water': 'polarizability' is missing. It holds charges, dipole"):
        HDF5(hdf5(tmp_path / "a.h5", arrays), labels={"polarizability": TENSOR})
    with pytest.raises(DataError, match=r"dipole has shape \(4, 2\).*\(4, 3\) is needed"):
        HDF5(hdf5(tmp_path / "b.h5", arrays, dipole=arrays["dipole"][:, :2]), labels={"dipole": DIPOLE})


def test_hdf5_needs_no_energy_where_another_label_is_asked_for(tmp_path, arrays):
    data = HDF5(hdf5(tmp_path / "a.h5", arrays, energy=None), labels={"dipole": DIPOLE})
    assert "y" not in data[0]


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "mapped"])
def test_custom_labels_have_files_of_their_own(tmp_path, arrays, limit):
    for number in range(2):
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}_{number}.npy", array + (0 if name == "types" else number))
    globs = [str(tmp_path / f"{name}_*.npy") for name in ("pos", "types", "energy")]
    files = {name: str(tmp_path / f"{name}_*.npy") for name in ("dipole", "charges")}
    data = Custom(*globs, preload_memory_limit=limit, label_files=files, labels={"dipole": DIPOLE, "charges": CHARGES})
    batch = data.batch([1, 6])
    np.testing.assert_array_equal(batch.dipole, np.stack([arrays["dipole"][1], arrays["dipole"][2] + 1]))
    np.testing.assert_array_equal(batch.charges, np.r_[arrays["charges"][1], arrays["charges"][2] + 1])


def test_custom_says_where_to_name_the_files_of_a_label(tmp_path, arrays):
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    globs = [str(tmp_path / f"{name}.npy") for name in ("pos", "types", "energy")]
    with pytest.raises(ConfigError, match=r"no files for 'dipole'.*dataset_arg: {label_files: {dipole: \"dipole_"):
        Custom(*globs, labels={"dipole": DIPOLE})
    wrong = {"dipole": str(tmp_path / "charges.npy")}
    with pytest.raises(DataError, match=r"label_files: alpha: .*shape \(4, 3\).*\(4, 3, 3\) is needed"):
        Custom(*globs, label_files={"alpha": wrong["dipole"]}, labels={"alpha": TENSOR})
