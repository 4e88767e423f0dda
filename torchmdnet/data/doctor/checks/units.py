"""Checks of units, against sizes that quantities of matter have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor import units
from torchmdnet.data.doctor.checks.common import sure, where_stated
from torchmdnet.data.doctor.findings import Finding, Repair
from torchmdnet.units import (
    GPA_PER_EV_A3,
    energy_factor,
    force_factor,
    length_factor,
)

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["energy_units", "force_units", "length_units", "stress_units"]


def length_units(d: Diagnosis) -> Iterator[Finding]:
    """Whether distances between atoms are those of the unit that is stated."""
    guess, stated = d.lengths, d.samples.stated_length_unit
    evidence = {"unit": guess.unit, "stated": stated, "certainty": guess.certainty, **guess.numbers}
    if guess.unit is None:
        if stated is None:
            yield Finding("length unit", "note", f"The unit of lengths cannot be told: {guess.evidence}.", evidence)
    elif stated is None:
        yield Finding(
            "length unit", "note", f"Lengths state no unit; they are {sure(guess)} in {guess.unit}: {guess.evidence}.",
            evidence, advice="Pass it to calculators as units=, and choose cutoff_upper in this unit.",
        )  # fmt: skip
    elif guess.unit != stated:
        certain = guess.certainty == "certain"
        factor = length_factor(guess.unit, stated)
        yield Finding(
            "length unit", "error" if certain else "warning",
            f"Lengths are {sure(guess)} in {guess.unit}, not in {stated}{where_stated(d)}: {guess.evidence}.",
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
        text = f"they are {sure(guess)} in {guess.unit}" if guess.unit else "what they are cannot be told"
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
            f"Energies are {sure(guess)} in {guess.unit}, not in {stated}{where_stated(d)}: {guess.evidence}.",
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
            guess += f", where the data are stated to have {d.samples.stated.words}" if where_stated(d) else ""
            guess += "." if guess else ""
            sign = " They also have the opposite sign: these are gradients." if slope.value < 0 else ""
            yield Finding(
                "force units", "error", f"Forces do not go with the energies: {says}.{guess}{sign}", evidence,
                advice=f"State them: energy_unit: {ratio[1]}, forces_unit: {ratio[2]}."
                if ratio and where_stated(d)
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
                f"Forces look like {guess.unit}, not {stated}{where_stated(d)}: {guess.evidence}.",
                {**evidence, "unit": guess.unit, "factor": factor},
                advice=f"Check the file's units; {advice}.",
            )  # fmt: skip


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


def _forces_follow(d: Diagnosis) -> bool:
    """Whether forces can be converted with energies and lengths, because it is known how they go together."""
    return not d.measured.has_forces or d.force_factor is not None
