"""TensorNet2's tensors and charges and their derivative in the geometry as one operation, for inference on the CPU.

The layers are those of :mod:`torchmdnet.models.tensornet2`. Here they call the compiled loops one after another, on
memory that is kept between calls, and the way back through them is written out. The small parts between, charges and
what depends on distances alone, are left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from torchmdnet.graph import Graph
from torchmdnet.models.tensornet_fused import Encoder, FrozenTensorNet
from torchmdnet.nn.spline import Spline
from torchmdnet.ops import kernels
from torchmdnet.ops.edge_network import KEPT, EdgeInputs, EdgeRun

if TYPE_CHECKING:
    from torchmdnet.models.tensornet2 import TensorNet2

__all__ = ["FrozenTensorNet2"]


class FrozenTensorNet2(FrozenTensorNet):
    """What evaluation keeps of a TensorNet2 between calls.

    Args:
        model: Where the weights come from; those of the networks on edges and of the charges are read in every call.
        spline: The grid that functions of distance are read from.
        tables: Spline coefficients of the embedding's filter (R, 3, F), and for each layer of what distances bring to
            its network on edges, (R, 1, F).
    """

    def __init__(self, model: TensorNet2, spline: Spline, tables: list[Tensor]) -> None:
        super().__init__(cast(Any, model), spline, tables[:1])
        self.model, self.spline = model, spline
        self.parts = [table.flatten(1).numpy() for table in tables[1:]]

    def encoder(self, graph: Graph, charge: Tensor, keeps: bool = True) -> Any:
        """The network on one graph.

        Args:
            graph: The atoms.
            charge: The factor κ of each atom, (N,), which is 1.
            keeps: Whether the way back will be asked for.
        """
        return _Encoder(self, super().encoder(graph, charge), graph, keeps)


class _Encoder:
    """The layers of a TensorNet2 on one graph, and their derivatives; see :class:`FrozenTensorNet2`."""

    made = None
    stamp: Any = None

    def __init__(self, frozen: FrozenTensorNet2, embedding: Encoder, graph: Graph, keeps: bool) -> None:
        self.frozen, self.embedding, self.graph = frozen, embedding, graph
        self.model, self.spare = frozen.model, frozen.model.spare
        self.mixers, self.is_symmetric = frozen.mixers, frozen.frame.is_symmetric
        self.charge, self.parameters = embedding.charge, list(frozen.model.parameters())
        self.shape, self.dtype = embedding.shape, embedding.Z.dtype
        self.records, self.keeps = keeps, keeps and graph.edge_index.shape[1] <= KEPT
        self.notes: Any = None
        self.held: list[np.ndarray] = []

    def _take(self) -> np.ndarray:
        """A tensor of all atoms, with anything in it."""
        N, _, channels = self.shape
        array = self.spare.take(N, 9 * channels, self.dtype).reshape(self.shape)
        self.held.append(array)
        return array

    def _give(self, *arrays: np.ndarray) -> None:
        """Let others have what nobody reads any more."""
        self.held = [x for x in self.held if not any(x is array for array in arrays)]
        self.spare.give(arrays)

    def __del__(self) -> None:
        self._give(*self.held)

    def forward(self, vec: Tensor, dist: Tensor) -> Tensor:
        """Tensors of all atoms, (N, 9, F), or followed by the charges, if the model puts these out, (N, 9 F + ...)."""
        nodes, model, graph = kernels.node_loops(), self.model, self.graph
        size, records = math.prod(self.shape), self.records
        self._give(*self.held)
        out = self.embedding.forward(vec, dist)
        self.cell = self.frozen.spline.locate(dist).cell.numpy()
        self.radial = _Recorded(
            lambda dist: [model.envelope(dist), self.frozen.spline.locate(dist).coef], dist, records=records
        )
        envelope, self.coef = self.radial.values()
        self.charges = [_Recorded(lambda X: [model.charge_predict_0(X, graph)], out, records=records)]
        self.layers: list[_Layer] = []
        for k, layer in enumerate(model.interactions):
            X, normed, Y = out.numpy(), self._take(), self._take()
            nodes.normalize(8 * size, X, normed)
            self.mixers[2 * k + 1].forward(normed, Y)
            parts = _Recorded(layer.charge_parts, *self.charges[-1].values(), records=records)
            receiving, sending = parts.values()
            radial = self._read(k)
            inputs = EdgeInputs(torch.from_numpy(Y), torch.from_numpy(radial), receiving, sending, envelope)
            run = EdgeRun(layer.network(self.spare), graph)
            M, P, D = run.forward(inputs, self.keeps).numpy(), self._take(), self._take()
            self.spare.give([radial])
            inputs = inputs._replace(radial=torch.from_numpy(radial[:0]))  # the rest is lent to others
            nodes.interact(16 * size, Y, M, self.charge, self.is_symmetric, P)
            self.mixers[2 * k + 2].forward(P, D)
            self._give(P)
            out = torch.empty(self.shape, dtype=self.dtype)
            nodes.refine(16 * size, normed, D, self.charge, out.numpy())
            self._give(normed)
            self.layers.append(_Layer(X, Y, M, D, inputs, parts, run))
            if k + 1 < len(model.interactions) or model.output_charges:
                predict = model.charge_predicts[k]
                self.charges.append(_Recorded(lambda X, predict=predict: [predict(X, graph)], out, records=records))
        self.notes = self.layers
        if not model.output_charges:
            return out
        return torch.cat([out.flatten(1), *(charges.values()[0] for charges in self.charges)], dim=1)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the vectors of the edges (E, 3) and the distances of the pairs (P,)."""
        nodes, loops, size = kernels.node_loops(), kernels.edge_network_loops(), math.prod(self.shape)
        of_charges: list[Tensor | None] = [None] * (len(self.layers) + 1)
        if self.model.output_charges:
            grad, *of_charges = grad.split([9 * self.shape[2], *[self.model.q_dim] * len(of_charges)], dim=1)
        g = self._take()
        g[...] = grad.numpy().reshape(self.shape)
        of_envelope, of_coef = (torch.zeros_like(x) for x in self.radial.values())
        change = torch.empty_like(of_coef)
        for k in reversed(range(len(self.layers))):
            X, Y, M, D, inputs, parts, run = self.layers[k]
            self._add(k + 1, of_charges, g)
            of_D, of_P, of_Y, of_M = self._take(), self._take(), self._take(), self._take()
            nodes.refine_backward(16 * size, D, self.charge, g, of_D)
            self.mixers[2 * k + 2].backward(of_D, of_P)
            nodes.interact_backward(48 * size, Y, M, self.charge, self.is_symmetric, of_P, of_Y, of_M)
            radial = self._read(k)
            inputs = inputs._replace(radial=torch.from_numpy(radial))
            found, _ = run.backward(inputs, torch.from_numpy(of_M), of_weights=False)
            self.spare.give([radial])
            np.add(of_Y, found.X.numpy(), out=of_Y)
            of_envelope += found.envelope
            arrays = (self.cell, self.frozen.parts[k], found.radial.numpy(), change.numpy())
            loops.read_backward(6 * found.radial.numel(), *arrays)
            of_coef += change
            (more,) = parts.backward(found.receiving, found.sending)
            known = of_charges[k]
            of_charges[k] = more if known is None else known + more
            self.mixers[2 * k + 1].backward(of_Y, of_D)
            np.add(of_D, g, out=of_D)
            nodes.normalize_backward(8 * size, X, of_D, g)
            self._give(of_D, of_P, of_Y, of_M, Y, D)
            self.layers[k] = _Layer(*[None] * len(_Layer._fields))
        self._add(0, of_charges, g)
        of_vec, of_dist = self.embedding.backward(torch.from_numpy(g))
        self._give(g)
        if self.layers:
            of_dist += self.radial.backward(of_envelope, of_coef)[0]
        self.layers, self.charges, self.embedding.notes = [], [], None
        return of_vec, of_dist

    def _read(self, k: int) -> np.ndarray:
        """What distances bring to the network of a layer, (P, F)."""
        coef, table = self.coef.numpy(), self.frozen.parts[k]
        out = self.spare.take(coef.shape[0], table.shape[1], self.dtype)
        kernels.edge_network_loops().read(coef.size * table.shape[1], coef, self.cell, table, out)
        return out

    def _add(self, k: int, of_charges: Sequence[Tensor | None], g: np.ndarray) -> None:
        """Let the gradient in the tensors after k layers grow by what the charges made of them bring."""
        of_charge = of_charges[k]
        if of_charge is not None:
            (more,) = self.charges[k].backward(of_charge)
            np.add(g, more.numpy(), out=g)


class _Layer(NamedTuple):
    """What a layer read and made."""

    X: Any
    Y: Any
    M: Any
    D: Any
    inputs: Any
    parts: Any
    run: Any


class _Recorded:
    """A part that PyTorch differentiates.

    Args:
        part: Tensors to tensors.
        inputs: Whose gradients :meth:`backward` finds.
        records: Whether anybody will ask for them.
    """

    def __init__(self, part: Callable[..., Sequence[Tensor]], *inputs: Tensor, records: bool) -> None:
        with torch.set_grad_enabled(records):
            self.inputs = [x.detach().requires_grad_(records) for x in inputs]
            self.outputs = part(*self.inputs)

    def values(self) -> list[Tensor]:
        return [x.detach() for x in self.outputs]

    def backward(self, *grads: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(self.outputs, self.inputs, grads)
