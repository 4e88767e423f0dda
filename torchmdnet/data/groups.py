"""Which samples belong together, so that a division of the data tests on what training has not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torchmdnet.datasets.files import progress
from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.neighbors import pairs_within
from torchmdnet.units import length_factor

__all__ = ["GROUPINGS", "connectivity", "formulas", "groups_of", "steps_between", "trajectories"]

#: Words that ``split_by`` knows; any other is the name of a quantity.
GROUPINGS = ("file", "formula", "connectivity", "time")
#: Two atoms are bonded if they are closer than this times the sum of their covalent radii.
BOND = 1.25
#: Bonds over which the surroundings of an atom are told apart.
REACH = 12
#: Samples looked at in one go.
AT_ONCE = 1024


def groups_of(dataset: Any, by: str) -> np.ndarray:
    """What each sample shares with those it must not be parted from, (n,).

    Args:
        dataset: A data set of ours.
        by: ``file``; ``formula``, the same number of atoms of each element; ``connectivity``, the same molecules by
            their bonds; ``time``, the same trajectory; or the name of a quantity with a value for each sample.

    Raises:
        ConfigError: If the data set does not know it.
    """
    frames = getattr(dataset, "frames", None)
    if by in GROUPINGS and frames is None:
        raise ConfigError(f"split_by: {by!r} needs one of the data sets of this package, not {type(dataset).__name__}.")
    if by in ("formula", "connectivity", "time"):
        unit = getattr(dataset, "length_unit", None)
        if by == "connectivity":
            found = connectivity(frames, 1.0 if unit is None else length_factor(unit))
        else:
            found = formulas(frames) if by == "formula" else trajectories(dataset)
        return found if len(found) == len(dataset) else found[np.asarray(dataset.indices())]
    runs = getattr(dataset, "runs", None)
    if by == "file":
        if runs is None:
            raise ConfigError(f"split_by: {type(dataset).__name__} does not say which file a sample is from.")
        return np.repeat(np.arange(len(runs)), runs)
    values = getattr(dataset, by, None)
    if getattr(dataset, "group_key", None) == by:
        values = getattr(dataset, "groups", None)
    if values is None and frames is not None and by in frames and by not in frames.atom_fields:
        values = frames[by]
    if values is None or callable(values) or len(values) != len(dataset):
        raise ConfigError(
            f"split_by: the data set has no {by!r} with one value for each sample.{did_you_mean(by, GROUPINGS)} "
            f"Choose {', '.join(GROUPINGS)}, or the name of a quantity."
        )
    return np.asarray(values).reshape(len(dataset))


def formulas(frames: Any) -> np.ndarray:
    """A number for each combination of elements, (n,)."""
    counts, _ = frames.composition()
    return np.unique(counts, axis=0, return_inverse=True)[1].reshape(-1)


def connectivity(frames: Any, to_angstrom: float = 1.0) -> np.ndarray:
    """A number for each molecule, whatever the order of its atoms, its conformation and its handedness, (n,).

    Atoms closer than :data:`BOND` times the sum of their covalent radii are bonded. Every atom is described by its
    element and, step by step, by the descriptions of the atoms bonded to it (Weisfeiler and Leman, 1968), up to
    :data:`REACH` bonds away. Molecules that differ have different numbers but for rare cases, which end up in one
    group; a system of several molecules is one combination of them.

    Args:
        frames: The stored systems.
        to_angstrom: Factor that makes their lengths Å.
    """
    from ase.data import covalent_radii

    elements = frames.elements()
    if elements.max() >= len(covalent_radii):
        raise ConfigError(f"split_by: connectivity needs elements, but the data hold type {elements.max()}.")
    cutoff = float(2 * BOND * covalent_radii[elements].max() / to_angstrom)
    codes = np.empty(len(frames), dtype=np.uint64)
    starts = range(0, len(frames), AT_ONCE)
    for first in progress(starts, "Bonds", len(starts), f"{AT_ONCE} systems"):
        rows = np.arange(first, min(first + AT_ONCE, len(frames)))
        found = frames.gather(rows)
        z, pos, batch, box = found["z"].numpy(), found["pos"].double(), found["batch"], found.get("box")
        i, j, shifts = pairs_within(pos, batch, None if box is None else box.double(), len(rows), cutoff)
        vectors = pos[i] - pos[j]
        if shifts is not None and box is not None:
            boxes = box.double().expand(len(rows), 3, 3)[batch[i]]
            vectors = vectors + torch.einsum("pa,pab->pb", shifts.double(), boxes)
        receiver, sender = i.numpy(), j.numpy()
        limit = BOND * (covalent_radii[z[receiver]] + covalent_radii[z[sender]])
        bonded = vectors.norm(dim=1).numpy() * to_angstrom < limit
        receiver, sender = receiver[bonded], sender[bonded]
        label = _mixed(z.astype(np.uint64))
        for _ in range(REACH):
            around = np.zeros_like(label)
            spread = _mixed(label)
            np.add.at(around, receiver, spread[sender])
            np.add.at(around, sender, spread[receiver])
            label = _mixed(label * np.uint64(3) + around)
        total = np.zeros(len(rows), dtype=np.uint64)
        np.add.at(total, batch.numpy(), _mixed(label))
        codes[rows] = total
    return np.unique(codes, return_inverse=True)[1].reshape(-1)


def trajectories(dataset: Any) -> np.ndarray:
    """The trajectory of each sample, (n,): its file, or, where none is known, a row of samples of equal atoms."""
    runs = getattr(dataset, "runs", None)
    if runs is not None:
        return np.repeat(np.arange(len(runs)), runs)
    frames = dataset.frames
    codes = np.empty(len(frames), dtype=np.uint64)
    for first in range(0, len(frames), AT_ONCE):
        rows = np.arange(first, min(first + AT_ONCE, len(frames)))
        found = frames.gather(rows)
        ptr, system = found["ptr"].numpy(), found["batch"].numpy()
        place = np.arange(len(system)) - ptr[system]
        total = np.zeros(len(rows), dtype=np.uint64)
        np.add.at(total, system, _mixed((found["z"].numpy() + 1000 * place).astype(np.uint64)))
        codes[rows] = total
    return np.concatenate([[0], np.cumsum(codes[1:] != codes[:-1])])


def steps_between(frames: Any, number: int = 128) -> tuple[float, float] | None:
    """How far atoms move from one sample to the next, and between samples far apart: root mean squares, medians.

    Only pairs of the same atoms are compared, without a shift of the whole; None where there are too few of them.
    """
    total = len(frames)
    near, far = [], []
    for row in np.random.default_rng(0).permutation(max(total - 1, 0))[:number].tolist():
        here, following = frames.sample(row), frames.sample(row + 1)
        if not torch.equal(here["z"], following["z"]):
            continue
        apart = total // 2
        while apart >= 8:
            other = frames.sample(row + apart if row + apart < total else row - apart)
            if torch.equal(here["z"], other["z"]):
                near.append(_distance(here, following))
                far.append(_distance(here, other))
                break
            apart //= 2
    return (float(np.median(near)), float(np.median(far))) if len(near) >= 24 else None


def _distance(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> float:
    moved = there["pos"].double() - here["pos"].double()
    box = here.get("box")
    if box is not None and bool(box.any(dim=-1).all()):
        inverse = torch.linalg.inv(box[0].double())
        moved = moved - torch.round(moved @ inverse) @ box[0].double()
    return float((moved - moved.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _mixed(values: np.ndarray) -> np.ndarray:
    """Numbers spread over 64 bits (splitmix64, Steele 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
