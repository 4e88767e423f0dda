"""What happens to a batch between the data set and the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

__all__ = ["EnergyRefRemover", "FloatCastDatasetWrapper"]


class FloatCastDatasetWrapper(BaseTransform):
    """Casts every floating-point tensor of a sample or batch; integers stay as they are.

    Args:
        dtype: The type the model computes in.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, data: Data) -> Data:
        """The same data with floats of :attr:`dtype`."""
        for store in data.stores:
            for name, value in list(store.items()):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != self.dtype:
                    store[name] = value.to(self.dtype)
        return data


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
