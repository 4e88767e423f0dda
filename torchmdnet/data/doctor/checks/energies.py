"""Checks of energies: outliers, levels of theory, isolated atoms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor.checks.common import DROP, many, typical, where_stated
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.neighbours import nearest
from torchmdnet.elements import SYMBOLS
from torchmdnet.units import (
    energy_factor,
)

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["isolated_atoms", "levels", "odd_energies"]


#: An energy is far out if it deviates by this multiple of the usual deviation, among this many of its composition.
ENERGY_TIMES, FEW = 15.0, 15


def _deviations(d: Diagnosis) -> tuple[np.ndarray, np.ndarray] | None:
    """Deviation per atom of each energy from its like, and how large it usually is: two arrays (S,)."""
    m = d.measured
    if m.binding is None:
        return None
    value = m.binding / np.maximum(m.counts, 1)
    fine = np.isfinite(value)
    if fine.sum() < 10:
        return None
    middle = np.full(len(value), np.nanmedian(value))
    usual = np.full(len(value), 1.4826 * np.nanmedian(np.abs(value - np.nanmedian(value))))
    number = np.bincount(m.formula[fine], minlength=m.formula.max() + 1)
    order = np.argsort(m.formula[fine], kind="stable")
    rows, ends = np.flatnonzero(fine)[order], np.cumsum(number)
    for kind in np.flatnonzero(number >= FEW):
        mine = rows[ends[kind] - number[kind] : ends[kind]]
        middle[mine] = np.median(value[mine])
        usual[mine] = 1.4826 * np.median(np.abs(value[mine] - middle[mine]))
    return value - middle, usual


def _excuse(d: Diagnosis) -> np.ndarray:
    """How unusual a sample is in other respects, (S,), 1 for a usual one: its forces, and how far its like are away.

    A strained structure has high forces and a high energy, another phase lies apart from the rest; a wrong energy is
    high although everything else is as usual.
    """
    m = d.measured
    marks = m.fingerprint / np.maximum(m.counts, 1)[:, None]
    square = m.force_square / np.maximum(m.counts, 1)
    out = np.ones(len(square))
    fine = np.isfinite(square)
    order = np.argsort(m.formula[fine], kind="stable")
    rows = np.flatnonzero(fine)[order]
    for mine in np.split(rows, np.flatnonzero(np.diff(m.formula[rows])) + 1):
        if len(mine) < 3:
            continue
        out[mine] = square[mine] / max(float(np.median(square[mine])), 1e-12)
        apart = nearest(marks[mine], 2)[0][:, 1]
        out[mine] = np.maximum(out[mine], (apart / max(float(np.median(apart)), 1e-12)) ** 2)
    return np.maximum(out, 1.0)


def odd_energies(d: Diagnosis) -> Iterator[Finding]:
    """Energies far from those of the same composition, or that do not follow from their neighbours' forces."""
    found = _deviations(d)
    odd = np.zeros(0, dtype=np.int64)
    if found is not None:
        deviation, usual = found
        times = np.abs(deviation) / np.maximum(usual, 1e-12) / _excuse(d)
        odd = np.flatnonzero((times > ENERGY_TIMES) & (np.abs(deviation) > 1e-9 * typical(d)))
        if len(odd):
            odd = odd[np.argsort(-times[odd])]
            unit = f"{d.energy_words}/atom" if d.energy_words else "per atom"
            yield Finding(
                "odd energies", "warning",
                f"{many(len(odd), 'energy is', 'energies are')} far from the others of their composition: "
                f"{deviation[odd[0]]:+.4g} {unit} in the worst, where {usual[odd[0]]:.2g} {unit} is usual.",
                {"worst per atom": float(deviation[odd[0]]), "usual": float(usual[odd[0]])}, odd,
                "Not converged, another state, or another level of theory? Compute them again or leave them out.", DROP,
            )  # fmt: skip
    misfits, size = _misfits(d)
    misfits = misfits[~np.isin(misfits, odd)]
    if len(misfits):
        yield Finding(
            "odd energies", "warning",
            f"{many(len(misfits), 'energy does', 'energies do')} not follow from the forces of samples close "
            f"to them: by up to {size:.3g} {d.energy_words}".rstrip() + ".",
            {"count": len(misfits), "largest": size}, misfits,
            "Not converged, another state, or another level of theory? Compute them again or leave them out.", DROP,
        )  # fmt: skip


def _misfits(d: Diagnosis) -> tuple[np.ndarray, float]:
    """Samples at odds with most of their neighbours, by the work between them; and the largest error."""
    work, slope = d.work, d.slope
    nothing = np.zeros(0, dtype=np.int64), 0.0
    if work is None or slope is None or slope.step is None or not slope.is_certain or len(work) < 30:
        return nothing
    near = work.keep(work.step < 0.3)
    if len(near) < 30:
        return nothing
    error = np.abs(near.rise - slope.value * (near.work + near.strain))
    # the error of the trapezoidal rule grows with the step: compare with what pairs of like step have
    order = np.argsort(near.step)
    usual = np.empty(len(near))
    for part in np.array_split(order, max(1, len(near) // 100)):
        usual[part] = 1.4826 * np.median(error[part])
    bad = error > np.maximum(40 * usual, 0.2 * np.median(np.abs(near.rise)))
    ends = np.stack([near.first, near.second], axis=1)
    total = np.bincount(ends.reshape(-1), minlength=len(d.samples))
    found: list[int] = []
    left = bad.copy()
    while left.any():
        count = np.bincount(ends[left].reshape(-1), minlength=len(d.samples))
        share = np.where(total > 0, count / np.maximum(total, 1), 0.0)
        worst = int(np.lexsort((share, count))[-1])
        if count[worst] < 2 or share[worst] < 0.6:
            break
        found.append(worst)
        left &= (ends != worst).all(axis=1)
    return (np.array(found, dtype=np.int64), float(error[bad].max())) if found else nothing


def levels(d: Diagnosis) -> Iterator[Finding]:
    """Energies of one composition on two levels, as from two methods, basis sets or programs."""
    found = _deviations(d)
    if found is None:
        return
    deviation, _ = found
    m = d.measured
    fine = np.isfinite(deviation)
    order = np.lexsort((deviation, m.formula))
    order = order[fine[order]]
    groups = np.split(order, np.flatnonzero(np.diff(m.formula[order])) + 1)
    worst: tuple[float, np.ndarray, float] | None = None
    split = 0
    for rows in groups:
        if len(rows) < FEW:
            continue
        values = deviation[rows]
        least = max(4, len(rows) // 20)
        steps = np.diff(values)[least - 1 : -least + 1]
        if not len(steps):
            continue
        cut = int(steps.argmax()) + least
        within = max(_width(values[:cut]), _width(values[cut:]))
        gap = float(steps.max())
        if (
            gap > 2 * within
            and _are_mixed(m.fingerprint[rows], cut)
            and gap > 1e-6 * abs(float(np.median(m.y[rows] if m.y is not None else 0.0))) / m.counts[rows[0]]
        ):
            split += 1
            if worst is None or gap / max(within, 1e-12) > worst[0]:
                smaller = rows[:cut] if cut <= len(rows) / 2 else rows[cut:]
                worst = (
                    gap / max(within, 1e-12),
                    smaller,
                    float(np.median(values[cut:]) - np.median(values[:cut])) * float(m.counts[rows[0]]),
                )
    if worst is not None:
        _, rows, apart = worst
        files = {d.samples.where(int(i)).rpartition(", frame")[0] for i in rows[:50]} - {""}
        origin = (
            f" The smaller part is from {files.pop()}."
            if len(files) == 1 and d.samples.survey and len(d.samples.survey.files) > 1
            else ""
        )
        yield Finding(
            "levels of theory", "warning",
            f"Energies of one composition lie on two levels, {apart:.4g} {d.energy_words} apart, with none between"
            f" ({split:,} composition{'s' if split > 1 else ''}).{origin}",
            {"apart": apart, "compositions": split}, np.sort(rows),
            "Two methods, basis sets, programs, isomers or electronic states? Do not learn two methods as one.",
        )  # fmt: skip


def _are_mixed(marks: np.ndarray, cut: int) -> bool:
    """Whether structures before and after a cut look alike: then it is not the structure that makes the difference."""
    upper = np.arange(len(marks)) >= cut
    across = float((upper != upper[nearest(marks, 2)[1][:, 1]]).mean())
    by_chance = 2 * upper.mean() * (1 - upper.mean())
    return across > 0.25 * by_chance


def _width(values: np.ndarray) -> float:
    """Distance between the 5th and the 95th percentile."""
    low, high = np.percentile(values, (5, 95))
    return float(high - low)


def isolated_atoms(d: Diagnosis) -> Iterator[Finding]:
    """Whether reference energies of isolated atoms go with the data: binding lowers the energy."""
    known = d.samples.reference_energies or d.samples.isolated
    m = d.measured
    if not known or m.y is None:
        return
    counts, present = m.composition
    absent = [SYMBOLS[z] for z in present.tolist() if z not in known and z < len(SYMBOLS)]
    if absent:
        yield Finding(
            "isolated atoms", "note", f"There is no isolated atom of {', '.join(absent)}.", {"elements": absent},
            advice="atomref: isolated needs one of each element.",
        )  # fmt: skip
        return
    fine = np.isfinite(m.y) & (m.counts > 1)
    if not fine.any():
        return
    binding = (m.y - counts @ np.array([known[z] for z in present.tolist()])) / np.maximum(m.counts, 1)
    middle = float(np.median(binding[fine]))
    unit = d.samples.energy_unit or d.energies.unit or "eV"
    low, high = -20 / energy_factor(unit), 0.5 / energy_factor(unit)
    evidence = {"median binding energy per atom": middle}
    if not low < middle < high:
        yield Finding(
            "isolated atoms", "warning",
            f"Relative to the isolated atoms, samples have {middle:.4g} {unit} per atom; bound matter has about -2 to "
            "-8 eV.",
            evidence,
            advice="Are the atoms of another level of theory, or the energies relative already?"
            + (f" Or is the unit wrong that is stated ({d.samples.stated.words})?" if where_stated(d) else ""),
        )  # fmt: skip
    else:
        yield Finding("isolated atoms", "note", f"Samples are bound by {-middle:.4g} {unit} per atom.", evidence)
