"""The ANI sets: what the files hold, in eV, and nothing else."""

from __future__ import annotations

import io
import shutil
import tarfile

import h5py
import numpy as np
import pytest
import torch
from conftest import shared
from file_server import serve

from torchmdnet.datasets.ani import ANI1, ANI1CCX, ANI1X, ANI2X, ANI1XBase, ANIBase
from torchmdnet.datasets.memdataset import MemmappedDataset
from torchmdnet.errors import ConfigError, DataError

HARTREE = 27.211386246


def fill_ani1(file: h5py.File, top: str, molecules: dict[str, int], rng: np.random.Generator) -> None:
    """The layout of ``ani_gdb_s0x.h5``: methane-like molecules with some conformers each."""
    for name, count in molecules.items():
        group = file.create_group(f"{top}/{name}")
        group["species"] = np.array([b"C", b"H", b"O", b"N"])
        group["coordinates"] = rng.normal(size=(count, 4, 3)).astype(np.float32)
        group["energies"] = rng.normal(size=count) - 100
        group["coordinatesHE"] = rng.normal(size=(2, 4, 3)).astype(np.float32)
        group["energiesHE"] = rng.normal(size=2)
        group["smiles"] = np.array([b"C", b"O"])


def fill_ani1x(file: h5py.File) -> None:
    rng = np.random.default_rng(0)
    for name, z, count in (("C1H2", [6, 1, 1], 4), ("N1O1", [7, 8], 3)):
        group = file.create_group(name)
        group["atomic_numbers"] = np.array(z, dtype=np.uint8)
        group["coordinates"] = rng.normal(size=(count, len(z), 3)).astype(np.float32)
        group["wb97x_dz.energy"] = rng.normal(size=count) - 100
        group["wb97x_dz.forces"] = rng.normal(size=(count, len(z), 3)).astype(np.float32)
        group["ccsd(t)_cbs.energy"] = rng.normal(size=count) - 100
    file["C1H2/wb97x_dz.energy"][1] = np.nan
    file["N1O1/wb97x_dz.forces"][2, 1, 0] = np.nan
    file["C1H2/ccsd(t)_cbs.energy"][[0, 3]] = np.nan


def fill_ani2x(file: h5py.File) -> None:
    rng = np.random.default_rng(1)
    for size, count in ((2, 3), (5, 4)):
        group = file.create_group(f"{size:03d}")
        group["species"] = rng.choice([1, 6, 7, 8, 9, 16, 17], size=(count, size))
        group["coordinates"] = rng.normal(size=(count, size, 3)).astype(np.float32)
        group["energies"] = rng.normal(size=count) - 100
        group["forces"] = rng.normal(size=(count, size, 3))


def tar_gz(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def hdf5(fill) -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill(file)
    return content.getvalue()


@pytest.fixture
def ani1x(tmp_path):
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "ani1x-release.h5"
    path.write_bytes(hdf5(fill_ani1x))
    return path


def test_ani1_reads_eight_files_in_order(tmp_path):
    raw = tmp_path / "raw" / "ANI-1_release"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    energies, ids = [], []
    for number in range(1, 9):
        with h5py.File(raw / f"ani_gdb_s{number:02d}.h5", "w") as file:
            top = f"gdb11_s{number:02d}"
            fill_ani1(file, top, {f"{top}-{i}": i + 1 for i in range(3)}, rng)
            for name, molecule in file[top].items():
                energies += (molecule["energies"][()] * HARTREE).tolist()
                ids += [name] * len(molecule["energies"])
    data = ANI1(tmp_path)
    assert data.batch(range(len(data))).y.flatten().tolist() == energies
    assert [sample.mol_id for sample in data.sample_iter(mol_ids=True)] == ids
    assert data[0].z.tolist() == [6, 1, 8, 7]
    assert set(data[0].keys()) == {"z", "pos", "y"}
    assert (tmp_path / "processed" / "ANI1.y.mmap").exists()


def test_ani1_is_downloaded_as_an_archive_that_is_then_deleted(tmp_path):
    rng = np.random.default_rng(0)
    members = {
        f"ANI-1_release/ani_gdb_s{n:02d}.h5": hdf5(lambda f, n=n: fill_ani1(f, f"gdb11_s{n:02d}", {"m": n}, rng))
        for n in range(1, 9)
    }
    with serve() as publisher:
        publisher.files["ANI1_release.tar.gz"] = tar_gz({"ANI-1_release/README": b"...", **members})
        data = ANI1(tmp_path, mirror=publisher.address)
    assert len(data) == sum(range(1, 9))
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {"ANI-1_release", "ANI1_release.tar.gz.sha256"}
    assert len(ANI1(tmp_path)) == len(data)


def test_ani1x_leaves_out_conformers_without_labels(tmp_path, ani1x):
    data = ANI1X(tmp_path)
    with h5py.File(ani1x) as file:
        first, second = file["C1H2"], file["N1O1"]
        expected = [*first["wb97x_dz.energy"][[0, 2, 3]], *second["wb97x_dz.energy"][:2]]
        forces = [*first["wb97x_dz.forces"][[0, 2, 3]].reshape(-1, 3), *second["wb97x_dz.forces"][:2].reshape(-1, 3)]
        positions = [*first["coordinates"][[0, 2, 3]].reshape(-1, 3), *second["coordinates"][:2].reshape(-1, 3)]
    batch = data.batch(range(len(data)))
    np.testing.assert_array_equal(batch.y.flatten(), np.array(expected) * HARTREE)
    np.testing.assert_allclose(batch.neg_dy, np.array(forces) * HARTREE, rtol=1e-6)
    np.testing.assert_array_equal(batch.pos, positions)
    assert [sample.mol_id for sample in data.sample_iter(mol_ids=True)] == ["C1H2"] * 3 + ["N1O1"] * 2


def test_ani1ccx_shares_the_file_and_has_its_own_arrays(tmp_path, ani1x):
    ccx, x = ANI1CCX(tmp_path), ANI1X(tmp_path)
    with h5py.File(ani1x) as file:
        expected = [*file["C1H2/ccsd(t)_cbs.energy"][1:3], *file["N1O1/ccsd(t)_cbs.energy"][()]]
    assert (ccx.batch(range(5)).y.flatten() / HARTREE).tolist() == pytest.approx(expected, rel=1e-15)
    assert set(ccx[0].keys()) == {"z", "pos", "y"}
    assert len(x) == 5


def test_ani2x_takes_species_from_every_conformer(tmp_path):
    raw = tmp_path / "raw" / "final_h5"
    raw.mkdir(parents=True)
    (raw / "ANI-2x-wB97X-631Gd.h5").write_bytes(hdf5(fill_ani2x))
    data = ANI2X(tmp_path)
    with h5py.File(raw / "ANI-2x-wB97X-631Gd.h5") as file:
        np.testing.assert_array_equal(data[5].z, file["005/species"][2])
        np.testing.assert_array_equal(data[5].y, [[file["005/energies"][2] * HARTREE]])
        np.testing.assert_allclose(data[5].neg_dy, file["005/forces"][2] * HARTREE, rtol=1e-6)
    ids = [sample.mol_id for sample in data.sample_iter(mol_ids=True)]
    assert ids == ["002_0", "002_1", "002_2", "005_0", "005_1", "005_2", "005_3"]


@pytest.mark.parametrize(
    ("kind", "z", "hartree"),
    [
        (ANI1, 1, -0.500607632585),
        (ANI1, 8, -75.0362229210),
        (ANI1X, 6, -38.08316124),
        (ANI1CCX, 7, -54.67448347695333),
        (ANI2X, 17, -460.1681939421027),
        (ANI2X, 16, -398.1577125334925),
    ],
)
def test_element_energies_are_the_published_ones(kind, z, hartree):
    table = kind.get_atomref(_without_files(kind))
    assert table.shape == (100, 1)
    assert table.dtype == torch.float32
    assert table[z, 0] == torch.tensor(hartree * HARTREE, dtype=torch.float32)
    assert (table != 0).sum() == len(kind._ELEMENT_ENERGIES)
    assert kind.get_atomref(_without_files(kind), max_z=5).shape == (5, 1)


def _without_files(kind):
    data = kind.__new__(kind)
    data.reference_energies = {z: energy * HARTREE for z, energy in kind._ELEMENT_ENERGIES.items()}
    return data


def test_element_energies_come_with_the_data(tmp_path, ani1x):
    assert ANI1X(tmp_path).get_atomref()[1].item() == pytest.approx(-0.60095298 * HARTREE, rel=1e-7)


def test_the_sets_state_their_units_and_sources():
    for kind in (ANI1, ANI1X, ANI1CCX, ANI2X):
        assert issubclass(kind, ANIBase)
        assert issubclass(kind, MemmappedDataset)
        assert (kind.energy_unit, kind.length_unit) == ("eV", "Å")
        assert "doi" in kind.citation
    assert issubclass(ANI1X, ANI1XBase)
    assert ANI1CCX.level_of_theory == "CCSD(T)*/CBS"


def test_a_truncated_file_is_named(tmp_path, ani1x):
    ani1x.write_bytes(ani1x.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"ANI1X: .*ani1x-release.h5 is damaged"):
        ANI1X(tmp_path)


def test_a_file_of_another_layout_is_named(tmp_path, ani1x):
    with h5py.File(ani1x, "w") as file:
        file["C1/coordinates"] = np.zeros((1, 1, 3))
    with pytest.raises(DataError, match=r"ANI1X: .*ani1x-release.h5 does not have the expected layout"):
        ANI1X(tmp_path)


def test_dipoles_and_charges_are_stored_when_asked_for_and_nan_where_there_are_none(tmp_path, ani1x):
    rng = np.random.default_rng(5)
    with h5py.File(ani1x, "r+") as file:
        for molecule in file.values():
            count, size, _ = molecule["coordinates"].shape
            dipoles, charges = rng.normal(size=(count, 3)), rng.normal(size=(count, size))
            dipoles[0], charges[-1] = np.nan, 0.0  # as the published file marks what was not computed
            molecule["wb97x_dz.dipole"], molecule["wb97x_dz.cm5_charges"] = dipoles, charges
    with h5py.File(ani1x) as file:
        dipoles, charges = file["C1H2/wb97x_dz.dipole"][()], file["C1H2/wb97x_dz.cm5_charges"][()]
    data = ANI1X(tmp_path, labels=["dipole", "charges"])
    assert data[0].dp.shape == (1, 3)
    for sample, row in zip([data[0], data[1], data[2]], [0, 2, 3], strict=True):  # row 1 has no energy
        np.testing.assert_allclose(sample.dp[0], dipoles[row], rtol=1e-6)
        np.testing.assert_allclose(sample.pq, charges[row] if row < 3 else [np.nan] * 3, rtol=1e-6)
    assert ANI1X(tmp_path, labels=["charges"])[0].pq.shape == (3,)
    assert "dp" not in ANI1X(tmp_path)[0]


def test_labels_a_set_does_not_have_are_refused_with_those_it_has(tmp_path):
    with pytest.raises(ConfigError, match=r"ANI1X has no 'polarizability' to learn\. It has dipole and charges"):
        ANI1X(tmp_path, labels=["polarizability"])
    with pytest.raises(ConfigError, match=r"ANI2X has no 'dipole' to learn\. It has nothing beside"):
        ANI2X(tmp_path, labels=["dipole"])


def test_dipoles_of_the_published_file_are_in_the_unit_of_its_charges(tmp_path):
    """In Debye they would be 4.8 times what MBIS charges give."""
    (tmp_path / "raw").mkdir()
    shutil.copy(shared("data/raw/ani1x/ani1_n5.hdf5"), tmp_path / "raw" / "ani1x-release.h5")
    data = ANI1X(tmp_path, labels=["dipole", "charges"])
    with h5py.File(tmp_path / "raw" / "ani1x-release.h5") as file:
        charges = [row for molecule in file.values() for row in molecule["wb97x_tz.mbis_charges"][()]]
    samples = list(data)
    assert len(samples) == len(charges) == 8
    products = squares = 0.0
    for sample, q in zip(samples, charges, strict=True):
        assert sample.pq.isnan().all() or abs(float(sample.pq.sum())) < 1e-3
        if sample.dp.isfinite().all():
            products += float(sample.dp[0] @ (torch.from_numpy(q).float() @ sample.pos))
            squares += float(sample.dp.square().sum())
    assert 0.8 < products / squares < 1.3


def test_only_the_energy_is_stored_when_only_it_is_asked_for(tmp_path, ani1x):
    data = ANI1X(tmp_path, properties=("y",))
    assert set(data[0].keys()) == {"z", "pos", "y"}


@pytest.mark.parametrize(
    ("kind", "piece", "place"),
    [
        (ANI1X, "ani1x/ani1_n5.hdf5", "ani1x-release.h5"),
        (ANI1CCX, "ani1x/ani1_n5.hdf5", "ani1x-release.h5"),
        (ANI2X, "ani2x/ani2x_minimal.hdf5", "final_h5/ANI-2x-wB97X-631Gd.h5"),
    ],
)
def test_pieces_of_the_published_files_are_read_in_full(tmp_path, kind, piece, place):
    source = shared(f"data/raw/{piece}")
    (tmp_path / "raw" / place).parent.mkdir(parents=True)
    shutil.copy(source, tmp_path / "raw" / place)
    data = kind(tmp_path)
    key, sizes = {ANI1X: "wb97x_dz.energy", ANI1CCX: "ccsd(t)_cbs.energy", ANI2X: "energies"}[kind], []
    expected = []
    with h5py.File(source) as file:
        for group in file.values():
            valid = np.isfinite(group[key][()])
            expected += (group[key][()][valid] * HARTREE).tolist()
            sizes += [group["coordinates"].shape[1]] * int(valid.sum())
    batch = data.batch(range(len(data)))
    assert batch.y.flatten().tolist() == expected
    assert torch.diff(batch.ptr).tolist() == sizes


def test_pieces_of_ani1_are_read_in_full(tmp_path):
    raw = tmp_path / "raw" / "ANI-1_release"
    raw.mkdir(parents=True)
    pieces = [shared(f"data/raw/ani1/gdb_HC_s0{1 + number % 2}.h5") for number in range(8)]
    for number, piece in enumerate(pieces, start=1):
        shutil.copy(piece, raw / f"ani_gdb_s{number:02d}.h5")
    data = ANI1(tmp_path)
    with h5py.File(pieces[1]) as file:
        coordinates = file["gdb11_s02/gdb11_s02-3/coordinates"][100]
        energy = file["gdb11_s02/gdb11_s02-3/energies"][100]
    sample = data[5400 + 8469 + 100]
    np.testing.assert_array_equal(sample.pos, coordinates)
    assert sample.y.item() == energy * HARTREE
    assert len(data) == 4 * (5400 + 8469 + 5760 + 2880)
