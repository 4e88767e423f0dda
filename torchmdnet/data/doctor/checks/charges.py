"""Checks of charges, dipoles and spins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor.findings import Finding
from torchmdnet.units import (
    BOHR_TO_ANGSTROM,
    DEBYE_TO_E_ANGSTROM,
)

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["charges", "dipoles", "spins"]


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
