"""What a cutoff costs, what it sees, and which one to start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchmdnet.data.doctor.samples import Samples, draw

__all__ = ["CUTOFFS", "Cost", "measure_cost"]

CUTOFFS = (4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0)  # Å
#: Atoms whose neighbours are counted.
ATOMS = 8_000


@dataclass
class Cost:
    """Edges at several cutoffs, over a draw of samples.

    Args:
        edges: Directed edges per atom at each cutoff.
        apart: Share of samples that fall into parts which do not see each other, at each cutoff.
        alone: Share of atoms without any neighbour, at each cutoff.
        num_samples: Samples looked at.
        num_atoms: Atoms of the whole set.
        suggested: The cutoff to start from, in Å.
        reason: Why.
    """

    edges: dict[float, float] = field(default_factory=dict)
    apart: dict[float, float] = field(default_factory=dict)
    alone: dict[float, float] = field(default_factory=dict)
    num_samples: int = 0
    num_atoms: int = 0
    suggested: float = 5.0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "edges_per_atom": {f"{cutoff:g}": edges for cutoff, edges in self.edges.items()},
            "edges_per_epoch": {f"{cutoff:g}": round(edges * self.num_atoms) for cutoff, edges in self.edges.items()},
            "samples_in_parts": {f"{cutoff:g}": share for cutoff, share in self.apart.items()},
            "atoms_without_neighbours": {f"{cutoff:g}": share for cutoff, share in self.alone.items()},
            "suggested_cutoff": self.suggested,
            "reason": self.reason,
            "samples_looked_at": self.num_samples,
        }


def measure_cost(samples: Samples, scale: float, seed: int = 0) -> Cost:
    """Count edges and connected parts in a draw of samples.

    Args:
        samples: The set.
        scale: Å per unit of length.
        seed: Of the draw.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    counts = np.asarray(samples.frames.counts)
    mean = max(1.0, float(counts.mean()))
    rows = draw(len(samples), max(1, min(1000, int(ATOMS / mean))), seed)
    edges = dict.fromkeys(CUTOFFS, 0)
    apart = dict.fromkeys(CUTOFFS, 0)
    alone = dict.fromkeys(CUTOFFS, 0)
    num_atoms = 0
    for block in samples.blocks(rows, atoms=5_000):
        i, j, vectors = block.pairs(CUTOFFS[-1], scale)
        distance = np.linalg.norm(vectors, axis=1)
        num_atoms += len(block.z)
        for cutoff in CUTOFFS:
            near = distance < cutoff
            edges[cutoff] += 2 * int(near.sum())
            size = len(block.z)
            graph = coo_matrix((np.ones(near.sum(), dtype=np.int8), (i[near], j[near])), shape=(size, size))
            part = connected_components(graph, directed=False)[1]
            kinds = np.unique(np.stack([block.batch, part]), axis=1)[0]
            apart[cutoff] += int((np.bincount(kinds, minlength=len(block)) > 1).sum())
            degree = np.bincount(i[near], minlength=size) + np.bincount(j[near], minlength=size)
            alone[cutoff] += int(((degree == 0) & (block.counts[block.batch] > 1)).sum())
    total = max(1, num_atoms)
    cost = Cost(
        {c: n / total for c, n in edges.items()},
        {c: n / max(1, len(rows)) for c, n in apart.items()},
        {c: n / total for c, n in alone.items()},
        len(rows),
        int(counts.sum()),
    )
    return _suggest(cost)


def _suggest(cost: Cost) -> Cost:
    """5 Å, or the least cutoff that leaves hardly a sample in parts; more than 7 Å is left to long-range terms."""
    for cutoff in (c for c in CUTOFFS if c >= 5.0):
        if cost.apart[cutoff] <= 0.01:
            cost.suggested = cutoff
            cost.reason = (
                "every sample hangs together" if cutoff == 5.0 else f"below it, parts of {cost.apart[5.0]:.0%} of the "
                "samples do not see each other at 5 Å"
            )  # fmt: skip
            break
    else:
        cost.suggested = 6.0
        cost.reason = (
            f"parts of {cost.apart[10.0]:.0%} of the samples are more than 10 Å from each other: no cutoff connects "
            "them, so their interaction needs charges (heads and priors with Coulomb)"
        )
    if cost.suggested > 7.0:
        cost.reason += f"; {cost.suggested:g} Å is dear, 6 Å with a Coulomb or dispersion prior sees the rest"
        cost.suggested = 6.0
    return cost
