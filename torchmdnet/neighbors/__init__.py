"""Neighbours within a cutoff, for any lattice and any batch of systems."""

from torchmdnet.neighbors.fixed import FixedSearch
from torchmdnet.neighbors.home import Home
from torchmdnet.neighbors.search import Search, by_receiver, edges_of_pairs, pairs_within
from torchmdnet.neighbors.vectors import Listed, edge_geometry, length, measured_edges, pull_back
from torchmdnet.neighbors.verlet import VerletList

__all__ = [
    "FixedSearch",
    "Home",
    "Listed",
    "Search",
    "VerletList",
    "by_receiver",
    "edge_geometry",
    "edges_of_pairs",
    "length",
    "measured_edges",
    "pairs_within",
    "pull_back",
]
