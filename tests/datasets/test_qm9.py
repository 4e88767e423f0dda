"""QM9: structures and targets from the published text files, one target as the label."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from file_server import serve

from torchmdnet.datasets.qm9 import QM9
from torchmdnet.errors import ConfigError, DataError

HARTREE = 27.211386246
COLUMNS = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv"]
COLUMNS += ["u0_atom", "u298_atom", "h298_atom", "g298_atom"]
FACTORS = dict.fromkeys(("homo", "lumo", "gap", "zpve", "u0", "u298", "h298", "g298"), HARTREE)
MOLECULES = [["C", "H", "H", "H", "H"], ["N", "H", "H", "H"], ["O", "H", "H"], ["C", "F"], ["N", "N"]]
LEFT_OUT = {2, 4}  # numbers from 1

RNG = np.random.default_rng(0)
POSITIONS = [np.round(RNG.normal(size=(len(symbols), 3)), 4) for symbols in MOLECULES]
TABLE = [{name: round(float(RNG.normal()) - 40.0, 6) for name in COLUMNS} for _ in MOLECULES]


def sdf() -> str:
    lines = []
    for number, (symbols, pos) in enumerate(zip(MOLECULES, POSITIONS, strict=True), start=1):
        lines += [f"gdb_{number}", " -OEChem-03231823243D", ""]
        lines.append(f"{len(symbols):3d}{len(symbols) - 1:3d}  0     0  0  0  0  0  0999 V2000")
        lines += [
            f"{x:10.4f}{y:10.4f}{z:10.4f} {symbol:<3s} 0  0  0  0  0  0  0  0  0  0  0  0"
            for symbol, (x, y, z) in zip(symbols, pos, strict=True)
        ]
        lines += [f"  1{i + 2:3d}  1  0  0  0  0" for i in range(len(symbols) - 1)]
        lines += ["M  END", "$$$$"]
    return "\n".join(lines) + "\n"


def csv() -> str:
    rows = [[f"gdb_{i}", *(repr(row[name]) for name in COLUMNS)] for i, row in enumerate(TABLE, start=1)]
    return "\n".join(",".join(row) for row in [["mol_id", *COLUMNS], *rows]) + "\n"


def uncharacterized() -> str:
    heading = ["3 words of heading"] * 9
    return (
        "\n".join([*heading, *(f"   {number}   CN   [CH3]N  0.1" for number in sorted(LEFT_OUT)), "", "== end"]) + "\n"
    )


FILES = {"gdb9.sdf": sdf(), "gdb9.sdf.csv": csv(), "uncharacterized.txt": uncharacterized()}
KEPT = [i for i in range(len(MOLECULES)) if i + 1 not in LEFT_OUT]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "raw").mkdir()
    for name, text in FILES.items():
        (tmp_path / "raw" / name).write_text(text)
    return tmp_path


def test_structures_come_in_order_without_the_uncharacterized(root):
    data, numbers = QM9(root, label="energy_U0"), {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
    assert len(data) == len(KEPT)
    for sample, i in zip(data, KEPT, strict=True):
        assert sample.z.tolist() == [numbers[symbol] for symbol in MOLECULES[i]]
        np.testing.assert_array_equal(sample.pos, POSITIONS[i].astype(np.float32))
        assert set(sample.keys()) == {"z", "pos", "y"}


@pytest.mark.parametrize(
    ("label", "column", "unit"),
    [
        ("dipole_moment", "mu", "D"),
        ("isotropic_polarizability", "alpha", "Bohr^3"),
        ("homo", "homo", "eV"),
        ("lumo", "lumo", "eV"),
        ("gap", "gap", "eV"),
        ("electronic_spatial_extent", "r2", "Bohr^2"),
        ("zpve", "zpve", "eV"),
        ("energy_U0", "u0", "eV"),
        ("energy_U", "u298", "eV"),
        ("enthalpy_H", "h298", "eV"),
        ("free_energy", "g298", "eV"),
        ("heat_capacity", "cv", "cal/(mol K)"),
    ],
)
def test_each_label_is_its_column_in_its_unit(root, label, column, unit):
    data = QM9(root, label=label)
    expected = [[TABLE[i][column] * FACTORS.get(column, 1.0)] for i in KEPT]
    batch = data.batch(range(len(data)))
    assert batch.y.dtype == torch.float64
    assert batch.y.tolist() == expected
    assert data[1].y.tolist() == [expected[1]]
    assert data.label_unit == unit


def test_a_transform_sees_all_targets_and_the_label_is_chosen_afterwards(root):
    seen = []

    def transform(sample):
        seen.append(sample.y.clone())
        sample.y = sample.y + 1
        return sample

    data = QM9(root, transform=transform, label="heat_capacity")
    assert data[0].y.tolist() == [[TABLE[0]["cv"] + 1]]
    order = ["mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv"]
    order += ["u0_atom", "u298_atom", "h298_atom", "g298_atom", "A", "B", "C"]
    factors = {**FACTORS, **{name: 0.04336414 for name in COLUMNS if name.endswith("_atom")}}
    np.testing.assert_allclose(seen[0], [[TABLE[0][n] * factors.get(n, 1) for n in order]], rtol=1e-15)
    assert data.batch([0, 2]).y.shape == (2, 1)


def test_all_labels_share_one_set_of_arrays(root, monkeypatch):
    QM9(root, label="gap")
    monkeypatch.setattr(QM9, "process", lambda self: pytest.fail("made anew"))
    QM9(root, label="homo")


@pytest.mark.parametrize(
    ("label", "z", "energy"),
    [
        ("energy_U0", 6, -1029.86312267),
        ("energy_U", 1, -13.5745904),
        ("enthalpy_H", 9, -2713.42063702),
        ("free_energy", 7, -1485.71166277),
        ("zpve", 8, 0.0),
        ("heat_capacity", 1, 0.0),
    ],
)
def test_element_contributions_are_the_published_ones(root, label, z, energy):
    table = QM9(root, label=label).get_atomref(max_z=30)
    assert table.shape == (30, 1)
    assert table[z, 0] == torch.tensor(energy)


def test_labels_that_are_not_sums_have_no_element_contributions(root):
    assert QM9(root, label="gap").get_atomref() is None
    assert QM9(root, label="dipole_moment").get_atomref() is None


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "no property is chosen. Choose from dipole_moment"), ("energy_u0", "Did you mean 'energy_U0'")],
)
def test_a_label_is_asked_for_before_anything_else(tmp_path, label, message):
    with pytest.raises(ConfigError, match=message):
        QM9(tmp_path, label=label)
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_downloaded_and_unpacked(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("gdb9.sdf", "gdb9.sdf.csv"):
            file.writestr(name, FILES[name])
    with serve() as publisher:
        publisher.files["qm9.zip"] = archive.getvalue()
        publisher.files["uncharacterized.txt"] = FILES["uncharacterized.txt"].encode()
        assert len(QM9(tmp_path, label="gap", mirror=publisher.address)) == len(KEPT)
        assert len(publisher.requests) == 2
    assert not (tmp_path / "raw" / "qm9.zip").exists()


def test_tensors_of_an_earlier_release_are_read_without_running_code(tmp_path):
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "qm9_v3.pt"
    molecules = [
        {"z": torch.tensor([6, 1]), "pos": torch.ones(2, 3), "y": torch.arange(19.0)[None], "name": "gdb_1"},
        {"z": torch.tensor([8]), "pos": torch.zeros(1, 3), "y": torch.arange(19.0)[None] + 1, "name": "gdb_2"},
    ]
    torch.save(molecules, path)
    data = QM9(tmp_path, label="gap")
    assert [(sample.z.tolist(), sample.y.item()) for sample in data] == [([6, 1], 4.0), ([8], 5.0)]


class _Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_a_pickle_in_their_place_is_refused(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    torch.save([_Evil()], tmp_path / "raw" / "qm9_v3.pt")
    with pytest.raises(DataError, match="not a list of dictionaries of tensors"):
        QM9(tmp_path, label="gap")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gdb9.sdf", sdf().replace("  5  4  0", " 50  4  0"), "record 1: not a V2000 molecule"),
        ("gdb9.sdf", sdf().replace(" O   0", " Oh  0"), "is not a position and an element"),
        ("gdb9.sdf", sdf()[: sdf().rfind("gdb_5")], "do not hold the same number of molecules"),
        ("gdb9.sdf.csv", csv().replace("lumo", "umo"), "does not have the expected columns"),
        ("gdb9.sdf.csv", csv().rsplit("\n", 2)[0] + "\n", "do not hold the same number of molecules"),
    ],
)
def test_files_that_do_not_fit_are_named(root, name, text, message):
    (root / "raw" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        QM9(root, label="gap")


def test_coordinates_without_a_blank_between_them_are_read(root):
    text = sdf().replace(f"{POSITIONS[0][0, 0]:10.4f}{POSITIONS[0][0, 1]:10.4f}", " -100.0000-2000.0000")
    (root / "raw" / "gdb9.sdf").write_text(text)
    assert QM9(root, label="gap")[0].pos[0, :2].tolist() == [-100.0, -2000.0]
