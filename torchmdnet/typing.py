"""Names for the shapes of tensors.

Type checkers see the axes. At run time each name is a plain tensor, so compiling and exporting are undisturbed,
unless ``TORCHMDNET_CHECK_SHAPES`` is set, when jaxtyping can check the real shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from torchmdnet.switches import is_on

if not TYPE_CHECKING and is_on("TORCHMDNET_CHECK_SHAPES"):
    from jaxtyping import Float, Int, Shaped

    AtomicNumbers = Int[Tensor, "atoms"]
    Positions = Float[Tensor, "atoms 3"]
    SystemIndex = Int[Tensor, "atoms"]
    Boxes = Float[Tensor, "*boxes 3 3"]
    SystemScalars = Shaped[Tensor, "*systems"]
    EdgeIndex = Int[Tensor, "2 edges"]
    EdgeVectors = Float[Tensor, "edges 3"]
    EdgeScalars = Float[Tensor, "edges"]
    EdgeFeatures = Float[Tensor, "edges basis"]
    PairScalars = Float[Tensor, "pairs"]
    PairFeatures = Float[Tensor, "pairs basis"]
    AtomScalars = Float[Tensor, "atoms"]
    AtomFeatures = Float[Tensor, "atoms channels"]
    AtomVectors = Float[Tensor, "atoms 3 channels"]
    AtomTensors = Float[Tensor, "atoms 9 channels"]
    AtomComponents = Float[Tensor, "atoms components channels"]
    AtomTraceless = Float[Tensor, "atoms 5 channels"]
else:
    AtomicNumbers: TypeAlias = Tensor  # (N,) int64
    Positions: TypeAlias = Tensor  # (N, 3) Å
    SystemIndex: TypeAlias = Tensor  # (N,) int64
    Boxes: TypeAlias = Tensor  # (3, 3), (1, 3, 3) or (S, 3, 3) Å
    SystemScalars: TypeAlias = Tensor  # (S,)
    EdgeIndex: TypeAlias = Tensor  # (2, E) int64
    EdgeVectors: TypeAlias = Tensor  # (E, 3) Å
    EdgeScalars: TypeAlias = Tensor  # (E,)
    EdgeFeatures: TypeAlias = Tensor  # (E, K)
    PairScalars: TypeAlias = Tensor  # (P,)
    PairFeatures: TypeAlias = Tensor  # (P, K)
    AtomScalars: TypeAlias = Tensor  # (N,)
    AtomFeatures: TypeAlias = Tensor  # (N, F)
    AtomVectors: TypeAlias = Tensor  # (N, 3, F)
    AtomComponents: TypeAlias = Tensor  # (N, C, F): C components of any kind
    AtomTensors: TypeAlias = Tensor  # (N, 9, F): trace, antisymmetric and symmetric traceless parts
    AtomTraceless: TypeAlias = Tensor  # (N, 5, F): the symmetric traceless part alone

__all__ = [
    "AtomComponents",
    "AtomFeatures",
    "AtomScalars",
    "AtomTensors",
    "AtomTraceless",
    "AtomVectors",
    "AtomicNumbers",
    "Boxes",
    "EdgeFeatures",
    "EdgeIndex",
    "EdgeScalars",
    "EdgeVectors",
    "PairFeatures",
    "PairScalars",
    "Positions",
    "SystemIndex",
    "SystemScalars",
]
