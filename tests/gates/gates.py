"""The numbers that no change of the package may move, and how they are computed.

Weights, positions and directions come from a hash of their index, so they are the same with every release of PyTorch,
on every processor. ``python tools/freeze_gates.py`` writes ``frozen.npz``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchmdnet.build import create_model
from torchmdnet.models.base import set_radial_mode
from torchmdnet.potential import TorchMD_Net

FROZEN = Path(__file__).with_name("frozen.npz")
CUTOFF = 3.5  # Å
#: Largest deviation in float64, relative to the scale of the numbers, and how many times the spread of float32 that was
#: measured when the numbers were frozen is let through, since other processors round in other orders.
TOLERANCE, ROOM = 1e-12, 4.0
#: How the functions of distance are evaluated: on a grid, by loops where there are some, and pair by pair.
MODES = ("grid", "exact")
QUANTITIES = ("energy", "forces", "stress", "gradients")
#: The gradient of each weight is frozen as its norm and as many products with fixed directions.
NUM_DIRECTIONS = 2

_SIZE: dict[str, Any] = {
    "embedding_dimension": 16,
    "num_layers": 2,
    "num_rbf": 6,
    "rbf_type": "expnorm",
    "trainable_rbf": True,
    "activation": "silu",
    "attn_activation": "silu",
    "cutoff_lower": 0.0,
    "cutoff_upper": CUTOFF,
    "max_z": 20,
    "num_heads": 2,
    "neighbor_embedding": True,
    "distance_influence": "both",
    "vector_cutoff": True,
    "aggr": "add",
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": True,
    "precision": 64,
}
_SCALES = {"distance_scale": 1e-10, "energy_scale": 1.602176634e-19}
_EMBEDDED = {"system_embedding": "charge+spin"}

#: The five architectures, and models whose other parts take ways of their own through forces.
MODELS: dict[str, dict[str, Any]] = {
    "tensornet": {"model": "tensornet", "equivariance_invariance_group": "O(3)"},
    "tensornet2": {"model": "tensornet2", "q_dim": 3, "repulsion": False},
    "equivariant-transformer": {"model": "equivariant-transformer", **_EMBEDDED},
    "transformer": {"model": "transformer", **_EMBEDDED},
    "graph-network": {"model": "graph-network", **_EMBEDDED},
    "equivariant-scalar": {"model": "equivariant-transformer", "output_model": "EquivariantScalar"},
    "tensornet-equivariant-scalar": {"model": "tensornet", "output_model": "EquivariantScalar"},
    "tensornet2-charges": {
        "model": "tensornet2",
        "q_dim": 2,
        "q_weights": [1.0, 0.5, 0.25],
        "coulomb_cutoff": 5.0,
        "output_model": "ScalarPlusWeightedCoulomb",
    },
    "tensornet-zbl": {"model": "tensornet", "prior_model": {"ZBL": {"cutoff_distance": 4.0, **_SCALES}}},
    "graph-network-priors": {
        "model": "graph-network",
        "prior_model": {
            "Atomref": {"max_z": 20},
            "ZBL": {"cutoff_distance": 3.0, **_SCALES},
            "D2": {"cutoff_distance": 6.0, **_SCALES},
        },
    },
}


class System(NamedTuple):
    """A batch, and where an engine brings them its edges."""

    z: Tensor
    pos: Tensor
    batch: Tensor
    box: Tensor | None = None
    q: Tensor | None = None
    s: Tensor | None = None
    edges: tuple[Tensor, Tensor] | None = None  # (2, E), (E, 3)

    @property
    def num_systems(self) -> int:
        return int(self.batch.max()) + 1

    def to(self, dtype: torch.dtype, device: Any = "cpu") -> System:
        found = System(*(x if not isinstance(x, Tensor) else _moved(x, dtype, device) for x in self))
        edges = self.edges
        return found if edges is None else found._replace(edges=tuple(_moved(x, dtype, device) for x in edges))


def _moved(x: Tensor, dtype: torch.dtype, device: Any) -> Tensor:
    return x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype)


def uniform(name: str, *shape: int) -> np.ndarray:
    """Numbers between -1 and 1 that depend on a name and their place alone."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        zlib.crc32(name.encode())
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x >> np.uint64(11)).astype(np.float64) / 2**52 - 1).reshape(shape)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


_METHANOL = [
    (6, (-0.047, 0.664, 0.0)),
    (8, (-0.047, -0.758, 0.0)),
    (1, (-1.093, 0.970, 0.0)),
    (1, (0.878, -1.046, 0.0)),
    (1, (0.438, 1.072, 0.889)),
    (1, (0.438, 1.072, -0.889)),
    (1, (0.3, -1.4, 0.9)),
]
_WATER = [(8, (0.0, 0.0, 0.119)), (1, (0.0, 0.763, -0.477)), (1, (0.0, -0.763, -0.477))]


def _molecules(name: str, *parts: list[tuple[int, tuple[float, ...]]], q: list[float], s: list[float]) -> System:
    atoms = [atom for part in parts for atom in part]
    pos = _tensor([place for _, place in atoms]) + 0.06 * _tensor(uniform(name, len(atoms), 3))
    batch = torch.tensor([system for system, part in enumerate(parts) for _ in part])
    return System(torch.tensor([z for z, _ in atoms]), pos, batch, None, _tensor(q), _tensor(s))


def _crystal(name: str, box: list[list[float]], z: list[int], repeats: int = 1, shake: float = 0.15) -> System:
    """Atoms near the points of a regular grid in fractional coordinates."""
    sites = round(len(z) ** (1 / 3)) * repeats
    grid = np.stack(np.meshgrid(*[np.arange(sites)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) / sites
    boxes = np.asarray(box, dtype=np.float64) * repeats
    pos = grid @ boxes + shake * uniform(name, len(grid), 3)
    batch = torch.zeros(len(grid), dtype=torch.long)
    return System(torch.tensor(z * repeats**3), _tensor(pos), batch, _tensor(boxes), _tensor([1.0]), _tensor([2.0]))


def _with_edges(system: System) -> System:
    """Every neighbour in any image, some beyond the cutoff, in the order of a hash; a few without their partners."""
    pos, box = system.pos.numpy(), system.box.numpy()  # type: ignore[union-attr]
    images = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) @ box
    i, j, k = (x.reshape(-1) for x in np.meshgrid(*map(np.arange, (len(pos), len(pos), len(images))), indexing="ij"))
    vec = pos[i] - pos[j] + images[k]
    length = np.sqrt((vec**2).sum(axis=1))
    kept = np.flatnonzero((length > 0) & (length < CUTOFF + 0.4))
    kept = kept[np.argsort(uniform("order of edges", len(kept)), kind="stable")][: int(0.97 * len(kept))]
    return system._replace(edges=(torch.as_tensor(np.stack([i[kept], j[kept]])), _tensor(vec[kept])))


_SKEWED = [[3.4, 0.0, 0.0], [2.9, 3.1, 0.0], [-1.7, 2.6, 3.3]]
SYSTEMS: dict[str, System] = {
    "ion": _molecules("ion", _METHANOL, q=[1.0], s=[0.0]),
    "ions": _molecules("ions", _WATER, _METHANOL[:6], [(11, (0.1, 0.2, 0.3))], q=[-1.0, 0.0, 1.0], s=[1.0, 0.0, 2.0]),
    "small-cell": _crystal(
        "small-cell", [[2.8, 0.0, 0.0], [0.0, 2.9, 0.0], [0.0, 0.0, 3.0]], [11, 8, 1, 6, 7, 1, 1, 8]
    ),
    "skewed-cell": _crystal("skewed-cell", _SKEWED, [6, 8, 1, 7, 1, 6, 1, 8]),
    "edges": _with_edges(_crystal("edges", _SKEWED, [6, 1, 8, 7, 1, 6, 1, 8])),
    "crystal": _crystal("crystal", [[2.9, 0.1, 0.0], [0.0, 3.0, 0.2], [0.3, 0.0, 3.1]], [8, 1, 1, 6, 7, 1, 1, 6], 2),
}


def model_of(name: str, mode: str, dtype: torch.dtype) -> TorchMD_Net:
    """A model with fixed weights."""
    model = with_fixed_weights(create_model({**_SIZE, **MODELS[name]}))
    set_radial_mode(model, mode)
    return model.to(dtype).eval()


def with_fixed_weights(model: TorchMD_Net) -> TorchMD_Net:
    """The model in double precision with weights from a hash of their names and places."""
    model = model.to(torch.float64)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "distance_expansion" in key or "prior_model" in key:
                continue  # what their constructors give does not come from a random number
            value = _tensor(uniform(key, *weight.shape))
            if weight.dim() > 1:
                value = value * (3 / weight.shape[-1]) ** 0.5
            elif "norm" in key and key.endswith("weight"):
                value = 1 + 0.2 * value
            else:
                value = 0.3 * value
            weight.copy_(value)
        for number, prior in enumerate(model.prior_model or ()):
            for key, weight in prior.named_parameters():
                weight.copy_(_tensor(uniform(f"prior {number} {key}", *weight.shape)))
    return model


def can_compute(name: str, system: str) -> bool:
    """Whether a model takes a system: some parts need positions, not edges."""
    needs_positions = name in ("tensornet2-charges", "tensornet-zbl", "graph-network-priors")
    return not (system == "edges" and needs_positions)


def numbers(model: TorchMD_Net, system: System) -> dict[str, np.ndarray]:
    """Energies, forces, stress and gradients of all weights, computed where the model is.

    The gradients are those of a mixture of energies and squared errors of forces: one row for each weight in the order
    of their names, its norm and its products with some directions.
    """
    dtype, device = model.dtype, model.mean.device
    system = system.to(dtype, device)
    model.eval()
    found = _asked(model, system)
    result = {"energy": found.energy, "forces": found.forces}
    if system.box is not None:
        result["stress"] = found.stress
    model.train()
    found = _asked(model, system)
    c = _tensor(uniform("c", system.num_systems, 1)).to(found.energy)
    target = _tensor(uniform("target", *found.forces.shape)).to(found.forces)
    loss = (c * found.energy).sum() + (found.forces - target).square().mean()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    rows = []
    for (name, weight), gradient in sorted(zip(weights.items(), gradients, strict=True), key=lambda item: item[0][0]):
        flat = torch.zeros_like(weight) if gradient is None else gradient
        flat = flat.detach().cpu().double().reshape(-1)
        directions = _tensor(uniform(f"direction {name}", NUM_DIRECTIONS, flat.numel()))
        rows.append(torch.cat([flat.norm()[None], directions @ flat]))
    model.eval()
    return {
        **{name: value.detach().cpu().double().numpy() for name, value in result.items()},
        "gradients": torch.stack(rows).numpy(),
    }


def _asked(model: TorchMD_Net, system: System) -> Any:
    if system.edges is not None:
        index, vec = system.edges
        return model.from_edges(system.z, index, vec, system.batch, system.box, system.q, system.s)
    arguments = (system.z, system.pos, system.batch, system.box, system.q, system.s)
    return model(*arguments, stress=system.box is not None)


def deviation(name: str, found: np.ndarray, frozen: np.ndarray) -> float:
    """The largest difference, relative to the scale of the numbers; for gradients to the norm of each weight's.

    What is nearly zero for one weight is compared with a part of the largest norm.
    """
    assert found.shape == frozen.shape, name
    assert np.isfinite(found).all(), name
    difference = np.abs(found - frozen)
    if name != "gradients":
        return float(difference.max() / np.abs(frozen).max())
    norms = np.abs(frozen[:, :1])
    return float((difference / np.maximum(norms, 1e-2 * norms.max())).max())


def all_numbers(
    name: str, mode: str, dtype: torch.dtype, systems: Iterable[str] = tuple(SYSTEMS), device: Any = "cpu"
) -> dict[str, np.ndarray]:
    """:func:`numbers` of every system, under the names of the arrays that are frozen."""
    model = model_of(name, mode, dtype).to(device)
    return {
        f"{name}/{mode}/{system}/{quantity}": value
        for system in systems
        if can_compute(name, system)
        for quantity, value in numbers(model, SYSTEMS[system]).items()
    }


def deviations(found: dict[str, np.ndarray], frozen: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest deviation of each quantity, over all systems."""
    largest = dict.fromkeys(QUANTITIES, 0.0)
    for key, value in found.items():
        quantity = key.rpartition("/")[2]
        largest[quantity] = max(largest[quantity], deviation(quantity, value, frozen[key]))
    return largest
