"""NumPy files in the established layout; files that do not belong together are refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch

from torchmdnet.datasets import Custom
from torchmdnet.errors import DataError

SIZES = {1: (4, 3), 2: (5, 6), 10: (3, 2)}


def numbers(label: int, dtype=np.float32) -> dict[str, np.ndarray]:
    frames, atoms = SIZES[label]
    rng = np.random.default_rng(label)
    return {
        "coords": rng.normal(size=(frames, atoms, 3)).astype(dtype),
        "embed": rng.integers(1, 10, atoms),
        "energy": rng.normal(size=(frames, 1)).astype(dtype) + 100 * label,
        "forces": rng.normal(size=(frames, atoms, 3)).astype(dtype),
    }


def write(folder, names="{kind}_{label}.npy", dtype=np.float32, flat=False):
    for label in SIZES:
        for kind, array in numbers(label, dtype).items():
            path = folder / names.format(kind=kind, label=label)
            path.parent.mkdir(exist_ok=True)
            np.save(path, array[:, 0] if flat and kind == "energy" else array)
    return folder


def globs(folder, *kinds):
    return [f"{folder}/{kind}_*.npy" for kind in kinds or ("coords", "embed", "energy", "forces")]


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "mapped"])
def test_samples_are_those_of_the_files_in_the_established_order(tmp_path, limit):
    data = Custom(*globs(write(tmp_path)), limit)
    assert len(data) == 12
    row = 0
    for label in (1, 10, 2):  # sorted as text, as ever, so that splits stay what they were
        arrays = numbers(label)
        for frame in range(SIZES[label][0]):
            sample = data[row]
            np.testing.assert_array_equal(sample.z, arrays["embed"])
            np.testing.assert_array_equal(sample.pos, arrays["coords"][frame])
            np.testing.assert_array_equal(sample.y, arrays["energy"][frame])
            np.testing.assert_array_equal(sample.neg_dy, arrays["forces"][frame])
            assert sample.y.shape == (1,)
            row += 1
    assert data.frames.in_memory == (limit > 0)


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "mapped"])
@pytest.mark.parametrize("flat", [True, False])
def test_a_batch_equals_collated_samples(tmp_path, limit, flat):
    data = Custom(*globs(write(tmp_path, flat=flat)), limit)
    rows = [11, 0, 5, 4]
    batch, expected = data.batch(rows), Batch.from_data_list([data[i] for i in rows])
    assert set(batch.keys()) == set(expected.keys())
    for name in expected.keys():  # noqa: SIM118
        assert batch[name].shape == expected[name].shape, name
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    assert batch.y.shape == (4,)


def test_flat_energies_give_scalars(tmp_path):
    data = Custom(*globs(write(tmp_path, flat=True)))
    assert data[0].y.shape == data[-1].y.shape == ()


def test_double_precision_stays(tmp_path):
    sample = Custom(*globs(write(tmp_path, dtype=np.float64)))[0]
    assert sample.pos.dtype == sample.y.dtype == sample.neg_dy.dtype == torch.float64


def test_energies_or_forces_alone_will_do(tmp_path):
    coords, embed, energy, forces = globs(write(tmp_path))
    assert "neg_dy" not in Custom(coords, embed, energy)[0]
    assert "y" not in Custom(coords, embed, forceglob=forces)[0]
    assert sorted(Custom(coords, embed)[0].keys()) == ["pos", "z"]


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Custom(*globs("~"))) == 12


def test_types_of_beads_may_be_any_number(tmp_path):
    np.save(tmp_path / "coords_1.npy", np.zeros((2, 2, 3)))
    np.save(tmp_path / "embed_1.npy", np.array([0, 4000]))
    np.save(tmp_path / "energy_1.npy", np.zeros(2))
    assert Custom(*globs(tmp_path, "coords", "embed", "energy"))[1].z.tolist() == [0, 4000]


@pytest.mark.parametrize("limit", [1024, 0])
def test_files_are_matched_by_number_whatever_the_padding(tmp_path, limit):
    for label in SIZES:
        arrays = numbers(label)
        np.save(tmp_path / f"coords_{label}.npy", arrays["coords"])
        np.save(tmp_path / f"embed_{label:03d}.npy", arrays["embed"])
        np.save(tmp_path / f"energy_{label:02d}.npy", arrays["energy"])
    data = Custom(*globs(tmp_path, "coords", "embed", "energy"), preload_memory_limit=limit)
    expected = [100] * 4 + [1000] * 3 + [200] * 5
    np.testing.assert_allclose([data[i].y.item() for i in range(12)], expected, atol=5)


def test_folders_may_tell_molecules_apart(tmp_path):
    write(tmp_path, "{label}/{kind}.npy")
    data = Custom(*(f"{tmp_path}/*/{kind}.npy" for kind in ("coords", "embed", "energy", "forces")))
    np.testing.assert_allclose(data[4].y.item(), 1000, atol=5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [((1, 2, 11), r"energy_files: nothing belongs to .*coords_10\.npy"), ((3, 4, 5), "nothing belongs to")],
)
def test_files_of_other_molecules_are_refused(tmp_path, labels, message):
    write(tmp_path)
    for old, new in zip(SIZES, labels, strict=True):
        (tmp_path / f"energy_{old}.npy").rename(tmp_path / f"labels_{new}.npy")
    with pytest.raises(DataError, match=message):
        Custom(*globs(tmp_path, "coords", "embed", "labels"))


def test_names_without_anything_in_common_are_paired_in_order_with_a_warning(tmp_path, caplog):
    for name, energy in (("water", 1.0), ("methane", 2.0)):
        np.save(tmp_path / f"coords_{name}.npy", np.zeros((2, 1, 3)))
        np.save(tmp_path / f"embed_{name}.npy", np.ones(1))
        np.save(tmp_path / f"energy_{'ab'[name == 'water']}.npy", np.full(2, energy))
    data = Custom(*globs(tmp_path, "coords", "embed", "energy"))
    assert data[0].y.item() == 2.0  # methane before water, a before b
    assert "paired in sorted order" in caplog.text


def test_a_pattern_without_a_match_is_refused(tmp_path):
    coords, embed, energy, _ = globs(write(tmp_path))
    with pytest.raises(DataError, match=r"energy_files: No file matches the pattern .*zz"):
        Custom(coords, embed, f"{tmp_path}/zz*")
    with pytest.raises(DataError, match=r"coord_files: No file matches"):
        Custom(f"{tmp_path}/zz*", embed, energy)


def test_a_missing_file_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "forces_2.npy").unlink()
    with pytest.raises(DataError, match="force_files: 2 files, but coord_files has 3"):
        Custom(*globs(tmp_path))


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("coords", (5, 6), r"coords_2\.npy has shape \(5, 6\) instead of \(frames, atoms, 3\)"),
        ("coords", (5, 7, 3), r"embed_2\.npy has shape \(6,\).*7 atoms, so \(7,\) is needed"),
        ("coords", (0, 6, 3), "is empty"),
        ("embed", (6, 1), r"embed_2\.npy has shape \(6, 1\)"),
        ("energy", (4,), r"energy_2\.npy has shape \(4,\).*5 frames.*so \(5,\) is needed"),
        ("forces", (5, 6, 2), r"forces_2\.npy has shape \(5, 6, 2\)"),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path, kind, shape, message):
    np.save(write(tmp_path) / f"{kind}_2.npy", np.ones(shape))
    with pytest.raises(DataError, match=message):
        Custom(*globs(tmp_path))


@pytest.mark.parametrize("kind", ["coords", "energy", "forces"])
@pytest.mark.parametrize("limit", [1024, 0])
def test_numbers_that_are_not_finite_are_refused(tmp_path, kind, limit):
    array = numbers(2)[kind]
    array[3] = np.nan
    np.save(write(tmp_path) / f"{kind}_2.npy", array)
    with pytest.raises(DataError, match=rf"{kind}_2\.npy, frame 3"):
        Custom(*globs(tmp_path), limit)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    path = write(tmp_path) / "coords_2.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(DataError, match=r"coords_2\.npy cannot be read"):
        Custom(*globs(tmp_path))
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"coords_2\.npy cannot be read"):
        Custom(*globs(tmp_path))
    np.save(write(tmp_path) / "embed_2.npy", np.full(6, 1.5))
    with pytest.raises(DataError, match=r"embed_2\.npy holds 1\.5"):
        Custom(*globs(tmp_path))


def test_it_says_what_was_found(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Custom(*globs(write(tmp_path)))
    assert "12 samples of 3 molecules" in caplog.text
    assert "in memory" in caplog.text


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "mapped"])
def test_boxes_stresses_weights_and_charges_belong_to_each_frame(tmp_path, limit):
    rng = np.random.default_rng(6)
    write(tmp_path)
    found = {}
    for label, (frames, _) in SIZES.items():
        boxes = rng.normal(size=(frames, 3, 3)) if label != 2 else np.eye(3) * 9
        stress = rng.normal(size=(frames, 3, 3))
        stress[0] = np.nan
        arrays = {"box": boxes, "stress": stress, "config_weight": rng.uniform(size=frames), "q": np.arange(frames)}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}_{label}.npy", array)
        found[label] = arrays
    files = {name: f"{tmp_path}/{name}_*.npy" for name in ("box", "stress", "config_weight", "q")}
    data = Custom(*globs(tmp_path), limit, label_files=files)
    assert data.runs.tolist() == [4, 3, 5]  # in the established order: 1, 10, 2
    np.testing.assert_array_equal(data[1].box[0], found[1]["box"][1])
    np.testing.assert_array_equal(data[5].box[0], found[10]["box"][1])
    np.testing.assert_array_equal(data[9].box[0], np.eye(3) * 9)
    np.testing.assert_array_equal(data[10].stress[0], found[2]["stress"][3])
    assert torch.isnan(data[0].stress).all()
    batch = data.batch([0, 6, 11])
    assert batch.box.shape == batch.stress.shape == (3, 3, 3)
    weights = [found[1]["config_weight"][0], found[10]["config_weight"][2], found[2]["config_weight"][4]]
    np.testing.assert_array_equal(batch.config_weight, weights)
    assert batch.q.tolist() == [0, 2, 4]


@pytest.mark.parametrize("limit", [1024, 0], ids=["in memory", "mapped"])
def test_a_box_that_does_not_fit_or_is_not_finite_is_refused(tmp_path, limit):
    write(tmp_path)
    boxes = {label: np.ones((frames, 3, 3)) for label, (frames, _) in SIZES.items()}
    boxes[2][3, 1, 1] = np.nan
    for label, box in boxes.items():
        np.save(tmp_path / f"box_{label}.npy", box)
    files = {"box": f"{tmp_path}/box_*.npy"}
    with pytest.raises(DataError, match=r"label_files: box: .*box_2\.npy, frame 3: a number is NaN"):
        Custom(*globs(tmp_path), limit, label_files=files)
    np.save(tmp_path / "box_2.npy", np.ones((4, 3, 3)))
    with pytest.raises(DataError, match=r"box_2\.npy has shape \(4, 3, 3\).*so \(5, 3, 3\) is needed"):
        Custom(*globs(tmp_path), limit, label_files=files)
