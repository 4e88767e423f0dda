"""mdCATH: chosen by an index, fetched by domain, read frame by frame."""

from __future__ import annotations

import io
import pickle

import h5py
import numpy as np
import pytest
import torch
from file_server import serve
from torch.utils.data import DataLoader
from torch_geometric.data import Batch

from torchmdnet.datasets.mdcath import MDCATH, load_pdb_list
from torchmdnet.errors import ConfigError, DataError

DOMAINS = {"1abcA00": (12, 4), "2defB01": (20, 8), "3ghiC02": (7, 900)}  # atoms, residues
TEMPERATURES, REPLICAS = ("320", "348"), 3


def index() -> bytes:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, (atoms, residues) in DOMAINS.items():
            domain = file.create_group(name)
            domain.attrs.update(numProteinAtoms=atoms, numResidues=residues, numNoHAtoms=atoms // 2)
            for temperature in TEMPERATURES:
                for replica in range(REPLICAS):
                    domain.create_group(f"{temperature}/{replica}").attrs.update(
                        numFrames=5 + replica,
                        alpha=residues * 0.25 * replica,
                        beta=residues * 0.25,
                        min_gyration_radius=1.0 + 0.1 * replica,
                        max_gyration_radius=1.5 + 0.1 * replica,
                    )
    return content.getvalue()


def domain_file(name: str) -> bytes:
    content, atoms = io.BytesIO(), DOMAINS[name][0]
    rng = np.random.default_rng(atoms)
    with h5py.File(content, "w") as file:
        file[f"{name}/z"] = rng.integers(1, 17, atoms)
        for temperature in TEMPERATURES:
            for replica in range(REPLICAS):
                shape = (5 + replica, atoms, 3)
                for quantity in ("coords", "forces"):
                    file[f"{name}/{temperature}/{replica}/{quantity}"] = rng.normal(size=shape).astype(np.float32)
    return content.getvalue()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mdcath_source.h5").write_bytes(index())
    for name in DOMAINS:
        (tmp_path / f"mdcath_dataset_{name}.h5").write_bytes(domain_file(name))
    return tmp_path


def check(sample, root) -> None:
    domain, temperature, replica, frame = sample.info.split("_")
    with h5py.File(root / f"mdcath_dataset_{domain}.h5") as file:
        group = file[f"{domain}/{temperature}/{replica}"]
        np.testing.assert_array_equal(sample.pos, group["coords"][int(frame)])
        np.testing.assert_array_equal(sample.neg_dy, group["forces"][int(frame)])
        np.testing.assert_array_equal(sample.z, file[f"{domain}/z"])


def test_every_frame_is_what_its_name_says(root):
    data = MDCATH(root)
    assert len(data) == data.num_conformers == 3 * (5 + 6 + 7)
    for sample in data:
        check(sample, root)
    assert [data[i].info for i in (0, 5, 17, 18)] == [
        "1abcA00_348_0_0",
        "1abcA00_348_1_0",
        "1abcA00_348_2_6",
        "2defB01_348_0_0",
    ]
    assert {key: value.dtype for key, value in data[0].to_dict().items() if key != "info"} == {
        "z": torch.int64,
        "pos": torch.float32,
        "neg_dy": torch.float32,
    }


def test_frames_can_be_skipped(root):
    data = MDCATH(root, skip_frames=2, pdb_list=["1abcA00"])
    assert data.processed == {"1abcA00": [("348", "0", 3), ("348", "1", 3), ("348", "2", 4)]}
    assert [sample.info for sample in data][:4] == [f"1abcA00_348_{r}_{k}" for r, k in ((0, 0), (0, 1), (0, 2), (1, 0))]
    with h5py.File(root / "mdcath_dataset_1abcA00.h5") as file:
        np.testing.assert_array_equal(data[9].pos, file["1abcA00/348/2/coords"][6])


@pytest.mark.parametrize(
    ("arguments", "replicas"),
    [
        ({}, "012 012 012"),
        ({"temperatures": [320, "348"]}, "012012 012012 012012"),
        ({"numResidues": 500}, "012 012"),
        ({"numAtoms": 15}, "012 012"),
        ({"numNoHAtoms": 6}, "012 012"),
        ({"numResidues": None, "numAtoms": None}, "012 012 012"),
        ({"numFrames": 6}, "12 12 12"),
        ({"min_gyration_radius": 1.05}, "12 12 12"),
        ({"max_gyration_radius": 1.65}, "01 01 01"),
        ({"solid_ss": 50}, "12 12 12"),
        ({"alpha_beta_coil": (25, 25, 25)}, "12 12 12"),
        ({"alpha_beta_coil": (None, None, 60)}, "0 0 0"),
        ({"alpha_beta_coil": (40, 0, 0)}, "2 2 2"),
    ],
)
def test_domains_and_replicas_are_chosen(root, arguments, replicas):
    data = MDCATH(root, **arguments)
    assert " ".join("".join(replica for _, replica, _ in all_) for all_ in data.processed.values()) == replicas


@pytest.mark.parametrize("order", [[0], [53, 0, 20, 20, 1], list(range(54))])
def test_a_batch_equals_its_samples_collated_one_by_one(root, order):
    data = MDCATH(root)
    batch, expected = data.batch(order), Batch.from_data_list([data[i] for i in order])
    for key in ("z", "pos", "neg_dy", "batch", "ptr"):
        assert torch.equal(batch[key], expected[key])
        assert batch[key].dtype == expected[key].dtype
    assert batch.info == expected.info
    assert batch.num_graphs == len(order)
    for sample in batch.to_data_list()[:2]:
        check(sample, root)


def test_parts_and_transforms_work_in_batches(root):
    def shift(sample):
        sample.pos = sample.pos + 1
        return sample

    plain, shifted = MDCATH(root)[10:30], MDCATH(root, transform=shift)[10:30]
    assert torch.equal(shifted.batch([3, 0]).pos, plain.batch([3, 0]).pos + 1)
    assert torch.equal(plain.batch([3])["pos"], plain[3].pos)


def test_workers_read_the_files_themselves(root):
    data = pickle.loads(pickle.dumps(MDCATH(root)))
    loader = DataLoader(data, batch_size=20, num_workers=2, collate_fn=Batch.from_data_list)
    assert [name for batch in loader for name in batch.info] == [sample.info for sample in data]


def test_only_what_passes_is_downloaded(tmp_path):
    with serve() as publisher:
        publisher.files["mdcath_source.h5"] = index()
        publisher.files |= {f"mdcath_dataset_{name}.h5": domain_file(name) for name in DOMAINS}
        data = MDCATH(tmp_path, pdb_list=["2defB01"], mirror=publisher.address)
        assert [path for path, _ in publisher.requests] == ["/mdcath_source.h5", "/mdcath_dataset_2defB01.h5"]
        MDCATH(tmp_path, pdb_list=["2defB01"], temperatures=320, mirror=publisher.address)
        assert len(publisher.requests) == 2
    check(data[3], tmp_path)


def test_the_addresses_are_those_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def note(remote, folder, **_):
        asked.append(remote)
        content = index() if remote.path == "mdcath_source.h5" else domain_file("1abcA00")
        (tmp_path / remote.path).write_bytes(content)

    monkeypatch.setattr("torchmdnet.datasets.mdcath.fetch", note)
    MDCATH(tmp_path, pdb_list=["1abcA00"])
    place = "https://huggingface.co/datasets/compsciencelab/mdCATH/resolve/main"
    assert [remote.urls for remote in asked] == [
        (f"{place}/mdcath_source.h5",),
        (f"{place}/data/mdcath_dataset_1abcA00.h5",),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pdb_list": ["1abcA01"]}, DataError, "'1abcA01' is not among the 3 domains of .* Did you mean '1abcA00'"),
        ({"temperatures": ["300"]}, DataError, "1abcA00 has no '300'. Choose from 320, 348"),
        ({"numAtoms": 3}, DataError, "no trajectory of 3 domains passes numAtoms=3, numResidues=1000"),
        ({"alpha_beta_coil": (100, 100, 100)}, ConfigError, "cannot be met. Give three smallest shares in percent"),
        ({"skip_frames": 0}, ConfigError, "skip_frames: 0 must be 1 or more"),
        ({"source_file": "other.h5"}, DataError, "other.h5 is missing. Only mdcath_source.h5 and"),
        ({"file_basename": "mine"}, DataError, "mine_1abcA00.h5 is missing"),
        ({"pdb_list": "/no/such/file"}, DataError, "pdb_list: there is no file '/no/such/file'"),
    ],
)
def test_arguments_that_cannot_be_met_are_explained(root, arguments, error, message):
    with pytest.raises(error, match=message):
        MDCATH(root, **arguments)


def test_a_damaged_domain_file_is_named(root):
    data, path = MDCATH(root), root / "mdcath_dataset_1abcA00.h5"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"mdcath_dataset_1abcA00\.h5 is damaged"):
        data[0]


def test_domains_are_listed_in_a_file_or_in_place(tmp_path):
    (tmp_path / "list.txt").write_text("1abcA00\n2defB01 \n\n1abcA00\n")
    assert load_pdb_list(str(tmp_path / "list.txt")) == ["1abcA00", "2defB01"]
    assert load_pdb_list(["b", "a"]) == ["b", "a"]


def test_the_home_folder_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(MDCATH(f"~/{root.name}")) == 54


def test_units_are_stated_and_there_are_no_energies(root):
    data = MDCATH(root)
    assert (data.energy_unit, data.length_unit, data.licence) == ("kcal/mol", "Å", "CC BY 4.0")
    assert data.get_atomref() is None
    assert data.total_size_mb == pytest.approx(sum(len(domain_file(name)) for name in DOMAINS) / 2**20, abs=1e-4)
