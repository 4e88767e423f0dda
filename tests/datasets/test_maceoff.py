"""MACE-OFF: extended XYZ in a tar archive, read in one stream."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from file_server import serve

from torchmdnet.datasets.maceoff import MACEOFF, parse_maceoff_tar
from torchmdnet.errors import ConfigError, DataError

SYMBOLS, NUMBERS = ["H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I"], [1, 6, 7, 8, 9, 15, 16, 17, 35, 53]
RNG = np.random.default_rng(0)
SIZES = [5, 1, 12, 3, 7, 2]
FRAMES = [
    (
        round(float(RNG.normal()) * 1e4, 6),
        RNG.integers(0, 10, size),
        np.round(RNG.normal(size=(size, 3)), 6),
        np.round(3 * RNG.normal(size=(size, 3)), 6),
    )
    for size in SIZES
]


def xyz(frames) -> str:
    lines = []
    for energy, kinds, pos, forces in frames:
        lines.append(str(len(kinds)))
        lines.append(
            "Properties=species:S:1:pos:R:3:forces:R:3:dipole:R:3 config_type=PubChem "
            f'energy={energy!r} smiles=CC(=O)C free_energy=-1.0 pbc="F F F"'
        )
        for kind, r, f in zip(kinds, pos, forces, strict=True):
            numbers = " ".join(f"{value:.8f}" for value in (*r, *f, 0.1, 0.2, 0.3))
            lines.append(f"{SYMBOLS[kind]:<3s} {numbers}")
    return "\n".join(lines) + "\n"


def tar_gz(*texts: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as file:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"data/{number}.xyz")
            info.size = len(text.encode())
            file.addfile(info, io.BytesIO(text.encode()))
    return content.getvalue()


def put(root, content: bytes) -> None:
    path = root / "raw" / "maceoff" / "1.0" / "train_large_neut_no_bad_clean.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_every_frame_of_every_member_is_read(tmp_path):
    put(tmp_path, tar_gz(xyz(FRAMES[:4]), xyz(FRAMES[4:])))
    data = MACEOFF(tmp_path)
    assert len(data) == len(FRAMES)
    for sample, (energy, kinds, pos, forces) in zip(data, FRAMES, strict=True):
        assert sample.z.tolist() == [NUMBERS[kind] for kind in kinds]
        assert sample.y.tolist() == [[energy]]
        np.testing.assert_array_equal(sample.pos, pos.astype(np.float32))
        np.testing.assert_array_equal(sample.neg_dy, forces.astype(np.float32))


def test_large_forces_are_left_out(tmp_path):
    put(tmp_path, tar_gz(xyz(FRAMES)))
    largest = np.array([np.linalg.norm(forces, axis=1).max() for *_, forces in FRAMES])
    limit = float(np.median(largest))
    data = MACEOFF(tmp_path, max_gradient=limit)
    assert data.batch(range(len(data))).y.flatten().tolist() == [
        frame[0] for frame, force in zip(FRAMES, largest, strict=True) if force <= limit
    ]
    with pytest.raises(DataError, match=r"MACEOFF: no conformer is left with max_gradient=1e-06"):
        MACEOFF(tmp_path, max_gradient=1e-6)
    assert len(MACEOFF(tmp_path)) == len(FRAMES)


def test_the_arrays_are_named_by_the_arguments(tmp_path):
    put(tmp_path, tar_gz(xyz(FRAMES)))
    MACEOFF(tmp_path)
    assert (tmp_path / "processed" / f"MACEOFF-{hashlib.md5(b'1.0None').hexdigest()}.y.mmap").exists()


def test_frames_can_be_read_one_by_one(tmp_path):
    path = tmp_path / "frames.tar.gz"
    path.write_bytes(tar_gz(xyz(FRAMES)))
    for (energy, z, pos, forces), expected in zip(parse_maceoff_tar(path), FRAMES, strict=True):
        assert energy == expected[0]
        assert z.tolist() == [NUMBERS[kind] for kind in expected[1]]
        np.testing.assert_array_equal(pos, expected[2])
        np.testing.assert_array_equal(forces, expected[3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nH ", "\nQq ", "Qq"),
        (" 0.10000000 0.20000000 0.30000000\n", " 0.1 0.2\n", "does not have 10 columns"),
        (" energy=", " enrgy=", "has no energy="),
        ("\n5\n", "\nfive\n", "is not a number of atoms"),
    ],
)
def test_a_frame_of_another_layout_is_named(tmp_path, old, new, message):
    text = "\n" + xyz(FRAMES[:1] * 3)
    assert old in text
    put(tmp_path, tar_gz(text.replace(old, new)))
    with pytest.raises(DataError, match=f"frame.*{message}"):
        MACEOFF(tmp_path)


def test_a_file_that_ends_within_a_frame_is_refused(tmp_path):
    put(tmp_path, tar_gz("\n".join(xyz(FRAMES).split("\n")[:-3])))
    with pytest.raises(DataError, match="frame 6: the file ends within the frame"):
        MACEOFF(tmp_path)


def test_a_truncated_archive_is_refused(tmp_path):
    content = tar_gz(xyz(FRAMES * 50))
    put(tmp_path, content[: len(content) // 2])
    with pytest.raises(DataError, match="is damaged"):
        MACEOFF(tmp_path)
    assert not list(tmp_path.rglob("*.mmap"))


def test_the_archive_is_downloaded(tmp_path):
    with serve() as publisher:
        publisher.files["train_large_neut_no_bad_clean.tar.gz"] = tar_gz(xyz(FRAMES))
        assert len(MACEOFF(tmp_path, mirror=publisher.address)) == len(FRAMES)


def test_an_unknown_version_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"version: '2' is not published. Choose from 1\.0"):
        MACEOFF(tmp_path, version="2")


def test_element_energies_are_fitted_to_the_total_energies(tmp_path):
    frames = [(float(-500 * len(kinds)), kinds, pos, forces) for _, kinds, pos, forces in FRAMES * 3]
    put(tmp_path, tar_gz(xyz(frames)))
    table = MACEOFF(tmp_path).get_atomref()
    sample = frames[2]
    fitted = table[torch.tensor([NUMBERS[kind] for kind in sample[1]])].sum()
    assert fitted.item() == pytest.approx(sample[0], rel=1e-5)
