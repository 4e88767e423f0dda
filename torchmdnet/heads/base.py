"""What every output head shares."""

from __future__ import annotations

from torch import Tensor, nn

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph, bare_graph
from torchmdnet.models.base import Features
from torchmdnet.ops.scatter import REDUCTIONS, scatter
from torchmdnet.ops.sums import sum_by_index

__all__ = ["OutputModel"]


class OutputModel(nn.Module):
    """Base of all heads: per-atom values, reduced to systems.

    A subclass writes ``per_atom(features, graph)`` and, where a property is more than a sum, ``per_system(y, graph)``.

    Args:
        allow_prior_model: Whether priors may be added to the output.
        reduce_op: How atoms are reduced to systems; see :func:`torchmdnet.ops.scatter.scatter`.
        static_shapes: Kept for compatibility.
    """

    #: Whether only architectures with vector features will do.
    needs_vectors = False
    #: Whether the output stays with the atoms, (N, ...); such a head is named under ``properties``.
    per_atom_output = False
    #: Shape of the output of one system, or of one atom.
    output_shape: tuple[int, ...] = (1,)
    #: Whether the output changes when an atom of a periodic system is moved by a lattice vector.
    depends_on_images = False
    #: Whether only architectures that predict charges will do.
    needs_charges = False
    #: Whether ``standardize`` makes sense: false where a mean would be added to vectors or before a nonlinear step.
    can_standardize = True

    def __init__(self, *, allow_prior_model: bool = True, reduce_op: str = "sum", static_shapes: bool = False) -> None:
        super().__init__()
        if reduce_op not in REDUCTIONS:
            raise ConfigError(f"reduce_op: {reduce_op!r} is not available. Choose from {', '.join(REDUCTIONS)}.")
        self.allow_prior_model = allow_prior_model
        self.reduce_op = reduce_op
        self.static_shapes = static_shapes
        self.dim_size = 0

    def reset_parameters(self) -> None:
        """Initialize all weights."""

    def per_atom(self, features: Features, graph: Graph) -> Tensor:
        """Contribution of each atom, (N, ...)."""
        if type(self).pre_reduce is OutputModel.pre_reduce:
            raise NotImplementedError(f"{type(self).__name__} defines neither per_atom nor pre_reduce.")
        return self.pre_reduce(features.x, features.v, graph.z, graph.pos, graph.batch, graph.box)

    @property
    def has_slope(self) -> bool:
        """Whether :meth:`value_and_slope` is written out: if the output is a plain reduction of functions of x."""
        return False

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`per_atom` and its derivative in x, without history: (N, F) -> (N, 1), (N, F)."""
        raise NotImplementedError

    def per_system(self, y: Tensor, graph: Graph) -> Tensor:
        """Turn reduced values, (S, ...), into the property."""
        return self.post_reduce(y)

    def reduce(self, x: Tensor, batch: Tensor, num_systems: int | None = None) -> Tensor:
        """Reduce atoms to systems: (N, ...) -> (S, ...)."""
        if num_systems is None:
            num_systems = int(batch.max()) + 1 if batch.numel() else 0
        self.dim_size = num_systems
        if self.reduce_op in ("add", "sum"):
            return sum_by_index(x, batch, num_systems)
        return scatter(x, batch, dim=0, dim_size=num_systems, reduce=self.reduce_op)

    # The established hooks: for code that calls a head without a graph, and for heads that override them.

    def pre_reduce(
        self, x: Tensor, v: Tensor | None, z: Tensor, pos: Tensor, batch: Tensor, box: Tensor | None = None
    ) -> Tensor:
        """:meth:`per_atom` from separate tensors."""
        return self.per_atom(Features(x, v), bare_graph(z, pos, batch, box))

    def post_reduce(self, x: Tensor) -> Tensor:
        """:meth:`per_system` from the reduced values alone, (S, ...)."""
        return x
