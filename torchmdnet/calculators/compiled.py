"""Potentials whose arithmetic runs through ``torch.compile``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["compiled"]


def compiled(model: nn.Module) -> nn.Module:
    """A model that shares its parts with ``model`` and compiles the work on them.

    Neighbours are searched as before; everything from the graph on is compiled, for any number of atoms and edges.
    A model without ``representation_model.encode`` is compiled as a whole.
    """
    representation: Any = getattr(model, "representation_model", None)
    if not hasattr(representation, "encode"):
        return torch.compile(model, dynamic=True)  # type: ignore[return-value]
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    representation_twin = copy.copy(representation)
    representation_twin.encode = torch.compile(representation.encode, dynamic=True)
    twin._modules["representation_model"] = representation_twin
    return twin
