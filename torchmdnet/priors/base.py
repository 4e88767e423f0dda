"""What every prior shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchmdnet.errors import DataError
from torchmdnet.graph import Graph, bare_graph

__all__ = ["BasePrior", "HasAtomref", "stated_energies"]


@runtime_checkable
class HasAtomref(Protocol):
    """Anything that knows reference energies of isolated atoms."""

    @property
    def get_atomref(self) -> Callable[..., Tensor | None]:
        """Called as ``get_atomref(max_z)``, or ``get_atomref()``: energies of elements, (max_z, 1), or None."""
        ...


def stated_energies(source: HasAtomref, max_z: int | None = None) -> Tensor | None:
    """The reference energies that a data set states, whether its ``get_atomref`` takes ``max_z`` or nothing.

    Args:
        source: The data set.
        max_z: Least number of rows; a shorter table is filled up with zeros. None leaves the number to the data set.

    Returns:
        Energy of each element as the data set states it, one a row; None where it states none.

    Raises:
        DataError: If the table does not hold one number for each element.
    """
    call = source.get_atomref
    if _accepts(call) and (max_z is None or not _accepts(call, max_z)):
        table = call()
    else:
        table = call(100 if max_z is None else max_z)
    if table is None:
        return None
    table = torch.as_tensor(table)
    if table.ndim not in (1, 2) or table.numel() != len(table):
        raise DataError(
            f"{type(source).__name__}.get_atomref() has shape {tuple(table.shape)} instead of (max_z, 1): one energy "
            "for each atomic number, from 0."
        )
    table = table.reshape(-1, 1)
    return torch.cat([table, table.new_zeros(max(0, (max_z or 0) - len(table)), 1)])


def _accepts(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a signature that Python does not know
        return True
    return True


class BasePrior(nn.Module):
    """Base of all priors: a term added to the output, to atoms or to systems.

    A subclass writes ``per_atom(graph)`` or ``per_system(graph)``, and ``get_init_args()`` so that a checkpoint can
    rebuild it. Priors written for older releases override :meth:`pre_reduce` and :meth:`post_reduce` instead; both
    keep working.

    Args:
        dataset: The data set in training, for priors that need reference energies or units of it; not kept.
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
        """Established hook: change per-atom values x, (N, 1) or (N,); by default :meth:`per_atom` is added."""
        return _plus(x, self.per_atom(bare_graph(z, pos, batch, extra=extra_args)))

    def post_reduce(
        self,
        y: Tensor,
        z: Tensor,
        pos: Tensor,
        batch: Tensor,
        box: Tensor | None = None,
        extra_args: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Established hook: change per-system values y, (S, 1) or (S,); by default :meth:`per_system` is added."""
        num_systems = y.shape[0] if y.dim() else 1
        return _plus(y, self.per_system(bare_graph(z, pos, batch, box, extra_args, num_systems)))

    def add_to_atoms(self, x: Tensor, graph: Graph) -> Tensor:
        """Apply the per-atom term to x (N, 1), whichever way it was written."""
        if type(self).pre_reduce is not BasePrior.pre_reduce:
            return self.pre_reduce(x, graph.z, graph.pos, graph.batch, graph.extra)
        return _plus(x, self.per_atom(graph))

    def add_to_systems(self, y: Tensor, graph: Graph) -> Tensor:
        """Apply the per-system term to y (S, 1), whichever way it was written."""
        if type(self).post_reduce is not BasePrior.post_reduce:
            return self.post_reduce(y, graph.z, graph.pos, graph.batch, graph.box, graph.extra)
        return _plus(y, self.per_system(graph))


def _plus(value: Tensor, term: Tensor | None) -> Tensor:
    """Values with a term (rows, 1) added, in the shape of the values: (rows, 1), (rows,) or () for a single row."""
    if term is None:
        return value
    return value + (term.reshape(value.shape) if value.dim() < 2 else term)
