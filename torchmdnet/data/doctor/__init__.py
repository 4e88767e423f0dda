"""What is in a data set, and what is wrong with it: the checks behind ``torchmd-net data``.

.. code-block:: python

    from torchmdnet.data.doctor import examine, open_files

    diagnosis = examine(open_files(["water.extxyz"]))
    for finding in diagnosis.findings:
        print(finding.severity, finding.text)
"""

from torchmdnet.data.doctor.diagnosis import Diagnosis
from torchmdnet.data.doctor.examination import examine
from torchmdnet.data.doctor.findings import Finding, Repair
from torchmdnet.data.doctor.opening import open_configured, open_files, open_named
from torchmdnet.data.doctor.samples import Samples

__all__ = ["Diagnosis", "Finding", "Repair", "Samples", "examine", "open_configured", "open_files", "open_named"]
