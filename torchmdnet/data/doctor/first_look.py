"""A first look at the data of a run, on a few samples: signs and units that would be learnt as they are."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from torchmdnet.data.doctor import checks
from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.opening import samples_of
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.labels import LabelKind

__all__ = ["first_look"]

#: Samples and atoms that are looked at, in this many runs of neighbours, so that the work of forces can be told.
SAMPLES, ATOMS, RUNS = 160, 4000, 4
#: Quantities that are looked at.
NAMES = ("z", "pos", "box", "y", "neg_dy", "stress")


def first_look(dataset: Any, rows: np.ndarray, learnt: frozenset[LabelKind]) -> list[Finding]:
    """What the doctor says of a few samples that would not be noticed in training.

    Args:
        dataset: Any data set with ``frames``.
        rows: Numbers of the samples to choose from.
        learnt: Labels that training asks for.
    """
    chosen = (dataset.frames.sample(int(row)) for row in _chosen(dataset.frames.counts, rows))
    frames = Frames.from_samples({name: sample[name] for name in NAMES if name in sample} for sample in chosen)
    samples = samples_of(dataset, type(dataset).__name__, "", None)
    samples.frames, samples.learnt, samples.splits = frames, learnt, {}
    diagnosis = Diagnosis(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [finding for finding in _found(diagnosis) if finding.severity != "note" or _is_foreign(finding)]


def _found(d: Diagnosis) -> Iterator[Finding]:
    yield from checks.positions(d)
    yield from checks.length_units(d)
    if "forces" in d.samples.learnt and d.measured.has_forces:
        yield from checks.zero_forces(d)
        yield from (finding for finding in checks.force_units(d) if finding.severity == "error")
    if "stress" in d.samples.learnt:
        yield from (finding for finding in checks.stress_units(d) if finding.severity == "error")


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
