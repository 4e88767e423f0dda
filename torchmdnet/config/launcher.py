"""What a launcher, or a user in its place, says in the environment, looked at before any work."""

from __future__ import annotations

import os
import socket

from torchmdnet.errors import ConfigError

__all__ = ["check_launcher", "check_numbers"]

#: Numbers of processes and nodes that are read from the environment.
_NUMBERS = ("NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID",
            "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_NUM_NODES")  # fmt: skip


def check_numbers() -> None:
    """Refuse numbers of processes and nodes that are none.

    Raises:
        ConfigError: Naming the variable and its value.
    """
    for name in _NUMBERS:
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal()):
            raise ConfigError(
                f"{name}: {text!r} in the environment is no whole number of 0 or more. Set it to one, as srun and "
                f"torchrun do, or remove it (unset {name}) for a run of one process."
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
    is_launched = "TORCHELASTIC_RUN_ID" in env or ("SLURM_PROCID" in env and int(env.get("SLURM_NTASKS") or 1) > 1)
    if num_nodes < 2 or is_launched:
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
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(
            f"MASTER_PORT: {port!r} in the environment is no port. Give a number from 1 to 65535 that is free on node "
            "0, the same on every node."
        )
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
