"""Neighbours within a cutoff, for any lattice and any batch of systems."""

from torchmdnet.neighbors.search import Search, edges_of_pairs, pairs_within
from torchmdnet.neighbors.vectors import along_edges, differences

__all__ = ["Search", "along_edges", "differences", "edges_of_pairs", "pairs_within"]
