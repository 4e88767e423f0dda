"""What a launcher, or a user in its place, says in the environment, looked at before any work."""

from __future__ import annotations

import logging
import os
import socket

from torchmdnet.errors import ConfigError, did_you_mean
from torchmdnet.switches import SWITCHES, check_switches

__all__ = [
    "check_environment",
    "check_launcher",
    "check_numbers",
    "check_places",
    "launcher_found",
    "rendezvous_seconds",
]

logger = logging.getLogger(__name__)

#: How long the processes of a run wait for each other, at the start and later at any step, in seconds.
WAIT_SECONDS = 120.0

#: What the package reads from the environment under its own name.
_OWN = (*SWITCHES, "TORCHMDNET_CACHE", "TORCHMDNET_LAUNCHER", "TORCHMDNET_LOG_DIR", "TORCHMDNET_MIRROR",
        "TORCHMDNET_RENDEZVOUS_TIMEOUT")  # fmt: skip

#: Numbers of processes and nodes that are read from the environment.
_NUMBERS = ("NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
            "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_NUM_NODES")  # fmt: skip


def launcher_found() -> str | None:
    """What started this process as one of several, ``torchrun`` or ``srun``; None for neither."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    is_task = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS") or 1) > 1
    return "srun" if is_task else None


def check_numbers() -> None:
    """Refuse numbers of processes and nodes that are none.

    Raises:
        ConfigError: Naming the variable and its value.
    """
    for name in _NUMBERS:
        text = os.environ.get(name)
        if text is not None and not _is_count(text):
            raise ConfigError(
                f"{name}: {text!r} in the environment is no whole number of 0 or more. Set it to one, as srun and "
                f"torchrun do, or remove it (unset {name}) for a run of one process."
            )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def check_environment() -> None:
    """Look at every variable that a run reads, before any work; warn of names that are nearly ours.

    Raises:
        ConfigError: Naming the variable and its value.
    """
    check_numbers()
    check_switches()
    rendezvous_seconds()
    port = os.environ.get("MASTER_PORT")
    if port is not None:
        _check_port(port)
    for name in sorted(os.environ):
        if name.startswith("TORCHMDNET_") and name not in _OWN:
            logger.warning("%s in the environment is not read by any part.%s", name, did_you_mean(name, _OWN))


def rendezvous_seconds() -> float:
    """How long to wait for the other processes: ``TORCHMDNET_RENDEZVOUS_TIMEOUT``, or two minutes."""
    text = os.environ.get("TORCHMDNET_RENDEZVOUS_TIMEOUT", "")
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(
            f"TORCHMDNET_RENDEZVOUS_TIMEOUT: {text!r} in the environment is no number of seconds above 0 and below "
            "1,000,000."
        )
    return seconds


def _check_port(port: str) -> None:
    if not (_is_count(port) and 0 < int(port) < 65536):
        raise ConfigError(
            f"MASTER_PORT: {port!r} in the environment is no port. Give a number from 1 to 65535 that is free on node "
            "0, the same on every node."
        )


def check_places(devices: int, num_nodes: int) -> None:
    """Refuse a place in the environment that no process of the run has; for runs without torchrun and srun.

    Args:
        devices: Processes on each node.
        num_nodes: Number of nodes.

    Raises:
        ConfigError: Naming the variable, its value, and what the settings ask for.
    """
    given = {name: int(os.environ[name]) for name in _NUMBERS if name in os.environ}
    node, local = given.get("NODE_RANK", given.get("GROUP_RANK", 0)), given.get("LOCAL_RANK", 0)
    size = devices * num_nodes
    expected = {
        "WORLD_SIZE": (size, size),
        "LOCAL_WORLD_SIZE": (devices, devices),
        "NODE_RANK": (0, num_nodes - 1),
        "GROUP_RANK": (0, num_nodes - 1),
        "LOCAL_RANK": (0, devices - 1),
        "RANK": (node * devices + local,) * 2,
        "SLURM_PROCID": (0, size - 1),
    }
    for name, (low, high) in expected.items():
        if name in given and not low <= given[name] <= high:
            processes = f"{size} process{'es' if size > 1 else ''} (ngpus {devices}, num_nodes {num_nodes})"
            raise ConfigError(
                f"{name}: {given[name]} in the environment does not fit the settings, which ask for {processes}; "
                f"{low if low == high else f'{low} to {high}'} would. Change --ngpus or --num-nodes, start the "
                f"processes with torchrun or srun, or remove it (unset {name})."
            )


def check_launcher(num_nodes: int) -> None:
    """Refuse a place to meet where the processes of several nodes cannot find each other.

    Args:
        num_nodes: Number of nodes that the settings ask for.

    Raises:
        ConfigError: Naming the variable and its value.
    """
    check_numbers()
    env = os.environ
    if num_nodes < 2 or launcher_found() is not None:
        return
    rank = env.get("NODE_RANK", env.get("GROUP_RANK", "0"))
    if int(rank) >= num_nodes:
        raise ConfigError(
            f"NODE_RANK: {rank} in the environment, but num_nodes is {num_nodes}. Number the nodes from 0 to "
            f"{num_nodes - 1}."
        )
    port = env.get("MASTER_PORT")
    if port is None:
        raise ConfigError(
            f"MASTER_PORT: not set, but num_nodes is {num_nodes}. Set it to a port that is free on node 0, the same on "
            "every node, e.g. MASTER_PORT=12910."
        )
    _check_port(port)
    address = env.get("MASTER_ADDR", "127.0.0.1")
    try:
        if not address.strip():
            raise OSError("it is empty")
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"MASTER_ADDR: {address!r} in the environment is the address of no machine ({reason}). Give the name or "
            "address of node 0, the same on every node."
        ) from error
