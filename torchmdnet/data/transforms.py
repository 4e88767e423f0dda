"""What happens to a batch between the data set and the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from torchmdnet.neighbors.home import NEAR, Home

__all__ = ["EnergyRefRemover", "FloatCastDatasetWrapper"]


class FloatCastDatasetWrapper(BaseTransform):
    """Casts every floating-point tensor of a sample or batch; integers stay as they are.

    Args:
        dtype: The type the model computes in.
        brings_home: Whether systems far from the origin may be moved before their positions are rounded, see
            :class:`torchmdnet.neighbors.Home`; for models of which nothing depends on where atoms are, or which
            periodic image they are.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, *, brings_home: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.brings_home = brings_home

    def forward(self, data: Data) -> Data:
        """The same data with floats of :attr:`dtype`."""
        for store in data.stores:
            pos = store.get("pos")
            if self.brings_home and isinstance(pos, Tensor) and pos.dtype == torch.float64 != self.dtype:
                store["pos"] = _near_origin(pos, store.get("batch"), store.get("box"))
            for name, value in list(store.items()):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != self.dtype:
                    store[name] = value.to(self.dtype)
        return data


def _near_origin(pos: Tensor, batch: Tensor | None, box: Tensor | None) -> Tensor:
    """Positions (N, 3) near the origin; systems whose coordinates are all below 20 Å stay as they are."""
    is_far = (pos.abs() >= NEAR).any(dim=1)  # (N,)
    if not bool(is_far.any()):
        return pos
    batch = torch.zeros(pos.shape[0], dtype=torch.long, device=pos.device) if batch is None else batch
    num_systems = int(batch.max()) + 1
    is_moved = torch.zeros(num_systems, dtype=torch.bool, device=pos.device)
    is_moved[batch[is_far]] = True
    return torch.where(is_moved[batch, None], Home()(pos, batch, box, num_systems), pos)


class EnergyRefRemover(BaseTransform):
    r"""Subtracts the energies of the atoms from the labels, so that the energy of binding is learnt.

    .. math:: y_s \leftarrow y_s - \sum_{i \in s} e_{z_i}

    The sum is taken in the precision of the labels. Data without energies pass unchanged, and labels keep their shape.

    Args:
        atomref: Energy of each element, (max_z, 1) or (max_z,), in the unit of the labels.
    """

    def __init__(self, atomref: Tensor) -> None:
        super().__init__()
        self.atomref = atomref

    def forward(self, data: Data) -> Data:
        """The same data with energies relative to the atoms."""
        y = data.get("y")
        if y is None:
            return data
        self.atomref = self.atomref.to(data.z.device)
        energies = self.atomref.reshape(-1)[data.z].to(y.dtype)  # (N,)
        batch = data.get("batch")
        flat = y.reshape(-1)
        if batch is None:
            total = energies.sum().reshape(1)
        else:
            total = energies.new_zeros(len(flat)).index_add_(0, batch, energies)  # (S,)
        data.y = (flat - total).reshape(y.shape)
        return data
