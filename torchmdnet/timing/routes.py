"""Ways from positions to forces that can be timed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from torchmdnet.errors import ConfigError

__all__ = ["DTYPES", "THROUGH", "Route", "Through", "routes"]

Through = Literal["call", "ase", "external", "graph"]
#: What each way to the forces is, in words.
THROUGH: dict[str, str] = {
    "call": "the model called from PyTorch",
    "ase": "velocity Verlet in ASE with TMDNETCalculator",
    "external": "External, as engines call it",
    "graph": "External replaying a CUDA graph",
}
#: Precisions of a route, with PyTorch's word for what matrix products of float32 may round their factors to. Devices
#: without such products, most CPUs among them, compute in plain float32.
DTYPES = {"float32": "highest", "float64": "highest", "tf32": "high", "bf16": "medium"}


class Route(NamedTuple):
    """One way from positions to forces."""

    through: str
    dtype: str = "float32"
    radial: str = "grid"  # or "exact"
    threads: int = 1
    device: str = "cpu"

    @property
    def numbers(self) -> str:
        """The type of the numbers themselves."""
        return "float64" if self.dtype == "float64" else "float32"

    def __str__(self) -> str:
        where = self.device if self.device != "cpu" else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.through}, {self.dtype}, {self.radial}, {where}"


def routes(
    through: Sequence[str],
    dtypes: Sequence[str],
    radial: Sequence[str],
    threads: Sequence[int],
    devices: Sequence[str],
) -> list[Route]:
    """All combinations that can be measured: numbers of threads apply to the CPU, CUDA graphs to CUDA.

    Args:
        through: Ways to call the model, of :data:`THROUGH`.
        dtypes: Precisions, of :data:`DTYPES`.
        radial: How radial filters are evaluated: ``"auto"``, ``"exact"``, ``"grid"``.
        threads: Numbers of threads.
        devices: Such as ``"cpu"`` and ``"cuda"``.

    Raises:
        ConfigError: If none is left, or CUDA is asked for and is not there.
    """
    if not torch.cuda.is_available():
        if any(device.startswith("cuda") for device in devices):
            raise ConfigError("device: cuda is not available here. Choose cpu.")
        if "graph" in through:
            raise ConfigError(
                "through: graph needs CUDA, which is not available here. Choose from call, ase, external."
            )
    found = []
    for device, way, dtype, filters in itertools.product(devices, through, dtypes, radial):
        if way == "graph" and device == "cpu":
            continue
        for count in threads if device == "cpu" else (1,):
            found.append(Route(way, dtype, filters, count, device))
    if not found:
        raise ConfigError("through: graph runs on CUDA alone. Add cuda to the devices, or another way.")
    return found
