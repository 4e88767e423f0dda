"""The toy systems with charges, dipoles and a polarizability that follow from their atoms; some may be missing."""

from __future__ import annotations

import numpy as np
from toy_data import Toy

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames

LIKING = {1: 0.2, 6: -0.1, 7: -0.3, 8: -0.5}


class ToyLabels(FramesDataset):
    """Water, methane and ammonia with more labels.

    Args:
        root: Not used.
        size: Number of systems.
        fields: Which labels to offer beside z and pos.
        missing: Every so many systems have NaN for dipole and charges; 0 for none.
        names: New names of fields.
    """

    energy_unit = "eV"
    length_unit = "Å"

    def __init__(self, root=None, size=40, fields=("y", "neg_dy", "dipole", "charges"), missing=0, names=None) -> None:
        frames = Toy(size=size).frames
        ptr, z, pos = frames.ptr, frames["z"], np.asarray(frames["pos"], dtype=np.float64)
        charges = np.array([LIKING[int(number)] for number in z])
        dipole, alpha = np.zeros((size, 3)), np.zeros((size, 3, 3))
        for system in range(size):
            mine = slice(ptr[system], ptr[system + 1])
            charges[mine] -= charges[mine].mean()
            dipole[system] = charges[mine] @ pos[mine]
            alpha[system] = np.eye(3) * (ptr[system + 1] - ptr[system])
        if missing:
            absent = np.arange(size) % missing == 0
            dipole[absent] = np.nan
            charges[np.repeat(absent, np.diff(ptr))] = np.nan
        atoms = {"neg_dy": frames["neg_dy"], "charges": charges.astype(np.float32)}
        systems = {"y": frames["y"], "dipole": dipole.astype(np.float32), "polarizability": alpha.astype(np.float32)}
        names = names or {}
        kept = [
            {names.get(name, name): array for name, array in level.items() if name in fields}
            for level in (atoms, systems)
        ]
        super().__init__(Frames(ptr, {"z": z, "pos": frames["pos"], **kept[0]}, kept[1]))
