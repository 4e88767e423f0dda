"""What the checks share: words, repairs, and statistics of energies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.data.doctor import units
from torchmdnet.data.doctor.findings import Repair

if TYPE_CHECKING:
    from torchmdnet.data.doctor.diagnosis import Diagnosis

__all__ = ["DROP", "WORDS", "energy_spread", "many", "sure", "typical", "where_stated"]


DROP = Repair(drop=True)


#: What a quantity of a sample is called by people.
WORDS = {"y": "energy", "neg_dy": "forces", "pos": "positions", "box": "cell", "q": "total charge", "s": "spin"}


def many(number: int, one: str, several: str) -> str:
    """``1 sample has``, ``12 samples have``."""
    return f"{number:,} {one if number == 1 else several}"


def sure(guess: units.Guess) -> str:
    return "certainly" if guess.certainty == "certain" else "probably"


def where_stated(d: Diagnosis) -> str:
    """Which units settings or files state; empty where they state none."""
    return f" as stated ({d.samples.stated.words})" if d.samples.stated.is_given else ""


def energy_spread(d: Diagnosis) -> float:
    """Usual deviation of the energy per atom beyond that of the elements."""
    binding = d.measured.binding
    if binding is None:
        return 0.0
    values = binding / np.maximum(d.measured.counts, 1)
    return float(1.4826 * np.nanmedian(np.abs(values - np.nanmedian(values))))


def typical(d: Diagnosis) -> float:
    """Size of the energies, against which rounding is judged."""
    return 0.0 if d.measured.y is None else float(np.abs(np.nanmedian(d.measured.y)))
