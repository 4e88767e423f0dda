"""TensorNet: Cartesian tensor features, 3×3 matrices on every atom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.models.base import Features, Representation
from torchmdnet.models.taped import TapedRepresentation
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.modules import reset_all, weights_of
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
from torchmdnet.ops.workspace import Buffer, Workspace
from torchmdnet.tape.geometry import TensorGeometry
from torchmdnet.tape.steps import Concatenate, Plain, activation, linear, norm
from torchmdnet.tape.tape import Run, Step, Tables
from torchmdnet.tape.tensors import (
    EmbedEdges,
    Interact,
    Mix,
    Normalize,
    Part,
    PartNorms,
    Refine,
    ScaleParts,
    SquaredNorm,
    TensorMessage,
)
from torchmdnet.typing import AtomicNumbers, PairFeatures, SystemIndex

__all__ = ["TensorNet"]

Group = Literal["O(3)", "SO(3)"]
Handedness = Literal["mirror", "legacy"]

#: Established names; there is one arithmetic here, so the switch to another one is off.
OPT = False
_compose_tensor, _decompose_tensor = compose_tensor, decompose_tensor
_tensor_matmul_o3, _tensor_matmul_so3 = tensor_matmul_o3, tensor_matmul_so3


class TensorRepresentation(TapedRepresentation):
    """Networks of tensors: how loops read their edges, and how features leave them."""

    has_vectors = True
    has_tensors = True

    tensor_embedding: TensorEmbedding
    out_norm: nn.Module
    linear: nn.Module
    act: nn.Module

    def fits_loops(self, weight: Tensor) -> bool:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return kernels.has_cpu_loops(weight, self.hidden_channels)

    def geometry(
        self, spline: Spline | None, graph: Graph, vec: Tensor, dist: Tensor, workspace: Workspace
    ) -> TensorGeometry:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return TensorGeometry(spline, self.envelope, graph, vec, dist, workspace, self.handedness_of_edges)

    @property
    def handedness_of_edges(self) -> float:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return self.tensor_embedding.sign

    def outputs(self, tape: Any, X: Any, *charges: Any) -> Features:
        """Features of tensors (N, 9, F): invariants (N, F), followed by charges if there are any, and parts of X."""
        x = tape(norm(self.out_norm), tape(PartNorms(), X))  # (N, 3 F)
        x = tape(activation(self.act), tape(linear(self.linear), x))  # (N, F)
        if charges:
            x = tape(Concatenate(), x, *charges)
        return Features(x, v=tape(Part(1, 4), X), S=tape(Part(4, 9), X))


class TensorNet(TensorRepresentation):
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

    takes_single_edges = True
    has_device_passes = True
    can_be_repeated = True

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
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(self.distance_expansion, self.tensor_embedding, *self.layers, self.linear, self.out_norm)
        reset_all(self.system_embedding)

    @classmethod
    def reads_charge(cls, options: Mapping[str, Any]) -> bool:
        """See :meth:`torchmdnet.models.base.Representation.reads_charge`; layers feel it by a factor of their own."""
        return int(options["num_layers"]) > 0

    def setup_for_inference(self, z: AtomicNumbers, batch: SystemIndex) -> None:
        """Kept for compatibility: inference needs no preparation."""

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance: of the embedding and of each layer."""
        return [RadialFunction(module, "radial") for module in (self.tensor_embedding, *self.layers)]

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        functions, charge = self.radial_functions, charge_factors(graph)
        X = self.tensor_embedding.program(tape, graph, functions[0], self)  # (N, 9, F)
        for layer, function in zip(cast(Any, self.layers), functions[1:], strict=True):
            X = layer.program(tape, X, TensorMessage(function), charge)
        return self.outputs(tape, X)


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

    @property
    def sign(self) -> float:
        """Sign of the antisymmetric part."""
        return -1.0 if self.handedness == "mirror" else 1.0

    def program(self, tape: Any, graph: Graph, function: RadialFunction, model: Representation) -> Any:
        """Embed the atoms of a graph, (N, 9, F).

        Args:
            tape: Where steps run.
            graph: The atoms.
            function: :meth:`radial`.
            model: Knows what atoms are told of their systems.
        """
        X = tape(EmbedEdges(function, self.sign), tape(_PairFactors(self, graph, model)))
        gate = tape(norm(self.init_norm), tape(SquaredNorm(), X))  # (N, F)
        for layer in self.linears_scalar:
            gate = tape(activation(self.act), tape(linear(layer), gate))  # at last (N, 3 F)
        mixed = tape(Mix((self, "mix"), weights_of(self.linears_tensor)), X)
        return tape(ScaleParts(), mixed, gate)


class _PairFactors(Plain):
    """What each atom adds to the factor Z of a pair, (N, 2, F); in evaluation those of the elements are kept."""

    def __init__(self, embedding: TensorEmbedding, graph: Graph, model: Representation) -> None:
        modules = embedding.emb, embedding.emb2, model.system_embedding
        super().__init__(lambda: embedding.factors(graph, model.system_features(graph)), *modules)
        self.embedding, self.graph, self.model = embedding, graph, model

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        return super().value(run, *inputs) if run.tape.keeps else Buffer(self.evaluated(run.tape.tables))

    def evaluated(self, tables: Tables) -> Tensor:
        """See :class:`torchmdnet.tape.steps.Plain`."""
        embedding, graph = self.embedding, self.graph

        def of_elements() -> Tensor:
            every = torch.arange(embedding.emb.num_embeddings, device=graph.z.device)
            return embedding.element_factors(every).detach()

        table = tables.kept((embedding, "elements"), of_elements)
        factors, of_systems = table.index_select(0, graph.z), self.model.system_features(graph)
        if of_systems is not None:
            factors += embedding.system_factors(of_systems, graph.batch)
        return factors


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
        for layer in self.linears_scalar:
            weight = self.act(layer(weight))
        return weight.unflatten(1, (3, self.hidden_channels))

    def program(self, tape: Any, X: Any, message: Step, charge: Tensor, *more: Any) -> Any:
        """Refine the tensors X (N, 9, F).

        Args:
            tape: Where steps run.
            X: Features so far.
            message: Sums the features of neighbours with the radial weights h, (N, 9, F) -> (N, 9, F).
            charge: The factor κ of each atom, (N,).
            more: Other inputs of the message.
        """
        weights = weights_of(self.linears_tensor)
        X = tape(Normalize(), X)
        Y = tape(Mix((self, "before"), weights[:3]), X)
        P = tape(Interact(charge, both=self.group == "O(3)"), Y, tape(message, Y, *more))
        return tape(Refine(charge), X, tape(Mix((self, "after"), weights[3:]), P))


def charge_factors(graph: Graph) -> Tensor:
    """How much each atom feels the total charge of its system, 1 + 0.1 q, (N,)."""
    return graph.pos.new_ones(graph.num_atoms) if graph.q is None else 1 + 0.1 * graph.q[graph.batch]


def check_group(group: str) -> None:
    """Refuse a group other than O(3) and SO(3)."""
    if group not in ("O(3)", "SO(3)"):
        raise ConfigError(f"equivariance_invariance_group: {group!r} is not available. Choose from O(3), SO(3).")
