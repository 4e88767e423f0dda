"""The largest and smallest values of settings, wherever they come from: a command line, a file, a checkpoint.

What lies beyond is a slip of the pen, or made to take all memory; it is refused before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmdnet.errors import ConfigError

__all__ = ["LARGEST", "LARGEST_COUNT", "NARROWEST", "check_limits", "check_range", "is_small"]

#: The largest whole number of any other setting.
LARGEST_COUNT = 10**9
#: Least distance between cutoff_lower and cutoff_upper, in Å; a radial basis needs some room.
NARROWEST = 0.01

#: The largest value of settings that decide how large a model is, how far it looks (Å), and what is beyond.
LARGEST: Mapping[str, float] = {
    "embedding_dimension": 65_536,
    "num_layers": 1_000,
    "num_rbf": 65_536,
    "num_heads": 65_536,
    "num_filters": 65_536,
    "output_mlp_num_layers": 1_000,
    "q_dim": 65_536,
    "max_z": 1_000_000,
    "cutoff_lower": 1_000,
    "cutoff_upper": 1_000,
    "coulomb_cutoff": 1_000,
    "coulomb_epsilon_solvent": 1e9,
    "max_num_neighbors": LARGEST_COUNT,
    "coulomb_max_num_neighbors": LARGEST_COUNT,
}


def check_limits(options: Mapping[str, Any]) -> None:
    """Refuse sizes and cutoffs that no model has.

    Args:
        options: Settings of a model by name; values of another kind are left to those who read them.

    Raises:
        ConfigError: With the key, the value and the limit.
    """
    for key, most in LARGEST.items():
        value = options.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value > most:
                raise ConfigError(f"{key}: {str(value)[:40]} is too large. It takes at most {most:,.10g}.")
            if value < 0 and "neighbors" not in key:
                raise ConfigError(f"{key}: {str(value)[:40]} is not valid. It takes no number below 0.")
            if key == "coulomb_cutoff" and not value >= NARROWEST:
                raise ConfigError(f"{key}: {value} is not valid. It takes a number of {NARROWEST:g} or more.")
    lower, upper = (options.get(key) for key in ("cutoff_lower", "cutoff_upper"))
    if isinstance(upper, (int, float)) and isinstance(lower or 0, (int, float)):
        check_range(float(lower or 0), float(upper))


#: Numbers of weights that are too few to be looked at.
FEW_WEIGHTS = 10**7


def is_small(options: Mapping[str, Any]) -> bool:
    """Whether a model of the package has so few weights that they need not be counted.

    Args:
        options: Settings of a model by name.
    """
    sizes = (options.get(key) for key in ("embedding_dimension", "num_layers", "num_rbf", "max_z", "q_dim"))
    F, L, K, Z, Q = (int(size) if isinstance(size, (int, float)) else 0 for size in sizes)
    return F * (F + Q + K) * (L + 1) + F * Z < FEW_WEIGHTS


def check_range(lower: float, upper: float) -> None:
    """Refuse cutoffs between which no distance lies.

    Raises:
        ConfigError: With both.
    """
    if not upper - lower >= NARROWEST:
        raise ConfigError(
            f"cutoff_lower={lower:g} is not below cutoff_upper={upper:g} (Å) by {NARROWEST:g} or more: no atom would "
            "have a neighbour."
        )
