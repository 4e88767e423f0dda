"""Neighbours within a cutoff, for any lattice and any batch of systems."""

from torchmdnet.neighbors.search import edges_of_pairs, pairs_within

__all__ = ["edges_of_pairs", "pairs_within"]
