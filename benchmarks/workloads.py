"""What is timed, each workload under the name by which ``--only`` finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["OPTIONS", "STARTUP", "Workload", "all_workloads", "computing", "loading"]


@dataclass(frozen=True)
class Workload:
    """Something that both sides do.

    Args:
        name: By which it is found.
        order: What ``worker.py`` is told.
        optional: Whether it runs only when it is named.
    """

    name: str
    order: dict[str, Any]
    optional: bool = False


_COMMON: dict[str, Any] = {
    "embedding_dimension": 128,
    "activation": "silu",
    "attn_activation": "silu",
    "rbf_type": "expnorm",
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 128,
    "max_num_neighbors": 128,
    "equivariance_invariance_group": "O(3)",
    "neighbor_embedding": True,
    "num_heads": 8,
    "distance_influence": "both",
    "vector_cutoff": True,
    "aggr": "add",
    "output_model": "Scalar",
    "output_mlp_num_layers": 0,
    "reduce_op": "add",
    "derivative": True,
    "atom_filter": -1,
    "prior_model": None,
    "static_shapes": False,
    "box_vecs": None,
    "precision": 32,
}
_TENSOR: dict[str, Any] = {"num_layers": 2, "num_rbf": 32, "trainable_rbf": False}
_VECTOR: dict[str, Any] = {"num_layers": 6, "num_rbf": 50, "trainable_rbf": True}

#: Configuration of each architecture: the size its class has by default, the tensor networks with 32 radial functions.
OPTIONS: dict[str, dict[str, Any]] = {
    "tensornet": {**_COMMON, **_TENSOR, "model": "tensornet"},
    "tensornet2": {**_COMMON, **_TENSOR, "model": "tensornet2", "q_dim": 16},
    "equivariant-transformer": {**_COMMON, **_VECTOR, "model": "equivariant-transformer"},
    "transformer": {**_COMMON, **_VECTOR, "model": "transformer"},
    "graph-network": {**_COMMON, **_VECTOR, "model": "graph-network"},
}

#: Arguments of a fresh interpreter, by name.
STARTUP = {
    "startup/import": ["-c", "import torchmdnet"],
    "startup/load_model": ["-c", "from torchmdnet.models.model import load_model"],
    "startup/help": ["-c", "from torchmdnet.scripts.train import main; main()", "--help"],
}


def computing(architecture: str, system: str, task: str, optional: bool = False) -> Workload:
    """One architecture at work on one system.

    Args:
        architecture: A key of :data:`OPTIONS`.
        system: A key of :data:`systems.SYSTEMS`.
        task: ``"forces"`` computes energy and forces; ``"train"`` takes an optimiser step on both.
        optional: See :class:`Workload`.
    """
    order = {"task": task, "system": system, "weights": f"{architecture}.ckpt", "options": OPTIONS[architecture]}
    return Workload(f"{architecture}/{system}/{task}", order, optional)


def loading(batch_size: int) -> Workload:
    """An epoch of training batches from ``.npy`` files, through ``DataModule`` and without worker processes."""
    return Workload(f"loader/batch-{batch_size}", {"task": "load", "batch_size": batch_size})


def all_workloads() -> list[Workload]:
    """Everything that a process does again and again, the usual ones first."""
    small, large = ("benzene", "32-benzenes", "192-water"), ("1536-water", "12288-water")
    others = [architecture for architecture in OPTIONS if architecture != "tensornet"]
    return [
        *(computing("tensornet", system, "forces") for system in small),
        *(computing("tensornet", system, "train") for system in small),
        *(computing("tensornet", system, "forces") for system in large),
        *(loading(batch_size) for batch_size in (32, 256)),
        *(computing("tensornet", system, "train", optional=True) for system in large),
        *(computing(name, system, "forces", optional=True) for name in others for system in small),
        *(computing(name, system, "train", optional=True) for name in others for system in small),
    ]
