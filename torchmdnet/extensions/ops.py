"""Established address of the neighbour search as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmdnet.nn.distance import OptimizedDistance

__all__ = ["get_neighbor_pairs_kernel"]


def get_neighbor_pairs_kernel(
    strategy: str,
    positions: Tensor,
    batch: Tensor,
    box_vectors: Tensor,
    use_periodic: bool,
    cutoff_lower: float,
    cutoff_upper: float,
    max_num_pairs: int,
    loop: bool,
    include_transpose: bool,
    num_cells: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs within a cutoff in arrays of fixed length; :class:`torchmdnet.nn.distance.OptimizedDistance`.

    Args:
        strategy: ``"brute"`` or ``"cell"``; kept for compatibility.
        positions: (N, 3) Å.
        batch: System of each atom, (N,).
        box_vectors: (3, 3) or (S, 3, 3) Å, read if ``use_periodic``.
        use_periodic: Whether there is a box.
        cutoff_lower: Pairs are at least this far apart, in Å; self pairs are exempt.
        cutoff_upper: Pairs are closer than this, in Å.
        max_num_pairs: Length M of the arrays.
        loop: Whether to include each atom paired with itself.
        include_transpose: Whether to list (j, i) beside (i, j).
        num_cells: Kept for compatibility.

    Returns:
        Neighbours (2, M) int64 padded with -1, vectors (M, 3) and distances (M,) padded with 0, and the number of pairs
        found (1,) int32.

    Raises:
        RuntimeError: If there are more than ``max_num_pairs`` pairs.
        ValueError: For an unknown ``strategy``.
    """
    search = OptimizedDistance(
        cutoff_lower,
        cutoff_upper,
        max_num_pairs=max_num_pairs,
        return_vecs=True,
        loop=loop,
        strategy=strategy,
        include_transpose=include_transpose,
        resize_to_fit=False,
    ).to(positions.device)
    neighbors, distances, deltas = search(positions, batch, box_vectors if use_periodic else None)
    found = (neighbors[0] >= 0).sum().to(torch.int32).reshape(1)
    return neighbors, deltas, distances, found
