"""A small data set with an energy that can be written down: pairs of atoms repel, the deeper the heavier."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.frames import Frames


def pair_energy(z: np.ndarray, pos: np.ndarray) -> tuple[float, np.ndarray]:
    """E = sum over pairs of sqrt(z_i z_j) exp(-r) / 4 - sum of z, and its forces."""
    d = pos[:, None] - pos[None]
    r = np.sqrt((d**2).sum(-1)) + np.eye(len(z)) * 1e9
    pair = np.sqrt(z[:, None] * z[None]) * np.exp(-r) / 4
    return float(pair.sum() / 2 - z.sum()), ((pair / r)[..., None] * d).sum(1)


class Toy(FramesDataset):
    """Water, methane and ammonia shaken about.

    Args:
        root: Not used.
        size: Number of systems.
        fields: Which labels to offer beside z and pos.
        delay: Seconds every batch takes to read.
    """

    energy_unit = "eV"
    length_unit = "Å"
    level_of_theory = "pair potential"

    def __init__(self, root=None, size: int = 40, fields=("y", "neg_dy"), delay: float = 0.0) -> None:
        rng = np.random.default_rng(7)
        kinds = [np.array([8, 1, 1]), np.array([6, 1, 1, 1, 1]), np.array([7, 1, 1, 1])]
        shapes = [rng.normal(size=(len(z), 3)) * 1.2 for z in kinds]
        samples = []
        for number in range(size):
            z, shape = kinds[number % 3], shapes[number % 3]
            pos = (shape + 0.15 * rng.normal(size=shape.shape)).astype(np.float32)
            energy, forces = pair_energy(z, pos.astype(np.float64))
            labels = {"y": np.array([[energy]]), "neg_dy": forces.astype(np.float32), "q": np.zeros(1, np.float32)}
            samples.append({"z": z, "pos": pos, **{name: labels[name] for name in fields}})
        super().__init__(Frames.from_samples(samples))
        self.delay = delay

    def batch(self, indices):
        if self.delay:
            time.sleep(self.delay)
        return super().batch(indices)


class Stuck(Toy):
    """A process that was started by another reads its first batch for a minute, and leaves a file that says so."""

    def batch(self, indices):
        if "LOCAL_RANK" in os.environ:
            Path(f"{os.environ['READING']}{os.getpid()}").touch()
            time.sleep(60)
        return super().batch(indices)
