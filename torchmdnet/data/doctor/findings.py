"""What a check says: one fact, how bad it is, the numbers it rests on, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

__all__ = ["SEVERITIES", "Finding", "Repair", "Severity"]

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Repair:
    """What ``--fix`` does about a finding: leave the samples out, or multiply quantities by a number.

    Args:
        drop: Whether the samples of the finding are left out.
        scale: Factor of each quantity that is stored in the wrong unit or with the wrong sign.
    """

    drop: bool = False
    scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Args:
        check: Name of the check.
        severity: ``error``: training on it would go wrong. ``warning``: look at it. ``note``: good to know.
        text: What was found, in one sentence.
        evidence: The numbers it rests on, by name.
        samples: Numbers of the samples it concerns; empty where it concerns the whole set.
        advice: What to do.
        repair: What ``--fix`` does; None where that is for a person to decide.
    """

    check: str
    severity: Severity
    text: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[int] | np.ndarray = ()
    advice: str = ""
    repair: Repair | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", [int(sample) for sample in self.samples])
