"""Mixing of channels, one matrix for each part, as a form with derivatives of every order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmdnet.ops.kernels.forms import Form

__all__ = ["MIXING", "MixingForm", "mix"]


class MixingForm(Form):
    r""":math:`B(O, W, X) = \sum_{n c f g} O_{ncf} W_{l(c) f g} X_{ncg}`, one matrix for each part.

    ``where`` holds the ends of the parts.
    """

    name = "mixing"
    slots = ("O", "W", "X")

    def derivative(self, slot: str, known: dict[str, Tensor], shape: tuple[int, ...], where: Any) -> Tensor:
        some = known["X"] if slot == "O" else known["O"]
        out = some.new_empty(shape)
        first = 0
        for part, last in enumerate(where):
            size = last - first
            if slot == "W":
                left, right = (known[name][:, first:last].transpose(0, 1) for name in ("O", "X"))
                torch.sum(torch.bmm(left.transpose(1, 2), right), dim=0, out=out[part])
            else:
                W = known["W"][part]
                matrix = W.t() if slot == "O" else W
                values = known["X" if slot == "O" else "O"][:, first:last].transpose(0, 1)  # (C, N, F)
                target = out[:, first:last].transpose(0, 1)
                torch.bmm(values, matrix.expand(size, *matrix.shape), out=target)
            first = last
        return out


MIXING = MixingForm()


def mix(X: Tensor, W: Tensor, ends: tuple[int, ...]) -> Tensor:
    """See :func:`torchmdnet.ops.irreps.mix_channels`."""
    return MIXING("O", (X.shape[0], X.shape[1], W.shape[1]), ends, W, X)
