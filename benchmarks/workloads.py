"""What is timed, each workload under the name by which ``--only`` finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["GROWTH", "OPTIONS", "STARTUP", "WITH_PRIORS", "Workload", "all_workloads", "computing", "loading"]


@dataclass(frozen=True)
class Workload:
    """Something that both sides do.

    Args:
        name: By which it is found.
        order: What ``worker.py`` is told.
        when: ``"always"``, ``"all"`` if ``--all`` adds it, or ``"named"`` if it has to be asked for by name.
        twice: Whether ``--all`` runs it with one thread and with two.
    """

    name: str
    order: dict[str, Any]
    when: When = "named"
    twice: bool = False


When: TypeAlias = Literal["always", "all", "named"]

#: Systems whose time and memory are told against the number of atoms, by device.
GROWTH = {
    "cpu": ("dipeptide", "192-water", "1536-water", "12288-water", "98304-water"),
    "cuda": ("dipeptide", "192-water", "2187-water", "24000-water", "98304-water"),
}

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

#: The repulsion of nuclei that keeps atoms apart in simulations, in eV and Å.
_ZBL: dict[str, Any] = {
    "cutoff_distance": 4.0,
    "max_num_neighbors": 128,
    "atomic_number": list(range(119)),
    "distance_scale": 1e-10,
    "energy_scale": 1.602176634e-19,
}
#: Architectures with a prior that looks at distances: what it costs beside the same model without one.
WITH_PRIORS: dict[str, dict[str, Any]] = {
    f"{architecture}+zbl": {**OPTIONS[architecture], "prior_model": [{"ZBL": _ZBL}]}
    for architecture in ("tensornet", "graph-network")
}

#: Arguments of a fresh interpreter, by name.
STARTUP = {
    "startup/import": ["-c", "import torchmdnet"],
    "startup/load_model": ["-c", "from torchmdnet.models.model import load_model"],
    "startup/help": ["-c", "from torchmdnet.scripts.train import main; main()", "--help"],
}


def computing(architecture: str, system: str, task: str, when: When = "named", twice: bool = False) -> Workload:
    """One architecture at work on one system.

    Args:
        architecture: A key of :data:`OPTIONS` or :data:`WITH_PRIORS`.
        system: A key of :data:`systems.SYSTEMS`.
        task: ``"forces"`` computes energy and forces, ``"train"`` takes an optimiser step on both, ``"dynamics"`` a
            step of velocity Verlet in ASE, ``"external"`` calls ``External`` as engines do.
        when: See :class:`Workload`.
        twice: See :class:`Workload`.
    """
    options = WITH_PRIORS.get(architecture) or OPTIONS[architecture]
    order = {"task": task, "system": system, "weights": f"{architecture}.ckpt", "options": options}
    return Workload(f"{architecture}/{system}/{task}", order, when, twice)


def loading(batch_size: int) -> Workload:
    """An epoch of training batches from ``.npy`` files, through ``DataModule`` and without worker processes."""
    return Workload(f"loader/batch-{batch_size}", {"task": "load", "batch_size": batch_size}, "always")


def all_workloads(device: str = "cpu") -> list[Workload]:
    """Everything that a process does again and again, the usual ones first, those for people who name them last."""
    chosen = _on_cpu() if device == "cpu" else _on_gpu()
    names = {workload.name for workload in chosen}
    systems = dict.fromkeys(("benzene", "dipeptide", "32-benzenes", *GROWTH["cpu"], *GROWTH["cuda"]))
    every = (
        computing(architecture, system, task)
        for architecture in OPTIONS
        for system in systems
        for task in ("forces", "train", "dynamics", "external")
        if system != "32-benzenes" or task in ("forces", "train")  # the others take one molecule
    )
    return [*chosen, *(workload for workload in every if workload.name not in names)]


def _on_cpu() -> list[Workload]:
    others = [architecture for architecture in OPTIONS if architecture != "tensornet"]
    return [
        computing("tensornet", "192-water", "forces", "always", twice=True),
        *(computing("tensornet", system, "dynamics", "always") for system in ("benzene", "dipeptide")),
        *(computing("tensornet", system, "train", "always") for system in ("32-benzenes", "192-water")),
        *(computing(name, "192-water", "forces", "all") for name in (*others, *WITH_PRIORS)),
        *(computing(name, "192-water", "train", "all") for name in others),
        loading(32),
    ]


def _on_gpu() -> list[Workload]:
    others = [architecture for architecture in OPTIONS if architecture != "tensornet"]
    large = ("2187-water", "24000-water", "98304-water")
    return [
        computing("tensornet", "dipeptide", "external", "always"),
        *(computing("tensornet", system, "forces", "always") for system in large),
        *(computing("tensornet", system, "train", "always") for system in ("32-benzenes", "2187-water")),
        *(computing(name, "dipeptide", "external", "all") for name in others),
        *(computing(name, "2187-water", "forces", "all") for name in others),
        *(computing(name, "2187-water", "train", "all") for name in others),
    ]
