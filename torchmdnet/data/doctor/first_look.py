"""A first look at the data of a run, on a few samples: signs and units that would be learnt as they are."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torchmdnet.data.doctor.checks import energies, geometry, labels
from torchmdnet.data.doctor.checks import units as unit_checks
from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.samples import Samples, Stated
from torchmdnet.data.doctor.sampling import samples_of
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.labels import LabelKind

__all__ = ["UNIT_CHECKS", "by_statement", "first_look", "units_by_statement"]

#: Samples and atoms that are looked at, in this many runs of neighbours, so that the work of forces can be told.
SAMPLES, ATOMS, RUNS = 160, 4000, 4
#: Checks of the whole set that a first look at each part replaces, where files state different units.
UNIT_CHECKS = frozenset({"length units", "energy units", "force units", "isolated atoms"})
#: Quantities that are looked at.
NAMES = ("z", "pos", "box", "y", "neg_dy", "stress")


def first_look(dataset: Any, rows: np.ndarray, learnt: frozenset[LabelKind]) -> list[Finding]:
    """What the doctor says of a few samples that would not be noticed in training.

    Args:
        dataset: Any data set with ``frames``.
        rows: Numbers of the samples to choose from.
        learnt: Labels that training asks for.
    """
    found: list[Finding] = []
    for stated, mine in by_statement(dataset, rows):
        chosen = (dataset.frames.sample(int(row)) for row in _chosen(dataset.frames.counts, mine))
        frames = Frames.from_samples({name: sample[name] for name in NAMES if name in sample} for sample in chosen)
        samples = samples_of(dataset, type(dataset).__name__, "", None)
        samples.frames, samples.learnt, samples.splits, samples.stated = frames, learnt, {}, stated
        diagnosis = Diagnosis(samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found += [finding for finding in _found(diagnosis) if finding.severity != "note" or _is_foreign(finding)]
    return list({(finding.check, finding.text): finding for finding in found}.values())


def units_by_statement(samples: Samples) -> list[Finding]:
    """What a first look says of units, for the samples of each statement apart.

    Nothing is repaired by it: factors would hold for some of the samples.
    """
    found = first_look(samples.dataset, np.arange(len(samples)), frozenset({"energy", "forces"}))
    kinds = ("length unit", "energy unit", "force units", "force sign", "isolated atoms")
    return [dataclasses.replace(finding, repair=None) for finding in found if finding.check in kinds]


def by_statement(dataset: Any, rows: np.ndarray) -> Iterator[tuple[Stated, np.ndarray]]:
    """Rows that were converted from the same units, and these units."""
    runs: Sequence[tuple[tuple[str | None, str | None, str | None], int]] = getattr(dataset, "stated_units", ())
    kinds = list(dict.fromkeys(units for units, _ in runs))
    if len(kinds) < 2:
        yield Stated(*kinds[0]) if kinds else Stated(), rows
        return
    kind_of = np.repeat([kinds.index(units) for units, _ in runs], [count for _, count in runs])
    for number, units in enumerate(kinds):
        mine = rows[kind_of[rows] == number]
        if len(mine):
            yield Stated(*units), mine


def _found(d: Diagnosis) -> Iterator[Finding]:
    yield from geometry.positions(d)
    yield from unit_checks.length_units(d)
    if "energy" in d.samples.learnt and (d.samples.stated.is_given or d.samples.dataset.unit_advice("eV") is None):
        yield from unit_checks.energy_units(d)  # of a unit that is not stated, DataModule speaks
        yield from energies.isolated_atoms(d)
    if "forces" in d.samples.learnt and d.measured.has_forces:
        yield from labels.zero_forces(d)
        yield from (f for f in unit_checks.force_units(d) if f.severity == "error" or _is_far(f))
    if "stress" in d.samples.learnt:
        yield from (finding for finding in unit_checks.stress_units(d) if finding.severity == "error")


def _is_far(finding: Finding) -> bool:
    """Whether forces look like another unit, by more than bonds differ in stiffness."""
    factor = finding.evidence.get("factor")
    return isinstance(factor, float) and abs(math.log(factor)) > math.log(3)


def _is_foreign(finding: Finding) -> bool:
    """Whether lengths state no unit, and are not in Å, in which the defaults of cutoffs are."""
    return finding.check == "length unit" and finding.evidence.get("unit") not in (None, "Å")


def _chosen(counts: Any, rows: np.ndarray) -> np.ndarray:
    """Runs of neighbouring samples, evenly over the data."""
    rows = np.sort(rows)
    size = min(SAMPLES // RUNS, -(-len(rows) // RUNS))
    starts = np.linspace(0, max(len(rows) - size, 0), RUNS).astype(np.int64)
    chosen = rows[np.unique(np.concatenate([np.arange(s, s + size) for s in starts]).clip(max=len(rows) - 1))]
    atoms = np.asarray(counts)[chosen]
    most = list(itertools.takewhile(lambda total: total <= ATOMS, np.cumsum(atoms).tolist()))
    return chosen[: max(len(most), 1)]
