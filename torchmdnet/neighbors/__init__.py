"""Pairs of atoms within a cutoff: one entry, and the searches behind it."""

from torchmdnet.neighbors.search import pairs_within

__all__ = ["pairs_within"]
