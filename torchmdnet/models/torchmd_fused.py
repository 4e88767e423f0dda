"""The transformers as one operation, for evaluation.

The layers are those of the models; here they call compiled loops and matrix products one after another, and the
derivative in the geometry is written out. Whoever asks for anything else, such as gradients of weights, is answered by
the ordinary layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchmdnet.graph import Graph
from torchmdnet.models.base import Features, Pullback, Representation
from torchmdnet.nn.attention import by_part
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.embedding import NeighborEmbedding
from torchmdnet.nn.filters import Radial, RadialFunction, Tables
from torchmdnet.nn.modules import is_plain
from torchmdnet.nn.spline import BASIS, Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.batched import one_by_one
from torchmdnet.ops.kernels.work import lanes_of
from torchmdnet.typing import AtomFeatures

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "FrozenNet",
    "FrozenTransformer",
    "FusedRepresentation",
    "has_known_heads",
]


class FusedRepresentation(Representation):
    """An architecture that runs as one operation in evaluation, and layer by layer otherwise."""

    distance_expansion: nn.Module
    embedding: nn.Embedding

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._frozen: FrozenNet | None = None
        self._frozen_of: Tables | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frozen": None, "_frozen_of": None}

    def train(self, mode: bool = True) -> Self:
        """See :class:`torchmdnet.models.base.Representation`."""
        self._frozen = self._frozen_of = None
        return super().train(mode)

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance, that of the neighbour embedding last."""
        raise NotImplementedError

    def by_layers(self, graph: Graph, radial: Radial) -> Features:
        """:meth:`encode` by ordinary layers."""
        raise NotImplementedError

    def freeze(self, spline: Spline, tables: Tables) -> FrozenNet | None:
        """The operation, with weights as they are; None if the loops do not know a part of the network."""
        raise NotImplementedError

    def encode(self, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.base.Representation`."""
        radial = self._radial(graph)
        net = None
        is_about_atoms = _comes_in_pairs(graph) and not graph.differentiates_systems
        if radial.tables is not None and radial.spline is not None and is_about_atoms:
            net = self._frozen_with(radial.spline, radial.tables)
        if net is None:
            return self.by_layers(graph, radial)
        assert graph.pairs is not None
        call = _Call(net, graph, lambda moved: self.by_layers(moved, self._radial(moved)))
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        x, v = _Encode.apply(call, graph.edge_vec, graph.pairs.dist, *trained)  # type: ignore[misc]
        return Features(x, v)

    def direct(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :class:`torchmdnet.models.base.Representation`."""
        is_usual = type(self).encode is FusedRepresentation.encode and type(self).select is Representation.select
        if self.training or not is_usual or kernels.is_traced():
            return None
        spline = self.radial.ready(like, *self._of_radial)
        net = None if spline is None else self._frozen_with(spline, self.radial.tables)
        if net is None:
            return None
        return lambda graph: net.encode(graph, graph.edge_vec, cast(Any, graph.pairs).dist)

    def first_features(self, graph: Graph) -> AtomFeatures:
        """What atoms start from: the embedding of their element and, if there is one, that of their system, (N, F)."""
        x, of_systems = self.embedding(graph.z), self.system_features(graph)
        return x if of_systems is None else x + of_systems.index_select(0, graph.batch)

    @property
    def _of_radial(self) -> tuple[nn.Module, CosineCutoff, list[RadialFunction]]:
        return self.distance_expansion, cast(CosineCutoff, self.envelope), self.radial_functions

    def _radial(self, graph: Graph) -> Radial:
        return self.radial(graph, *self._of_radial, self.training)

    def _frozen_with(self, spline: Spline, tables: Tables) -> FrozenNet | None:
        """What is kept as long as the tables are, which are made anew whenever a weight has changed."""
        embedding: Any = self.embedding
        if not (kernels.can_loop(embedding.weight, embedding.embedding_dim) and is_plain(embedding, nn.Embedding)):
            return None
        if self._frozen_of is not tables:
            self._frozen, self._frozen_of = self.freeze(spline, tables), tables
        return self._frozen if self._frozen is not None and self._frozen.is_as_usual() else None


def has_known_heads(model: Any) -> bool:
    """Whether the loops know the heads of a transformer: of one vector of channels each, or of whole blocks."""
    width, lanes = model.hidden_channels // model.num_heads, lanes_of(model.embedding.weight.element_size())
    return width == lanes or width % (2 * lanes) == 0


def _comes_in_pairs(graph: Graph) -> bool:
    pairs = graph.pairs
    return pairs is not None and pairs.reverse.shape == pairs.of_edge.shape and graph.num_atoms > 0


class FrozenNet:
    """What evaluation keeps of a network between calls, and how it runs; one for each kind of network.

    Args:
        model: Where the weights come from.
        spline: The grid that radial filters are read from.
        tables: Spline coefficients of the filters.
    """

    def __init__(self, model: Any, spline: Spline, tables: Tables) -> None:
        self.embedding: nn.Embedding = model.embedding
        self.around: NeighborEmbedding | None = model.neighbor_embedding
        self.system_features = model.system_features
        *functions, last = model.radial_functions
        if self.around is None:
            functions.append(last)
        else:
            self.table_around = kernels.tensor_edge_loops().packed(tables[last].values.detach().numpy())
        self.tables = [tables[function].values.detach() for function in functions]
        basis = np.asarray(BASIS, dtype=np.float64) / 120
        cutoffs = float(model.cutoff_lower), float(model.cutoff_upper)
        self.grid = (float(spline.start), float(spline.stop), spline.num_cells, basis, *cutoffs)

    def is_as_usual(self) -> bool:
        """Whether all parts are what their classes say, with SiLU where they have activations, and nobody listens."""
        raise NotImplementedError

    def forward(self, x: Tensor, at: Geometry) -> Features:
        """Features of all atoms, from those x of their elements (N, F); the geometry keeps what the way back needs."""
        raise NotImplementedError

    def backward(self, of_x: Tensor, of_v: Tensor | None, at: Geometry) -> Tensor:
        """The gradient in x."""
        raise NotImplementedError

    def encode(self, graph: Graph, vec: Tensor, dist: Tensor) -> tuple[Features, Callable[..., tuple[Tensor, Tensor]]]:
        """Features of all atoms and the way back to the geometry; for use where nothing is recorded.

        Args:
            graph: The atoms.
            vec: Vectors of the edges, (E, 3).
            dist: Distances of the pairs, (P,).
        """
        at, layer = Geometry(self.grid, graph, vec, dist), self.around
        x = self.embedding.weight.detach().index_select(0, graph.z)  # (N, F)
        with torch.no_grad():
            of_systems = self.system_features(graph)
            if of_systems is not None:
                x += of_systems.index_select(0, graph.batch)
        sent = None
        if layer is not None:
            elements = layer.embedding.weight.detach().index_select(0, graph.z)
            gathered, sent = at.message(self.table_around, elements, at.among_others)
            mixed = torch.cat([x, gathered], dim=1)
            x = torch.addmm(layer.combine.bias, mixed, layer.combine.weight.t())

        def pull_back(of_x: Tensor, of_v: Tensor | None = None, of_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
            grad = self.backward(of_x, of_v, at)
            if layer is not None and sent is not None:
                of_sum = grad @ layer.combine.weight[:, grad.shape[1] :]
                at.message_backward(self.table_around, of_sum, sent, at.among_others)
            return at.backward()

        return self.forward(x, at), pull_back


class _Visits(NamedTuple):
    """Coefficients and slopes of the pairs in the order in which loops come to them."""

    coef: np.ndarray
    slope: np.ndarray


class Geometry:
    """Edges as the loops see them, and gradients in what is known of them.

    Args:
        grid: Of the distances and the envelope, as the loops take it.
        graph: The atoms.
        vec: Vectors of the edges, (E, 3).
        dist: Distances of the pairs, (P,).
    """

    values: _Visits
    stride: int
    edge_fade: np.ndarray
    edge_steep: np.ndarray

    def __init__(self, grid: tuple[Any, ...], graph: Graph, vec: Tensor, dist: Tensor) -> None:
        assert graph.pairs is not None
        loops, pairs = kernels.vector_edge_loops(), graph.pairs
        self.num_atoms, self.dtype = graph.num_atoms, dist.dtype
        self.row, self.row_start = pairs.of_edge.numpy(), pairs.row_start.numpy()
        self.sender, self.reverse = (index.int().numpy() for index in (graph.edge_index[1], pairs.reverse))
        self.dist = dist.detach().contiguous().numpy()
        E, P = self.row.shape[0], self.dist.shape[0]
        self.u, coef, slope = self.empty(E, 4), self.empty(P, 6), self.empty(P, 6)
        self.fade, self.steep, cell = self.empty(P), self.empty(P), np.empty(P, dtype=np.int64)
        out = (self.u, coef, slope, self.fade, self.steep, cell)
        loops.geometry(40 * E, vec.detach().contiguous().numpy(), self.dist, self.row, *grid, *out)
        self.schedule = kernels.tensor_edge_loops().schedule(cell, self.row, self.row_start, grid[2] + 6)
        self.place = cell[self.schedule.rows].astype(np.int32)
        self.slot = self.schedule.slot.astype(np.int32)
        self.coef, self.slope, self.num_others = coef, slope, pairs.atoms.shape[1]
        self.notes: list[Any] = []
        self.gradients: dict[tuple[int, int], np.ndarray] = {}

    def empty(self, *shape: int) -> np.ndarray:
        """An array with anything in it."""
        return torch.empty(shape, dtype=self.dtype).numpy()

    @cached_property
    def bare(self) -> _Visits:
        """What does not fade at the cutoff."""
        return self._visits(self.coef, self.slope)

    @cached_property
    def fading(self) -> _Visits:
        """What does."""
        slope = self.fade[:, None] * self.slope
        slope += self.steep[:, None] * self.coef
        return self._visits(self.fade[:, None] * self.coef, slope)

    @cached_property
    def among_others(self) -> _Visits:
        """What fades and leaves out self loops, the last pairs."""
        if len(self.coef) == self.num_others:
            return self.fading
        is_other = self.schedule.rows < self.num_others
        return _Visits(*(is_other[:, None] * values for values in self.fading))

    def _visits(self, coef: np.ndarray, slope: np.ndarray) -> _Visits:
        loops, rows = kernels.tensor_edge_loops(), self.schedule.rows
        out = _Visits(self.empty(len(rows), 6), self.empty(len(rows), 6))
        loops.pick(coef, rows, out.coef)
        loops.pick(slope, rows, out.slope)
        return out

    def prepare_attention(self, *, values_fade: bool) -> None:
        """What attention needs besides; either the weights of values fade at the cutoff, or attention does."""
        E = self.row.shape[0]
        self.values = self.fading if values_fade else self.bare
        self.stride = -(-E // 8) * 8  # whole vectors
        self.edge_fade, self.edge_steep = np.zeros((2, self.stride), self.fade.dtype)
        if values_fade:
            self.edge_fade[:E] = 1
        else:
            self.edge_fade[:E], self.edge_steep[:E] = self.fade[self.row], self.steep[self.row]

    def work(self, channels: int) -> int:
        """Multiply-adds of one visit, roughly."""
        return 6 * self.row.shape[0] * channels

    def gradient(self, sides: int, size: int = 1) -> np.ndarray:
        """Where loops with so many sides add gradients of edges, (S, E, size).

        Those in the distance of an edge, or of size 4 those in the distance and the direction of the opposite one.
        """
        if (sides, size) not in self.gradients:
            self.gradients[sides, size] = torch.zeros(sides, len(self.row), size, dtype=self.dtype).numpy()
        return self.gradients[sides, size]

    def shares(self, table: np.ndarray) -> tuple[int, int]:
        """How threads share the loops that read a table, as sides and ranges."""
        blocks, *_, channels = table.shape
        threads = kernels.cores.count() if self.work(blocks * channels) >= kernels.WORTH_THREADS else 1
        return kernels.tensor_edge_loops().shares(threads, blocks, len(self.schedule.chunk) - 1)

    def where(self, table: np.ndarray) -> tuple[Any, ...]:
        """Indices as the loops that read a table take them, behind the senders."""
        _, _, chunk, first, most = self.schedule
        return self.slot, chunk, first, self.row_start, most, *self.shares(table)

    def message(self, table: np.ndarray, X: Tensor, visits: _Visits) -> tuple[Tensor, np.ndarray]:
        """Σ_j w_ij X_j, (N, F), and X packed."""
        loops, channels = kernels.vector_edge_loops(), X.shape[1]
        out, sent = torch.empty_like(X), kernels.tensor_edge_loops().packed(X[:, None].numpy())
        arrays = (visits.coef, self.place, table, sent, self.sender)
        loops.message_sum(self.work(channels), *arrays, *self.where(table), out.numpy())
        return out, sent

    def message_backward(self, table: np.ndarray, grad: Tensor, X: np.ndarray, visits: _Visits) -> Tensor:
        """The gradient of :meth:`message` in X, (N, F); that in the distances is kept."""
        loops, channels = kernels.vector_edge_loops(), grad.shape[1]
        sides, _ = self.shares(table)
        out, of_edge = torch.empty_like(grad), self.gradient(sides)[:, :, 0]
        arrays = (*visits, self.place, table, kernels.tensor_edge_loops().packed(grad[:, None].numpy()), X, self.sender)
        loops.message_backward(2 * self.work(channels), *arrays, *self.where(table), out.numpy(), of_edge)
        return out

    def backward(self) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors (E, 3) and the distances (P,), of all that was gathered."""
        E = self.row.shape[0]
        of_vec = torch.empty(E, 3, dtype=self.dtype)
        of_dist = torch.empty(self.dist.shape, dtype=self.dtype)
        found = {size: [x for (_, n), x in self.gradients.items() if n == size] for size in (1, 4)}
        of_edge, of_reverse = (np.concatenate([*found[n], self.empty(0, E, n)]) for n in (1, 4))
        loops, vec = kernels.vector_edge_loops(), of_vec.numpy()
        loops.vectors_backward(40 * E, self.u, self.dist, self.row, self.reverse, of_reverse, vec)
        loops.distances_backward(self.u, self.row, of_reverse, of_edge[:, :, 0], vec, of_dist.numpy())
        return of_vec, of_dist


# ------------------------------------------------------------------------------------------------------- transformers


class FrozenTransformer(FrozenNet):
    """See :class:`torchmdnet.models.torchmd_et.TorchMD_ET` and, without vectors, ``torchmd_t.TorchMD_T``."""

    def __init__(self, model: Any, spline: Spline, tables: Tables) -> None:
        super().__init__(model, spline, tables)
        self.out_norm: nn.LayerNorm = model.out_norm
        self.has_vectors, self.vectors_fade = model.has_vectors, getattr(model, "vector_cutoff", False)
        self.layers = [
            _FrozenAttention(layer, table, has_vectors=model.has_vectors and n > 0)
            for n, (layer, table) in enumerate(zip(model.attention_layers, self.tables, strict=True))
        ]

    def is_as_usual(self) -> bool:
        """See :meth:`FrozenNet.is_as_usual`."""
        linears, activations = [], []
        for frozen in self.layers:
            layer = frozen.layer
            linears += [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, getattr(layer, "vec_proj", None)]
            activations.append(layer.attn_activation)
        norms = [self.out_norm, *(frozen.layer.layernorm for frozen in self.layers)]
        return _are_plain(self.around, linears, activations) and all(is_plain(norm, nn.LayerNorm) for norm in norms)

    def forward(self, x: Tensor, at: Geometry) -> Features:
        """See :meth:`FrozenNet.forward`."""
        at.prepare_attention(values_fade=self.vectors_fade)
        v: Tensor | None = None
        for layer in self.layers:
            x, v = layer.forward(x, v, at)
        norm = self.out_norm
        out, *moments = torch.native_layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps)
        at.notes.append((x, moments))
        if self.has_vectors and v is None:
            v = x.new_zeros(x.shape[0], 3, x.shape[1])
        return Features(out, v)

    def backward(self, of_x: Tensor, of_v: Tensor | None, at: Geometry) -> Tensor:
        """See :meth:`FrozenNet.backward`."""
        x, moments = at.notes.pop()
        of_x = _norm_backward(of_x, x, moments, self.out_norm)
        if self.has_vectors and of_v is None:
            of_v = x.new_zeros(x.shape[0], 3, x.shape[1])
        for layer in reversed(self.layers):
            of_x, of_v = layer.backward(of_x, of_v, at)
        return of_x


class _FrozenAttention:
    """One layer, which sends directions if the network has vectors, and vectors if it is not the first.

    Args:
        layer: Where the weights come from.
        table: Spline coefficients of its filters, (R, 2, F) or (R, 4, F).
        has_vectors: Whether vectors come in.
    """

    def __init__(self, layer: Any, table: Tensor, has_vectors: bool) -> None:
        self.layer = layer
        self.num_values = table.shape[1] - 1  # 1 or 3
        self.num_sent = 1 if self.num_values == 1 else 5 if has_vectors else 2
        parts = {1: [1], 2: [1, 3], 5: [1, 3, 2]}[self.num_sent]
        self.keys = kernels.tensor_edge_loops().packed(table[:, :1].detach().numpy())
        self.filters = kernels.tensor_edge_loops().packed(table[:, parts].detach().contiguous().numpy())
        values = by_part(layer.v_proj.weight.detach().t(), layer.num_heads, layer.head_dim)  # (F, L, F)
        bias = by_part(layer.v_proj.bias.detach()[None], layer.num_heads, layer.head_dim)  # (1, L, F)
        self.weight = torch.cat([layer.q_proj.weight, layer.k_proj.weight, values.flatten(1).t()]).detach().contiguous()
        self.bias = torch.cat([layer.q_proj.bias, layer.k_proj.bias, bias.flatten()]).detach()
        self.num_heads = layer.num_heads
        self.width = layer.head_dim // lanes_of(table.element_size())

    def forward(self, x: Tensor, v: Tensor | None, at: Geometry) -> tuple[Tensor, Tensor | None]:
        """Features that go out, from those that come in."""
        loops, layer = kernels.vector_edge_loops(), self.layer
        (N, channels), C, norm = x.shape, self.num_sent, layer.layernorm
        h, *moments = torch.native_layer_norm(x, (channels,), norm.weight, norm.bias, norm.eps)
        projected = torch.addmm(self.bias, h, self.weight.t())
        (B, *_, block), size = self.keys.shape, x.numel()
        Q, K, V = at.empty(B, N, 1, block), at.empty(B, N, 1, block), at.empty(B, N, C, block)
        vectors = np.empty((0, 3, channels), x.numpy().dtype) if v is None else v.numpy()
        loops.send(8 * size, projected.numpy(), vectors, Q, K, V)
        work, where = at.work(channels), at.where(self.keys)
        pieces = at.empty(2 * B if self.width == 1 else B, at.stride)
        arrays = (at.bare.coef, at.place, self.keys, Q, K, at.sender)
        loops.key_products(work, *arrays, *where, self.width, pieces)
        if self.width == 1:
            pieces = pieces[: self.num_heads]  # no head lies beyond the last channel
        weight, *_ = self._attention(pieces, at)
        gathered = torch.empty(N, 1 if C == 1 else 4, channels, dtype=x.dtype)
        arrays = (at.values.coef, at.place, self.filters, weight, V, at.u, at.sender)
        loops.value_sum(3 * self.filters.shape[2] * work // 2, *arrays, *where, self.width, gathered.numpy())
        o = projections = None
        m = gathered[:, 0]
        if C == 1:
            out, out_v = torch.addmm(layer.o_proj.bias, m, layer.o_proj.weight.t()) + x, None
        elif v is None:
            weights = layer.o_proj.weight[2 * channels :], layer.o_proj.bias[2 * channels :]
            out, out_v = torch.addmm(weights[1], m, weights[0].t()) + x, gathered[:, 1:].contiguous()
        else:
            o = torch.addmm(layer.o_proj.bias, m, layer.o_proj.weight.t())
            projections = torch.mm(v.view(3 * N, channels), layer.vec_proj.weight.t())
            out, out_v = torch.empty_like(x), torch.empty_like(v)
            arrays = (x.numpy(), vectors, gathered.numpy(), o.numpy(), projections.numpy())
            loops.receive(24 * size, *arrays, out.numpy(), out_v.numpy())
        at.notes.append((x, v, moments, projected, Q, K, V, pieces, o, projections))
        return out, out_v

    def _attention(self, pieces: np.ndarray, at: Geometry) -> list[np.ndarray]:
        """Made anew on the way back, as it is cheap and large."""
        found = [at.empty(self.num_heads, at.stride) for _ in range(3)]
        kernels.vector_edge_loops().attention(20 * pieces.size, pieces, at.edge_fade, *found)
        return found

    def backward(self, of_x: Tensor, of_v: Tensor | None, at: Geometry) -> tuple[Tensor, Tensor | None]:
        """Gradients in the features that came in, given those in what went out."""
        loops, layer = kernels.vector_edge_loops(), self.layer
        x, v, moments, projected, Q, K, V, pieces, o, projections = at.notes.pop()
        weight, value, rise = self._attention(pieces, at)
        (N, channels), C, size = x.shape, self.num_sent, x.numel()
        out_v = None
        if C == 1:
            grad = (of_x @ layer.o_proj.weight)[:, None]
        else:
            assert of_v is not None
            if v is None:
                of_m = of_x @ layer.o_proj.weight[2 * channels :]
            else:
                of_o, of_projections = torch.empty_like(o), torch.empty_like(projections)
                arrays = (of_x.numpy(), of_v.numpy(), o.numpy(), projections.numpy())
                loops.receive_backward(40 * size, *arrays, of_o.numpy(), of_projections.numpy())
                of_m = of_o @ layer.o_proj.weight
                out_v = torch.addmm(of_v.view(3 * N, channels), of_projections, layer.vec_proj.weight).view_as(of_v)
            grad = torch.cat([of_m[:, None], of_v], dim=1)
        work, where = at.work(channels), at.where(self.keys)
        sides, _ = at.shares(self.keys)
        of_V, of_projected = torch.empty(N, C, channels, dtype=x.dtype), torch.empty_like(projected)
        of_pieces = at.empty(2 * self.keys.shape[0] if self.width == 1 else self.keys.shape[0], at.stride)
        arrays = (
            *at.values,
            at.place,
            self.filters,
            weight,
            V,
            at.u,
            kernels.tensor_edge_loops().packed(grad.numpy()),
            at.sender,
            at.reverse,
        )
        out = (of_V.numpy(), of_pieces, at.gradient(sides, 1 if C == 1 else 4))
        loops.value_backward(3 * self.filters.shape[2] * work, *arrays, *where, self.width, *out)
        if self.width == 1:
            of_pieces = of_pieces[: self.num_heads]
        of_products, of_edge = at.empty(self.num_heads, at.stride), at.gradient(sides)[:, :, 0]
        arrays = (of_pieces, at.reverse, at.edge_fade, at.edge_steep, value, rise)
        loops.attention_backward(8 * of_pieces.size, *arrays, of_products, of_edge[0])
        arrays = (*at.bare, at.place, self.keys, of_products, Q, K, at.sender, at.reverse)
        loops.key_backward(3 * work, *arrays, *where, self.width, of_projected.numpy(), of_edge)
        vectors = np.empty((0, 3, channels), x.numpy().dtype) if v is None else v.numpy()
        to_v = vectors if out_v is None else out_v.numpy()
        loops.send_backward(8 * size, projected.numpy(), vectors, of_V.numpy(), of_projected.numpy(), to_v)
        return of_x + _norm_backward(of_projected @ self.weight, x, moments, layer.layernorm), out_v


def _norm_backward(grad: Tensor, x: Tensor, moments: list[Tensor], norm: nn.LayerNorm) -> Tensor:
    arrays = (x, (x.shape[1],), *moments, norm.weight, norm.bias, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(grad, *arrays)[0]


def _are_plain(around: Any, linears: Sequence[Any], activations: Sequence[nn.Module]) -> bool:
    """Whether the layers are linear, if there are any, the activations SiLU, and the neighbour embedding as usual."""
    if around is not None and not (
        is_plain(around, NeighborEmbedding)
        and is_plain(around.embedding, nn.Embedding)
        and is_plain(around.combine, nn.Linear)
    ):
        return False
    layers_are = all(is_plain(linear, nn.Linear) for linear in linears if linear is not None)
    return layers_are and all(is_plain(activation, nn.SiLU) for activation in activations)


# --------------------------------------------------------------------------------------------------------- autograd


class _Call(NamedTuple):
    """One evaluation, and how to do it with ordinary layers."""

    net: FrozenNet
    graph: Graph
    layers: Callable[[Graph], Features]


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, vec: Tensor, dist: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor | None]:
        features, ctx.pull_back = call.net.encode(call.graph, vec, dist)
        ctx.call = call
        ctx.save_for_backward(vec, dist, *weights)
        return features.x, features.v

    @staticmethod
    @one_by_one
    def backward(ctx: Any, *grads: Any) -> Any:
        call: _Call = ctx.call
        vec, dist, *weights = ctx.saved_tensors
        needs = kernels.needed(ctx)[-2 - len(weights) :]
        if not torch.is_grad_enabled() and not any(needs[2:]):
            pull_back, ctx.pull_back = (
                ctx.pull_back,
                None,
            )  # energies may outlive their derivatives, the arrays need not
            if pull_back is None:
                _, pull_back = call.net.encode(call.graph, vec, dist)
            return None, *pull_back(*(None if g is None else g.contiguous() for g in grads)), *(None for _ in weights)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x.view_as(x) if again else x.detach().requires_grad_() for x in (vec, dist)]
            pairs = call.graph.pairs
            assert pairs is not None
            edge_dist = inputs[1].index_select(0, pairs.of_edge)
            moved = call.graph._replace(edge_vec=inputs[0], edge_dist=edge_dist, pairs=pairs._replace(dist=inputs[1]))
            made = call.layers(moved)
            known = [(y, g) for y, g in zip(made[:2], grads, strict=True) if y is not None and g is not None]
            found = torch.autograd.grad(
                [y for y, _ in known],
                [*inputs, *weights],
                [g for _, g in known],
                create_graph=again,
                allow_unused=True,
            )
        return None, *found
