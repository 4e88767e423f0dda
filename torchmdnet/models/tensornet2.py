"""TensorNet2: TensorNet whose atoms exchange charge, so that the total charge of a system is felt everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.graph import Graph, sum_to_systems
from torchmdnet.models import tensornet
from torchmdnet.models.base import Features, Pullback, Representation
from torchmdnet.models.tensornet import OPT, Group, Handedness, TensorEmbedding, check_group
from torchmdnet.models.tensornet2_fused import FrozenTensorNet2
from torchmdnet.models.tensornet_fused import encode
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import Radial, RadialFunction, Tables
from torchmdnet.nn.mlp import MLP, SiluLayers
from torchmdnet.nn.modules import is_plain, reset_all
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.nn.repulsion import RepulsionZBL
from torchmdnet.nn.spline import Spline
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.ops import kernels
from torchmdnet.ops.edge_network import EdgeNetwork, Spare, edge_network_sum, edge_network_sum_plain
from torchmdnet.ops.irreps import norms_by_part
from torchmdnet.ops.messages import rows_of_pairs
from torchmdnet.typing import AtomFeatures, AtomTensors, PairFeatures, PairScalars

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ChargePredict", "TensorNet2"]


class TensorNet2(Representation):
    r"""TensorNet with neural charge equilibration.

    The tensors are those of TensorNet (Simeon and De Fabritiis, NeurIPS 2023). Before the first layer and after each
    one, charges of ``q_dim`` channels are predicted for every atom and shared out so that they add up to the total
    charge of the system, as in AIMNet-NSE (Zubatyuk, Smith, Nebgen, Tretiak and Isayev, Nat. Commun. 2021). The charges
    of both atoms enter the filter of their edge in the next layer.

    Args:
        hidden_channels: Feature channels per atom (F).
        q_dim: Charge channels per atom; 0 is TensorNet without charges.
        num_layers: Interaction layers (L).
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
        output_charges: Whether the (L + 1) ``q_dim`` charges follow the features, layer by layer, for a head that
            reads them.
        repulsion: Whether to add the repulsion of nuclei, in eV, :class:`torchmdnet.nn.repulsion.RepulsionZBL`.
        handedness: Sign of the antisymmetric embedding, see :class:`torchmdnet.models.tensornet.TensorNet`.
        system_embedding: What each atom is told of its system beside its element: ``none``, ``charge``, ``spin`` or
            ``charge+spin``; see :class:`torchmdnet.nn.system_embedding.SystemEmbedding`.

    Raises:
        ConfigError: For an unknown ``rbf_type``, ``activation``, group or handedness.
    """

    has_vectors = True
    has_tensors = True

    def __init__(
        self,
        hidden_channels: int = 128,
        q_dim: int = 16,
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
        output_charges: bool = False,
        repulsion: bool = False,
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
        self.q_dim = q_dim
        self.equivariance_invariance_group = equivariance_invariance_group
        self.num_layers = num_layers
        self.num_rbf = num_rbf
        self.rbf_type = rbf_type
        self.activation = activation
        self.static_shapes = static_shapes
        self.output_charges = output_charges
        self.num_charges = (num_layers + 1) * q_dim if output_charges else 0
        self.opt = OPT
        self.repulsion = RepulsionZBL(max_z, dtype) if repulsion else None
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
        self.charge_predict_0 = ChargePredict(hidden_channels, activation, q_dim)
        self.layers, self.charge_predicts = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_layers):  # in turns: seeded results depend on it
            self.layers.append(
                Interaction(
                    num_rbf=num_rbf,
                    hidden_channels=hidden_channels,
                    q_dim=q_dim,
                    activation=activation,
                    group=equivariance_invariance_group,
                    dtype=dtype,
                )
            )
            self.charge_predicts.append(ChargePredict(hidden_channels, activation, q_dim))
        self.linear = nn.Linear(3 * hidden_channels, hidden_channels, dtype=dtype)
        self.out_norm = nn.LayerNorm(3 * hidden_channels, dtype=dtype)
        self.act = make_activation(activation)
        #: Memory that waits for the next evaluation.
        self.spare = Spare()
        self._frozen: FrozenTensorNet2 | None = None
        self._frozen_of: object = None
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_frozen": None, "_frozen_of": None}

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; what was made from the weights is forgotten."""
        self._frozen = self._frozen_of = None
        self.spare = Spare()
        return super().train(mode)

    def reset_parameters(self) -> None:
        reset_all(self.distance_expansion, self.tensor_embedding, *self.layers, self.linear, self.out_norm)
        reset_all(self.charge_predict_0, *self.charge_predicts, self.system_embedding)

    @classmethod
    def reads_charge(cls, options: Mapping[str, Any]) -> bool:
        """See :meth:`torchmdnet.models.base.Representation.reads_charge`; the charges of the atoms add up to it."""
        has_readers = int(options.get("num_layers", 2)) > 0 or "Coul" in str(options.get("output_model", ""))
        return int(options.get("q_dim", 0)) > 0 and (has_readers or bool(options.get("output_charges")))

    def encode(self, graph: Graph) -> Features:
        functions = self.radial_functions
        radial = self.radial(graph, self.distance_expansion, self.envelope, functions, self.training)

        def layer_by_layer(graph: Graph, radial: Radial) -> Tensor:
            assert graph.pairs is not None
            ones = graph.pos.new_ones(graph.num_atoms)
            rbf = self.distance_expansion(graph.pairs.dist)  # (P, K)
            of_systems = self.system_features(graph)
            X = self.tensor_embedding(radial(functions[0]), rows_of_pairs(graph), graph, of_systems)  # (N, 9, F)
            charges = [self.charge_predict_0(X, graph)]  # (N, q_dim) each
            for layer, predict in zip(self.interactions, self.charge_predicts, strict=True):
                X = layer(X, layer.gather(rbf, radial.envelope, charges[-1], graph, self.spare), ones)
                charges.append(predict(X, graph))
            return torch.cat([X.flatten(1), *charges], dim=1) if self.output_charges else X

        if self._can_fuse(graph, radial):

            def layers(graph: Graph) -> Tensor:
                again = self.radial(graph, self.distance_expansion, self.envelope, functions, self.training)
                return layer_by_layer(graph, again)

            assert radial.spline is not None
            assert radial.tables is not None
            frozen, keeps = self._freeze(radial.spline, radial.tables), graph.edge_vec.requires_grad
            encoder = frozen.encoder(graph, graph.pos.new_ones(graph.num_atoms), keeps and torch.is_grad_enabled())
            out = encode(encoder, graph, layers)
        else:
            out = layer_by_layer(graph, radial)
        if self.output_charges:
            tensors, charges = out.split([9 * self.hidden_channels, self.num_charges], dim=1)
            X = tensors.unflatten(1, (9, self.hidden_channels))
        else:
            X, charges = out, None
        x = self.act(self.linear(self.out_norm(norms_by_part(X))))  # (N, F)
        if charges is not None:
            x = torch.cat([x, charges], dim=-1)  # (N, F + (L + 1) q_dim)
        energy = None if self.repulsion is None else self.repulsion(graph.z, graph.edge_index, graph.edge_dist)
        return Features(x, v=X[:, 1:4], energy=energy, S=X[:, 4:9])

    def direct(self, like: Tensor) -> Callable[[Graph], tuple[Features, Pullback]] | None:
        """See :meth:`torchmdnet.models.base.Representation.direct`; not with charges for the head, nor repulsion."""
        is_usual = (type(self).encode, type(self).select) == (TensorNet2.encode, Representation.select)
        output = (self.linear, nn.Linear), (self.out_norm, nn.LayerNorm), (self.act, nn.SiLU)
        is_plain_output = all(is_plain(module, kind) for module, kind in output)
        if (
            self.training
            or not is_usual
            or not is_plain_output
            or not kernels.can_loop(self.linear.weight, self.hidden_channels)
        ):
            return None
        if self.output_charges or self.repulsion is not None:
            return None
        spline = self.radial.ready(like, self.distance_expansion, self.envelope, self.radial_functions)
        if spline is None:
            return None
        frozen, norm = self._freeze(spline, self.radial.tables), self.out_norm
        layers = [(self.linear.weight.detach(), self.linear.bias.detach())]
        output = SiluLayers(layers, (norm.weight.detach(), norm.bias.detach(), norm.eps))
        return lambda graph: frozen.encode(graph, graph.pos.new_ones(graph.num_atoms), output)

    @property
    def interactions(self) -> list[Interaction]:
        """The layers."""
        return [cast(Interaction, layer) for layer in self.layers]

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance: of the embedding, and what goes into the network of each layer."""
        parts = (RadialFunction(layer, "radial_part") for layer in self.layers)
        return [RadialFunction(self.tensor_embedding, "radial"), *parts]

    def _can_fuse(self, graph: Graph, radial: Radial) -> bool:
        """Whether the whole encoder can run as one operation: in inference where the loops can."""
        assert graph.pairs is not None
        return (
            radial.tables is not None
            and isinstance(self.act, nn.SiLU)
            and graph.pairs.reverse.shape == graph.pairs.of_edge.shape
            and graph.num_atoms > 0
            and kernels.can_loop(self.linear.weight, self.hidden_channels)
            and not graph.differentiates_systems
        )

    def _freeze(self, spline: Spline, tables: Tables) -> FrozenTensorNet2:
        """What is kept as long as the tables are, which are made again whenever a weight has changed."""
        if self._frozen is None or self._frozen_of is not tables:
            values = [tables[function].values for function in self.radial_functions]
            self._frozen, self._frozen_of = FrozenTensorNet2(self, spline, values), tables
        return self._frozen


class ChargePredict(nn.Module):
    r"""Charges that add up to the total charge of the system (AIMNet-NSE, Zubatyuk et al. 2021).

    .. math::
        [c \| f] = \mathrm{MLP}(\mathrm{LN}[\tfrac13 \mathrm{tr} X, \|A\|^2, \|S\|^2]), \qquad
        c_i \leftarrow c_i + \frac{f_i^2}{\sum_j f_j^2 + 10^{-6}} \Big(Q - \sum_j c_j\Big)

    for each channel. The small term keeps the quotient finite; the sum is Q up to its size.

    Args:
        hidden_channels: Feature channels per atom (F).
        activation: Activation function.
        q_dim: Charge channels.
        static_shapes: Kept for compatibility.
    """

    def __init__(self, hidden_channels: int, activation: str, q_dim: int = 16, static_shapes: bool = False) -> None:
        super().__init__()
        self.q_dim = q_dim
        self.q_norm = nn.LayerNorm(3 * hidden_channels)
        with warnings.catch_warnings():  # no channels, no weights: nothing to warn of
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.q_mlp = MLP(
                in_channels=3 * hidden_channels,
                out_channels=2 * q_dim,
                hidden_channels=hidden_channels,
                activation=activation,
                num_hidden_layers=1,
            )

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        reset_all(self.q_norm, self.q_mlp)

    def forward(self, X: AtomTensors, graph: Graph) -> Tensor:
        """Charges of the atoms in e: (N, 9, F) -> (N, q_dim)."""
        trace = X[:, 0] * 3**-0.5  # (N, F), a third of the trace
        squares = norms_by_part(X)[:, X.shape[-1] :]  # (N, 2 F)
        c, f = self.q_mlp(self.q_norm(torch.cat([trace, squares], dim=-1))).chunk(2, dim=-1)
        share = f.square()  # (N, q_dim)
        missing = -sum_to_systems(c, graph)  # (S, q_dim)
        if graph.q is not None:
            missing = missing + graph.q[:, None]
        per_share = missing / (sum_to_systems(share, graph) + 1e-6)  # (S, q_dim)
        return c + share * per_share.index_select(0, graph.batch)


class Interaction(tensornet.Interaction):
    r"""One layer of TensorNet whose radial weights also know the charges of both atoms, :math:`h(r_{ij}, c_i, c_j)`.

    The total charge enters through these alone, there is no factor κ.

    Args:
        num_rbf: Radial basis functions per edge (K).
        hidden_channels: Feature channels per atom (F).
        q_dim: Charge channels per atom.
        activation: Activation function.
        group: ``O(3)`` or ``SO(3)``.
        dtype: Precision of the weights.
    """

    def __init__(
        self,
        *,
        num_rbf: int,
        hidden_channels: int,
        q_dim: int,
        activation: str,
        group: Group,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            num_rbf=num_rbf + 2 * q_dim,
            hidden_channels=hidden_channels,
            activation=activation,
            group=group,
            dtype=dtype,
        )
        self.widths = (num_rbf, q_dim, q_dim)

    @property
    def _first(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of the first layer of the network: for the radial basis, the receiver and the sender."""
        radial, receiving, sending = cast(nn.Linear, self.linears_scalar[0]).weight.split(self.widths, dim=1)
        return radial, receiving, sending

    def radial_part(self, rbf: PairFeatures) -> Tensor:
        """What distances bring to the first activation: (P, K) -> (P, 1, F)."""
        return F.linear(rbf, self._first[0], cast(nn.Linear, self.linears_scalar[0]).bias)[:, None]

    def charge_parts(self, charges: Tensor) -> tuple[AtomFeatures, AtomFeatures]:
        """What an atom brings as receiver and as sender: (N, q_dim) -> (N, F), (N, F)."""
        _, receiving, sending = self._first
        return F.linear(charges, receiving), F.linear(charges, sending)

    def network(self, spare: Spare) -> EdgeNetwork:
        """The network from the first activation on."""
        rest: Any = self.linears_scalar[1:]
        return EdgeNetwork(self.act, [(linear.weight, linear.bias) for linear in rest], spare)

    def gather(
        self, rbf: PairFeatures, envelope: PairScalars, charges: Tensor, graph: Graph, spare: Spare
    ) -> Callable[[AtomTensors], AtomTensors]:
        """How this layer sums over neighbours.

        The first layer of the network is linear in the radial basis and in the charges of either atom, so the former
        is mapped on pairs and the latter on atoms, not on edges.
        """
        radial, (receiving, sending) = self.radial_part(rbf)[:, 0], self.charge_parts(charges)
        method = edge_network_sum_plain if self.training else edge_network_sum
        return lambda X: method(X, radial, receiving, sending, envelope, self.network(spare), graph)
