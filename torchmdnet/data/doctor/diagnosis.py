"""A data set under examination: what is measured once and looked at by several checks."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np

from torchmdnet.data.doctor import units
from torchmdnet.data.doctor.cost import Cost, measure_cost
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.neighbours import Alike, Work, duplicates, fitted_energies, near_pairs, work_between
from torchmdnet.data.doctor.samples import Measured, Samples
from torchmdnet.elements import SYMBOLS
from torchmdnet.units import length_factor

__all__ = ["Diagnosis"]

logger = logging.getLogger(__name__)


class Diagnosis:
    """What was found out about a data set.

    Args:
        samples: The data set.

    Attributes:
        findings: What the checks say, errors first.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.findings: list[Finding] = []

    @cached_property
    def lengths(self) -> units.Guess:
        """The unit of lengths."""
        return units.length_unit(self.samples)

    @cached_property
    def scale(self) -> float:
        """Å per unit of length of what is stored: as it was found to be, else as the data state it."""
        unit = self.lengths.unit or self.samples.stated_length_unit
        return length_factor(unit) / self.samples.stated.length_scale if unit else 1.0

    @cached_property
    def measured(self) -> Measured:
        """Every sample in numbers."""
        return Measured(self.samples, self.scale)

    @cached_property
    def energies(self) -> units.Guess:
        """The unit of energies, with what forces say where energies alone say nothing."""
        guess = units.energy_unit(self.measured)
        slope = self.slope
        if guess.unit is None and slope is not None and slope.is_certain and self.forces.unit:
            ratio = units.unit_ratio(
                self.source_slope(slope), slope.tolerance, self.source_length, force_unit=self.forces.unit
            )
            if ratio is not None and ratio[2] == self.forces.unit:
                guess = units.Guess(
                    "energies", ratio[1], "likely", f"{guess.evidence}; they go with forces in {self.forces.unit}",
                    guess.numbers,
                )  # fmt: skip
        return guess

    @property
    def source_length(self) -> str:
        """Unit of lengths in the source: as it was found to be, else as it is stated."""
        return self.lengths.unit or self.samples.stated_length_unit or "Å"

    def source_slope(self, slope: units.Slope) -> float:
        """Energy over work in the numbers of the source, before a conversion that settings or files ask for."""
        stated = self.samples.stated
        return slope.value * stated.force_scale * stated.length_scale / stated.energy_scale

    def likely_ratio(self, slope: units.Slope) -> tuple[float, str, str] | None:
        """Units of energies and forces between which the slope would be 1, and by what forces are to be multiplied."""
        energy = units.energy_unit(self.measured).unit
        ratio = units.unit_ratio(
            self.source_slope(slope), slope.tolerance, self.source_length, energy, self.forces.unit
        )
        if ratio is None:
            return None
        return ratio[0] * slope.value / self.source_slope(slope), *ratio[1:]

    @cached_property
    def stiffness(self) -> tuple[float, int] | None:
        """Stiffness of bonds to hydrogen."""
        return units.bond_stiffness(self.measured)

    @cached_property
    def forces(self) -> units.Guess:
        """The unit of forces."""
        return units.force_unit(self.measured, self.stiffness)

    @cached_property
    def work(self) -> Work | None:
        """Work between samples that are alike; None without energies and forces."""
        if self.measured.y is None or not self.measured.has_forces:
            return None
        return work_between(self.measured, near_pairs(self.measured))

    @cached_property
    def slope(self) -> units.Slope | None:
        """How energy differences follow from forces."""
        if self.work is None:
            return None
        still = self.work.keep(np.abs(self.work.strain) <= 0.2 * np.abs(self.work.work))
        slope = units.slope_of_pairs(still.rise - still.strain, still.work, still.step)
        if slope is not None and slope.is_certain:
            return slope
        fit = fitted_energies(self.measured)
        by_fit = None if fit is None else units.slope_of_fit(*fit)
        return by_fit if by_fit is not None and by_fit.is_certain else slope

    @cached_property
    def force_factor(self) -> float | None:
        """What forces have to be multiplied by to be minus the slope of the energies; None where that is not known."""
        slope = self.slope
        if slope is None or not slope.is_certain:
            return -1.0 if self.stiffness is not None and self.stiffness[0] < 0 else None
        if slope.agrees:
            return 1.0
        if abs(math.log(abs(slope.value))) < math.log(slope.tolerance):
            return -1.0
        ratio = self.likely_ratio(slope)
        return None if ratio is None or slope.step is None else math.copysign(ratio[0], slope.value)

    @cached_property
    def strain_slope(self) -> units.Slope | None:
        """How energy differences follow from the stress."""
        if self.work is None:
            return None
        strained = self.work.keep(np.abs(self.work.strain) > 0.2 * np.abs(self.work.work))
        return units.slope_of_pairs(strained.rise - strained.work, strained.strain, strained.step)

    @cached_property
    def alike(self) -> Alike:
        """Samples that repeat others."""
        return duplicates(self.measured)

    @cached_property
    def cost(self) -> Cost:
        """Edges at several cutoffs."""
        return measure_cost(self.samples, self.scale)

    # ---------------------------------------------------------------------------------------------- summary

    def count(self, severity: str) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def force_words(self) -> str:
        """Unit of the forces; empty where it is not known."""
        energy, length = self.energy_words, self.length_words
        return f"{energy}/{length}" if energy and length else ""

    @property
    def energy_words(self) -> str:
        """Unit of energies for people: stated, else guessed, else nothing."""
        return self.samples.energy_unit or (self.energies.unit or "")

    @property
    def length_words(self) -> str:
        """Unit of lengths likewise."""
        return self.samples.length_unit or (self.lengths.unit or "")

    def facts(self) -> dict[str, str]:
        """What is in the data set, name and text."""
        samples, measured = self.samples, self.measured
        counts, elements = measured.composition
        atoms = measured.counts
        rows: dict[str, str] = {"samples": f"{len(samples):,}"}
        if samples.survey is not None and samples.survey.num_dropped:
            rows["samples"] += f", and {samples.survey.num_dropped:,} frames that cannot be used"
        rows["atoms"] = f"{int(atoms.sum()):,}; {_range(atoms)} in a sample"
        rows["elements"] = ", ".join(
            f"{symbol} {share:.1%}" if share >= 0.001 else f"{symbol} <0.1%"
            for symbol, share in sorted(
                zip(units.symbols(elements), counts.sum(axis=0) / max(1, atoms.sum()), strict=True), key=lambda p: -p[1]
            )
        )
        rows["compositions"] = self._compositions()
        if measured.is_periodic.any():
            rows["cells"] = f"{int(measured.is_periodic.sum()):,} samples are periodic"
        energy = self.energy_words
        if measured.y is not None and np.isfinite(measured.y).any():
            y = measured.y[np.isfinite(measured.y)]
            rows["energy"] = f"{y.min():.6g} to {y.max():.6g} {energy}".rstrip()
            if measured.binding is not None:
                spread = np.nanstd(measured.binding / np.maximum(atoms, 1))
                unit = f"{energy}/atom" if energy else "per atom"
                rows["energy"] += f"; {spread:.3g} {unit} beyond the elements, standard deviation"
        if measured.has_forces and np.isfinite(measured.force_max).any():
            unit = f" {self.force_words}".rstrip()
            rows["forces"] = (
                f"components {measured.force_rms:.4g} rms, largest norm {np.nanmax(measured.force_max):.4g}{unit}"
            )
        for name, label in (("q", "total charge"), ("s", "unpaired electrons")):
            values = measured.per_system(name)
            if values is not None:
                kinds = Counter(values.tolist()).most_common(6)
                unit = " e" if name == "q" else ""
                rows[label] = ", ".join(f"{value:g}{unit} ({count:,})" for value, count in kinds)
        others = [n for n in samples.frames.fields if n not in ("z", "pos", "y", "neg_dy", "box", "q", "s")]
        if others:
            rows["also"] = ", ".join(others)
        if samples.isolated:
            rows["isolated atoms"] = ", ".join(
                f"{SYMBOLS[z]} {e:.5g} {energy}".rstrip() for z, e in samples.isolated.items()
            )
        if samples.splits:
            rows["split"] = ", ".join(f"{part} {len(rows_):,}" for part, rows_ in samples.splits.items())
        rows |= {name.replace("_", " "): text for name, text in samples.provenance.items()}
        return rows

    def names(self) -> list[tuple[str, str, str, str]]:
        """Quantities of the source: name, taken as, shape, number of frames."""
        taken = {
            "energy": "energy", "forces": "forces", "stress": "stress", "charge": "total charge", "spin": "spin",
            "pos": "positions", "z": "atomic numbers", "y": "energy", "neg_dy": "forces",
        }  # fmt: skip
        used = {
            name.lstrip("-"): (taken.get(kind, kind), name.startswith("-")) for kind, name in self.samples.keys.items()
        }
        survey = self.samples.survey
        if survey is None or not survey.names:
            return [(name, kind, "", "") for name, (kind, _) in used.items()]
        rows = []
        for name, count in sorted(survey.names.items(), key=lambda item: (item[0] not in used, -item[1], item[0])):
            kind, negative = used.get(name, ("", False))
            total = survey.num_frames - len(self.samples.isolated)
            share = "all" if count >= total else f"{count:,} of {total:,}"
            rows.append((name, f"{'minus ' if negative else ''}{kind}" or "–", survey.shapes[name], share))
        return rows

    def guesses(self) -> list[units.Guess]:
        """What units the numbers are in."""
        return [self.lengths, *([self.energies] if self.measured.y is not None else []),
                *([self.forces] if self.measured.has_forces else [])]  # fmt: skip

    def _compositions(self) -> str:
        counts, elements = self.measured.composition
        kinds, number = np.unique(counts, axis=0, return_counts=True)
        order = np.argsort(-number)[:4]
        words = [f"{formula_text(kinds[k], elements)} ({number[k]:,})" for k in order]
        return f"{len(kinds):,}: {', '.join(words)}{', …' if len(kinds) > 4 else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Everything for programs."""
        slope = self.slope
        return {
            "name": self.samples.name,
            "dataset": self.samples.kind,
            "samples": len(self.samples),
            "atoms": int(self.measured.counts.sum()),
            "units": {"energy": self.samples.energy_unit, "length": self.samples.length_unit},
            "facts": self.facts(),
            "names": [dict(zip(("name", "taken_as", "shape", "frames"), row, strict=True)) for row in self.names()],
            "guesses": [
                {"quantity": g.quantity, "unit": g.unit, "certainty": g.certainty, "evidence": g.evidence, **g.numbers}
                for g in self.guesses()
            ],
            "energy_over_work": None if slope is None else {**vars(slope), "certain": slope.is_certain},
            "cost": self.cost.as_dict(),
            "findings": [
                {
                    "check": f.check, "severity": f.severity, "text": f.text, "evidence": dict(f.evidence),
                    "samples": list(f.samples), "places": [self.samples.where(i) for i in f.samples[:20]],
                    "advice": f.advice, "repaired_by_fix": f.repair is not None,
                }
                for f in self.findings
            ],
        }  # fmt: skip


def formula_text(counts: np.ndarray, elements: np.ndarray) -> str:
    """``C2H6O`` in Hill's order."""
    table = {symbol: int(n) for symbol, n in zip(units.symbols(elements), counts, strict=True) if n}
    order = sorted(table, key=lambda s: (s != "C", s != "H", s) if "C" in table else (False, False, s))
    return "".join(f"{symbol}{table[symbol] if table[symbol] > 1 else ''}" for symbol in order)


def _range(values: np.ndarray) -> str:
    low, high = int(values.min(initial=10**9)), int(values.max(initial=0))
    return f"{low}" if low == high else f"{low} to {high}"
