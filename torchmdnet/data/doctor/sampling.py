"""Any data set as samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchmdnet.data.doctor.samples import Samples, Stated
from torchmdnet.data.doctor.survey import Survey
from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.frames import Frames

__all__ = ["samples_of"]


def samples_of(data: Any, class_name: str, name: str, survey: Survey | None = None) -> Samples:
    """Any data set as samples; one without arrays is read sample by sample."""
    frames = getattr(data, "frames", None)
    if frames is None:
        frames = Frames.from_samples(dict(data[i].items()) for i in range(len(data)))
    provenance = {key: getattr(data, key, None) for key in ("level_of_theory", "citation", "licence")}
    return Samples(
        name=name,
        kind=class_name,
        frames=frames,
        dataset=data,
        energy_unit=getattr(data, "energy_unit", None),
        length_unit=getattr(data, "length_unit", None) or ("Å" if getattr(data, "energy_unit", None) else None),
        survey=survey,
        splits=_splits(data),
        reference_energies=getattr(data, "reference_energies", None) or {},
        stated=_stated(data),
        provenance={key: str(value) for key, value in provenance.items() if value},
        keys=dict(getattr(data, "keys", None) or {}) if isinstance(data, ASE) else {},
    )


def _stated(data: Any) -> Stated:
    """The units that samples were converted from, where they are the same for all."""
    kinds = {units for units, _ in getattr(data, "stated_units", ())}
    return Stated(*kinds.pop()) if len(kinds) == 1 else Stated()


def _splits(data: Any) -> dict[str, np.ndarray]:
    parts = getattr(data, "splits", None)
    if not isinstance(parts, Mapping):
        return {}
    return {str(key).removeprefix("idx_"): np.asarray(rows) for key, rows in parts.items()}
