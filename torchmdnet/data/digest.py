"""A short name for the content of a data set, by which changed data are noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from torchmdnet.data.loader import collect

__all__ = ["data_digest"]

#: Systems of a part that are read; of larger parts evenly chosen ones.
MAX_SYSTEMS = 5_000
_BLOCK = 500


def data_digest(dataset: Any, parts: Mapping[str, Any]) -> str:
    """Digest of the systems of each part, in their order, with everything they hold.

    Args:
        dataset: A data set of S systems.
        parts: Name to indices (n,) of its systems. Of a part with more than 5,000 systems evenly chosen ones are read.

    Returns:
        32 hexadecimal digits; the same for the same data in every process and version.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, indices in parts.items():
        rows = np.asarray(indices)
        digest.update(f"{name} {len(rows)} of {len(dataset)}\n".encode())
        if len(rows) > MAX_SYSTEMS:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_SYSTEMS).astype(np.int64)]
        for first in range(0, len(rows), _BLOCK):
            batch: dict[str, Any] = cast(Any, collect(dataset, rows[first : first + _BLOCK])).to_dict()
            for field in sorted(batch):
                value = batch[field]
                if hasattr(value, "numpy"):
                    digest.update(field.encode())
                    digest.update(np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()
