"""Checks of the forces of each sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor import units
from torchmdnet.data.doctor.checks.common import DROP, many
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.units import (
    energy_factor,
    length_factor,
)

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["large_forces", "net_force", "torque"]


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
            f"The {name} does not vanish in {many(len(odd), 'sample', 'samples')} ({relative[odd[0]]:.0%} of the size "
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
            f"{many(len(odd), 'sample has', 'samples have')} forces up to {m.force_max[odd[0]]:.4g}{unit}; the "
            f"largest of a sample is {typical:.3g}{unit} in the median.",
            {"largest": float(m.force_max[odd[0]]), "typical": typical}, odd,
            "A few of them can rule the loss. Unless wanted, leave them out.", DROP,
        )  # fmt: skip
