"""Architectures around architectures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchmdnet.errors import DataError
from torchmdnet.graph import Graph
from torchmdnet.models.base import Features, Representation
from torchmdnet.neighbors import Search
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.tracing import is_abstract
from torchmdnet.typing import AtomFeatures, AtomicNumbers, AtomVectors, Boxes, Positions, SystemIndex, SystemScalars

__all__ = ["AtomFilter", "BaseWrapper"]


class BaseWrapper(nn.Module):
    """Base of wrappers: asks the wrapped architecture everything. A subclass overrides what it changes.

    Args:
        model: The architecture inside.
    """

    def __init__(self, model: Representation) -> None:
        super().__init__()
        self.model = model

    def reset_parameters(self) -> None:
        """Initialize all weights."""
        self.model.reset_parameters()

    @property
    def head_prefix(self) -> str:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.head_prefix

    @property
    def has_vectors(self) -> bool:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.has_vectors

    @property
    def has_tensors(self) -> bool:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.has_tensors

    @property
    def num_charges(self) -> int:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.num_charges

    @property
    def reads(self) -> frozenset[str]:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.reads

    @property
    def system_embedding_kind(self) -> str:
        """See :class:`torchmdnet.models.base.Representation`."""
        return self.model.system_embedding_kind

    @property
    def distance(self) -> OptimizedDistance:
        """Where the architecture keeps its box."""
        return self.model.distance

    @property
    def cutoff_upper(self) -> float:
        """Edges are shorter than this, in Å."""
        return self.model.cutoff_upper

    def graph(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
        *,
        num_systems: int | None = None,
        extra: dict[str, Tensor] | None = None,
        search: Search | None = None,
    ) -> Graph:
        """See :meth:`torchmdnet.models.base.Representation.graph`."""
        return self.model.graph(z, pos, batch, box, q, s, num_systems=num_systems, extra=extra, search=search)

    def encode(self, graph: Graph) -> Features:
        """Features of every atom of the graph."""
        return self.model.encode(graph)

    def select(self, features: Features, graph: Graph) -> tuple[Features, Graph]:
        """The atoms a head gets to see."""
        return self.model.select(features, graph)

    def forward(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
    ) -> tuple[AtomFeatures, AtomVectors | None, AtomicNumbers, Positions, SystemIndex]:
        """The established call; see :meth:`torchmdnet.models.base.Representation.forward`."""
        graph = self.graph(z, pos, batch, box, q, s)
        features, graph = self.select(self.encode(graph), graph)
        return features.x, features.v if self.head_prefix else None, graph.z, graph.pos, graph.batch


class AtomFilter(BaseWrapper):
    """Hide light atoms from the head: all atoms exchange messages, but only the heavier ones make up the property.

    Args:
        model: The architecture inside.
        remove_threshold: Atoms with an atomic number up to this are hidden.
    """

    def __init__(self, model: Representation, remove_threshold: int) -> None:
        super().__init__(model)
        self.remove_threshold = remove_threshold

    def select(self, features: Features, graph: Graph) -> tuple[Features, Graph]:
        """Features and graph of the atoms above the threshold; the edges among them stay, pairs do not.

        Raises:
            DataError: If a system would lose all of its atoms.
        """
        features, graph = super().select(features, graph)
        is_kept = graph.z > self.remove_threshold
        kept = is_kept.nonzero()[:, 0]
        before = torch.bincount(graph.batch, minlength=graph.num_systems)
        after = torch.bincount(graph.batch[kept], minlength=graph.num_systems)
        if is_abstract():
            torch._assert_async(~((before > 0) & (after == 0)).any(), "atom_filter leaves no atom of a system")
        elif bool(((before > 0) & (after == 0)).any()):
            system = int(((before > 0) & (after == 0)).nonzero()[0, 0])
            raise DataError(
                f"atom_filter={self.remove_threshold} leaves no atom of system {system}. Set it below the atomic "
                "number of the heaviest atom of every system."
            )
        new_place = torch.cumsum(is_kept, 0) - 1
        edges = is_kept[graph.edge_index].all(dim=0).nonzero()[:, 0]
        x, *others = (None if value is None else value.index_select(0, kept) for value in features)
        assert x is not None
        return Features(x, *others), graph._replace(
            z=graph.z[kept],
            pos=graph.pos.index_select(0, kept),
            batch=graph.batch[kept],
            edge_index=new_place[graph.edge_index[:, edges]],
            edge_vec=graph.edge_vec.index_select(0, edges),
            edge_dist=graph.edge_dist.index_select(0, edges),
            extra={
                name: value[kept] if value.shape[:1] == graph.z.shape else value for name, value in graph.extra.items()
            },
            pairs=None,
        )
