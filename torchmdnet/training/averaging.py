r"""Exponential moving average of the weights.

.. math:: \bar w_t = d_t\, \bar w_{t-1} + (1 - d_t)\, w_t, \qquad
    d_t = \min\!\Big(d, \frac{1 + t}{10 + t}\Big), \qquad \bar w_0 = w_0

after step t, with :math:`w_t` the weights that are trained. Buffers are not averaged: those of the model are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["WeightAverage", "decay_at"]


def decay_at(step: int, decay: float) -> float:
    """The factor of the earlier average after ``step`` steps, counted from 1: short at first, ``decay`` later."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Average of the weights of a model, which can change places with the weights that are trained.

    Args:
        model: Its present parameters are the first average.
        decay: Factor of the earlier average in each update, once the first updates are over; in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.weights = dict(model.named_parameters())
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        #: Whether the model holds the average, and ``averages`` the weights that are trained.
        self.is_swapped = False

    def update(self) -> None:
        """Take in the weights after a step."""
        self.num_updates += 1
        average = get_ema_multi_avg_fn(decay_at(self.num_updates, self.decay))
        average(list(self.averages.values()), list(self.weights.values()), 0)

    @torch.no_grad()
    def swap(self, into_model: bool) -> None:
        """Let the model hold the average, or the weights that are trained; nothing happens where it does already."""
        if into_model == self.is_swapped:
            return
        for name, weight in self.weights.items():
            other = self.averages[name]
            held = weight.detach().clone()
            weight.copy_(other)  # in place: what is derived from weights is made again when their version changes
            other.copy_(held)
        self.is_swapped = into_model

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: the model holds the average, and ``state`` the weights to train on."""
        self.num_updates = int(state["num_updates"])
        for name, weight in self.weights.items():
            self.averages[name].copy_(weight)
            weight.copy_(state["weights"][name])

    @property
    def averaged(self) -> Mapping[str, Tensor]:
        """The average, by the names of the parameters."""
        return self.weights if self.is_swapped else self.averages

    def state_dict(self) -> dict[str, Any]:
        """What a run that is continued needs beside the average: the weights that are trained, and the updates."""
        raw = self.averages if self.is_swapped else self.weights
        return {
            "num_updates": self.num_updates,
            "weights": {name: weight.detach().cpu().clone() for name, weight in raw.items()},
        }
