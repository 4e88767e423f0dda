"""Which parameters weight decay applies to."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]

#: Modules whose parameters are no matrices that features are multiplied with.
_SPARED = (nn.Embedding, nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def parameter_groups(model: nn.Module, weight_decay: float, on: str = "all") -> list[dict[str, Any]]:
    """The parameters of a model for an optimizer; those with weight decay are the first group.

    Args:
        model: Its parameters are kept in their order.
        weight_decay: Of the first group.
        on: ``all``, one group; or ``matrices``, which spares embeddings, norms, and parameters of fewer than two
            dimensions: biases, centres and widths of radial functions.

    Returns:
        One group, or two.
    """
    weights = list(model.parameters())
    if on == "all":
        return [{"params": weights, "weight_decay": weight_decay}]
    tables = {id(weight) for module in model.modules() if isinstance(module, _SPARED) for weight in module.parameters()}
    decays = [weight.ndim >= 2 and id(weight) not in tables for weight in weights]
    return [
        {"params": [w for w, decay in zip(weights, decays, strict=True) if decay], "weight_decay": weight_decay},
        {"params": [w for w, decay in zip(weights, decays, strict=True) if not decay], "weight_decay": 0.0},
    ]
