"""The neighbour list as a module, with its established arguments."""

import torch
from torch import Tensor, nn

from torchmdnet.graph import as_boxes, count_systems, edges_within
from torchmdnet.neighbors.sound import check_finite
from torchmdnet.scripting import padded, scriptable_distance
from torchmdnet.tracing import is_abstract
from torchmdnet.typing import Boxes, EdgeIndex, EdgeScalars, EdgeVectors, Positions, SystemIndex

__all__ = ["OptimizedDistance"]

STRATEGIES = ("brute", "cell")
TOO_MANY = "Found num_pairs > max_num_pairs, please increase max_num_pairs"


class OptimizedDistance(nn.Module):
    """Pairs of atoms within a cutoff, with distances and vectors differentiable to any order.

    Any lattice, any mix of open and periodic directions (a zero row of the box is an open one), every image within
    the cutoff.

    Args:
        cutoff_lower: Pairs are at least this far apart, in Å; self pairs are exempt.
        cutoff_upper: Pairs are closer than this, in Å.
        max_num_pairs: Capacity for the whole batch; a negative value is a capacity per atom. Finding more is an error.
        return_vecs: Whether to return the vectors too.
        loop: Whether to include each atom paired with itself, at distance zero.
        strategy: ``"brute"`` or ``"cell"``; kept for compatibility, the quicker search is picked by itself.
        include_transpose: Whether to list (j, i) beside (i, j); without it only pairs with i > j, or i = j, are listed.
        resize_to_fit: Whether to return just the pairs found. Otherwise the arrays have the length of the capacity,
            padded with index -1, distance 0 and vector 0.
        box: Lattice vectors as rows, (3, 3) or (S, 3, 3) Å, used when ``forward`` is not given any.
        long_edge_index: Kept for compatibility; indices are int64.

    Raises:
        ValueError: For an unknown ``strategy``.
    """

    box: Tensor

    def __init__(
        self,
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 5.0,
        max_num_pairs: int = -32,
        return_vecs: bool = False,
        loop: bool = False,
        strategy: str = "brute",
        include_transpose: bool = True,
        resize_to_fit: bool = True,
        box: Tensor | None = None,
        long_edge_index: bool = True,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: {strategy!r} is not available. Choose from {', '.join(STRATEGIES)}.")
        self.cutoff_lower = float(cutoff_lower)
        self.cutoff_upper = float(cutoff_upper)
        self.max_num_pairs = max_num_pairs
        self.return_vecs = return_vecs
        self.loop = loop
        self.strategy = strategy
        self.include_transpose = include_transpose
        self.resize_to_fit = resize_to_fit
        self.long_edge_index = long_edge_index
        self._looked_at: tuple[Tensor | None, int, bool] = (None, 0, False)
        self.register_buffer("box", torch.zeros(3, 3) if box is None else torch.as_tensor(box).clone())

    @property
    def stored_box(self) -> Tensor | None:
        """The box given at construction or read from a checkpoint; None when it is all zeros."""
        box = self.box
        if is_abstract():
            return box  # zero rows are open directions
        if box.is_inference():
            return box if bool(box.any()) else None
        seen, version, is_box = self._looked_at
        if seen is not box or version != box._version:  # looking waits for the device
            is_box = bool(box.any())
            self._looked_at = (box, box._version, is_box)
        return box if is_box else None

    def forward(
        self, pos: Positions, batch: SystemIndex | None = None, box: Boxes | None = None
    ) -> tuple[EdgeIndex, EdgeScalars, EdgeVectors | None]:
        """Find the pairs.

        Args:
            pos: Positions in Å, (N, 3).
            batch: System of each atom, (N,); None is one system.
            box: Lattice vectors, (3, 3) or (S, 3, 3) Å; overrides the one given at construction.

        Returns:
            ``edge_index`` (2, E), ``edge_weight`` (E,) Å and ``edge_vec`` = pos[i] - pos[j] (E, 3) Å, or None without
            ``return_vecs``.

        Raises:
            RuntimeError: If more pairs are found than ``max_num_pairs`` allows.
            ValueError: If the shape of ``box`` does not fit.
        """
        if pos.dtype in (torch.float16, torch.bfloat16):
            raise RuntimeError(
                f"Unsupported dtype for the neighbour list: {pos.dtype}. Pass float32 or float64 positions."
            )
        num_atoms = pos.shape[0]
        batch = torch.zeros(num_atoms, dtype=torch.long, device=pos.device) if batch is None else batch.long()
        box = self.stored_box if box is None else box
        num_systems = count_systems(batch, box)
        edge_index, vec, dist = self.edges(pos, batch, as_boxes(box, num_systems, pos.dtype, pos.device), num_systems)
        capacity = self.max_num_pairs if self.max_num_pairs > 0 else -self.max_num_pairs * num_atoms
        found = edge_index.shape[1]
        if is_abstract():
            torch._check(found <= capacity, lambda: TOO_MANY)
        elif found > capacity:
            raise RuntimeError(
                f"{TOO_MANY}: {found} pairs within {self.cutoff_upper} Å, room for {capacity} "
                f"(max_num_pairs={self.max_num_pairs})."
            )
        if not self.resize_to_fit:
            edge_index, vec, dist = padded(edge_index, vec, dist, capacity)
        return edge_index, dist, vec if self.return_vecs else None

    def edges(
        self, pos: Positions, batch: SystemIndex, box: Boxes | None, num_systems: int
    ) -> tuple[EdgeIndex, EdgeVectors, EdgeScalars]:
        """All pairs, whatever the capacity: ``edge_index`` (2, E), vectors (E, 3) and distances (E,).

        Args:
            pos: Positions in Å, (N, 3).
            batch: System of each atom, (N,) int64.
            box: Lattice vectors, (1, 3, 3) or (S, 3, 3) Å, or None.
            num_systems: Number of systems S.

        Raises:
            ValueError: If the shape of ``batch`` does not fit, or a position is not finite.
        """
        check_finite("pos", pos, "atom")
        if batch.shape != pos.shape[:1]:
            raise ValueError(
                f"batch has shape {tuple(batch.shape)} but pos holds {pos.shape[0]} atoms. Pass ({pos.shape[0]},)."
            )
        edge_index, vec, dist, _ = edges_within(
            pos,
            batch,
            box,
            num_systems,
            cutoff_upper=self.cutoff_upper,
            cutoff_lower=self.cutoff_lower,
            loop=self.loop,
        )
        if self.include_transpose:
            return edge_index, vec, dist
        once = _each_pair_once(edge_index, vec, dist)
        return edge_index[:, once], vec[once], dist[once]

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` reads; see :func:`torchmdnet.scripting.scriptable_distance`."""
        return scriptable_distance(self)


def _each_pair_once(edge_index: EdgeIndex, vec: EdgeVectors, dist: EdgeScalars) -> Tensor:
    """Places of the edges with i > j, of self loops, and of one of each opposite pair of images of the same atom."""
    i, j = edge_index
    x, y, z = vec.detach().unbind(dim=1)
    is_upper = (x > 0) | ((x == 0) & (y > 0)) | ((x == 0) & (y == 0) & (z > 0))
    return ((i > j) | ((i == j) & ((dist == 0) | is_upper))).nonzero()[:, 0]
