"""Potentials small enough to differentiate by hand."""

from __future__ import annotations

from typing import Any

import torch

from torchmdnet.build import create_model
from torchmdnet.potential import TorchMD_Net

__all__ = ["TINY", "tiny_model"]

#: Options of a small potential; every architecture reads its own.
TINY: dict[str, Any] = {
    "embedding_dimension": 8,
    "num_layers": 2,
    "num_rbf": 6,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "cutoff_lower": 0.0,
    "cutoff_upper": 4.0,
    "max_z": 20,
    "max_num_neighbors": 32,
    "equivariance_invariance_group": "O(3)",
    "neighbor_embedding": True,
    "num_heads": 2,
    "attn_activation": "silu",
    "distance_influence": "both",
    "vector_cutoff": True,
    "aggr": "add",
    "q_dim": 2,
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": True,
    "atom_filter": -1,
    "prior_model": None,
    "precision": 64,
}


def tiny_model(model: str, *, seed: int = 0, **options: Any) -> TorchMD_Net:
    """A small random potential in float64, ready for evaluation.

    Args:
        model: Architecture, as in a configuration.
        seed: Of the weights.
        **options: Configuration keys that differ from :data:`TINY`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = create_model({**TINY, "model": model, **options})
        with torch.no_grad():  # zero biases would hide the terms that multiply them
            for parameter in potential.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return potential.eval()
