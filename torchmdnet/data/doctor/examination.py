"""Every check on a data set."""

from __future__ import annotations

import numpy as np

from torchmdnet.data.doctor.checks import CHECKS
from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.findings import SEVERITIES
from torchmdnet.data.doctor.first_look import UNIT_CHECKS, by_statement, units_by_statement
from torchmdnet.data.doctor.samples import Samples

__all__ = ["examine"]


def examine(samples: Samples) -> Diagnosis:
    """Run every check on a data set."""
    diagnosis = Diagnosis(samples)
    parts = [] if samples.stated.is_given else list(by_statement(samples.dataset, np.arange(len(samples))))
    for name, check in CHECKS.items():
        if len(parts) > 1 and name in UNIT_CHECKS:
            continue  # files that state other units are looked at apart
        diagnosis.findings += check(diagnosis)
    if len(parts) > 1:
        diagnosis.findings += units_by_statement(samples)
    diagnosis.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return diagnosis
