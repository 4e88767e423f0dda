"""Established address of the building blocks."""

from torchmdnet.build import PRECISIONS as dtype_mapping
from torchmdnet.nn.activation import ACTIVATIONS as act_class_mapping
from torchmdnet.nn.activation import GLU, ShiftedSoftplus, SwiGLU, Swish
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.gated import GatedEquivariantBlock
from torchmdnet.nn.mlp import MLP
from torchmdnet.nn.plots import visualize_basis
from torchmdnet.nn.radial import RADIAL_BASES as rbf_class_mapping
from torchmdnet.nn.radial import ExpNormalSmearing, GaussianSmearing
from torchmdnet.nn.repulsion import RepulsionZBL
from torchmdnet.ops.scatter import scatter

__all__ = [
    "GLU",
    "MLP",
    "CosineCutoff",
    "ExpNormalSmearing",
    "GatedEquivariantBlock",
    "GaussianSmearing",
    "NeighborEmbedding",
    "OptimizedDistance",
    "RepulsionZBL",
    "ShiftedSoftplus",
    "SwiGLU",
    "Swish",
    "act_class_mapping",
    "dtype_mapping",
    "rbf_class_mapping",
    "scatter",
    "visualize_basis",
]
