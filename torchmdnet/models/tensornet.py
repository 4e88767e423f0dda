"""TensorNet: Cartesian tensor features, 3×3 matrices on every atom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.models.base import Features, Pullback, Representation
from torchmdnet.models.tensornet_fused import Encoder, FrozenTensorNet, TrainedTensorNet, encode
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import Radial, RadialFunction, Tables
from torchmdnet.nn.mlp import SiluLayers
from torchmdnet.nn.modules import is_plain, reset_all, weights_of
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.nn.spline import Spline
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.ops import kernels
from torchmdnet.ops.cartesian import (
    compose_tensor,
    decompose_tensor,
    tensor_matmul_o3,
    tensor_matmul_so3,
)
from torchmdnet.ops.irreps import (
    harmonics,
    interact,
    mix_channels,
    normalize,
    norms_by_part,
    refine,
    scale_parts,
    squared_norm,
)
from torchmdnet.ops.messages import EdgeRows, RadialFilter, embed_edges, gather_weight_sum, rows_of_pairs
from torchmdnet.typing import AtomicNumbers, AtomTensors, PairFeatures, SystemIndex

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TensorNet"]

Group = Literal["O(3)", "SO(3)"]
Handedness = Literal["mirror", "legacy"]

#: Established names; there is one arithmetic here, so the switch to another one is off.
OPT = False
_compose_tensor, _decompose_tensor = compose_tensor, decompose_tensor
_tensor_matmul_o3, _tensor_matmul_so3 = tensor_matmul_o3, tensor_matmul_so3


class TensorNet(Representation):
    r"""TensorNet (Simeon and De Fabritiis, NeurIPS 2023).

    Each atom carries F channels of 3×3 matrices :math:`X = I + A + S`, embedded from its surroundings and refined by
    layers of message passing and matrix products. The invariant output is

    .. math:: x = \sigma(W\, \mathrm{LN}[\|I\|^2, \|A\|^2, \|S\|^2] + b).

    Args:
        hidden_channels: Feature channels per atom (F).
        num_layers: Interaction layers.
        num_rbf: Radial basis functions per edge (K).
        rbf_type: Kind of radial basis.
        trainable_rbf: Whether the radial basis is trained.
        activation: Activation function.
        cutoff_lower: Edges are at least this long, in Å.
        cutoff_upper: Edges are shorter than this, in Å.
        max_num_neighbors: Kept for compatibility; pairs are never dropped.
        max_z: Rows of the element embedding; atomic numbers are below this.
        equivariance_invariance_group: ``O(3)``, blind to reflections, or ``SO(3)``, which tells mirror images apart.
        static_shapes: Kept for compatibility; results never depended on it.
        dtype: Precision of the weights.
        box_vecs: Lattice vectors used when a call brings none, (3, 3) or (S, 3, 3) Å.
        handedness: Sign of the antisymmetric embedding, which only ``SO(3)`` can see. ``legacy`` is the sign of files
            in the old tensor layout.
        system_embedding: What each atom is told of its system beside its element: ``none``, ``charge``, ``spin`` or
            ``charge+spin``; see :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.
    """

    has_vectors = True
    has_tensors = True

    def __init__(
        self,
        hidden_channels: int = 128,
        num_layers: int = 2,
        num_rbf: int = 32,
        rbf_type: str = "expnorm",
        trainable_rbf: bool = False,
        activation: str = "silu",
        cutoff_lower: float = 0.0,
        cutoff_upper: float = 4.5,
        max_num_neighbors: int = 64,
        max_z: int = 128,
        equivariance_invariance_group: Group = "O(3)",
        static_shapes: bool = True,
        dtype: torch.dtype = torch.float32,
        box_vecs: Tensor | None = None,
        handedness: Handedness = "mirror",
        system_embedding: str = "none",
    ) -> None:
        super().__init__(
            cutoff_lower=cutoff_lower,
            cutoff_upper=cutoff_upper,
            max_z=max_z,
            loop=True,
            box_vecs=box_vecs,
            max_num_neighbors=max_num_neighbors,
        )
        check_group(equivariance_invariance_group)
        self.hidden_channels = hidden_channels
        self.equivariance_invariance_group = equivariance_invariance_group
        self.num_layers = num_layers
        self.num_rbf = num_rbf
        self.rbf_type = rbf_type
        self.activation = activation
        self.static_shapes = static_shapes
        self.opt = OPT
        self.distance_expansion = make_radial_basis(rbf_type, cutoff_lower, cutoff_upper, num_rbf, trainable_rbf)
        self.envelope = CosineCutoff(cutoff_lower, cutoff_upper)
        self.tensor_embedding = TensorEmbedding(
            hidden_channels=hidden_channels,
            num_rbf=num_rbf,
            activation=activation,
            max_z=max_z,
            dtype=dtype,
            handedness=handedness,
        )
        self.layers = nn.ModuleList(
            Interaction(
                num_rbf=num_rbf,
                hidden_channels=hidden_channels,
                activation=activation,
                group=equivariance_invariance_group,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.linear = nn.Linear(3 * hidden_channels, hidden_channels, dtype=dtype)
        self.out_norm = nn.LayerNorm(3 * hidden_channels, dtype=dtype)
        self.act = make_activation(activation)
        self._frozen: FrozenTensorNet | None = None
        self._frozen_of: object = None
        self._trained = TrainedTensorNet()
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frozen": None, "_frozen_of": None, "_trained": TrainedTensorNet()}

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; what was made from the weights is forgotten."""
        self._frozen = self._frozen_of = None
        self._trained = TrainedTensorNet()
        return super().train(mode)

    def reset_parameters(self) -> None:
        reset_all(self.distance_expansion, self.tensor_embedding, *self.layers, self.linear, self.out_norm)
        reset_all(self.system_embedding)

    @classmethod
    def reads_charge(cls, options: Mapping[str, Any]) -> bool:
        """See :meth:`torchmdnet.models.base.Representation.reads_charge`; layers feel it by a factor of their own."""
        return int(options.get("num_layers", 2)) > 0

    def setup_for_inference(self, z: AtomicNumbers, batch: SystemIndex) -> None:
        """Kept for compatibility: inference needs no preparation."""

    def encode(self, graph: Graph) -> Features:
        functions = self.radial_functions
        radial = self.radial(graph, self.distance_expansion, self.envelope, functions, self.training)
        charge = charge_factors(graph)

        def layer_by_layer(graph: Graph, radial: Radial) -> AtomTensors:
            edges = rows_of_pairs(graph)
            of_systems = self.system_features(graph)
            X = self.tensor_embedding(radial(functions[0]), edges, graph, of_systems)  # (N, 9, F)
            for layer, function in zip(self.layers, functions[1:], strict=True):
                X = layer(X, partial(gather_weight_sum, filter=radial(function), edges=edges), charge)
            return X

        encoder = self._encoder(graph, charge, radial)
        if encoder is None:
            X = layer_by_layer(graph, radial)
        else:

            def layers(graph: Graph) -> AtomTensors:
                again = self.radial(graph, self.distance_expansion, self.envelope, functions, self.training)
                return layer_by_layer(graph, again)

            X = encode(encoder, graph, layers)
        x = self.act(self.linear(self.out_norm(norms_by_part(X))))  # (N, F)
        return Features(x, v=X[:, 1:4], S=X[:, 4:9])

    def direct(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :meth:`torchmdnet.models.base.Representation.direct`."""
        is_usual = (type(self).encode, type(self).select) == (TensorNet.encode, Representation.select)
        output = (self.linear, nn.Linear), (self.out_norm, nn.LayerNorm), (self.act, nn.SiLU)
        is_plain_output = all(is_plain(module, kind) for module, kind in output)
        if (
            self.training
            or not is_usual
            or not is_plain_output
            or not kernels.can_loop(self.linear.weight, self.hidden_channels)
        ):
            return None
        spline = self.radial.ready(like, self.distance_expansion, self.envelope, self.radial_functions)
        if spline is None:
            return None
        frozen, norm = self._freeze(spline, self.radial.tables), self.out_norm
        output = SiluLayers([(self.linear.weight, self.linear.bias)], (norm.weight, norm.bias, norm.eps))
        return lambda graph: frozen.encode(graph, charge_factors(graph), output)

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance: of the embedding and of each layer."""
        return [RadialFunction(module, "radial") for module in (self.tensor_embedding, *self.layers)]

    def _encoder(self, graph: Graph, charge: Tensor, radial: Radial) -> Encoder | None:
        """The whole encoder as one operation, where the loops can run; for training, only where it is about forces."""
        assert graph.pairs is not None
        can_run = graph.num_atoms > 0 and kernels.can_loop(self.linear.weight, self.hidden_channels)
        if graph.differentiates_systems or not can_run:
            return None
        if radial.tables is None:
            is_about_forces = self.training and graph.edge_vec.requires_grad and torch.is_grad_enabled()
            return self._trained.encoder(self, graph, charge, radial) if is_about_forces else None
        if not isinstance(self.act, nn.SiLU):
            return None
        assert radial.spline is not None
        return self._freeze(radial.spline, radial.tables).encoder(graph, charge)

    def _freeze(self, spline: Spline, tables: Tables) -> FrozenTensorNet:
        """What is kept as long as the tables are, which are made again whenever a weight has changed."""
        if self._frozen is None or self._frozen_of is not tables:
            values = [tables[function].values for function in self.radial_functions]
            self._frozen, self._frozen_of = FrozenTensorNet(self, spline, values), tables
        return self._frozen


class TensorEmbedding(nn.Module):
    r"""Tensors of an atom from the elements and directions around it (eqs. 5 to 9 of the paper).

    .. math::
        X_i = \sum_j C(r_{ij})\, Z_{ij} \odot (f_0 1 + f_1 [u_{ij}]_\times + f_2 (u_{ij} u_{ij}^T - 1/3)), \quad
        Z_{ij} = W [z_i \| z_j] + b

    followed by gates from an MLP of :math:`\|X_i\|^2`. The pair factor is a sum of one term for each atom, so it is
    computed on atoms, not on edges.

    Args:
        hidden_channels: Feature channels per atom (F).
        num_rbf: Radial basis functions per edge (K).
        activation: Activation function.
        max_z: Rows of the element embedding.
        dtype: Precision of the weights.
        handedness: Sign of the antisymmetric part; see :class:`TensorNet`.
    """

    def __init__(
        self,
        *,
        hidden_channels: int,
        num_rbf: int,
        activation: str,
        max_z: int,
        dtype: torch.dtype,
        handedness: Handedness,
    ) -> None:
        super().__init__()
        channels = hidden_channels
        if handedness not in ("mirror", "legacy"):
            raise ConfigError(f"handedness: {handedness!r} is not available. Choose from mirror, legacy.")
        self.hidden_channels = channels
        self.handedness = handedness
        self.opt = OPT
        self.distance_proj1 = nn.Linear(num_rbf, channels, dtype=dtype)
        self.distance_proj2 = nn.Linear(num_rbf, channels, dtype=dtype)
        self.distance_proj3 = nn.Linear(num_rbf, channels, dtype=dtype)
        self.emb = nn.Embedding(max_z, channels, dtype=dtype)
        self.emb2 = nn.Linear(2 * channels, channels, dtype=dtype)
        self.act = make_activation(activation)
        self.linears_tensor = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.linears_scalar = nn.ModuleList(
            [
                nn.Linear(channels, 2 * channels, dtype=dtype),
                nn.Linear(2 * channels, 3 * channels, dtype=dtype),
            ]
        )
        self.init_norm = nn.LayerNorm(channels, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(
            self.distance_proj1,
            self.distance_proj2,
            self.distance_proj3,
            self.emb,
            self.emb2,
            *self.linears_tensor,
            *self.linears_scalar,
            self.init_norm,
        )

    def radial(self, rbf: PairFeatures) -> Tensor:
        """Radial weights of the three parts, a function of distance alone: (P, K) -> (P, 3, F)."""
        projections = (self.distance_proj1, self.distance_proj2, self.distance_proj3)
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections])
        return F.linear(rbf, weight, bias).unflatten(1, (3, self.hidden_channels))

    def element_factors(self, z: AtomicNumbers) -> Tensor:
        """What each atom adds to the pair factor Z as receiver and as sender: (N,) -> (N, 2, F)."""
        receiving, sending = self.emb2.weight.split(self.hidden_channels, dim=1)
        table = self.emb.weight
        factors = torch.stack([F.linear(table, receiving, self.emb2.bias), F.linear(table, sending)], dim=1)
        return factors.index_select(0, z)

    def system_factors(self, of_systems: Tensor, batch: SystemIndex) -> Tensor:
        """What each atom adds besides, as its element's features grow by those of its system: (S, F) -> (N, 2, F)."""
        receiving, sending = self.emb2.weight.split(self.hidden_channels, dim=1)
        factors = torch.stack([F.linear(of_systems, receiving), F.linear(of_systems, sending)], dim=1)
        return factors.index_select(0, batch)

    def factors(self, graph: Graph, of_systems: Tensor | None) -> Tensor:
        """All that each atom adds to the pair factor Z as receiver and as sender, (N, 2, F)."""
        factors = self.element_factors(graph.z)
        return factors if of_systems is None else factors + self.system_factors(of_systems, graph.batch)

    def forward(
        self, filter: RadialFilter, edges: EdgeRows, graph: Graph, of_systems: Tensor | None = None
    ) -> AtomTensors:
        """Embed the atoms of a graph, (N, 9, F).

        Args:
            filter: The radial weights of its edges.
            edges: Its edges.
            graph: The atoms.
            of_systems: Added to the features of the elements, (S, F).
        """
        r = graph.edge_dist[:, None]
        direction = graph.edge_vec / torch.where(r == 0, 1.0, r)  # (E, 3), zero for self loops
        Y = harmonics(direction, handedness=-1.0 if self.handedness == "mirror" else 1.0)  # (E, 9)
        X = embed_edges(Y, filter, self.factors(graph, of_systems), edges)  # (N, 9, F)

        gate = self.init_norm(squared_norm(X))  # (N, F)
        for linear in self.linears_scalar:
            gate = self.act(linear(gate))
        gate = gate.unflatten(1, (3, self.hidden_channels))  # (N, 3, F)
        return scale_parts(mix_channels(X, weights_of(self.linears_tensor)), gate)


class Interaction(nn.Module):
    r"""One layer of message passing (eqs. 10 to 13 of the paper).

    .. math::
        X &\leftarrow X / (\|X\|^2 + 1), \quad Y = W X \text{ by parts}, \quad
        M_i = \sum_j h(r_{ij}) \odot Y_j \\
        P &= \kappa\, (Y M + M Y) \text{ for O(3)}, \quad 2\, Y M \text{ for SO(3)} \\
        X &\leftarrow X + \Delta X + \kappa\, \Delta X^2, \quad \Delta X = W' P / (\|P\|^2 + 1)

    with :math:`\kappa = 1 + 0.1\, q` of the system's total charge q.

    Args:
        num_rbf: Radial basis functions per edge (K).
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        group: ``O(3)`` or ``SO(3)``.
        dtype: Precision of the weights.
    """

    def __init__(
        self, *, num_rbf: int, hidden_channels: int, activation: str, group: Group, dtype: torch.dtype
    ) -> None:
        super().__init__()
        channels = hidden_channels
        self.hidden_channels = channels
        self.group = group
        self.opt = OPT
        self.linears_scalar = nn.ModuleList(
            [
                nn.Linear(num_rbf, channels, dtype=dtype),
                nn.Linear(channels, 2 * channels, dtype=dtype),
                nn.Linear(2 * channels, 3 * channels, dtype=dtype),
            ]
        )
        self.linears_tensor = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(6))
        self.act = make_activation(activation)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(*self.linears_scalar, *self.linears_tensor)

    def radial(self, rbf: PairFeatures) -> Tensor:
        """Radial weights of the three parts, a function of distance alone: (P, K) -> (P, 3, F)."""
        weight = rbf
        for linear in self.linears_scalar:
            weight = self.act(linear(weight))
        return weight.unflatten(1, (3, self.hidden_channels))

    def forward(self, X: AtomTensors, gather: Callable[[AtomTensors], AtomTensors], charge: Tensor) -> AtomTensors:
        """Refine the tensors X (N, 9, F).

        Args:
            X: Features so far.
            gather: Sums the features of neighbours with the radial weights h, (N, 9, F) -> (N, 9, F).
            charge: The factor κ of each atom, (N,).
        """
        weights = weights_of(self.linears_tensor)
        before, after = weights[:3], weights[3:]
        X = normalize(X)
        Y = mix_channels(X, before)
        M = gather(Y)
        is_symmetric = self.group == "O(3)"
        P = interact(Y, M, charge if is_symmetric else torch.ones_like(charge), both=is_symmetric)
        return refine(X, mix_channels(P, after), charge)


def charge_factors(graph: Graph) -> Tensor:
    """How much each atom feels the total charge of its system, 1 + 0.1 q, (N,)."""
    return graph.pos.new_ones(graph.num_atoms) if graph.q is None else 1 + 0.1 * graph.q[graph.batch]


def check_group(group: str) -> None:
    """Refuse a group other than O(3) and SO(3)."""
    if group not in ("O(3)", "SO(3)"):
        raise ConfigError(f"equivariance_invariance_group: {group!r} is not available. Choose from O(3), SO(3).")
