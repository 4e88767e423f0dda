"""LMDB, Parquet and NumPy archives give what was written into them, and say what is wrong with them."""

from __future__ import annotations

import gzip
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from torchmdnet.datasets.ase import ASE
from torchmdnet.errors import ConfigError, DataError

lmdb = pytest.importorskip("lmdb")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHMDNET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows() -> list[dict]:
    """Molecules and crystals with energies, forces and, in crystals, a stress."""
    rng = np.random.default_rng(5)
    found = []
    for atoms in (molecule("H2O"), bulk("Cu", cubic=True), molecule("CH4"), bulk("NaCl", "rocksalt", a=5.6)):
        row = {
            "numbers": atoms.numbers,
            "positions": atoms.positions + rng.normal(size=(len(atoms), 3)) * 0.05,
            "cell": atoms.cell.array,
            "pbc": atoms.pbc,
            "energy": rng.normal() - 3.0 * len(atoms),
            "forces": rng.normal(size=(len(atoms), 3)),
        }
        if atoms.pbc.all():
            row["stress"] = rng.normal(size=(3, 3))
            row["stress"] = row["stress"] + row["stress"].T
        found.append(row)
    return found


def write_lmdb(path, rows, *, arrays=False, reserved=True, encode=None):
    """The layout of the documentation: the number of a row -> JSON, compressed with zlib."""

    def plain(value):
        if isinstance(value, np.ndarray):
            return (
                {"__ndarray__": [value.shape, value.dtype.name, value.ravel().tolist()]} if arrays else value.tolist()
            )
        return value

    encode = encode or (lambda row: zlib.compress(json.dumps({k: plain(v) for k, v in row.items()}).encode()))
    env = lmdb.open(str(path), subdir=False, map_size=2**24)
    with env.begin(write=True) as transaction:
        for number, row in enumerate(rows, start=1):
            transaction.put(str(number).encode(), encode(row))
        if reserved:
            transaction.put(b"nextid", zlib.compress(str(len(rows) + 1).encode()))
    env.close()
    return path


def write_parquet(path, rows, names=None, **options):
    names = {"numbers": "atomic_numbers", "forces": "atomic_forces", "stress": "cauchy_stress"} | (names or {})
    columns = {
        names.get(name, name): [
            row[name].tolist() if isinstance(row.get(name), np.ndarray) else row.get(name) for row in rows
        ]
        for name in dict.fromkeys(name for row in rows for name in row)
    }
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_npz(path, rows):
    size = max(len(row["numbers"]) for row in rows)

    def padded(array):
        return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])

    np.savez(
        path,
        z=np.stack([padded(row["numbers"]) for row in rows]),
        R=np.stack([padded(row["positions"]) for row in rows]),
        F=np.stack([padded(row["forces"]) for row in rows]),
        E=np.array([row["energy"] for row in rows]),
        cell=np.stack([row["cell"] for row in rows]),
        pbc=np.stack([row["pbc"] for row in rows]),
        stress=np.stack([row.get("stress", np.full((3, 3), np.nan)) for row in rows]),
    )
    return path


WRITERS = {"a.aselmdb": write_lmdb, "a.lmdb": write_lmdb, "a.parquet": write_parquet, "a.npz": write_npz}


def assert_same(dataset, rows):
    assert len(dataset) == len(rows)
    for number, row in enumerate(rows):
        data = dataset[number]
        np.testing.assert_array_equal(data.z, row["numbers"])
        np.testing.assert_array_equal(data.pos, row["positions"])
        np.testing.assert_array_equal(data.box[0], row["cell"] * row["pbc"][:, None])
        assert data.y.item() == row["energy"]
        np.testing.assert_allclose(data.neg_dy, row["forces"], rtol=1e-6)
        np.testing.assert_allclose(data.stress[0], row.get("stress", np.full((3, 3), np.nan)), rtol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_every_table_gives_what_was_written(tmp_path, rows, name):
    assert_same(ASE(WRITERS[name](tmp_path / name, rows)), rows)


@pytest.mark.parametrize("name", WRITERS)
def test_index_selects_rows(tmp_path, rows, name):
    assert_same(ASE(WRITERS[name](tmp_path / name, rows), index="1::2"), rows[1::2])
    assert len(ASE(WRITERS[name](tmp_path / f"b{name}", rows), index=-1)) == 1


def test_arrays_may_be_written_as_ase_writes_them_and_keys_be_all_there_is(tmp_path, rows):
    assert_same(ASE(write_lmdb(tmp_path / "a.aselmdb", rows, arrays=True)), rows)
    assert_same(ASE(write_lmdb(tmp_path / "b.lmdb", rows * 6, reserved=False)), rows * 6)  # 1, 2, ... 10, 11: by number


def test_a_file_of_ase_db_backends_is_read(tmp_path):
    """Written by release 0.11.0: water, a cell of copper, a deleted row and carbon monoxide."""
    packed = Path(__file__).with_name("files") / "ase_db_backends.aselmdb.gz"
    path = tmp_path / "a.aselmdb"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    data = ASE(path, charge_key="total_charge")
    assert [data[i].z.tolist() for i in range(3)] == [[8, 1, 1], [29] * 4, [8, 6]]
    assert data[0].y.item() == 0.1257302210933933
    np.testing.assert_allclose(data[2].neg_dy[1], [1.31510376473437, 0.357380410658956, -1.2083186322821715], rtol=1e-6)
    assert data[1].box[0].diagonal().tolist() == [3.61] * 3
    xx, yy, zz, yz, _, _ = data[1].stress[0].numpy()[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    np.testing.assert_allclose([xx, yy, zz, yz], [0.3515101, 0.9034702, 0.0940123, -0.7434993], rtol=1e-6)
    assert data[0].q.item() == 1.0
    assert data[0].config_weight.item() == 2.0  # config_weight among the key-value pairs


def test_a_pickled_lmdb_is_refused_and_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    env = lmdb.open(str(tmp_path / "old.lmdb"), subdir=False)
    with env.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps(Bomb(), protocol=-1))
        transaction.put(b"length", pickle.dumps(1, protocol=-1))
    env.close()
    with pytest.raises(DataError, match=r"old\.lmdb, frame 0: the row is a Python pickle.*ase-db-backends"):
        ASE(tmp_path / "old.lmdb")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["float", "fixed", "large", "flat"])
def test_parquet_lists_may_be_of_any_kind(tmp_path, rows, kind):
    number = pyarrow.float64() if kind != "float" else pyarrow.float32()
    inner = pyarrow.list_(number, 3) if kind == "fixed" else pyarrow.list_(number)
    outer = {"large": pyarrow.large_list(inner), "flat": pyarrow.list_(number)}.get(kind, pyarrow.list_(inner))
    positions = [row["positions"].ravel().tolist() if kind == "flat" else row["positions"].tolist() for row in rows]
    table = pyarrow.table(
        {
            "z": [row["numbers"].tolist() for row in rows],
            "pos": pyarrow.array(positions, outer),
            "energy": [row["energy"] for row in rows],
            "method": ["DFT-PBE"] * len(rows),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    data = ASE(tmp_path / "a.parquet")
    for number, row in enumerate(rows):
        np.testing.assert_allclose(data[number].pos, row["positions"], rtol=1e-6 if kind == "float" else 0)
    assert "box" not in data[0]


def test_columns_of_other_names_are_named(tmp_path, rows):
    names = {"numbers": "species", "positions": "xyz", "cell": "h", "pbc": "periodic", "energy": "e", "forces": "f"}
    path = write_parquet(tmp_path / "a.parquet", rows, names)
    with pytest.raises(
        DataError, match=r"a\.parquet, frame 0: there is no 'atomic_numbers'.*only species, xyz.*columns"
    ):
        ASE(path)
    columns = {part: names[part] for part in ("numbers", "positions", "cell", "pbc")}
    assert_same(ASE(path, columns=columns, energy_key="e", forces_key="f"), rows)
    with pytest.raises(ConfigError, match="columns: 'energy' is no part of a structure"):
        ASE(path, columns={"energy": "e"})


def test_a_virial_is_no_stress(tmp_path, rows):
    rows = [row | {"cauchy_stress_volume_normalized": False} for row in rows]
    assert "stress" not in ASE(write_parquet(tmp_path / "a.parquet", rows))[1]


def test_an_archive_of_one_trajectory_states_its_units(tmp_path):
    """The layout of sGDML: one molecule, units as texts."""
    rng = np.random.default_rng(2)
    water = molecule("H2O")
    arrays = {"z": water.numbers, "R": rng.normal(size=(5, 3, 3)) * 3, "E": rng.normal(size=(5, 1))}
    np.savez(tmp_path / "a.npz", **arrays, F=rng.normal(size=(5, 3, 3)), e_unit="kcal/mol", r_unit="Ang", type="d")
    data = ASE(tmp_path / "a.npz")
    assert data[3].y.item() == pytest.approx(arrays["E"][3, 0] * 0.0433641, rel=1e-5)
    np.testing.assert_array_equal(data[3].pos, arrays["R"][3])
    with pytest.raises(DataError, match=r"a\.npz, frame 0: energy_unit is 'kcal/mol' in the file, but 'Hartree'"):
        ASE(tmp_path / "a.npz", energy_unit="Hartree")


def spoil(path, name, rows):
    """A file of each kind cut to half its length."""
    WRITERS[name](path, rows * 40)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_a_truncated_file_is_refused_by_name(tmp_path, rows, name):
    with pytest.raises(DataError, match=rf"{name}.*(incomplete|complete\?|cannot be read)"):
        ASE(spoil(tmp_path / name, name, rows))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"no table at all\n" * 1000)
    with pytest.raises(DataError, match=rf"{name}.*cannot be read as"):
        ASE(tmp_path / name)


def test_a_damaged_row_is_refused_by_number(tmp_path, rows):
    values = iter([zlib.compress(b"{}"), b"x\x9cnonsense"])
    path = write_lmdb(tmp_path / "a.aselmdb", rows[:2], encode=lambda row: next(values))
    with pytest.raises(DataError, match=r"a\.aselmdb, frame 0: there is no 'atomic_numbers'"):
        ASE(path)
    with pytest.raises(DataError, match=r"a\.aselmdb, frame 1: the row is no JSON compressed with zlib"):
        ASE(path, index="1:")


@pytest.mark.parametrize("name", WRITERS)
def test_numbers_that_are_not_finite_are_refused_by_frame(tmp_path, rows, name):
    rows[2]["forces"][1, 0] = np.nan
    with pytest.raises(DataError, match=rf"{name}, frame 2: .* is nan at \(1, 0\)"):
        ASE(WRITERS[name](tmp_path / name, rows))


@pytest.mark.parametrize("name", ["a.aselmdb", "a.parquet"])
def test_a_missing_label_is_refused_by_frame(tmp_path, rows, name):
    del rows[2]["energy"]
    with pytest.raises(DataError, match=rf"{name}, frame 2: 'energy' is missing, although .*{name}, frame 0 has it"):
        ASE(WRITERS[name](tmp_path / name, rows))


def test_objects_in_an_archive_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.array([1, 1]), R=np.zeros((1, 2, 3)), E=np.array([{}], dtype=object))
    with pytest.raises(DataError, match=r"a\.npz.*Python objects, which could run code"):
        ASE(tmp_path / "a.npz")


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.array([1, 1, 1]), R=np.zeros((4, 2, 3)), E=np.zeros(4))
    with pytest.raises(DataError, match=r"z has shape \(3,\), but R has 4 frames of 2 atoms, so \(2,\) or \(4, 2\)"):
        ASE(tmp_path / "a.npz")


def test_a_missing_package_is_named(tmp_path, rows, monkeypatch):
    import importlib

    def absent(name):
        raise ImportError(name)

    path = write_parquet(tmp_path / "a.parquet", rows)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"pip install 'torchmd-net\[parquet\]'"):
        ASE(path)


def test_tables_and_other_files_join_in_one_set(tmp_path, rows):
    water = Atoms(rows[0]["numbers"], rows[0]["positions"], info={"energy": rows[0]["energy"]})
    water.arrays["forces"] = rows[0]["forces"]
    water.write(tmp_path / "a.extxyz")
    data = ASE([tmp_path / "a.extxyz", write_lmdb(tmp_path / "b.aselmdb", rows)])
    assert len(data) == 5
    assert data[0].y.item() == data[1].y.item() == rows[0]["energy"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"E": np.zeros(3)}, r"E has shape \(3,\), but R has 4 frames"),
        ({"cell": np.zeros((2, 2))}, r"cell has shape \(2, 2\), but R has 4 frames"),
        ({"R": np.ones((4, 2, 3)) * 1j}, r"frame 0: R holds complex numbers"),
    ],
)
def test_arrays_of_an_archive_that_would_be_passed_over_are_refused(tmp_path, changed, words):
    arrays = {"z": np.array([1, 1]), "R": np.ones((4, 2, 3)), "E": np.zeros(4), **changed}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"a\.npz.*" + words):
        ASE(tmp_path / "a.npz")


def test_forces_of_an_archive_with_one_frame_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.array([1, 1]), R=np.eye(2, 3), E=np.zeros(1), F=np.ones((2, 3)))
    assert ASE(tmp_path / "a.npz")[0].neg_dy.tolist() == [[1.0] * 3] * 2
