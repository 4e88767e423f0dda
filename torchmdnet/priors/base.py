"""What every prior shares."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from torchmdnet.graph import Graph, bare_graph

__all__ = ["BasePrior", "HasAtomref"]


class HasAtomref(Protocol):
    """Anything that knows reference energies of isolated atoms."""

    def get_atomref(self, max_z: int = 100) -> Tensor | None:
        """Energy of each element, (max_z, 1), or None."""
        ...


class BasePrior(nn.Module):
    """Base of all priors: a term added to the output, to atoms or to systems.

    A subclass writes ``per_atom(graph)`` or ``per_system(graph)``, and ``get_init_args()`` so that a checkpoint can
    rebuild it. Priors written for older releases override :meth:`pre_reduce` and :meth:`post_reduce` instead; both
    keep working.

    Args:
        dataset: The data set in training, for priors that ask it for something; not kept.
    """

    #: Whether positions are read, or pairs other than the edges of the graph; heads say so too.
    needs_positions = True

    def __init__(self, dataset: Any = None) -> None:
        super().__init__()

    def reset_parameters(self) -> None:
        """Restore initial parameters."""

    def get_init_args(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this prior without a data set."""
        return {}

    def per_atom(self, graph: Graph) -> Tensor | None:
        """Term added to each atom, (N, 1), or None."""
        return None

    def per_system(self, graph: Graph) -> Tensor | None:
        """Term added to each system, (S, 1), or None."""
        return None

    def pre_reduce(
        self, x: Tensor, z: Tensor, pos: Tensor, batch: Tensor, extra_args: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Established hook: change per-atom values x (N, 1); by default :meth:`per_atom` is added."""
        term = self.per_atom(bare_graph(z, pos, batch, extra=extra_args))
        return x if term is None else x + term

    def post_reduce(
        self,
        y: Tensor,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        box: Tensor | None = None,
        extra_args: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Established hook: change per-system values y (S, 1); by default :meth:`per_system` is added."""
        term = self.per_system(bare_graph(z, pos, batch, box, extra_args, num_systems=y.shape[0]))
        return y if term is None else y + term

    def add_to_atoms(self, x: Tensor, graph: Graph) -> Tensor:
        """Apply the per-atom term to x (N, 1), whichever way it was written."""
        if type(self).pre_reduce is not BasePrior.pre_reduce:
            return self.pre_reduce(x, graph.z, graph.pos, graph.batch, graph.extra)
        term = self.per_atom(graph)
        return x if term is None else x + term

    def add_to_systems(self, y: Tensor, graph: Graph) -> Tensor:
        """Apply the per-system term to y (S, 1), whichever way it was written."""
        if type(self).post_reduce is not BasePrior.post_reduce:
            return self.post_reduce(y, graph.z, graph.pos, graph.batch, graph.box, graph.extra)
        term = self.per_system(graph)
        return y if term is None else y + term
