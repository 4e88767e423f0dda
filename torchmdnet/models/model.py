"""Established address of the potential and its loaders."""

from torchmdnet.build import create_model
from torchmdnet.checkpoint.load import load_ensemble, load_model
from torchmdnet.ensemble import Ensemble
from torchmdnet.potential import TorchMD_Net
from torchmdnet.priors.named import create_prior_models

__all__ = ["Ensemble", "TorchMD_Net", "create_model", "create_prior_models", "load_ensemble", "load_model"]
