"""WaterBox: periodic frames in the units of the file, or in eV and Å."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from file_server import serve

from torchmdnet.datasets.water import WaterBox, create_numpy_arrays
from torchmdnet.errors import ConfigError, DataError

HARTREE, BOHR = 27.211386246, 0.529177
RNG = np.random.default_rng(0)
FRAMES = [
    {
        "pos": np.round(10 * RNG.normal(size=(6, 3)), 6),
        "forces": np.round(0.02 * RNG.normal(size=(6, 3)), 8),
        "energy": -1102.0 + round(float(RNG.normal()), 8),
        "lattice": np.round(23.4 + RNG.random() * np.eye(3), 6),
    }
    for _ in range(5)
]
SYMBOLS, NUMBERS = ["O", "H", "H"] * 2, [8, 1, 1] * 2


def xyz(frames=FRAMES, energy="{:.8f}".format, pbc="T T T") -> str:
    lines = []
    for frame in frames:
        lattice = " ".join(f"{value:.6f}" for value in frame["lattice"].reshape(-1))
        properties = "species:S:1:pos:R:3:force:R:3:Z:I:1"
        lines.append("6")
        lines.append(f'Lattice="{lattice}" Properties={properties} TotEnergy={energy(frame["energy"])} pbc="{pbc}"')
        for symbol, number, r, f in zip(SYMBOLS, NUMBERS, frame["pos"], frame["forces"], strict=True):
            lines.append(f"{symbol}  {' '.join(f'{value:.8f}' for value in (*r, *f))} {number}")
    return "\n".join(lines) + "\n"


def put(root, text: str, place: str = "training-set/dataset_1593.xyz") -> None:
    (root / "raw" / place).parent.mkdir(parents=True, exist_ok=True)
    (root / "raw" / place).write_text(text)


@pytest.mark.parametrize(("units", "energy", "length"), [("atomic", 1.0, 1.0), ("eV", HARTREE, BOHR)])
def test_values_are_those_of_the_file_or_converted(tmp_path, units, energy, length):
    put(tmp_path, xyz())
    data = WaterBox(tmp_path, units=units)
    assert len(data) == 5
    for sample, frame in zip(data, FRAMES, strict=True):
        assert sample.z.tolist() == NUMBERS
        assert sample.y.tolist() == [[frame["energy"] * energy]]
        np.testing.assert_allclose(sample.pos, frame["pos"] * length, rtol=1e-6)
        np.testing.assert_allclose(sample.neg_dy, frame["forces"] * energy / length, rtol=1e-6)
        np.testing.assert_allclose(sample.box, frame["lattice"][None] * length, rtol=1e-6)
    assert (data.energy_unit, data.length_unit) == (("Hartree", "Bohr") if units == "atomic" else ("eV", "Å"))
    assert data.batch([0, 3]).box.shape == (2, 3, 3)


def test_a_box_of_64_molecules_has_the_density_of_water_only_in_bohr():
    mass = 64 * 18.015 / 6.02214076e23  # g
    assert mass / (23.465 * BOHR * 1e-8) ** 3 == pytest.approx(1.0, abs=0.01)


def test_an_energy_with_an_exponent_is_read(tmp_path):
    put(tmp_path, xyz(energy="{:.10e}".format))
    assert WaterBox(tmp_path)[0].y.item() == pytest.approx(FRAMES[0]["energy"], rel=1e-10)


def test_frames_without_periodicity_have_no_box(tmp_path):
    put(tmp_path, xyz(pbc="F F F"))
    assert torch.equal(WaterBox(tmp_path)[0].box, torch.zeros(1, 3, 3))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TotEnergy=", "Energy=", "frame 0: the comment line has no TotEnergy="),
        ('pbc="T T T"', 'pbc="T T F"', "frame 0: the comment line has neither pbc"),
        ("Lattice=", "Cell=", "frame 0: the comment line has no Lattice="),
        ("\nO  ", "\n", "every atom needs a symbol"),
        ("\n6\n", "\n7\n", "frame 1 is not complete with 6 atoms"),
    ],
)
def test_a_frame_of_another_layout_is_named(tmp_path, old, new, message):
    put(tmp_path, xyz().replace(old, new))
    with pytest.raises(DataError, match=message):
        WaterBox(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    put(tmp_path, "\n".join(xyz().split("\n")[:-4]))
    with pytest.raises(DataError, match="frame 4 is not complete"):
        WaterBox(tmp_path)


@pytest.mark.parametrize("inside", ["training-set/dataset_1593.xyz", "dataset_1593.xyz"])
def test_the_archive_is_downloaded_once(tmp_path, inside):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(inside, xyz())
    with serve() as publisher:
        publisher.files["training-set.zip"] = archive.getvalue()
        for _ in range(2):
            assert len(WaterBox(tmp_path, mirror=publisher.address)) == 5
        assert len(WaterBox(tmp_path, units="eV", mirror=publisher.address)) == 5
        assert len(publisher.requests) == 1
    assert (tmp_path / "raw" / "training-set" / "dataset_1593.xyz").exists()


def test_a_file_directly_in_the_raw_folder_is_found(tmp_path):
    put(tmp_path, xyz(), "dataset_1593.xyz")
    assert len(WaterBox(tmp_path)) == 5


def test_arrays_come_in_the_established_order(tmp_path):
    put(tmp_path, xyz())
    arrays = create_numpy_arrays(tmp_path / "raw" / "training-set" / "dataset_1593.xyz")
    assert [array.shape for array in arrays] == [(5, 1), (5, 6, 3), (5, 6, 3), (5, 6, 1), (5, 9)]
    np.testing.assert_allclose(arrays[1][2], FRAMES[2]["forces"])
    np.testing.assert_allclose(arrays[2][2], FRAMES[2]["pos"])


def test_other_units_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="units: 'kcal' is not available"):
        WaterBox(tmp_path, units="kcal")
