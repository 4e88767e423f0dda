"""Which devices a run uses, and how several processes find each other."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from torchmdnet.errors import ConfigError

__all__ = ["BoundedDDPStrategy", "choose_devices", "choose_strategy", "rendezvous_seconds"]

log = logging.getLogger(__name__)

#: How long the processes of a run wait for each other, at the start and later at any step, in seconds.
WAIT_SECONDS = 1800.0


def choose_devices(ngpus: int) -> tuple[str, int]:
    """Accelerator and number of devices for ``ngpus``.

    Args:
        ngpus: Number of devices per node; -1 is every visible accelerator, or one process on the CPU without any.

    Raises:
        ConfigError: If there are not that many.
    """
    if torch.cuda.is_available():
        kind, available = "gpu", torch.cuda.device_count()
    elif torch.backends.mps.is_available():
        kind, available = "mps", 1
    else:
        return "cpu", 1 if ngpus == -1 else _positive(ngpus)
    if ngpus == -1:
        return kind, available
    if _positive(ngpus) > available:
        raise ConfigError(
            f"ngpus: {ngpus} asked for, but {available} visible. Choose {available} or fewer, -1 for all, or make more "
            "visible with CUDA_VISIBLE_DEVICES."
        )
    return kind, ngpus


def _positive(ngpus: int) -> int:
    if ngpus < 1:
        raise ConfigError(f"ngpus: {ngpus} is no number of devices. Give 1 or more, or -1 for all.")
    return ngpus


def rendezvous_seconds() -> float:
    """How long to wait for the other processes: ``TORCHMDNET_RENDEZVOUS_TIMEOUT``, or half an hour."""
    text = os.environ.get("TORCHMDNET_RENDEZVOUS_TIMEOUT", "")
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise ConfigError(f"TORCHMDNET_RENDEZVOUS_TIMEOUT: {text!r} is no number of seconds above 0.")
    return seconds


def choose_strategy(devices: int, num_nodes: int) -> Strategy | str:
    """One process needs no strategy; several share gradients, and wait a bounded time for each other."""
    return BoundedDDPStrategy(rendezvous_seconds()) if devices * num_nodes > 1 else "auto"


class BoundedDDPStrategy(DDPStrategy):
    """Data-parallel training whose processes wait a bounded time for each other, and say for whom.

    Args:
        wait: Seconds to wait at the start.
    """

    def __init__(self, wait: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wait = wait

    def setup_environment(self) -> None:
        """Meet the other processes, then let Lightning go on.

        Raises:
            ConfigError: If they do not come.
        """
        if not torch.distributed.is_initialized():
            self._meet()
        super().setup_environment()

    def _meet(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        self.set_world_ranks()
        rank, size = environment.global_rank(), environment.world_size()
        address, port = environment.main_address, environment.main_port
        os.environ.update(MASTER_ADDR=str(address), MASTER_PORT=str(port))
        backend = "nccl" if self.root_device.type == "cuda" else "gloo"
        try:
            store = torch.distributed.TCPStore(
                address, port, size, is_master=rank == 0, timeout=timedelta(seconds=self.wait), wait_for_workers=True
            )
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=WAIT_SECONDS)
            )
        except (RuntimeError, ValueError, OSError) as error:
            role = f"waited for the other {size - 1}" if rank == 0 else "could not reach process 0"
            raise ConfigError(
                f"Process {rank} of {size} {role} at {address}:{port} for up to {self.wait:g} s "
                f"({_first_line(error)}). "
                "Start the same command on every node, with the same MASTER_ADDR (node 0), MASTER_PORT (free and open "
                "there) and --num-nodes, and with NODE_RANK 0, 1, ... TORCHMDNET_RENDEZVOUS_TIMEOUT sets the wait in "
                "seconds."
            ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
