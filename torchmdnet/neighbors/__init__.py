"""Pairs of atoms within a cutoff: one entry, and the searches behind it."""

from torchmdnet.neighbors.search import neighbor_pairs

__all__ = ["neighbor_pairs"]
