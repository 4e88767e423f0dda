"""Neighbours in time linear in the number of atoms, through vesin's cell lists."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_gradtrackingtensor

from torchmdnet.neighbors.lattice import Lattice
from torchmdnet.ops.kernels.threads import cores

__all__ = ["vesin_pairs", "without_transforms"]


def vesin_pairs(
    pos: Tensor, batch: Tensor, lattice: Lattice | None, num_systems: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`torchmdnet.neighbors.pairs_within`; one call of vesin per system, on the CPU."""
    from vesin import NeighborList

    search = NeighborList(cutoff=float(cutoff), full_list=False, n_threads=cores.free())
    points = without_transforms(pos.detach().to("cpu", torch.float64))
    systems = without_transforms(batch.cpu())
    is_sorted = bool((systems[1:] >= systems[:-1]).all())
    order = np.arange(len(systems)) if is_sorted else np.argsort(systems, kind="stable")
    bounds = np.searchsorted(systems[order], np.arange(num_systems + 1))
    cells = np.zeros((num_systems, 3, 3))
    periodic = np.zeros((num_systems, 3), dtype=bool)
    if lattice is not None:
        cells[:] = without_transforms(lattice.cell.cpu())
        periodic[:] = ~without_transforms(lattice.is_open.cpu())

    found_i, found_j, found_shift = [], [], []
    for system in range(num_systems):
        members = order[bounds[system] : bounds[system + 1]]
        if len(members) == 0:
            continue
        i, j, shift = search.compute(
            points=points[members], box=cells[system], periodic=periodic[system], quantities="ijS"
        )
        i, j = i.astype(np.int64), j.astype(np.int64)
        if is_sorted:
            found_i.append(i + bounds[system])
            found_j.append(j + bounds[system])
        else:
            found_i.append(members[i])
            found_j.append(members[j])
        found_shift.append(shift)
    i, j = np.concatenate(found_i), np.concatenate(found_j)
    shift = np.concatenate(found_shift)
    device = pos.device
    return (
        torch.from_numpy(i).to(device),
        torch.from_numpy(j).to(device),
        None if lattice is None else torch.from_numpy(-shift.astype(np.float64)).to(device, pos.dtype),
    )


def without_transforms(x: Tensor) -> np.ndarray:
    """The numbers of a tensor, also inside ``torch.func``: pairs do not depend on who differentiates."""
    while is_gradtrackingtensor(x):
        x = get_unwrapped(x)
    with torch._C._DisableFuncTorch():  # or what is taken from it would be wrapped again
        return x.detach().numpy()
