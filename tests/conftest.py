"""Shared fixtures: small molecules, random rotations, and where the reference data lie."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter runs its kernels, and has to be chosen before the import
    os.environ.setdefault("TRITON_INTERPRET", "1")

logging.getLogger("torchmdnet.loop_cache").setLevel(
    logging.ERROR
)  # whether loops are compiled is not the tests' affair

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TORCHMDNET_SHARED_DATA", REPOSITORY.parent / "shared"))

#: Before a command, lets root meet what other users meet: files that may not be read or written.
WITHOUT_RIGHTS = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.getuid() == 0 and which("setpriv") else []


def load_tool(name: str) -> ModuleType:
    """A script of the folder ``tools``, as a module."""
    spec = importlib.util.spec_from_file_location("tool", REPOSITORY / "tools" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared(relative: str) -> Path:
    """A file of the reference data beside the checkout; the calling test is skipped when it is not there."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"reference data not found: {relative} (set TORCHMDNET_SHARED_DATA)")
    return path


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:
    """A command that sets up the package's log leaves it as it was for the next test."""
    logger = logging.getLogger("torchmdnet")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
