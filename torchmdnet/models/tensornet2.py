"""TensorNet2: TensorNet whose atoms exchange charge, so that the total charge of a system is felt everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchmdnet.graph import Graph, sum_to_systems
from torchmdnet.models import tensornet
from torchmdnet.models.base import Features
from torchmdnet.models.tensornet import OPT, Group, Handedness, TensorEmbedding, TensorRepresentation, check_group
from torchmdnet.nn.activation import make_activation
from torchmdnet.nn.cutoff import CosineCutoff
from torchmdnet.nn.filters import RadialFunction
from torchmdnet.nn.mlp import MLP
from torchmdnet.nn.modules import layer_norm, reset_all
from torchmdnet.nn.radial import make_radial_basis
from torchmdnet.nn.repulsion import RepulsionZBL
from torchmdnet.nn.system_embedding import make_system_embedding
from torchmdnet.ops import kernels
from torchmdnet.ops.edge_network import (
    KEPT,
    EdgeInputs,
    EdgeNetwork,
    EdgeRun,
    edge_network_sum,
    edge_network_sum_plain,
)
from torchmdnet.ops.irreps import norms_by_part
from torchmdnet.ops.kernels import loops
from torchmdnet.ops.workspace import Buffer
from torchmdnet.tape.steps import Plain
from torchmdnet.tape.tape import Definitions, Run, Step
from torchmdnet.typing import AtomTensors, PairFeatures

__all__ = ["ChargePredict", "TensorNet2"]


class TensorNet2(TensorRepresentation):
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

    can_be_repeated = True

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
        self.system_embedding = make_system_embedding(system_embedding, hidden_channels, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        reset_all(self.distance_expansion, self.tensor_embedding, *self.layers, self.linear, self.out_norm)
        reset_all(self.charge_predict_0, *self.charge_predicts, self.system_embedding)

    @classmethod
    def reads_charge(cls, options: Mapping[str, Any]) -> bool:
        """See :meth:`torchmdnet.models.base.Representation.reads_charge`; the charges of the atoms add up to it."""
        has_readers = int(options["num_layers"]) > 0 or bool(options["output_charges"])
        return int(options["q_dim"]) > 0 and has_readers

    @property
    def interactions(self) -> list[Interaction]:
        """The layers."""
        return [cast(Interaction, layer) for layer in self.layers]

    @property
    def radial_functions(self) -> list[RadialFunction]:
        """The functions of distance: of the embedding, and what goes into the network of each layer."""
        parts = (RadialFunction(layer, "radial_part") for layer in self.layers)
        return [RadialFunction(self.tensor_embedding, "radial"), *parts]

    def program(self, tape: Any, graph: Graph) -> Features:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        functions, ones = self.radial_functions, graph.pos.new_ones(graph.num_atoms)
        X = self.tensor_embedding.program(tape, graph, functions[0], self)  # (N, 9, F)
        predicts: list[Any] = [self.charge_predict_0, *self.charge_predicts]
        charges = []
        for k, predict in enumerate(predicts):
            if k > 0:
                layer = self.interactions[k - 1]
                parts = tape(Plain(layer.charge_parts, layer), charges[-1])  # (N, 2 F)
                message = EdgeNetworkMessage(layer, functions[k])
                X = layer.program(tape, X, message, ones, parts)
            if k < len(self.layers) or self.output_charges:
                charges.append(tape(Plain(lambda X, predict=predict: predict(X, graph), predict), X))  # (N, q_dim)
        return self.outputs(tape, X, *(charges if self.output_charges else ()))

    @property
    def adds_energy(self) -> bool:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return self.repulsion is not None

    def added_energy(self, graph: Graph) -> Tensor | None:
        """See :class:`torchmdnet.models.taped.TapedRepresentation`."""
        return None if self.repulsion is None else self.repulsion(graph.z, graph.edge_index, graph.edge_dist)


class EdgeNetworkMessage(Step):
    """M_i = Σ_j c(r_ij) w_ij ⊙ Y_j with weights from the network of a layer, see :mod:`torchmdnet.ops.edge_network`.

    Inputs are Y (N, 9, F) and what charges bring as receiver and as sender, (N, 2 F).

    Args:
        layer: Whose network it is.
        function: What distances bring, :meth:`Interaction.radial_part`.
    """

    reads_geometry = True

    def __init__(self, layer: Interaction, function: RadialFunction) -> None:
        self.layer, self.function = layer, function
        self.network = layer.network()  # its weights with their history, where the program is tracked

    def definition(self, at: Definitions, *inputs: Tensor) -> Tensor:
        assert at.graph.pairs is not None
        Y, parts = inputs
        radial = self.layer.radial_part(at.radial.exact_rows)[:, 0]
        network_sum = edge_network_sum_plain if self.layer.training else edge_network_sum
        receiving, sending = parts.chunk(2, dim=1)
        return network_sum(Y, radial, receiving, sending, at.radial.envelope, self.network, at.graph)

    def value(self, run: Run, *inputs: Buffer) -> Buffer:
        at, tape = run.tape.geometry, run.tape
        run.Y, run.parts = inputs
        run.part = tape.tables.kept((self.function, "flat"), lambda: _flat(tape.tables.table(self.function)))
        run.network = EdgeRun(self.network, at.graph, at.places)
        keeps = tape.records and at.graph.edge_index.shape[1] <= KEPT
        with self._inputs(run, at.readings.coef, run.Y, run.parts, at.readings.fade) as given:
            return Buffer(run.network.forward(given, keeps, trains=tape.keeps))

    @contextmanager
    def _inputs(self, run: Run, coef: np.ndarray, Y: Buffer, parts: Buffer, fade: np.ndarray) -> Iterator[EdgeInputs]:
        """What the network reads, or how that changes; what distances bring, (P, F), is on memory that returns."""
        table, (receiving, sending) = run.part, (part.contiguous() for part in parts.tensor.chunk(2, dim=1))
        radial = run.tape.empty(coef.shape[0], table.shape[1])
        cell = run.tape.geometry.readings.cell
        loops.edge_network.read(coef.size * table.shape[1], coef, cell, table, radial.array)
        yield EdgeInputs(Y.tensor, radial.tensor, receiving, sending, torch.from_numpy(fade))

    def backward(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        at = run.tape.geometry
        (run.given,), read = grads, at.readings
        with self._inputs(run, read.coef, run.Y, run.parts, read.fade) as given:
            found, _ = run.network.backward(given, run.given.tensor, of_weights=False)
        if run.tape.keeps:
            run.of_radial = found.radial
        change = np.empty_like(read.coef)
        loops.edge_network.read_backward(6 * found.radial.numel(), read.cell, run.part, found.radial.numpy(), change)
        of_dist = np.einsum("pk,pk->p", change, read.slope, out=at.gradient_of_pairs(run))
        of_dist += read.steep * found.envelope.numpy()
        return Buffer(found.X), Buffer(torch.cat([found.receiving, found.sending], dim=1))

    def tangent(self, run: Run, *changes: Buffer | None) -> Buffer:
        with self._both(run, changes) as (given, moves):
            return Buffer(run.network.tangent(given, moves))

    @contextmanager
    def _both(self, run: Run, changes: Any) -> Iterator[tuple[EdgeInputs, EdgeInputs]]:
        """What the network reads, and how that changes."""
        at, zeros = run.tape.geometry, run.tape.zeros
        read = at.readings
        run.dx = [zeros(*x.shape) if dx is None else dx for x, dx in zip((run.Y, run.parts), changes, strict=True)]
        run.dcoef = read.slope * at.ddist[:, None]
        (dY, dparts), dfade = run.dx, read.steep * at.ddist
        values = self._inputs(run, read.coef, run.Y, run.parts, read.fade)
        with values as given, self._inputs(run, run.dcoef, dY, dparts, dfade) as moves:
            yield given, moves

    def reverse(self, run: Run, *grads: Buffer) -> tuple[Buffer, Buffer]:
        tape, read = run.tape, run.tape.geometry.readings
        with self._both(run, run.dx) as (given, moves):
            found, of_network = run.network.reverse(given, moves, grads[0].tensor, run.given.tensor)
        weights = [tensor for layer in self.network.layers for tensor in layer]
        for weight, grad in zip(weights, of_network, strict=True):
            tape.add(weight, grad)
        table, groups = tape.tables.table(self.function), 2 * kernels.cores.count()
        of_table = torch.zeros_like(table)
        sums = (found.radial.numpy(), run.of_radial.numpy(), groups, of_table.flatten(1).numpy())
        loops.edge_network.read_reverse(2 * read.coef.size * table.shape[-1], read.coef, run.dcoef, read.cell, *sums)
        tape.add(table, of_table)
        return Buffer(found.X), Buffer(torch.cat([found.receiving, found.sending], dim=1))


def _flat(table: Tensor) -> Any:
    return table.flatten(1).contiguous().numpy()


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
        c, f = self.q_mlp(layer_norm(self.q_norm, torch.cat([trace, squares], dim=-1))).chunk(2, dim=-1)
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

    def charge_parts(self, charges: Tensor) -> Tensor:
        """What an atom brings as receiver and as sender: (N, q_dim) -> (N, 2 F)."""
        _, receiving, sending = self._first
        return F.linear(charges, torch.cat([receiving, sending]))

    def network(self) -> EdgeNetwork:
        """The network from the first activation on."""
        rest: Any = self.linears_scalar[1:]
        return EdgeNetwork(self.act, [(linear.weight, linear.bias) for linear in rest])
