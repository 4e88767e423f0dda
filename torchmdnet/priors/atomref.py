"""Reference energies of isolated atoms."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from torchmdnet.errors import ConfigError
from torchmdnet.graph import Graph
from torchmdnet.priors.base import BasePrior, HasAtomref, stated_energies
from torchmdnet.priors.scales import count_of

__all__ = ["Atomref", "LearnableAtomref"]

log = logging.getLogger(__name__)


class Atomref(BasePrior):
    r"""Add the energy of each isolated atom, :math:`E \mathrel{+}= \sum_i E_0(z_i)`.

    Args:
        max_z: Number of elements in a table of zeros, when there is no data set to ask.
        dataset: Asked for its table with ``get_atomref()``.
        trainable: Whether the table is trained, starting from the reference.
        enable: Whether the energies are added; a table that is only stored serves delta learning, where the network
            predicts energies relative to it.

    Raises:
        ConfigError: If neither ``max_z`` nor ``dataset`` is given.
    """

    needs_positions = False
    initial_atomref: Tensor

    def __init__(
        self,
        max_z: int | None = None,
        dataset: HasAtomref | None = None,
        trainable: bool = False,
        enable: bool = True,
    ) -> None:
        super().__init__()
        if max_z is not None:
            count_of(max_z, "max_z", type(self).__name__)
        if max_z is None and dataset is None:
            raise ConfigError("Atomref: give max_z=, or a data set with get_atomref() through dataset=.")
        if dataset is None:
            assert max_z is not None
            table = torch.zeros(max_z, 1)
        else:
            known = stated_energies(dataset)
            if known is None:
                log.warning("The data set has no reference energies of atoms; the Atomref prior starts from zeros.")
                known = torch.zeros(100, 1)
            table = known.detach().clone().reshape(-1, 1)
        self.register_buffer("initial_atomref", table)
        self.atomref = nn.Embedding(len(table), 1, _weight=table.clone())
        self.atomref.weight.requires_grad_(trainable)
        self.enable = enable

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.atomref.weight.copy_(self.initial_atomref)

    def get_init_args(self) -> dict[str, Any]:
        return {
            "max_z": self.initial_atomref.shape[0],
            "trainable": self.atomref.weight.requires_grad,
            "enable": self.enable,
        }

    def per_atom(self, graph: Graph) -> Tensor | None:
        """Reference energy of each atom, (N, 1)."""
        return self.atomref(graph.z) if self.enable else None


class LearnableAtomref(Atomref):
    """Energies of isolated atoms, learned from zero.

    Args:
        max_z: Number of elements in the table.
        dataset: Asked for the size of its table when ``max_z`` is not given.
    """

    def __init__(self, max_z: int | None = None, dataset: HasAtomref | None = None) -> None:
        if max_z is None and dataset is not None:
            known = stated_energies(dataset)
            max_z = 100 if known is None else known.reshape(-1).shape[0]
        super().__init__(max_z=max_z, trainable=True, enable=True)

    def get_init_args(self) -> dict[str, Any]:
        return {"max_z": self.initial_atomref.shape[0]}
