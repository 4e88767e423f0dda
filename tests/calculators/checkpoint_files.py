"""Small checkpoints for the tests of the calculators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchmdnet.testing import tiny_model
from torchmdnet.testing.tiny import TINY


def write_checkpoint(path: Path, *, facts: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Path:
    """A file as training writes it; ``facts`` stand under the key of this package."""
    options = {"model": "tensornet", "charge": False, "spin": False, "remove_ref_energy": False, **options}
    model = tiny_model(seed=seed, **options)
    content: dict[str, Any] = {
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "hyper_parameters": {**TINY, **options},
    }
    if facts is not None:
        content["torchmdnet"] = {"version": "0", "state": {"rng": torch.get_rng_state()}, **facts}
    torch.save(content, path)
    return path
