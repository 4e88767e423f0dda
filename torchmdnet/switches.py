"""Switches in the environment: ``1`` turns one on, ``0`` off, and nothing leaves it as it is."""

from __future__ import annotations

import os

from torchmdnet.errors import ConfigError

__all__ = ["SWITCHES", "check_switches", "is_on"]

#: Names, and whether each is on where the environment says nothing.
SWITCHES = {
    "TORCHMDNET_CHECK_LOOPS": False,
    "TORCHMDNET_CHECK_SHAPES": False,
    "TORCHMDNET_MEMORY_CHECK": True,
    "TORCHMDNET_PLAIN_OPS": False,
    "TORCHMDNET_TRACEBACK": False,
}


def is_on(name: str) -> bool:
    """Whether a switch of :data:`SWITCHES` is on."""
    text = os.environ.get(name, "").strip()
    return text != "0" if text else SWITCHES[name]


def check_switches() -> None:
    """Refuse values that are neither ``1`` nor ``0``.

    Raises:
        ConfigError: Naming the variable and its value.
    """
    for name in SWITCHES:
        text = os.environ.get(name, "").strip()
        if text not in ("", "0", "1"):
            raise ConfigError(
                f"{name}: {text!r} in the environment is neither 1 (on) nor 0 (off). Set it to one of them, or remove "
                f"it (unset {name})."
            )
