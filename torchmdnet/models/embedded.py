"""What architectures share whose atoms start from an embedding and are refined by layers of messages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.graph import Graph
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.tape.steps import Concatenate, Message, Plain, linear

__all__ = ["EmbeddedRepresentation"]


class EmbeddedRepresentation(TapedRepresentation):
    """Embeddings of the elements, mixed with those around an atom where asked for, and layers that refine them.

    A subclass makes its layers and then ``system_embedding``, and writes :attr:`layers_with_functions` and
    :meth:`program`.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_layers: Layers.
        num_rbf: Radial basis functions per edge (K).
        rbf_type: Kind of radial basis.
        trainable_rbf: Whether the radial basis is trained.
        activation: Activation function.
        neighbor_embedding: Whether the first features know the elements around the atom.
        cutoff_lower: Edges are at least this long, in Å.
        cutoff_upper: Edges are shorter than this, in Å.
        max_z: Rows of the element embedding; atomic numbers are below this.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        loop: Whether atoms are neighbours of themselves.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        dtype: Precision of the weights.
        basis_dtype: Precision in which the radial basis keeps its parameters.

    Raises:
        ConfigError: For an unknown ``rbf_type``.
    """

    def __init__(
        self,
        *,
        hidden_channels: int,
        num_layers: int,
        num_rbf: int,
        rbf_type: str,
        trainable_rbf: bool,
        activation: str,
        neighbor_embedding: bool,
        cutoff_lower: float,
        cutoff_upper: float,
        max_z: int,
        max_num_neighbors: int,
        loop: bool,
        box_vecs: Tensor | None,
        dtype: torch.dtype,
        basis_dtype: torch.dtype,
    ) -> None:
        super().__init__(
            cutoff_lower=cutoff_lower,
            cutoff_upper=cutoff_upper,
            max_z=max_z,
            loop=loop,
            box_vecs=box_vecs,
            max_num_neighbors=max_num_neighbors,
        )
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.num_rbf = num_rbf
        self.rbf_type = rbf_type
        self.trainable_rbf = trainable_rbf
        self.activation = activation
        self.embedding = nn.Embedding(max_z, hidden_channels, dtype=dtype)
        self.distance_expansion = make_radial_basis(
            rbf_type, cutoff_lower, cutoff_upper, num_rbf, trainable_rbf, dtype=basis_dtype
        )
        self.envelope = CosineCutoff(cutoff_lower, cutoff_upper)
        self.neighbor_embedding = (
            NeighborEmbedding(hidden_channels, num_rbf, cutoff_lower, cutoff_upper, max_z, dtype)
            if neighbor_embedding
            else None
        )

    @property
    def layers_with_functions(self) -> list[tuple[Any, RadialFunction]]:
        """Each layer with its function of distance."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        reset_all(self.embedding, self.distance_expansion, self.neighbor_embedding)
        reset_all(*(layer for layer, _ in self.layers_with_functions))

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        functions = [function for _, function in self.layers_with_functions]
        around = self.neighbor_embedding
        return functions if around is None else [*functions, RadialFunction(around, "radial")]

    def embedded(self, tape: Any, graph: Graph) -> Any:
        """What atoms start from, (N, F), see :class:`torchmdnet.nn.embedding.NeighborEmbedding`."""
        around = self.neighbor_embedding
        x = tape(Plain(lambda: self.first_features(graph), self.embedding, self.system_embedding))
        if around is None:
            return x
        elements = tape(Plain(lambda: around.embedding(graph.z), around.embedding))  # (N, F)
        near = tape(Message(RadialFunction(around, "radial"), without_loops=True), elements)
        return tape(linear(around.combine), tape(Concatenate(), x, near))
