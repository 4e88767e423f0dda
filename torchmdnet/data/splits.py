"""Which systems train, validate and test: the same ones for the same seed, in every version."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmdnet.errors import DataError, SplitError
from torchmdnet.files import draft_of, not_a_file

__all__ = ["digest_in", "load_splits", "make_splits", "save_splits", "train_val_test_split"]

logger = logging.getLogger(__name__)

PARTS: tuple[str, ...] = ("train", "val", "test")
Size = int | float | None
Splits = tuple[Tensor, Tensor, Tensor]


def train_val_test_split(
    dset_len: int,
    train_size: Size,
    val_size: Size,
    test_size: Size,
    seed: int | None,
    order: Any = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    gap: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide ``0 ... dset_len - 1`` at random.

    A float is a fraction of the data, rounded to the nearest even count; an integer is a count; None, allowed once, is
    the rest. Fractions that round to one sample too many lose it in the order test, val, train.

    Args:
        dset_len: Number of samples (n).
        train_size: Size of the training part.
        val_size: Size of the validation part.
        test_size: Size of the test part.
        seed: Seed of the permutation, which depends on nothing else but n.
        order: Samples in the order to divide them, (n,), instead of a random one.
        groups: Label of each sample, (n,); samples of one group stay in one part, and the sizes are met as nearly as
            whole groups allow.
        gap: Groups are trajectories instead, and each is cut into a block for training, one for validation and one for
            testing, in this order; ``gap`` samples before each cut are left out.

    Returns:
        int64 indices of the three parts.

    Raises:
        SplitError: If the sizes cannot be met; the message names the one at fault.
    """
    sizes = _counts(dset_len, {"train_size": train_size, "val_size": val_size, "test_size": test_size})
    left_out = dset_len - sum(sizes)
    if left_out > 0:
        logger.warning("%d of %d samples are in none of train, val and test.", left_out, dset_len)
    if groups is not None:
        if order is not None:
            raise SplitError("splits: groups and order cannot be combined.")
        if gap is not None:
            return _in_time(np.asarray(groups), sizes, gap)
        return _grouped(np.asarray(groups), sizes, seed)
    rows = np.random.default_rng(seed).permutation(dset_len) if order is None else np.arange(dset_len)
    ends = np.cumsum(sizes)
    parts = np.split(rows[: ends[-1]], ends[:2])
    if order is not None:
        parts = [np.array([order[i] for i in part], dtype=np.int64) for part in parts]
    train, val, test = (part.astype(np.int64) for part in parts)
    return train, val, test


def make_splits(
    dataset_len: int | None,
    train_size: Size,
    val_size: Size,
    test_size: Size,
    seed: int | None,
    filename: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    order: Any = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    gap: int | None = None,
) -> Splits:
    """The three parts of a data set, from sizes and a seed or as given, and kept in a file.

    Args:
        dataset_len: Number of samples (n). None with ``splits``: the indices are not compared with the data.
        train_size: See :func:`train_val_test_split`; ignored when ``splits`` gives all parts.
        val_size: Likewise.
        test_size: Likewise.
        seed: Likewise.
        filename: Where to write the result, as ``.npz`` with ``idx_train``, ``idx_val``, ``idx_test``.
        splits: A file of that kind, or a mapping with these keys, to take the parts from. Where ``idx_val`` or
            ``idx_test`` is absent, it is drawn from the training part as its size says.
        order: Likewise.
        groups: Likewise.
        gap: Likewise.

    Returns:
        int64 tensors train, val, test.

    Raises:
        SplitError: If the sizes cannot be met, or the file cannot be read.
        DataError: If an index in ``splits`` is not a whole number, is outside the data set, or occurs twice.
    """
    if splits is None:
        if dataset_len is None:
            raise SplitError(
                "splits: dataset_len is None. Give the number of samples, or splits to take the parts from."
            )
        parts = train_val_test_split(dataset_len, train_size, val_size, test_size, seed, order, groups, gap)
    else:
        given = load_splits(splits, dataset_len)
        sizes = {"train_size": train_size, "val_size": val_size, "test_size": test_size}
        parts = _complete(given, sizes, seed, groups, gap)
    if filename is not None:
        save_splits(filename, *parts)
    train, val, test = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in parts)
    return train, val, test


def load_splits(source: str | os.PathLike[str] | Mapping[str, Any], dataset_len: int | None) -> dict[str, np.ndarray]:
    """Read and check a split; no code in the file can run.

    Args:
        source: A file, or a mapping with the same keys.
        dataset_len: Number of samples; None where it is not known.

    Raises:
        SplitError: If the file cannot be read or lacks ``idx_train``.
        DataError: If an index is not a whole number, is outside the data set, or occurs twice.
    """
    keys = [f"idx_{part}" for part in PARTS]
    if isinstance(source, Mapping):
        name, arrays = "the data set's own split", {key: np.asarray(source[key]) for key in keys if key in source}
    else:
        name = os.path.expanduser(os.fspath(source))
        if wrong := not_a_file(name):
            raise SplitError(f"splits: {wrong}")
        try:
            with np.load(name, allow_pickle=False) as file:
                arrays = {key: file[key] for key in keys if key in file}
        except Exception as error:  # a broken zip, an object array, anything else that is not plain numbers
            why = str(error).partition(". If you trust")[0].rstrip(".") or type(error).__name__
            raise SplitError(
                f"splits: {name} cannot be read as an .npz file of numbers ({why}). "
                "It should hold idx_train, idx_val and idx_test, and no Python objects."
            ) from error
    missing = [key for key in keys if key not in arrays]
    if "idx_train" in missing or (missing and not isinstance(source, Mapping)):
        raise SplitError(f"splits: {name} has no {', '.join(missing)}.")
    if dataset_len is None:
        integers = [array.max() for array in arrays.values() if array.size and array.dtype.kind in "iu"]
        dataset_len = int(max(integers, default=-1)) + 1
    owner = np.full(max(dataset_len, 0), "", dtype="U9")
    for key, array in arrays.items():
        if array.size == 0:
            arrays[key] = np.zeros(0, dtype=np.int64)
            continue
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"splits: {key} in {name} has shape {array.shape} and type {array.dtype}, not (n,) integers."
            )
        rows = arrays[key] = array.astype(np.int64)
        outside = rows[(rows < 0) | (rows >= dataset_len)]
        if len(outside):
            raise DataError(
                f"splits: {key} in {name} holds {outside[0]}, but the data set has {dataset_len} samples "
                f"(0 to {dataset_len - 1}). Was the split made for other data?"
            )
        values, number = np.unique(rows, return_counts=True)
        taken = owner[values] != ""
        if (number > 1).any() or taken.any():
            at = int(np.flatnonzero((number > 1) | taken)[0])
            where = f"twice in {key}" if number[at] > 1 else f"in {owner[values[at]]} and in {key}"
            raise DataError(f"splits: sample {values[at]} is {where} of {name}. The parts may not overlap.")
        owner[values] = key
    return arrays


def save_splits(
    filename: str | os.PathLike[str],
    train: np.ndarray,
    val: np.ndarray,
    test: np.ndarray,
    digest: Mapping[str, Any] | None = None,
) -> None:
    """Write a split; the file appears complete or not at all, and its folder is made if need be.

    Args:
        filename: The file.
        train: Indices of the training samples; ``val`` and ``test`` likewise.
        val: Likewise.
        test: Likewise.
        digest: Of the data that are divided, see :func:`torchmdnet.data.digest.digest_by_field`.
    """
    told: dict[str, Any] = {} if digest is None else {"data_digest": np.array(json.dumps(digest))}
    with draft_of(filename) as draft, draft.open("wb") as file:
        np.savez(file, idx_train=train, idx_val=val, idx_test=test, **told)


def digest_in(filename: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The digest of the data for which a file of :func:`save_splits` was made; None if it states none."""
    try:
        with np.load(os.path.expanduser(filename), allow_pickle=False) as file:
            return json.loads(str(file["data_digest"])) if "data_digest" in file else None
    except Exception:  # what is wrong with the file is told where its indices are read
        return None


def _counts(total: int, sizes: Mapping[str, Size]) -> list[int]:
    """Sizes as counts."""
    for name, size in sizes.items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, numbers.Real) or math.isnan(size):
            raise SplitError(f"{name}: {size!r} is neither a count, nor a fraction, nor None.")
        if size < 0:
            raise SplitError(f"{name}: {size} is negative.")
        if not isinstance(size, numbers.Integral) and size > 1:
            raise SplitError(
                f"{name}: {size} is more than the whole data set. A number with a point is a fraction; "
                f"write {int(size)} for a count."
            )
        if isinstance(size, numbers.Integral) and size > total:
            raise SplitError(f"{name}: {size} samples are asked for, but the data set has {total}.")
    open_ones = [name for name, size in sizes.items() if size is None]
    if len(open_ones) > 1:
        raise SplitError(f"{' and '.join(open_ones)} are both None, but only one can be the rest.")
    fractions = [
        i for i, size in enumerate(sizes.values()) if size is not None and not isinstance(size, numbers.Integral)
    ]
    counts = [
        0 if s is None else round(total * float(s)) if i in fractions else int(s) for i, s in enumerate(sizes.values())
    ]
    if sum(counts) > total and fractions:
        # one too many, by rounding: the established rule takes it from the first of these
        for i in (2, 1, 0):
            if i in fractions and counts[i] > 0:
                counts[i] -= 1
                break
    if sum(counts) > total:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
        raise SplitError(f"{text} come to {sum(counts)} samples, but the data set has {total}.")
    if open_ones:
        counts[list(sizes).index(open_ones[0])] = total - sum(counts)
    return counts


def _grouped(groups: np.ndarray, sizes: list[int], seed: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole groups in random order; each goes where most samples are still wanted."""
    _, member = np.unique(groups, return_inverse=True)
    member = member.reshape(-1)
    number = np.bincount(member)
    wanted = np.array(sizes, dtype=np.float64)
    target = np.full(len(number), -1)
    shuffled = np.random.default_rng(seed).permutation(len(number))
    for group in shuffled[np.argsort(-number[shuffled], kind="stable")]:  # the large ones first, or they fit nowhere
        part = int(np.argmax(wanted))
        if wanted[part] >= number[group] / 2:  # otherwise it would overfill the part more than it fills it
            target[group] = part
            wanted[part] -= number[group]
    rows = np.random.default_rng(seed).permutation(len(groups))
    train, val, test = (rows[target[member[rows]] == part].astype(np.int64) for part in range(3))
    return train, val, test


def _in_time(trajectories: np.ndarray, sizes: list[int], gap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of each trajectory: first for training, then for validation, then for testing."""
    total = len(trajectories)
    _, member = np.unique(trajectories, return_inverse=True)
    member = member.reshape(-1)
    order = np.argsort(member, kind="stable")
    part = np.full(total, -1)
    done = 0
    for rows in np.split(order, np.cumsum(np.bincount(member))[:-1]):
        # where a part ends, if all trajectories before and this one are cut alike; rounding errors do not add up
        ends = [round((done + len(rows)) * e / total) - round(done * e / total) for e in np.cumsum(sizes).tolist()]
        ends = np.minimum(np.maximum.accumulate(ends), len(rows))
        part[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right")
        for end in ends[:2]:
            if end < len(rows) and end < ends[-1]:
                part[rows[max(0, end - gap) : end]] = -1
        done += len(rows)
    train, val, test = (np.flatnonzero(part == number).astype(np.int64) for number in range(3))
    for name, rows, size in zip(PARTS, (train, val, test), sizes, strict=True):
        if size and not len(rows):
            why = f"the gap of {gap} samples before each cut leaves none" if gap else "the trajectories are too short"
            raise SplitError(
                f"split_by: time: {why} for {name}. Make the part larger, the gap smaller, or divide by file."
            )
    if gap:
        logger.info("%d samples are left out as gaps of %d.", total - len(train) - len(val) - len(test), gap)
    return train, val, test


def _complete(
    given: dict[str, np.ndarray],
    sizes: Mapping[str, Size],
    seed: int | None,
    groups: Sequence[Any] | np.ndarray | None = None,
    gap: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the parts a split does not name from its training part."""
    train = given["idx_train"]
    absent = [part for part in ("val", "test") if f"idx_{part}" not in given]
    if absent:
        wanted: dict[str, Size] = {
            f"{part}_size": (sizes[f"{part}_size"] or 0) if part in absent else 0 for part in ("val", "test")
        }
        within = None if groups is None else np.asarray(groups)[train]
        val, test = wanted["val_size"], wanted["test_size"]
        parts = train_val_test_split(len(train), None, val, test, seed, None, within, gap)
        drawn = dict(zip(PARTS, parts, strict=True))
        for part in absent:
            given[f"idx_{part}"] = train[drawn[part]]
        train = train[drawn["train"]]
    return train, given["idx_val"], given["idx_test"]
