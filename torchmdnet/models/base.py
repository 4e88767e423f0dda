"""What every architecture shares: turning the established call into a graph, and checking it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph, build_graph
from torchmdnet.memory import FEW_ATOMS, FEW_EDGES, check_memory, expected_edges
from torchmdnet.neighbors import Search
from torchmdnet.nn.distance import OptimizedDistance
from torchmdnet.nn.filters import MODES, RadialEngine
from torchmdnet.nn.system_embedding import SystemEmbedding
from torchmdnet.tracing import device_kind, is_abstract
from torchmdnet.typing import (
    AtomFeatures,
    AtomicNumbers,
    AtomTraceless,
    AtomVectors,
    Boxes,
    Positions,
    SystemIndex,
    SystemScalars,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Features", "Pullback", "Representation", "guarded", "set_radial_mode"]


@runtime_checkable  # for the run in which shapes are checked
class Pullback(Protocol):
    """The hand-written gradient of an architecture."""

    def __call__(self, of_x: Tensor, of_v: Tensor | None = None, of_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From gradients in features, None for zero, to those in vectors of edges and distances of pairs."""
        ...


class Features(NamedTuple):
    """What an architecture knows of each atom."""

    x: AtomFeatures  # (N, F) invariant
    v: AtomVectors | None = None  # (N, 3, F) rotate with the system; polar where reflections are a symmetry
    energy: Tensor | None = None  # (N, 1) known physics of the architecture itself, added to what the head makes of x
    S: AtomTraceless | None = None  # (N, 5, F) symmetric traceless tensors, in the basis of torchmdnet.ops.irreps


class Representation(nn.Module):
    """Base of all architectures: a graph of atoms in, features of atoms out.

    A subclass writes ``encode(graph) -> Features``. Its constructor calls this one, then :meth:`reset_parameters`.

    Args:
        cutoff_lower: Edges are at least this long, in Å.
        cutoff_upper: Edges are shorter than this, in Å.
        max_z: Atomic numbers below this can be embedded.
        loop: Whether the architecture wants self loops.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
    """

    #: Heads are looked up under this prefix first; the established call returns vectors only where there is one.
    head_prefix = ""
    #: Whether ``encode`` returns vectors v, for heads that read them.
    has_vectors = False
    #: Whether ``encode`` returns symmetric traceless tensors S.
    has_tensors = False
    #: How many of the last channels of x are charges, for the one kind of head that reads them.
    num_charges = 0

    def __init__(
        self,
        *,
        cutoff_lower: float,
        cutoff_upper: float,
        max_z: int,
        loop: bool,
        box_vecs: Tensor | None = None,
        max_num_neighbors: int = 32,
    ) -> None:
        super().__init__()
        self.cutoff_lower = cutoff_lower
        self.cutoff_upper = cutoff_upper
        self.max_z = max_z
        self.max_num_neighbors = max_num_neighbors
        self.distance = OptimizedDistance(
            cutoff_lower,
            cutoff_upper,
            max_num_pairs=-max_num_neighbors,
            return_vecs=True,
            loop=loop,
            box=box_vecs,
        )
        #: Embedding of the total charge and spin of each system, which a subclass may make.
        self.system_embedding: SystemEmbedding | None = None
        #: How radial filters are evaluated; ``representation.radial.mode = "exact"`` turns the grid off.
        self.radial = RadialEngine()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; what was made from the weights is forgotten."""
        self.radial.forget()
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialize all weights."""
        raise NotImplementedError

    def encode(self, graph: Graph) -> Features:
        """Features of every atom of the graph: scalars (N, F), and vectors (N, 3, F) or tensors where there are any."""
        raise NotImplementedError

    def direct(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """:meth:`encode` together with its hand-written derivative, not tracked by autograd; None where there is none.

        Call it under ``no_grad``, and again for every evaluation: it holds for the weights as they are.

        Args:
            like: Of the precision and on the device of the geometry.
        """
        return None

    @classmethod
    def reads_charge(cls, options: Mapping[str, Any]) -> bool:
        """Whether the total charge enters the features without being embedded.

        Args:
            options: The parameters of the constructor by their names in configurations, each with its value.
        """
        return False

    @property
    def reads(self) -> frozenset[str]:
        """Which of ``charge`` and ``spin`` the features depend on."""
        embedded = () if self.system_embedding is None else self.system_embedding.quantities
        charge = ("charge",) if self.reads_charge(vars(self)) else ()
        return frozenset((*embedded, *charge))

    @property
    def system_embedding_kind(self) -> str:
        """The value of ``system_embedding`` that makes this architecture; ``auto`` is settled."""
        return "none" if self.system_embedding is None else "+".join(self.system_embedding.quantities)

    def system_features(self, graph: Graph) -> Tensor | None:
        """What atoms are told of their systems, (S, F); None for nothing."""
        return None if self.system_embedding is None else self.system_embedding(graph)

    def select(self, features: Features, graph: Graph) -> tuple[Features, Graph]:
        """The atoms that a head receives, (N', F) of N' <= N; all unless a wrapper removes some.

        Features of systems that are not finite become NaN, so that no head makes a number of them.
        """
        return guarded(features, graph), graph

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
        """Find the edges this architecture works on; see :func:`torchmdnet.graph.build_graph` for the arguments.

        Raises:
            ValueError: If a shape does not fit, or an element lies outside the embedding.
            NotEnoughMemory: If features and edges cannot fit into memory.
        """
        self.check_elements(z)
        box = self.distance.stored_box if box is None else box
        self._check_memory(pos, self._edges_to_expect(pos, box))
        graph = build_graph(
            z,
            pos,
            batch,
            box,
            q,
            s,
            cutoff_upper=self.cutoff_upper,
            cutoff_lower=self.cutoff_lower,
            loop=self.distance.loop,
            num_systems=num_systems,
            extra=extra,
            search=search,
            max_z=self.max_z,
        )
        self._check_memory(pos, graph.edge_dist.shape[0])
        return graph

    def _edges_to_expect(self, pos: Positions, box: Boxes | None) -> float:
        """Edges of one large periodic system before they are searched for; 0 where that cannot be known."""
        if is_abstract() or pos.shape[0] < FEW_ATOMS or device_kind(pos) != "cpu" or box is None or box.numel() != 9:
            return 0.0
        return expected_edges(pos.shape[0], float(box.detach().reshape(3, 3).det().abs()), self.cutoff_upper)

    def _check_memory(self, pos: Positions, num_edges: int | float) -> None:
        """See :func:`torchmdnet.memory.check_memory`; CUDA devices are not asked while a graph is captured."""
        if (
            is_abstract()
            or pos.device.type not in ("cpu", "cuda")
            or (pos.shape[0] < FEW_ATOMS and num_edges < FEW_EDGES)
        ):
            return
        if pos.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        check_memory(
            pos.shape[0],
            num_edges,
            components=9 if self.has_tensors else 4 if self.has_vectors else 1,
            channels=int(getattr(self, "hidden_channels", 0)),
            itemsize=pos.element_size(),
            device=pos.device,
        )

    def check_elements(self, z: AtomicNumbers) -> None:
        """Refuse atomic numbers without a row in the embedding (on CPU, where looking costs nothing)."""
        if is_abstract() or device_kind(z) != "cpu" or z.numel() == 0:
            return
        for number in (int(z.min()), int(z.max())):
            if not 0 <= number < self.max_z:
                if not 0 < number < len(SYMBOLS):
                    raise ValueError(f"z holds {number}, which is not an element (1 to {len(SYMBOLS) - 1}).")
                raise ValueError(
                    f"z holds {number} ({SYMBOLS[number]}), but the embedding of this model ends at {self.max_z - 1} "
                    f"(max_z={self.max_z}). Train with a larger max_z."
                )

    def forward(
        self,
        z: AtomicNumbers,
        pos: Positions,
        batch: SystemIndex | None = None,
        box: Boxes | None = None,
        q: SystemScalars | None = None,
        s: SystemScalars | None = None,
    ) -> tuple[AtomFeatures, AtomVectors | None, AtomicNumbers, Positions, SystemIndex]:
        """The established call.

        Returns:
            Features x (N, F) and v (N, 3, F) or None, then z, pos and batch of the atoms they belong to.
        """
        graph = self.graph(z, pos, batch, box, q, s)
        features, graph = self.select(self.encode(graph), graph)
        return features.x, features.v if self.head_prefix else None, graph.z, graph.pos, graph.batch


def guarded(features: Features, graph: Graph) -> Features:
    """Features that are NaN for the atoms of systems that are not finite, see :attr:`torchmdnet.graph.Graph.guard`."""
    return features if graph.guard is None else features._replace(x=features.x + graph.guard[:, None])


def set_radial_mode(model: nn.Module, mode: str) -> None:
    """Choose how the radial filters of a model are evaluated; see :class:`torchmdnet.nn.filters.RadialEngine`.

    Args:
        model: The model; changed in place.
        mode: ``"exact"`` evaluates the filter network for every pair; ``"grid"`` a spline through its values on a
            grid, where that is accurate; ``"auto"`` does so in training only if there are more pairs than grid points.

    Raises:
        ConfigError: For a mode other than ``auto``, ``exact`` and ``grid``.
    """
    if mode not in MODES:
        raise ConfigError(f"radial: {mode!r} is not available. Choose from {', '.join(MODES)}.")
    for module in model.modules():
        if isinstance(module, Representation):
            module.radial.mode = mode
            module.radial.forget()
