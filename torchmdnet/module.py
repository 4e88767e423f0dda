"""The established address of the training module; it lives in :mod:`torchmdnet.training.lightning`."""

from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper
from torchmdnet.training.lightning import LNNP
from torchmdnet.training.losses import LossFunction

__all__ = ["LNNP", "EnergyRefRemover", "FloatCastDatasetWrapper", "LossFunction"]
