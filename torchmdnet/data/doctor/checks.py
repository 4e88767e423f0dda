"""The checks: each looks at one thing and says what it found.

A check is a function from a :class:`~torchmdnet.data.doctor.diagnosis.Diagnosis` to findings, and is listed in
:data:`CHECKS`. It says "error" where training would stop or learn something wrong, "warning" where a person should
look, and "note" for the rest; thresholds stand beside it as named constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor import units
from torchmdnet.data.doctor.findings import Finding, Repair
from torchmdnet.data.doctor.neighbours import SAME, nearest
from torchmdnet.data.doctor.samples import APART, LARGEST_Z
from torchmdnet.datasets.labels import LabelKind, suggested_names, suggested_option, too_large
from torchmdnet.elements import SYMBOLS
from torchmdnet.units import (
    BOHR_TO_ANGSTROM,
    DEBYE_TO_E_ANGSTROM,
    GPA_PER_EV_A3,
    energy_factor,
    force_factor,
    length_factor,
)

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["CHECKS", "absent_forces", "force_units", "length_units", "positions", "stress_units", "zero_forces"]

DROP = Repair(drop=True)
#: What a quantity of a sample is called by people.
WORDS = {"y": "energy", "neg_dy": "forces", "pos": "positions", "box": "cell", "q": "total charge", "s": "spin"}


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
                "labels", "error", f"{_many(len(fresh), 'sample has', 'samples have')} no {word} (NaN).",
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
                "labels", "error", f"{word} of {_many(len(torn), 'sample', 'samples')} is partly NaN or infinite.",
                {"count": len(torn)}, torn, "Repair them or leave them out.", DROP,
            )  # fmt: skip
    for name in sorted(measured.huge.keys() - {"pos", "box"}):
        rows = measured.rows_of(measured.huge, name)
        largest = measured.largest[name]
        yield Finding(
            "labels", "error", f"{WORDS.get(name, name)} of {_many(len(rows), 'sample', 'samples')}: "
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
            "labels", "warning", f"Every force is exactly zero in {_many(len(open_ones), 'sample', 'samples')}.",
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


# ------------------------------------------------------------------------------------------------------- units


def length_units(d: Diagnosis) -> Iterator[Finding]:
    """Whether distances between atoms are those of the unit that is stated."""
    guess, stated = d.lengths, d.samples.stated_length_unit
    evidence = {"unit": guess.unit, "stated": stated, "certainty": guess.certainty, **guess.numbers}
    if guess.unit is None:
        if stated is None:
            yield Finding("length unit", "note", f"The unit of lengths cannot be told: {guess.evidence}.", evidence)
    elif stated is None:
        yield Finding(
            "length unit", "note", f"Lengths state no unit; they are {_sure(guess)} in {guess.unit}: {guess.evidence}.",
            evidence, advice="Pass it to calculators as units=, and choose cutoff_upper in this unit.",
        )  # fmt: skip
    elif guess.unit != stated:
        certain = guess.certainty == "certain"
        factor = length_factor(guess.unit, stated)
        yield Finding(
            "length unit", "error" if certain else "warning",
            f"Lengths are {_sure(guess)} in {guess.unit}, not in {stated}{_where_stated(d)}: {guess.evidence}.",
            evidence,
            advice=f"State it: length_unit: {guess.unit}. Forces are then per {guess.unit} as well; if they are not, "
            "state forces_unit too.",
            repair=Repair(scale={"pos": factor, "box": factor, "neg_dy": 1 / factor, "stress": factor**-3})
            if certain and _forces_follow(d)
            else None,
        )  # fmt: skip


def energy_units(d: Diagnosis) -> Iterator[Finding]:
    """Whether energies have the size that the stated unit gives them."""
    if d.measured.y is None:
        return
    guess, stated = d.energies, d.samples.stated_energy_unit
    evidence = {"unit": guess.unit, "stated": stated, "certainty": guess.certainty, **guess.numbers}
    if stated is None:
        text = f"they are {_sure(guess)} in {guess.unit}" if guess.unit else "what they are cannot be told"
        yield Finding(
            "energy unit", "note", f"Energies state no unit; {text}: {guess.evidence}.", evidence,
            advice="Pass it to calculators as units=." if guess.unit else "",
        )  # fmt: skip
    elif guess.unit is not None and guess.unit != stated:
        certain = guess.certainty == "certain"
        factor = energy_factor(guess.unit, stated)
        together = d.force_factor in (1.0, -1.0)
        yield Finding(
            "energy unit", "error" if certain else "warning",
            f"Energies are {_sure(guess)} in {guess.unit}, not in {stated}{_where_stated(d)}: {guess.evidence}.",
            evidence, advice=f"State it: energy_unit: {guess.unit}."
            + ("" if together else " It then holds for the forces too, unless forces_unit states theirs."),
            repair=Repair(scale=dict.fromkeys(("y", "neg_dy", "stress"), factor))
            if certain and _forces_follow(d)
            else None,
        )  # fmt: skip


def force_units(d: Diagnosis) -> Iterator[Finding]:
    """Whether forces are minus the slope of the energy, in the same units."""
    if not d.measured.has_forces:
        return
    slope, stiffness = d.slope, d.stiffness
    evidence: dict[str, object] = {}
    if slope is not None:
        evidence |= {"energy over work": slope.value, "explained": slope.explained, "pairs": slope.pairs}
    if stiffness is not None:
        evidence |= {"stiffness of bonds to hydrogen": stiffness[0], "bonds": stiffness[1]}
    if slope is not None and slope.is_certain:
        says = (
            f"energies change by {slope.value:.4g} times the work of the forces ({slope.source}, "
            f"r² {slope.explained:.2f})"
        )
        if slope.agrees:
            yield Finding(
                "force sign", "note", f"Forces have the right sign and go with the energies: {says}.", evidence
            )
        elif d.force_factor == -1.0:
            yield _flipped(says, evidence)
        else:
            ratio = d.likely_ratio(slope)
            guess = f" That is the ratio of energies in {ratio[1]} with forces in {ratio[2]}" if ratio else ""
            guess += f", where the data are stated to have {d.samples.stated.words}" if _where_stated(d) else ""
            guess += "." if guess else ""
            sign = " They also have the opposite sign: these are gradients." if slope.value < 0 else ""
            yield Finding(
                "force units", "error", f"Forces do not go with the energies: {says}.{guess}{sign}", evidence,
                advice=f"State them: energy_unit: {ratio[1]}, forces_unit: {ratio[2]}."
                if ratio and _where_stated(d)
                else "Bring both into one unit: for dataset: ASE state that of the forces, as in forces_unit: eV/Å, "
                "which energy_unit and length_unit then leave alone; otherwise convert one of the two in the file.",
                repair=None if d.force_factor is None else Repair(scale={"neg_dy": d.force_factor}),
            )  # fmt: skip
    elif stiffness is not None and stiffness[0] < 0:
        yield _flipped(f"{stiffness[1]:,} bonds to hydrogen are pushed further when they are long", evidence)
    elif (
        slope is not None
        and slope.step is not None
        and slope.pairs >= 30
        and slope.step < 0.1
        and slope.explained < 0.5
    ):
        yield Finding(
            "force units", "warning",
            f"Forces explain only {max(0.0, slope.explained):.0%} of the energy differences between {slope.source}.",
            evidence, advice="Labels may belong to other frames, or mix levels of theory or electronic states.",
        )  # fmt: skip
    elif stiffness is not None:
        yield Finding(
            "force sign", "note",
            f"Forces have the right sign: {stiffness[1]:,} stretched bonds to hydrogen pull back. Samples are too far "
            "apart, or too uneven, to compare forces with energies.",
            evidence,
        )  # fmt: skip
    else:
        yield Finding(
            "force sign",
            "note",
            "The sign of the forces cannot be told: no two samples are close to each other.",
            evidence,
        )
    guess = d.forces
    stated = d.samples.stated_force_unit
    if stated is None or guess.unit is None:
        return
    factor = force_factor(guess.unit) / force_factor(stated)
    if factor != 1.0:
        slope_says = slope is not None and slope.is_certain
        if not slope_says or d.energies.unit in (None, d.samples.stated_energy_unit):
            energy = units.FORCES[guess.unit][0]
            advice = f"energy_unit: {energy} would convert them"
            if d.samples.stated.is_given:
                advice = f"state forces_unit: {guess.unit}, or energy_unit: {energy} where the energies have it too"
            yield Finding(
                "force units", "warning",
                f"Forces look like {guess.unit}, not {stated}{_where_stated(d)}: {guess.evidence}.",
                {**evidence, "unit": guess.unit, "factor": factor},
                advice=f"Check the file's units; {advice}.",
            )  # fmt: skip


def _where_stated(d: Diagnosis) -> str:
    """Which units settings or files state; empty where they state none."""
    return f" as stated ({d.samples.stated.words})" if d.samples.stated.is_given else ""


def _flipped(says: str, evidence: dict[str, object]) -> Finding:
    return Finding(
        "force sign", "error", f"Forces have the wrong sign: {says}. These are gradients.", evidence,
        advice="In an ASE file write forces_key: '-NAME'; elsewhere multiply them by -1.",
        repair=Repair(scale={"neg_dy": -1.0}),
    )  # fmt: skip


def stress_units(d: Diagnosis) -> Iterator[Finding]:
    """Whether the stress has the sign and the unit that energies at other cells ask for."""
    if "stress" not in d.samples.frames:
        return
    values = np.asarray(d.samples.frames["stress"], dtype=np.float64).reshape(-1, 9)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return
    largest = float(np.abs(values).max())
    slope = d.strain_slope
    evidence: dict[str, object] = {"largest component": largest}
    factors = {"kbar": 10 * GPA_PER_EV_A3, "GPa": GPA_PER_EV_A3, "eV/Å³": 1.0, "times the volume": math.nan}
    if slope is not None and slope.pairs >= 8 and slope.explained > 0.6:
        evidence |= {"energy over strain work": slope.value, "pairs": slope.pairs, "explained": slope.explained}
        says = f"energies change by {slope.value:.4g} times the work of the stress ({slope.source})"
        if slope.value > 0 and abs(math.log(slope.value)) < math.log(1.4):
            yield Finding("stress", "note", f"The stress has the right sign and unit: {says}.", evidence)
            return
        ratio = 1 / abs(slope.value)
        unit = next((name for name, factor in factors.items() if 0.7 < ratio / factor < 1.4), None)
        sign = "the opposite sign (pressure positive) and " if slope.value < 0 else ""
        text = f"The stress has {sign}{f'the unit {unit}' if unit else 'an unknown unit'}: {says}."
        yield Finding(
            "stress", "error" if unit or slope.value < 0 else "warning", text, evidence,
            advice="Here a stress is in eV/Å³, tension positive, as ASE has it.",
            repair=Repair(scale={"stress": math.copysign(1 / factors[unit], slope.value)}) if unit else None,
        )  # fmt: skip
    elif d.samples.energy_unit == "eV" and largest > 3.0:
        yield Finding(
            "stress", "warning",
            f"Stress components reach {largest:.4g} eV/Å³, that is {largest * GPA_PER_EV_A3:,.0f} GPa.", evidence,
            advice="Is it in GPa or kbar, or a virial? Here it is eV/Å³, tension positive.",
        )  # fmt: skip


def _many(number: int, one: str, several: str) -> str:
    """``1 sample has``, ``12 samples have``."""
    return f"{number:,} {one if number == 1 else several}"


def _sure(guess: units.Guess) -> str:
    return "certainly" if guess.certainty == "certain" else "probably"


def _forces_follow(d: Diagnosis) -> bool:
    """Whether forces can be converted with energies and lengths, because it is known how they go together."""
    return not d.measured.has_forces or d.force_factor is not None


# ----------------------------------------------------------------------------------------- forces of each sample

#: Net force over the root of the sum of squares of all forces: that of the set, and that of a single sample.
NET_FORCE, NET_FORCE_OF_SET = 0.1, (0.01, 0.3)
TORQUE, TORQUE_OF_SET = 0.3, (0.05, 0.3)


def net_force(d: Diagnosis) -> Iterator[Finding]:
    """Forces on all atoms together, which vanish without an external field."""
    m = d.measured
    fine = np.isfinite(m.force_square) & (m.counts > 1) & (m.force_square > 0)
    if not fine.any():
        return
    relative = np.zeros(len(m.counts))
    # where forces nearly vanish they are compared with those of the set
    size = np.sqrt(np.maximum(m.force_square[fine], 3 * m.counts[fine] * (0.1 * m.force_rms) ** 2))
    relative[fine] = m.net_force[fine] / size
    yield from _vanishing(d, "net force", relative, fine, NET_FORCE, NET_FORCE_OF_SET)


def torque(d: Diagnosis) -> Iterator[Finding]:
    """Torque on open systems, which vanishes without an external field."""
    m = d.measured
    fine = np.isfinite(m.torque) & (m.counts > 2)
    if not fine.any():
        return
    relative = np.zeros(len(m.counts))
    calm = np.sqrt(m.force_square[fine] / np.maximum(3 * m.counts[fine] * (0.1 * m.force_rms) ** 2, 1e-300))
    relative[fine] = m.torque[fine] * np.minimum(1.0, calm)
    yield from _vanishing(d, "torque", relative, fine, TORQUE, TORQUE_OF_SET)


def _vanishing(
    d: Diagnosis, name: str, relative: np.ndarray, fine: np.ndarray, of_one: float, of_set: tuple[float, float]
) -> Iterator[Finding]:
    middle = float(np.median(relative[fine]))
    evidence = {"median relative size": middle, "largest relative size": float(relative[fine].max())}
    advice = {
        "net force": "Is a field, a fixed atom or a substrate missing from the data? Are columns mixed up?",
        "torque": "Positions and forces may be in different orientations or have their columns mixed up.",
    }[name]
    if middle > of_set[0]:
        severity = "error" if middle > of_set[1] else "warning"
        yield Finding(
            name, severity, f"The {name} is {middle:.1%} of the size of the forces in the median; it should vanish.",
            evidence, advice=advice,
        )  # fmt: skip
        return
    odd = np.flatnonzero(fine & (relative > max(of_one, 10 * middle)))
    if len(odd):
        odd = odd[np.argsort(-relative[odd])]
        yield Finding(
            name, "warning",
            f"The {name} does not vanish in {_many(len(odd), 'sample', 'samples')} ({relative[odd[0]]:.0%} of the size "
            f"of the forces in the worst, {middle:.1e} in the median).", evidence, odd, advice,
        )  # fmt: skip


#: A force is far out if it exceeds the median of the largest forces by this factor, and by this many eV/Å.
FORCE_TIMES, FORCE_LEAST = 15.0, 20.0


def large_forces(d: Diagnosis) -> Iterator[Finding]:
    """Samples with forces far beyond those of the others."""
    m = d.measured
    fine = np.isfinite(m.force_max)
    if fine.sum() < 10:
        return
    typical = float(np.median(m.force_max[fine]))
    unit = d.forces.unit or (f"{d.samples.energy_unit}/{d.samples.length_unit}" if d.samples.energy_unit else "eV/Å")
    energy, length = units.FORCES.get(unit, (d.samples.energy_unit or "eV", d.samples.length_unit or "Å"))
    least = FORCE_LEAST / (energy_factor(energy) / length_factor(length))
    odd = np.flatnonzero(fine & (m.force_max > np.maximum(FORCE_TIMES * typical, least)))
    if len(odd):
        odd = odd[np.argsort(-m.force_max[odd])]
        unit = f" {d.force_words}".rstrip()
        yield Finding(
            "large forces", "warning",
            f"{_many(len(odd), 'sample has', 'samples have')} forces up to {m.force_max[odd[0]]:.4g}{unit}; the "
            f"largest of a sample is {typical:.3g}{unit} in the median.",
            {"largest": float(m.force_max[odd[0]]), "typical": typical}, odd,
            "A few of them can rule the loss. Unless wanted, leave them out.", DROP,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ geometry

#: Distance over the sum of covalent radii below which two atoms are too close, and are a mistake.
TOO_CLOSE, MISTAKE = 0.55, 0.42


#: Coordinates in Å beyond which single precision, in which models compute, does not resolve bonds.
FARTHEST_ATOM = 1e5


def positions(d: Diagnosis) -> Iterator[Finding]:
    """Atoms that are out of the world, or have nothing to do with the others."""
    m = d.measured
    far = np.flatnonzero(m.farthest > FARTHEST_ATOM)
    if len(far):
        far = far[np.argsort(-m.farthest[far])]
        largest = float(m.farthest[far[0]])
        yield Finding(
            "positions", "error",
            f"{_many(len(far), 'sample has', 'samples have')} coordinates up to {largest:.3g} Å; up to "
            f"{FARTHEST_ATOM:g} Å is accepted, beyond which single precision does not resolve bonds.",
            {"largest in Å": largest}, far, "A broken number, or another unit? Repair them or leave them out.", DROP,
        )  # fmt: skip
    apart = np.flatnonzero((m.gap > APART) & (m.farthest <= FARTHEST_ATOM))
    if len(apart):
        apart = apart[np.argsort(-m.gap[apart])]
        yield Finding(
            "positions", "warning",
            f"{_many(len(apart), 'sample has', 'samples have')} parts that are up to {m.gap[apart[0]]:.4g} Å apart, "
            "without a cell.",
            {"gap in Å": float(m.gap[apart[0]])}, apart, "A broken number, or a cell that is not stated?",
        )  # fmt: skip


def cells(d: Diagnosis) -> Iterator[Finding]:
    """Cells without volume, or so flat that training refuses them."""
    flat = np.flatnonzero(d.measured.is_flat)
    if not len(flat):
        return
    rows = np.asarray(d.samples.take(flat[:1]).arrays["box"], dtype=np.float64).reshape(3, 3).tolist()
    yield Finding(
        "cells", "error",
        f"{_many(len(flat), 'sample has', 'samples have')} a cell without volume, without bounds, or so flat that an "
        f"atom has more periodic images in reach than a search looks at, such as {rows}.",
        {"flat": len(flat)}, flat, "Check the unit of the cell; a row of zeros is an open direction.", DROP,
    )  # fmt: skip


def contacts(d: Diagnosis) -> Iterator[Finding]:
    """Atoms closer than chemistry allows."""
    m = d.measured
    close = np.flatnonzero(m.contact < TOO_CLOSE)
    if not len(close):
        return
    close = close[np.argsort(m.contact[close])]
    worst = int(close[0])
    i, j = m.contact_pair[worst].tolist()
    z = d.samples.take([worst]).z
    pair = f"{SYMBOLS[z[i]]}{i} and {SYMBOLS[z[j]]}{j}" if max(z[i], z[j]) < len(SYMBOLS) else f"atoms {i} and {j}"
    fatal = m.contact[worst] < MISTAKE
    mistakes = np.flatnonzero(m.contact < MISTAKE)
    yield Finding(
        "close contacts", "error" if fatal else "warning",
        f"{_many(len(close), 'sample has', 'samples have')} atoms too close to each other; {pair} are "
        f"{m.contact_distance[worst]:.3f} Å apart.",
        {"closest in Å": float(m.contact_distance[worst]), "relative to covalent radii": float(m.contact[worst]),
         "mistakes": len(mistakes)}, close,
        "Leave them out unless collisions are what you want to learn.", DROP if fatal else None,
    )  # fmt: skip


def repeated(d: Diagnosis) -> Iterator[Finding]:
    """Samples that are there twice, also turned, shifted, mirrored or with their atoms in another order."""
    alike = d.alike
    same = alike.is_same
    y = d.measured.y
    if same.any():
        rows, first = alike.sample[same], alike.original[same]
        difference = np.abs(y[rows] - y[first]) if y is not None else np.zeros(len(rows))
        difference = np.where(np.isfinite(difference), difference, 0.0)
        # two hundredths of the spread of energies, and at least ten times what the geometry may differ by
        spread = _spread(d)
        slack = 10 * SAME * np.nan_to_num(np.sqrt(d.measured.force_square[rows])) / max(d.scale, 1e-9) + 1e-9
        clash = difference > np.maximum(0.02 * spread * d.measured.counts[rows], slack)
        if clash.any():
            rows_, first_ = rows[clash], first[clash]
            worst = int(difference[clash].argmax())
            yield Finding(
                "contradictions", "error",
                f"{_many(int(clash.sum()), 'sample has', 'samples have')} the same structure as another and another "
                f"energy, by up to {difference[clash].max():.4g} {d.energy_words}".rstrip()
                + f" ({d.samples.where(int(first_[worst]))} and {d.samples.where(int(rows_[worst]))}).",
                {"count": int(clash.sum()), "largest difference": float(difference.max()),
                 "pairs": np.stack([first_, rows_], axis=1)[:100].tolist()}, rows_,
                "Another charge, spin, level of theory or state? Give those to the model, or keep one of each.",
            )  # fmt: skip
        rows, first = rows[~clash], first[~clash]
        if len(rows):
            share = len(rows) / len(d.samples)
            yield Finding(
                "duplicates", "warning",
                f"{_many(len(rows), 'sample repeats', 'samples repeat')} another one ({share:.1%}) up to rotation, "
                "reflection and the order of atoms.",
                {"count": len(rows), "pairs": np.stack([first, rows], axis=1)[:100].tolist()}, rows,
                "They weigh twice, and end up in training and test alike. Keep one of each.", DROP,
            )  # fmt: skip
    almost = ~same
    if almost.sum() > 0.05 * len(d.samples):
        yield Finding(
            "near-duplicates", "note",
            f"{almost.sum():,} samples ({almost.sum() / len(d.samples):.0%}) differ "
            "from another one by less than 0.02 Å in every distance.",
            {"count": int(almost.sum())}, alike.sample[almost],
            "Frames of a trajectory taken too often? Thin them out (index: '::10'), and split by time, not at random.",
        )  # fmt: skip
    yield from _leaks(d)


def _leaks(d: Diagnosis) -> Iterator[Finding]:
    """Duplicates across the parts of the split."""
    part = np.full(len(d.samples), -1)
    names = list(d.samples.splits)
    for number, name in enumerate(names):
        part[d.samples.splits[name]] = number
    alike = d.alike
    if len(names) < 2 or not len(alike.sample):
        return
    a, b = part[alike.sample], part[alike.original]
    crossing = (a != b) & (a >= 0) & (b >= 0)
    same = crossing & alike.is_same
    if crossing.any():
        kinds = sorted(
            {f"{names[min(p, q)]}/{names[max(p, q)]}" for p, q in zip(a[crossing], b[crossing], strict=True)}
        )
        yield Finding(
            "split", "warning" if same.any() else "note",
            f"{same.sum():,} samples are in two parts of the split ({', '.join(kinds)}), {crossing.sum():,} with those "
            "that differ by less than 0.02 Å.",
            {"same": int(same.sum()), "almost": int(crossing.sum())}, alike.sample[crossing],
            "Errors on the test set are then too good. Divide by molecule or by time.",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ energies

#: An energy is far out if it deviates by this multiple of the usual deviation, among this many of its composition.
ENERGY_TIMES, FEW = 15.0, 15


def _spread(d: Diagnosis) -> float:
    """Usual deviation of the energy per atom beyond that of the elements."""
    binding = d.measured.binding
    if binding is None:
        return 0.0
    values = binding / np.maximum(d.measured.counts, 1)
    return float(1.4826 * np.nanmedian(np.abs(values - np.nanmedian(values))))


def _typical(d: Diagnosis) -> float:
    """Size of the energies, against which rounding is judged."""
    return 0.0 if d.measured.y is None else float(np.abs(np.nanmedian(d.measured.y)))


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
        odd = np.flatnonzero((times > ENERGY_TIMES) & (np.abs(deviation) > 1e-9 * _typical(d)))
        if len(odd):
            odd = odd[np.argsort(-times[odd])]
            unit = f"{d.energy_words}/atom" if d.energy_words else "per atom"
            yield Finding(
                "odd energies", "warning",
                f"{_many(len(odd), 'energy is', 'energies are')} far from the others of their composition: "
                f"{deviation[odd[0]]:+.4g} {unit} in the worst, where {usual[odd[0]]:.2g} {unit} is usual.",
                {"worst per atom": float(deviation[odd[0]]), "usual": float(usual[odd[0]])}, odd,
                "Not converged, another state, or another level of theory? Compute them again or leave them out.", DROP,
            )  # fmt: skip
    misfits, size = _misfits(d)
    misfits = misfits[~np.isin(misfits, odd)]
    if len(misfits):
        yield Finding(
            "odd energies", "warning",
            f"{_many(len(misfits), 'energy does', 'energies do')} not follow from the forces of samples close "
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
            + (f" Or is the unit wrong that is stated ({d.samples.stated.words})?" if _where_stated(d) else ""),
        )  # fmt: skip
    else:
        yield Finding("isolated atoms", "note", f"Samples are bound by {-middle:.4g} {unit} per atom.", evidence)


# -------------------------------------------------------------------------------------------- charges and dipoles


#: Dipoles over those of the charges in e·Å, and what that would mean.
DIPOLE_UNITS = {
    1 / DEBYE_TO_E_ANGSTROM: "probably Debye",
    1 / BOHR_TO_ANGSTROM: "probably e·Bohr",
    BOHR_TO_ANGSTROM: "perhaps converted from Bohr to Å once too often",
}


def charges(d: Diagnosis) -> Iterator[Finding]:
    """Whether partial charges add up to the total charge."""
    sums, total = d.measured.charge_sum, d.measured.per_system("q")
    fine = np.isfinite(sums)
    if not fine.any():
        return
    if total is None:
        total = np.round(sums)
        what = "a whole number"
    else:
        what = "the total charge"
    off = np.where(fine, np.abs(sums - total), 0.0)
    odd = np.flatnonzero(off > 0.05)
    if len(odd):
        odd = odd[np.argsort(-off[odd])]
        yield Finding(
            "charges", "warning",
            f"Partial charges of {len(odd):,} samples do not add up to {what}; the worst is off by {off.max():.3g} e.",
            {"largest": float(off.max()), "count": len(odd)}, odd,
            "Is the total charge missing from the data, or are these charges of another kind?",
        )  # fmt: skip


def dipoles(d: Diagnosis) -> Iterator[Finding]:
    """The unit of dipoles, from those that partial charges make."""
    frames = d.samples.frames
    name = next((n for n in ("dipole", "dp") if n in frames and n not in frames.atom_fields), None)
    charge = next((n for n in ("partial_charges", "charges", "pq") if n in frames), None)
    if name is None or charge is None:
        return
    given, made = [], []
    for block in d.samples.blocks(np.arange(min(len(d.samples), 2000))):
        dipole, q = block.get(name), block.get(charge)
        assert dipole is not None
        assert q is not None
        q = q.reshape(-1)
        neutral = np.abs(block.sum(q)) < 0.05
        given.append(dipole.reshape(-1, 3)[neutral])
        made.append(block.sum(q[:, None] * block.pos * d.scale)[neutral])
    x, y = np.concatenate(made).reshape(-1), np.concatenate(given).reshape(-1)
    fine = np.isfinite(x) & np.isfinite(y)
    x, y = x[fine], y[fine]
    if len(x) < 30 or not x.std() or not y.std():
        return
    correlation = float(np.corrcoef(x, y)[0, 1])
    slope = float((x * y).sum() / (x * x).sum())
    evidence = {"dipole over that of the charges": slope, "correlation": correlation}
    if abs(correlation) < 0.7:
        return
    if correlation < 0:
        yield Finding(
            "dipoles", "warning",
            "Dipoles point against those of the partial charges: one of the two has the wrong sign.",
            evidence, advice="A dipole points from negative to positive charge.",
        )  # fmt: skip
    else:
        unit = next((words for factor, words in DIPOLE_UNITS.items() if 0.74 < slope / factor < 1.4), None)
        text = f"Dipoles are {slope:.3g} times those of the partial charges in e·Å"
        if 0.65 < slope < 1.42:
            yield Finding("dipoles", "note", f"{text}.", evidence)
        else:
            text += f": {unit}" if unit else ", which is no usual unit"
            yield Finding("dipoles", "warning", f"{text}.", evidence, advice="Here a dipole is in e·Å.")


def spins(d: Diagnosis) -> Iterator[Finding]:
    """Whether charge and spin go with the number of electrons, and whether a model has to know them."""
    m = d.measured
    total, unpaired = m.per_system("q"), m.per_system("s")
    counts, present = m.composition
    if unpaired is not None and not m.is_periodic.all():
        electrons = counts @ present - (np.nan_to_num(total) if total is not None else 0.0)
        odd = np.flatnonzero(((np.round(electrons) - unpaired) % 2 != 0) & ~m.is_periodic & np.isfinite(unpaired))
        if len(odd):
            yield Finding(
                "charge and spin", "warning",
                f"In {len(odd):,} samples the unpaired electrons do not go with the number of electrons.",
                {"count": len(odd)}, odd,
                "Is the total charge missing, or the spin counted otherwise (spin_convention)?",
            )  # fmt: skip
    if m.y is None or (total is None and unpaired is None):
        return
    kinds = np.unique(counts, axis=0, return_inverse=True)[1].reshape(-1)
    for name, option, values in (("total charge", "charge", total), ("spin", "spin", unpaired)):
        if values is None:
            continue
        pairs = np.unique(np.stack([kinds, np.nan_to_num(values)], axis=1), axis=0)[:, 0]
        several = int((np.bincount(pairs.astype(np.int64)) > 1).sum())
        if several:
            yield Finding(
                "charge and spin", "note", f"The same composition occurs with several values of the {name} "
                f"({several:,} composition{'s' if several > 1 else ''}).", {"compositions": several},
                advice=f"Let the model know it: {option}: true.",
            )  # fmt: skip


def cutoff(d: Diagnosis) -> Iterator[Finding]:
    """Which cutoff to start from."""
    cost = d.cost
    yield Finding(
        "cutoff", "note",
        f"cutoff_upper: {cost.suggested:g} is a good start ({cost.edges[cost.suggested]:.0f} edges per atom): "
        f"{cost.reason}.",
        {"cutoff": cost.suggested, "edges per atom": cost.edges[cost.suggested]},
    )  # fmt: skip


#: Name of each check and the function that makes it, in the order of the report.
CHECKS: dict[str, Callable[[Diagnosis], Iterable[Finding]]] = {
    "readable": readable,
    "labels": labels,
    "elements": elements,
    "length units": length_units,
    "energy units": energy_units,
    "force units": force_units,
    "stress": stress_units,
    "net force": net_force,
    "torque": torque,
    "large forces": large_forces,
    "positions": positions,
    "cells": cells,
    "close contacts": contacts,
    "duplicates": repeated,
    "odd energies": odd_energies,
    "levels of theory": levels,
    "isolated atoms": isolated_atoms,
    "charges": charges,
    "dipoles": dipoles,
    "charge and spin": spins,
    "cutoff": cutoff,
}
