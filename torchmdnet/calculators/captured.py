"""Calculations that are captured as CUDA graphs where it pays, and run plainly where they cannot be."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from torchmdnet.calculators.cuda_graph import CudaGraph
from torchmdnet.calculators.fixed import FixedStep
from torchmdnet.calculators.predict import Answer, predict_members
from torchmdnet.graph import Inputs
from torchmdnet.tracing import device_kind

__all__ = ["Captured"]

log = logging.getLogger(__name__)


class Captured:
    """Asks a model through a :class:`FixedStep` for each set of options, until it turns out that none can be captured.

    Args:
        model: In evaluation mode.
        wanted: Whether to capture; None where the atoms are on CUDA.
        skin: See :class:`FixedStep`.
    """

    def __init__(self, model: nn.Module, wanted: bool | None, skin: float = 0.0) -> None:
        self.model, self.wanted, self.skin = model, wanted, skin
        self.steps: dict[tuple[Any, ...], FixedStep] = {}

    def takes(self, inputs: Inputs) -> bool:
        """Whether a calculation for these atoms may be captured."""
        return device_kind(inputs.z) == "cuda" if self.wanted is None else self.wanted

    def __call__(self, inputs: Inputs, **options: bool) -> list[Answer]:
        """Answers of the model's members, as :func:`predict_members` gives them; options are those of that function."""
        if not self.takes(inputs):
            return predict_members(self.model, inputs, **options)
        kind = tuple(sorted(options.items()))
        if kind not in self.steps:
            self.steps[kind] = FixedStep(self.model, CudaGraph, skin=self.skin, **options)
        try:
            return self.steps[kind](inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            log.warning("cuda_graph: the model cannot be captured (%s); it runs without.", reason)
            self.wanted = False
            self.steps.clear()
            return predict_members(self.model, inputs, **options)
