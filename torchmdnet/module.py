"""The established address of the training module; it lives in :mod:`torchmdnet.training.lightning`."""

from torchmdnet.data.transforms import EnergyRefRemover, FloatCastDatasetWrapper
from torchmdnet.losses import LossFunction
from torchmdnet.training.lightning import LNNP

__all__ = ["LNNP", "EnergyRefRemover", "FloatCastDatasetWrapper", "LossFunction"]
