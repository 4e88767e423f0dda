"""Neural network potentials for molecular and materials simulation."""

from torchmdnet._version import __version__

__all__ = ["__version__"]
