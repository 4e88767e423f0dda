"""Checks of what a reader takes from the files: frames, labels, elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor.checks.common import DROP, WORDS, many
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.samples import LARGEST_Z
from torchmdnet.datasets.labels import LabelKind, suggested_names, suggested_option, too_large
from torchmdnet.elements import SYMBOLS

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["absent_forces", "elements", "labels", "readable", "zero_forces"]


def readable(d: Diagnosis) -> Iterator[Finding]:
    """Everything that a reader would refuse: frames without usable positions, labels that are absent or no numbers."""
    survey = d.samples.survey
    if survey is None:
        return
    for kind in dict.fromkeys(fault.kind for fault in survey.faults):
        faults = [fault for fault in survey.faults if fault.kind == kind]
        more = f" {len(faults) - 1:,} more like it." if len(faults) > 1 else ""
        samples = [fault.sample for fault in faults if fault.sample is not None]
        evidence = {"count": len(faults), "messages": [fault.text for fault in faults[:20]]}
        drop = DROP if kind in ("energy", "forces") or not samples else None
        if kind == "frame":
            drop = DROP  # it is not among the samples any more
        if kind in ("refused", "spin", "file"):
            drop = None
        advice = "Training stops here." + (" The rest of the file was not looked at." if kind == "file" else "")
        yield Finding("readable", "error", faults[0].text + more, evidence, samples, advice, drop)


def labels(d: Diagnosis) -> Iterator[Finding]:
    """Labels that are missing altogether or in some samples, and numbers that are not finite."""
    measured, frames = d.measured, d.samples.frames
    unread = list(_unread_labels(d))
    if "y" not in frames and "neg_dy" not in frames and not any(finding.severity == "error" for finding in unread):
        yield Finding(
            "labels", "error", "There are neither energies nor forces to learn.", {"fields": list(frames.fields)},
            advice="Name them: energy_key and forces_key of dataset: ASE, or energy_files and force_files of Custom.",
        )  # fmt: skip
    yield from unread
    noted = {i for fault in (d.samples.survey.faults if d.samples.survey else ()) if (i := fault.sample) is not None}
    for name in sorted({*measured.missing, *measured.broken}):
        needed = name in ("y", "neg_dy", "pos", "box")
        word = WORDS.get(name, name)
        gone = measured.rows_of(measured.missing, name)
        torn = measured.rows_of(measured.broken, name)
        fresh = np.array(sorted(set(gone.tolist()) - noted), dtype=np.int64)
        if needed and len(fresh):
            yield Finding(
                "labels", "error", f"{many(len(fresh), 'sample has', 'samples have')} no {word} (NaN).",
                {"count": len(fresh)}, fresh, "Repair them or leave them out.", DROP,
            )  # fmt: skip
        elif not needed and len(gone) == len(d.samples):
            yield Finding("labels", "note", f"No sample has a {word}.", {"count": len(gone)})
        elif not needed and len(gone):
            yield Finding(
                "labels", "note", f"{len(gone):,} of {len(d.samples):,} samples have no {word}; its loss skips them.",
                {"count": len(gone)}, gone,
            )  # fmt: skip
        if len(torn):
            yield Finding(
                "labels", "error", f"{word} of {many(len(torn), 'sample', 'samples')} is partly NaN or infinite.",
                {"count": len(torn)}, torn, "Repair them or leave them out.", DROP,
            )  # fmt: skip
    for name in sorted(measured.huge.keys() - {"pos", "box"}):
        rows = measured.rows_of(measured.huge, name)
        largest = measured.largest[name]
        yield Finding(
            "labels", "error", f"{WORDS.get(name, name)} of {many(len(rows), 'sample', 'samples')}: "
            + too_large(largest).partition(". ")[0] + ".",
            {"count": len(rows), "largest": largest}, rows, "Check the units and the calculation.", DROP,
        )  # fmt: skip
    yield from absent_forces(d)
    yield from zero_forces(d)
    if measured.y is not None:
        y = measured.y[np.isfinite(measured.y)]
        alike = np.ptp(measured.fingerprint, axis=0).max(initial=0.0) < 1e-6
        if len(y) > 2 and y.min() == y.max() and not alike:
            yield Finding(
                "labels", "error", f"Every energy is {y[0]:g}, although the structures differ.",
                {"energy": float(y[0])},
                advice="The energies are lost: read another name, or write the file again.",
            )  # fmt: skip


def absent_forces(d: Diagnosis) -> Iterator[Finding]:
    """Forces that are not there; a note of published sets, which have what they have."""
    is_ignored = "forces" in getattr(d.samples.dataset, "_ignored", ())
    if d.measured.has_forces or "y" not in d.samples.frames or is_ignored:
        return
    is_own = d.samples.kind in ("ASE", "HDF5", "Custom") or "forces" in d.samples.learnt
    yield Finding(
        "labels", "warning" if is_own else "note", "There are no forces, only energies are learnt.", {},
        advice="Train with derivative: false or neg_dy_weight: 0, or name the forces.",
    )  # fmt: skip


def zero_forces(d: Diagnosis) -> Iterator[Finding]:
    """Forces that are exactly zero, as if they had not been computed."""
    m = d.measured
    if not m.has_forces:
        return
    several = (m.counts > 1) & np.isfinite(m.force_max)
    zero = several & (m.force_max == 0)
    if not zero.any():
        return
    rows = np.flatnonzero(zero)
    whole = bool(zero[several].all()) and len(rows) > 2
    open_ones = rows[~m.is_periodic[rows]]
    if whole:
        yield Finding(
            "labels", "error" if len(open_ones) else "warning",
            f"Every force is zero, in all {len(rows):,} samples of more than one atom.", {"count": len(rows)}, rows,
            "Forces were not computed, or not written. Train with neg_dy_weight: 0, or without them "
            "(for dataset: ASE, forces_key: false)."
            + ("" if len(open_ones) else " In crystals symmetry may make them so."),
        )  # fmt: skip
    elif len(open_ones):
        yield Finding(
            "labels", "warning", f"Every force is exactly zero in {many(len(open_ones), 'sample', 'samples')}.",
            {"count": len(open_ones)}, open_ones, "Were they computed? Leave the samples out if not.", DROP,
        )  # fmt: skip


def _unread_labels(d: Diagnosis) -> Iterator[Finding]:
    """Quantities that may be labels, but are not read as such, and what the reader says about names."""
    quantities = getattr(d.samples.dataset, "quantities", {})
    survey = d.samples.survey
    is_refused = survey is not None and any(fault.kind == "refused" for fault in survey.faults)  # then it is a finding
    kinds: tuple[tuple[LabelKind, str], ...] = (("energy", "y"), ("forces", "neg_dy"), ("stress", "stress"))
    weights = {"energy": "y_weight", "forces": "neg_dy_weight"}
    for kind, field in kinds:
        if field in d.samples.frames:
            continue
        names = suggested_names(kind, quantities)
        dataset = d.samples.dataset
        absence = dataset.absent_label(kind) if kind in d.samples.learnt and hasattr(dataset, "absent_label") else None
        if absence is not None and absence.is_mistake:
            text = absence.reason[:1].upper() + absence.reason[1:]
            if not is_refused:
                yield Finding(
                    "labels",
                    "error",
                    text,
                    {"names": names},
                    advice=f"Training stops here, unless {weights[kind]}: 0 is set.",
                )
        elif names:
            yield Finding(
                "labels", "warning", f"No {kind} is read, although there is {', '.join(map(repr, names))}.",
                {"names": names},
                advice=f"Name it: dataset_arg: {{{suggested_option(kind, names[0])}}}.",
            )  # fmt: skip
    for text in getattr(d.samples.dataset, "warnings", ()):
        yield Finding("labels", "warning", text, {})


def elements(d: Diagnosis) -> Iterator[Finding]:
    """Atomic numbers that are none, and elements too rare to be learnt."""
    counts, present = d.measured.composition
    strange = [z for z in present.tolist() if not 0 < z <= LARGEST_Z]
    if strange:
        column = np.isin(present, strange)
        rows = np.flatnonzero(counts[:, column].any(axis=1))
        yield Finding(
            "elements", "warning", f"Atomic numbers {', '.join(map(str, strange))} are no elements.",
            {"atomic numbers": strange}, rows, "Types of beads are fine; then max_z has to be larger than the largest.",
        )  # fmt: skip
    holding = (counts > 0).sum(axis=0)
    few = (holding < 10) & (holding < 0.01 * len(d.samples)) & ~np.isin(present, strange)
    if few.any():
        words = ", ".join(f"{SYMBOLS[z]} ({n})" for z, n in zip(present[few].tolist(), holding[few], strict=True))
        yield Finding(
            "elements", "note", f"Elements in fewer than ten samples: {words}.", {"elements": words},
            np.flatnonzero((counts[:, few] > 0).any(axis=1)), "Too few to learn an element from.",
        )  # fmt: skip
    if "y" in d.samples.frames and len(counts) > 1 and not d.samples.reference_energies and not d.samples.isolated:
        rank = np.linalg.matrix_rank(np.unique(counts, axis=0).astype(np.float64))
        if rank < len(present):
            yield Finding(
                "elements", "note",
                f"{len(present)} elements in {rank} independent composition{'s' if rank > 1 else ''}: energies of the "
                "elements are not determined by the data.",
                {"rank": int(rank), "elements": len(present)},
                advice="remove_ref_energy and Atomref then share the energy out; it fits these compositions only.",
            )  # fmt: skip
