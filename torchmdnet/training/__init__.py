"""Training: the Lightning module, its losses, what a run writes and how it is continued.

Nothing is imported here, so that the names of the losses are known without loading PyTorch.
"""

from __future__ import annotations

from torchmdnet.catalogue import Catalogue

#: Training losses by the name that ``train_loss`` takes.
LOSSES = Catalogue(
    "train_loss",
    {
        "mse_loss": "torchmdnet.training.losses:mse_loss",
        "l1_loss": "torchmdnet.training.losses:l1_loss",
        "huber_loss": "torchmdnet.training.losses:huber_loss",
    },
)

__all__ = ["LOSSES"]
