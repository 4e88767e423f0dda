"""Splits are those of the established rule, number for number, and bad ones are refused by name."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from torchmdnet.data.splits import make_splits, save_splits, train_val_test_split
from torchmdnet.errors import ConfigError, DataError, SplitError


def lengths(parts):
    return [len(part) for part in parts]


def test_the_golden_permutation():
    train, val, test = make_splits(10, 5, 3, None, 1)
    assert train.tolist() == [8, 4, 7, 0, 1]
    assert val.tolist() == [2, 5, 9]
    assert test.tolist() == [6, 3]
    assert {part.dtype for part in (train, val, test)} == {torch.int64}


def test_parts_are_slices_of_one_permutation():
    rows = np.random.default_rng(17).permutation(100)
    train, val, test = make_splits(100, 0.5, 20, None, 17)
    np.testing.assert_array_equal(np.concatenate([train, val, test]), rows)
    np.testing.assert_array_equal(make_splits(100, 10, 5, 1, 17)[2], rows[15:16])


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (5, (0.3, 0.3, 0.3), [2, 2, 1]),  # 2 + 2 + 2 is one too many, and test gives it up
        (5, (0.5, 0.5, 0.0), [2, 2, 0]),  # halves round to even: one sample is left out
        (10, (0.8, 0.1, None), [8, 1, 1]),
        (10, (None, 0.05, 0.1), [9, 0, 1]),
        (10, (None, 0.25, 0.35), [4, 2, 4]),
        (7, (1.0, 0, 0), [7, 0, 0]),
        (10, (8, 0.3, 0), [8, 2, 0]),
        (100, (np.float64(0.5), np.int64(20), None), [50, 20, 30]),
    ],
)
def test_sizes_follow_the_established_rounding(total, sizes, expected):
    assert lengths(make_splits(total, *sizes, 1)) == expected


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [(3, (0.5, 0.5, None), [2, 1, 0]), (3, (0.5, 0.5, 0.0), [2, 1, 0]), (7, (0.5, None, 0.5), [4, 0, 3])],
)
def test_rounding_never_asks_for_more_than_there_is(total, sizes, expected):
    assert lengths(make_splits(total, *sizes, 1)) == expected


def test_left_out_samples_are_reported(caplog):
    make_splits(5, 0.5, 0.5, 0.0, 1)
    assert "1 of 5 samples are in none" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, 2.0, 0.1), r"val_size: 2\.0 is more than the whole data set.*write 2"),
        ((None, None, 0.1), "train_size and val_size are both None"),
        ((0.5, -1, None), "val_size: -1 is negative"),
        ((200, 1, 1), "train_size: 200 samples are asked for, but the data set has 100"),
        ((60, 50, 0), "train_size=60, val_size=50, test_size=0 come to 110"),
        ((0.9, 0.9, None), "come to 179"),
        (("0.5", 1, 1), "train_size: '0.5' is neither"),
        ((True, 1, 1), "train_size: True is neither"),
        ((float("nan"), 1, 1), "train_size: nan is neither"),
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_splits(100, *sizes, 1)


def test_an_order_is_divided_without_shuffling():
    order = [7, 6, 5, 4, 3, 2, 1, 0, 9, 8]
    train, val, test = make_splits(10, 6, 0, 4, 1, order=order)
    assert train.tolist() == order[:6]
    assert test.tolist() == order[6:]
    assert val.dtype == torch.int64
    assert len(val) == 0


def test_splits_are_written_and_read_back(tmp_path):
    path = tmp_path / "new" / "splits.npz"
    made = make_splits(50, 0.8, 0.1, None, 3, filename=path)
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["idx_test", "idx_train", "idx_val"]
    again = make_splits(50, None, None, None, 999, splits=path)
    for one, other in zip(made, again, strict=True):
        assert torch.equal(one, other)
    assert os.listdir(path.parent) == ["splits.npz"]


def test_a_splits_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    path = tmp_path / "evil.npz"
    np.savez(path, idx_train=np.array([Evil()], dtype=object), idx_val=[1], idx_test=[2])
    with pytest.raises(ConfigError, match="no Python objects"):
        make_splits(10, None, None, None, 1, splits=path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"idx_train": [0, 1], "idx_val": [1], "idx_test": [2]}, "sample 1 is in idx_train and in idx_val"),
        ({"idx_train": [0, 0], "idx_val": [1], "idx_test": [2]}, "sample 0 is twice in idx_train"),
        ({"idx_train": [0, 10], "idx_val": [1], "idx_test": [2]}, "idx_train.* holds 10, but the data set has 10"),
        ({"idx_train": [0, -1], "idx_val": [1], "idx_test": [2]}, "holds -1"),
        ({"idx_train": [0.5], "idx_val": [1], "idx_test": [2]}, "type float64"),
        ({"idx_train": [[0]], "idx_val": [1], "idx_test": [2]}, r"shape \(1, 1\)"),
        ({"idx_train": [0], "idx_val": [1]}, "has no idx_test"),
    ],
)
def test_a_wrong_split_is_refused(tmp_path, arrays, message):
    path = tmp_path / "splits.npz"
    np.savez(path, **arrays)
    with pytest.raises((DataError, ConfigError), match=message):
        make_splits(10, None, None, None, 1, splits=path)


def test_a_missing_or_broken_splits_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        make_splits(10, 1, 1, 1, 1, splits=tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="is a folder, not a file"):
        make_splits(10, 1, 1, 1, 1, splits=tmp_path)
    with pytest.raises(ConfigError, match="'/dev/zero' is no regular file"):
        make_splits(10, 1, 1, 1, 1, splits="/dev/zero")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_splits(10, 1, 1, 1, 1, splits=tmp_path / "text.npz")


def test_empty_parts_written_as_floats_are_read(tmp_path):
    path = tmp_path / "splits.npz"
    np.savez(path, idx_train=[3, 4], idx_val=np.zeros(0), idx_test=[5])
    assert lengths(make_splits(10, None, None, None, 1, splits=path)) == [2, 0, 1]


def test_parts_that_a_split_does_not_name_come_out_of_its_training_part():
    given = {"idx_train": np.arange(10, 50), "idx_test": np.arange(10)}
    train, val, test = make_splits(50, 0.3, 0.25, 0.1, 1, splits=given)
    assert lengths([train, val, test]) == [30, 10, 10]
    assert sorted(torch.cat([train, val]).tolist()) == list(range(10, 50))
    np.testing.assert_array_equal(test, np.arange(10))


def test_groups_stay_together_and_sizes_are_nearly_met():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 1000).astype(str)
    train, val, test = train_val_test_split(1000, 0.8, 0.1, 0.1, 5, groups=groups)
    sets = [set(groups[part]) for part in (train, val, test)]
    assert sum(len(names) for names in sets) == len(set.union(*sets))
    np.testing.assert_allclose(lengths([train, val, test]), [800, 100, 100], atol=20)
    again = train_val_test_split(1000, 0.8, 0.1, 0.1, 5, groups=groups)
    np.testing.assert_array_equal(train, again[0])


def test_a_split_file_does_not_need_the_number_of_samples(tmp_path):
    save_splits(tmp_path / "s.npz", np.array([4, 0]), np.array([2]), np.array([], dtype=np.int64))
    parts = make_splits(None, None, None, None, None, splits=str(tmp_path / "s.npz"))
    assert [part.tolist() for part in parts] == [[4, 0], [2], []]
    with pytest.raises(DataError, match="sample 4 is in idx_train and in idx_val"):
        make_splits(None, None, None, None, None, splits={"idx_train": [4, 0], "idx_val": [4]})
    with pytest.raises(DataError, match=r"idx_val .* holds -1"):
        make_splits(None, None, None, None, None, splits={"idx_train": [4, 0], "idx_val": [-1]})
    with pytest.raises(SplitError, match="dataset_len is None"):
        make_splits(None, 0.5, 0.2, None, 1)


@pytest.mark.parametrize("sizes", [(8, 5, 0), (0.5, None, None), (-1, 1, 1), (0.9, 0.3, 0), (None, 2.0, 0.1)])
def test_sizes_that_cannot_be_had_are_assertion_errors_too(sizes):
    """Release 3 raises an ``AssertionError``, which callers catch."""
    with pytest.raises(AssertionError) as caught:
        make_splits(10, *sizes, 1)
    assert isinstance(caught.value, ConfigError)
