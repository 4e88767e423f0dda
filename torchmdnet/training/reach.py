"""How far a model looks, beside how large its systems are."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np

from torchmdnet.errors import ConfigError
from torchmdnet.memory import available_memory, expected_edges
from torchmdnet.neighbors import pairs_within

__all__ = ["SYSTEMS", "Reach", "check_reach", "reach_of"]

log = logging.getLogger(__name__)

#: Systems that are looked at, and the reach beside that of the farthest pair from which a basis is mostly unused.
SYSTEMS, TOO_FAR = 50, 2.0
#: Pairs that are looked at.
PAIRS = 1_000_000
#: Bytes that an edge takes in a training step at the least, for each channel: a filter, a message, and their gradients.
NUMBERS_PER_CHANNEL = 4


class Reach(NamedTuple):
    """What lies within the cutoffs."""

    num_systems: int
    neighbors: float  # per atom
    farthest: float  # Å, of two atoms of one system; infinite with a periodic direction


def reach_of(batch: Any, lower: float, upper: float, channels: int) -> Reach | None:
    """Look for the neighbours in some systems.

    Args:
        batch: The systems.
        lower: ``cutoff_lower``, Å.
        upper: ``cutoff_upper``, Å.
        channels: ``embedding_dimension``.

    Returns:
        None where looking would take long.

    Raises:
        ConfigError: If a single system has more edges than memory holds.
    """
    num_systems, pos = len(batch.ptr) - 1, batch.pos.double()
    box = getattr(batch, "box", None)
    box = None if box is None or not bool(box.any()) else box.double().reshape(-1, 3, 3).expand(num_systems, 3, 3)
    counts = (batch.ptr[1:] - batch.ptr[:-1]).tolist()
    volumes = [0.0] * num_systems if box is None else box.det().abs().tolist()
    edges = [expected_edges(n, volume, upper) for n, volume in zip(counts, volumes, strict=True)]
    needed, available = max(edges) * channels * NUMBERS_PER_CHANNEL * 4, available_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"cutoff_upper: {upper:g} Å is too far for periodic cells as small as those of the data: one of "
            f"{counts[edges.index(max(edges))]} atoms has about {max(edges):.3g} neighbours in all, counting images, "
            f"which take {needed / 1e9:,.3g} GB or more, but {available / 1e9:,.3g} GB are available. Set cutoff_upper "
            "to 10 or less."
        )
    num_pairs = np.cumsum([few or n * n for few, n in zip(edges, counts, strict=True)])
    num_systems = max(1, int((num_pairs <= PAIRS).sum()))
    if num_pairs[num_systems - 1] > 100 * PAIRS:
        return None
    num_atoms = int(batch.ptr[num_systems])
    pos, box = pos[:num_atoms], None if box is None else box[:num_systems]
    i, _, _ = pairs_within(pos, batch.batch[:num_atoms], box, num_systems, upper, lower)
    farthest = float("inf")
    if box is None:  # no two atoms are farther apart than the corners of what holds them
        systems = [pos[batch.ptr[k] : batch.ptr[k + 1]] for k in range(num_systems)]
        farthest = max(float((each.amax(0) - each.amin(0)).norm()) for each in systems)
    return Reach(num_systems, 2 * len(i) / num_atoms, farthest)


def check_reach(reach: Reach, lower: float, upper: float) -> None:
    """Warn of cutoffs between which there is nothing, or hardly anything."""
    if not reach.neighbors:
        log.warning(
            "cutoff_upper=%g Å%s: no atom of the first %d training systems has a neighbour there, so the model knows "
            "their elements alone. Set cutoff_upper to 4 to 6 Å; data in other units are converted with dataset_arg.",
            upper, f", cutoff_lower={lower:g} Å" if lower else "", reach.num_systems,
        )  # fmt: skip
    elif upper > TOO_FAR * reach.farthest:
        log.warning(
            "cutoff_upper=%g Å: no two atoms of the first %d training systems are farther apart than %.2g Å, so most "
            "of the radial basis is never used. Set cutoff_upper to %.2g Å or less.",
            upper, reach.num_systems, reach.farthest, max(reach.farthest, 5.0),
        )  # fmt: skip
