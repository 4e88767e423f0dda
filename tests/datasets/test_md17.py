"""MD17 and MD22: kcal/mol in double precision from any of the published files."""

from __future__ import annotations

import functools
import io
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import shared
from file_server import serve
from torch_geometric.data import Batch

from torchmdnet.datasets.md17 import MD17
from torchmdnet.datasets.md22 import MD22
from torchmdnet.errors import ConfigError, DataError

Z = np.array([6, 1, 1, 8], dtype=np.uint8)
REVISED = ["benzene", "uracil", "naphthalene", "aspirin", "salicylic"]
REVISED += ["malonaldehyde", "ethanol", "toluene", "paracetamol", "azobenzene"]


def arrays(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "R": rng.normal(size=(frames, 4, 3)),
        "E": -406757.0 + rng.normal(size=(frames, 1)),
        "F": 20 * rng.normal(size=(frames, 4, 3)),
    }


def npz(frames: int, seed: int = 0, revised: bool = False) -> bytes:
    content, a = io.BytesIO(), arrays(frames, seed)
    if revised:
        np.savez_compressed(
            content,
            nuclear_charges=Z,
            coords=a["R"],
            energies=a["E"][:, 0],
            forces=a["F"],
            old_indices=np.arange(frames),
        )
    else:
        np.savez_compressed(content, z=Z, name=b"molecule", theory=b"PBE+vdW-TS", md5=b"0", type="d", **a)
    return content.getvalue()


@functools.cache
def revised_archive() -> bytes:
    content = io.BytesIO()
    members = {f"rmd17/npz_data/rmd17_{x}.npz": npz(1100, seed, True) for seed, x in enumerate(REVISED)}
    members |= {f"rmd17/splits/index_train_0{i}.csv": "\n".join(map(str, range(i, 1000 + i))) for i in (1, 2)}
    members |= {f"rmd17/splits/index_test_0{i}.csv": "\n".join(map(str, range(1000 + i, 1100))) for i in (1, 2)}
    members["rmd17/readme.txt"] = "..."
    with tarfile.open(fileobj=content, mode="w:bz2") as file:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return content.getvalue()


def coupled_cluster_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("aspirin_ccsd-train.npz", npz(10, 1))
        file.writestr("aspirin_ccsd-test.npz", npz(5, 2))
    return content.getvalue()


def put(root, place: str, content: bytes) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_bytes(content)


@pytest.mark.parametrize(
    ("make", "place", "revised"),
    [
        (lambda root: MD17(root, "aspirin"), "aspirin/raw/md17_aspirin.npz", False),
        (lambda root: MD17(root, "benzene_FHI-aims"), "benzene_FHI-aims/raw/benzene2018_dft.npz", False),
        (lambda root: MD17(root, "revised_ethanol"), "raw/rmd17/npz_data/rmd17_ethanol.npz", True),
        (
            lambda root: MD17(root, "ethanol_CCSD_T", train=False),
            "ethanol_CCSD_T/raw/ethanol_ccsd_t-test.npz",
            False,
        ),
        (lambda root: MD22(root, "dw-nanotube"), "dw-nanotube/raw/md22_dw_nanotube.npz", False),
    ],
    ids=["aspirin", "benzene_FHI-aims", "revised_ethanol", "ethanol_CCSD_T", "dw-nanotube"],
)
def test_values_come_as_they_are_in_the_file(tmp_path, make, place, revised):
    put(tmp_path, place, npz(6, 0, revised))
    data, expected = make(tmp_path), arrays(6)
    assert len(data) == 6
    batch = data.batch(range(6))
    assert batch.y.dtype == torch.float64
    assert batch.y.tolist() == expected["E"].tolist()
    np.testing.assert_array_equal(batch.pos, expected["R"].reshape(-1, 3).astype(np.float32))
    np.testing.assert_array_equal(batch.neg_dy, expected["F"].reshape(-1, 3).astype(np.float32))
    assert data[3].z.tolist() == Z.tolist()
    assert data[3].y.shape == (1, 1)


def test_neighbouring_energies_stay_apart(tmp_path):
    put(tmp_path, "aspirin/raw/md17_aspirin.npz", npz(50))
    y = MD17(tmp_path, "aspirin").batch(range(50)).y
    assert len(y.unique()) == 50
    assert len(y.float().unique()) < 50 or y.float().double().ne(y).all()


def test_mean_and_spread_are_those_of_the_energies(tmp_path):
    put(tmp_path, "aspirin/raw/md17_aspirin.npz", npz(50))
    data, y = MD17(tmp_path, "aspirin"), arrays(50)["E"]
    assert data.mean() == pytest.approx(y.mean(), rel=1e-14)
    assert data.std() == pytest.approx(y.std(ddof=1), rel=1e-9)


def test_the_original_files_are_downloaded_by_name(tmp_path):
    with serve() as publisher:
        publisher.files["md17_naphthalene.npz"] = npz(3)
        assert len(MD17(tmp_path, "naphtalene", mirror=publisher.address)) == 3
        assert len(MD17(tmp_path, "naphtalene")) == 3
        assert len(publisher.requests) == 1
    assert (tmp_path / "naphtalene" / "raw" / "md17_naphthalene.npz").exists()


def test_one_archive_serves_all_revised_molecules(tmp_path):
    with serve() as publisher:
        publisher.files["rmd17.tar.bz2"] = revised_archive()
        ethanol = MD17(tmp_path, "revised_ethanol", mirror=publisher.address)
        salicylic = MD17(tmp_path, "revised_salicylic_acid")
        assert len(publisher.requests) == 1
    assert ethanol[7].y.item() == arrays(1100, REVISED.index("ethanol"))["E"][7, 0]
    assert salicylic[7].y.item() == arrays(1100, REVISED.index("salicylic"))["E"][7, 0]


def test_the_revised_sets_come_with_their_first_split(tmp_path):
    put(tmp_path, "raw/rmd17.tar.bz2", revised_archive())
    data = MD17(tmp_path, "revised_toluene")
    assert data.splits is not None
    assert {name: (len(i), i[0], i[-1]) for name, i in data.splits.items()} == {
        "idx_train": (950, 1, 950),
        "idx_val": (50, 951, 1000),
        "idx_test": (99, 1001, 1099),
    }
    assert data[:10].splits is None


def test_coupled_cluster_frames_come_in_two_parts(tmp_path):
    put(tmp_path, "aspirin_CCSD/raw/aspirin_ccsd.zip", coupled_cluster_zip())
    train, test = MD17(tmp_path, "aspirin_CCSD", train=True), MD17(tmp_path, "aspirin_CCSD", train=False)
    assert (len(train), len(test)) == (10, 5)
    assert train[0].y.item() == arrays(10, 1)["E"][0, 0]
    assert test[0].y.item() == arrays(5, 2)["E"][0, 0]


@pytest.mark.parametrize(
    ("molecules", "train", "message"),
    [
        ("aspirine", None, "MD17 has no 'aspirine'. Did you mean 'aspirin'"),
        ("aspirin_CCSD", None, "separate frames for training and testing"),
        ("aspirin", True, "'aspirin' is not divided"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_download(tmp_path, molecules, train, message):
    with pytest.raises(ConfigError, match=message):
        MD17(tmp_path, molecules, train=train)
    assert list(tmp_path.iterdir()) == []


def test_md22_refuses_an_unknown_molecule(tmp_path):
    with pytest.raises(ConfigError, match=r"MD22 has no 'stachiose'\. Did you mean 'stachyose'"):
        MD22(tmp_path, "stachiose")


@pytest.mark.parametrize("damage", ["truncated", "pickled", "other layout", "shapes"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, damage):
    content, a = io.BytesIO(), arrays(3)
    if damage == "truncated":
        content.write(npz(3)[:300])
    elif damage == "pickled":
        np.savez(content, z=Z, R=np.array([print], dtype=object), E=a["E"], F=a["F"])
    elif damage == "other layout":
        np.savez(content, positions=a["R"])
    else:
        np.savez(content, z=Z[:3], **a)
    put(tmp_path, "aspirin/raw/md17_aspirin.npz", content.getvalue())
    with pytest.raises(DataError, match=r"MD17: .*md17_aspirin.npz"):
        MD17(tmp_path, "aspirin")


def test_batches_equal_samples_collated_one_by_one(tmp_path):
    put(tmp_path, "aspirin/raw/md17_aspirin.npz", npz(9))
    data = MD17(tmp_path, "aspirin")
    batch, expected = data.batch([4, 0, 4]), Batch.from_data_list([data[4], data[0], data[4]])
    for key in ("z", "pos", "y", "neg_dy", "batch", "ptr"):
        assert torch.equal(batch[key], expected[key])


def test_units_and_methods_are_stated(tmp_path):
    put(tmp_path, "ethanol_CCSD_T/raw/ethanol_ccsd_t-train.npz", npz(2))
    put(tmp_path, "raw/rmd17/npz_data/rmd17_uracil.npz", npz(2, revised=True))
    coupled, revised = MD17(tmp_path, "ethanol_CCSD_T", train=True), MD17(tmp_path, "revised_uracil")
    assert (coupled.energy_unit, coupled.length_unit, coupled.level_of_theory) == ("kcal/mol", "Å", "CCSD(T)/cc-pVTZ")
    assert (revised.level_of_theory, revised.licence) == ("PBE/def2-SVP", "CC0")
    assert MD22.level_of_theory == "PBE+MBD"


def test_a_piece_of_the_published_file_is_read_in_full(tmp_path):
    source = shared("data/raw/md17/md17_ethanol_2000.npz")
    (tmp_path / "ethanol" / "raw").mkdir(parents=True)
    shutil.copy(source, tmp_path / "ethanol" / "raw" / "md17_ethanol.npz")
    data = MD17(tmp_path, "ethanol")
    with np.load(source) as file:
        batch = data.batch(range(2000))
        np.testing.assert_array_equal(batch.y, file["E"])
        np.testing.assert_array_equal(batch.pos.reshape(2000, 9, 3), file["R"].astype(np.float32))
        np.testing.assert_array_equal(batch.neg_dy.reshape(2000, 9, 3), file["F"].astype(np.float32))
