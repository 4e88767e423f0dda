"""Neighbours within a cutoff, for any lattice and any batch of systems."""

from torchmdnet.neighbors.device import DeviceEdges, edges_on_device, searches_on_device
from torchmdnet.neighbors.fixed import FixedSearch
from torchmdnet.neighbors.home import Home
from torchmdnet.neighbors.search import Search, by_receiver, edges_of_pairs, pairs_within
from torchmdnet.neighbors.sound import CLOSEST, apart, can_check, check_apart, check_finite, in_bounds, not_a_number
from torchmdnet.neighbors.vectors import Listed, edge_geometry, length, measured_edges, pull_back
from torchmdnet.neighbors.verlet import VerletList

__all__ = [
    "CLOSEST",
    "DeviceEdges",
    "FixedSearch",
    "Home",
    "Listed",
    "Search",
    "VerletList",
    "apart",
    "by_receiver",
    "can_check",
    "check_apart",
    "check_finite",
    "edge_geometry",
    "edges_of_pairs",
    "edges_on_device",
    "in_bounds",
    "length",
    "measured_edges",
    "not_a_number",
    "pairs_within",
    "pull_back",
    "searches_on_device",
]
