"""Checks of positions and cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor.checks.common import DROP, energy_spread, many
from torchmdnet.data.doctor.findings import Finding
from torchmdnet.data.doctor.neighbours import SAME
from torchmdnet.data.doctor.samples import APART
from torchmdnet.elements import SYMBOLS

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["cells", "contacts", "positions", "repeated"]


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
            f"{many(len(far), 'sample has', 'samples have')} coordinates up to {largest:.3g} Å; up to "
            f"{FARTHEST_ATOM:g} Å is accepted, beyond which single precision does not resolve bonds.",
            {"largest in Å": largest}, far, "A broken number, or another unit? Repair them or leave them out.", DROP,
        )  # fmt: skip
    apart = np.flatnonzero((m.gap > APART) & (m.farthest <= FARTHEST_ATOM))
    if len(apart):
        apart = apart[np.argsort(-m.gap[apart])]
        yield Finding(
            "positions", "warning",
            f"{many(len(apart), 'sample has', 'samples have')} parts that are up to {m.gap[apart[0]]:.4g} Å apart, "
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
        f"{many(len(flat), 'sample has', 'samples have')} a cell without volume, without bounds, or so flat that an "
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
        f"{many(len(close), 'sample has', 'samples have')} atoms too close to each other; {pair} are "
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
        spread = energy_spread(d)
        slack = 10 * SAME * np.nan_to_num(np.sqrt(d.measured.force_square[rows])) / max(d.scale, 1e-9) + 1e-9
        clash = difference > np.maximum(0.02 * spread * d.measured.counts[rows], slack)
        if clash.any():
            rows_, first_ = rows[clash], first[clash]
            worst = int(difference[clash].argmax())
            yield Finding(
                "contradictions", "error",
                f"{many(int(clash.sum()), 'sample has', 'samples have')} the same structure as another and another "
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
                f"{many(len(rows), 'sample repeats', 'samples repeat')} another one ({share:.1%}) up to rotation, "
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
